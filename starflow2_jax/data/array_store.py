"""Datasets of arrays parallel to a dataset of records: latents and text features made offline.

Row i belongs to record i, shard by shard, and carries its id. The manifest's `features` says what
the arrays are and what computed them.
"""

import os
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta

from starflow2_jax.data import manifest as manifest_lib, shards as shards_lib
from starflow2_jax.data.manifest import DatasetError, Importer, Manifest

Dtype = Literal["float32", "float16", "int32", "uint8"]


class Array(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Little-endian, C order."""

    dtype: Dtype
    shape: Annotated[list[Annotated[int, Meta(ge=0)]], Meta(max_length=8)]
    data: bytes


class Arrays(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    v: Literal[1]
    id: Annotated[str, Meta(min_length=1, max_length=1024)]
    arrays: dict[str, Array]


_encoder = msgspec.msgpack.Encoder(order="deterministic")
_decoder = msgspec.msgpack.Decoder(Arrays)


def encode(id: str, arrays: dict[str, np.ndarray]) -> bytes:
    """Encodes one row.

    Raises:
      DatasetError: a dtype outside `Dtype`, or a value that is not finite.
    """
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


def decode(data: bytes, where: str) -> tuple[str, dict[str, np.ndarray]]:
    """Decodes one row to its id and arrays (read-only views); errors name `where` and the array."""
    try:
        row = _decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise DatasetError(f"{where}: {error}") from error
    arrays = {}
    for name, array in row.arrays.items():
        dtype = np.dtype(array.dtype).newbyteorder("<")
        size = int(np.prod(array.shape, dtype=np.int64)) * dtype.itemsize
        if size != len(array.data):
            raise DatasetError(
                f"{where}: {name} has {len(array.data)} bytes, but {array.dtype} of shape "
                f"{array.shape} takes {size}"
            )
        arrays[name] = np.frombuffer(array.data, dtype).reshape(array.shape)
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
    """Writes rows (id, arrays) for the dataset of manifest `parent`, in its order and sharding.

    All rows must hold the same names, dtypes and shapes; these go into the manifest's
    `features["arrays"]`, beside the caller's `features` and the fingerprint of the parent.

    Raises:
      DatasetError: rows that differ in shape, more or fewer rows than records, an existing `path`.
    """
    spec: dict[str, dict[str, Any]] = {}

    def payloads() -> Iterator[bytes]:
        for id, row in rows:
            found = {
                name: {"dtype": a.dtype.name, "shape": list(a.shape)} for name, a in row.items()
            }
            if not spec:
                spec.update(found)
            if found != spec:
                raise DatasetError(f"row {id!r}: arrays are {found}, expected {spec} as before it")
            yield encode(id, row)

    def describe(shards: list[manifest_lib.Shard]) -> Manifest:
        described = {**features, "arrays": spec, "dataset": manifest_lib.fingerprint(parent)}
        return manifest_lib.make("arrays", shards, importer, features=described)

    counts = [shard.records for shard in parent.shards]
    return shards_lib.write(path, payloads(), describe, counts=counts, overwrite=overwrite)


class Features:
    """The rows of an arrays folder: `len`, `[i]` -> (id, arrays); safe in threads.

    Raises:
      DatasetError: not an arrays folder, or made from another dataset than `parent`.
    """

    def __init__(self, path: str | os.PathLike[str], parent: Manifest):
        self.manifest = manifest_lib.load(path, kind="arrays")
        features = self.manifest.features or {}
        self.spec: dict[str, dict[str, Any]] = features.get("arrays", {})
        expected = manifest_lib.fingerprint(parent)
        if features.get("dataset") != expected or self.manifest.records != parent.records:
            raise DatasetError(
                f"{path}: made from the dataset {str(features.get('dataset'))[:12]} of "
                f"{self.manifest.records} records, but this one is {expected[:12]} of "
                f"{parent.records}; run `prepare features` again"
            )
        self._payloads = shards_lib.Payloads(path, self.manifest)

    def __len__(self) -> int:
        return len(self._payloads)

    def __getitem__(self, index: int) -> tuple[str, dict[str, np.ndarray]]:
        return decode(self._payloads[index], self._payloads.where(index))

    def where(self, index: int) -> str:
        """Shard and index of a row, for error messages."""
        return self._payloads.where(index)


def read(path: str | os.PathLike[str], parent: Manifest) -> Features:
    """Opens the arrays folder `path`, which must belong to the dataset with manifest `parent`."""
    return Features(path, parent)
