"""The frozen tower whose features the latent codec encodes: DINOv2 or Qwen2.5-VL's (paper.md 2.1).

Axes: B batch, H x W pixels, T patches in raster order, C feature channels.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from starflow2_jax.models import qwen_vision
from starflow2_jax.models.fae import dinov2
from starflow2_jax.models.layers import at_least_float32
from starflow2_jax.params import Tree

EPS = 1e-6
KINDS = ("dinov2", "qwen")
# Towers that are drawn, for images of 64 pixels: 8 x 8 features of 128 channels.
DRAWN: dict[str, Any] = {
    "dinov2": dinov2.preset("tiny"),
    "qwen": qwen_vision.VisionConfig(
        depth=2,
        width=64,
        heads=4,
        mlp_width=128,
        out_width=128,
        full_layers=(1,),
        patch=4,
        window=16,
    ),
}


@dataclass(frozen=True)
class Teacher:
    """A tower and the size of the images that it sees.

    Attributes:
        kind: one of `KINDS`; pixels: side of the square image, after resizing.
    """

    kind: str
    tower: dinov2.Config | qwen_vision.VisionConfig
    pixels: int

    def __post_init__(self):
        if self.pixels % self._step or self.pixels < self._step:
            raise ValueError(
                f"config: teacher.pixels={self.pixels} is not a multiple of {self._step}, the "
                f"pixels of one of the tower's features"
            )

    @property
    def _step(self) -> int:
        merge = self.tower.merge if self.kind == "qwen" else 1
        return self.tower.patch * merge

    @property
    def side(self) -> int:
        """Rows (= columns) of features."""
        return self.pixels // self._step

    @property
    def width(self) -> int:
        """C."""
        return self.tower.out_width if self.kind == "qwen" else self.tower.width


def declare(teacher: Teacher) -> dict[str, Any]:
    """Every weight of the tower."""
    module = qwen_vision if teacher.kind == "qwen" else dinov2
    return module.declare(teacher.tower)


def features(params: Tree, image: jax.Array, teacher: Teacher) -> jax.Array:
    """Features [B, T, C] in at least float32 of images [B, H, W, 3] in [-1, 1].

    Of DINOv2 the patch tokens after the final norm, without class and register tokens; of Qwen's
    tower what its merger gives, each from merge x merge patches, scaled to a mean square of one.
    """
    side, tower = teacher.pixels, teacher.tower
    if teacher.kind == "dinov2":
        found = dinov2.forward(params, dinov2.preprocess(image, side), tower)
        return at_least_float32(found.patches)
    if image.shape[1:3] != (side, side):
        image = jnp.clip(dinov2.resize(image, (side, side), antialias=True), -1, 1)
    mean, std = (jnp.asarray(v, image.dtype) for v in (qwen_vision.MEAN, qwen_vision.STD))
    found = qwen_vision.encode_images(params, ((image + 1) / 2 - mean) / std, tower)
    found = at_least_float32(found)
    # The merger ends without a norm. The codec's feature decoder ends with one, so it could not
    # give back lengths, and noise and losses are stated for features of this size.
    return found * jax.lax.rsqrt(jnp.square(found).mean(-1, keepdims=True) + EPS)
