"""Exact likelihood of a dataset under a trained flow, with the protocol of its figures.

A flow is measured on data with the noise that it was trained with, so figures are comparable only
under equal noise. Only uniform dequantization gives bits per dimension of 8-bit pixels.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from starflow2_jax.evaluation import stats
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
    """Yield the batches of the first `rows` rows, with later rows of the last one masked."""
    start = 0
    for batch in batches:
        if rows is not None and start >= rows:
            return
        mask = np.asarray(batch["mask"])
        if rows is not None:
            mask = mask * (batch["row"] < rows)
        yield {**batch, "mask": mask.astype(np.float32)}
        start += batch_size  # the rows of all hosts


def evaluate(
    program: Program, params: Any, frozen: Any, batches: Iterable[Batch]
) -> dict[str, float]:
    """Return the means of a task's metrics over the unmasked rows, as training reports them."""
    place = functools.partial(place_rows, device_mesh=program.mesh)
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
    """Return -log p in nats per dimension float64 [n] of every unmasked row, and their means.

    `batches` have one size, `mask` and `row`, as from `limit`. `mesh` is the mesh of the model's
    weights, one device by default. The means are those that `evaluate` gives.
    """
    mesh = mesh or make_mesh({"data": 1}, jax.local_devices()[:1])
    cfg, flow = model.cfg, model.model_config
    place = functools.partial(place_rows, device_mesh=mesh)

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def measure(params, batch, ids, mask):
        keys = preprocess.row_keys(cfg["seed"] + 1, 0, ids)
        x = preprocess.tokens(batch, keys, cfg, False)
        conditioning = preprocess.conditions(params, batch, keys, 0.0)
        return ids, mask, flow_loss(params["flow"], x, flow, conditioning)[1]

    inputs = preprocess.abstract_batch(cfg, flow, 1)
    row_nll, totals = [], {}
    for batch in batches:
        absent = [name for name in inputs if name not in batch]
        if absent:
            raise ValueError(
                f"the model reads {absent[0]!r}, but the data provide only {sorted(batch)}"
            )
        arrays = {name: place(np.asarray(batch[name], a.dtype)) for name, a in inputs.items()}
        ids, mask, sums = jax.device_get(measure(model.params, arrays, *_rows(batch, place)))
        sums = {name: value.astype(np.float64)[mask > 0] for name, value in sums.items()}
        nll = per_dim(sums)["nats_per_dim"]
        if not np.isfinite(nll).all():
            row = int(ids[mask > 0][~np.isfinite(nll)][0])
            raise ValueError(f"row {row} of the data has a likelihood that is not finite")
        row_nll.append(nll)
        for name, value in sums.items():
            totals[name] = totals.get(name, 0.0) + float(value.sum())
    means = _means(totals)
    return np.concatenate(row_nll), means


def _means(totals: Mapping[str, float], finalize: Callable = per_dim) -> dict[str, float]:
    if not any(totals.values()):
        raise ValueError("there are no rows to evaluate")
    return {name: float(value) for name, value in finalize(dict(totals)).items()}


def _rows(batch: Batch, place: Callable) -> tuple[jax.Array, jax.Array]:
    """Place the row ids (positions in the dataset) and the mask of a batch on the devices."""
    return place(np.asarray(batch["row"], np.int32)), place(np.asarray(batch["mask"], np.float32))


def not_comparable(cfg: Config) -> str:
    """Return why nats per dimension have no equivalent in bits of pixels; empty if they have."""
    noise = cfg["noise"]
    if not cfg["image"]["pixels"]:
        return "not comparable: this is the density of latents, not of pixels"
    if noise["kind"] == "gaussian":
        return (
            f"not comparable: trained with gaussian noise (sigma {noise['sigma']:g}), so this is "
            "the density of noisy images; bits/dim needs uniform dequantization"
        )
    if noise["kind"] == "none":
        return "not comparable: trained without noise, so a density on discrete values is unbounded"
    return ""


def bits_per_dim(nats_per_dim: float) -> float:
    """Return bits per dimension of 8-bit pixels, from nats of the tokens (value + U) / 128 - 1.

    P(value) is the density times the width 1 / 128, so bits = (nats + log 128) / log 2.
    """
    return (nats_per_dim + math.log(LEVELS)) / math.log(2)


def summarize(nll: np.ndarray, cfg: Config) -> dict[str, Any]:
    """Return the mean of `nll` [n] with its 95% interval, in nats and, if defined, bits per dim."""
    figures, reason = stats.mean(nll, "nats_per_dim"), not_comparable(cfg)
    interval = figures["nats_per_dim_95"]
    bits = None if reason else bits_per_dim(figures["nats_per_dim"])
    bits_95 = None if reason or not interval else [bits_per_dim(value) for value in interval]
    return {
        "rows": len(nll),
        **figures,
        "bits_per_dim": bits,
        "bits_per_dim_95": bits_95,
        "not_comparable": reason,
    }


def protocol(cfg: Config, flow: FlowConfig) -> dict[str, Any]:
    """Describe what a likelihood depends on besides weights and data."""
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


def summary_lines(result: Mapping[str, Any]) -> list[str]:
    """Return the result of `evaluate likelihood` as lines of text, with 95% intervals."""
    lines = [f"rows       {result['rows']:,} of {result['data']['path']}"]
    for name, label in (("nats_per_dim", "nats/dim"), ("bits_per_dim", "bits/dim")):
        if result[name] is not None:
            lines.append(f"{label}   {stats.format_figure(result, name, '.4f')}")
    if result["not_comparable"]:
        lines.append(f"bits/dim   {result['not_comparable']}")
    for name, baseline in result["baselines"].items():
        bits = baseline["bits_per_dim"]
        suffix = f", {bits:.4f} bits/dim" if bits is not None else ""
        lines.append(f"baseline   {name}: {baseline['nats_per_dim']:.4f} nats/dim{suffix}")
    return lines


def gaussian_baseline(
    fit_batches: Iterable[Batch], eval_batches: Iterable[Batch], cfg: Config
) -> float:
    """Return -log p in nats per dimension under an independent Gaussian for each dimension.

    Mean and variance of each dimension are those of the noisy `fit_batches`. They are evaluated on
    the noisy `eval_batches`, the same numbers that a flow of this experiment is measured on. Both
    are full passes, not a host's share.
    """
    tokens = _noisy_tokens_fn(cfg)
    count, mean, squares = 0, 0.0, 0.0
    for number, batch in enumerate(fit_batches):
        x = tokens(batch, number, cfg["seed"])
        if not len(x):
            continue
        # Moments are combined batch by batch (Chan et al. 1979), which avoids cancellation.
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


def _noisy_tokens_fn(cfg: Config) -> Callable[[Batch, int, int], np.ndarray]:
    """Return a function from (batch, its number, seed) to the unmasked noisy tokens [n, T, D]."""
    inputs = preprocess.abstract_batch(cfg, model_config(cfg), 1)
    names = [name for name in ("image", "latent_mean", "latent_logvar") if name in inputs]

    @jax.jit
    def add_noise(batch, keys):
        return preprocess.tokens(batch, keys, cfg, False)

    def tokens(batch: Batch, number: int, seed: int) -> np.ndarray:
        arrays = {name: np.asarray(batch[name]) for name in names}
        size = len(arrays[names[0]])
        mask = np.asarray(batch.get("mask", np.ones(size))) > 0
        keys = preprocess.row_keys(seed, 0, np.arange(number * size, (number + 1) * size))
        return np.asarray(add_noise(arrays, keys), np.float64)[mask]

    return tokens
