"""Turn a batch of records into the inputs of a flow: noisy tokens, text and labels.

Every random number of a row comes from its own key, fold_in(fold_in(key(seed), step), row), so that
nothing depends on batch size, microbatches, mesh or hosts.

Shapes: B rows, T tokens, D token channels, L text positions, E text channels.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from starflow2_jax.models.flow import Conditioning, FlowConfig
from starflow2_jax.models.patches import patchify, scale_pixels
from starflow2_jax.params import Tree

Batch = Mapping[str, jax.Array]


def abstract_batch(cfg: Mapping[str, Any], model: FlowConfig, rows: int) -> dict[str, Any]:
    """Return the arrays of a device batch of an experiment with `rows` rows."""

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct((rows, *shape), dtype)

    pixels = cfg["image"]["pixels"]
    if pixels:
        batch = {"image": array(jnp.uint8, pixels, pixels, 3)}
    else:
        latents = array(jnp.float32, model.tokens, model.channels)
        batch = {"latent_mean": latents, "latent_logvar": latents}
    if model.classes:
        batch["label"] = array(jnp.int32)
    if model.text_channels and cfg["text"]["vocabulary"]:
        batch["tokens"] = array(jnp.int32, model.text_length)
    elif model.text_channels:
        batch["text"] = array(jnp.float32, model.text_length, model.text_channels)
    return batch


def row_keys(seed: int, step: Any, rows: jax.Array) -> jax.Array:
    """Return the key of each row [B]; `rows` are ids in the global batch."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)


def split_keys(keys: jax.Array, count: int) -> jax.Array:
    """Split the key of every row [B] into `count` keys of its own: [count, B]."""
    return jax.vmap(lambda key: jax.random.split(key, count), out_axes=1)(keys)


def images(batch: Batch, keys: jax.Array, flip: bool) -> jax.Array:
    """Return images float32 [B, H, W, 3] in [-1, 1], half of them mirrored if `flip`."""
    return scale_pixels(_mirror(batch["image"], keys) if flip else batch["image"])


def _mirror(image: jax.Array, keys: jax.Array) -> jax.Array:
    """Mirror each image with probability 1/2."""
    mirrored = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(mirrored[:, None, None, None], image[:, :, ::-1], image)


def tokens(
    batch: Batch,
    keys: jax.Array,
    cfg: Mapping[str, Any],
    training: bool,
    *,
    sigma: jax.Array | None = None,
) -> jax.Array:
    """Return data tokens float32 [B, T, D] with the experiment's noise, mirrored in training.

    Pixels lie in [-1, 1] before Gaussian noise. Uniform noise is the dequantization
    (value + U[0, 1)) / 128 - 1 of the bits/dim protocol (TarFlow, arXiv 2412.06329). Latents are
    samples mean + exp(logvar / 2) n of their posterior, n ~ N(0, 1), before the noise. `sigma` [B]
    replaces the standard deviation of Gaussian noise.
    """
    noise, image_options = cfg["noise"], cfg["image"]
    # Three keys of each row: for mirroring or the posterior, the noise, and dropping conditions.
    keys = jax.vmap(lambda key: jax.random.split(key, 3))(keys)
    if "image" in batch:
        flip = training and image_options["flip"]
        image = _mirror(batch["image"], keys[:, 0]) if flip else batch["image"]
        x = patchify(image, image_options["patch"], image_options["channel_order"])
        x = x.astype(jnp.float32)
        if noise["kind"] == "uniform":
            uniform = jax.vmap(lambda key: jax.random.uniform(key, x.shape[1:]))(keys[:, 1])
            return (x + uniform) / 128 - 1
        x = scale_pixels(x)
    else:
        mean, log_variance = batch["latent_mean"], batch["latent_logvar"]
        normal = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys[:, 0])
        x = mean + jnp.exp(0.5 * log_variance) * normal
    if noise["kind"] == "none":
        return x
    normal = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys[:, 1])
    return x + (noise["sigma"] if sigma is None else sigma[:, None, None]) * normal


def conditions(
    params: Tree, batch: Batch, keys: jax.Array, dropout: float, null_text: Any = 0.0
) -> Conditioning:
    """Return `text` [B, L, E] and `labels` [B], each None if the experiment has none.

    A share `dropout` of the rows loses both: their label is -1, and their text is that of the empty
    prompt, `null_text` [L, E].
    """

    def drop(key):
        return jax.random.bernoulli(jax.random.split(key, 3)[2], dropout)

    dropped = jax.vmap(drop)(keys)
    labels, text = batch.get("label"), batch.get("text")
    if labels is not None:
        labels = jnp.where(dropped, -1, labels)
    if "tokens" in batch:
        text = embed_tokens(params, batch["tokens"])
    if text is not None:
        text = jnp.where(dropped[:, None, None], null_text, text)
    return Conditioning(text=text, labels=labels)


def pad_text(features: Any, model: FlowConfig) -> jax.Array:
    """Pad features [n, E] of a short text with zeros to float32 [L, E]; None gives zeros."""
    shape = (model.text_length, model.text_channels)
    if features is None:
        return jnp.zeros(shape)
    features = jnp.asarray(features, jnp.float32)
    if features.shape[0] > shape[0] or features.shape[1] != shape[1]:
        raise ValueError(f"null text: features {list(features.shape)} do not fit {list(shape)}")
    return jnp.pad(features, ((0, shape[0] - features.shape[0]), (0, 0)))


def embed_tokens(params: Tree, tokens: jax.Array) -> jax.Array:
    """Embed token ids int32 [B, L] as [B, L, E]; id 0 is padding and gives zeros."""
    table = params["text"]["embed"]
    return table[tokens] * (tokens > 0)[..., None].astype(table.dtype)
