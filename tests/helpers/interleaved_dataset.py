"""Small interleaved data for tests: records of the shapes world, a tokenizer of their words, and
latents of no encoder.
"""

import numpy as np

from starflow2_jax.data import records, tokenizer
from starflow2_jax.latents import write as latents_lib
from starflow2_jax.shapes import tasks as shapes_tasks


def make(folder, count=48, pixels=16, tasks=shapes_tasks.TASKS, patch=8, merge=1, size=400):
    """(dataset folder, tokenizer folder), both made under `folder`."""
    data, held = folder / "data", folder / "tokenizer"
    records.write(data, shapes_tasks.make_records(3, count, pixels, tasks=list(tasks)))
    tokenizer.write(tokenizer.train(data, size), held, patch=patch, merge=merge, frames=2)
    return str(data), str(held)


def make_latents(data, out, side, channels, pixels=16):
    """A folder of latents [side^2, channels] that follow from each image's bytes."""

    def encode(pictures):
        rngs = [np.random.default_rng(list(picture.tobytes()[:512])) for picture in pictures]
        mean = np.stack([rng.standard_normal((side**2, channels)) for rng in rngs])
        return mean.astype(np.float32), np.full(mean.shape, -3.0, np.float32)

    encoder = {"sha256": "0" * 64, "pixels": pixels, "shape": [side**2, channels]}
    latents_lib.write(out, data, encode, encoder)
    return str(out)
