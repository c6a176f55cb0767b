"""Small interleaved data for tests: shapes records, a tokenizer of their texts, random latents."""

import numpy as np

from starflow2_jax.data import records, tokenizer
from starflow2_jax.latents import write
from starflow2_jax.shapes import tasks as shapes_tasks


def make(folder, count=48, pixels=16, tasks=shapes_tasks.TASKS, patch=8, merge=1, size=400):
    """Write a dataset folder and a tokenizer folder under `folder`, and return both."""
    data, tokenizer_folder = folder / "data", folder / "tokenizer"
    records.write(data, shapes_tasks.make_records(3, count, pixels, tasks=list(tasks)))
    tokenizer.write(
        tokenizer.train(data, size), tokenizer_folder, patch=patch, merge=merge, frames=2
    )
    return str(data), str(tokenizer_folder)


def make_latents(data, out, side, channels, pixels=16):
    """Write a folder of latents [side^2, channels] that depend on each image's bytes."""

    def encode(images):
        rngs = [np.random.default_rng(list(image.tobytes()[:512])) for image in images]
        mean = np.stack([rng.standard_normal((side**2, channels)) for rng in rngs])
        return mean.astype(np.float32), np.full(mean.shape, -3.0, np.float32)

    encoder = {"sha256": "0" * 64, "pixels": pixels, "shape": [side**2, channels]}
    write.write(out, data, encode, encoder)
    return str(out)
