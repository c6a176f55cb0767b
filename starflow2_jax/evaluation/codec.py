"""How well a latent codec keeps images, and what a linear reader finds in its latents.

Axes: N images, H x W pixels, T patches in raster order, D latent channels, F read numbers.
"""

import functools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from starflow2_jax.data import images, records
from starflow2_jax.latents import codec as codecs
from starflow2_jax.latents.codec import Codec
from starflow2_jax.models.fae import losses
from starflow2_jax.shapes import generator, holdout
from starflow2_jax.shapes.generator import Object, Scene
from starflow2_jax.training import preprocess

ROWS = 64
# Of a mean square in levels of 255 at which PSNR ends, at 68 dB: an image that is equal has none.
LEAST_SQUARE = 0.01
NOISE_RULE = "noise of image i: sigma * normal(fold_in(fold_in(key(seed), 0), i))"
# Weight decay and iterations of the probe: logistic regression on standardised numbers.
DECAY, ITERATIONS = 1e-3, 200
READ = {"color": tuple(generator.COLORS), "shape": generator.SHAPES}


@dataclass(frozen=True)
class Picture:
    """An image uint8 [H, W, 3] of a dataset and, in the shapes world, the scene it shows."""

    pixels: np.ndarray
    scene: Scene | None


def pictures(data: str, side: int, resize: str = "none") -> Iterator[Picture]:
    """Every image of a dataset, in order, of `side` x `side` pixels.

    Args:
        resize: as `data.resize`.

    Raises:
        DatasetError: an image of another size where resize is "none".
    """
    dataset = records.read(data)
    for index, record in enumerate(dataset):
        where = f"{dataset.location(index)} (id {record.id!r})"
        known = scenes(record.meta)
        for k, blob in enumerate(record.imgs):
            pixels = images.decode(blob.data, f"{where}: $.imgs[{k}]")
            fitted = images.square(pixels, side, resize, where)
            yield Picture(fitted, known[k] if k < len(known) else None)


def scenes(meta: Mapping[str, Any]) -> list[Scene]:
    """The scenes that the images of a record of the shapes world show, in order."""
    found = [json.loads(meta["scene"])] if "scene" in meta else []
    if "scenes" in meta:
        found = json.loads(meta["scenes"])
    return [
        Scene(row["background"], row["ramp"], tuple(Object(**item) for item in row["objects"]))
        for row in found
    ]


# --------------------------------------------------------------------------------- reconstructions


def psnr(image: np.ndarray, other: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Peak signal-to-noise ratio in dB of two images uint8 [H, W, 3], inside a mask [H, W]."""
    square = np.square(image.astype(np.float64) - other)
    square = square.mean() if mask is None else square[mask].mean()
    return 10 * math.log10(255**2 / max(square, LEAST_SQUARE))


def blank(picture: Picture) -> np.ndarray:
    """The image without what is in it: a scene's ground, of others the median colour."""
    if picture.scene is not None:
        ground = Scene(picture.scene.background, picture.scene.ramp, ())
        return generator.draw(ground, len(picture.pixels))
    median = np.median(picture.pixels, (0, 1)).round().astype(np.uint8)
    return np.broadcast_to(median, picture.pixels.shape)


def boxes(scene: Scene, side: int) -> np.ndarray:
    """The pixels bool [side, side] in the squares around a scene's objects."""
    inside = np.zeros((side, side), bool)
    for item in scene.objects:
        radius = generator.SIZES[item.size]
        low = [max(0, math.floor((at - radius) * side)) for at in (item.y, item.x)]
        high = [math.ceil((at + radius) * side) for at in (item.y, item.x)]
        inside[low[0] : high[0], low[1] : high[1]] = True
    return inside


def noisy(latents: np.ndarray, sigma: float, seed: int, first: int) -> np.ndarray:
    """latents [N, T, D] + sigma noise, those of the images `first`, `first + 1`, ..."""
    keys = preprocess.row_keys(seed, 0, np.arange(first, first + len(latents)))
    return np.asarray(losses.add_noise(keys, jnp.asarray(latents), sigma))


def reconstruct(
    codec: Codec, shown: list[Picture], sigma: float, seed: int, first: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Posterior means [N, T, D], and images uint8 [N, H, W, 3] of them without and with noise."""
    latents = codecs.encode(codec, np.stack([picture.pixels for picture in shown]))[0]
    drawn = noisy(latents, sigma, seed, first)
    return latents, codecs.decode(codec, latents), codecs.decode(codec, drawn)


def fidelity(
    codec: Codec,
    data: str,
    *,
    rows: int | None = None,
    sigma: float = 0.3,
    seed: int = 0,
    resize: str = "none",
    keep: int = 0,
) -> tuple[dict[str, Any], np.ndarray]:
    """PSNR of reconstructions, means over images with their 95% intervals.

    Args:
        rows: the first images of the dataset, None for all; sigma: noise on the normalised latents.
        keep: images to show.

    Returns:
        `images`, and by name (`mean`, `noisy`, `blank`; `mean_boxes`, `noisy_boxes`, `blank_boxes`
        inside the squares around objects, where scenes are known) `psnr`, `psnr_95` in dB; the
        latents' standard deviation by channel. And pictures uint8 [3 keep, H, W, 3]: original,
        from the mean, from the mean with noise, in turn.

    Raises:
        ValueError: no images; a codec without a pixel decoder. DatasetError: as `pictures`.
    """
    found: dict[str, list[float]] = {}
    count, total, square, kept = 0, 0.0, 0.0, []
    for part in _parts(pictures(data, codec.model.pixels, resize), rows):
        latents, plain, rough = reconstruct(codec, part, sigma, seed, count)
        for k, picture in enumerate(part):
            made = {"mean": plain[k], "noisy": rough[k], "blank": blank(picture)}
            inside = None if picture.scene is None else boxes(picture.scene, len(picture.pixels))
            for name, image in made.items():
                found.setdefault(name, []).append(psnr(picture.pixels, image))
                if inside is not None and inside.any():
                    value = psnr(picture.pixels, image, inside)
                    found.setdefault(f"{name}_boxes", []).append(value)
            if count + k < keep:
                kept += [picture.pixels, plain[k], rough[k]]
        count += len(part)
        total = total + latents.astype(np.float64).sum((0, 1))
        square = square + np.square(latents.astype(np.float64)).sum((0, 1))
    if not count:
        raise ValueError(f"{data}: there are no images")
    n = count * codec.model.tokens
    std = np.sqrt(square / n - np.square(total / n))
    spread = {"least": float(std.min()), "mean": float(std.mean()), "most": float(std.max())}
    figures = {name: _mean("psnr", values) for name, values in sorted(found.items())}
    return {"images": count, **figures, "latent_std": spread}, np.asarray(kept)


def _mean(name: str, values: list[float]) -> dict[str, Any]:
    mean, half = float(np.mean(values)), None
    if len(values) > 1:
        half = 1.96 * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return {name: mean, f"{name}_95": None if half is None else [mean - half, mean + half]}


def _parts(shown: Iterator[Picture], rows: int | None) -> Iterator[list[Picture]]:
    part: list[Picture] = []
    for number, picture in enumerate(shown):
        if number == rows:
            break
        part.append(picture)
        if len(part) == ROWS:
            yield part
            part = []
    if part:
        yield part


# ------------------------------------------------------------------------------------ linear probe


def singles(
    codec: Codec, data: str, rows: int | None = None, resize: str = "none"
) -> tuple[np.ndarray, list[Object]]:
    """Posterior means [N, T, D] and objects of the images that show one object."""
    shown = (p for p in pictures(data, codec.model.pixels, resize) if p.scene is not None)
    alone = (p for p in shown if len(p.scene.objects) == 1)
    latents, objects = [], []
    for part in _parts(alone, rows):
        latents.append(codecs.encode(codec, np.stack([p.pixels for p in part]))[0])
        objects += [p.scene.objects[0] for p in part]
    shape = (0, codec.model.tokens, codec.model.latent)
    return np.concatenate([np.zeros(shape, np.float32), *latents]), objects


def views(latents: np.ndarray) -> dict[str, np.ndarray]:
    """What the probe reads [N, F] of latents [N, T, D]: pooled over places, or every place."""
    pooled = [reduce(latents, 1) for reduce in (np.mean, np.std, np.min, np.max)]
    return {"pooled": np.concatenate(pooled, -1), "flattened": latents.reshape(len(latents), -1)}


def probe(
    codec: Codec, fit: str, data: str, *, rows: int | None = None, resize: str = "none"
) -> dict[str, Any]:
    """Share of single objects whose colour and shape logistic regression reads from the latents.

    Withheld (colour, shape) pairs are left out of `fit`, and reported apart.

    Args:
        fit, data: datasets of the shapes world, to learn from and to test on; rows: the first
            images with one object of each.

    Returns:
        `fit_images`; by view (`views`) and property, `seen` and `withheld`: `accuracy` with its 95%
        interval, `images`; withheld is None where there are none.

    Raises:
        ValueError: no image with one object in one of them.
    """
    given, taught = singles(codec, fit, rows, resize)
    tested, objects = singles(codec, data, rows, resize)
    seen = np.array([not holdout.is_withheld_pair(item) for item in taught], bool)
    for path, number in ((fit, seen.sum()), (data, len(objects))):
        if not number:
            raise ValueError(f"{path}: no image of the shapes world with one object to probe")
    apart = np.array([holdout.is_withheld_pair(item) for item in objects], bool)
    result: dict[str, Any] = {"fit_images": int(seen.sum())}
    learn, read = views(given[seen]), views(tested)
    for view in learn:
        result[view] = {}
        for name, words in READ.items():
            wanted = np.array([words.index(getattr(item, name)) for item in taught])[seen]
            right = classify(learn[view], wanted, read[view], len(words)) == np.array(
                [words.index(getattr(item, name)) for item in objects]
            )
            parts = {"seen": right[~apart], "withheld": right[apart]}
            result[view][name] = {
                part: {**_mean("accuracy", values.tolist()), "images": len(values)}
                if len(values)
                else None
                for part, values in parts.items()
            }
    return result


def classify(learn: np.ndarray, wanted: np.ndarray, read: np.ndarray, classes: int) -> np.ndarray:
    """Classes int [M] of `read` [M, F] by logistic regression on `learn` [N, F], `wanted` [N].

    Numbers are standardised by `learn`'s; the weights, from zero, minimise cross entropy and
    `DECAY` / 2 times their square by L-BFGS, so that the result is a function of the data.
    """
    mean, std = learn.mean(0), learn.std(0)
    scale = lambda x: (x - mean) / np.where(std > 0, std, 1)
    weights = _fit(jnp.asarray(scale(learn)), jnp.asarray(wanted), classes)
    return np.argmax(scale(read) @ np.asarray(weights["weight"]) + weights["bias"], -1)


@functools.partial(jax.jit, static_argnums=2)
def _fit(x: jax.Array, wanted: jax.Array, classes: int) -> dict[str, jax.Array]:
    def loss(params):
        logits = x @ params["weight"] + params["bias"]
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, wanted).mean()
        return entropy + DECAY / 2 * jnp.square(params["weight"]).sum()

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry, _):
        params, state = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = solver.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        return (optax.apply_updates(params, updates), state), None

    zeros = {"weight": jnp.zeros((x.shape[1], classes)), "bias": jnp.zeros(classes)}
    return jax.lax.scan(step, (zeros, solver.init(zeros)), length=ITERATIONS)[0][0]


def lines(result: Mapping[str, Any]) -> list[str]:
    """The figures of `fidelity` and `probe` for people."""
    told = [f"images     {result['images']:,} of {result['data']['path']}"]
    for name, label in (("mean", "posterior mean"), ("noisy", "with noise"), ("blank", "blank")):
        text = f"PSNR       {label:15} {_said(result[name], 'psnr', '5.2f')} dB"
        if f"{name}_boxes" in result:
            text += f", in object boxes {_said(result[f'{name}_boxes'], 'psnr', '5.2f')} dB"
        told.append(text)
    for view in ("pooled", "flattened") if result["probe"] else ():
        for name in READ:
            parts = result["probe"][view][name]
            said = [f"{part} {_said(row, 'accuracy', '.4f')}" for part, row in parts.items() if row]
            told.append(f"probe      {view} latents, {name}: {', '.join(said)}")
    return told


def _said(row: Mapping[str, Any], name: str, form: str) -> str:
    pair = row[f"{name}_95"]
    interval = f" ({pair[0]:{form}} to {pair[1]:{form}})" if pair else ""
    return f"{row[name]:{form}}{interval}"


def protocol(codec: Codec, sigma: float, seed: int, resize: str) -> dict[str, Any]:
    """What the figures depend on besides weights and data."""
    return {
        "pixels": codec.model.pixels,
        "resize": resize,
        "psnr": f"10 log10(255^2 / mean square of uint8 RGB), a mean over images; a mean square "
        f"counts as at least {LEAST_SQUARE}",
        "latents": "posterior means, normalised by the codec's statistics",
        "sigma": sigma,
        "noise": NOISE_RULE,
        "seed": seed,
        "blank": "a scene's ground with its ramp; of other images their median colour",
        "probe": f"logistic regression, weight decay {DECAY:g}, {ITERATIONS} steps of L-BFGS",
    }
