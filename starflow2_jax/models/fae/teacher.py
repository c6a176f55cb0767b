"""The frozen teacher whose features the latent codec encodes: DINOv2 or Qwen2.5-VL's tower.

Shapes: B batch, H x W pixels, T patches in raster order, C feature channels.
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
# Towers with random weights, for images of 64 pixels: 8 x 8 features of 128 channels.
RANDOM_INIT_TOWERS: dict[str, Any] = {
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
    """A tower and the size of its input."""

    kind: str  # one of `KINDS`
    tower: dinov2.DinoConfig | qwen_vision.VisionConfig
    pixels: int  # side of the square image, after resizing

    def __post_init__(self):
        if self.pixels % self.feature_pixels or self.pixels < self.feature_pixels:
            raise ValueError(
                f"config: teacher.pixels={self.pixels} is not a multiple of "
                f"{self.feature_pixels}, the side in pixels of one feature of the tower"
            )

    @property
    def feature_pixels(self) -> int:
        """Side in pixels of one feature."""
        return self.tower.patch * (self.tower.merge if self.kind == "qwen" else 1)

    @property
    def side(self) -> int:
        """Rows (= columns) of features."""
        return self.pixels // self.feature_pixels

    @property
    def width(self) -> int:
        """Number of feature channels C."""
        return self.tower.out_width if self.kind == "qwen" else self.tower.width


def declare(teacher: Teacher) -> dict[str, Any]:
    """Declare every parameter of the tower."""
    module = qwen_vision if teacher.kind == "qwen" else dinov2
    return module.declare(teacher.tower)


def features(params: Tree, image: jax.Array, teacher: Teacher) -> jax.Array:
    """Return features [B, T, C] in at least float32 of images [B, H, W, 3] in [-1, 1].

    DINOv2's are the patch tokens after the final norm, without class and register tokens. Qwen's
    are the outputs of its merger, each of merge x merge patches, scaled to a mean square of one.
    """
    side, tower = teacher.pixels, teacher.tower
    if teacher.kind == "dinov2":
        image = dinov2.preprocess(image, side)
        return at_least_float32(dinov2.forward(params, image, tower).patches)
    if image.shape[1:3] != (side, side):
        image = jnp.clip(dinov2.resize(image, (side, side), antialias=True), -1, 1)
    mean, std = (jnp.asarray(v, image.dtype) for v in (qwen_vision.MEAN, qwen_vision.STD))
    merged = qwen_vision.encode_images(params, ((image + 1) / 2 - mean) / std, tower)
    merged = at_least_float32(merged)
    # The merger ends without a norm, but the codec's feature decoder ends with one: it could not
    # reproduce lengths. Noise and losses assume features of unit mean square, too.
    return merged * jax.lax.rsqrt(jnp.square(merged).mean(-1, keepdims=True) + EPS)
