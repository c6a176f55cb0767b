"""Convolutional building blocks of the perceptual distance and the discriminator.

Shapes: B batch, H x W positions, c channels; kernels are [rows, columns, in, out].
"""

from typing import Any

import jax
import jax.numpy as jnp

from starflow2_jax.models.layers import at_least_float32
from starflow2_jax.params import ParamSpec, Tree, normal, zeros


def declare_conv(kernel: int, inputs: int, outputs: int, std: float = 0.02) -> dict[str, Any]:
    """Declare a convolution with a bias."""
    return {
        "weight": ParamSpec((kernel, kernel, inputs, outputs), (None,) * 4, normal(std)),
        "bias": ParamSpec((outputs,), (None,), zeros),
    }


def conv(params: Tree, x: jax.Array, stride: int = 1, padding: int = 1) -> jax.Array:
    """Convolve [B, H, W, in] to [B, H', W', out] in x's dtype, with `padding` zeros per side."""
    y = jax.lax.conv_general_dilated(
        x,
        params["weight"].astype(x.dtype),
        (stride, stride),
        ((padding, padding),) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y + params["bias"].astype(x.dtype)


def max_pool(x: jax.Array) -> jax.Array:
    """Return the maximum of every 2 x 2 positions; an odd last row or column is dropped."""
    lowest = -jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).min
    return jax.lax.reduce_window(x, lowest, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def group_norm(params: Tree, x: jax.Array, groups: int, eps: float = 1e-6) -> jax.Array:
    """Normalize every group of channels of a row over all positions to zero mean, unit variance.

    Unlike batch norm it keeps rows independent. Statistics are in at least float32.
    """
    y = at_least_float32(x).reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    y = y - y.mean((1, 3), keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean((1, 3), keepdims=True) + eps)
    return (y.reshape(x.shape) * params["weight"] + params["bias"]).astype(x.dtype)
