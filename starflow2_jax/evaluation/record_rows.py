"""Records as rows that a model reads in parallel, teacher-forced: one record a row."""

from collections.abc import Iterator, Sequence

import numpy as np

from starflow2_jax.data import images, packing, rows, tokens
from starflow2_jax.data.records import Record
from starflow2_jax.data.tokens import Tokenizer

# Rows are padded to a multiple of this, so that similar ones share a program.
LENGTH_STEP = 32


def batches(
    given: Sequence[Record],
    tokenizer: Tokenizer,
    side: int,
    *,
    size: int = 32,
    null: str = "none",
    blank: bool = False,
) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """The arrays of `data.rows` of `size` records at a time, and how many of them count.

    The last ones are filled up, and all are as long as the longest.

    Args:
        side: rows (= columns) of an image's patches; null: as in `tokens.layout`; blank: grey in
            place of what images show.

    Raises:
        DatasetError: an image that cannot be decoded, named.
    """
    laid, shown = [], []
    for record in given:
        parts, blobs = tokens.parts(record)
        laid.append(tokens.layout(parts, tokenizer, side * side, null=null))
        named = [f"{record.id!r}, image {i}" for i in blobs]
        pixels = [images.decode(record.imgs[i].data, at) for i, at in zip(blobs, named)]
        shown.append([np.full_like(p, 128) if blank else p for p in pixels])
    length = -(-max(len(items.ids) for items in laid) // LENGTH_STEP) * LENGTH_STEP
    places = max(1, *map(len, shown))
    room = packing.Room(length, side * side, places)
    empty = next((np.zeros_like(p) for row in shown for p in row), None)
    size = min(size, len(given))
    for first in range(0, len(given), size):
        numbers = np.minimum(np.arange(first, first + size), len(given) - 1)
        made = [rows.lay_out([laid[i]], room, side, tokenizer.pad) for i in numbers]
        batch = {name: np.stack([row[name] for row in made]) for name in made[0]}
        if empty is not None:
            filled = [[*shown[i], *[empty] * (places - len(shown[i]))] for i in numbers]
            batch["images"] = np.asarray(filled)
        yield batch, min(size, len(given) - first)
