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
from collections.abc import Callable, Sequence

import grain
import numpy as np

from starflow2_jax.data import manifest as manifest_lib
from starflow2_jax.data import records
from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.data.records import Img, Record

VERSION = 1  # raise it when equal arguments would give another plan
# Rows that stay open. More waste less; first fit over them keeps the plan one pass.
OPEN_ROWS = 256


@dataclasses.dataclass(frozen=True)
class Measure:
    """How long a record is.

    Attributes:
        tokenizer: "bytes" (UTF-8), or a folder with a tokenizer of `transformers`.
        image_tokens: positions of an image, its two delimiters not counted.
        turn_tokens: positions that a change of role adds.
    """

    tokenizer: str = "bytes"
    image_tokens: int = 256
    turn_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """Rows of records.

    Attributes:
        lengths: int32 [records], in positions.
        items: int32 [records], the records of row 0, then of row 1, ...
        ends: int64 [rows], where each row ends in `items`.
        row_length: positions of a row.
    """

    lengths: np.ndarray
    items: np.ndarray
    ends: np.ndarray
    row_length: int

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
        return 1 - int(self.lengths.sum()) / (len(self) * self.row_length)


def length(record: Record, measure: Measure, count: Callable[[str], int]) -> int:
    """Positions that a record takes; `count` gives those of a text."""
    total, role = 0, None
    for segment in record.segs:
        if segment.role != role:
            total, role = total + measure.turn_tokens, segment.role
        image = isinstance(segment, Img)
        total += measure.image_tokens + 2 if image else count(segment.s)
    return total


def counter(tokenizer: str) -> Callable[[str], int]:
    """Text -> number of tokens.

    Raises:
        DatasetError: a folder without a tokenizer.
    """
    if tokenizer == "bytes":
        return lambda text: len(text.encode())
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(
            tokenizer, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise DatasetError(f"{tokenizer}: no tokenizer in this folder: {error}") from error
    return lambda text: len(found(text, add_special_tokens=False)["input_ids"])


def pack(lengths: Sequence[int], row_length: int, seed: int = 0) -> Plan:
    """First fit over the records in an order drawn from `seed`; equal arguments, equal plan.

    Raises:
        DatasetError: a record longer than a row; names the first, and how many there are.
    """
    sizes = np.asarray(lengths, np.int32)
    long = np.flatnonzero(sizes > row_length)
    if len(long):
        raise DatasetError(
            f"record {long[0]} takes {sizes[long[0]]} positions, a row has {row_length} "
            f"({len(long)} records are too long); give longer rows or leave them out of the data"
        )
    rows: list[list[int]] = []
    room = np.zeros(0, np.int64)  # of the open rows
    numbers = np.zeros(0, np.int64)
    for item in np.random.default_rng(seed).permutation(len(sizes)).tolist():
        fits = np.flatnonzero(room >= sizes[item])
        if len(fits):
            at = fits[0]
        else:
            # The fullest row closes for a new one.
            keep = np.arange(len(room)) != room.argmin() if len(room) == OPEN_ROWS else slice(None)
            room, numbers = np.append(room[keep], row_length), np.append(numbers[keep], len(rows))
            rows.append([])
            at = len(room) - 1
        rows[numbers[at]].append(item)
        room[at] -= sizes[item]
    items = np.asarray([item for row in rows for item in row], np.int32)
    return Plan(sizes, items, np.cumsum([len(row) for row in rows]), row_length)


def index(path: str, measure: Measure, row_length: int, seed: int = 0) -> tuple[str, Plan]:
    """The plan of a dataset folder, read where it is there, else made and written beside the
    manifest. Returns its file and the plan.

    Raises:
        DatasetError: no dataset, a record longer than a row, a damaged plan.
    """
    dataset = records.read(path)
    about = {
        "version": VERSION,
        "dataset": manifest_lib.fingerprint(dataset.manifest),
        "measure": dataclasses.asdict(measure),
        "tokenizer_sha256": _folder_sha256(measure.tokenizer),
        "row_length": row_length,
        "seed": seed,
    }
    # By content: a tokenizer that moved is the same one.
    about["measure"].pop("tokenizer")
    text = json.dumps(about, sort_keys=True)
    file = os.path.join(path, f"index-{hashlib.sha256(text.encode()).hexdigest()[:16]}.npz")
    if os.path.exists(file):
        return file, _read(file, text, len(dataset), row_length)
    count = counter(measure.tokenizer)
    lengths = [length(record, measure, count) for record in dataset]
    plan = pack(lengths, row_length, seed)
    unfinished = f"{file}.{os.getpid()}.tmp"
    with open(unfinished, "wb") as out:
        np.savez(out, about=text, lengths=plan.lengths, items=plan.items, ends=plan.ends)
        out.flush()
        os.fsync(out.fileno())
    os.replace(unfinished, file)
    return file, plan


def rows(dataset: records.Dataset, plan: Plan) -> grain.MapDataset:
    """Row k -> its records, in order; the plan as a grain dataset, to be shuffled and batched."""
    read = lambda k: [dataset[int(item)] for item in plan[k]]
    return grain.MapDataset.range(len(plan)).map(read)


def _read(file: str, text: str, count: int, row_length: int) -> Plan:
    try:
        with np.load(file, allow_pickle=False) as held:
            plan = Plan(held["lengths"], held["items"], held["ends"], row_length)
            same = str(held["about"]) == text
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        message = f"{file}: damaged packing plan ({error}); remove it to make it anew"
        raise DatasetError(message) from error
    whole = np.array_equal(np.sort(plan.items), np.arange(count)) and plan.ends[-1] == count
    sums = np.add.reduceat(plan.lengths[plan.items], np.r_[0, plan.ends[:-1]])
    if not same or not whole or sums.max() > row_length:
        raise DatasetError(f"{file}: not a plan of these {count} records; remove it")
    return plan


def _folder_sha256(tokenizer: str) -> str:
    """Of the names and contents of a tokenizer's files; empty for bytes."""
    if tokenizer == "bytes":
        return ""
    digest = hashlib.sha256()
    for name in sorted(os.listdir(tokenizer)) if os.path.isdir(tokenizer) else ():
        if name.startswith(("tokenizer", "vocab", "merges", "added_tokens", "special_tokens")):
            sha = manifest_lib.sha256_file(os.path.join(tokenizer, name))
            digest.update(f"{name}\0{sha}\n".encode())
    return digest.hexdigest()
