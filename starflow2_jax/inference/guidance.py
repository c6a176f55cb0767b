"""Classifier-free guidance of autoregressive Gaussians (paper.md 3.6).

A guided block runs twice as many rows, [conditional; null], with the same noise and the same guided
tokens in both halves; each pair of predicted Gaussians becomes one.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

RULES = ("product", "linear_log_scale", "linear_scale")
WHAT = ("ab", "a", "b")
TEMPERATURE_ON = ("all", "unconditional")
BLOCKS = ("text", "top", "all")


@struct.dataclass
class Guidance:
    """How strongly, and by which rule, predictions move away from those of the null condition.

    Attributes:
        weight: w; 0 is no guidance. A traced number: another one does not recompile.
        text: null text features [B or 1, L, E]; None are zeros, as padding.
        labels: null labels int32 [B]; None is the null class.
        temperature: of the attention logits, in the passes named by `temperature_on`.
        rule: `product` is p_c^(1+w) p_u^(-w) with the scale ratio clipped at 1 (STARFlow, Prop. 2);
            `linear_log_scale` and `linear_scale` extrapolate the mean and the (log-)scale.
        what: the linear rules change the scale (a), the mean (b) or both.
        annealed: w grows linearly along the sequence, w (i + 1) / predictions (TarFlow).
        temperature_on: `all` passes (STARFlow) or the `unconditional` one (TarFlow).
        blocks: those that read the condition (`text`), the deep one (`top`), or `all`.
    """

    weight: Any
    text: jax.Array | None = None
    labels: jax.Array | None = None
    temperature: Any = 1.0
    rule: str = struct.field(pytree_node=False, default="product")
    what: str = struct.field(pytree_node=False, default="ab")
    annealed: bool = struct.field(pytree_node=False, default=False)
    temperature_on: str = struct.field(pytree_node=False, default="all")
    blocks: str = struct.field(pytree_node=False, default="text")


def check(guidance: Guidance) -> None:
    """Raises ValueError naming the field that is not one of its allowed words."""
    for field, allowed in (
        ("rule", RULES),
        ("what", WHAT),
        ("temperature_on", TEMPERATURE_ON),
        ("blocks", BLOCKS),
    ):
        if getattr(guidance, field) not in allowed:
            raise ValueError(f"guidance.{field}={getattr(guidance, field)!r} is not of {allowed}")


def combine(
    guidance: Guidance, scale: jax.Array, mean: jax.Array, fraction: Any
) -> tuple[jax.Array, jax.Array]:
    """One Gaussian for each conditional-null pair.

    Args:
        scale, mean: [2B, n, D], the conditional rows first.
        fraction: (i + 1) / predictions of the predicted positions, broadcastable to [1, n, 1]; used
            where annealed.

    Returns:
        scale, mean [B, n, D].
    """
    (scale_c, scale_u), (mean_c, mean_u) = jnp.split(scale, 2), jnp.split(mean, 2)
    w = jnp.asarray(guidance.weight, scale.dtype)
    if guidance.annealed:
        w = w * jnp.asarray(fraction, scale.dtype)
    if guidance.rule == "product":
        share = jnp.square(jnp.minimum(scale_c / scale_u, 1.0))
        total = 1 + w - w * share
        return scale_c * jax.lax.rsqrt(total), ((1 + w) * mean_c - w * share * mean_u) / total
    if "b" in guidance.what:
        mean_c = mean_c + w * (mean_c - mean_u)
    if "a" in guidance.what and guidance.rule == "linear_scale":
        scale_c = scale_c + w * (scale_c - scale_u)
    elif "a" in guidance.what:
        scale_c = scale_c * jnp.power(scale_c / scale_u, w)
    return scale_c, mean_c
