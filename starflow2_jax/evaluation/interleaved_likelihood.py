"""Exact likelihood of held-out records under a STARFlow2: nats a dimension, nats a token.

Axes: B rows, M image places of a row, N patches, D latent channels.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.data.records import Img, Record, Text
from starflow2_jax.evaluation import scoring_batches
from starflow2_jax.evaluation.shapes.cases import Case
from starflow2_jax.inference.model import Model
from starflow2_jax.latents import codec as codecs
from starflow2_jax.mesh import make_mesh
from starflow2_jax.models import qwen
from starflow2_jax.training import preprocess
from starflow2_jax.training.losses import interleaved, text
from starflow2_jax.training.losses.flow import HALF_LOG_2_PI, per_dim
from starflow2_jax.training.losses.interleaved import Stage
from starflow2_jax.training.tasks import starflow2

PROTOCOL = (
    "nats of what the assistant says and draws given all before it: of images those of the noisy "
    "latents, per channel of a patch; of words per token, those included that begin a picture or "
    "end a turn; noise of row i by fold_in(fold_in(key(seed), 0), i); 95% over records (ratio of "
    "sums, by the delta method)"
)


def measure(
    model: Model, cases: Sequence[Case], *, size: int = 32, seed: int = 0
) -> dict[str, Any]:
    """By task, of what was `seen` and `withheld`: `image` nats a dimension and `text` nats a token,
    beside the same rows whose user says nothing (`no_words`) or shows grey (`blank_picture`).

    Images have a Gaussian for each channel, fitted to these very latents, as `gaussian`.
    """
    found: dict[str, Any] = {}
    for task in dict.fromkeys(case.task for case in cases):
        parts = {
            part: [c.record for c in cases if c.task == task and c.seen == seen]
            for part, seen in (("seen", True), ("withheld", False))
        }
        # The smaller part is filled up to the other's batches, so that both take one program.
        together = min(size, max(map(len, parts.values())))
        measured = lambda own, rows=together: of_records(model, own, size=rows, seed=seed)
        found[task] = {part: measured(own) for part, own in parts.items() if own}
    return found


def of_records(
    model: Model, given: Sequence[Record], *, size: int = 32, seed: int = 0
) -> dict[str, Any]:
    """`image` and `text` of records, where there is something learnt of the kind; see `measure`."""
    segments = [segment for record in given for segment in record.segs]
    draws = any(isinstance(s, Img) and s.loss for s in segments)
    says = any(isinstance(s, Text) and s.loss for s in segments)
    shows = any(isinstance(s, Img) and not s.loss for s in segments)
    rows, latents = sums(model, given, size=size, seed=seed)
    figures: dict[str, Any] = {}
    if draws:
        silent = sums(model, given, size=size, seed=seed, null="text")[0]
        beside = {"no_words": _image(silent), "gaussian": _gaussian(latents)}
        figures["image"] = {**_image(rows), "baselines": beside}
    if says:
        figures["text"] = {**_text(rows), "baselines": {}}
        if shows:
            blind = sums(model, given, size=size, seed=seed, blank=True)[0]
            figures["text"]["baselines"]["blank_picture"] = _text(blind)
    return figures


def skill(model: Model, cases: Sequence[Case], *, size: int = 32) -> dict[str, Any]:
    """Text without pictures: of the `model`, and of the frozen `vlm` of its folder by itself, nats
    a token and the share of records `right` word for word; and the `difference` of the nats."""
    given = [case.record for case in cases]
    size = min(size, len(given))
    ours, vlm = sums(model, given, size=size)[0], _vlm_sums(model, given, size)
    return {
        "model": {**_text(ours), "right": _right(ours)},
        "vlm": {**_text(vlm), "right": _right(vlm)},
        "difference": ratio(ours["text/nll"] - vlm["text/nll"], ours["text/count"]),
    }


def _vlm_sums(model: Model, given: Sequence[Record], size: int) -> dict[str, np.ndarray]:
    """Text entries of `interleaved.row_metrics` of records without images, by the VLM alone."""
    mesh = make_mesh("data=1", jax.local_devices()[:1])
    args = (model.cfg, model.model_config, mesh, jnp.dtype(model.cfg["frozen_dtype"]))
    params, found = starflow2.load_frozen_vlm(*args)["vlm"], []
    laid = scoring_batches.batches(given, model.tokenizer, model.model_config.flow.side, size=size)
    for batch, count in laid:
        score = _read(params, batch, cfg=model.model_config.vlm)
        found.append({n: np.asarray(a, np.float64)[:count, 0] for n, a in score.items()})
    joined = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
    right = joined["tokens"] - joined["wrong"]
    return {"text/nll": joined["nll"], "text/count": joined["tokens"], "text/correct": right}


@partial(jax.jit, static_argnames="cfg")
def _read(params, batch, *, cfg):
    h = qwen.embed(params, batch["ids"], cfg)
    h, _ = qwen.apply_layers(params, h, cfg, batch["positions"], segments=batch["segments"])
    return text.record_sums(qwen.logits(params, h[:, :-1], cfg), batch)


def sums(
    model: Model,
    given: Sequence[Record],
    *,
    size: int = 32,
    seed: int = 0,
    null: str = "none",
    blank: bool = False,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """`interleaved.row_metrics` of every record, float64 [records], and the latents [I, N, D] of
    the images that are learnt.

    Args:
        null, blank: as in `record_rows.batches`.

    Raises:
        ValueError: records with images, and no codec.
    """
    side = model.model_config.flow.side
    found: list[dict[str, np.ndarray]] = []
    latents, row = [], 0
    laid = scoring_batches.batches(given, model.tokenizer, side, size=size, null=null, blank=blank)
    for batch, count in laid:
        keys = preprocess.row_keys(seed, 0, np.arange(row, row + len(batch["ids"])))
        own, x = _latents(model, batch, keys)
        made = _sums(model.params, own, x, cfg=model.model_config)
        found.append({n: np.asarray(a, np.float64)[:count] for n, a in made[0].items()})
        latents.append(np.asarray(x)[:count][np.asarray(made[1])[:count]])
        row += count
    joined = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
    return joined, np.concatenate(latents)


def _latents(model: Model, batch: Mapping[str, np.ndarray], keys: jax.Array):
    """The batch with latents in place of images, and the noisy latents [B, M, N, D]."""
    own = {name: a for name, a in batch.items() if name != "images"}
    shape = (model.model_config.patches, model.model_config.flow.channels)
    if "images" not in batch:
        x = np.zeros((len(batch["ids"]), 1, *shape), np.float32)
        return {**own, "latent_mean": x}, x
    if model.codec is None:
        raise ValueError("likelihood: the model has no codec (--fae) to read an image with")
    places = batch["images"].shape[:2]
    both = codecs.encode(model.codec, batch["images"].reshape(-1, *batch["images"].shape[2:]))
    mean, log_variance = (a.reshape(*places, *shape) for a in both)
    own |= {"latent_mean": mean, "latent_logvar": log_variance}
    return own, interleaved.sample_latents(own, keys, model.cfg)


@partial(jax.jit, static_argnames="cfg")
def _sums(params, batch, x, *, cfg):
    stage = Stage(True, True)
    found = interleaved.loss_terms(params, batch, x, cfg, stage)
    return interleaved.row_metrics(found, batch, stage), found.image


def ratio(nats: np.ndarray, counts: np.ndarray) -> dict[str, Any]:
    """`nats` per count over records, and `nats_95`."""
    total = counts.sum()
    mean, interval, rows = float(nats.sum() / total), None, len(nats)
    if rows > 1:
        square = np.square(nats - mean * counts).sum() * rows / (rows - 1)
        half = 1.96 * float(np.sqrt(square) / total)
        interval = [round(mean - half, 5), round(mean + half, 5)]
    return {"records": rows, "nats": round(mean, 5), "nats_95": interval}


def _image(rows: Mapping[str, np.ndarray]) -> dict[str, Any]:
    own = {name: values[rows["count"] > 0] for name, values in rows.items()}
    return ratio(per_dim(own)["nats_per_dim"] * own["count"], own["count"])


def _text(rows: Mapping[str, np.ndarray]) -> dict[str, Any]:
    own = rows["text/count"] > 0
    return ratio(rows["text/nll"][own], rows["text/count"][own])


def _right(rows: Mapping[str, np.ndarray]) -> float:
    return round(float((rows["text/correct"] == rows["text/count"]).mean()), 4)


def _gaussian(latents: np.ndarray) -> dict[str, Any]:
    """Nats a dimension of a Gaussian of each channel's own mean and variance."""
    variance = latents.astype(np.float64).var((0, 1))
    nats = float(0.5 + 0.5 * np.log(variance).mean() + HALF_LOG_2_PI)
    return {"records": len(latents), "nats": round(nats, 5), "nats_95": None}
