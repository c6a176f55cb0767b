"""A tiny mixture of transformers."""

import dataclasses

import jax.numpy as jnp

from helpers import pretzel_batch
from starflow2_jax.models.ablations import mot
from starflow2_jax.training.losses import interleaved
from starflow2_jax.training.losses.interleaved import Stage

BOTH = Stage(True, True)


def model(width=24, **changes):
    """Return the model that matches the small Pretzel of `pretzel_batch`."""
    pretzel = pretzel_batch.model(**changes)
    vlm = dataclasses.replace(pretzel.vlm, vision_start_token=pretzel_batch.TOKENIZER.vision_start)
    return mot.matching(dataclasses.replace(pretzel, vlm=vlm), width)


def terms(params, batch, cfg, x=None):
    """Return the loss terms of a batch, with both losses and at most 12 text targets."""
    x = jnp.asarray(batch["latent_mean"]) if x is None else x
    return interleaved.loss_terms(params, batch, x, cfg, BOTH, text_targets=12)
