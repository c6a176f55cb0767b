"""Grids of samples for fixed prompts and seeds, to monitor a training run.

Prompts of a STARFlow2 are records of the evaluation data, up to the first target segment: the first
records, or with `sample.spread` records from all over the data. It draws its grids on one device,
which meanwhile stores all weights twice: as trained, and in the layout of the decode loop. The
other devices gather one array at a time.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from starflow2_jax.data import chat_layout, image_batches, packed_batches, records
from starflow2_jax.data.records import Img, Record
from starflow2_jax.evaluation import ask
from starflow2_jax.inference import flow_sampler, options as inference_options
from starflow2_jax.inference.flow_sampler import FlowModel, FlowSampling
from starflow2_jax.inference.model import Model
from starflow2_jax.inference.prompts import Part
from starflow2_jax.latents.codec import Codec
from starflow2_jax.mesh import make_mesh, replicated
from starflow2_jax.models.backbone import BackboneConfig
from starflow2_jax.params import Tree
from starflow2_jax.training.losses import interleaved
from starflow2_jax.training.program import Program, to_device
from starflow2_jax.training.tasks import starflow2

# The kind of answer (see `ask.AnswerFn`) to each kind of prompt: to captions, questions about an
# image, requests to edit one, and questions that a second image helps with.
KINDS = {"samples": "image", "answers": "text", "edits": "image", "reasons": "both"}
# Records of each dataset that are searched for prompts.
MAX_RECORDS = 256
MAX_TOKENS = 40


class Grid(NamedTuple):
    """Images uint8 [n, H, W, 3] and their captions; `columns` as in `image_grid.grid`."""

    name: str
    images: np.ndarray
    captions: Sequence[str] | None
    columns: int | None = None


def draw_flow_grid(model: FlowModel, options: Mapping[str, Any]) -> Grid:
    """Draw images as the `sample` keys of the configuration say.

    Labels cycle through the classes, and captions through `sample.prompts` or the first rows of the
    dataset that `options` (of `data.image_batches`) describe.
    """
    sample, count, cfg = model.cfg["sample"], model.cfg["sample"]["count"], model.model_config
    conditions: dict[str, Any] = {}
    captions = None
    if cfg.classes:
        conditions["labels"] = np.arange(count) % cfg.classes
        captions = [str(model.classes[i] if model.classes else i) for i in conditions["labels"]]
    elif cfg.text_channels:
        batch = next(iter(image_batches.eval_batches(options, batch_size=count)))
        if model.cfg["text"]["vocabulary"]:
            prompts = list(sample["prompts"]) or [_decode_bytes(row) for row in batch["tokens"]]
            captions = [prompts[i % len(prompts)] for i in range(count)]
            conditions["prompts"] = captions
        else:
            conditions["text"], captions = batch["text"], list(batch["id"])
    sampling = FlowSampling(
        guidance=sample["guidance"],
        rule=sample["guidance_rule"],
        denoise=sample["denoise"],
        seed=model.cfg["seed"],
        batch=count,
    )
    images = flow_sampler.generate(model, count, **conditions, sampling=sampling)
    if images.dtype != np.uint8:
        images = _latents_as_images(images, cfg.side)
    return Grid("samples", images, captions)


def _latents_as_images(latents: np.ndarray, side: int) -> np.ndarray:
    """Return the first three channels of latents [n, T, D] as images uint8 [n, side, side, 3]."""
    channels = latents[..., :3].reshape(len(latents), side, side, -1)
    low, high = np.quantile(channels, 0.01), np.quantile(channels, 0.99)
    return (255 * np.clip((channels - low) / (high - low), 0, 1)).astype(np.uint8)


def _decode_bytes(tokens: np.ndarray) -> str:
    """Return the text of byte tokens, which are bytes + 1 and padded with 0."""
    return bytes(int(t) - 1 for t in tokens if t).decode(errors="replace")


def draw_reconstruction_grid(
    program: Program, state: Any, frozen: Any, options: Mapping[str, Any]
) -> Grid:
    """Return the first images of a dataset, each followed by its reconstruction."""
    num_shards = program.mesh.shape["data"] * program.mesh.shape["fsdp"]
    size = -(-program.cfg["sample"]["count"] // 2 // num_shards) * num_shards
    batch = next(iter(image_batches.eval_batches(options, batch_size=size)))
    images = np.asarray(program.reconstruct(state.ema, frozen, to_device(program, batch)))
    pairs = np.stack([batch["image"], images], 1)
    return Grid("samples", pairs.reshape(-1, *images.shape[1:]), None)


class Prompt(NamedTuple):
    """The parts of a prompt, its first image (or None), and its last text, the caption."""

    parts: list[Part]
    image: np.ndarray | None
    caption: str


def trained_kinds(cfg: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the kinds of prompts whose answers a stage trains."""
    stage = interleaved.stage_of(cfg["train"]["trainable"], starflow2.model_config(cfg))
    both = stage.images and stage.text
    is_trained = (stage.images, stage.text, both, both)
    return tuple(kind for kind, trained in zip(KINDS, is_trained) if trained)


def kind_of(record: Record) -> str:
    """Return the kind of prompt that a record provides; empty if it provides none."""
    targets_are_images = [isinstance(segment, Img) for segment in record.segs if segment.loss]
    has_prompt_image = any(isinstance(s, Img) and not s.loss for s in record.segs)
    if not any(targets_are_images):
        return "answers" if has_prompt_image and targets_are_images else ""
    if targets_are_images == [True]:
        return "edits" if has_prompt_image else "samples"
    image_then_text = targets_are_images[0] and targets_are_images.count(True) == 1
    return "reasons" if has_prompt_image and image_then_text else ""


def read_prompts(
    cfg: Mapping[str, Any], options: packed_batches.PackedBatchOptions, pixels: int
) -> dict[str, list[Prompt]]:
    """Read `sample.count` prompts of each kind, half as many if two images are shown for each."""
    options, count = dataclasses.replace(options, pixels=pixels), cfg["sample"]["count"]
    half = -(-count // 2)
    limits = {"samples": count, "answers": count, "edits": half, "reasons": half}
    prompts: dict[str, list[Prompt]] = {kind: [] for kind in trained_kinds(cfg)}
    if "samples" in prompts and cfg["sample"]["prompts"]:
        texts = [str(text) for text in cfg["sample"]["prompts"]]
        texts = [texts[i % len(texts)] for i in range(count)]
        prompts["samples"] = [Prompt([Part("text", "user", t)], None, t) for t in texts]
    candidates: dict[str, list[tuple[Record, str]]] = {kind: [] for kind in prompts}
    is_spread = cfg["sample"].get("spread", False)
    for entry in options.mixture or ({"path": options.path},):
        dataset = records.read(entry["path"])
        number = min(MAX_RECORDS, len(dataset))
        for index in _evenly(len(dataset), number) if is_spread else range(number):
            record = dataset[index]
            if kind_of(record) in candidates:
                candidates[kind_of(record)].append((record, dataset.location(index)))
    for kind, group in candidates.items():
        free = limits[kind] - len(prompts[kind])
        chosen = _evenly(len(group), free) if is_spread else range(min(free, len(group)))
        prompts[kind] += [_prompt_of(options, *group[index]) for index in chosen]
    return {kind: group for kind, group in prompts.items() if group}


def _evenly(count: int, number: int) -> list[int]:
    """Return at most `number` of the indices 0 to `count` - 1, from all over them, in order."""
    number = min(count, number)
    return [count * (2 * k + 1) // (2 * number) for k in range(number)]


def _prompt_of(options: packed_batches.PackedBatchOptions, record: Record, location: str) -> Prompt:
    parts: list[Part] = []
    for segment in record.segs:
        if segment.loss:
            break
        if isinstance(segment, Img):
            image = packed_batches.read_image(options, record, segment.i, location)
            parts.append(Part("image", segment.role, image=image))
        else:
            parts.append(Part("text", segment.role, segment.s))
    images = [part.image for part in parts if part.kind == "image"]
    texts = [part.text for part in parts if part.kind == "text"]
    return Prompt(parts, images[0] if images else None, texts[-1] if texts else "")


def draw_grids(
    model: Model, prompts: Mapping[str, Sequence[Prompt]], batch_size: int = 16
) -> Iterator[Grid]:
    """Yield a grid of the answers to each kind of prompt, next to the prompts' images."""
    answer_fn = ask.make_answer_fn(
        model,
        batch_size=batch_size,
        max_tokens=MAX_TOKENS,
        seed=model.cfg["seed"],
        **inference_options.sampling_defaults(model.cfg["sample"]),
    )
    for kind, group in prompts.items():
        images, captions = [], []
        answers = answer_fn([prompt.parts for prompt in group], KINDS[kind])
        for prompt, answer in zip(group, answers):
            text = ask.answer_text(answer)
            generated = [part.image for part in answer if part.kind == "image"]
            if kind == "samples":
                images += generated
                captions.append(prompt.caption)
            elif kind == "answers":
                images.append(prompt.image)
                captions.append(f"{prompt.caption} > {text}")
            else:
                images += [prompt.image, *generated]
                captions += [prompt.caption, f"> {text}".strip()]
        columns = min(8, len(images)) if kind in ("edits", "reasons") else None
        yield Grid(kind, np.stack(images), captions, columns)


@dataclass(frozen=True)
class GridInputs:
    """Everything but the weights that a training run draws its grids with."""

    cfg: Mapping[str, Any]
    model_config: BackboneConfig
    tokenizer: chat_layout.Tokenizer
    codec: Codec
    prompts: Mapping[str, Sequence[Prompt]]  # by kind, as from `read_prompts`
    # Replicates an array on every device of the training's mesh
    gather: Callable[[jax.Array], jax.Array]


def prepare(
    cfg: Mapping[str, Any],
    model_config: BackboneConfig,
    options: packed_batches.PackedBatchOptions,
    codec: Codec | None,
    device_mesh: Mesh,
) -> GridInputs | str:
    """Return the inputs of `draw_from_params`, or the reason why no grid can be drawn."""
    if codec is None:
        return "neither fae.path nor the metadata of the stored latents leads to a codec"
    if "pixel_decoder" not in codec.params:
        return "the codec has no pixel decoder"
    prompts = read_prompts(cfg, options, codec.model.pixels)
    if not prompts:
        return f"none of the first {MAX_RECORDS} records is a prompt for what this stage trains"
    tokenizer = packed_batches.open_tokenizer(options)
    gather = jax.jit(lambda a: a, out_shardings=replicated(device_mesh))
    return GridInputs(cfg, model_config, tokenizer, codec, prompts, gather)


def draw_from_params(inputs: GridInputs, params: Tree) -> list[Grid]:
    """Draw the grids of a training run's weights (every subtree, in any sharding on its mesh).

    Every process has to call this function; process 0 draws, the others return an empty list.
    """
    device = jax.local_devices()[0]

    def to_one_device(array):
        array = array if array.is_fully_replicated else inputs.gather(array)
        return next(part.data for part in array.addressable_shards if part.device == device)

    local_params = jax.tree.map(to_one_device, params)
    if jax.process_index():
        return []
    model = Model(inputs.cfg, inputs.model_config, local_params, inputs.tokenizer, inputs.codec)
    with jax.set_mesh(make_mesh("data=1", [device])):
        return list(draw_grids(model, inputs.prompts))
