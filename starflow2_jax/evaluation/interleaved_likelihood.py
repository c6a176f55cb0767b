"""Exact likelihood of records under a STARFlow2, in nats per latent dimension and per token.

Shapes: B rows, M image slots of a row, N patches, D latent channels.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.data.records import Img, Record, Text
from starflow2_jax.evaluation import scoring_batches, stats
from starflow2_jax.inference.model import Model
from starflow2_jax.latents import codec
from starflow2_jax.mesh import make_mesh
from starflow2_jax.models import qwen
from starflow2_jax.training import preprocess
from starflow2_jax.training.losses import interleaved, text
from starflow2_jax.training.losses.flow import HALF_LOG_2_PI, per_dim
from starflow2_jax.training.losses.interleaved import Stage
from starflow2_jax.training.tasks import starflow2

PROTOCOL = (
    "NLL in nats of the assistant's images and text given everything before them: of images per "
    "channel of a patch, for the noisy latents; of text per token, including those that begin an "
    "image or end a turn; noise of row i by fold_in(fold_in(key(seed), 0), i); 95% over records "
    "(ratio of sums, by the delta method)"
)


def measure_records(
    model: Model, records: Sequence[Record], *, batch_size: int = 32, seed: int = 0
) -> dict[str, Any]:
    """Measure the negative log-likelihood of the images and the text that records are trained on.

    Returns:
        `image` and `text`, if there are such targets, as from `stats.nll_ratio` and with
        `baselines`: for images `no_text`, without the user's text, and `gaussian`, one Gaussian for
        each channel, fitted to these latents; for text `blank_image`, with gray prompt images. And
        `per_record`, lists with an entry of each record: `id`, and of images and of text the sum
        of the NLL and the count that it is divided by.
    """
    segments = [segment for record in records for segment in record.segs]
    has_target_images = any(isinstance(s, Img) and s.loss for s in segments)
    has_target_text = any(isinstance(s, Text) and s.loss for s in segments)
    has_prompt_images = any(isinstance(s, Img) and not s.loss for s in segments)
    score = partial(score_records, model, records, batch_size=batch_size, seed=seed)
    sums, latents = score()
    figures: dict[str, Any] = {"per_record": _per_record(records, _image_and_text_sums(sums))}
    if has_target_images:
        baselines = {"no_text": _image_nll(score(null="text")[0]), "gaussian": _gaussian(latents)}
        figures["image"] = {**_image_nll(sums), "baselines": baselines}
    if has_target_text:
        baselines = {}
        if has_prompt_images:
            baselines["blank_image"] = _text_nll(score(blank=True)[0])
        figures["text"] = {**_text_nll(sums), "baselines": baselines}
    return figures


def measure_text_skill(
    model: Model, records: Sequence[Record], *, batch_size: int = 32
) -> dict[str, Any]:
    """Compare a model on text without images with the frozen VLM that it was trained from.

    `exact_match` is the share of records that greedy decoding reproduces, and `per_record` as from
    `measure_records`.
    """
    batch_size = min(batch_size, len(records))
    sums = score_records(model, records, batch_size=batch_size)[0]
    vlm_sums = _score_with_vlm(model, records, batch_size)
    columns = {"text_nll": sums["text/nll"], "text_count": sums["text/count"]}
    columns |= {"image_nll": np.zeros(len(records)), "image_count": np.zeros(len(records))}
    return {
        "per_record": _per_record(records, columns),
        "model": {**_text_nll(sums), "exact_match": _exact_match(sums)},
        "vlm": {**_text_nll(vlm_sums), "exact_match": _exact_match(vlm_sums)},
        "difference": stats.nll_ratio(sums["text/nll"] - vlm_sums["text/nll"], sums["text/count"]),
    }


def _score_with_vlm(
    model: Model, records: Sequence[Record], batch_size: int
) -> dict[str, np.ndarray]:
    """Return the text entries of `interleaved.row_metrics`, by the frozen VLM without images."""
    mesh = make_mesh("data=1", jax.local_devices()[:1])
    cfg = model.model_config
    frozen_dtype = jnp.dtype(model.cfg["frozen_dtype"])
    params = starflow2.load_frozen_vlm(model.cfg, cfg, mesh, frozen_dtype)["vlm"]
    sums = []
    for batch, count in scoring_batches.batches(
        records, model.tokenizer, cfg.flow.side, size=batch_size
    ):
        batch_sums = _vlm_record_sums(params, batch, cfg=cfg.vlm)
        sums.append({k: np.asarray(v, np.float64)[:count, 0] for k, v in batch_sums.items()})
    total = _concatenate(sums)
    correct = total["tokens"] - total["wrong"]
    return {"text/nll": total["nll"], "text/count": total["tokens"], "text/correct": correct}


@partial(jax.jit, static_argnames="cfg")
def _vlm_record_sums(params, batch, *, cfg):
    h = qwen.embed(params, batch["ids"], cfg)
    h, _ = qwen.apply_layers(params, h, cfg, batch["positions"], segments=batch["segments"])
    return text.record_sums(qwen.logits(params, h[:, :-1], cfg), batch)


def score_records(
    model: Model,
    records: Sequence[Record],
    *,
    batch_size: int = 32,
    seed: int = 0,
    null: str = "none",
    blank: bool = False,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Score records with teacher forcing (`null`, `blank` as in `scoring_batches.batches`).

    The results are `interleaved.row_metrics` of every record, float64 [records], and the noisy
    latents [I, N, D] of the target images.
    """
    sums, latents, row = [], [], 0
    side = model.model_config.flow.side
    for batch, count in scoring_batches.batches(
        records,
        model.tokenizer,
        side,
        size=batch_size,
        null=null,
        blank=blank,
        clean_copies=model.has_clean_copies,
    ):
        keys = preprocess.row_keys(seed, 0, np.arange(row, row + len(batch["ids"])))
        batch, x = _encode_images(model, batch, keys)
        batch_sums, is_target = _row_metrics(model.params, batch, x, cfg=model.model_config)
        sums.append({k: np.asarray(v, np.float64)[:count] for k, v in batch_sums.items()})
        latents.append(np.asarray(x)[:count][np.asarray(is_target)[:count]])
        row += count
    return _concatenate(sums), np.concatenate(latents)


def _concatenate(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _encode_images(model: Model, batch: Mapping[str, np.ndarray], keys: jax.Array):
    """Return the batch with latents in place of images, and the noisy latents [B, M, N, D]."""
    encoded = {name: array for name, array in batch.items() if name != "images"}
    shape = (model.model_config.num_patches, model.model_config.flow.channels)
    if "images" not in batch:
        x = np.zeros((len(batch["ids"]), 1, *shape), np.float32)
        return {**encoded, "latent_mean": x}, x
    if model.codec is None:
        raise ValueError(
            "likelihood: the records have images, but the model has no codec to encode them with; "
            "name its folder with --fae"
        )
    slots = batch["images"].shape[:2]
    pixels = batch["images"].reshape(-1, *batch["images"].shape[2:])
    mean, log_variance = codec.encode(model.codec, pixels)
    encoded["latent_mean"] = mean.reshape(*slots, *shape)
    encoded["latent_logvar"] = log_variance.reshape(*slots, *shape)
    return encoded, interleaved.sample_latents(encoded, keys, model.cfg)


@partial(jax.jit, static_argnames="cfg")
def _row_metrics(params, batch, x, *, cfg):
    """Return `interleaved.row_metrics` [B], and bool [B, M]: the image slots with a target."""
    stage = Stage(True, True)
    terms = interleaved.loss_terms(params, batch, x, cfg, stage)
    return interleaved.row_metrics(terms, batch, stage), terms.image


def _image_and_text_sums(sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    means = per_dim({**sums, "count": np.maximum(sums["count"], 1)})["nats_per_dim"]
    return {
        "image_nll": means * sums["count"],
        "image_count": sums["count"],
        "text_nll": sums["text/nll"],
        "text_count": sums["text/count"],
    }


def _per_record(records: Sequence[Record], columns: Mapping[str, np.ndarray]) -> dict[str, Any]:
    values = {name: np.round(column, 4).tolist() for name, column in columns.items()}
    return {"id": [record.id for record in records], **values}


def _image_nll(sums: Mapping[str, np.ndarray]) -> dict[str, Any]:
    sums = {name: values[sums["count"] > 0] for name, values in sums.items()}
    return stats.nll_ratio(per_dim(sums)["nats_per_dim"] * sums["count"], sums["count"])


def _text_nll(sums: Mapping[str, np.ndarray]) -> dict[str, Any]:
    has_text = sums["text/count"] > 0
    return stats.nll_ratio(sums["text/nll"][has_text], sums["text/count"][has_text])


def _exact_match(sums: Mapping[str, np.ndarray]) -> float:
    return round(float((sums["text/correct"] == sums["text/count"]).mean()), 4)


def _gaussian(latents: np.ndarray) -> dict[str, Any]:
    """Return the NLL per dimension of one Gaussian for each channel, fitted to the latents."""
    variance = latents.astype(np.float64).var((0, 1))
    nll = float(0.5 + 0.5 * np.log(variance).mean() + HALF_LOG_2_PI)
    return {"records": len(latents), "nll": round(nll, 5), "nll_95": None}
