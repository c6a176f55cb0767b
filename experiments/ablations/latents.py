"""The data of ablations whose flow learns pixels or features instead of the codec's latents.

Both are scaled to unit variance in every channel, measured on the first training images, so that
the same noise has the same effect. They are stored next to a dataset as the codec's latents are,
and the first run that needs them writes them, shard by shard.

Shapes: I images, N patches, D channels.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from starflow2_jax.data import images, records
from starflow2_jax.latents import codec as codecs, write
from starflow2_jax.models.fae import teacher
from starflow2_jax.models.patches import patchify, scale_pixels

# Pixels along the side of a patch. Images are scaled to have as many patches as the codec's.
PATCH = 4
# Number of images on which the scale of the channels is measured.
NUM_MEASURED = 512
# Log-variance of latents without noise.
LOG_ZERO = -80.0

Encode = Callable[[np.ndarray], np.ndarray]


def make(
    kind: str, cfg: Mapping[str, Any], side: int, entries: Iterable[Mapping[str, Any]]
) -> None:
    """Write the latents that entries `{path, latents}` name, if they do not exist yet.

    Args:
        kind: `fae`, `pixels` or `features`.
        cfg: the configuration of a row. Its first training data give the scale, and `fae.path`
            names the codec; without it the codec's latents must exist.
        side: sqrt(N).

    Raises:
        DatasetError: A folder has latents of another encoder or dataset.
        ValueError, FileNotFoundError: See `codec.load`.
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

        def encode(batch):
            x = (raw(batch) - mean) / std
            return x, np.full_like(x, LOG_ZERO)

    for entry in entries:
        write.write(entry["latents"], entry["path"], encode, about)


def _pixels(side: int) -> tuple[Encode, int, str]:
    """Return an encoder to patches of pixels, the side of its images, and its name."""

    def encode(batch):
        return np.asarray(patchify(batch.astype(np.float32), PATCH, "channel_last"))

    return encode, side * PATCH, "pixels"


def _features(path: str) -> tuple[Encode, int, str]:
    """Return an encoder to features of a codec's tower, the side of its images, and its name."""
    codec = codecs.load(path)

    @jax.jit
    def features(params, batch):
        return teacher.features(params, scale_pixels(batch), codec.teacher)

    def encode(batch):
        parts = []
        for first in range(0, len(batch), codecs.BATCH):
            rows = batch[first : first + codecs.BATCH]
            # One batch size, one compiled program.
            padded = np.pad(rows, ((0, codecs.BATCH - len(rows)), *((0, 0),) * 3))
            parts.append(np.asarray(features(codec.params["teacher"], padded))[: len(rows)])
        return np.concatenate(parts)

    return encode, codec.teacher.pixels, f"tower of {codec.sha256}"


def _scale(raw: Encode, pixels: int, path: str) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation float32 [D] over the first images of a dataset."""
    first_images = itertools.islice(_read_images(path, pixels), NUM_MEASURED)
    x = raw(np.stack(list(first_images))).astype(np.float64)
    mean, std = x.mean((0, 1)), x.std((0, 1))
    return mean.astype(np.float32), np.maximum(std, 1e-6).astype(np.float32)


def _read_images(path: str, pixels: int):
    dataset = records.read(path)
    for number in range(len(dataset)):
        for blob in dataset[number].imgs:
            image = images.decode(blob.data, dataset.location(number))
            yield images.center_crop(image, pixels)
