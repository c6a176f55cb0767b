"""What the trainings of the latent codec FAE minimise (paper.md 2.2).

Axes: B rows, T patches, C feature channels, D latent channels, H x W pixels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from starflow2_jax.models import fae, fae_losses
from starflow2_jax.models import teacher as teachers
from starflow2_jax.models.fae import Config
from starflow2_jax.models.teacher import Teacher
from starflow2_jax.params import Tree
from starflow2_jax.training import inputs, optim


@dataclass(frozen=True)
class Objective:
    """One training, as functions.

    Attributes:
        declared: Weights of every top-level subtree.
        groups: trained subtrees by the optimizer that they share.
        tracked: subtrees of running statistics: no gradient, no optimizer, changed by `track`.
        prepare: (frozen, batch, keys, train) -> what is given, computed without a gradient.
        loss: (params, frozen, given, keys, train) -> loss of each row [B], figures of each [B].
        observe: (params, frozen, given) -> sums over rows that `track` reads.
        track: (tracked, observed, step) -> tracked.
        means: summed figures to readable ones.
    """

    declared: Tree
    groups: Mapping[str, tuple[str, ...]]
    tracked: tuple[str, ...]
    prepare: Callable
    loss: Callable
    observe: Callable
    track: Callable
    means: Callable

    @property
    def trained(self) -> tuple[str, ...]:
        """Subtrees with an optimizer."""
        return tuple(name for names in self.groups.values() for name in names)


def features(cfg: Mapping[str, Any], model: Config, teacher: Teacher) -> Objective:
    """Encoder and feature decoder: reconstruction of the teacher's features, and KL.

    The statistics that normalise latents are tracked, for raw and averaged weights apart.
    """
    whole = fae.declare(model)
    group = cfg["fae"]
    declared = {name: whole[name] for name in ("encoder", "feature_decoder", "latent")}
    declared["teacher"] = teachers.declare(teacher)

    def prepare(frozen, batch, keys, train):
        image = inputs.images(batch, keys, train and cfg["image"]["flip"])
        return {"features": teachers.features(frozen["teacher"], image, teacher)}

    def loss(params, frozen, given, keys, train):
        del frozen
        x = given["features"]
        options = {"beta": group["beta"], "sigma": group["latent_noise"] if train else 0.0}
        each, sums = fae_losses.feature_loss(params, x, keys, model, **options)
        return each, {**sums, "feature_square": jnp.square(x).mean((1, 2))}

    def observe(params, frozen, given):
        del frozen
        return fae.moments(*fae.posterior(params, given["features"], model))

    def track(tracked, observed, step):
        return {"latent": track_latent(tracked["latent"], observed, group, step)}

    return Objective(
        declared=declared,
        groups={"codec": ("encoder", "feature_decoder")},
        tracked=("latent",),
        prepare=prepare,
        loss=loss,
        observe=observe,
        track=track,
        means=feature_means,
    )


def feature_means(sums: Mapping[str, Any]) -> dict[str, Any]:
    """`relative_error`, the mean square of the error against that of the features, and its parts.

    `kl` is in nats of a whole row.
    """
    count = sums["count"]
    return {
        "relative_error": sums["mean_square"] / sums["feature_square"],
        "mean_square": sums["mean_square"] / count,
        "kl": sums["kl"] / count,
    }


def track_latent(
    latent: Tree, observed: Tree, group: Mapping[str, Any], step: jax.Array
) -> dict[str, jax.Array]:
    """Running mean and standard deviation of every channel, by moments of one more batch."""
    mean, std = latent["mean"], latent["std"]
    fresh = tuple(observed[name] / observed["count"] for name in ("sum", "square"))
    old = (mean, jnp.square(std) + jnp.square(mean))
    mean, square = optim.update_ema(old, fresh, group["statistics_decay"], step)
    return {"mean": mean, "std": jnp.sqrt(jnp.maximum(square - jnp.square(mean), 1e-12))}
