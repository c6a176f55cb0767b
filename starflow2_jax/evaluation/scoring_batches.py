"""Records as rows that a model reads in parallel, teacher-forced: one record a row."""

from collections.abc import Iterator, Sequence

import numpy as np

from starflow2_jax.data import chat_layout, images, packed_batches, packing
from starflow2_jax.data.chat_layout import Tokenizer
from starflow2_jax.data.records import Record

# Rows are padded to a multiple of this, so that similar ones share a program.
LENGTH_STEP = 32


def batches(
    given: Sequence[Record],
    tokenizer: Tokenizer,
    side: int,
    *,
    size: int,
    null: str = "none",
    blank: bool = False,
) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """The arrays of `data.packed_batches` of `size` records at a time, and how many of them count.

    The last ones are filled up, and all are as long as the longest with its words, so that one
    program takes them with and without.

    Args:
        side: rows (= columns) of an image's patches; null: as in
            `chat_layout.apply_chat_template`; blank: grey in place of what images show.

    Raises:
        DatasetError: an image that cannot be decoded, named.
    """
    laid, shown, longest = [], [], 0
    for record in given:
        parts, blobs = chat_layout.message_parts(record)
        whole = chat_layout.apply_chat_template(parts, tokenizer, side * side)
        own = (
            whole
            if null == "none"
            else chat_layout.apply_chat_template(parts, tokenizer, side * side, null=null)
        )
        laid.append(own)
        shown.append(blobs)
        longest = max(longest, len(whole.ids))
    length = -(-longest // LENGTH_STEP) * LENGTH_STEP
    room = packing.PackingSpec(length, side * side, max(1, *map(len, shown)))
    first = next(((r, blobs[0]) for r, blobs in zip(given, shown) if blobs), None)
    empty = None if first is None else np.zeros_like(_picture(*first))
    for begin in range(0, len(given), size):
        numbers = np.minimum(np.arange(begin, begin + size), len(given) - 1)
        made = [
            packed_batches.build_packed_row([laid[i]], room, side, tokenizer.pad) for i in numbers
        ]
        batch = {name: np.stack([row[name] for row in made]) for name in made[0]}
        if empty is not None:
            batch["images"] = np.stack(
                [np.broadcast_to(empty, (room.image_slots, *empty.shape))] * size
            )
            for row, i in enumerate(numbers):
                for place, blob in enumerate(shown[i]):
                    batch["images"][row, place] = 128 if blank else _picture(given[i], blob)
        yield batch, min(size, len(given) - begin)


def _picture(record: Record, blob: int) -> np.ndarray:
    return images.decode(record.imgs[blob].data, f"{record.id!r}, image {blob}")
