"""Image fidelity of a latent codec, and a linear probe of its latents.

Shapes: N images, H x W pixels, T patches in raster order, D latent channels, F features.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from starflow2_jax.data import images as image_io, records
from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.evaluation import stats
from starflow2_jax.latents import codec as latent_codec
from starflow2_jax.latents.codec import Codec
from starflow2_jax.models.fae import losses
from starflow2_jax.runtime import json_text
from starflow2_jax.shapes import generator, holdout
from starflow2_jax.shapes.generator import Object, Scene
from starflow2_jax.training import preprocess

BATCH_SIZE = 64
# Lower bound on the mean square error in levels of 255, so that equal images have 68 dB.
MIN_SQUARE_ERROR = 0.01
NOISE_RULE = "noise of image i: sigma * normal(fold_in(fold_in(key(seed), 0), i))"
# The probe is logistic regression on standardized features.
PROBE_WEIGHT_DECAY, PROBE_STEPS = 1e-3, 200
PROBED_PROPERTIES = {"color": tuple(generator.COLORS), "shape": generator.SHAPES}


@dataclass(frozen=True)
class SceneImage:
    """An image uint8 [H, W, 3] of a dataset and its scene, None outside the shapes benchmark."""

    pixels: np.ndarray
    scene: Scene | None


def read_images(data: str, side: int, resize: str = "none") -> Iterator[SceneImage]:
    """Yield every image of a dataset, in order, with `side` x `side` pixels (see `data.resize`)."""
    dataset = records.read(data)
    for index, record in enumerate(dataset):
        location = f"{dataset.location(index)} (id {record.id!r})"
        scenes = parse_scenes(record.meta, location)
        for k, blob in enumerate(record.imgs):
            pixels = image_io.decode(blob.data, f"{location}: $.imgs[{k}]")
            pixels = image_io.square(pixels, side, resize, location)
            yield SceneImage(pixels, scenes[k] if k < len(scenes) else None)


def parse_scenes(meta: Mapping[str, Any], location: str) -> list[Scene]:
    """Return the scenes of a record's images, in order, from its metadata.

    Raises:
        DatasetError: They are not scenes of the shapes benchmark; names `location`.
    """
    name = "scenes" if "scenes" in meta else "scene"
    if name not in meta:
        return []
    try:
        stored = json_text.decode(str(meta[name]), "JSON")
        return [
            Scene(row["background"], row["ramp"], tuple(Object(**item) for item in row["objects"]))
            for row in (stored if name == "scenes" else [stored])
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f"{location}: meta.{name} is no scene of the shapes benchmark: {error}"
        ) from error


def _batches(images: Iterator[SceneImage], limit: int | None) -> Iterator[list[SceneImage]]:
    images = itertools.islice(images, limit)
    while batch := list(itertools.islice(images, BATCH_SIZE)):
        yield batch


def psnr(image: np.ndarray, other: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Return the PSNR in dB of two images uint8 [H, W, 3], over the pixels `mask` bool [H, W]."""
    square = np.square(image.astype(np.float64) - other)
    square = square.mean() if mask is None else square[mask].mean()
    return 10 * math.log10(255**2 / max(square, MIN_SQUARE_ERROR))


def background(pixels: np.ndarray, scene: Scene | None) -> np.ndarray:
    """Return an image uint8 [H, W, 3] without its objects, or its median color without a scene."""
    if scene is not None:
        return generator.draw(Scene(scene.background, scene.ramp, ()), len(pixels))
    median = np.median(pixels, (0, 1)).round().astype(np.uint8)
    return np.broadcast_to(median, pixels.shape)


def object_boxes(scene: Scene, side: int) -> np.ndarray:
    """Return the pixels bool [side, side] inside the square boxes around a scene's objects."""
    inside = np.zeros((side, side), bool)
    for item in scene.objects:
        radius = generator.SIZES[item.size]
        top, left = (max(0, math.floor((c - radius) * side)) for c in (item.y, item.x))
        bottom, right = (math.ceil((c + radius) * side) for c in (item.y, item.x))
        inside[top:bottom, left:right] = True
    return inside


def add_noise(latents: np.ndarray, sigma: float, seed: int, first: int) -> np.ndarray:
    """Return latents [N, T, D] + sigma * noise, for the images `first`, `first + 1`, ..."""
    keys = preprocess.row_keys(seed, 0, np.arange(first, first + len(latents)))
    return np.asarray(losses.add_noise(keys, jnp.asarray(latents), sigma))


def reconstruct(
    codec: Codec, images: np.ndarray, sigma: float, seed: int, first: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return posterior means [N, T, D] of images uint8 [N, H, W, 3], and their reconstructions.

    The reconstructions are decoded from the means without and with noise.
    """
    latents = latent_codec.encode(codec, images)[0]
    noisy = add_noise(latents, sigma, seed, first)
    return latents, latent_codec.decode(codec, latents), latent_codec.decode(codec, noisy)


def measure_fidelity(
    codec: Codec,
    data: str,
    *,
    rows: int | None = None,
    sigma: float = 0.3,
    seed: int = 0,
    resize: str = "none",
    keep: int = 0,
) -> tuple[dict[str, Any], np.ndarray]:
    """Measure the PSNR of reconstructions, means over images with their 95% intervals.

    `sigma` is the standard deviation of the noise on normalized latents.

    Returns:
        `images`, and `psnr`, `psnr_95` in dB of `mean`, `noisy` and `blank` (the background), and
        of `mean_boxes`, `noisy_boxes`, `blank_boxes` inside the boxes around objects where scenes
        are known; and the standard deviation of the latents over channels. And images uint8
        [3 keep, H, W, 3]: original, decoded from the mean, decoded from the noisy mean, in turn.
    """
    psnr_values: dict[str, list[float]] = {}
    count, total, square, examples = 0, 0.0, 0.0, []
    for batch in _batches(read_images(data, codec.model.pixels, resize), rows):
        pixels = np.stack([image.pixels for image in batch])
        latents, decoded, decoded_noisy = reconstruct(codec, pixels, sigma, seed, count)
        for k, (original, scene) in enumerate((image.pixels, image.scene) for image in batch):
            versions = (decoded[k], decoded_noisy[k], background(original, scene))
            boxes = None if scene is None else object_boxes(scene, len(original))
            for name, other in zip(("mean", "noisy", "blank"), versions):
                psnr_values.setdefault(name, []).append(psnr(original, other))
                if boxes is not None and boxes.any():
                    value = psnr(original, other, boxes)
                    psnr_values.setdefault(f"{name}_boxes", []).append(value)
            if count + k < keep:
                examples += [original, decoded[k], decoded_noisy[k]]
        count += len(batch)
        total = total + latents.astype(np.float64).sum((0, 1))
        square = square + np.square(latents.astype(np.float64)).sum((0, 1))
    if not count:
        raise ValueError(f"{data}: the dataset has no images, so there is nothing to measure")
    n = count * codec.model.tokens
    std = np.sqrt(square / n - np.square(total / n))
    figures = {name: stats.mean(values, "psnr") for name, values in sorted(psnr_values.items())}
    std = {"min": float(std.min()), "mean": float(std.mean()), "max": float(std.max())}
    figures["latent_std"] = std
    return {"images": count, **figures}, np.asarray(examples)


def encode_single_objects(
    codec: Codec, data: str, rows: int | None = None, resize: str = "none"
) -> tuple[np.ndarray, list[Object]]:
    """Return posterior means [N, T, D] and objects of the images that show exactly one object."""
    images = (
        image
        for image in read_images(data, codec.model.pixels, resize)
        if image.scene is not None and len(image.scene.objects) == 1
    )
    latents, objects = [], []
    for batch in _batches(images, rows):
        pixels = np.stack([image.pixels for image in batch])
        latents.append(latent_codec.encode(codec, pixels)[0])
        objects += [image.scene.objects[0] for image in batch]
    empty = np.zeros((0, codec.model.tokens, codec.model.latent), np.float32)
    return np.concatenate([empty, *latents]), objects


def probe_features(latents: np.ndarray) -> dict[str, np.ndarray]:
    """Return the features [N, F] of latents [N, T, D]: pooled over patches, and all of them."""
    pooled = [reduce(latents, 1) for reduce in (np.mean, np.std, np.min, np.max)]
    return {"pooled": np.concatenate(pooled, -1), "flattened": latents.reshape(len(latents), -1)}


def measure_probe(
    codec: Codec, fit: str, data: str, *, rows: int | None = None, resize: str = "none"
) -> dict[str, Any]:
    """Measure how well logistic regression reads color and shape of single objects from latents.

    It is fitted to the first `rows` images with one object of `fit`, without held-out (color,
    shape) pairs, and tested on those of `data`.

    Returns:
        `fit_images`; and for each of `probe_features` and each property, `seen` and `held_out`:
        `accuracy` with its 95% interval, and `images`; None without such images.
    """
    fit_latents, fit_objects = encode_single_objects(codec, fit, rows, resize)
    latents, objects = encode_single_objects(codec, data, rows, resize)
    in_fit = np.array([not holdout.is_withheld_pair(item) for item in fit_objects], bool)
    for path, number in ((fit, in_fit.sum()), (data, len(objects))):
        if not number:
            raise ValueError(
                f"{path}: no image of the shapes benchmark with one object; the probe needs some"
            )
    held_out = np.array([holdout.is_withheld_pair(item) for item in objects], bool)
    result: dict[str, Any] = {"fit_images": int(in_fit.sum())}
    features, fit_features = probe_features(latents), probe_features(fit_latents[in_fit])
    for view in features:
        result[view] = {}
        for name, values in PROBED_PROPERTIES.items():
            fit_labels = np.array([values.index(getattr(item, name)) for item in fit_objects])
            labels = np.array([values.index(getattr(item, name)) for item in objects])
            predicted = classify(
                fit_features[view], fit_labels[in_fit], features[view], len(values)
            )
            correct = predicted == labels
            parts = {"seen": correct[~held_out], "held_out": correct[held_out]}
            result[view][name] = {
                part: {**stats.mean(hits, "accuracy"), "images": len(hits)} if len(hits) else None
                for part, hits in parts.items()
            }
    return result


def classify(
    fit_features: np.ndarray, fit_labels: np.ndarray, features: np.ndarray, classes: int
) -> np.ndarray:
    """Predict classes int [M] of features [M, F] by logistic regression fitted to [N, F].

    Features are standardized by the mean and deviation of `fit_features`. The weights start from
    zero and minimize cross entropy + `PROBE_WEIGHT_DECAY` / 2 |weights|^2 by L-BFGS, so the result
    is a function of the data.
    """
    mean, std = fit_features.mean(0), fit_features.std(0)

    def standardize(x):
        return (x - mean) / np.where(std > 0, std, 1)

    fitted = _fit(jnp.asarray(standardize(fit_features)), jnp.asarray(fit_labels), classes)
    return np.argmax(standardize(features) @ np.asarray(fitted["weight"]) + fitted["bias"], -1)


@functools.partial(jax.jit, static_argnums=2)
def _fit(x: jax.Array, labels: jax.Array, classes: int) -> dict[str, jax.Array]:
    """Fit `weight` [F, classes] and `bias` [classes] to features [N, F] and labels [N]."""

    def loss(params):
        logits = x @ params["weight"] + params["bias"]
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return entropy + PROBE_WEIGHT_DECAY / 2 * jnp.square(params["weight"]).sum()

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry, _):
        params, state = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = solver.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        return (optax.apply_updates(params, updates), state), None

    zeros = {"weight": jnp.zeros((x.shape[1], classes)), "bias": jnp.zeros(classes)}
    return jax.lax.scan(step, (zeros, solver.init(zeros)), length=PROBE_STEPS)[0][0]


def summary_lines(result: Mapping[str, Any]) -> list[str]:
    """Return the figures of `measure_fidelity` and `measure_probe` as lines of text."""
    lines = [f"images     {result['images']:,} of {result['data']['path']}"]
    for name, label in (("mean", "posterior mean"), ("noisy", "with noise"), ("blank", "blank")):
        text = f"PSNR       {label:15} {stats.format_figure(result[name], 'psnr', '5.2f')} dB"
        if f"{name}_boxes" in result:
            in_boxes = stats.format_figure(result[f"{name}_boxes"], "psnr", "5.2f")
            text += f", in object boxes {in_boxes} dB"
        lines.append(text)
    for view in ("pooled", "flattened") if result["probe"] else ():
        for name in PROBED_PROPERTIES:
            parts = [
                f"{part.replace('_', ' ')} {stats.format_figure(row, 'accuracy', '.4f')}"
                for part, row in result["probe"][view][name].items()
                if row
            ]
            lines.append(f"probe      {view} latents, {name}: {', '.join(parts)}")
    return lines


def protocol(codec: Codec, sigma: float, seed: int, resize: str) -> dict[str, Any]:
    """Describe what the figures depend on besides weights and data."""
    return {
        "pixels": codec.model.pixels,
        "resize": resize,
        "psnr": "10 log10(255^2 / mean square error of uint8 RGB), averaged over images; a mean "
        f"square error counts as at least {MIN_SQUARE_ERROR}",
        "latents": "posterior means, normalized by the codec's statistics",
        "sigma": sigma,
        "noise": NOISE_RULE,
        "seed": seed,
        "blank": "a scene's background with its ramp; the median color of other images",
        "probe": f"logistic regression, weight decay {PROBE_WEIGHT_DECAY:g}, "
        f"{PROBE_STEPS} steps of L-BFGS",
    }
