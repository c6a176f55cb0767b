"""A tiny mixture of transformers, and checks that every backbone passes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from helpers import pretzel_batch
from starflow2_jax.models.ablations import mot
from starflow2_jax.params import init as init_params
from starflow2_jax.training.losses import interleaved
from starflow2_jax.training.losses.interleaved import Stage

BOTH = Stage(True, True)


def model(width=24, **changes):
    """Beside the small Pretzel of the tests, whose tokenizer begins an image with token 3."""
    pretzel = pretzel_batch.model(**changes)
    vlm = dataclasses.replace(pretzel.vlm, vision_start_token=pretzel_batch.TOKENIZER.vision_start)
    return mot.matching(dataclasses.replace(pretzel, vlm=vlm), width)


def random_params(cfg, seed=0, shake=0.3):
    """Weights with nothing at zero; float32, or float64 under x64."""
    tree = init_params(jax.random.key(seed), mot.declare(cfg))
    dtype = np.float64 if jax.config.jax_enable_x64 else np.float32
    rng = np.random.default_rng(seed)

    def change(leaf):
        size = shake / max(leaf.shape[-2] if leaf.ndim > 1 else 10, 1) ** 0.5
        return np.asarray(leaf, dtype) + size * rng.standard_normal(leaf.shape).astype(dtype)

    return jax.tree.map(change, tree)


def terms(params, batch, cfg, x=None):
    x = jnp.asarray(batch["latent_mean"]) if x is None else x
    return interleaved.loss_terms(params, batch, x, cfg, BOTH, text_targets=12)
