"""Lengths of records and a packing plan: the plan says which records share a training row.

A plan is made once, offline, and is data: row k is a fixed list of records, so step -> rows is a
pure function for any number of hosts, and no record is split or dropped. Rows are filled first fit
over a shuffled order. The plan is stored next to the manifest, named by a hash of its inputs.
"""

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Iterable, Sequence

import numpy as np
from absl import logging

from starflow2_jax.data import chat_layout, plan_files, records
from starflow2_jax.data.chat_layout import Tokenizer
from starflow2_jax.data.manifest import DatasetError, fingerprint, sha256_file
from starflow2_jax.data.records import Record

VERSION = 2  # raise it when equal arguments would give another plan
# Rows that stay open. More waste less; first fit over them keeps the plan one pass.
OPEN_ROWS = 256
_ENCODED_RECORDS = 256  # records whose texts are encoded at once
_ARRAYS = ("lengths", "images", "items", "ends")


@dataclasses.dataclass(frozen=True)
class PackingSpec:
    """The size of a training row."""

    seq_len: int  # T, positions of a row, shared by all its records
    image_tokens: int  # N, positions of an image without its two delimiters
    max_images: int = 0  # M, images of a row at most, with copies; 0 for as many as fit
    clean_copies: bool = False  # whether records are laid out with `chat_layout.insert_copies`

    @property
    def image_slots(self) -> int:
        """M, with 0 resolved to the number of images that fit."""
        return self.max_images or self.seq_len // (self.image_tokens + 2)


@dataclasses.dataclass(frozen=True)
class PackingPlan:
    """Rows of records: `plan[k]` gives the records of row k."""

    lengths: np.ndarray  # int32 [records], in positions
    images: np.ndarray  # int32 [records], number of images
    items: np.ndarray  # int32 [records], the records of row 0, then of row 1, ...
    ends: np.ndarray  # int64 [rows], the end of each row in `items`
    spec: PackingSpec  # size of a row

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int) -> np.ndarray:
        """Return the records of a row, int32, in order."""
        if not 0 <= row < len(self.ends):
            raise IndexError(f"row {row} of {len(self.ends)}")
        return self.items[self.ends[row - 1] if row else 0 : self.ends[row]]

    @property
    def waste(self) -> float:
        """Share of positions that are padding."""
        return 1 - int(self.lengths[self.items].sum()) / (len(self) * self.spec.seq_len)

    @property
    def num_left_out(self) -> int:
        """Number of records that are in no row, as they are longer than one."""
        return len(self.lengths) - len(self.items)


def record_sizes(
    dataset: Iterable[Record], tokenizer: Tokenizer, image_tokens: int, clean_copies: bool = False
) -> np.ndarray:
    """Return the positions and the images of records in the chat layout: int32 [records, 2]."""
    sizes = [np.zeros((0, 2), np.int32)]
    # Without the images, of which a few records are in memory.
    conversations = (chat_layout.message_parts(record, clean_copies)[0] for record in dataset)
    while chunk := list(itertools.islice(conversations, _ENCODED_RECORDS)):
        sizes.append(chat_layout.sequence_sizes(chunk, tokenizer, image_tokens))
    return np.concatenate(sizes)


def pack(
    lengths: Sequence[int],
    images: Sequence[int],
    spec: PackingSpec,
    seed: int = 0,
    *,
    leave_out: bool = False,
) -> PackingPlan:
    """Pack records of `lengths` positions and `images` images first fit, in a random order.

    Equal arguments give an equal plan. A record that does not fit into a row is an error, or with
    `leave_out` it is in no row.
    """
    sizes = np.stack([np.asarray(lengths, np.int32), np.asarray(images, np.int32)], -1)
    capacity = np.asarray([spec.seq_len, spec.image_slots])
    for axis, unit in enumerate(("positions", "images")):
        too_large = np.flatnonzero(sizes[:, axis] > capacity[axis])
        if len(too_large) and not leave_out:
            raise DatasetError(
                f"record {too_large[0]} takes {sizes[too_large[0], axis]} {unit}, a row has "
                f"{capacity[axis]} ({len(too_large)} records have too many); give larger rows or "
                "leave them out"
            )
    rows: list[list[int]] = []
    # Positions and images left in each open row, and its number in `rows`, in order of opening.
    positions_left, images_left = (np.full(OPEN_ROWS, -1, np.int32) for _ in range(2))
    open_rows: list[list[int]] = []
    order = np.random.default_rng(seed).permutation(len(sizes))
    order = order[(sizes[order] <= capacity).all(1)]
    for item, (length, count) in zip(order.tolist(), sizes[order].tolist()):
        fits = (positions_left >= length) & (images_left >= count)
        slot = int(fits.argmax())
        if not fits[slot]:
            slot = len(open_rows)
            if slot == OPEN_ROWS:
                # The fullest row closes for a new one.
                fullest = int(positions_left.argmin())
                del open_rows[fullest]
                slot -= 1
                for left in (positions_left, images_left):
                    left[fullest:-1] = left[fullest + 1 :]
            positions_left[slot], images_left[slot] = capacity
            open_rows.append([])
            rows.append(open_rows[slot])
        open_rows[slot].append(item)
        positions_left[slot] -= length
        images_left[slot] -= count
    items = np.asarray([item for row in rows for item in row], np.int32)
    ends = np.cumsum([len(row) for row in rows])
    return PackingPlan(sizes[:, 0], sizes[:, 1], items, ends, spec)


def load_or_make_plan(
    path: str, tokenizer: str, spec: PackingSpec, seed: int = 0, skip_long: int = 0
) -> tuple[str, PackingPlan]:
    """Load the packing plan of a dataset folder, or make it and store it next to the manifest.

    The plan of a folder that cannot be written is stored in the user's cache folder, or stays in
    memory.

    Args:
        path: the dataset folder.
        tokenizer: a folder, see `chat_layout.open_tokenizer`.
        spec: size of a row.
        seed: of the order in which records are packed.
        skip_long: records longer than a row that the plan may leave out.

    Returns:
        The plan's file, empty if it is stored nowhere, and the plan.
    """
    dataset = records.read(path)
    inputs = {
        "version": VERSION,
        "dataset": fingerprint(dataset.manifest),
        # By content: a tokenizer that moved is the same one.
        "tokenizer_sha256": _tokenizer_sha256(tokenizer),
        # Names of an earlier version, which existing plans are stored under.
        "room": {
            "positions": spec.seq_len,
            "patches": spec.image_tokens,
            "images": spec.max_images,
        },
        "seed": seed,
    }
    if spec.clean_copies:
        inputs["clean_copies"] = True
    inputs_json = plan_files.to_json(inputs)
    files = plan_files.candidate_paths(path, "index", inputs_json)
    for file in files:
        if os.path.exists(file):
            plan = _load(file, inputs_json, len(dataset), spec)
            _check_left_out(dataset, plan.lengths, plan.images, spec, skip_long)
            return file, plan
    opened = chat_layout.open_tokenizer(tokenizer)
    sizes = record_sizes(dataset, opened, spec.image_tokens, spec.clean_copies)
    _check_left_out(dataset, *sizes.T, spec, skip_long)
    plan = pack(*sizes.T, spec, seed, leave_out=bool(skip_long))
    arrays = {name: getattr(plan, name) for name in _ARRAYS}
    return plan_files.store(files, inputs_json, arrays), plan


def _too_large(lengths: Sequence[int], images: Sequence[int], spec: PackingSpec) -> np.ndarray:
    """Return the numbers of the records that do not fit into a row, in order."""
    sizes = np.stack([np.asarray(lengths), np.asarray(images)], -1)
    return np.flatnonzero((sizes > [spec.seq_len, spec.image_slots]).any(1))


def _check_left_out(
    dataset: records.Dataset,
    lengths: Sequence[int],
    images: Sequence[int],
    spec: PackingSpec,
    skip_long: int,
) -> None:
    """Raise DatasetError if more than `skip_long` records do not fit; else log how many."""
    too_large = _too_large(lengths, images, spec)
    if not len(too_large):
        return
    first = int(too_large[0])
    count, total = len(too_large), len(dataset)
    message = (
        f"{dataset.location(first)} (id {dataset[first].id!r}) takes {lengths[first]} positions "
        f"and {images[first]} images, a row has {spec.seq_len} and {spec.image_slots} "
        f"({count} of {total} records have too many)"
    )
    if count > skip_long:
        raise DatasetError(f"{message}; give larger rows, or leave out up to N with data.skip_long")
    if count == total:
        raise DatasetError(f"{message}, so no record is left; give larger rows")
    logging.warning("%s: left out", message)


def _load(file: str, inputs_json: str, count: int, spec: PackingSpec) -> PackingPlan:
    try:
        about, arrays = plan_files.load(file, _ARRAYS)
        plan, same_inputs = PackingPlan(*arrays, spec), about == inputs_json
    except Exception as error:  # of many kinds, whatever bytes are damaged
        message = f"{file}: damaged packing plan ({error}); remove it, and it is made again"
        raise DatasetError(message) from error
    try:
        packed = np.setdiff1d(np.arange(count), _too_large(plan.lengths, plan.images, spec))
        complete = np.array_equal(np.sort(plan.items), packed) and plan.ends[-1] == len(packed)
        row_lengths = np.add.reduceat(plan.lengths[plan.items], np.r_[0, plan.ends[:-1]])
        valid = same_inputs and complete and row_lengths.max() <= spec.seq_len
    except (IndexError, ValueError, TypeError):  # arrays of other shapes
        valid = False
    if not valid:
        raise DatasetError(f"{file}: not a plan of these {count} records; remove it")
    return plan


def _tokenizer_sha256(folder: str) -> str:
    """Return one sha256 of the names and contents of a tokenizer's files."""
    digest = hashlib.sha256()
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        if name.startswith(("tokenizer", "vocab", "merges", "added_tokens", "special_tokens")):
            digest.update(f"{name}\0{sha256_file(os.path.join(folder, name))}\n".encode())
    return digest.hexdigest()
