"""Grids of pictures and words for fixed prompts and seeds, to watch a STARFlow2's stages with.

Prompts are the first records of the evaluation data, each up to what is learnt of it, by kind:

    samples   said                  ->  picture                  where images are trained
    answers   shown and asked       ->  words                    where text is trained
    edits     shown and said        ->  picture                  where both are
    reasons   shown and asked       ->  picture, and words       where both are

Everything is drawn on one device, by the same programs on any mesh. That device holds all weights
meanwhile, and once more as the steps read them; the others hold one of them at a time.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from starflow2_jax.data import chat_layout, packed_batches, records
from starflow2_jax.data.records import Img, Record
from starflow2_jax.evaluation.shapes import ask as asking
from starflow2_jax.inference import options
from starflow2_jax.inference.model import Model
from starflow2_jax.inference.prompts import Part
from starflow2_jax.latents.codec import Codec
from starflow2_jax.mesh import make_mesh, replicated
from starflow2_jax.models.backbone import BackboneConfig
from starflow2_jax.params import Tree
from starflow2_jax.training.losses import interleaved as starflow2_loss
from starflow2_jax.training.tasks import starflow2

# What is to follow a prompt of each kind (`asking.KINDS`).
KINDS = {"samples": "picture", "answers": "words", "edits": "picture", "reasons": "both"}
# Records that are looked at of each dataset, and tokens of an answer at most.
SEARCHED, WORDS = 256, 40


class Prompt(NamedTuple):
    """What a model is given, and what of it is shown: a picture or None, and the last words."""

    parts: list[Part]
    shown: np.ndarray | None
    said: str


class Grid(NamedTuple):
    """Images uint8 [n, H, W, 3] and their captions."""

    name: str
    images: np.ndarray
    captions: list[str]
    columns: int | None


def kinds(cfg: Mapping[str, Any]) -> tuple[str, ...]:
    """What a training can show."""
    stage = starflow2_loss.stage_of(cfg["train"]["trainable"], starflow2.model_config(cfg))
    both = stage.images and stage.text
    shown = (stage.images, stage.text, both, both)
    return tuple(kind for kind, can in zip(KINDS, shown) if can)


def kind_of(record: Record) -> str:
    """Of which kind a record is; empty where it is none of them."""
    learnt = [isinstance(segment, Img) for segment in record.segs if segment.loss]
    shown = any(isinstance(segment, Img) for segment in record.segs if not segment.loss)
    if not any(learnt):
        return "answers" if shown and learnt else ""
    if learnt == [True]:
        return "edits" if shown else "samples"
    return "reasons" if shown and learnt[0] and learnt.count(True) == 1 else ""


def prompts(
    cfg: Mapping[str, Any], opts: packed_batches.PackedBatchOptions, pixels: int
) -> dict[str, list[Prompt]]:
    """By kind, at most `sample.count` of them, half as many where two pictures are shown.

    Args:
        opts: of the data they come from; pixels: side of the codec's images.

    Raises:
        DatasetError: a folder or an image that cannot be read.
    """
    opts, count = dataclasses.replace(opts, pixels=pixels), cfg["sample"]["count"]
    room = {"samples": count, "answers": count, "edits": -(-count // 2), "reasons": -(-count // 2)}
    found: dict[str, list[Prompt]] = {kind: [] for kind in kinds(cfg)}
    if "samples" in found and cfg["sample"]["prompts"]:
        given = [str(text) for text in cfg["sample"]["prompts"]]
        texts = [given[i % len(given)] for i in range(count)]
        found["samples"] = [Prompt([Part("text", "user", text)], None, text) for text in texts]
    for entry in opts.mixture or ({"path": opts.path},):
        dataset = records.read(entry["path"])
        for index in range(min(SEARCHED, len(dataset))):
            record = dataset[index]
            group = found.get(kind_of(record))
            if group is not None and len(group) < room[kind_of(record)]:
                group.append(_prompt(opts, record, dataset.location(index)))
    return {kind: group for kind, group in found.items() if group}


def _prompt(opts: packed_batches.PackedBatchOptions, record: Record, where: str) -> Prompt:
    parts: list[Part] = []
    for segment in record.segs:
        if segment.loss:
            break
        if isinstance(segment, Img):
            image = packed_batches.read_image(opts, record, segment.i, where)
            parts.append(Part("image", segment.role, image=image))
        else:
            parts.append(Part("text", segment.role, segment.s))
    shown = [part.image for part in parts if part.kind == "image"]
    said = [part.text for part in parts if part.kind == "text"]
    return Prompt(parts, shown[0] if shown else None, said[-1] if said else "")


def draw(model: Model, given: Mapping[str, Sequence[Prompt]], rows_: int = 16) -> Iterator[Grid]:
    """A grid of each kind: of what is drawn, or beside what was shown what came of it.

    Args:
        rows_: prompts at a time.
    """
    drawing = options.sampling_defaults(model.cfg["sample"])
    common = {"rows": rows_, "max_tokens": WORDS, "seed": model.cfg["seed"]}
    ask = asking.asker(model, **common, **drawing)
    for kind, group in given.items():
        images, captions = [], []
        answers = ask([prompt.parts for prompt in group], KINDS[kind])
        for prompt, answer in zip(group, answers):
            said = asking.said(answer)
            drawn = [part.image for part in answer if part.kind == "image"]
            if kind == "samples":
                images += drawn
                captions.append(prompt.said)
            elif kind == "answers":
                images.append(prompt.shown)
                captions.append(f"{prompt.said} > {said}")
            else:
                images += [prompt.shown, *drawn]
                captions += [prompt.said, f"> {said}".strip()]
        pairs = kind in ("edits", "reasons")
        yield Grid(kind, np.stack(images), captions, min(8, len(images)) if pairs else None)


# ------------------------------------------------------------------------------- inside a training


@dataclass(frozen=True)
class Grids:
    """What a training draws its grids with besides its weights.

    Attributes:
        gather: puts an array together on every device of the training's mesh.
    """

    cfg: Mapping[str, Any]
    shape: BackboneConfig
    tokenizer: chat_layout.Tokenizer
    codec: Codec
    given: Mapping[str, Sequence[Prompt]]
    gather: Callable[[jax.Array], jax.Array]


def prepare(
    cfg: Mapping[str, Any],
    shape: BackboneConfig,
    opts: packed_batches.PackedBatchOptions,
    codec: Codec | None,
    mesh: Mesh,
) -> Grids | str:
    """Opens what `from_state` needs, or says why nothing can be drawn.

    Args:
        shape: of the model; opts: of the data the prompts come from; mesh: of the training.

    Raises:
        DatasetError: as `prompts`.
    """
    if codec is None:
        return "neither fae.path names a codec, nor is that of the stored latents where it was"
    if "pixel_decoder" not in codec.params:
        return "the codec has no pixel decoder"
    given = prompts(cfg, opts, codec.model.pixels)
    if not given:
        return f"the first {SEARCHED} records hold nothing that this stage can show"
    held = chat_layout.open_tokenizer(opts.tokenizer)
    gather = jax.jit(lambda a: a, out_shardings=replicated(mesh))
    return Grids(cfg, shape, held, codec, given, gather)


def from_state(grids: Grids, params: Tree) -> list[Grid]:
    """The grids of a training's weights; every process has to call it, and process 0 draws.

    Args:
        params: every subtree, wherever it lies on the mesh.
    """
    device = jax.local_devices()[0]

    def whole(a):
        a = a if a.is_fully_replicated else grids.gather(a)
        return next(part.data for part in a.addressable_shards if part.device == device)

    held = jax.tree.map(whole, params)
    if jax.process_index():
        return []
    model = Model(grids.cfg, grids.shape, held, grids.tokenizer, grids.codec)
    with jax.set_mesh(make_mesh("data=1", [device])):
        return list(draw(model, grids.given))
