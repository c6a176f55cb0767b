"""Text to token ids, and a record as one causal sequence of text tokens and image slots.

The layout is that of Qwen's chat template: a turn is `<|im_start|>role`, a line end, what is said,
`<|im_end|>` and a line end; an image is `<|vision_start|>`, one slot for each of its N patches, and
`<|vision_end|>`; what has no role stands as it is. `layout` writes every delimiter, in training and
in generation.
"""

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.data.records import Record, Text

NULLS = ("none", "text", "all")
# Longer texts are seldom the same twice.
_CACHED_CHARACTERS = 200


def byte_tokens(text: str, length: int, where: str = "text") -> np.ndarray:
    """UTF-8 bytes + 1 of `text`, padded with 0 at the end: int32 [length].

    Raises:
      DatasetError: naming `where`, if the text has more than `length` bytes.
    """
    data = text.encode("utf-8")
    if len(data) > length:
        raise DatasetError(
            f"{where}: the text has {len(data)} bytes, but text_length is {length}: {text[:80]!r}"
        )
    tokens = np.zeros(length, np.int32)
    tokens[: len(data)] = np.frombuffer(data, np.uint8)
    tokens[: len(data)] += 1
    return tokens


@dataclass(frozen=True)
class Tokenizer:
    """A folder's tokenizer as the layout uses it.

    Attributes:
      encode: text to ids; the names of special tokens in it are ordinary text.
      decode: ids to text, special tokens left out.
      turn_start, turn_end, vision_start, vision_end, image: ids of the delimiters and of an image
        slot; pad: of positions that hold nothing.
      opening: ids before the first turn of a conversation that has no system turn of its own.
      size: number of ids.
    """

    encode: Callable[[str], tuple[int, ...]]
    decode: Callable[[Sequence[int]], str]
    turn_start: int
    turn_end: int
    vision_start: int
    vision_end: int
    image: int
    pad: int
    opening: tuple[int, ...]
    size: int


class Part(NamedTuple):
    """A piece of a conversation: `content` is text, its tokens, or the number of an image."""

    role: str
    content: str | tuple[int, ...] | int
    loss: bool = False


class Items(NamedTuple):
    """A laid-out sequence; every array has one entry a position.

    Attributes:
      ids: int32, of image slots the id of `Tokenizer.image`.
      image, patch: int32, which image and which of its patches stands there; -1 for text.
      target: bool, whether the item is learnt.
      part: int32, which of the parts, texts joined, it is of; -1 for delimiters.
    """

    ids: np.ndarray
    image: np.ndarray
    patch: np.ndarray
    target: np.ndarray
    part: np.ndarray


def open_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a local folder; nothing is fetched and no code of it is run.

    Raises:
      DatasetError: no tokenizer there, or one without the delimiters of Qwen's chat.
    """
    import transformers  # heavy

    try:
        held = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DatasetError(f"{folder}: no tokenizer in this folder: {reason}") from error
    vocabulary = held.get_vocab()
    names = {
        "turn_start": "<|im_start|>",
        "turn_end": "<|im_end|>",
        "vision_start": "<|vision_start|>",
        "vision_end": "<|vision_end|>",
        "image": "<|image_pad|>",
        "pad": "<|endoftext|>",
    }
    missing = [name for name in names.values() if name not in vocabulary]
    if missing:
        raise DatasetError(f"{folder}: the tokenizer has no {', '.join(missing)}")

    def plain(text: str) -> tuple[int, ...]:
        found = held(text, add_special_tokens=False, split_special_tokens=True)
        return tuple(found["input_ids"])

    cached = functools.lru_cache(maxsize=65536)(plain)
    return Tokenizer(
        encode=lambda text: (cached if len(text) <= _CACHED_CHARACTERS else plain)(text),
        decode=lambda ids: held.decode(list(ids), skip_special_tokens=True),
        opening=_opening(held, names["turn_start"]),
        size=max(len(held), max(vocabulary.values()) + 1),
        **{field: vocabulary[name] for field, name in names.items()},
    )


def _opening(held, turn_start: str) -> tuple[int, ...]:
    """Ids of what the folder's template puts before a first turn of the user."""
    if not isinstance(held.chat_template, str):
        return ()
    messages = [{"role": "user", "content": "."}]
    text = held.apply_chat_template(messages, tokenize=False)
    before = text[: text.index(f"{turn_start}user")]
    return tuple(held(before, add_special_tokens=False)["input_ids"]) if before else ()


def parts(record: Record) -> tuple[list[Part], list[int]]:
    """A record's segments, and which of `record.imgs` each of its images, in turn, is."""
    found, images = [], []
    for segment in record.segs:
        if isinstance(segment, Text):
            found.append(Part(segment.role, segment.s, segment.loss))
        else:
            found.append(Part(segment.role, len(images), segment.loss))
            images.append(segment.i)
    return found, images


def layout(
    given: Sequence[Part],
    tokenizer: Tokenizer,
    patches: int,
    *,
    null: str = "none",
    closed: bool = True,
    within: str = "",
) -> Items:
    """Text, delimiters and image slots of a conversation.

    Targets are the tokens of texts with loss, the patches of images with loss and the
    `<|vision_start|>` before them, and the `<|im_end|>` of an assistant's turn that ends in one of
    either. `<|vision_end|>` follows by itself and is none.

    Args:
      given: parts in order; neighbours with one role form a turn.
      patches: N.
      null: `text` empties the text of the user's turns, `all` their images too: the condition of
        guidance (design.md 5).
      closed: whether the last turn ends; otherwise it can be continued. An empty text opens one.
      within: the role whose turn is open already where a conversation goes on.

    Raises:
      ValueError: an unknown `null`.
    """
    if null not in NULLS:
        raise ValueError(f"null={null!r} is not one of {', '.join(NULLS)}")
    ids: list[int] = []
    image: list[int] = []
    patch: list[int] = []
    target: list[bool] = []
    owner: list[int] = []

    def write(tokens: Sequence[int], learnt: bool, of: int = -1, part: int = -1) -> None:
        ids.extend(tokens)
        image.extend([of] * len(tokens))
        patch.extend(range(len(tokens)) if of >= 0 else [-1] * len(tokens))
        target.extend([learnt] * len(tokens))
        owner.extend([part] * len(tokens))

    def end_turn(role: str, learnt: bool) -> None:
        if role != "none":
            write([tokenizer.turn_end], learnt and role == "assistant")
            write(tokenizer.encode("\n"), False)

    joined = _joined(given, null)
    if joined and joined[0].role in ("user", "assistant") and not within:
        write(tokenizer.opening, False)
    role, learnt = within or "none", False
    for number, part in enumerate(joined):
        if part.role != role:
            end_turn(role, learnt)
            role, learnt = part.role, False
            if role != "none":
                write([tokenizer.turn_start], False)
                write(tokenizer.encode(f"{role}\n"), False)
        if isinstance(part.content, str):
            write(tokenizer.encode(part.content), part.loss, part=number)
        elif isinstance(part.content, tuple):
            write(part.content, part.loss, part=number)
        else:
            write([tokenizer.vision_start], part.loss)
            write([tokenizer.image] * patches, part.loss, part.content, number)
            write([tokenizer.vision_end], False)
        learnt = part.loss
    if closed:
        end_turn(role, learnt)
    return Items(
        np.asarray(ids, np.int32),
        np.asarray(image, np.int32),
        np.asarray(patch, np.int32),
        np.asarray(target, bool),
        np.asarray(owner, np.int32),
    )


def _joined(given: Sequence[Part], null: str) -> list[Part]:
    """Parts with neighbouring texts of one turn joined, as the template's tokenizer sees them."""
    found: list[Part] = []
    for part in given:
        if part.role == "user" and null != "none":
            if not isinstance(part.content, int):
                part = part._replace(content="")
            elif null == "all":
                part = Part("user", "")
        last = found[-1] if found else None
        texts = last and isinstance(last.content, str) and isinstance(part.content, str)
        if texts and (last.role, last.loss) == (part.role, part.loss):
            found[-1] = last._replace(content=last.content + part.content)
        else:
            found.append(part)
    return found


# --------------------------------------------------------------------------------------- positions


def vlm_positions(items: Items, side: int) -> np.ndarray:
    """Qwen's (time, row, column) int32 [T, 3] of every item; an image is a side x side grid.

    An image's time stands still; what follows starts after its side.
    """
    new = (items.patch <= 0).astype(np.int64)  # text, and the first patch of an image
    steps = np.where(items.patch == 0, side, 1) * new
    start = np.cumsum(steps) - steps
    first = np.maximum.accumulate(np.where(new, np.arange(len(new)), 0))
    base = start[first] if len(new) else start
    inside = np.maximum(items.patch, 0)
    still = np.zeros_like(inside)
    return (base[:, None] + np.stack([still, inside // side, inside % side], -1)).astype(np.int32)


def flow_positions(items: Items, side: int) -> np.ndarray:
    """(row, column, k) int32 [T, 3] of the item that each item predicts (design.md 4).

    k counts text tokens and whole images alike. The last item's is that of a text after it.
    """
    new = items.patch <= 0
    k = np.cumsum(new) - 1
    inside = np.maximum(items.patch, 0)
    own = np.stack([inside // side, inside % side, k], -1)
    after = [[0, 0, k[-1] + 1 if len(k) else 0]]
    return np.concatenate([own[1:], after]).astype(np.int32)[: len(k)]
