"""Classifier-free guidance of autoregressive Gaussians (arXiv 2506.06276, Proposition 2).

A guided block runs twice as many rows, [conditional; null], with the same noise and guided tokens
in both halves; each pair of predicted Gaussians becomes one.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

RULES = ("product", "linear_log_scale", "linear_scale")
WHAT = ("ab", "a", "b")
TEMPERATURE_ON = ("all", "unconditional")


@struct.dataclass
class Guidance:
    """Strength and rule by which predictions move away from those of the null condition."""

    weight: Any  #: w; 0 is no guidance. It is traced, so changing it does not recompile.
    #: Null text features [B or 1, L, E]; None stands for zeros, which are padding
    text: jax.Array | None = None
    temperature: Any = 1.0  #: temperature of the attention logits in the passes of `temperature_on`
    #: `product` is p_c^(1+w) p_u^(-w) with the scale ratio clipped at 1 (STARFlow);
    #: `linear_log_scale` and `linear_scale` extrapolate the mean and the (log-)scale
    rule: str = struct.field(pytree_node=False, default="product")
    #: The linear rules change the scale (a), the mean (b) or both
    what: str = struct.field(pytree_node=False, default="ab")
    #: w grows linearly along the sequence, w (i + 1) / predictions (TarFlow)
    annealed: bool = struct.field(pytree_node=False, default=False)
    #: `all` passes (STARFlow) or the `unconditional` one (TarFlow)
    temperature_on: str = struct.field(pytree_node=False, default="all")
    #: Also double blocks that read no condition, which matters where only the temperature differs
    #: (TarFlow without classes)
    all_blocks: bool = struct.field(pytree_node=False, default=False)


def check(guidance: Guidance) -> None:
    """Raise ValueError if a field of the guidance is not one of its allowed words."""
    allowed = {"rule": RULES, "what": WHAT, "temperature_on": TEMPERATURE_ON}
    for field, words in allowed.items():
        if getattr(guidance, field) not in words:
            raise ValueError(f"guidance.{field}={getattr(guidance, field)!r} is not one of {words}")


def combine(
    guidance: Guidance, scale: jax.Array, mean: jax.Array, fraction: Any
) -> tuple[jax.Array, jax.Array]:
    """Combine each conditional-null pair of Gaussians into one.

    Args:
        scale, mean: [2B, n, D], the conditional rows first; [B, n, D] are returned.
        fraction: (i + 1) / predictions of the predicted positions, broadcastable to [1, n, 1];
            used if annealed.
    """
    (scale_c, scale_u), (mean_c, mean_u) = jnp.split(scale, 2), jnp.split(mean, 2)
    w = jnp.asarray(guidance.weight, scale.dtype)
    if guidance.annealed:
        w = w * jnp.asarray(fraction, scale.dtype)
    if guidance.rule == "product":
        # s = min(scale_c / scale_u, 1)^2; precision (1 + w - w s) / scale_c^2.
        ratio = jnp.square(jnp.minimum(scale_c / scale_u, 1.0))
        total = 1 + w - w * ratio
        return scale_c * jax.lax.rsqrt(total), ((1 + w) * mean_c - w * ratio * mean_u) / total
    if "b" in guidance.what:
        mean_c = mean_c + w * (mean_c - mean_u)
    if "a" in guidance.what and guidance.rule == "linear_scale":
        scale_c = scale_c + w * (scale_c - scale_u)
    elif "a" in guidance.what:
        scale_c = scale_c * jnp.power(scale_c / scale_u, w)
    return scale_c, mean_c
