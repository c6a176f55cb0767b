"""Shards of a dataset folder: ArrayRecord files of opaque payloads, written atomically.

A folder is built under a temporary name next to its final one (see `runtime/atomic.py`). Every
shard is closed, opened again and counted, the manifest is written last, and only then is the folder
renamed. An existing dataset is replaced only with `overwrite`, and stays until the new one is
complete.
"""

import bisect
import dataclasses
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence

from absl import logging
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from starflow2_jax.data import manifest
from starflow2_jax.data.manifest import DatasetError, Manifest, Shard
from starflow2_jax.runtime import atomic

# Groups of one record give random access; images are compressed already.
WRITER_OPTIONS = "group_size:1,uncompressed"
SHARD_BYTES = 256 << 20
# Of a pass over a dataset: payloads that are read at once, and about how many bytes they have.
_READ_PAYLOADS, _READ_BYTES = 256, 8 << 20


def write(
    path: str | os.PathLike[str],
    payloads: Iterable[bytes],
    make_manifest: Callable[[list[Shard]], Manifest],
    *,
    counts: Sequence[int] | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> Manifest:
    """Write the dataset folder `path` from `payloads`, in order, and return its manifest.

    Args:
        path: local folder to make.
        payloads: encoded records; an exception raised by this iterator leaves the disk unchanged.
        make_manifest: builds the manifest from the finished shards, once all payloads are written.
        counts: records of each shard, for a dataset parallel to another one; the payloads must be
            exactly as many. Without it a new shard starts after `shard_bytes` of payload.
        overwrite: replace an existing dataset folder (and only a dataset folder).
    """
    if atomic.is_remote(path):
        raise DatasetError(
            f"{path}: datasets are written to a local folder; copy it there when it is complete"
        )
    out = pathlib.Path(os.path.abspath(path))
    # Reading the source may take hours, so this is checked first.
    check_absent(out, overwrite)
    with atomic.folder(out, overwrite=overwrite) as building:
        shards = _write_shards(building, out, payloads, counts, shard_bytes)
        written = make_manifest(shards)
        (building / manifest.FILE_NAME).write_bytes(manifest.encode(written))
        is_replacement = out.exists()
        check_absent(out, overwrite)
    if is_replacement:
        logging.info("replaced the dataset in %s", out)
    return written


def check_absent(out: str | os.PathLike[str], overwrite: bool) -> None:
    """Refuse an output that exists, unless it is a dataset folder and may be replaced."""
    out = pathlib.Path(out)
    atomic.recover(out)
    if not out.exists():
        return
    if not overwrite:
        raise DatasetError(f"{out} exists; choose another --out or give --overwrite")
    if not (out / manifest.FILE_NAME).is_file():
        raise DatasetError(f"{out} exists and is not a dataset folder; it is not overwritten")


class Payloads:
    """Random access to the payloads of a dataset folder: `len`, `[i]`; safe in threads.

    A payload that cannot be read raises DatasetError naming shard and index.
    """

    def __init__(self, path: str | os.PathLike[str], dataset_manifest: Manifest):
        self.path = os.fspath(path)
        self.manifest = dataset_manifest
        shards = [shard for shard in self.manifest.shards if shard.records]
        self._names = [shard.path for shard in shards]
        self._ends = list(itertools.accumulate(shard.records for shard in shards))
        # With counts in its instructions, the data source need not open every file at the start.
        import grain  # heavy, and a tokenizer alone does not need it

        self._source = grain.sources.ArrayRecordDataSource(
            [_Instruction(os.path.join(self.path, s.path), 0, s.records, s.records) for s in shards]
        )

    def __len__(self) -> int:
        return self.manifest.records

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path}: record {index} of {len(self)}")
        try:
            return self._source[index]
        except Exception as error:
            raise DatasetError(f"{self.location(index)}: cannot be read: {error}") from error

    def __iter__(self) -> Iterator[bytes]:
        """Yield all payloads in order, with several in memory at a time."""
        mean_bytes = max(1, self.manifest.bytes // max(1, len(self)))
        count = min(_READ_PAYLOADS, max(1, _READ_BYTES // mean_bytes))
        for start in range(0, len(self), count):
            indices = range(start, min(start + count, len(self)))
            try:
                payloads = self._source.__getitems__(indices)
            except Exception:  # by one record, which reading it alone names
                payloads = (self[index] for index in indices)
            yield from payloads

    def location(self, index: int) -> str:
        """Return `SHARD record K` for error messages, with K counted from 0 in the shard."""
        number = bisect.bisect_right(self._ends, index)
        if number == len(self._ends):
            return f"{self.path} record {index}"
        in_shard = index - (self._ends[number - 1] if number else 0)
        return f"{os.path.join(self.path, self._names[number])} record {in_shard}"


class NoRecordsError(DatasetError):
    """A source without any record."""


@dataclasses.dataclass(frozen=True)
class _Instruction:
    """A file instruction in the protocol of array_record."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


def _write_shards(
    building: pathlib.Path,
    out: pathlib.Path,
    payloads: Iterable[bytes],
    counts: Sequence[int] | None,
    shard_bytes: int,
) -> list[Shard]:
    written: list[int] = []  # records of each finished shard
    iterator = iter(payloads)
    payload = next(iterator, None)
    if payload is None:
        raise NoRecordsError(f"nothing to write to {out}: the source has no records")
    while payload is not None:
        number = len(written)
        if counts is not None and number == len(counts):
            raise DatasetError(f"more rows than the {sum(counts)} of the dataset they belong to")
        file = building / f"{number:05d}.tmp"
        writer = ArrayRecordWriter(str(file), WRITER_OPTIONS)
        records, size = 0, 0
        try:
            while payload is not None and not (
                records == counts[number] if counts else records and size >= shard_bytes
            ):
                writer.write(payload)
                records, size = records + 1, size + len(payload)
                payload = next(iterator, None)
        finally:
            _close(writer, number)
        check_count(file, records)
        written.append(records)
    if counts is not None and written != list(counts):
        raise DatasetError(f"{sum(written)} rows for a dataset of {sum(counts)} records")
    shards = []
    for number, records in enumerate(written):
        name = f"shard-{number:05d}-of-{len(written):05d}.array_record"
        file = building / name
        os.rename(building / f"{number:05d}.tmp", file)
        shards.append(Shard(name, records, file.stat().st_size, manifest.sha256_file(file)))
    return shards


def write_file(file: pathlib.Path, payloads: Iterable[bytes], number: int) -> None:
    """Write and close one file of payloads; remove the file if that fails."""
    writer = ArrayRecordWriter(str(file), WRITER_OPTIONS)
    try:
        try:
            for payload in payloads:
                writer.write(payload)
        finally:
            _close(writer, number)
    except BaseException:
        file.unlink(missing_ok=True)
        raise


def _close(writer: ArrayRecordWriter, number: int) -> None:
    try:
        writer.close()
    except RuntimeError as error:
        raise DatasetError(f"shard {number} could not be written: {error}") from error


def check_records(file: pathlib.Path, records: int) -> None:
    """Raise DatasetError unless `records` records can be read; reads all of them."""
    check_count(file, records)
    reader = ArrayRecordReader(str(file))
    try:
        for index in range(records):
            reader.read([index])
        reader.close()
    except (RuntimeError, ValueError, IndexError) as error:
        raise DatasetError(f"{file} record {index}: cannot be read: {error}") from error


def check_count(file: pathlib.Path, records: int) -> None:
    """Raise DatasetError unless exactly `records` records can be read from a shard."""
    # An ArrayRecord file without its footer opens without an error and has no records.
    try:
        reader = ArrayRecordReader(str(file))
        readable = reader.num_records() if reader.ok() else 0
        reader.close()
    except RuntimeError:  # without a message
        readable = 0
    if readable != records:
        raise DatasetError(f"{file}: wrote {records} records but {readable} can be read")
