"""Encode a dataset of images offline, shard by shard, in any number of jobs.

A job takes every n-th shard. A shard appears under its name only when it is complete, so a job that
was killed at any point keeps what is finished when it is started again. The job that finds all
shards complete compares them with the digests of their writers and writes the manifest. The result
is a parallel dataset (`data/array_store.py`) with `latent_mean` and `latent_logvar` float32 [I, T,
D] for the I images of a record, in order (I may be 0). Its manifest names the sha256 of the
encoder.
"""

import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec
import numpy as np
from absl import logging

from starflow2_jax.data import (
    array_store,
    images,
    manifest as manifest_lib,
    records,
    shards,
    untrusted,
)
from starflow2_jax.data.manifest import DatasetError, Importer, Manifest, Shard
from starflow2_jax.runtime import atomic, folder_lock

VERSION = "2"
# Names the dataset and the encoder of an unfinished folder; the manifest replaces it.
JOB_FILE = "unfinished.json"
ROWS = 64

# From uint8 [B, H, W, 3] to mean and log-variance, each float32 [B, T, D]. No row may depend on B.
Encode = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def write(
    out: str | os.PathLike[str],
    data: str | os.PathLike[str],
    encode: Encode,
    encoder: Mapping[str, Any],
    *,
    shard: tuple[int, int] = (0, 1),
) -> dict[str, int]:
    """Make the shards of one job, and the manifest once no shard is missing.

    Args:
        encoder: its description in the manifest: `sha256`; `pixels`, the side to which images are
            scaled and cropped; `shape`, [T, D].
        shard: (i, n) for job i of n.

    Returns:
        Counts: all `shards`, those `made` and `kept` by this job, and those `missing` because they
        are left to other jobs.
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
    with folder_lock.lock(folder, f"makes shard {job}/{jobs}", f".job-{job}-of-{jobs}.lock"):
        is_new = [
            make_shard(folder, dataset, number, encode, encoder)
            for number in range(job, count, jobs)
        ]
        missing = finish(folder, dataset.manifest, encoder)
    return {
        "shards": count,
        "made": is_new.count(True),
        "kept": is_new.count(False),
        "missing": missing,
    }


def begin(folder: pathlib.Path, parent: Manifest, encoder: Mapping[str, Any]) -> None:
    """Create the folder, or check that its shards belong to this encoder and dataset."""
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
        atomic.write_file(file, text)
    _check_same(file, untrusted.read_json(file, dict[str, Any]), parent, encoder)


def make_shard(
    folder: pathlib.Path,
    dataset: records.Dataset,
    number: int,
    encode: Encode,
    encoder: Mapping[str, Any],
) -> bool:
    """Make one shard. Return False if it existed; one that is damaged is made again."""
    parent = dataset.manifest.shards
    path, count = folder / shard_name(number, len(parent)), parent[number].records
    if path.exists():
        problem = _damage(path, count)
        if not problem:
            return False
        logging.warning("%s; it is made again", problem)
    first = sum(shard.records for shard in parent[:number])
    rows = _rows(dataset, range(first, first + count), encode, encoder)
    with atomic.file(path) as temporary:
        shards.write_file(temporary, (array_store.encode(id, row) for id, row in rows), number)
        shards.check_count(temporary, count)
        # Before the shard appears, so that no shard of this job lacks a digest.
        atomic.write_file(_digest_file(path), manifest_lib.sha256_file(temporary))
    return True


def _digest_file(path: pathlib.Path) -> pathlib.Path:
    """Return the file with the sha256 of a shard, which exists until the manifest has it."""
    return path.with_name(f".{path.name}.sha256")


def _damage(path: pathlib.Path, count: int) -> str:
    """Return what is wrong with a shard that an earlier job made, an empty text if nothing is."""
    file = _digest_file(path)
    if file.exists():
        expected, actual = file.read_text("ascii", "replace"), manifest_lib.sha256_file(path)
        return "" if actual == expected else f"{path}: sha256 is {actual}, written was {expected}"
    try:
        shards.check_records(path, count)
    except DatasetError as error:
        return str(error)
    return ""


def finish(folder: pathlib.Path, parent: Manifest, encoder: Mapping[str, Any]) -> int:
    """Write the manifest if all shards exist. Return how many are missing."""
    count = len(parent.shards)
    paths = [folder / shard_name(number, count) for number in range(count)]
    missing = sum(not path.exists() for path in paths)
    if missing:
        return missing
    for path, shard in zip(paths, parent.shards):
        if problem := _damage(path, shard.records):
            raise DatasetError(f"{problem}: remove it, and the same command makes it again")
    entries = [
        Shard(path.name, shard.records, path.stat().st_size, manifest_lib.sha256_file(path))
        for path, shard in zip(paths, parent.shards)
    ]
    importer = Importer("latents", VERSION, {})
    # -1 stands for the number of images in the record.
    spec = {"dtype": "float32", "shape": [-1, *encoder["shape"]]}
    features = {
        "arrays": {"latent_mean": spec, "latent_logvar": spec},
        "dataset": manifest_lib.fingerprint(parent),
        "fae": dict(encoder),
    }
    manifest = manifest_lib.make("arrays", entries, importer, features=features)
    atomic.write_file(folder / manifest_lib.FILE_NAME, manifest_lib.encode(manifest))
    _clear(folder)
    return 0


def remove_stale(
    out: str | os.PathLike[str], data: str | os.PathLike[str], encoder: Mapping[str, Any]
) -> bool:
    """Remove a folder of latents of another encoder or dataset, finished or not.

    Latents of this encoder and dataset stay, and so does a folder of anything else than latents.

    Returns:
        Whether the folder was removed.
    """
    folder = pathlib.Path(os.path.abspath(out))
    file = folder / JOB_FILE
    if file.exists():
        features = untrusted.read_json(file, dict[str, Any])
    elif (folder / manifest_lib.FILE_NAME).exists():
        features = manifest_lib.load(folder, kind="arrays").features or {}
    else:
        return False
    if "fae" not in features:
        return False
    try:
        _check_same(file, features, records.read(data).manifest, encoder)
    except DatasetError:
        atomic.remove_folder(folder)
        return True
    return False


def check_encoder(features: Mapping[str, Any] | None, sha256: str, name: str) -> None:
    """Check that the latents whose manifest has `features` are those of an encoder."""
    stored = ((features or {}).get("fae") or {}).get("sha256")
    if stored != sha256:
        raise DatasetError(
            f"{name}: latents of the encoder with sha256 {stored}, expected those of {sha256}"
        )


def parse_shard(text: str) -> tuple[int, int]:
    """Parse `i/n` of --shard."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise DatasetError(f"--shard {text}: expected i/n with 0 <= i < n")
    return int(match[1]), int(match[2])


def shard_name(number: int, count: int) -> str:
    """Return the name of a finished shard."""
    return f"shard-{number:05d}-of-{count:05d}.array_record"


def complete(folder: pathlib.Path, parent: Manifest, encoder: Mapping[str, Any]) -> bool:
    """Return True if the folder is finished, after checking its encoder and dataset."""
    file = folder / manifest_lib.FILE_NAME
    if not file.exists():
        return False
    _check_same(file, manifest_lib.load(folder, kind="arrays").features or {}, parent, encoder)
    _clear(folder)
    return True


def _clear(folder: pathlib.Path) -> None:
    """Remove the files of unfinished jobs from a finished dataset."""
    (folder / JOB_FILE).unlink(missing_ok=True)
    atomic.remove_leftovers(folder)
    for stale in folder.glob(".*"):
        if not atomic.is_partial(stale.name):
            stale.unlink(missing_ok=True)


def _check_same(
    file: pathlib.Path, features: Mapping[str, Any], parent: Manifest, encoder: Mapping[str, Any]
) -> None:
    check_encoder(features, encoder["sha256"], str(file))
    stored, expected = str(features.get("dataset")), manifest_lib.fingerprint(parent)
    if stored != expected:
        raise DatasetError(
            f"{file}: latents of another dataset (sha256 {stored}, expected {expected}); choose "
            "another --out"
        )


def _rows(
    dataset: records.Dataset, indices: range, encode: Encode, encoder: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yield id and latents of each record, from one call of `encode` per `ROWS` records."""
    for start in range(0, len(indices), ROWS):
        ids, counts, crops = [], [], []
        for index in indices[start : start + ROWS]:
            record = dataset[index]
            location = f"{dataset.location(index)} (id {record.id!r})"
            ids.append(record.id)
            counts.append(len(record.imgs))
            for k, blob in enumerate(record.imgs):
                image = images.decode(blob.data, f"{location}: $.imgs[{k}]")
                crops.append(images.center_crop(image, encoder["pixels"]))
        empty = np.zeros((0, *encoder["shape"]), np.float32)
        mean, log_variance = encode(np.stack(crops)) if crops else (empty, empty)
        end = 0
        for id, count in zip(ids, counts):
            rows = slice(end, end := end + count)
            yield id, {"latent_mean": mean[rows], "latent_logvar": log_variance[rows]}
