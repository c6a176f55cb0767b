"""The exact negative log-likelihood of a flow, as a sum and a count.

The loss of a global batch is the sum over all of its dimensions divided by their number, so that
microbatches, devices and hosts add up to the same value.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from starflow2_jax.models import flow
from starflow2_jax.models.flow import Conditioning, FlowConfig
from starflow2_jax.params import Tree

HALF_LOG_2_PI = 0.5 * math.log(2 * math.pi)


def flow_loss(
    params: Tree,
    x: jax.Array,
    cfg: FlowConfig,
    conditioning: Conditioning | None = None,
    *,
    latent_penalty: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return -log p(x) without its constant, plus the latent-norm penalty.

        -log p(x) = 1/2 |z|^2 - sum_i log |det dz_i / dz_(i-1)| + const

    Args:
        x: tokens [B, T, D].
        latent_penalty: weight of the mean square of the input of each block, the data included and
            z excluded. Likelihoods leave it out.

    Returns:
        The loss of each row [B], and sums over its dimensions, each [B]: `count`, `half_square` of
        z, and for every block `log_det/i` and the square of its input, `latent/i`.
    """
    outputs, log_dets = flow.forward_blocks(params, x, cfg, conditioning)
    half_square = 0.5 * jnp.square(outputs[-1]).sum((1, 2))
    squares = [jnp.square(u).sum((1, 2)) for u in outputs[:-1]]
    loss = half_square - sum(log_dets) + latent_penalty * sum(squares)
    dims = jnp.full(x.shape[:1], x.shape[1] * x.shape[2], loss.dtype)
    sums: dict[str, Any] = {"count": dims, "half_square": half_square}
    for i, (log_det, square) in enumerate(zip(log_dets, squares)):
        sums[f"log_det/{i}"], sums[f"latent/{i}"] = log_det, square
    return loss, sums


def log_likelihood(
    params: Tree, x: jax.Array, cfg: FlowConfig, conditioning: Conditioning | None = None
) -> jax.Array:
    """Return log p(x) [B] of tokens x [B, T, D] in nats, with the constant of the Gaussian.

    log p(x) = log_det - 1/2 |z|^2 - 1/2 T D log(2 pi)
    """
    z, log_det = flow.forward(params, x, cfg, conditioning)
    dims = x.shape[1] * x.shape[2]
    return log_det - 0.5 * jnp.square(z).sum((1, 2)) - dims * HALF_LOG_2_PI


def per_dim(sums: dict[str, Any]) -> dict[str, Any]:
    """Return means from summed metrics: nats_per_dim (with the constant) and its parts."""
    count = sums["count"]
    blocks = sorted(int(name.split("/")[1]) for name in sums if name.startswith("log_det/"))
    log_det = sum(sums[f"log_det/{i}"] for i in blocks)
    means = {
        "nats_per_dim": (sums["half_square"] - log_det) / count + HALF_LOG_2_PI,
        "half_square_z": sums["half_square"] / count,
    }
    for i in blocks:
        means[f"log_det/{i}"] = sums[f"log_det/{i}"] / count
        means[f"latent_rms/{i}"] = (sums[f"latent/{i}"] / count) ** 0.5
    return means
