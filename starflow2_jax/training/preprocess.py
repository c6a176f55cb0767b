"""From a batch of records to what a flow reads: tokens with noise, text, labels.

Every random number of a row comes from its own key, fold_in(fold_in(key(seed), step), row), so that
nothing depends on batch size, microbatches, mesh or hosts.

Axes: B rows, T tokens, D token channels, L text positions, E text channels.
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
    """Shapes and dtypes of a device batch of an experiment with `rows` rows."""

    def of(shape, dtype):
        return jax.ShapeDtypeStruct((rows, *shape), dtype)

    pixels = cfg["image"]["pixels"]
    if pixels:
        batch = {"image": of((pixels, pixels, 3), jnp.uint8)}
    else:
        latent = of((model.tokens, model.channels), jnp.float32)
        batch = {"latent_mean": latent, "latent_logvar": latent}
    if model.classes:
        batch["label"] = of((), jnp.int32)
    if model.text_channels and cfg["text"]["vocabulary"]:
        batch["tokens"] = of((model.text_length,), jnp.int32)
    elif model.text_channels:
        batch["text"] = of((model.text_length, model.text_channels), jnp.float32)
    return batch


def row_keys(seed: int, step: Any, rows: jax.Array) -> jax.Array:
    """One key a row, [B]; rows are ids in the global batch."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)


def images(batch: Batch, keys: jax.Array, flip: bool) -> jax.Array:
    """Images float32 [B, H, W, 3] in [-1, 1], with `flip` half of the rows mirrored."""
    image = batch["image"]
    if flip:
        mirrored = jax.vmap(jax.random.bernoulli)(keys)
        image = jnp.where(mirrored[:, None, None, None], image[:, :, ::-1], image)
    return scale_pixels(image)


def tokens(batch: Batch, keys: jax.Array, cfg: Mapping[str, Any], train: bool) -> jax.Array:
    """Data tokens float32 [B, T, D] with the experiment's noise; mirrored rows in training.

    Pixels lie in [-1, 1]. Gaussian noise is added to them as it is; uniform noise is the
    dequantisation (value + U[0, 1)) / 128 - 1 of the bits/dim protocol (TarFlow).
    """
    noise, image_cfg = cfg["noise"], cfg["image"]
    draw = jax.vmap(lambda key: jax.random.split(key, 3))(keys)
    if "image" in batch:
        image = batch["image"]
        if train and image_cfg["flip"]:
            mirrored = jax.vmap(jax.random.bernoulli)(draw[:, 0])
            image = jnp.where(mirrored[:, None, None, None], image[:, :, ::-1], image)
        args = (image_cfg["patch"], image_cfg["channel_order"])
        x = patchify(image, *args).astype(jnp.float32)
        if noise["kind"] == "uniform":
            uniform = jax.vmap(lambda key: jax.random.uniform(key, x.shape[1:]))(draw[:, 1])
            return (x + uniform) / 128 - 1
        x = scale_pixels(x)
    else:
        mean, log_variance = batch["latent_mean"], batch["latent_logvar"]
        posterior = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(draw[:, 0])
        x = mean + jnp.exp(0.5 * log_variance) * posterior
    if noise["kind"] == "none":
        return x
    normal = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(draw[:, 1])
    return x + noise["sigma"] * normal


def conditions(
    params: Tree, batch: Batch, keys: jax.Array, drop: float, null_text: Any = 0.0
) -> Conditioning:
    """Return `text` [B, L, E] and `labels` [B], each None where the experiment has none.

    A share `drop` of the rows loses both: label -1, and text replaced by that of an empty prompt,
    `null_text` [L, E].
    """
    dropped = jax.vmap(lambda key: jax.random.bernoulli(jax.random.split(key, 3)[2], drop))(keys)
    labels, text = batch.get("label"), batch.get("text")
    if labels is not None:
        labels = jnp.where(dropped, -1, labels)
    if "tokens" in batch:
        text = embed_tokens(params, batch["tokens"])
    if text is not None:
        text = jnp.where(dropped[:, None, None], null_text, text)
    return Conditioning(text=text, labels=labels)


def pad_text(features: Any, model: FlowConfig) -> jax.Array:
    """Features [n, E] of a short text as float32 [L, E], zeros behind; None gives all zeros.

    Raises:
        ValueError: more positions or other channels than the model's text has.
    """
    shape = (model.text_length, model.text_channels)
    if features is None:
        return jnp.zeros(shape)
    features = jnp.asarray(features, jnp.float32)
    if features.shape[0] > shape[0] or features.shape[1] != shape[1]:
        raise ValueError(f"null text: features {list(features.shape)} do not fit {list(shape)}")
    return jnp.pad(features, ((0, shape[0] - features.shape[0]), (0, 0)))


def embed_tokens(params: Tree, tokens: jax.Array) -> jax.Array:
    """Trained embedding [B, L, E] of token ids int32 [B, L]; id 0 is padding and gives zeros."""
    table = params["text"]["embed"]
    return table[tokens] * (tokens > 0)[..., None].astype(table.dtype)
