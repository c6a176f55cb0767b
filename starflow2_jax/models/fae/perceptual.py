"""Perceptual distances between images: LPIPS (arXiv 1801.03924) on VGG16, or a teacher's features.

Shapes: B batch, H x W pixels, T tokens, C channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from starflow2_jax.models.fae.convolutions import conv, declare_conv, max_pool
from starflow2_jax.models.fae.dinov2 import PIXEL_MEAN, PIXEL_STD
from starflow2_jax.models.layers import at_least_float32
from starflow2_jax.params import ParamSpec, Tree, ones

# Number of convolutions of each stage of VGG16.
DEPTHS = (2, 2, 3, 3, 3)


@dataclass(frozen=True)
class LPIPSConfig:
    """Channels of the five stages of VGG16."""

    widths: tuple[int, ...] = (64, 128, 256, 512, 512)

    def __post_init__(self):
        object.__setattr__(self, "widths", tuple(self.widths))
        if len(self.widths) != len(DEPTHS):
            raise ValueError(f"perceptual: widths={self.widths}, expected {len(DEPTHS)} numbers")


def declare(cfg: LPIPSConfig) -> dict[str, Any]:
    """Declare convolutions `stages/i/j`, and `channels/i`, the weights of a stage's channels."""
    inputs = (3, *cfg.widths[:-1])
    stages = {}
    for i, (depth, width) in enumerate(zip(DEPTHS, cfg.widths)):
        sizes = enumerate((inputs[i], *(width,) * (depth - 1)))
        convs = {str(j): declare_conv(3, size, width, (2 / (9 * size)) ** 0.5) for j, size in sizes}
        stages[str(i)] = convs
    channels = {str(i): ParamSpec((width,), (None,), ones) for i, width in enumerate(cfg.widths)}
    return {"stages": stages, "channels": channels}


def stages(params: Tree, image: jax.Array) -> list[jax.Array]:
    """Return activations [B, H / 2^i, W / 2^i, C_i] after each stage of an image in [-1, 1]."""
    mean, std = (jnp.asarray(values, image.dtype) for values in (PIXEL_MEAN, PIXEL_STD))
    x = ((image + 1) / 2 - mean) / std
    outputs = []
    for i, depth in enumerate(DEPTHS):
        x = max_pool(x) if i else x
        for j in range(depth):
            x = jax.nn.relu(conv(params["stages"][str(i)][str(j)], x))
        outputs.append(x)
    return outputs


def unit_norm(x: jax.Array) -> jax.Array:
    """Return x / |x| over the last axis; zeros stay zeros, with a finite gradient."""
    x = at_least_float32(x)
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-10)


def lpips(params: Tree, image: jax.Array, target: jax.Array) -> jax.Array:
    """Return the distance [B] of images [B, H, W, 3] in [-1, 1], sides at least 16.

    It sums the weighted squared differences of unit-norm activations over channels and stages, as
    a mean over positions.
    """
    if min(image.shape[1:3]) < 16:
        raise ValueError(f"perceptual: image of {image.shape[1:3]}, sides must be at least 16")
    total = jnp.zeros(image.shape[0])
    for i, (a, b) in enumerate(zip(stages(params, image), stages(params, target))):
        square = jnp.square(unit_norm(a) - unit_norm(b)) * params["channels"][str(i)]
        total = total + square.sum(-1).mean((1, 2))
    return total


def token_distance(tokens: Sequence[jax.Array], targets: Sequence[jax.Array]) -> jax.Array:
    """Return the distance [B] of a teacher's features of two images, each a list of [B, T, C].

    It averages the squared difference of unit-norm tokens over tokens and over the list.
    """
    distances = [
        jnp.square(unit_norm(a) - unit_norm(b)).sum(-1).mean(-1) for a, b in zip(tokens, targets)
    ]
    return sum(distances) / len(distances)
