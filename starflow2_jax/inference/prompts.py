"""Prompts and answers of an interleaved model: conversations as lists of parts.

A prompt is a text, or a list whose entries are texts, images (uint8 [H, W, 3], the path or the
bytes of a file), `Part`s, or chat messages, `{"role", "content"}`, whose content is a text or a
list of `{"type": "text", "text"}` and `{"type": "image", "image"}`. Entries without a role belong
to the user.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROLES = ("none", "system", "user", "assistant")


@dataclass(frozen=True, eq=False)
class Part:
    """A text or an image of a conversation."""

    kind: str  #: `text` or `image`
    role: str = "assistant"  #: the speaker of the turn that the part belongs to
    text: str = ""  #: the text of a text part
    tokens: tuple[int, ...] = ()  #: the token ids of a generated text
    image: np.ndarray | None = None  #: uint8 [H, W, 3]; None without a codec
    #: The noisy latents [N, D] of a generated image, which the model reads and scores
    latent: np.ndarray | None = None
    #: The clean latents [N, D] of a generated image, which the model reads before it goes on, if
    #: it reads images with a noise of their own; None for `latent`
    clean_latent: np.ndarray | None = None
    #: Nats under the plain model (no guidance, temperature 1, no truncation), conditioned on all
    #: earlier parts. For an image it is that of the noisy latents, before any denoising.
    log_likelihood: float | None = None
    #: Nats under the density that was sampled from; 0 for greedy tokens
    sampling_log_likelihood: float | None = None
    #: Nats under the plain model given the null prompt, if that branch was run
    unconditional_log_likelihood: float | None = None
    #: Nats of the sampled delimiters of the part (an image's `<|vision_start|>`, the end of the
    #: turn after the last part). No other field includes them.
    delimiters: float = 0.0
    truncated: bool = False  #: true if the token limit cut the part off

    @property
    def is_context(self) -> bool:
        """True for the images of user and system, which a model reads but does not draw."""
        return self.kind == "image" and self.role in ("user", "system")

    @property
    def is_counted(self) -> bool:
        """True unless the part is an empty text, which gets no number within its row."""
        return self.kind == "image" or bool(self.text or self.tokens)


def parse_prompt(prompt: Any, location: str, role: str = "user") -> list[Part]:
    """Return the parts of a prompt; entries without a role have this one.

    Args:
        location: the prompt's name in error messages, such as `prompt 3`.
    """
    is_single = isinstance(prompt, str | bytes | Path | Part | Mapping | np.ndarray)
    entries = [prompt] if is_single else prompt
    if not isinstance(entries, Sequence):
        raise ValueError(
            f"{location}: expected a text or a list of parts, got {type(prompt).__name__}"
        )
    parts: list[Part] = []
    for i, entry in enumerate(entries):
        if isinstance(entry, Part):
            if entry.kind not in ("text", "image") or entry.role not in ROLES:
                raise ValueError(
                    f"{location}, part {i}: unknown kind {entry.kind!r} or role {entry.role!r}"
                )
            parts.append(entry)
        elif isinstance(entry, Mapping) and "role" in entry:
            parts += _parse_message(entry, f"{location}, message {i}")
        else:
            parts.append(_parse_part(entry, role, f"{location}, part {i}"))
    return parts


def _parse_message(message: Mapping[str, Any], location: str) -> list[Part]:
    role, content = message["role"], message.get("content")
    if role not in ROLES:
        raise ValueError(f"{location}: unknown role {role!r}, expected one of {', '.join(ROLES)}")
    if isinstance(content, str):
        return [_text_part(role, content, location)]
    if not isinstance(content, Sequence):
        raise ValueError(
            f"{location}: content is {type(content).__name__}, expected a text or a list"
        )
    return [_parse_part(entry, role, f"{location}, part {i}") for i, entry in enumerate(content)]


def _parse_part(entry: Any, role: str, location: str) -> Part:
    if isinstance(entry, str):
        return _text_part(role, entry, location)
    if isinstance(entry, Mapping):
        kind = entry.get("type")
        if kind == "text" and isinstance(entry.get("text"), str):
            return _text_part(role, entry["text"], location)
        if kind != "image" or "image" not in entry:
            raise ValueError(f"{location}: expected text or an image, got type {kind!r}")
        entry = entry["image"]
    return Part("image", role, image=read_pixels(entry, location))


def _text_part(role: str, text: str, location: str) -> Part:
    from starflow2_jax.data.untrusted import clean_text

    return Part("text", role, clean_text(text, location))


def to_messages(
    parts: Sequence[Part], encode: Callable[[str], Any] = str, loss: bool = False
) -> list[Any]:
    """Return parts as `data.chat_layout.MessagePart` objects; images are numbered in order.

    `encode` is applied to texts without tokens; encoded texts are not joined with their neighbors.
    Texts have this `loss`; images have one unless they are only read (`Part.is_context`).
    """
    from starflow2_jax.data.chat_layout import MessagePart

    image_numbers = iter(range(len(parts)))
    return [
        MessagePart(part.role, next(image_numbers), not part.is_context)
        if part.kind == "image"
        else MessagePart(part.role, part.tokens or encode(part.text), loss)
        for part in parts
    ]


def read_chat(path: str | Path) -> list[Any]:
    """Read the messages of a chat file, a JSON list with image paths relative to the file."""
    from starflow2_jax.data import untrusted

    data = untrusted.read_file(path, untrusted.MAX_LINE_BYTES)
    return _read_messages(data, str(path), Path(path).parent)


def read_batch(path: str | Path) -> list[list[Any]]:
    """Read the chats of a batch file, one JSON list per line."""
    from starflow2_jax.data import untrusted

    chats = [
        _read_messages(line, f"{path}, line {number + 1}", Path(path).parent)
        for number, line in untrusted.read_lines(path)
    ]
    if not chats:
        raise ValueError(f"{path}: the file contains no chat; expected one JSON list per line")
    return chats


def _read_messages(data: bytes, location: str, folder: Path) -> list[Any]:
    from starflow2_jax.data import untrusted

    messages = untrusted.decode_json(data, location)
    valid = isinstance(messages, list) and bool(messages)
    if not valid or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise ValueError(f"{location}: expected a list of messages with role and content")
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and isinstance(part.get("image"), str):
                part["image"] = str(folder / part["image"])
    return messages


def read_pixels(image: Any, location: str) -> np.ndarray:
    """Return uint8 [H, W, 3] of an array, of the path of an image file, or of its bytes."""
    from starflow2_jax.data import images, untrusted
    from starflow2_jax.data.manifest import DatasetError

    if isinstance(image, str | Path):
        if "://" not in str(image) and not os.path.exists(str(image).replace("\0", "?")):
            raise ValueError(f"{location}: {image}: no such file (URLs are not fetched)")
        location = f"{location}, {image}"
        image = untrusted.read_file(image, images.MAX_BYTES, location)
    if isinstance(image, bytes):
        try:
            return images.decode(image, location)
        except DatasetError as error:
            raise ValueError(str(error)) from error
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        shape = list(image.shape)
        raise ValueError(f"{location}: expected uint8 [H, W, 3], got {image.dtype} {shape}")
    height, width = image.shape[:2]
    if height * width > images.MAX_PIXELS:
        limit = f"more than the {images.MAX_PIXELS} allowed"
        raise ValueError(f"{location}: {height} x {width} pixels are {limit}")
    return image


def check_image_size(image: np.ndarray, side: int, location: str) -> None:
    """Raise ValueError unless the image is `side` pixels high and wide."""
    if image.shape[:2] != (side, side):
        raise ValueError(
            f"{location}: the image is {image.shape[0]} x {image.shape[1]} (height x width), but "
            f"this model takes {side} x {side} only; --resize pad or --resize center_crop "
            "(inference.resize) bring it to that size"
        )
