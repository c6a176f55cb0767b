"""The patch discriminator of the pixel decoder, and its losses: hinge and LeCam's regularizer.

Shapes: B batch, H x W pixels, h x w patches.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from starflow2_jax.models.fae.convolutions import conv, declare_conv, group_norm
from starflow2_jax.models.layers import at_least_float32, declare_norm
from starflow2_jax.params import Tree


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Sizes of the discriminator."""

    widths: tuple[int, ...] = (64, 128, 256, 512)  # of the convolutions; each halves the sides
    groups: int = 32  # number of groups of the group norms
    compute_dtype: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "widths", tuple(self.widths))
        if not self.widths or any(width % self.groups for width in self.widths[1:]):
            raise ValueError(
                f"discriminator: widths={self.widths}, all but the first must be multiples of "
                f"groups={self.groups}"
            )


def declare(cfg: DiscriminatorConfig) -> dict[str, Any]:
    """Declare `convs/i`, the last for the logits, and `norms/i` for all widths but the first."""
    pairs = itertools.pairwise((3, *cfg.widths))
    convs = {str(i): declare_conv(4, *sizes) for i, sizes in enumerate(pairs)}
    convs[str(len(cfg.widths))] = declare_conv(3, cfg.widths[-1], 1)
    norms = {
        str(i): declare_norm("layer_norm", (w,), (None,)) for i, w in enumerate(cfg.widths) if i
    }
    return {"convs": convs, **({"norms": norms} if norms else {})}


def forward(params: Tree, image: jax.Array, cfg: DiscriminatorConfig) -> jax.Array:
    """Return logits [B, h, w] in at least float32, large for real, of images [B, H, W, 3]."""
    x = image.astype(jnp.dtype(cfg.compute_dtype or params["convs"]["0"]["weight"].dtype))
    for i in range(len(cfg.widths)):
        x = conv(params["convs"][str(i)], x, stride=2)
        x = group_norm(params["norms"][str(i)], x, cfg.groups) if i else x
        x = jax.nn.leaky_relu(x, 0.2)
    return at_least_float32(conv(params["convs"][str(len(cfg.widths))], x)[..., 0])


def _mean_over_patches(x: jax.Array) -> jax.Array:
    return x.mean(range(1, x.ndim))


def hinge_loss(real: jax.Array, fake: jax.Array) -> jax.Array:
    """Return the discriminator's loss [B], the mean of (relu(1 - real) + relu(1 + fake)) / 2."""
    above, below = jax.nn.relu(1 + fake), jax.nn.relu(1 - real)
    return 0.5 * (_mean_over_patches(below) + _mean_over_patches(above))


def generator_loss(fake: jax.Array) -> jax.Array:
    """Return the generator's loss [B], the mean over patches of -fake."""
    return -_mean_over_patches(fake)


def lecam_start(dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    """Return the initial running means of the logits of real and generated images."""
    return {"real": jnp.zeros((), dtype), "fake": jnp.zeros((), dtype)}


def lecam_update(
    running: Tree, real: jax.Array, fake: jax.Array, decay: float = 0.999
) -> dict[str, jax.Array]:
    """Return the running means after a step with logits `real` and `fake` of the whole batch."""
    means = {"real": real.mean(), "fake": fake.mean()}
    new = {k: running[k] + (1 - decay) * (means[k] - running[k]) for k in means}
    return jax.lax.stop_gradient(new)


def lecam_penalty(running: Tree, real: jax.Array, fake: jax.Array) -> jax.Array:
    """Return LeCam's regularizer [B] (arXiv 2104.03310), averaged over patches.

    relu(real - running fake)^2 + relu(running real - fake)^2 keeps the logits of one kind from
    moving far beyond the running mean of the other.
    """
    above = jnp.square(jax.nn.relu(real - running["fake"]))
    below = jnp.square(jax.nn.relu(running["real"] - fake))
    return _mean_over_patches(above) + _mean_over_patches(below)
