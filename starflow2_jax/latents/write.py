"""Latents of a dataset of images, made offline shard by shard, by as many jobs as one likes.

A job takes every n-th shard. A shard appears under its name only when it is whole, so a job that
was killed at any point and is started again keeps what is finished and makes the rest; the job that
finds all shards there writes the manifest. What comes out is the parallel dataset of `data/arrays`
with `latent_mean` and `latent_logvar` float32 [I, T, D] of the I images of a record, in order (I
may be 0); its manifest names the sha256 of the encoder.
"""

import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec
import numpy as np

from starflow2_jax.data import array_store, images, manifest as manifest_lib, records, shards
from starflow2_jax.data.manifest import DatasetError, Importer, Manifest, Shard

VERSION = "2"
# What the shards in an unfinished folder are made of; the manifest takes its place.
JOB_FILE = "unfinished.json"
ROWS = 64

# uint8 [B, H, W, 3] -> mean and log-variance, each float32 [B, T, D]. Rows may not depend on B.
Encode = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def write(
    out: str | os.PathLike[str],
    data: str | os.PathLike[str],
    encode: Encode,
    encoder: Mapping[str, Any],
    *,
    shard: tuple[int, int] = (0, 1),
) -> dict[str, int]:
    """Makes the shards of one job, and the manifest once no shard is missing.

    Args:
      out, data: folders; out may be there, complete or in part, made by the same encoder.
      encoder: what the manifest says of it: `sha256`; `pixels`, the side to which images are scaled
        and cropped; `shape`, [T, D].
      shard: (i, n), job i of n.

    Returns:
      counts: `shards` in all, `made` and `kept` by this job, `missing` (left to other jobs).

    Raises:
      DatasetError: out holds latents of another encoder or dataset, or is no such folder; an image
        that cannot be decoded.
    """
    job, jobs = shard
    if not 0 <= job < jobs:
        raise DatasetError(f"--shard {job}/{jobs}: expected i/n with 0 <= i < n")
    dataset = records.read(data)
    count = len(dataset.manifest.shards)
    folder = pathlib.Path(os.path.abspath(out))
    if complete(folder, dataset.manifest, encoder):
        return {"shards": count, "made": 0, "kept": len(range(job, count, jobs)), "missing": 0}
    begin(folder, dataset.manifest, encoder)
    mine = range(job, count, jobs)
    made = [make_shard(folder, dataset, number, encode, encoder) for number in mine]
    missing = finish(folder, dataset.manifest, encoder)
    kept = made.count(False)
    return {"shards": count, "made": made.count(True), "kept": kept, "missing": missing}


def begin(folder: pathlib.Path, parent: Manifest, encoder: Mapping[str, Any]) -> None:
    """Makes the folder, or checks that its shards are those of this encoder and dataset."""
    text = msgspec.json.format(
        msgspec.json.encode(
            {"dataset": manifest_lib.fingerprint(parent), "fae": dict(encoder)},
            order="deterministic",
        )
    )
    file = folder / JOB_FILE
    if not file.exists():
        if folder.exists() and any(not p.name.startswith(".") for p in folder.iterdir()):
            raise DatasetError(f"{folder} holds other things than latents; choose another --out")
        folder.mkdir(parents=True, exist_ok=True)
        _write_whole(file, text)
    found = msgspec.json.decode(file.read_bytes())
    _check_same(folder, found, parent, encoder)


def make_shard(
    folder: pathlib.Path,
    dataset: records.Dataset,
    number: int,
    encode: Encode,
    encoder: Mapping[str, Any],
) -> bool:
    """Makes one shard; False where it was there. What a killed job left of it is removed."""
    parent = dataset.manifest.shards
    path = folder / shard_name(number, len(parent))
    for stale in folder.glob(f".{path.name}.*"):
        stale.unlink(missing_ok=True)
    if path.exists():
        shards.check_count(path, parent[number].records)
        return False
    temporary = folder / f".{path.name}.{os.getpid()}"
    first = sum(shard.records for shard in parent[:number])
    rows = _rows(dataset, range(first, first + parent[number].records), encode, encoder)
    shards.write_file(temporary, (array_store.encode(id, row) for id, row in rows), number)
    shards.check_count(temporary, parent[number].records)
    os.rename(temporary, path)
    return True


def finish(folder: pathlib.Path, parent: Manifest, encoder: Mapping[str, Any]) -> int:
    """Writes the manifest if all shards are there; how many are not."""
    count = len(parent.shards)
    paths = [folder / shard_name(number, count) for number in range(count)]
    missing = sum(not path.exists() for path in paths)
    if missing:
        return missing
    made = [
        Shard(path.name, shard.records, path.stat().st_size, manifest_lib.sha256_file(path))
        for path, shard in zip(paths, parent.shards)
    ]
    importer = Importer("latents", VERSION, {})
    # -1: as many as the record has images.
    spec = {"dtype": "float32", "shape": [-1, *encoder["shape"]]}
    features = {
        "arrays": {"latent_mean": spec, "latent_logvar": spec},
        "dataset": manifest_lib.fingerprint(parent),
        "fae": dict(encoder),
    }
    manifest = manifest_lib.make("arrays", made, importer, features=features)
    _write_whole(folder / manifest_lib.FILE_NAME, manifest_lib.encode(manifest))
    _clear(folder)
    return 0


def check_encoder(features: Mapping[str, Any] | None, sha256: str, where: str) -> None:
    """DatasetError where latents (their manifest's `features`) are not those of an encoder."""
    found = ((features or {}).get("fae") or {}).get("sha256")
    if found != sha256:
        raise DatasetError(
            f"{where}: latents of the encoder {str(found)[:12]}, expected those of {sha256[:12]}"
        )


def parse_shard(text: str) -> tuple[int, int]:
    """`i/n` of --shard."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise DatasetError(f"--shard {text}: expected i/n with 0 <= i < n")
    return int(found[1]), int(found[2])


def shard_name(number: int, count: int) -> str:
    """The name of a finished shard."""
    return f"shard-{number:05d}-of-{count:05d}.array_record"


def complete(folder: pathlib.Path, parent: Manifest, encoder: Mapping[str, Any]) -> bool:
    """Whether the folder is finished; DatasetError where it is another encoder's or dataset's."""
    if not (folder / manifest_lib.FILE_NAME).exists():
        return False
    _check_same(folder, manifest_lib.load(folder, kind="arrays").features or {}, parent, encoder)
    _clear(folder)
    return True


def _clear(folder: pathlib.Path) -> None:
    """Removes what jobs leave beside a finished dataset."""
    (folder / JOB_FILE).unlink(missing_ok=True)
    for stale in folder.glob(".*"):
        stale.unlink(missing_ok=True)


def _check_same(
    folder: pathlib.Path, found: Mapping[str, Any], parent: Manifest, encoder: Mapping[str, Any]
) -> None:
    check_encoder(found, encoder["sha256"], str(folder))
    if found.get("dataset") != manifest_lib.fingerprint(parent):
        raise DatasetError(f"{folder}: latents of another dataset; choose another --out")


def _rows(
    dataset: records.Dataset, indices: range, encode: Encode, encoder: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    for start in range(0, len(indices), ROWS):
        ids, counts, pictures = [], [], []
        for index in indices[start : start + ROWS]:
            record = dataset[index]
            where = f"{dataset.location(index)} (id {record.id!r})"
            ids.append(record.id)
            counts.append(len(record.imgs))
            for k, blob in enumerate(record.imgs):
                picture = images.decode(blob.data, f"{where}: $.imgs[{k}]")
                pictures.append(images.center_crop(picture, encoder["pixels"]))
        none = np.zeros((0, *encoder["shape"]), np.float32)
        mean, log_variance = encode(np.stack(pictures)) if pictures else (none, none)
        end = 0
        for id, count in zip(ids, counts):
            own = slice(end, end := end + count)
            yield id, {"latent_mean": mean[own], "latent_logvar": log_variance[own]}


def _write_whole(path: pathlib.Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    try:
        os.rename(temporary, path)
    except FileNotFoundError:
        # Another job finished at the same time, and cleared it away.
        if not path.exists():
            raise
    shards.sync(path.parent)
