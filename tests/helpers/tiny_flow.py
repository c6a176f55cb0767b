"""Configurations and batches of a tiny TarFlow on 8 x 8 pixels."""

import numpy as np

from starflow2_jax import config

ROWS = 16


def experiment(**changes):
    """Return the configuration of a class-conditional TarFlow, with dotted keys changed."""
    cfg = config.default()
    cfg.model.update(
        {
            "side": 2, "channels": 48, "width": 64, "layers": (1, 1), "head_dim": 8, "classes": 3,
            "start": "shift", "positions": "learned", "scale": "exp",
        }
    )  # fmt: skip
    cfg.image.pixels, cfg.image.patch, cfg.image.flip = 8, 4, True
    cfg.train.batch_size, cfg.train.steps = ROWS, 20
    cfg.optim.lr, cfg.optim.warmup = 1e-2, 2
    cfg.update_from_flattened_dict(changes)
    return config.to_dict(cfg)


def batch_of(rows=ROWS, seed=0):
    """Return a host batch of random images."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (rows, 8, 8, 3)).astype(np.uint8)
    return {"image": images, "label": np.arange(rows, dtype=np.int32) % 3, "id": ["x"] * rows}
