"""Exact likelihood of a dataset under a trained flow, with the protocol that the figure stands for.

A flow is measured on data with the noise it was trained with, so figures compare only under equal
noise. Uniform dequantisation alone gives bits per dimension of the 8-bit pixels (paper.md 3.4).
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from starflow2_jax.inference.flow_sampler import FlowModel
from starflow2_jax.mesh import make_mesh, place_rows, replicated
from starflow2_jax.models.flow import FlowConfig
from starflow2_jax.training import preprocess
from starflow2_jax.training.losses.flow import HALF_LOG_2_PI, flow_loss, per_dim
from starflow2_jax.training.program import Program, to_device
from starflow2_jax.training.tasks.flow import model_config

Batch = Mapping[str, Any]
Config = Mapping[str, Any]

SEED_RULE = "noise of row i of the dataset: fold_in(fold_in(key(seed + 1), 0), i)"
# Pixels are (value + U) / 128 - 1, so a density of x is 128 times that of the 8-bit value.
LEVELS = 128


def limit(batches: Iterable[Batch], rows: int | None, batch_size: int) -> Iterator[dict[str, Any]]:
    """The batches that hold the first `rows` rows of a pass, the rows after them masked.

    Args:
        batches: as from `pipeline.eval_batches`, this host's rows of each; rows: None for all.
        batch_size: rows of the global batch.
    """
    seen = 0
    for batch in batches:
        if rows is not None and seen >= rows:
            return
        mask = np.asarray(batch["mask"])
        if rows is not None:
            mask = mask * (batch["row"] < rows)
        yield {**batch, "mask": mask.astype(np.float32)}
        seen += batch_size


# ----------------------------------------------------------------------------------------- measure


def evaluate(
    program: Program, params: Any, frozen: Any, batches: Iterable[Batch]
) -> dict[str, float]:
    """Means over the unmasked rows, as training reports them: of a flow `nats_per_dim` and parts.

    Args:
        program: its `evaluate` is run; params: the trained subtrees, raw or averaged.
        batches: with `mask` and `row`, every one of the same size (as from `limit`).

    Raises:
        ValueError: no row is left after masking.
    """
    place = functools.partial(place_rows, mesh=program.mesh)
    totals: dict[str, float] = {}
    for batch in batches:
        ids, mask = _rows(batch, place)
        sums = program.evaluate(params, frozen, to_device(program, batch), ids, mask)
        for name, value in jax.device_get(sums).items():
            totals[name] = totals.get(name, 0.0) + float(value)
    return _means(totals, program.task.finalize_metrics)


def per_image(
    model: FlowModel, batches: Iterable[Batch], mesh: Mesh | None = None
) -> tuple[np.ndarray, dict[str, float]]:
    """-log p of every unmasked row, in nats per dimension and in the order of the rows.

    Args:
        batches: with `mask` and `row`, every one of the same size (as from `limit`).
        mesh: where `model` lives; a single device by default.

    Returns:
        nats per dimension float64 [n], and the means that `evaluate` gives.

    Raises:
        ValueError: a row whose likelihood is not finite, named; no rows; or an array that the
            model reads and the data do not have.
    """
    mesh = mesh or make_mesh({"data": 1}, jax.local_devices()[:1])
    cfg, flow = model.cfg, model.model_config
    place = functools.partial(place_rows, mesh=mesh)

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def measure(params, batch, ids, mask):
        keys = preprocess.row_keys(cfg["seed"] + 1, 0, ids)
        x = preprocess.tokens(batch, keys, cfg, False)
        conditioning = preprocess.conditions(params, batch, keys, 0.0)
        return ids, mask, flow_loss(params["flow"], x, flow, conditioning)[1]

    wanted = preprocess.abstract_batch(cfg, flow, 1)
    found, totals = [], {}
    for batch in batches:
        absent = [name for name in wanted if name not in batch]
        if absent:
            raise ValueError(f"the model reads {absent[0]!r}, the data give {sorted(batch)}")
        arrays = {name: place(np.asarray(batch[name], a.dtype)) for name, a in wanted.items()}
        ids, mask, sums = jax.device_get(measure(model.params, arrays, *_rows(batch, place)))
        sums = {name: value.astype(np.float64)[mask > 0] for name, value in sums.items()}
        nats = per_dim(sums)["nats_per_dim"]
        if not np.isfinite(nats).all():
            row = int(ids[mask > 0][~np.isfinite(nats)][0])
            raise ValueError(f"row {row} of the data has a likelihood that is not finite")
        found.append(nats)
        for name, value in sums.items():
            totals[name] = totals.get(name, 0.0) + float(value.sum())
    means = _means(totals)
    return np.concatenate(found), means


def _means(totals: Mapping[str, float], means: Callable = per_dim) -> dict[str, float]:
    if not any(totals.values()):
        raise ValueError("there are no rows to evaluate")
    return {name: float(value) for name, value in means(dict(totals)).items()}


def _rows(batch: Batch, place: Callable) -> tuple[jax.Array, jax.Array]:
    """Row ids and mask of a batch on the devices; a row's id is its position in the dataset."""
    return place(np.asarray(batch["row"], np.int32)), place(np.asarray(batch["mask"], np.float32))


# ------------------------------------------------------------------------------------------ report


def not_comparable(cfg: Config) -> str:
    """Why nats per dimension are not bits per dimension of pixels; empty where they can be."""
    noise = cfg["noise"]
    if not cfg["image"]["pixels"]:
        return "not comparable: this is the density of latents, not of pixels"
    if noise["kind"] == "gaussian":
        return (
            f"not comparable: trained with gaussian noise (sigma {noise['sigma']:g}), so this is "
            "the density of noisy images; bits/dim needs uniform dequantisation"
        )
    if noise["kind"] == "none":
        return "not comparable: trained without noise, so a density on discrete values is unbounded"
    return ""


def bits_per_dim(nats_per_dim: float) -> float:
    """Bits per dimension of 8-bit pixels, from nats of the dequantised (value + U) / 128 - 1."""
    return (nats_per_dim + math.log(LEVELS)) / math.log(2)


def summarise(nats: np.ndarray, cfg: Config) -> dict[str, Any]:
    """Mean over images with its 95% interval, in nats per dimension and, where that is the
    experiment's protocol, in bits per dimension; `bits_per_dim` is None otherwise and
    `not_comparable` says why.

    Args:
        nats: -log p of each image in nats per dimension [n].
    """
    mean = float(nats.mean())
    # The spread of the mean over images; with one image it is unknown.
    half = 1.96 * float(nats.std(ddof=1)) / math.sqrt(len(nats)) if len(nats) > 1 else math.inf
    why = not_comparable(cfg)
    interval = [mean - half, mean + half] if math.isfinite(half) else None
    bits = None if why else bits_per_dim(mean)
    return {
        "rows": len(nats),
        "nats_per_dim": mean,
        "nats_per_dim_95": interval,
        "bits_per_dim": bits,
        "bits_per_dim_95": None if why or not interval else [bits_per_dim(v) for v in interval],
        "not_comparable": why,
    }


def protocol(cfg: Config, flow: FlowConfig) -> dict[str, Any]:
    """What a likelihood depends on besides weights and data."""
    noise = {"kind": cfg["noise"]["kind"]}
    if noise["kind"] == "gaussian":
        noise["sigma"] = cfg["noise"]["sigma"]
    scale = "value / 127.5 - 1"
    if not cfg["image"]["pixels"]:
        scale = "a sample of the posterior"
    elif noise["kind"] == "uniform":
        scale = f"(value + U[0, 1)) / {LEVELS} - 1"
    conditions = {"label": flow.classes, "text": flow.text_length}
    return {
        "noise": noise,
        "scale": scale,
        "conditions": [name for name, size in conditions.items() if size],
        "dimensions": flow.tokens * flow.channels,
        "compute_dtype": cfg["compute_dtype"],
        "seed": cfg["seed"],
        "seed_rule": SEED_RULE,
    }


def lines(result: Mapping[str, Any]) -> list[str]:
    """The result of `evaluate likelihood` for people."""

    def interval(name):
        pair = result[f"{name}_95"]
        return f"  (95% over images: {pair[0]:.4f} to {pair[1]:.4f})" if pair else ""

    told = [f"rows       {result['rows']:,} of {result['data']['path']}"]
    for name, label in (("nats_per_dim", "nats/dim"), ("bits_per_dim", "bits/dim")):
        if result[name] is not None:
            told.append(f"{label}   {result[name]:.4f}{interval(name)}")
    if result["not_comparable"]:
        told.append(f"bits/dim   {result['not_comparable']}")
    for name, baseline in result["baselines"].items():
        bits = baseline["bits_per_dim"]
        also = f", {bits:.4f} bits/dim" if bits is not None else ""
        told.append(f"baseline   {name}: {baseline['nats_per_dim']:.4f} nats/dim{also}")
    return told


# --------------------------------------------------------------------------------------- baselines


def gaussian_baseline(
    fit_batches: Iterable[Batch], eval_batches: Iterable[Batch], cfg: Config
) -> float:
    """-log p in nats per dimension under one Gaussian for each dimension, independent.

    Mean and variance of each dimension are those of the noisy `fit_batches`; what is measured is
    the noisy `eval_batches`, the very numbers that a flow of this experiment is measured on.

    Args:
        fit_batches, eval_batches: whole passes, not a host's share; `mask` where there is one.

    Raises:
        ValueError: no rows, or a dimension without any variance.
    """
    tokens = _noisy(cfg)
    count, mean, squares = 0, 0.0, 0.0
    for number, batch in enumerate(fit_batches):
        x = tokens(batch, number, cfg["seed"])
        if not len(x):
            continue
        # Moments of parts put together (Chan et al. 1979): no cancellation.
        shift, total = x.mean(0) - mean, count + len(x)
        squares = squares + np.square(x - x.mean(0)).sum(0) + shift**2 * count * len(x) / total
        mean, count = mean + shift * len(x) / total, total
    if not count:
        raise ValueError("gaussian baseline: there are no rows to fit")
    variance = squares / count
    if not (variance > 0).all():
        raise ValueError(
            f"gaussian baseline: {int((variance <= 0).sum())} of {variance.size} dimensions do not "
            f"vary over the {count} rows it is fitted to"
        )
    total, rows = 0.0, 0
    for number, batch in enumerate(eval_batches):
        x = tokens(batch, number, cfg["seed"] + 1)
        total += (0.5 * np.square(x - mean) / variance).sum()
        rows += len(x)
    if not rows:
        raise ValueError("gaussian baseline: there are no rows to evaluate")
    return float(total / rows / variance.size + 0.5 * np.log(variance).mean() + HALF_LOG_2_PI)


def _noisy(cfg: Config) -> Callable[[Batch, int, int], np.ndarray]:
    """Unmasked rows of a batch with the experiment's noise, float64 [n, T, D]."""
    wanted = [
        name
        for name in preprocess.abstract_batch(cfg, model_config(cfg), 1)
        if name in ("image", "latent_mean", "latent_logvar")
    ]
    draw = jax.jit(lambda batch, keys: preprocess.tokens(batch, keys, cfg, False))

    def tokens(batch: Batch, number: int, seed: int) -> np.ndarray:
        arrays = {name: np.asarray(batch[name]) for name in wanted}
        size = len(arrays[wanted[0]])
        mask = np.asarray(batch.get("mask", np.ones(size))) > 0
        keys = preprocess.row_keys(seed, 0, np.arange(number * size, (number + 1) * size))
        return np.asarray(draw(arrays, keys), np.float64)[mask]

    return tokens
