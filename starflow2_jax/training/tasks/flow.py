"""The task that trains a flow, TarFlow or STARFlow, on pixels or latents."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from jax.sharding import Mesh

from starflow2_jax import config
from starflow2_jax.data.options import image_batch_options
from starflow2_jax.mesh import frozen_layout
from starflow2_jax.models import flops, flow
from starflow2_jax.models.flow import FlowConfig
from starflow2_jax.params import ParamSpec, draw as draw_params, normal, split as split_params
from starflow2_jax.training import optimizer, preprocess
from starflow2_jax.training.losses.flow import flow_loss, per_dim
from starflow2_jax.training.run_config import run_config
from starflow2_jax.training.tasks.task import Task


def model_config(cfg: Mapping[str, Any]) -> FlowConfig:
    """Return the flow of an experiment, after checking that its image keys fit the model's."""
    model = config.build(FlowConfig, config.model_group(cfg), "model")
    pixels, patch = cfg["image"]["pixels"], cfg["image"]["patch"]
    if pixels and pixels != model.side * patch:
        raise ValueError(
            f"config: image.pixels={pixels} is not model.side={model.side} x image.patch={patch}"
        )
    if pixels and model.channels != 3 * patch**2:
        raise ValueError(
            f"config: model.channels={model.channels} must be 3 x image.patch^2 = {3 * patch**2}"
        )
    return model


def declare(cfg: Mapping[str, Any], model: FlowConfig) -> dict[str, Any]:
    """Declare the flow, and a token embedding if the experiment trains one."""
    tree: dict[str, Any] = {"flow": flow.declare(model)}
    vocabulary = cfg["text"]["vocabulary"]
    if vocabulary:
        shape = (vocabulary, model.text_channels)
        tree["text"] = {"embed": ParamSpec(shape, ("vocab", None), normal(1.0))}
    return tree


def init_frozen(
    cfg: Mapping[str, Any], declared: Mapping[str, Any], device_mesh: Mesh | None = None
) -> dict[str, Any]:
    """Draw the subtrees outside of `train.trainable`, as the run drew them from its seed."""
    frozen = split_params(declared, tuple(cfg["train"]["trainable"]))[1]
    return draw_params(cfg["seed"], frozen, device_mesh, frozen_layout(cfg)) if frozen else {}


def make_task(cfg: Mapping[str, Any], *, null_text: Any = None) -> Task:
    """Return the task of an experiment.

    Args:
        null_text: features [n, E] of the empty prompt, which replace the text of dropped rows;
            zeros if None.
    """
    model = model_config(cfg)
    declared = declare(cfg, model)
    null_text = preprocess.pad_text(null_text, model)
    settings = run_config(cfg)
    rows = settings.train.batch_size

    def row_losses(params, batch, keys, training):
        x = preprocess.tokens(batch, keys, cfg, training)
        dropout = cfg["cfg_dropout"]["text"] if training else 0.0
        conditioning = preprocess.conditions(params, batch, keys, dropout, null_text)
        penalty = cfg["loss"]["latent_penalty"] if training else 0.0
        return flow_loss(params["flow"], x, model, conditioning, latent_penalty=penalty)

    def loss(params, batch, keys, context):
        losses, sums = row_losses({**params, **context.frozen}, batch, keys, True)
        return losses.sum() / (rows * model.tokens * model.channels), sums, {}

    def evaluate(params, batch, keys):
        return row_losses(params, batch, keys, False)[1]

    def step_cost():
        count = flops.train_step(model, rows, model.tokens, model.text_length)
        return {"tokens": rows * model.tokens, "flops": count}

    return Task(
        model_config=model,
        declared=declared,
        trainable=tuple(split_params(declared, settings.train.trainable)[0]),
        optimizer=optimizer.optimizer(settings.optim, settings.train.steps),
        load_params=partial(init_frozen, cfg, declared),
        abstract_batch=preprocess.abstract_batch(cfg, model, rows),
        loss=loss,
        evaluate=evaluate,
        finalize_metrics=per_dim,
        sample_kind="flow",
        data_options=partial(image_batch_options, cfg, model),
        step_cost=step_cost,
    )
