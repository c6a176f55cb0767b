"""Text to token ids, and a record to one causal sequence of text tokens and image slots.

The layout is that of Qwen's chat template. A turn is `<|im_start|>role`, a newline, its content,
`<|im_end|>` and a newline. An image is `<|vision_start|>`, one slot for each of its N patches, and
`<|vision_end|>`. Parts without a role get no turn delimiters. `apply_chat_template` writes every
delimiter, in training and in generation. An image that is a target and is followed by other parts
may get a clean copy after it (`insert_copies`).
"""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from starflow2_jax.data import chat_template, tokenizer as tokenizer_files, untrusted
from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.data.records import Record, Text

NULL_CONDITIONS = ("none", "text", "all")
# Fields of `Tokenizer` and their tokens.
_SPECIAL_TOKENS = {
    "turn_start": "<|im_start|>",
    "turn_end": "<|im_end|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
    "image": "<|image_pad|>",
    "pad": "<|endoftext|>",
}
# Longer texts seldom come twice.
_CACHED_CHARACTERS = 200


def byte_tokens(text: str, length: int, location: str = "text") -> np.ndarray:
    """Encode `text` as UTF-8 bytes + 1, padded with 0 at the end: int32 [length]."""
    data = untrusted.clean_text(text, location).encode("utf-8")
    if len(data) > length:
        raise DatasetError(
            f"{location}: the text has {len(data)} bytes, but text_length is {length}: "
            f"{text[:80]!r}"
        )
    tokens = np.frombuffer(data, np.uint8).astype(np.int32) + 1
    return np.pad(tokens, (0, length - len(data)))


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer reduced to what the chat layout needs."""

    encode: Callable[[str], tuple[int, ...]]  # reads the names of special tokens as ordinary text
    decode: Callable[[Sequence[int]], str]  # leaves out special tokens
    turn_start: int
    turn_end: int
    vision_start: int
    vision_end: int
    image: int  # id of an image slot
    pad: int  # id at positions after the last record of a row
    opening: tuple[int, ...]  # ids before the first turn of a conversation without a system turn
    vocab_size: int  # number of ids
    # `encode` of several texts, on all cores; None if there is no such function
    encode_batch: Callable[[Sequence[str]], Sequence[Sequence[int]]] | None = None


class MessagePart(NamedTuple):
    """A piece of a conversation: `content` is text, its tokens, or the number of an image."""

    role: str
    content: str | tuple[int, ...] | int
    loss: bool = False
    #: a clean copy of an image, which is only read; `loss` is then that of `<|vision_start|>` alone
    is_copy: bool = False


class TokenSequence(NamedTuple):
    """A conversation as a sequence of T text tokens and image slots."""

    ids: np.ndarray  # int32 [T]; image slots have the id `Tokenizer.image`
    image_index: np.ndarray  # int32 [T], the image of each slot; -1 for text
    patch_index: np.ndarray  # int32 [T], the patch of that image; -1 for text
    is_target: np.ndarray  # bool [T], true where the item is a training target
    # int32 [T], the part of each item, texts joined; -1 for delimiters and copies
    part_index: np.ndarray
    is_copy: np.ndarray  # bool [T], true at the patches of clean copies


def open_tokenizer(folder: str | os.PathLike[str], model_vocab_size: int = 0) -> Tokenizer:
    """Open the tokenizer of a local folder, without network access and without running its code.

    Args:
        folder: a folder with the files of a Hugging Face tokenizer.
        model_vocab_size: number of ids that the model has, which may be more; 0 is not checked.

    Raises:
        DatasetError: No tokenizer, one that lacks a special token or does not read its name as
            text, or one with more ids than the model.
    """
    import transformers  # heavy

    tokenizer_files.check(folder)
    try:
        hf_tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        vocabulary = hf_tokenizer.get_vocab()
    except Exception as error:  # of many kinds, whatever is wrong in the files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = tokenizer_files.find_damage(folder) or reason
        raise DatasetError(f"{folder}: no tokenizer in this folder: {reason}") from error
    missing = [token for token in _SPECIAL_TOKENS.values() if token not in vocabulary]
    if missing:
        raise DatasetError(f"{folder}: the tokenizer has no {', '.join(missing)}")
    vocab_size = max(len(hf_tokenizer), max(vocabulary.values()) + 1)
    if model_vocab_size and vocab_size > model_vocab_size:
        raise DatasetError(
            f"{folder}: the tokenizer has {vocab_size} ids, the model {model_vocab_size}: they do "
            "not belong together"
        )

    def encode(text: str) -> tuple[int, ...]:
        try:
            encoding = hf_tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        except (TypeError, UnicodeError) as error:
            untrusted.clean_text(text, f"text {text[:40]!r}")
            raise DatasetError(
                f"{folder}: the text {text[:40]!r} cannot be tokenized: {error}"
            ) from error
        return tuple(encoding["input_ids"])

    for token in _SPECIAL_TOKENS.values():
        if vocabulary[token] in encode(token):
            raise DatasetError(
                f"{folder}: the tokenizer reads the text {token} of a user as that token; mark it "
                '"special" in tokenizer.json'
            )
    backend = getattr(hf_tokenizer, "backend_tokenizer", None)  # None if it is not the fast kind

    def encode_batch(texts: Sequence[str]) -> list[list[int]]:
        # Without the lists of Python that the wrapper builds. `encode` above switched truncation
        # and padding off.
        backend.encode_special_tokens = True
        return [e.ids for e in backend.encode_batch(list(texts), add_special_tokens=False)]

    encode_cached = functools.lru_cache(maxsize=65536)(encode)
    return Tokenizer(
        encode=lambda text: (encode_cached if len(text) <= _CACHED_CHARACTERS else encode)(text),
        decode=lambda ids: hf_tokenizer.decode(list(ids), skip_special_tokens=True),
        opening=_opening_ids(folder, hf_tokenizer),
        vocab_size=vocab_size,
        encode_batch=encode_batch if backend is not None else None,
        **{field: vocabulary[token] for field, token in _SPECIAL_TOKENS.items()},
    )


def _opening_ids(folder: str | os.PathLike[str], hf_tokenizer: Any) -> tuple[int, ...]:
    """Return the ids that the folder's chat template writes before a user's first turn."""
    template = chat_template.find_template(folder, hf_tokenizer.chat_template)
    if template is None:
        return ()
    names = {k: v for k, v in hf_tokenizer.special_tokens_map.items() if isinstance(v, str)}
    opening = chat_template.opening(folder, template, names)
    return tuple(hf_tokenizer(opening, add_special_tokens=False)["input_ids"]) if opening else ()


def message_parts(
    record: Record, clean_copies: bool = False
) -> tuple[list[MessagePart], list[int]]:
    """Return the parts of a record, and the index in `record.imgs` of each image number.

    `clean_copies` applies `insert_copies`.
    """
    parts, image_indices = [], []
    for segment in record.segs:
        if isinstance(segment, Text):
            parts.append(MessagePart(segment.role, segment.s, segment.loss))
        else:
            parts.append(MessagePart(segment.role, len(image_indices), segment.loss))
            image_indices.append(segment.i)
    return insert_copies(parts)[0] if clean_copies else parts, image_indices


def insert_copies(
    parts: Sequence[MessagePart], last_image: MessagePart | None = None
) -> tuple[list[MessagePart], MessagePart | None]:
    """Insert a clean copy of every image with loss in front of what follows the image.

    The image itself carries the noise of a target. A copy in the same turn is a choice to go on:
    its `<|vision_start|>` is a target if the part after it is one. A copy in a later turn comes
    first in that turn, as if its speaker had given the image.

    Args:
        last_image: an image with loss before these parts that has no copy yet.

    Returns:
        The parts, and the image with loss at their end that has no copy yet.
    """
    result = []
    for part in parts:
        is_empty = isinstance(part.content, str | tuple) and not part.content
        if last_image is not None and not (is_empty and part.role == last_image.role):
            goes_on = part.role == last_image.role and part.loss
            result.append(MessagePart(part.role, last_image.content, goes_on, is_copy=True))
            last_image = None
        result.append(part)
        if isinstance(part.content, int) and part.loss:
            last_image = part
    return result, last_image


def apply_chat_template(
    parts: Sequence[MessagePart],
    tokenizer: Tokenizer,
    image_tokens: int,
    *,
    null: str = "none",
    closed: bool = True,
    open_role: str = "",
) -> TokenSequence:
    """Write the text tokens, delimiters and image slots of a conversation.

    Targets are the tokens of texts with loss, the patches of images with loss and the
    `<|vision_start|>` before them, and the `<|im_end|>` of an assistant's turn that ends in one of
    these. `<|vision_end|>` is forced after the last patch, so it is never a target.

    Args:
        parts: parts in order; adjacent parts with the same role form a turn.
        image_tokens: N, slots of an image.
        null: "text" empties the texts of the user, and "all" drops the user's images too. The
            result is the unconditional input of classifier-free guidance.
        closed: end the last turn; otherwise it can be continued. An empty text opens a turn.
        open_role: role of the turn that is already open when the parts continue a conversation.
    """
    if null not in NULL_CONDITIONS:
        raise ValueError(f"null={null!r} is not one of {', '.join(NULL_CONDITIONS)}")
    spans = list(_spans(_join_texts(parts, null), tokenizer, image_tokens, closed, open_role))
    lengths = np.asarray([len(span.tokens) for span in spans], np.int64)
    total, starts = int(lengths.sum()), np.cumsum(lengths) - lengths
    fields = [(span.image, span.target, span.part, span.copy) for span in spans]
    columns = np.repeat(np.asarray(fields, np.int32).reshape(-1, 4), lengths, axis=0)
    image_index, is_target, part_index, is_copy = columns.T
    offsets = (np.arange(total) - np.repeat(starts, lengths)).astype(np.int32)
    tokens = itertools.chain.from_iterable(span.tokens for span in spans)
    return TokenSequence(
        ids=np.fromiter(tokens, np.int32, total),
        image_index=image_index,
        patch_index=np.where(image_index >= 0, offsets, np.int32(-1)),
        is_target=is_target.astype(bool),
        part_index=part_index,
        is_copy=is_copy.astype(bool),
    )


def sequence_sizes(
    conversations: Sequence[Sequence[MessagePart]], tokenizer: Tokenizer, image_tokens: int
) -> np.ndarray:
    """Return the positions and the images of each conversation's sequence: int32 [n, 2].

    They are those of `apply_chat_template`, without its arrays and with all texts encoded at once.
    """
    joined = [_join_texts(parts, "none") for parts in conversations]
    contents = (part.content for parts in joined for part in parts)
    texts = list(dict.fromkeys(text for text in contents if isinstance(text, str)))
    encode_batch = tokenizer.encode_batch or (lambda texts: map(tokenizer.encode, texts))
    encoded = dict(zip(texts, encode_batch(texts)))
    lookup = dataclasses.replace(
        tokenizer, encode=lambda text: encoded[text] if text in encoded else tokenizer.encode(text)
    )
    sizes = np.zeros((len(joined), 2), np.int32)
    for number, parts in enumerate(joined):
        spans = list(_spans(parts, lookup, image_tokens))
        sizes[number] = sum(len(s.tokens) for s in spans), sum(s.image >= 0 for s in spans)
    return sizes


class _Span(NamedTuple):
    """Adjacent items of a sequence: their tokens, and what `TokenSequence` says of them all."""

    tokens: Sequence[int]
    target: bool
    image: int = -1
    part: int = -1
    copy: bool = False


def _spans(
    joined: Sequence[MessagePart],
    tokenizer: Tokenizer,
    image_tokens: int,
    closed: bool = True,
    open_role: str = "",
) -> Iterator[_Span]:
    """Yield the spans of a conversation; arguments are those of `apply_chat_template`."""

    def end_turn(role: str, target: bool) -> Iterator[_Span]:
        if role != "none":
            yield _Span((tokenizer.turn_end,), target and role == "assistant")
            yield _Span(tokenizer.encode("\n"), False)

    if joined and joined[0].role in ("user", "assistant") and not open_role:
        yield _Span(tokenizer.opening, False)
    role, ends_in_target, number = open_role or "none", False, 0
    for part in joined:
        if part.role != role:
            yield from end_turn(role, ends_in_target)
            role, ends_in_target = part.role, False
            if role != "none":
                yield _Span((tokenizer.turn_start,), False)
                yield _Span(tokenizer.encode(f"{role}\n"), False)
        if isinstance(part.content, str):
            yield _Span(tokenizer.encode(part.content), part.loss, part=number)
        elif isinstance(part.content, tuple):
            yield _Span(part.content, part.loss, part=number)
        else:
            slots = (tokenizer.image,) * image_tokens
            yield _Span((tokenizer.vision_start,), part.loss)
            if part.is_copy:
                yield _Span(slots, False, part.content, copy=True)
            else:
                yield _Span(slots, part.loss, part.content, number)
            yield _Span((tokenizer.vision_end,), False)
        ends_in_target = part.loss
        number += not part.is_copy
    if closed:
        yield from end_turn(role, ends_in_target)


def _join_texts(parts: Sequence[MessagePart], null: str) -> list[MessagePart]:
    """Join adjacent texts of a turn, as the template's tokenizer sees them, and apply `null`."""
    joined: list[MessagePart] = []
    for part in parts:
        if part.role == "user" and null != "none":
            if not isinstance(part.content, int):
                part = part._replace(content="")
            elif null == "all":
                part = MessagePart("user", "")
        last = joined[-1] if joined else None
        texts = last and isinstance(last.content, str) and isinstance(part.content, str)
        if texts and (last.role, last.loss) == (part.role, part.loss):
            joined[-1] = last._replace(content=last.content + part.content)
        else:
            joined.append(part)
    return joined


def image_slots(sequence: TokenSequence) -> np.ndarray:
    """Return the image of each image slot of a row, in order, copies included: int32 [slots]."""
    return sequence.image_index[sequence.patch_index == 0]


# --------------------------------------------------------------------------------------- positions


def vlm_positions(sequence: TokenSequence, grid_side: int) -> np.ndarray:
    """Return Qwen's M-RoPE (time, row, column) of every item: int32 [T, 3].

    All patches of an image, a grid of `grid_side` x `grid_side`, have the same time. The item after
    an image starts at the image's time + `grid_side`.
    """
    patch_index = sequence.patch_index
    starts = (patch_index <= 0).astype(np.int64)  # texts, and the first patch of each image
    steps = np.where(patch_index == 0, grid_side, 1) * starts
    times = np.cumsum(steps) - steps
    # Every item takes the time of the last start before it.
    last_start = np.maximum.accumulate(np.where(starts, np.arange(len(starts)), 0))
    base = times[last_start] if len(starts) else times
    patch = np.maximum(patch_index, 0)
    offsets = np.stack([np.zeros_like(patch), patch // grid_side, patch % grid_side], -1)
    return (base[:, None] + offsets).astype(np.int32)


def flow_positions(sequence: TokenSequence, grid_side: int) -> np.ndarray:
    """Return the (row, column, k) of the item that each item predicts, the next one: int32 [T, 3].

    The last item predicts a text token.
    """
    positions = item_flow_positions(sequence, grid_side)
    end = [[0, 0, positions[-1, 2] + 1 if len(positions) else 0]]
    return np.concatenate([positions[1:], end]).astype(np.int32)[: len(positions)]


def item_flow_positions(sequence: TokenSequence, grid_side: int) -> np.ndarray:
    """Return the (row, column, k) of every item in the deep flow: int32 [T, 3].

    k counts text tokens and whole images alike.
    """
    k = np.cumsum(sequence.patch_index <= 0) - 1
    patch = np.maximum(sequence.patch_index, 0)
    return np.stack([patch // grid_side, patch % grid_side, k], -1).astype(np.int32)
