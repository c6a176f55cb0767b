"""What the trainings of the latent codec FAE minimise (paper.md 2.2).

Axes: B rows, T patches, C feature channels, D latent channels, H x W pixels.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from starflow2_jax.checkpoints.convert import lpips
from starflow2_jax.models.fae import codec, discriminator, losses, perceptual, teacher as teachers
from starflow2_jax.models.fae.codec import FAEConfig
from starflow2_jax.models.fae.config import (
    declare_features_training,
    declare_pixels_training,
    discriminator_config,
)
from starflow2_jax.models.fae.losses import PixelWeights
from starflow2_jax.models.fae.teacher import Teacher
from starflow2_jax.params import Tree
from starflow2_jax.training import optimizer, preprocess


@dataclass(frozen=True)
class Objective:
    """One training, as functions.

    Attributes:
        declared: ParamSpecs of every top-level subtree.
        groups: trained subtrees by the optimizer that they share.
        tracked: subtrees of running statistics: no gradient, no optimizer, changed by `track`.
        prepare: (frozen, batch, keys, train) -> what is given, computed without a gradient.
        loss: (params, frozen, given, keys, step) -> loss of each row [B], figures of each [B]; step
            is None where no training goes on.
        observe: (params, given) -> sums over rows that `track` reads.
        track: (tracked, observed, summed figures, step) -> tracked.
        show: (params, frozen, given) -> images [B, H, W, 3] in [-1, 1], None where there are none.
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
    show: Callable | None = None
    begins: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def trained(self) -> tuple[str, ...]:
        """Subtrees with an optimizer."""
        return tuple(name for names in self.groups.values() for name in names)


def features(cfg: Mapping[str, Any], model: FAEConfig, teacher: Teacher) -> Objective:
    """Encoder and feature decoder: reconstruction of the teacher's features, and KL.

    The statistics that normalise latents are tracked, for raw and averaged weights apart.
    """
    group = cfg["fae"]
    declared = {**declare_features_training(model), "teacher": teachers.declare(teacher)}

    def prepare(frozen, batch, keys, train):
        image = preprocess.images(batch, keys, train and cfg["image"]["flip"])
        return {"features": teachers.features(frozen["teacher"], image, teacher)}

    def loss(params, frozen, given, keys, step):
        del frozen
        x = given["features"]
        sigma = 0.0 if step is None else group["latent_noise"]
        options = {"beta": group["beta"], "sigma": sigma}
        each, sums = losses.feature_loss(params, x, keys, model, **options)
        return each, {**sums, "feature_square": jnp.square(x).mean((1, 2))}

    def observe(params, given):
        return codec.moments(*codec.posterior(params, given["features"], model))

    def track(tracked, observed, sums, step):
        del sums
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


def pixels(cfg: Mapping[str, Any], model: FAEConfig, teacher: Teacher) -> Objective:
    """Pixel decoder, and a discriminator beside it, from frozen features.

    Features are the tower's with noise, or with `fae.train_on_decoded_features` those
    decoded from latents with `fae.latent_noise` on them.
    """
    whole, group = codec.declare(model), cfg["fae"]
    critic = discriminator_config(cfg, model)
    chosen = PixelWeights(*(group[name] for name in ("l1", "l2", "perceptual", "gan")))
    declared = {
        **whole,
        "teacher": teachers.declare(teacher),
        **declare_pixels_training(cfg, model),
    }
    if group["lpips"]:
        declared["lpips"] = perceptual.declare(lpips.load(group["lpips"])[0])

    def prepare(frozen, batch, keys, train):
        draw = jax.vmap(lambda key: jax.random.split(key, 3))(keys)
        image = preprocess.images(batch, draw[:, 0], train and cfg["image"]["flip"])
        x = own = teachers.features(frozen["teacher"], image, teacher)
        if group["train_on_decoded_features"]:
            latents, log_variance = codec.encode(frozen, own, model)
            if train:
                latents = codec.sample(draw[:, 1], latents, log_variance)
                latents = losses.add_noise(draw[:, 2], latents, group["latent_noise"])
            x = codec.decode_features(frozen, latents, model)
        return {"image": image, "features": x, "own_features": own}

    def loss(params, frozen, given, keys, step):
        image, running = given["image"], params["lecam"]
        began = jnp.asarray(0.0 if step is None else step >= group["gan_start"], jnp.float32)
        held = jax.lax.stop_gradient(params["discriminator"])

        def distance(decoded, image):
            if group["lpips"]:
                return perceptual.lpips(frozen["lpips"], decoded, image)
            found = teachers.features(frozen["teacher"], decoded, teacher)
            return perceptual.token_distance([found], [given["own_features"]])

        clean = step is None or group["train_on_decoded_features"]
        each, decoded, sums = losses.pixel_loss(
            params,
            given["features"],
            image,
            keys,
            model,
            chosen,
            sigma=0.0 if clean else None,
            perceptual=distance,
            logits=lambda x: began * discriminator.forward(held, x, critic),
        )
        square = losses.mean_square(jnp.clip(decoded, -1, 1), image)
        # Values span 2.
        sums["psnr"] = 10 * jnp.log10(4 / jnp.maximum(square, 1e-10))
        if not chosen.gan or step is None:
            return each, sums
        judged, parts = losses.discriminator_loss(
            params["discriminator"], image, decoded, running, critic, lecam=group["lecam"]
        )
        figures = {f"discriminator_{k}": parts[k] for k in ("hinge", "lecam", "real", "fake")}
        return each + began * judged, {**sums, **figures}

    def track(tracked, observed, sums, step):
        del observed
        if not chosen.gan:
            return tracked
        now = (sums[f"discriminator_{k}"] / sums["count"] for k in ("real", "fake"))
        after = discriminator.lecam_update(tracked["lecam"], *now)
        keep = lambda new, old: jnp.where(step >= group["gan_start"], new, old)
        return {"lecam": jax.tree.map(keep, after, tracked["lecam"])}

    return Objective(
        declared=declared,
        groups={"decoder": ("pixel_decoder",), "discriminator": ("discriminator",)},
        tracked=("lecam",),
        prepare=prepare,
        loss=loss,
        observe=lambda params, given: {},
        track=track,
        means=pixel_means,
        begins={"discriminator": group["gan_start"]},
        show=lambda params, frozen, given: codec.decode_pixels(params, given["features"], model),
    )


def pixel_means(sums: Mapping[str, Any]) -> dict[str, Any]:
    """`psnr` in dB, and every term of the losses before its weight, as means over rows."""
    names = [name for name in sums if name not in ("psnr", "count", "loss")]
    known = ("l1", "l2", "perceptual", "gan")
    named = [name for name in names if name in known or name.startswith("discriminator_")]
    return {name: sums[name] / sums["count"] for name in ("psnr", *named)}


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
    mean, square = optimizer.update_ema(old, fresh, group["statistics_decay"], step)
    return {"mean": mean, "std": jnp.sqrt(jnp.maximum(square - jnp.square(mean), 1e-12))}
