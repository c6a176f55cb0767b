"""The three losses of a small vision-language model.

The first is the next-token cross entropy over interleaved rows. Two more train the vision tower. A
linear layer predicts the pixels from its features, which the latent codec builds on. The model's
own head predicts, from every feature, the words of the region in which it lies: this puts features
and words into one space, with a signal for each patch.

Shapes: B rows, T positions, M images of a row, N features of an image, C width, V vocabulary,
R regions of an image.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from starflow2_jax.models import layers, qwen, qwen_vision
from starflow2_jax.models.patches import patchify, scale_pixels
from starflow2_jax.models.qwen import QwenConfig
from starflow2_jax.params import Tree
from starflow2_jax.training.losses import text

Batch = Mapping[str, jax.Array]


def encode_images(params: Tree, images: jax.Array, model: QwenConfig) -> jax.Array:
    """Return the tower's features [B, M, N, C] of images uint8 [B, M, H, W, 3]."""
    pixels = qwen_vision.normalize(images.reshape(-1, *images.shape[2:]))
    features = qwen_vision.encode_images(params["vision"], pixels, model.vision)
    return features.reshape(*images.shape[:2], -1, model.width)


def next_token_logits(
    params: Tree, batch: Batch, features: jax.Array, model: QwenConfig
) -> jax.Array:
    """Return logits [B, T - 1, V] of the next item, given the images' features [B, M, N, C]."""
    h = qwen.embed(params, batch["ids"], model)
    h = qwen.scatter_row_features(
        h, batch["image"], features.reshape(len(features), -1, model.width)
    )
    h, _ = qwen.apply_layers(params, h, model, batch["positions"], segments=batch["segments"])
    return qwen.logits(params, h[:, :-1], model)


def row_metrics(
    params: Tree, batch: Batch, weights: Mapping[str, Any], model: QwenConfig
) -> dict[str, jax.Array]:
    """Return summable metrics of each row [B], given the `vlm` group of the configuration.

    They are `losses.text.NAMES` (zeros if the text has no weight), the number of `images`, and
    `pixel_square` and `word_nats`, summed over those images.
    """
    features = encode_images(params["vlm"], batch["images"], model)
    if not weights["train_tower"]:
        features = jax.lax.stop_gradient(features)
    rows, images = batch["images"].shape[:2]
    if weights["text_loss_weight"]:
        logits = next_token_logits(params["vlm"], batch, features, model)
        metrics = text.row_sums(logits, batch)
    else:
        metrics = dict.fromkeys(text.NAMES, jnp.zeros(rows))
    square = pixel_error(params["pixel_probe"], batch["images"], features, model)
    metrics["pixel_square"] = square.reshape(rows, images).sum(1)
    metrics["word_nats"] = jnp.zeros(rows)
    if weights["region_loss_weight"]:
        metrics["word_nats"] = region_nll(params["vlm"], batch, features, model)
    return {**metrics, "images": jnp.full((rows,), images, jnp.float32)}


def pixel_error(
    pixel_probe: Tree, images: jax.Array, features: jax.Array, model: QwenConfig
) -> jax.Array:
    """Return the mean square error [B * M] of pixels that a linear layer predicts from features."""
    block = model.vision.patch * model.vision.merge
    pixels = scale_pixels(images)
    pixels = patchify(pixels.reshape(-1, *pixels.shape[2:]), block, "channel_last")
    predicted = layers.at_least_float32(layers.linear(pixel_probe, features))
    return jnp.square(predicted.reshape(pixels.shape) - pixels).mean((1, 2))


def region_nll(params: Tree, batch: Batch, features: jax.Array, model: QwenConfig) -> jax.Array:
    """Return the nats [B] of the regions' words under the model's head, summed over images.

    `features` are [B, M, N, C]. The words of a region are a bag with equal weights. Every region of
    an image has the same weight, and so has every feature of a region.
    """
    logits = qwen.logits(params, qwen.final_norm(params, features, model), model)
    words = batch["region_words"]  # int [B, M, R, words]
    bag = jax.nn.one_hot(words, logits.shape[-1]).sum(3)  # -1 gives zeros
    bag = bag / jnp.maximum((words >= 0).sum(3), 1)[..., None]
    inside = jax.nn.one_hot(batch["region"], words.shape[2])  # [B, M, N, R]
    feature_count = inside.sum(2)  # [B, M, R]
    share = inside / jnp.maximum(feature_count, 1)[:, :, None]
    share = share / jnp.maximum((feature_count > 0).sum(2), 1)[..., None, None]
    target = jnp.einsum("bmnr,bmrv->bmnv", share, bag)
    return -(target * jax.nn.log_softmax(logits)).sum((1, 2, 3))


def finalize_metrics(sums: Mapping[str, Any]) -> dict[str, Any]:
    """Return nats per target token, the accuracy of tokens and of records, and the tower's losses.

    A record is correct if each of its target tokens is the likeliest one.
    """
    tokens, records = (sums[name] or 1 for name in ("tokens", "records"))
    return {
        "text_nats": sums["nll"] / tokens,
        "text_accuracy": sums["right"] / tokens,
        "record_accuracy": sums["records_right"] / records,
        "pixel_square": sums["pixel_square"] / sums["images"],
        "word_nats": sums["word_nats"] / sums["images"],
    }
