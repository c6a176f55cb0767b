"""Rows that are packed over a weighted mixture: a row holds records of any of its datasets.

Every dataset is an endless stream of its records, each epoch in a new order. Block b of the mixture
takes the next records of each stream, floor((b + 1) C w) - floor(b C w) of them for a dataset with
the share w, and packs them into rows, long records first. No record is split or left out, and the
rows of a block are shuffled. C is `BLOCK_RECORDS`.

A block is a pure function of the datasets, weights, row size, seed and b, so the rows are the same
for any number of hosts and a run resumes at any row. The number of rows differs between blocks: to
find a row, the rows of all blocks before it are counted, 0.4 to 2 s per million records. The counts
are stored next to the first dataset, so that a resumed run reads them. The memory is 4 bytes per
record of the datasets, for the order of the current epoch, besides the sizes of the records.
"""

import hashlib
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from absl import logging

from starflow2_jax.data import plan_files
from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.data.packing import PackingSpec

BLOCK_RECORDS = 4096  # C; more records leave less padding, and fewer rows to choose them from
_CACHED_BLOCKS = 8  # reading threads are ahead of the step by less than this
VERSION = 1  # of the stored counts; raise it when equal arguments would give other rows
_COUNTED_BLOCKS = 256  # the counts are stored after every so many blocks


def best_fit(lengths: Sequence[int], images: Sequence[int], spec: PackingSpec) -> list[list[int]]:
    """Pack items into rows, each item into the fullest row with room for it, and return the rows.

    Args:
        lengths, images: positions and images of each item, at most those of a row.
    """
    rows: list[list[int]] = []
    # Open rows by the images and the positions that they have left: stacks[images][positions] are
    # numbers of rows, and bit `positions` of masks[images] is set if that stack has any.
    stacks: list[dict[int, list[int]]] = [{} for _ in range(spec.image_slots + 1)]
    masks = [0] * (spec.image_slots + 1)
    for item, (length, count) in enumerate(zip(lengths, images)):
        best, best_slots = spec.seq_len + 1, -1
        for slots in range(count, spec.image_slots + 1):
            if large_enough := masks[slots] >> length:
                free = length + (large_enough & -large_enough).bit_length() - 1
                if free < best:
                    best, best_slots = free, slots
        if best_slots < 0:
            row, free, slots = len(rows), spec.seq_len, spec.image_slots
            rows.append([])
        else:
            free, slots = best, best_slots
            stack = stacks[slots][free]
            row = stack.pop()
            if not stack:
                masks[slots] &= ~(1 << free)
        rows[row].append(item)
        free, slots = free - length, slots - count
        stacks[slots].setdefault(free, []).append(row)
        masks[slots] |= 1 << free
    return rows


def count_rows(lengths: np.ndarray, images: np.ndarray, spec: PackingSpec) -> int:
    """Return the number of rows of `best_fit`, without making them.

    Equal items that follow each other are packed together: best fit puts them into the fullest row
    with room until it has none, which is then filled by several at once.
    """
    sizes = np.stack([lengths, images], -1)
    starts = np.flatnonzero(np.r_[True, (np.diff(sizes, axis=0) != 0).any(1)])
    repeats = np.diff(np.r_[starts, len(sizes)])
    count, seq_len, slots = 0, spec.seq_len, spec.image_slots
    # As in `best_fit`, with the number of rows in place of their numbers.
    stacks: list[dict[int, int]] = [{} for _ in range(slots + 1)]
    masks = [0] * (slots + 1)
    for (length, num_images), left in zip(sizes[starts].tolist(), repeats.tolist()):
        while left:
            best, best_slots = seq_len + 1, -1
            for free_slots in range(num_images, slots + 1):
                if large_enough := masks[free_slots] >> length:
                    free = length + (large_enough & -large_enough).bit_length() - 1
                    if free < best:
                        best, best_slots = free, free_slots
            is_new = best_slots < 0
            if is_new:
                best, best_slots = seq_len, slots
            stack = sys.maxsize if is_new else stacks[best_slots][best]
            per_row = min(
                best // length if length else left, best_slots // num_images if num_images else left
            )
            filled = min(stack, left // per_row)
            rest = left % per_row if filled < stack else 0
            for rows, items in ((filled, per_row), (min(rest, 1), rest)):
                if rows:
                    free, free_slots = best - items * length, best_slots - items * num_images
                    stacks[free_slots][free] = stacks[free_slots].get(free, 0) + rows
                    masks[free_slots] |= 1 << free
            used = filled + min(rest, 1)
            if is_new:
                count += used
            else:
                stacks[best_slots][best] -= used
                if not stacks[best_slots][best]:
                    masks[best_slots] &= ~(1 << best)
            left -= filled * per_row + rest
    return count


class MixtureRows:
    """The endless rows of a mixture: `rows[k]` gives the (dataset, record) pairs of row k.

    Safe in threads.
    """

    def __init__(
        self,
        sizes: Sequence[np.ndarray],
        weights: Sequence[float],
        spec: PackingSpec,
        *,
        seed: int = 0,
        shuffle: bool = True,
        folder: str = "",
    ):
        """Open the rows.

        Args:
            sizes: int [records, 2] of each dataset, the positions and images of its records.
            weights: of each dataset, in proportion to its share of the records.
            shuffle: False takes the records of each dataset in their order, evenly interleaved.
            folder: the dataset that stores the number of rows of each block; empty for none.
        """
        for number, size in enumerate(sizes):
            too_large = np.flatnonzero((size > [spec.seq_len, spec.image_slots]).any(1))
            if len(too_large):
                positions, images = size[too_large[0]].tolist()
                raise DatasetError(
                    f"dataset {number} of the mixture, record {too_large[0]}: {positions} "
                    f"positions and {images} images, a row has {spec.seq_len} and "
                    f"{spec.image_slots} ({len(too_large)} such records); give larger rows "
                    "or leave them out"
                )
        self._sizes, self._spec, self._seed, self._shuffle = sizes, spec, seed, shuffle
        self._shares = np.asarray(weights, np.float64) / np.sum(weights, dtype=np.float64)
        self._lock = threading.Lock()
        self._folder, self._files = folder, None
        self._ends: list[int] = []  # the number of rows up to the end of each block
        self._num_stored = 0  # blocks whose counts are stored
        self._orders: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._blocks: OrderedDict[int, list[np.ndarray]] = OrderedDict()

    def __getitem__(self, row: int) -> np.ndarray:
        """Return the records of a row, int64 [records, 2]: dataset and index in it, in order."""
        if row < 0:
            raise IndexError(f"row {row}")
        with self._lock:
            if self._files is None:
                self._load_counts()
            while not self._ends or self._ends[-1] <= row:
                end = self._ends[-1] if self._ends else 0
                number, is_near = len(self._ends), row - end < BLOCK_RECORDS
                # A block that cannot hold the row is only counted.
                self._ends.append(
                    end + (len(self._block(number)) if is_near else self._count(number))
                )
            if len(self._ends) - self._num_stored >= _COUNTED_BLOCKS:
                self._store_counts()
            number = int(np.searchsorted(self._ends, row, side="right"))
            return self._block(number)[row - (self._ends[number - 1] if number else 0)]

    def fill(self, blocks: int = 4) -> tuple[float, float]:
        """Return the share of padding, and the records per row, over the first blocks."""
        with self._lock:
            rows = [row for number in range(blocks) for row in self._block(number)]
        used = sum(int(self._sizes[number][index, 0]) for row in rows for number, index in row)
        padding = 1 - used / (len(rows) * self._spec.seq_len)
        return padding, sum(map(len, rows)) / len(rows)

    def _load_counts(self) -> None:
        """Read the stored numbers of rows of the first blocks."""
        self._files = []
        if not self._folder:
            return
        digest = hashlib.sha256()
        for size in self._sizes:
            digest.update(np.ascontiguousarray(size, "<i8"))
        inputs = {
            "version": VERSION,
            "block": BLOCK_RECORDS,
            "sizes_sha256": digest.hexdigest(),
            "records": [len(size) for size in self._sizes],
            "shares": [float(share).hex() for share in self._shares],
            "row": [self._spec.seq_len, self._spec.image_slots],
            "seed": self._seed,
            "shuffle": self._shuffle,
        }
        self._inputs_json = plan_files.to_json(inputs)
        self._files = plan_files.candidate_paths(self._folder, "index-rows", self._inputs_json)
        for file in filter(os.path.exists, self._files):
            try:
                about, (counts,) = plan_files.load(file, ("counts",))
                valid = about == self._inputs_json and counts.ndim == 1 and (counts > 0).all()
            except Exception as error:  # of many kinds, whatever bytes are damaged
                logging.warning("%s: damaged, the rows are counted again: %s", file, error)
                continue
            if valid and len(counts) > len(self._ends):
                self._ends = np.cumsum(counts, dtype=np.int64).tolist()
        self._num_stored = len(self._ends)

    def _store_counts(self) -> None:
        self._num_stored = len(self._ends)
        if self._files:
            counts = np.diff(self._ends, prepend=0).astype(np.uint16)
            plan_files.store(self._files, self._inputs_json, {"counts": counts})

    def _block(self, number: int) -> list[np.ndarray]:
        """Return the rows of a block, packed unless they are cached."""
        if number in self._blocks:
            self._blocks.move_to_end(number)
            return self._blocks[number]
        records, sizes = self._block_items(number)
        rows = [records[row] for row in best_fit(*sizes.T.tolist(), self._spec)]
        if self._shuffle:
            # Best fit leaves the emptiest rows for the end.
            order = np.random.default_rng((self._seed, 1, number)).permutation(len(rows))
            rows = [rows[k] for k in order.tolist()]
        self._blocks[number] = rows
        while len(self._blocks) > _CACHED_BLOCKS:
            self._blocks.popitem(last=False)
        return rows

    def _count(self, number: int) -> int:
        """Return the number of rows of a block."""
        _, sizes = self._block_items(number)
        return count_rows(*sizes.T, self._spec)

    def _block_items(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the (dataset, index) pairs and the sizes of a block's records, as packed."""
        records = self._block_records(number)
        sizes = np.zeros((len(records), 2), np.int64)
        for source, size in enumerate(self._sizes):
            of_source = records[:, 0] == source
            sizes[of_source] = size[records[of_source, 1]]
        if self._shuffle:
            # Long records first leave less padding.
            longest_first = np.argsort(-sizes[:, 0], kind="stable")
            records, sizes = records[longest_first], sizes[longest_first]
        return records, sizes

    def _block_records(self, number: int) -> np.ndarray:
        """Return the (dataset, index) pairs of a block's records, in the order of packing."""
        bounds = np.floor(np.asarray([[number], [number + 1]]) * BLOCK_RECORDS * self._shares)
        records, places = [], []
        for source, (start, stop) in enumerate(bounds.T.astype(np.int64).tolist()):
            indices = self._stream(source, start, stop)
            records.append(np.stack([np.full(len(indices), source), indices], -1))
            places.append((np.arange(len(indices)) + 0.5) / max(len(indices), 1))
        joined = np.concatenate(records)
        if self._shuffle:
            return np.random.default_rng((self._seed, 0, number)).permutation(joined)
        return joined[np.argsort(np.concatenate(places), kind="stable")]

    def _stream(self, source: int, start: int, stop: int) -> np.ndarray:
        """Return the records at places start ... stop - 1 of a dataset's stream, int64."""
        count = len(self._sizes[source])
        parts = [np.zeros(0, np.int64)]
        while start < stop:
            epoch, place = divmod(start, count)
            end = min(count, place + stop - start)
            parts.append(self._order(source, epoch)[place:end].astype(np.int64))
            start += end - place
        return np.concatenate(parts)

    def _order(self, source: int, epoch: int) -> np.ndarray:
        """Return the order of a dataset's records in an epoch, uint32 [records]."""
        key = (source, epoch if self._shuffle else 0)
        if key not in self._orders:
            # Only the newest order of each dataset is kept.
            for other in [k for k in self._orders if k[0] == source]:
                del self._orders[other]
            order = np.arange(len(self._sizes[source]), dtype=np.uint32)
            if self._shuffle:
                np.random.default_rng((self._seed, 2, source, epoch)).shuffle(order)
            self._orders[key] = order
        return self._orders[key]
