"""The training objectives of the latent codec FAE (see `models/fae`).

Shapes: B rows, T patches, C feature channels, D latent channels, H x W pixels.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from starflow2_jax.checkpoints.convert import lpips
from starflow2_jax.models.fae import codec, discriminator, losses, perceptual, teacher as teachers
from starflow2_jax.models.fae.codec import FAEConfig
from starflow2_jax.models.fae.config import (
    declare_end_to_end_training,
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
    """A training objective, as functions of all parameters."""

    declared: Tree  # ParamSpecs of every top-level subtree
    groups: Mapping[str, tuple[str, ...]]  # trained subtrees by the optimizer that they share
    # Subtrees of running statistics: no gradient, no optimizer, changed by `track`
    tracked: tuple[str, ...]
    prepare: Callable  # (params, batch, keys, training) -> inputs of the loss, without a gradient
    # (params, inputs, keys, step) -> loss and summable metrics of each row [B]; step is None in
    # evaluations
    loss: Callable
    observe: Callable  # (params, inputs) -> sums over rows that `track` reads
    track: Callable  # (state's subtrees, observed, summed metrics, step) -> the tracked subtrees
    finalize_metrics: Callable  # summed metrics -> readable ones
    reconstruct: Callable | None = None  # (params, inputs) -> images [B, H, W, 3] in [-1, 1]
    # Whether the loss reads the tracked subtrees. If not, only averaged weights, which evaluations
    # and encoders read, are observed, and the raw ones get the same statistics.
    uses_statistics: bool = True
    # Step from which a group is trained; 0 by default
    first_steps: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def trained(self) -> tuple[str, ...]:
        """Subtrees with an optimizer."""
        return tuple(name for names in self.groups.values() for name in names)


def features(cfg: Mapping[str, Any], model: FAEConfig, teacher: Teacher) -> Objective:
    """Return the objective of encoder and feature decoder: error of the teacher's features, and KL.

    The statistics that normalize latents are tracked for raw and for averaged weights.
    """
    options = cfg["fae"]

    def prepare(params, batch, keys, training):
        image = preprocess.images(batch, keys, training and cfg["image"]["flip"])
        return {"features": teachers.features(params["teacher"], image, teacher)}

    def loss(params, inputs, keys, step):
        x = inputs["features"]
        row_losses, sums = losses.feature_loss(
            params,
            x,
            keys,
            model,
            beta=options["beta"],
            sigma=0.0 if step is None else options["latent_noise"],
        )
        return row_losses, {**sums, "feature_square": jnp.square(x).mean((1, 2))}

    def observe(params, inputs):
        return codec.moments(*codec.posterior(params, inputs["features"], model))

    return Objective(
        declared={**declare_features_training(model), "teacher": teachers.declare(teacher)},
        groups={"codec": ("encoder", "feature_decoder")},
        tracked=("latent",),
        prepare=prepare,
        loss=loss,
        observe=observe,
        track=partial(track_latent, options=options),
        finalize_metrics=finalize_feature_metrics,
    )


def pixels(cfg: Mapping[str, Any], model: FAEConfig, teacher: Teacher) -> Objective:
    """Return the objective of the pixel decoder against a discriminator, from frozen features.

    Features are the tower's with noise or, with `fae.train_on_decoded_features`, those decoded from
    latents with `fae.latent_noise`.
    """
    options = cfg["fae"]
    critic = discriminator_config(cfg, model)
    weights = PixelWeights(*(options[name] for name in ("l1", "l2", "perceptual", "gan")))
    declared = {
        **codec.declare(model),
        "teacher": teachers.declare(teacher),
        **declare_pixels_training(cfg, model),
    }
    if options["lpips"]:
        declared["lpips"] = perceptual.declare(lpips.load(options["lpips"])[0])

    def prepare(params, batch, keys, training):
        image_keys, posterior_keys, noise_keys = preprocess.split_keys(keys, 3)
        image = preprocess.images(batch, image_keys, training and cfg["image"]["flip"])
        x = tower_features = teachers.features(params["teacher"], image, teacher)
        if options["train_on_decoded_features"]:
            latents, log_variance = codec.encode(params, tower_features, model)
            if training:
                latents = codec.sample(posterior_keys, latents, log_variance)
                latents = losses.add_noise(noise_keys, latents, options["latent_noise"])
            x = codec.decode_features(params, latents, model)
        return {"image": image, "features": x, "tower_features": tower_features}

    def perceptual_distance(params, inputs, decoded, image):
        if options["lpips"]:
            return perceptual.lpips(params["lpips"], decoded, image)
        decoded_features = teachers.features(params["teacher"], decoded, teacher)
        return perceptual.token_distance([decoded_features], [inputs["tower_features"]])

    def loss(params, inputs, keys, step):
        gan_on = jnp.asarray(0.0 if step is None else step >= options["gan_start"], jnp.float32)
        frozen_critic = jax.lax.stop_gradient(params["discriminator"])
        noiseless = step is None or options["train_on_decoded_features"]
        row_losses, decoded, sums = losses.pixel_loss(
            params,
            inputs["features"],
            inputs["image"],
            keys,
            model,
            weights,
            sigma=0.0 if noiseless else None,
            perceptual=partial(perceptual_distance, params, inputs),
            logits=lambda x: gan_on * discriminator.forward(frozen_critic, x, critic),
        )
        sums["psnr"] = psnr(decoded, inputs["image"])
        if not weights.gan or step is None:
            return row_losses, sums
        critic_losses, parts = losses.discriminator_loss(
            params["discriminator"],
            inputs["image"],
            decoded,
            params["lecam"],
            critic,
            lecam=options["lecam"],
        )
        for name in ("hinge", "lecam", "real", "fake"):
            sums[f"discriminator_{name}"] = parts[name]
        return row_losses + gan_on * critic_losses, sums

    def track(subtrees, observed, sums, step):
        del observed
        if not weights.gan:
            return {"lecam": subtrees["lecam"]}
        real, fake = (sums[f"discriminator_{name}"] / sums["count"] for name in ("real", "fake"))
        updated = discriminator.lecam_update(subtrees["lecam"], real, fake)
        started = step >= options["gan_start"]
        return {"lecam": jax.tree.map(partial(jnp.where, started), updated, subtrees["lecam"])}

    def reconstruct(params, inputs):
        return codec.decode_pixels(params, inputs["features"], model)

    return Objective(
        declared=declared,
        groups={"decoder": ("pixel_decoder",), "discriminator": ("discriminator",)},
        tracked=("lecam",),
        prepare=prepare,
        loss=loss,
        observe=lambda params, inputs: {},
        track=track,
        finalize_metrics=finalize_pixel_metrics,
        first_steps={"discriminator": options["gan_start"]},
        reconstruct=reconstruct,
    )


def end_to_end(cfg: Mapping[str, Any], model: FAEConfig, teacher: Teacher) -> Objective:
    """Return the objective of encoder and decoders together: pixels through latent noise.

    The noise has standard deviation `fae.latent_noise` sqrt(u), u ~ U[0, 1], so that its mean
    variance is half the square of the option, on latents of zero mean and unit variance over the
    microbatch. These statistics have a gradient; otherwise larger latents would drown the noise.
    `train.trainable` chooses whether the tower is trained.
    """
    options = cfg["fae"]
    weights = PixelWeights(l1=options["l1"], l2=options["l2"], perceptual=0.0, gan=0.0)
    declared = {
        **declare_end_to_end_training(cfg, model, teacher),
        "teacher": teachers.declare(teacher),
    }
    trained = ["encoder", "feature_decoder", "pixel_decoder"]
    if train_tower := "teacher" in cfg["train"]["trainable"]:
        trained.append("teacher")

    def prepare(params, batch, keys, training):
        image = preprocess.images(batch, keys, training and cfg["image"]["flip"])
        if train_tower:
            return {"image": image}
        return {"image": image, "features": teachers.features(params["teacher"], image, teacher)}

    def tower_features(params, inputs):
        if train_tower:
            return teachers.features(params["teacher"], inputs["image"], teacher)
        return inputs["features"]

    def loss(params, inputs, keys, step):
        posterior_keys, noise_keys, sigma_keys = preprocess.split_keys(keys, 3)
        mean, log_variance = codec.posterior(params, tower_features(params, inputs), model)
        if step is None:
            normalized, latents = params, codec.normalize(params, mean, model)
        else:
            normalized = {**params, "latent": batch_statistics(mean)}
            latents = codec.sample(posterior_keys, mean, log_variance)
            latents = codec.normalize(normalized, latents, model)
            sigma = options["latent_noise"] * jnp.sqrt(jax.vmap(jax.random.uniform)(sigma_keys))
            latents = losses.add_noise(noise_keys, latents, sigma)
        row_losses, decoded, sums = losses.pixel_loss(
            params,
            codec.decode_features(normalized, latents, model),
            inputs["image"],
            keys,
            model,
            weights,
            sigma=0.0,
        )
        sums["psnr"] = psnr(decoded, inputs["image"])
        sums["kl"] = losses.kl(mean, log_variance)
        sums["gradient"] = losses.gradient_error(decoded, inputs["image"])
        row_losses += options["beta"] * sums["kl"] + options["gradient"] * sums["gradient"]
        return row_losses, sums

    def observe(params, inputs):
        return codec.moments(*codec.posterior(params, tower_features(params, inputs), model))

    def reconstruct(params, inputs):
        latents = codec.encode(params, tower_features(params, inputs), model)[0]
        return codec.decode_pixels(params, codec.decode_features(params, latents, model), model)

    return Objective(
        declared=declared,
        groups={"codec": tuple(trained)},
        tracked=("latent",),
        prepare=prepare,
        loss=loss,
        observe=observe,
        track=partial(track_latent, options=options),
        finalize_metrics=finalize_pixel_metrics,
        reconstruct=reconstruct,
        uses_statistics=False,
    )


def psnr(decoded: jax.Array, image: jax.Array) -> jax.Array:
    """Return the PSNR [B] in dB of images [B, H, W, 3] in [-1, 1], the decoded ones clipped."""
    square = losses.mean_square(jnp.clip(decoded, -1, 1), image)
    # The peak is 2 and its square 4.
    return 10 * jnp.log10(4 / jnp.maximum(square, 1e-10))


def batch_statistics(mean: jax.Array) -> dict[str, jax.Array]:
    """Return `mean` and `std` [D] of every channel of latents [B, T, D]."""
    return {"mean": mean.mean((0, 1)), "std": jnp.sqrt(mean.var((0, 1)) + 1e-8)}


def finalize_pixel_metrics(sums: Mapping[str, Any]) -> dict[str, Any]:
    """Return `psnr` in dB and every unweighted term of the losses, as means over rows."""
    terms = [
        name
        for name in sums
        if name in ("l1", "l2", "gradient", "perceptual", "gan", "kl")
        or name.startswith("discriminator_")
    ]
    return {name: sums[name] / sums["count"] for name in ("psnr", *terms)}


def finalize_feature_metrics(sums: Mapping[str, Any]) -> dict[str, Any]:
    """Return `relative_error`, its parts as means over rows, and `kl` in nats of a row."""
    count = sums["count"]
    return {
        "relative_error": sums["mean_square"] / sums["feature_square"],
        "mean_square": sums["mean_square"] / count,
        "kl": sums["kl"] / count,
    }


def track_latent(
    subtrees: Tree, observed: Tree, sums: Tree, step: jax.Array, *, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Update the mean and standard deviation of every latent channel by one more batch.

    Arguments and result are those of `Objective.track`; `options` is the group `fae` of an
    experiment.
    """
    del sums
    mean, std = subtrees["latent"]["mean"], subtrees["latent"]["std"]
    batch_moments = tuple(observed[name] / observed["count"] for name in ("sum", "square"))
    moments = (mean, jnp.square(std) + jnp.square(mean))
    mean, square = optimizer.update_ema(moments, batch_moments, options["statistics_decay"], step)
    std = jnp.sqrt(jnp.maximum(square - jnp.square(mean), 1e-12))
    return {"latent": {"mean": mean, "std": std}}
