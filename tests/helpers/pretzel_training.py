"""Configurations and batches for the training stages of a very small STARFlow2."""

from helpers import pretzel_batch
from starflow2_jax import config
from starflow2_jax.models import starflow2

ROWS = 8
STAGES = {1: ("shallow", "deep"), 2: ("adapter",), 3: ("adapter", "shallow", "deep", "skip")}


def experiment(stage=3, **changes):
    """Return the configuration of a stage, with dotted keys changed."""
    cfg = config.default()
    cfg.task, cfg.train.trainable = "starflow2", STAGES[stage]
    cfg.model.update(starflow2.options(pretzel_batch.model()))
    cfg.text.length, cfg.text.images, cfg.text.max_targets, cfg.text.logit_chunk = 40, 3, 16, 8
    cfg.train.batch_size, cfg.train.steps, cfg.train.ema = ROWS, 10, 0.9
    cfg.optim.lr, cfg.optim.warmup, cfg.noise.sigma = 1e-2, 1, 0.3
    cfg.update_from_flattened_dict(changes)
    config.check(cfg)
    return config.to_dict(cfg)


def batch_of(seed=0):
    """Return rows with targets of every kind; the last row is padding."""
    kinds = [
        [pretzel_batch.T2I],
        [pretzel_batch.I2T, pretzel_batch.TEXT],
        [pretzel_batch.EDIT],
        [pretzel_batch.REASON],
        [pretzel_batch.TEXT],
    ]
    rows = [*kinds, [pretzel_batch.T2I, pretzel_batch.TEXT], [pretzel_batch.I2T], []]
    return pretzel_batch.batch(rows, length=40, places=3, seed=seed)
