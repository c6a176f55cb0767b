"""Batches for teacher-forced scoring: one record in each row."""

from collections.abc import Iterator, Sequence

import numpy as np

from starflow2_jax.data import chat_layout, images, packed_batches, packing
from starflow2_jax.data.chat_layout import Tokenizer
from starflow2_jax.data.records import Record

# Rows are padded to a multiple of this, so that similar batches share a compiled program.
LENGTH_MULTIPLE = 32


def batches(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    grid_side: int,
    *,
    size: int,
    null: str = "none",
    blank: bool = False,
    clean_copies: bool = False,
) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """Yield the arrays of `data.packed_batches` for `size` records, and how many of them count.

    The last batch is filled up with its last record. All rows have room for the longest record with
    its text, so one program scores records with and without text. `null` is as in
    `chat_layout.apply_chat_template`, `blank` replaces images by gray, and `clean_copies` is as in
    `packing.PackingSpec`.
    """
    laid_out, image_indices, max_length = [], [], 0
    for record in records:
        parts, indices = chat_layout.message_parts(record, clean_copies)
        full = chat_layout.apply_chat_template(parts, tokenizer, grid_side**2)
        max_length = max(max_length, len(full.ids))
        if null != "none":
            full = chat_layout.apply_chat_template(parts, tokenizer, grid_side**2, null=null)
        laid_out.append(full)
        image_indices.append([indices[i] for i in chat_layout.image_slots(full)])
    length = -(-max_length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    spec = packing.PackingSpec(length, grid_side**2, max(1, *map(len, image_indices)))
    first = next(((r, ids[0]) for r, ids in zip(records, image_indices) if ids), None)
    image_shape = None if first is None else _decode(*first).shape
    for start in range(0, len(records), size):
        rows = np.minimum(np.arange(start, start + size), len(records) - 1)
        packed = [
            packed_batches.build_packed_row([laid_out[i]], spec, grid_side, tokenizer.pad)
            for i in rows
        ]
        batch = {name: np.stack([row[name] for row in packed]) for name in packed[0]}
        if image_shape is not None:
            batch["images"] = np.zeros((size, spec.image_slots, *image_shape), np.uint8)
            for row, i in enumerate(rows):
                for slot, index in enumerate(image_indices[i]):
                    batch["images"][row, slot] = 128 if blank else _decode(records[i], index)
        yield batch, min(size, len(records) - start)


def _decode(record: Record, index: int) -> np.ndarray:
    return images.decode(record.imgs[index].data, f"{record.id!r}, image {index}")
