"""Clean-up of sampled tokens: the model's density is that of noisy data, so samples are noisy."""

from typing import Any

import jax
import jax.numpy as jnp

from starflow2_jax.models import flow
from starflow2_jax.models.flow import FlowConfig
from starflow2_jax.params import Tree


def score_step(
    params: Tree,
    x: jax.Array,
    cfg: FlowConfig,
    sigma: float,
    *,
    text: jax.Array | None = None,
    labels: jax.Array | None = None,
    grid: tuple[int, int] | None = None,
) -> jax.Array:
    """Tweedie's estimate x + sigma^2 d log p(x) / dx of the data without noise (paper.md 3.8).

    Args:
        x: sampled tokens [B, T, D]; sigma: standard deviation of the noise in training.
    """

    def log_density(x: jax.Array) -> Any:
        z, log_det = flow.forward(params, x, cfg, text=text, labels=labels, grid=grid)
        return (log_det - 0.5 * jnp.square(z).sum((1, 2))).sum()

    return x + sigma**2 * jax.grad(log_density)(x)
