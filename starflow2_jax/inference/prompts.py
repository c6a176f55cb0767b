"""What is given to an interleaved model and what it gives back: conversations as lists of parts.

A prompt is a text, or a list whose entries are texts, images (uint8 [H, W, 3], the path or the
bytes of a file), `Part`s, or messages of a chat, `{"role", "content"}` with content that is a text
or a list of `{"type": "text", "text"}` and `{"type": "image", "image"}`. What has no role is the
user's.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from starflow2_jax.inference.qwen_chat import read_pixels

ROLES = ("none", "system", "user", "assistant")


@dataclass(frozen=True, eq=False)
class Part:
    """A text or an image of a conversation.

    Attributes:
        kind: `text` or `image`; role: of whose turn it is.
        text: of a text; tokens: its ids, where it was generated.
        image: uint8 [H, W, 3], None without a codec; latent: the noisy latents [N, D] that the
            model reads and whose likelihood is told, where it was generated.
        log_likelihood: nats under the plain model (no guidance, temperature 1, nothing cut off)
            given all before; of an image of its noisy latents, before anything is cleaned up.
        sampling_log_likelihood: nats of the density that was drawn from, 0 for likeliest tokens.
        unconditional_log_likelihood: nats under the plain model given the null prompt, where that
            branch was run.
        delimiters: nats of the drawn delimiters that belong to the part (an image's
            `<|vision_start|>`, the end of the turn behind the last part), in none of the others.
        truncated: whether it was cut off by the number of tokens.
    """

    kind: str
    role: str = "assistant"
    text: str = ""
    tokens: tuple[int, ...] = ()
    image: np.ndarray | None = None
    latent: np.ndarray | None = None
    log_likelihood: float | None = None
    sampling_log_likelihood: float | None = None
    unconditional_log_likelihood: float | None = None
    delimiters: float = 0.0
    truncated: bool = False

    @property
    def counts(self) -> bool:
        """Whether it has a number among the parts of its row: it is not an empty text."""
        return self.kind == "image" or bool(self.text or self.tokens)


def read(prompt: Any, where: str, role: str = "user") -> list[Part]:
    """A prompt's parts.

    Raises:
        ValueError: an unknown role or kind of content, or an image that cannot be read; names the
            place, which begins with `where`.
    """
    entries = [prompt] if isinstance(prompt, str | bytes | Path | Part | Mapping) else prompt
    if isinstance(entries, np.ndarray):
        entries = [entries]
    if not isinstance(entries, Sequence):
        raise ValueError(
            f"{where}: expected a text or a list of parts, got {type(prompt).__name__}"
        )
    found: list[Part] = []
    for i, entry in enumerate(entries):
        at = f"{where}, part {i}"
        if isinstance(entry, Part):
            if entry.kind not in ("text", "image") or entry.role not in ROLES:
                raise ValueError(f"{at}: kind {entry.kind!r} of role {entry.role!r}")
            found.append(entry)
        elif isinstance(entry, Mapping) and "role" in entry:
            found += _message(entry, f"{where}, message {i}")
        else:
            found.append(_part(entry, role, at))
    return found


def _message(message: Mapping[str, Any], where: str) -> list[Part]:
    role, content = message["role"], message.get("content")
    if role not in ROLES:
        raise ValueError(f"{where}: unknown role {role!r}, expected one of {', '.join(ROLES)}")
    if isinstance(content, str):
        return [Part("text", role, content)]
    if not isinstance(content, Sequence):
        raise ValueError(f"{where}: content is {type(content).__name__}, expected a text or a list")
    return [_part(entry, role, f"{where}, part {i}") for i, entry in enumerate(content)]


def _part(entry: Any, role: str, where: str) -> Part:
    if isinstance(entry, str):
        return Part("text", role, entry)
    if isinstance(entry, Mapping):
        kind = entry.get("type")
        if kind == "text" and isinstance(entry.get("text"), str):
            return Part("text", role, entry["text"])
        if kind != "image" or "image" not in entry:
            raise ValueError(f"{where}: expected text or an image, got type {kind!r}")
        entry = entry["image"]
        if isinstance(entry, str):
            entry = Path(entry)
    return Part("image", role, image=read_pixels(entry, where))


def read_chat(path: str | Path) -> list[Any]:
    """The messages of a chat file: a JSON list. Paths of images are beside the file.

    Raises:
        FileNotFoundError: no such file. ValueError: it is no such list.
    """
    return _messages(Path(path).read_text("utf-8"), str(path), Path(path).parent)


def read_batch(path: str | Path) -> list[list[Any]]:
    """The chats of a batch file, a JSON list a line."""
    path = Path(path)
    lines = path.read_text("utf-8").splitlines()
    filled = [(i, line) for i, line in enumerate(lines, 1) if line.strip()]
    if not filled:
        raise ValueError(f"{path}: no chat in it")
    return [_messages(line, f"{path}, line {i}", path.parent) for i, line in filled]


def _messages(text: str, where: str, folder: Path) -> list[Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    wrong = not isinstance(found, list) or not found
    if wrong or not all(isinstance(m, dict) and "role" in m for m in found):
        raise ValueError(f"{where}: expected a list of messages with role and content")
    for message in found:
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and isinstance(part.get("image"), str):
                part["image"] = str(folder / part["image"])
    return found


def check_pixels(image: np.ndarray, side: int, where: str) -> np.ndarray:
    """The image, of the one size that the model takes.

    Raises:
        ValueError: it is of another size, which is named.
    """
    if image.shape[:2] != (side, side):
        raise ValueError(
            f"{where}: the image is {image.shape[0]} x {image.shape[1]} (h x w), this model takes "
            f"{side} x {side} only; images are not resized"
        )
    return image
