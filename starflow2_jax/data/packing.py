"""Lengths of records and a packing plan: which records share a training row.

A plan is made once, offline, and is data: row k is a fixed list of records, so step -> rows is a
pure function for any number of hosts, and nothing is split or dropped. Rows are filled first fit
over a shuffled order; the plan is written beside the manifest, named by what it depends on.
"""

import dataclasses
import hashlib
import json
import os
import zipfile
from collections.abc import Sequence

import grain
import numpy as np

from starflow2_jax.data import chat_layout, manifest as manifest_lib, records
from starflow2_jax.data.chat_layout import Tokenizer
from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.data.records import Record

VERSION = 2  # raise it when equal arguments would give another plan
# Rows that stay open. More waste less; first fit over them keeps the plan one pass.
OPEN_ROWS = 256


@dataclasses.dataclass(frozen=True)
class Room:
    """What a row holds.

    Attributes:
        positions: T, items of all its records.
        patches: N, positions of an image beside its two delimiters.
        images: M, images at most; 0 as many as fit.
    """

    positions: int
    patches: int
    images: int = 0

    @property
    def places(self) -> int:
        """M."""
        return self.images or self.positions // (self.patches + 2)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Rows of records.

    Attributes:
        lengths: int32 [records], in positions; images: int32 [records].
        items: int32 [records], the records of row 0, then of row 1, ...
        ends: int64 [rows], where each row ends in `items`.
        room: of a row.
    """

    lengths: np.ndarray
    images: np.ndarray
    items: np.ndarray
    ends: np.ndarray
    room: Room

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int) -> np.ndarray:
        """Records of a row, int32, in the order in which they stand in it."""
        if not 0 <= row < len(self.ends):
            raise IndexError(f"row {row} of {len(self.ends)}")
        return self.items[self.ends[row - 1] if row else 0 : self.ends[row]]

    @property
    def waste(self) -> float:
        """Share of positions that hold nothing."""
        return 1 - int(self.lengths.sum()) / (len(self) * self.room.positions)


def size(record: Record, tokenizer: Tokenizer, patches: int) -> tuple[int, int]:
    """Positions and images of a record as `tokens.layout` lays it out."""
    parts, images = chat_layout.parts(record)
    return len(chat_layout.layout(parts, tokenizer, patches).ids), len(images)


def pack(lengths: Sequence[int], images: Sequence[int], room: Room, seed: int = 0) -> Plan:
    """First fit over the records in an order drawn from `seed`; equal arguments, equal plan.

    Raises:
        DatasetError: a record longer than a row, or with more images; names the first, and how many
            there are.
    """
    sizes = np.stack([np.asarray(lengths, np.int32), np.asarray(images, np.int32)], -1)
    most = np.asarray([room.positions, room.places])
    for axis, what in enumerate(("positions", "images")):
        long = np.flatnonzero(sizes[:, axis] > most[axis])
        if len(long):
            raise DatasetError(
                f"record {long[0]} takes {sizes[long[0], axis]} {what}, a row has {most[axis]} "
                f"({len(long)} records have too many); give larger rows or leave them out"
            )
    rows: list[list[int]] = []
    left = np.zeros((0, 2), np.int64)  # of the open rows
    numbers = np.zeros(0, np.int64)
    for item in np.random.default_rng(seed).permutation(len(sizes)).tolist():
        fits = np.flatnonzero((left >= sizes[item]).all(1))
        if len(fits):
            at = fits[0]
        else:
            # The fullest row closes for a new one.
            full = len(left) == OPEN_ROWS
            keep = np.arange(len(left)) != left[:, 0].argmin() if full else slice(None)
            left = np.concatenate([left[keep], most[None]])
            numbers = np.append(numbers[keep], len(rows))
            rows.append([])
            at = len(left) - 1
        rows[numbers[at]].append(item)
        left[at] -= sizes[item]
    items = np.asarray([item for row in rows for item in row], np.int32)
    ends = np.cumsum([len(row) for row in rows])
    return Plan(sizes[:, 0], sizes[:, 1], items, ends, room)


def index(path: str, tokenizer: str, room: Room, seed: int = 0) -> tuple[str, Plan]:
    """The plan of a dataset folder, read where it is there, else made and written beside the
    manifest. Returns its file and the plan.

    Args:
        tokenizer: a folder, see `tokens.open_tokenizer`.

    Raises:
        DatasetError: no dataset, a record longer than a row, a damaged plan.
    """
    dataset = records.read(path)
    about = {
        "version": VERSION,
        "dataset": manifest_lib.fingerprint(dataset.manifest),
        # By content: a tokenizer that moved is the same one.
        "tokenizer_sha256": _folder_sha256(tokenizer),
        "room": dataclasses.asdict(room),
        "seed": seed,
    }
    text = json.dumps(about, sort_keys=True)
    file = os.path.join(path, f"index-{hashlib.sha256(text.encode()).hexdigest()[:16]}.npz")
    if os.path.exists(file):
        return file, _read(file, text, len(dataset), room)
    held = chat_layout.open_tokenizer(tokenizer)
    sizes = np.asarray([size(record, held, room.patches) for record in dataset])
    plan = pack(*sizes.T, room, seed)
    unfinished = f"{file}.{os.getpid()}.tmp"
    with open(unfinished, "wb") as out:
        arrays = {name: getattr(plan, name) for name in ("lengths", "images", "items", "ends")}
        np.savez(out, about=text, **arrays)
        out.flush()
        os.fsync(out.fileno())
    os.replace(unfinished, file)
    return file, plan


def rows(dataset: records.Dataset, plan: Plan) -> grain.MapDataset:
    """Row k -> its records, in order; the plan as a grain dataset, to be shuffled and batched."""
    read = lambda k: [dataset[int(item)] for item in plan[k]]
    return grain.MapDataset.range(len(plan)).map(read)


def _read(file: str, text: str, count: int, room: Room) -> Plan:
    try:
        with np.load(file, allow_pickle=False) as held:
            arrays = (held[name] for name in ("lengths", "images", "items", "ends"))
            plan = Plan(*arrays, room)
            same = str(held["about"]) == text
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        message = f"{file}: damaged packing plan ({error}); remove it to make it anew"
        raise DatasetError(message) from error
    whole = np.array_equal(np.sort(plan.items), np.arange(count)) and plan.ends[-1] == count
    sums = np.add.reduceat(plan.lengths[plan.items], np.r_[0, plan.ends[:-1]])
    if not same or not whole or sums.max() > room.positions:
        raise DatasetError(f"{file}: not a plan of these {count} records; remove it")
    return plan


def _folder_sha256(tokenizer: str) -> str:
    """Of the names and contents of a tokenizer's files."""
    digest = hashlib.sha256()
    for name in sorted(os.listdir(tokenizer)) if os.path.isdir(tokenizer) else ():
        if name.startswith(("tokenizer", "vocab", "merges", "added_tokens", "special_tokens")):
            sha = manifest_lib.sha256_file(os.path.join(tokenizer, name))
            digest.update(f"{name}\0{sha}\n".encode())
    return digest.hexdigest()
