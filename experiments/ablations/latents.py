"""What a row's flow learns in place of the codec's latents: pixels, or its tower's raw features.

Both are scaled to unit variance channel by channel, by what the first training pictures are, so
that the same noise means the same. They lie beside a dataset as the codec's latents do, made once,
shard by shard, by whoever finds them missing.

Axes: I images, N patches, D channels.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from starflow2_jax.data import images, records
from starflow2_jax.latents import codec as codecs, write
from starflow2_jax.models.fae import teacher as teachers
from starflow2_jax.models.patches import patchify, scale_pixels

# Pixels along the side of a patch, of a picture made so small that it has the codec's patches.
PATCH = 4
# Pictures by which channels are scaled.
MEASURED = 512
# Of a variance that is none.
LOG_ZERO = -80.0

Encode = Callable[[np.ndarray], np.ndarray]


def make(
    kind: str, cfg: Mapping[str, Any], side: int, entries: Iterable[Mapping[str, Any]]
) -> None:
    """Makes the latents that entries `{path, latents}` name, where they are not there yet.

    Args:
        kind: `fae`, `pixels` or `features`; cfg: a row's, whose first training data give the scale,
            with `fae.path` of the codec (none: its latents must be there); side: sqrt(N).

    Raises:
        DatasetError: a folder with latents of another encoder or dataset.
        ValueError, FileNotFoundError: as `codec.load`.
    """
    if kind == "fae" and not cfg["fae"]["path"]:
        return
    if kind == "fae":
        encode, about = codecs.open_encoder(cfg["fae"]["path"])
    else:
        raw, pixels, name = _pixels(side) if kind == "pixels" else _features(cfg["fae"]["path"])
        mean, std = _scale(raw, pixels, cfg["data"]["mixture"][0]["path"])
        digest = hashlib.sha256(f"{name} {pixels} {side}\n".encode())
        digest.update(np.stack([mean, std]).tobytes())
        shape = [side * side, len(mean)]
        about = {"sha256": digest.hexdigest(), "pixels": pixels, "shape": shape, "kind": kind}

        def encode(pictures):
            x = (raw(pictures) - mean) / std
            return x, np.full_like(x, LOG_ZERO)

    for entry in entries:
        write.write(entry["latents"], entry["path"], encode, about)


def _pixels(side: int) -> tuple[Encode, int, str]:
    """Patches of pictures, the pictures' side, and what the encoder is."""

    def encode(pictures):
        return np.asarray(patchify(pictures.astype(np.float32), PATCH, "channel_last"))

    return encode, side * PATCH, "pixels"


def _features(path: str) -> tuple[Encode, int, str]:
    """Features of a codec's tower, the side of the pictures that it sees, and what it is."""
    codec = codecs.load(path)
    run = jax.jit(lambda params, x: teachers.features(params, scale_pixels(x), codec.teacher))

    def encode(pictures):
        found = []
        for first in range(0, len(pictures), codecs.BATCH):
            some = pictures[first : first + codecs.BATCH]
            # Every batch is of one size, for one program.
            filled = np.pad(some, ((0, codecs.BATCH - len(some)), *((0, 0),) * 3))
            found.append(np.asarray(run(codec.params["teacher"], filled))[: len(some)])
        return np.concatenate(found)

    return encode, codec.teacher.pixels, f"tower of {codec.sha256}"


def _scale(raw: Encode, pixels: int, path: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation float32 [D] over the first pictures of a dataset."""
    shown = itertools.islice(_pictures(path, pixels), MEASURED)
    x = raw(np.stack(list(shown))).astype(np.float64)
    mean, std = x.mean((0, 1)), x.std((0, 1))
    return mean.astype(np.float32), np.maximum(std, 1e-6).astype(np.float32)


def _pictures(path: str, pixels: int):
    dataset = records.read(path)
    for number in range(len(dataset)):
        for blob in dataset[number].imgs:
            picture = images.decode(blob.data, dataset.location(number))
            yield images.center_crop(picture, pixels)
