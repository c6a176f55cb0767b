"""Datasets of arrays parallel to a dataset of records: latents and text features made offline.

Row i belongs to record i, shard by shard, and has its id. The manifest's `features` describes the
arrays and the encoder that computed them.
"""

import os
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta

from starflow2_jax.data import manifest, shards
from starflow2_jax.data.manifest import DatasetError, Importer, Manifest

Dtype = Literal["float32", "float16", "int32", "uint8"]


class Array(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An array of a row; `data` is little-endian and in C order."""

    dtype: Dtype
    shape: Annotated[list[Annotated[int, Meta(ge=0)]], Meta(max_length=8)]
    data: bytes


class Arrays(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The named arrays of the record with the same id."""

    v: Literal[1]
    id: Annotated[str, Meta(min_length=1, max_length=1024)]
    arrays: dict[str, Array]


_encoder = msgspec.msgpack.Encoder(order="deterministic")
_decoder = msgspec.msgpack.Decoder(Arrays)


def encode(id: str, arrays: dict[str, np.ndarray]) -> bytes:
    """Encode one row; DatasetError for a dtype outside `Dtype` or a value that is not finite."""
    row = {}
    for name, array in arrays.items():
        array = np.ascontiguousarray(array)
        if array.dtype.name not in Dtype.__args__:
            raise DatasetError(
                f"row {id!r}: {name} is {array.dtype}, expected one of {', '.join(Dtype.__args__)}"
            )
        if not np.isfinite(array).all():
            raise DatasetError(f"row {id!r}: {name} has values that are not finite")
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        row[name] = Array(array.dtype.name, list(array.shape), little.tobytes())
    return _encoder.encode(Arrays(1, id, row))


def decode(data: bytes, location: str) -> tuple[str, dict[str, np.ndarray]]:
    """Decode one row to its id and its arrays, which are read-only views."""
    try:
        row = _decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise DatasetError(f"{location}: {error}") from error
    arrays = {}
    for name, array in row.arrays.items():
        dtype = np.dtype(array.dtype).newbyteorder("<")
        size = int(np.prod(array.shape, dtype=np.int64)) * dtype.itemsize
        if size != len(array.data):
            raise DatasetError(
                f"{location}: {name} has {len(array.data)} bytes, but {array.dtype} of shape "
                f"{array.shape} takes {size}"
            )
        arrays[name] = np.frombuffer(array.data, dtype).reshape(array.shape)
        if dtype.kind == "f" and not np.isfinite(arrays[name]).all():
            raise DatasetError(f"{location}: {name} has values that are not finite")
    return row.id, arrays


def write(
    path: str | os.PathLike[str],
    rows: Iterable[tuple[str, dict[str, np.ndarray]]],
    parent: Manifest,
    *,
    importer: Importer,
    features: dict[str, Any],
    overwrite: bool = False,
) -> Manifest:
    """Write a folder of arrays, sharded like the records of `parent`, and return its manifest.

    `rows` are the (id, arrays) of each record, in order. All rows must have the same names, dtypes
    and shapes; these go into the manifest's `features["arrays"]`, next to the caller's `features`
    and the fingerprint of the parent.
    """
    spec: dict[str, dict[str, Any]] = {}

    def payloads() -> Iterator[bytes]:
        for id, row in rows:
            row_spec = {
                name: {"dtype": a.dtype.name, "shape": list(a.shape)} for name, a in row.items()
            }
            if not spec:
                spec.update(row_spec)
            if row_spec != spec:
                raise DatasetError(
                    f"row {id!r}: arrays are {row_spec}, expected {spec} as in the rows before it"
                )
            yield encode(id, row)

    def make_manifest(written: list[manifest.Shard]) -> Manifest:
        described = {**features, "arrays": spec, "dataset": manifest.fingerprint(parent)}
        return manifest.make("arrays", written, importer, features=described)

    counts = [shard.records for shard in parent.shards]
    return shards.write(path, payloads(), make_manifest, counts=counts, overwrite=overwrite)


class StoredArrays:
    """The rows of a folder of arrays: `len`, `[i]` -> (id, arrays); safe in threads."""

    def __init__(self, path: str | os.PathLike[str], parent: Manifest):
        self.manifest = manifest.load(path, kind="arrays")
        features = self.manifest.features or {}
        self.spec: dict[str, dict[str, Any]] = features.get("arrays", {})
        expected = manifest.fingerprint(parent)
        if features.get("dataset") != expected or self.manifest.records != parent.records:
            raise DatasetError(
                f"{path}: made from the dataset {str(features.get('dataset'))[:12]} of "
                f"{self.manifest.records} records, but this one is {expected[:12]} of "
                f"{parent.records}; run `prepare features` again"
            )
        self._payloads = shards.Payloads(path, self.manifest)

    def __len__(self) -> int:
        return len(self._payloads)

    def __getitem__(self, index: int) -> tuple[str, dict[str, np.ndarray]]:
        return decode(self._payloads[index], self._payloads.location(index))


def read(path: str | os.PathLike[str], parent: Manifest) -> StoredArrays:
    """Open a folder of arrays, which must belong to the dataset with the manifest `parent`."""
    return StoredArrays(path, parent)
