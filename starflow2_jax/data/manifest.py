"""The manifest of a dataset folder: its shards with their sizes and sha256.

A folder without a readable `dataset.json` is not a dataset: the manifest is written last, and an
ArrayRecord file that was truncated or never closed opens without any error and reports no records.
The manifest contains no time and no absolute path, so equal input gives equal bytes.
"""

import hashlib
import os
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
from etils import epath
from msgspec import Meta

FILE_NAME = "dataset.json"
SCHEMA_VERSION = 1

Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
# A plain file name, so that a manifest cannot point outside its folder.
ShardName = Annotated[str, Meta(pattern=r"^shard-\d{5}-of-\d{5}\.array_record$")]
Scalar = str | int | float | bool | None


class DatasetError(ValueError):
    """A damaged or unsuitable dataset folder, shard, record or source."""


class Shard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A shard file: its name, number of records, size and hash."""

    path: ShardName
    records: Annotated[int, Meta(ge=0)]
    bytes: Annotated[int, Meta(ge=0)]
    sha256: Sha256


class Importer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The importer of a dataset: name, version and the options that determine its output."""

    name: str
    version: str
    options: dict[str, Scalar] = {}


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The contents of `dataset.json`.

    `sources` maps the name of every source file to its sha256; `features` describes the arrays of
    a parallel dataset (`kind="arrays"`) and the encoder that computed them. `left_out` counts what
    of the source is not in the dataset, by reason.
    """

    v: Literal[1]
    kind: Literal["records", "arrays"]
    records: Annotated[int, Meta(ge=0)]
    bytes: Annotated[int, Meta(ge=0)]
    shards: list[Shard]
    importer: Importer
    sources: dict[str, Sha256] = {}
    classes: list[str] | None = None
    features: dict[str, Any] | None = None
    left_out: dict[str, int] = {}


class _Stored(Manifest, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A manifest as its file has it: folders of earlier versions have no `sha256`."""

    sha256: Sha256 | None = None  # `fingerprint` of the other fields


def make(
    kind: Literal["records", "arrays"],
    shards: list[Shard],
    importer: Importer,
    *,
    sources: dict[str, str] | None = None,
    classes: list[str] | None = None,
    features: dict[str, Any] | None = None,
    left_out: dict[str, int] | None = None,
) -> Manifest:
    """Return the manifest of finished shards, with their totals."""
    return Manifest(
        v=SCHEMA_VERSION,
        kind=kind,
        records=sum(shard.records for shard in shards),
        bytes=sum(shard.bytes for shard in shards),
        shards=shards,
        importer=importer,
        sources=sources or {},
        classes=classes,
        features=features,
        left_out=left_out or {},
    )


def encode(manifest: Manifest) -> bytes:
    """Return the bytes of `dataset.json`: fields as declared, dicts sorted, a final newline.

    The last field is the fingerprint, so that damage to the file is noticed.
    """
    return _format(_Stored(**msgspec.structs.asdict(manifest), sha256=fingerprint(manifest)))


def fingerprint(manifest: Manifest) -> str:
    """Return the sha256 of a manifest, equal only for equal shards, classes and sources."""
    return hashlib.sha256(_format(manifest)).hexdigest()


def _format(manifest: Manifest) -> bytes:
    compact = msgspec.json.encode(manifest, order="deterministic")
    return msgspec.json.format(compact, indent=2) + b"\n"


def _decode(file: epath.Path) -> Manifest:
    """Return the manifest in a file, compared with its own sha256."""
    try:
        stored = msgspec.json.decode(file.read_bytes(), type=_Stored)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{file}: not a valid manifest: {error}") from error
    fields = msgspec.structs.asdict(stored)
    expected = fields.pop("sha256")
    manifest = Manifest(**fields)
    if expected and fingerprint(manifest) != expected:
        raise DatasetError(
            f"{file} is damaged: it does not match its own sha256; copy it again, or make the "
            "dataset again"
        )
    return manifest


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Return the hex sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with epath.Path(path).open("rb") as f:
        while piece := f.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def load(path: str | os.PathLike[str], kind: Literal["records", "arrays"] = "records") -> Manifest:
    """Read the manifest of the dataset folder `path` and check it against the shard sizes.

    This is cheap, since only file sizes are checked; `verify` reads everything.
    """
    folder = epath.Path(path)
    file = folder / FILE_NAME
    if not file.exists():
        problem = "has no dataset.json" if folder.exists() else "does not exist"
        maker = "import" if kind == "records" else "latents` or `prepare features"
        raise DatasetError(
            f"{folder} {problem}; expected a dataset folder made by `prepare {maker}`"
        )
    manifest = _decode(file)
    if manifest.kind != kind:
        raise DatasetError(f"{file}: a dataset of {manifest.kind}, expected one of {kind}")
    for name in ("records", "bytes"):
        total = sum(getattr(shard, name) for shard in manifest.shards)
        if total != getattr(manifest, name):
            raise DatasetError(
                f"{file}: `{name}` is {getattr(manifest, name)} but its shards add up to {total}"
            )
    for shard in manifest.shards:
        if problem := _size_problem(folder, shard):
            raise DatasetError(problem)
    return manifest


def verify(path: str | os.PathLike[str], manifest: Manifest) -> Iterator[str]:
    """Yield one line for every shard whose size or sha256 differs from its `manifest`."""
    folder = epath.Path(path)
    for shard in manifest.shards:
        if problem := _size_problem(folder, shard):
            yield problem
        elif (digest := sha256_file(folder / shard.path)) != shard.sha256:
            yield (
                f"{folder / shard.path}: sha256 is {digest}, {FILE_NAME} says {shard.sha256}: "
                "the file changed after it was written"
            )


def _size_problem(folder: epath.Path, shard: Shard) -> str | None:
    file = folder / shard.path
    if not file.exists():
        return f"{file}: the shard is missing"
    size = file.stat().length
    if size != shard.bytes:
        return (
            f"{file}: the shard has {size} bytes, {FILE_NAME} says {shard.bytes} "
            f"({shard.records} records): it was truncated or replaced"
        )
    return None
