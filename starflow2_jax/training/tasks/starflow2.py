"""The task that trains the stages of STARFlow2.

A stage trains the subtrees that `train.trainable` names and carries the other
`models.starflow2.SUBTREES` in its state for the next one. The frozen VLM is in no checkpoint.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from starflow2_jax import config
from starflow2_jax.checkpoints import model_folder
from starflow2_jax.checkpoints.convert import (
    qwen as qwen_weights,
    qwen_options,
    teacher,
)
from starflow2_jax.checkpoints.model_folder import CONFIG_FILE, read_config
from starflow2_jax.config.checks import display, is_list
from starflow2_jax.data.options import packed_batch_options
from starflow2_jax.mesh import frozen_layout
from starflow2_jax.models import flops, qwen, starflow2
from starflow2_jax.models.ablations.crossings import CrossingsConfig
from starflow2_jax.models.ablations.mot import MoTConfig
from starflow2_jax.models.backbone import BackboneConfig
from starflow2_jax.models.flow import FlowConfig
from starflow2_jax.models.qwen import QwenConfig
from starflow2_jax.models.starflow2 import PretzelConfig
from starflow2_jax.params import Tree, draw as draw_params, split as split_params
from starflow2_jax.training import optimizer
from starflow2_jax.training.losses import interleaved
from starflow2_jax.training.run_config import run_config
from starflow2_jax.training.tasks.task import Task

KINDS = {kind.kind: kind for kind in (PretzelConfig, CrossingsConfig, MoTConfig)}
# Fields of `QwenConfig` that an experiment chooses, whatever the VLM's folder says.
OWN_VLM_FIELDS = ("vision", "remat", "attention", "compute_dtype")


def model_config(cfg: Mapping[str, Any]) -> BackboneConfig:
    """Return the model of an experiment.

    `model.vlm` may be empty if `vlm.path` names a folder; the fields that it does name must be
    those of the folder. `model.flow` needs sizes only (see `starflow2.flow_defaults`). `model.kind`
    names one of `KINDS`, by default `crossings` if the group has that key, else `pretzel`.
    """
    group, shared = config.subgroup(cfg, "model", ""), {"compute_dtype": cfg["compute_dtype"]}
    kind = group.pop("kind", "crossings" if "crossings" in group else "pretzel")
    if kind not in tuple(KINDS):
        raise ValueError(f"config: model.kind={display(kind)} is not one of {', '.join(KINDS)}")
    if cfg.get("attention", "auto") != "auto":
        shared["attention"] = cfg["attention"]
    vlm_fields, sizes = (config.subgroup(group, name, "model.") for name in ("vlm", "flow"))
    if cfg["vlm"]["path"]:
        vlm_fields = _stored_vlm_fields(vlm_fields, str(model_folder.locate(cfg["vlm"]["path"])))
    vlm = config.build(QwenConfig, {**vlm_fields, "vision": None, **shared}, "model.vlm")
    layers = sizes.get("layers", ())
    defaults = starflow2.flow_defaults(vlm.width, len(layers) if is_list(layers) else 0)
    flow = config.build(FlowConfig, {**defaults, **sizes, **shared}, "model.flow")
    return config.build(KINDS[kind], {**group, "vlm": vlm, "flow": flow}, "model")


def _stored_vlm_fields(fields: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Return the fields of a folder's `QwenConfig`, with `remat` and `attention` of `fields`."""
    options = qwen_options.read_options(read_config(folder), str(Path(folder) / CONFIG_FILE))
    stored = vars(options)
    for name, value in fields.items():
        value = tuple(value) if isinstance(value, list) else value
        if name in stored and name not in OWN_VLM_FIELDS and value != stored[name]:
            raise ValueError(
                f"config: model.vlm.{name}={value!r}, but the model in vlm.path={folder!r} has "
                f"{stored[name]!r}"
            )
    return {
        **fields,
        **stored,
        "remat": fields.get("remat", "none"),
        "attention": fields.get("attention", "auto"),
    }


def max_images(cfg: Mapping[str, Any], model: BackboneConfig) -> int:
    """Return M, the maximum number of images in a row."""
    length, patches = cfg["text"]["length"], model.num_patches
    count = cfg["text"]["images"] or length // (patches + 2)
    if count * (patches + 2) > length or not count:
        raise ValueError(
            f"config: text.length={length} has no room for {max(count, 1)} images of "
            f"{patches} patches and 2 delimiters"
        )
    return count


def abstract_batch(
    cfg: Mapping[str, Any], model: BackboneConfig
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the abstract arrays of a batch (see `losses.interleaved`)."""
    row = (cfg["train"]["batch_size"], cfg["text"]["length"])
    latent = (row[0], max_images(cfg, model), model.num_patches, model.flow.channels)
    arrays = {
        "ids": (row, jnp.int32),
        "segments": (row, jnp.int32),
        "image": (row, jnp.int32),
        "target": (row, jnp.bool_),
        "positions": ((*row, 3), jnp.int32),
        "flow_positions": ((*row, 3), jnp.int32),
        "latent_mean": (latent, jnp.float32),
        "latent_logvar": (latent, jnp.float32),
    }
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in arrays.items()}


def data_options(
    cfg: Mapping[str, Any], model: BackboneConfig, group: str = "eval_data", **changes: Any
) -> Any:
    """Return the options of `data.packed_batches` for a group of an experiment's keys."""
    # The default is the VLM's own tokenizer.
    tokenizer = model_folder.locate(cfg["text"]["tokenizer"] or cfg["vlm"]["path"])
    return packed_batch_options(
        cfg,
        group,
        tokenizer=str(tokenizer),
        grid_side=model.flow.side,
        **{"model_vocab_size": model.vlm.vocab, **changes},
    )


def step_cost(cfg: Mapping[str, Any], model: BackboneConfig, declared: Tree) -> dict[str, float]:
    """Return the tokens and FLOPs of a training step (see `flops.interleaved_step`)."""
    rows, length = cfg["train"]["batch_size"], cfg["text"]["length"]
    stage = interleaved.stage_of(cfg["train"]["trainable"], model)
    vlm_positions = cfg["text"].get("vlm_positions", 0)
    fewer = interleaved.reads_fewer_vlm_states(model, stage, vlm_positions)
    row_flops = flops.interleaved_step(
        model,
        declared,
        cfg["train"]["trainable"],
        length=length,
        num_images=max_images(cfg, model),
        num_targets=cfg["text"]["max_targets"] or length,
        vlm_length=min(vlm_positions, length) if fewer else length,
    )
    return {"tokens": rows * length, "flops": rows * row_flops}


def load_frozen_vlm(
    cfg: Mapping[str, Any], model: BackboneConfig, device_mesh: Mesh, dtype: Any
) -> Tree:
    """Load the VLM without its tower, sharded, from `vlm.path`, or else draw it from the seed."""
    tree, layout = {"vlm": qwen.declare(model.vlm)}, frozen_layout(cfg)
    if cfg["vlm"]["path"]:
        folder = model_folder.locate(cfg["vlm"]["path"])
        names = tuple(tree["vlm"])
        return {"vlm": qwen_weights.load(folder, device_mesh, layout, dtype, only=names)[1]}
    return draw_params(cfg["seed"], tree, device_mesh, layout, dtype)


def make_task(cfg: Mapping[str, Any]) -> Task:
    """Return the task of an experiment; `train.trainable` may name the VLM as well."""
    model = model_config(cfg)
    declared = model.declare()
    settings = run_config(cfg)
    trainable = tuple(split_params(declared, settings.train.trainable)[0])
    stage = interleaved.stage_of(trainable, model)
    if not (stage.images or stage.text):
        raise ValueError("config: train.trainable is empty")
    vlm_dtype = jnp.float32 if "vlm" in trainable else jnp.dtype(cfg["frozen_dtype"])
    folder = cfg["vlm"]["path"]

    def row_metrics(params, batch, keys):
        terms = interleaved.loss_terms(
            params,
            batch,
            interleaved.sample_latents(batch, keys, cfg),
            model,
            stage,
            text_into_flow=cfg["loss"]["text_into_flow"],
            text_targets=cfg["text"]["max_targets"],
            text_chunk=cfg["text"]["logit_chunk"],
            vlm_positions=cfg["text"].get("vlm_positions", 0),
        )
        return interleaved.row_metrics(terms, batch, stage)

    def batch_totals(batch):
        return jax.tree.map(jnp.sum, interleaved.target_counts(batch, stage))

    def loss(params, batch, keys, context):
        metrics = row_metrics({**context.frozen, **context.state.params, **params}, batch, keys)
        row_losses = interleaved.per_example_loss(
            metrics,
            context.totals,
            text_weight=cfg["loss"]["text_weight"],
            latent_penalty=cfg["loss"]["latent_penalty"],
        )
        return row_losses.sum(), metrics, {}

    return Task(
        model_config=model,
        declared=declared,
        trainable=trainable,
        carried=tuple(n for n in starflow2.SUBTREES if n in declared and n not in trainable),
        optimizer=optimizer.optimizer(settings.optim, settings.train.steps),
        load_params=partial(load_frozen_vlm, cfg, model, dtype=vlm_dtype),
        loaded=("vlm",) if "vlm" in trainable else (),
        frozen_dtype=vlm_dtype,
        frozen_identity=lambda: {"vlm": teacher.identity(folder)} if folder else {},
        foreign=("vlm",),
        abstract_batch=abstract_batch(cfg, model),
        batch_totals=batch_totals,
        loss=loss,
        evaluate=row_metrics,
        finalize_metrics=interleaved.finalize_metrics,
        sample_kind="interleaved",
        data_options=partial(data_options, cfg, model),
        packed=True,
        step_cost=partial(step_cost, cfg, model, declared),
    )
