"""Text and image chat with Qwen2.5-VL: messages in, the assistant's words out.

The tokenizer, image processor and chat template are those of the checkpoint's own folder, run by
transformers without torch. Axes: B conversations, T prompt positions, N patches of all images.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.models import layers, qwen, qwen_vision
from starflow2_jax.models.qwen import QwenConfig
from starflow2_jax.params import Tree

# Prompts are padded to a multiple of this, so that similar ones share a compiled program.
LENGTH_STEP = 64

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Processor:
    """A folder's tokenizer, image processor, chat template and the tokens that end a turn."""

    tokenizer: Any
    images: Any
    template: str
    stop: tuple[int, ...]


@dataclass(frozen=True)
class Prompt:
    """What the model reads.

    Attributes:
        ids: int32 [B, T], padded on the left; valid: bool [B, T].
        positions: int32 [B, T, 3]; following: int32 [B], the position of the next token.
        patches: float32 [N, P] or None; grids: int [images, 3].
    """

    ids: np.ndarray
    valid: np.ndarray
    positions: np.ndarray
    following: np.ndarray
    patches: np.ndarray | None
    grids: np.ndarray


def open_processor(folder: str | Path) -> Processor:
    """The processor of a checkpoint's folder; nothing is fetched and no code of it is run.

    Raises:
        FileNotFoundError: no such folder.  ValueError: a part of the processor is missing.
    """
    import transformers

    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    # Earlier releases have the torch-free one under the plain name.
    kind = getattr(transformers, "Qwen2VLImageProcessorPil", None)
    kind = kind or transformers.Qwen2VLImageProcessor
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
        images = kind.from_pretrained(folder, **local)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{folder}: no tokenizer or image processor can be read: {reason}") from (
            error
        )
    template = tokenizer.chat_template
    if (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text("utf-8")
    elif (folder / "chat_template.json").exists():
        template = json.loads((folder / "chat_template.json").read_text("utf-8"))["chat_template"]
    if not isinstance(template, str):
        raise ValueError(f"{folder}: no chat template")
    stop, generation = tokenizer.eos_token_id, folder / "generation_config.json"
    if generation.exists():
        stop = json.loads(generation.read_text("utf-8")).get("eos_token_id", stop)
    stop = tuple(stop) if isinstance(stop, list) else (() if stop is None else (stop,))
    return Processor(tokenizer, images, template, stop)


def prepare(
    processor: Processor, conversations: Sequence[Sequence[Message]], cfg: QwenConfig
) -> Prompt:
    """Tokens, patches and positions of conversations that the assistant is to continue.

    Args:
        conversations: lists of `{"role", "content"}`; content is text, or a list of
            `{"type": "text", "text"}` and `{"type": "image", "image"}`. An image is a path, the
            bytes of a file, or uint8 [H, W, 3].

    Raises:
        ValueError: another kind of content, an image that is too large, of another shape or cannot
            be decoded, or text that itself holds image tokens; names conversation and message.
    """
    if not conversations:
        raise ValueError("conversations: none were given")
    texts, images = [], []
    for row, messages in enumerate(conversations):
        plain = [_plain(m, f"conversation {row}, message {i}") for i, m in enumerate(messages)]
        found = [image for _, held in plain for image in held]
        texts.append(_render(processor, [message for message, _ in plain], len(found), row, cfg))
        images += found
    patches, grids = None, np.zeros((0, 3), np.int64)
    if images:
        patches, grids = _patches(processor, images, cfg)
    counts = iter(grids.prod(1) // cfg.vision.merge**2 if images else ())
    rows = []
    for text in texts:
        ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        row: list[int] = []
        for token in ids:
            row += [token] * (int(next(counts)) if token == cfg.image_token else 1)
        rows.append(row)
    length = -(-max(map(len, rows)) // LENGTH_STEP) * LENGTH_STEP
    ids, valid = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        ids[i, length - len(row) :], valid[i, length - len(row) :] = row, True
    positions, following = qwen.rope_indices(ids, cfg, grids, valid)
    return Prompt(ids, valid, positions, following, patches, grids)


def _plain(message: Message, where: str) -> tuple[Message, list[np.ndarray]]:
    """A message for the template, and its images as arrays."""
    content = message.get("content")
    if not isinstance(message.get("role"), str) or not isinstance(content, str | list | tuple):
        raise ValueError(f"{where}: expected a role and content that is text or a list of parts")
    if isinstance(content, str):
        return message, []
    parts, images = [], []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif kind == "image" and "image" in part:
            parts.append({"type": "image"})
            images.append(read_pixels(part["image"], f"{where}, part {i}"))
        else:
            raise ValueError(f"{where}, part {i}: expected text or an image, got type {kind!r}")
    return {**message, "content": parts}, images


def read_pixels(image: Any, where: str) -> np.ndarray:
    """uint8 [H, W, 3] of an array, of the path of a file, or of its bytes.

    Raises:
        ValueError: another kind of image, one that cannot be decoded or is too large.
    """
    from starflow2_jax.data import images
    from starflow2_jax.data.manifest import DatasetError

    if isinstance(image, str | Path):
        path = Path(image)
        if not path.is_file():
            raise ValueError(f"{where}: {image}: no such file (addresses are not fetched)")
        image, where = path.read_bytes(), f"{where}, {path}"
    if isinstance(image, bytes):
        try:
            return images.decode(image, where)
        except DatasetError as error:
            raise ValueError(str(error)) from error
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(
            f"{where}: expected uint8 [H, W, 3], got {image.dtype} {list(image.shape)}"
        )
    if image.shape[0] * image.shape[1] > images.MAX_PIXELS:
        raise ValueError(
            f"{where}: {image.shape[0]} x {image.shape[1]} pixels are more than the "
            f"{images.MAX_PIXELS} allowed"
        )
    return image


def _render(
    processor: Processor, messages: list[Message], images: int, row: int, cfg: QwenConfig
) -> str:
    text = processor.tokenizer.apply_chat_template(
        messages, chat_template=processor.template, tokenize=False, add_generation_prompt=True
    )
    held = text.count(processor.tokenizer.convert_ids_to_tokens(cfg.image_token))
    if held != images:
        raise ValueError(
            f"conversation {row}: {images} images were given, its text holds {held} image tokens"
        )
    return text


def _patches(
    processor: Processor, images: list[np.ndarray], cfg: QwenConfig
) -> tuple[np.ndarray, np.ndarray]:
    if cfg.vision is None:
        raise ValueError("images were given to a model that has no vision tower")
    ours = (cfg.vision.patch, cfg.vision.merge, cfg.vision.frames)
    cut = processor.images
    theirs = (cut.patch_size, cut.merge_size, cut.temporal_patch_size)
    if theirs != ours:
        raise ValueError(
            f"the image processor cuts (patch, merge, frames) = {theirs}, the tower reads {ours}"
        )
    if not cut.do_resize:
        for image in images:
            qwen_vision.check_size(*image.shape[:2], cfg.vision)
    done = cut(images=images, return_tensors="np")
    return np.asarray(done["pixel_values"], np.float32), np.asarray(done["image_grid_thw"])


def generate(
    params: Tree,
    cfg: QwenConfig,
    prompt: Prompt,
    *,
    max_tokens: int = 256,
    stop: Sequence[int] = (),
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[int]]:
    """Token ids that continue each row, up to and without the first of `stop`.

    Args:
        temperature: 0 takes the likeliest token. A row's draws depend on `seed`, the row's number
            and the place of the token alone.
    """
    at = None
    if prompt.patches is not None:
        at = qwen_vision.plan(prompt.grids, cfg.vision)
    ids, counts = _generate(
        params,
        prompt.ids,
        prompt.valid,
        prompt.positions,
        prompt.following,
        prompt.patches,
        at,
        jnp.asarray(stop, jnp.int32),
        jnp.float32(temperature),
        jax.random.key(seed),
        cfg,
        max_tokens,
    )
    return [row[:count].tolist() for row, count in zip(np.asarray(ids), np.asarray(counts))]


@functools.partial(jax.jit, static_argnums=(10, 11))
def _generate(
    params, ids, valid, positions, following, patches, at, stop, temperature, key, cfg, max_tokens
):
    batch, length = ids.shape
    h = qwen.embed_multimodal(params, ids, cfg, patches, at)
    params = {**params, "layers": layers.unstack(params["layers"])}
    cache = qwen.empty_cache(cfg, batch, length + max_tokens, h.dtype)
    seen = jnp.pad(valid, ((0, 0), (0, max_tokens)), constant_values=True)
    slots = jnp.arange(length + max_tokens)
    mask = seen[:, None, :] & (slots <= jnp.arange(length)[:, None])
    states, cache = qwen.apply_layers(params, h, cfg, positions, mask, cache=cache)
    last = length - 1 - jnp.argmax(valid[:, ::-1], axis=1)
    state = states[jnp.arange(batch), last]
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch))

    def pick(state, index):
        scores = qwen.logits(params, state, cfg)
        draws = jax.vmap(lambda k: jax.random.fold_in(k, index))(keys)
        warm = scores / jnp.maximum(temperature, 1e-6)
        drawn = jax.vmap(jax.random.categorical)(draws, warm)
        return jnp.where(temperature > 0, drawn, jnp.argmax(scores, -1)).astype(jnp.int32)

    def going(carry):
        index, _, _, counts, _ = carry
        return (index < max_tokens) & (counts == index).any()

    def step(carry):
        index, state, out, counts, cache = carry
        token = pick(state, index)
        alive = (counts == index) & ~(token[:, None] == stop).any(-1)
        out = out.at[:, index].set(token)
        where = jnp.broadcast_to((following + index)[:, None, None], (batch, 1, 3))
        mask = seen[:, None, :] & (slots <= length + index)
        h = qwen.embed(params, token[:, None], cfg)
        states, cache = qwen.apply_layers(params, h, cfg, where, mask, cache=cache)
        return index + 1, states[:, 0], out, counts + alive, cache

    start = (jnp.int32(0), state, jnp.zeros((batch, max_tokens), jnp.int32))
    start = (*start, jnp.zeros(batch, jnp.int32), cache)
    _, _, out, counts, _ = jax.lax.while_loop(going, step, start)
    return out, counts


def chat(
    params: Tree,
    cfg: QwenConfig,
    processor: Processor,
    conversations: Sequence[Sequence[Message]],
    **options: Any,
) -> list[str]:
    """The assistant's next turn of each conversation; `options` as those of `generate`.

    Raises:
        ValueError: as `prepare`.
    """
    prompt = prepare(processor, conversations, cfg)
    options = {"stop": processor.stop, **options}
    rows = generate(params, cfg, prompt, **options)
    return processor.tokenizer.batch_decode(rows, skip_special_tokens=True)
