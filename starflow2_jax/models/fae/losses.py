"""Losses of the latent codec (arXiv 2512.07829): features, then pixels.

Every loss is one number per row, so that microbatches, devices and hosts add up to the same mean.
Sums over a batch are divided by `count`.

Shapes: B batch, T patches, C feature channels, D latent channels, H x W pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from starflow2_jax.models.fae import codec, discriminator
from starflow2_jax.models.fae.codec import FAEConfig
from starflow2_jax.models.layers import at_least_float32
from starflow2_jax.params import Tree


def kl(mean: jax.Array, log_variance: jax.Array) -> jax.Array:
    """Return KL(N(mean, exp(log_variance)) || N(0, 1)) [B] in nats, summed over T and D."""
    terms = jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance
    return 0.5 * terms.sum((1, 2))


def mean_square(x: jax.Array, target: jax.Array) -> jax.Array:
    """Return the mean square of the difference [B] over all axes but the first."""
    difference = at_least_float32(x) - at_least_float32(target)
    return jnp.square(difference).mean(range(1, x.ndim))


def mean_absolute(x: jax.Array, target: jax.Array) -> jax.Array:
    """Return the mean absolute difference [B] over all axes but the first."""
    return jnp.abs(at_least_float32(x) - at_least_float32(target)).mean(range(1, x.ndim))


def gradient_error(x: jax.Array, target: jax.Array) -> jax.Array:
    """Return the mean absolute error [B] of the differences between neighboring pixels.

    It weighs edges, and so the outlines of small objects, more than the error of pixels does.

    Args:
        x, target: images [B, H, W, c].
    """
    error = at_least_float32(x) - at_least_float32(target)
    return sum(jnp.abs(jnp.diff(error, axis=axis)).mean((1, 2, 3)) for axis in (1, 2)) / 2


def add_noise(keys: jax.Array, x: jax.Array, sigma: float | jax.Array) -> jax.Array:
    """Return x [B, ...] + sigma noise, with one key per row [B]; sigma is a number or [B]."""
    noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(keys)
    return x + jnp.reshape(jnp.asarray(sigma, x.dtype), (-1, *(1,) * (x.ndim - 1))) * noise


def feature_loss(
    params: Tree,
    features: jax.Array,
    keys: jax.Array,
    cfg: FAEConfig,
    *,
    beta: float,
    sigma: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the loss of the feature training: mean |decoded - features|^2 + beta KL.

    Args:
        features, keys: [B, T, C], and one key per row [B].
        beta: weight of the KL (nats of a row) against the *mean* square; 1e-6 to 1e-4 are usual.
        sigma: noise on the normalized latents, so that the decoder tolerates sampled latents.

    Returns:
        The loss of each row [B], and its parts, each [B]: `mean_square`, `kl`, and `count` (ones).
    """
    mean, log_variance = codec.posterior(params, features, cfg)
    key_pairs = jax.vmap(lambda key: jax.random.split(key, 2))(keys)
    latents = codec.normalize(params, codec.sample(key_pairs[:, 0], mean, log_variance), cfg)
    if sigma:
        latents = add_noise(key_pairs[:, 1], latents, sigma)
    square = mean_square(codec.decode_features(params, latents, cfg), features)
    nats = kl(mean, log_variance)
    sums = {"count": jnp.ones_like(square), "mean_square": square, "kl": nats}
    return square + beta * nats, sums


@dataclass(frozen=True)
class PixelWeights:
    """Weights of the pixel decoder's losses; a loss of weight 0 is not computed."""

    l1: float = 0.0
    l2: float = 1.0
    perceptual: float = 1.0
    gan: float = 0.1


def pixel_loss(
    params: Tree,
    features: jax.Array,
    image: jax.Array,
    keys: jax.Array,
    cfg: FAEConfig,
    weights: PixelWeights,
    *,
    sigma: float | None = None,
    perceptual: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    logits: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Return the loss of the pixel decoder on features [B, T, C] with noise.

    Args:
        image, keys: [B, H, W, 3] in [-1, 1], and one key per row [B].
        sigma: noise on the features, by default `cfg.noise`.
        perceptual: (decoded, image) -> distance [B], for example `perceptual.lpips`.
        logits: image -> logits [B, h, w] of a frozen discriminator.

    Returns:
        The loss of each row [B], the decoded image, and the parts of the loss, each [B]: `l1`,
        `l2`, `perceptual`, `gan` (those with a weight) and `count` (ones).
    """
    for name, function in (("perceptual", perceptual), ("gan", logits)):
        if getattr(weights, name) and function is None:
            raise ValueError(f"fae: weights.{name}={getattr(weights, name)} has no function")
    noisy = add_noise(keys, features, cfg.noise if sigma is None else sigma)
    decoded = codec.decode_pixels(params, noisy, cfg)
    terms = {
        "l1": lambda: mean_absolute(decoded, image),
        "l2": lambda: mean_square(decoded, image),
        "perceptual": lambda: perceptual(decoded, image),
        "gan": lambda: discriminator.generator_loss(logits(decoded)),
    }
    parts = {name: term() for name, term in terms.items() if getattr(weights, name)}
    loss = sum((getattr(weights, n) * part for n, part in parts.items()), jnp.zeros(len(image)))
    return loss, decoded, {**parts, "count": jnp.ones_like(loss)}


def discriminator_loss(
    params: Tree,
    image: jax.Array,
    decoded: jax.Array,
    running: Tree,
    cfg: discriminator.DiscriminatorConfig,
    *,
    lecam: float = 1e-3,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the discriminator's hinge loss plus `lecam` times LeCam's penalty.

    Args:
        decoded: [B, H, W, 3]; it gets no gradient.
        running: means of past logits (`discriminator.lecam_start`).

    Returns:
        The loss of each row [B], and each [B]: `hinge`, `lecam`, `real` and `fake` (mean logits,
        the input of `discriminator.lecam_update`), and `count` (ones).
    """
    real = discriminator.forward(params, image, cfg)
    fake = discriminator.forward(params, jax.lax.stop_gradient(decoded), cfg)
    hinge = discriminator.hinge_loss(real, fake)
    penalty = discriminator.lecam_penalty(running, real, fake)
    sums = {"hinge": hinge, "lecam": penalty, "count": jnp.ones_like(hinge)}
    sums |= {"real": real.mean((1, 2)), "fake": fake.mean((1, 2))}
    return hinge + lecam * penalty, sums
