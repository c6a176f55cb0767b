"""The metrics of the ablation table, from one teacher-forced pass over held-out data.

    image_nats     nats per dimension of the images that the assistant draws
    text_nats      nats per token of its text, in records with images
    questions      share of questions answered correctly: every token is the likeliest one
    text_alone     nats per token of records without images, of the trained model and of the initial
                   one, which is the published VLM
    skip_share, skip_cosine   see `skip_geometry`

All models see the same noise. `run` judges generated images separately. B rows, K target tokens, S
records of a row.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.evaluation import vqa
from starflow2_jax.inference import load
from starflow2_jax.inference.model import Model
from starflow2_jax.mesh import make_mesh
from starflow2_jax.params import init as init_params
from starflow2_jax.training import preprocess
from starflow2_jax.training.losses import interleaved, text
from starflow2_jax.training.losses.interleaved import LossTerms, Stage
from starflow2_jax.training.tasks import starflow2

from . import skip_geometry

_STAGE = Stage(True, True)
_READ = ("ids", "segments", "image", "target", "positions", "flow_positions")
_LATENTS = ("latent_mean", "latent_logvar")


def measure(
    workdir: str, entries: Sequence[Mapping[str, Any]], *, batch_size: int = 16
) -> dict[str, Any]:
    """Return the metrics of a run with its averaged parameters.

    Args:
        entries: held-out datasets `{path, latents}`; `text` marks those without images.

    Raises:
        FileNotFoundError, ValueError: See `inference.load.load`; or a likelihood is not finite.
    """
    cfg = _read_config(workdir)
    device_mesh = make_mesh(cfg["mesh"])
    model = load.load_starflow2(str(workdir), device_mesh, cfg["layout"])
    with jax.set_mesh(device_mesh):
        score = make_score_fn(model)
        answers, text_answers, initial_answers = [], [], []
        image_sums: dict[str, float] = {}

        def evaluate(entry, params, sums):
            return _score_dataset(model, params, entry, score, batch_size, sums)

        for entry in entries:
            if not entry.get("text"):
                answers += evaluate(entry, model.params, image_sums)
            else:
                text_answers += evaluate(entry, model.params, {})
                initial_answers += evaluate(entry, initial_params(model, device_mesh), {})
        geometry = skip_geometry.measure(model, next(e for e in entries if not e.get("text")))
    return {**summarize(answers, image_sums, text_answers, initial_answers), **geometry}


def summarize(
    answers: list, image_sums: Mapping[str, float], text_answers: list, initial_answers: list
) -> dict[str, Any]:
    """Return the table's metrics from answers (`vqa.ScoredAnswer`) and summed image metrics."""
    answers = [answer for answer in answers if answer.text]
    questions = [answer for answer in answers if answer.task == "question"]
    metrics: dict[str, Any] = {}
    if image_sums.get("count"):
        metrics["image_nats"] = float(
            interleaved.finalize_metrics(dict(image_sums))["nats_per_dim"]
        )
    for name, group in (
        ("text_nats", answers),
        ("text_alone", text_answers),
        ("text_alone_before", initial_answers),
    ):
        if group:
            metrics[name] = sum(a.nll for a in group) / sum(a.tokens for a in group)
    if questions:
        metrics["questions"] = sum(answer.correct for answer in questions) / len(questions)
        metrics["questions_count"] = len(questions)
    not_finite = [name for name, value in metrics.items() if not np.isfinite(value)]
    if not_finite:
        raise ValueError(f"scores: {not_finite[0]} is not finite")
    return metrics


def make_score_fn(model: Model):
    """Return a function of params and a batch of `data.packed_batches`.

    It gives `tokens`, `wrong` and `nll` of every record [B, S] and the sums of
    `interleaved.row_metrics` of every row [B].
    """
    cfg = model.cfg

    @jax.jit
    def score_rows(params, batch, rows):
        # Keys depend on the row alone, so that all seeds and models see the same noise.
        keys = preprocess.row_keys(1, 0, rows)
        terms = interleaved.loss_terms(
            params,
            batch,
            interleaved.sample_latents(batch, keys, cfg),
            model.model_config,
            _STAGE,
            text_targets=cfg["text"]["max_targets"],
            text_chunk=cfg["text"]["logit_chunk"],
        )
        return by_record(terms, batch["segments"]), interleaved.row_metrics(terms, batch, _STAGE)

    def score(params, batch):
        arrays = {name: batch[name] for name in (*_READ, *_LATENTS)}
        return jax.device_get(score_rows(params, arrays, np.asarray(batch["row"], np.int32)))

    return score


def by_record(terms: LossTerms, segments: jax.Array) -> dict[str, jax.Array]:
    """Return `tokens`, `wrong` (not the likeliest) and `nll` of every record, float32 [B, S]."""
    records = jnp.arange(1, segments.shape[1] // text.MIN_RECORD_LENGTH + 2)
    token_records = jnp.take_along_axis(segments, terms.target_index, 1)
    is_member = (token_records[..., None] == records) & terms.token[..., None]

    def add(values):
        return jnp.where(is_member, values.astype(jnp.float32)[..., None], 0).sum(1)

    return {
        "tokens": add(jnp.ones_like(token_records)),
        "wrong": add(~terms.correct),
        "nll": add(terms.nll),
    }


def initial_params(model: Model, device_mesh: Any) -> dict[str, Any]:
    """Return parameters as at the start of the run, with the published VLM.

    On text without images the others have no effect, since all connections start at zero.
    """
    cfg, model_config = model.cfg, model.model_config
    specs = {name: tree for name, tree in model_config.declare().items() if name != "vlm"}
    dtype = jnp.dtype(cfg["frozen_dtype"])
    vlm = starflow2.load_frozen_vlm(cfg, model_config, device_mesh, dtype)
    return {**init_params(jax.random.key(0), specs), **vlm}


def _score_dataset(model, params, entry, score, batch_size, image_sums):
    """Return the answers of a dataset, and add its image metrics to `image_sums`."""
    options = starflow2.data_options(
        model.cfg, model.model_config, path=entry["path"], latents=entry["latents"], mixture=()
    )

    def score_batch(batch):
        records, sums = score(params, batch)
        for name, value in sums.items():
            total = float((np.asarray(value, np.float64) * batch["mask"]).sum())
            image_sums[name] = image_sums.get(name, 0.0) + total
        return records

    return vqa.score_answers(score_batch, options, batch_size=batch_size)


def _read_config(workdir: str) -> Mapping[str, Any]:
    from starflow2_jax.training.logging import run_log

    cfg = run_log.read_config(workdir)
    if cfg is None:
        raise FileNotFoundError(f"{workdir}: no run")
    return cfg
