"""What the ablation table compares, from one teacher-forced pass over what is held out.

image nats     a dimension, of what the assistant draws
text nats      a token, of what it says where there are pictures
questions      answered right, word for word: each token the likeliest after those before it
text alone     nats a token of records without pictures, of the VLM as it came and of the model

All models see the same noise in the same places. Pictures that are drawn and judged are another
matter (see `run`). Axes: B rows, K target tokens, S records of a row.
"""

from collections.abc import Iterable, Mapping
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

_STAGE = Stage(True, True)
_READ = ("ids", "segments", "image", "target", "positions", "flow_positions")
_LATENTS = ("latent_mean", "latent_logvar")


def measure(
    workdir: str, entries: Iterable[Mapping[str, Any]], *, batch_size: int = 16
) -> dict[str, Any]:
    """Figures of a run, averaged weights: those of this file's head that its data have.

    Args:
        entries: mappings `{path, latents}` of held-out datasets; with `text`, of records without
            images, which may be absent.

    Raises:
        FileNotFoundError, ValueError: as `inference.load.load`; a likelihood that is not finite.
    """
    cfg = _settings(workdir)
    mesh = make_mesh(cfg["mesh"])
    model = load.load_starflow2(str(workdir), mesh, cfg["layout"])
    with jax.set_mesh(mesh):
        score = scorer(model)
        told, alone, born = [], [], []
        images = {}
        for entry in entries:
            args = (entry, score, batch_size)
            if not entry.get("text"):
                told += _answers(model, model.params, *args, images)
            else:
                alone += _answers(model, model.params, *args, {})
                born += _answers(model, newborn(model, mesh), *args, {})
    return figures(told, images, alone, born)


def figures(told: list, images: Mapping[str, float], alone: list, born: list) -> dict[str, Any]:
    """The table's figures from answers (`vqa.ScoredAnswer`) and summed images."""
    said = [answer for answer in told if answer.text]
    asked = [answer for answer in said if answer.task == "question"]
    found: dict[str, Any] = {}
    if images.get("count"):
        found["image_nats"] = float(interleaved.finalize_metrics(dict(images))["nats_per_dim"])
    for name, group in (("text_nats", said), ("text_alone", alone), ("text_alone_before", born)):
        if group:
            found[name] = sum(a.nll for a in group) / sum(a.tokens for a in group)
    if asked:
        found["questions"] = sum(answer.correct for answer in asked) / len(asked)
        found["questions_count"] = len(asked)
    wrong = [name for name, value in found.items() if not np.isfinite(value)]
    if wrong:
        raise ValueError(f"scores: {wrong[0]} is not finite")
    return found


def scorer(model: Model):
    """A function of params and a batch of `data.packed_batches`: of every record [B, S] `tokens`,
    `wrong` and `nll`, and of every row [B] the sums of `interleaved.row_metrics`."""
    cfg = model.cfg
    options = {"text_targets": cfg["text"]["max_targets"], "text_chunk": cfg["text"]["logit_chunk"]}

    @jax.jit
    def run(params, batch, rows):
        # Of the row alone, so that no seed or model has other noise.
        keys = preprocess.row_keys(1, 0, rows)
        x = interleaved.sample_latents(batch, keys, cfg)
        found = interleaved.loss_terms(params, batch, x, model.model_config, _STAGE, **options)
        return by_record(found, batch["segments"]), interleaved.row_metrics(found, batch, _STAGE)

    def score(params, batch):
        arrays = {name: batch[name] for name in (*_READ, *_LATENTS)}
        return jax.device_get(run(params, arrays, np.asarray(batch["row"], np.int32)))

    return score


def by_record(found: LossTerms, segments: jax.Array) -> dict[str, jax.Array]:
    """`tokens`, `wrong` (not the likeliest) and `nll` of every record, float32 [B, S]."""
    number = jnp.arange(1, segments.shape[1] // text.MIN_RECORD_LENGTH + 2)
    own = jnp.take_along_axis(segments, found.target_index, 1)
    member = (own[..., None] == number) & found.token[..., None]
    add = lambda each: jnp.where(member, each.astype(jnp.float32)[..., None], 0).sum(1)
    tokens = jnp.ones_like(own)
    return {"tokens": add(tokens), "wrong": add(~found.correct), "nll": add(found.nll)}


def newborn(model: Model, mesh: Any) -> dict[str, Any]:
    """Weights as the run began: beside the VLM as it came, which is all that a text without images
    depends on, since whatever crosses is zero."""
    cfg, shape = model.cfg, model.model_config
    tree = {name: part for name, part in shape.declare().items() if name != "vlm"}
    born = init_params(jax.random.key(0), tree)
    vlm = starflow2.load_frozen_vlm(cfg, shape, mesh, jnp.dtype(cfg["frozen_dtype"]))
    return {**born, **vlm}


def _answers(model, params, entry, score, batch_size, images):
    changes = {"path": entry["path"], "latents": entry["latents"], "mixture": ()}
    options = starflow2.data_options(model.cfg, model.model_config, **changes)

    def each(batch):
        records, sums = score(params, batch)
        for name, value in sums.items():
            total = float((np.asarray(value, np.float64) * batch["mask"]).sum())
            images[name] = images.get(name, 0.0) + total
        return records

    return vqa.score_answers(each, options, batch_size=batch_size)


def _settings(workdir: str) -> Mapping[str, Any]:
    from starflow2_jax.training.logging import run_log

    cfg = run_log.read_config(workdir)
    if cfg is None:
        raise FileNotFoundError(f"{workdir}: no run")
    return cfg
