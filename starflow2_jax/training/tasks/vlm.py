"""The task that trains a small vision-language model on interleaved rows."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from starflow2_jax import config
from starflow2_jax.checkpoints import model_folder
from starflow2_jax.data.options import packed_batch_options
from starflow2_jax.models import qwen, qwen_vision
from starflow2_jax.models.qwen import QwenConfig
from starflow2_jax.models.qwen_vision import VisionConfig
from starflow2_jax.params import ParamSpec, Tree, count as count_params, zeros
from starflow2_jax.training import optimizer
from starflow2_jax.training.losses import text, vlm
from starflow2_jax.training.run_config import run_config
from starflow2_jax.training.tasks.task import Task, check_trainable

# Maximum number of regions in an image (four objects and the background) and of words per region.
MAX_REGIONS, MAX_REGION_WORDS = 5, 8


def model_config(cfg: Mapping[str, Any]) -> QwenConfig:
    """Return the model of an experiment, after checking that its tower can divide the images."""
    group = config.model_group(cfg)
    sizes = config.subgroup(group, "vision", "model.")
    if not sizes:
        raise ValueError("config: model.vision is missing: the model needs a vision tower")
    vision = config.build(VisionConfig, sizes, "model.vision")
    model = config.build(QwenConfig, {**group, "vision": vision}, "model")
    qwen_vision.check_size(cfg["image"]["pixels"], cfg["image"]["pixels"], vision)
    return model


def grid_side(cfg: Mapping[str, Any], model: QwenConfig) -> int:
    """Return the rows (= columns) of an image's features."""
    return cfg["image"]["pixels"] // (model.vision.patch * model.vision.merge)


def max_images(cfg: Mapping[str, Any], model: QwenConfig) -> int:
    """Return the maximum number of images in a row."""
    return cfg["text"]["images"] or cfg["text"]["length"] // (grid_side(cfg, model) ** 2 + 2)


def declare(model: QwenConfig) -> dict[str, Any]:
    """Declare the model, and the linear layer that predicts pixels from the tower's features."""
    values = 3 * (model.vision.patch * model.vision.merge) ** 2
    return {
        "vlm": qwen.declare(model),
        "pixel_probe": {
            "weight": ParamSpec((model.width, values), ("embed", None)),
            "bias": ParamSpec((values,), (None,), zeros),
        },
    }


def data_options(
    cfg: Mapping[str, Any],
    model: QwenConfig,
    group: str = "eval_data",
    *,
    tokenizer: str = "",
    **changes: Any,
) -> Any:
    """Return the options of `data.packed_batches` for a group of an experiment's keys."""
    from starflow2_jax.shapes.regions import RegionLabels  # heavy

    labels = cfg["vlm"]["region_loss_weight"] > 0
    tokenizer = tokenizer or cfg["text"]["tokenizer"] or cfg["vlm"]["path"]
    return packed_batch_options(
        cfg,
        group,
        tokenizer=str(model_folder.locate(tokenizer)),
        grid_side=grid_side(cfg, model),
        annotator=RegionLabels(MAX_REGIONS, MAX_REGION_WORDS) if labels else None,
        **{"model_vocab_size": model.vocab, **changes},
    )


def make_task(cfg: Mapping[str, Any]) -> Task:
    """Return the task of an experiment."""
    model = model_config(cfg)
    declared = declare(model)
    check_trainable(cfg, tuple(declared))
    settings = run_config(cfg)
    rows = settings.train.batch_size

    def batch_totals(batch):
        tokens = jnp.maximum(text.targets(batch).sum(), 1)
        return {"tokens": tokens.astype(jnp.float32)}

    def loss(params, batch, keys, context):
        del keys
        weights, num_images = cfg["vlm"], rows * batch["images"].shape[1]
        metrics = vlm.row_metrics(params, batch, weights, model)
        total = weights["text_loss_weight"] * (metrics["nll"] / context.totals["tokens"]).sum()
        total += weights["pixel_loss_weight"] * metrics["pixel_square"].sum() / num_images
        total += weights["region_loss_weight"] * metrics["word_nats"].sum() / num_images
        return total, metrics, {}

    def evaluate(params, batch, keys):
        del keys
        return vlm.row_metrics(params, batch, cfg["vlm"], model)

    tx = optimizer.optimizer(settings.optim, settings.train.steps)
    return Task(
        model_config=model,
        declared=declared,
        trainable=tuple(declared),
        optimizer=tx if cfg["vlm"]["train_tower"] else optimizer.without_updates(tx, "vlm/vision/"),
        abstract_batch=abstract_batch(cfg, model),
        batch_totals=batch_totals,
        loss=loss,
        evaluate=evaluate,
        finalize_metrics=vlm.finalize_metrics,
        data_options=partial(data_options, cfg, model),
        packed=True,
        step_cost=partial(step_cost, cfg, model, declared),
    )


def abstract_batch(cfg: Mapping[str, Any], model: QwenConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the arrays of `data.packed_batches` that a step reads."""
    rows, length, pixels = cfg["train"]["batch_size"], cfg["text"]["length"], cfg["image"]["pixels"]
    row, images = (rows, length), (rows, max_images(cfg, model))
    arrays = {
        "ids": (row, jnp.int32),
        "segments": (row, jnp.int32),
        "image": (row, jnp.int32),
        "target": (row, jnp.bool_),
        "positions": ((*row, 3), jnp.int32),
        "images": ((*images, pixels, pixels, 3), jnp.uint8),
    }
    if cfg["vlm"]["region_loss_weight"]:
        arrays["region"] = ((*images, grid_side(cfg, model) ** 2), jnp.int32)
        arrays["region_words"] = ((*images, MAX_REGIONS, MAX_REGION_WORDS), jnp.int32)
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in arrays.items()}


def step_cost(cfg: Mapping[str, Any], model: QwenConfig, declared: Tree) -> dict[str, float]:
    """Return tokens and FLOPs of a step: six FLOPs for each weight and position."""
    rows, length = cfg["train"]["batch_size"], cfg["text"]["length"]
    patches = max_images(cfg, model) * (cfg["image"]["pixels"] // model.vision.patch) ** 2
    language = dict(declared["vlm"])
    tower_weights = count_params(language.pop("vision"))
    # A tied embedding multiplies as the head; a separate one is only looked up.
    language_weights = count_params(language) - (0 if model.tied else model.vocab * model.width)
    language_weights *= cfg["vlm"]["text_loss_weight"] > 0
    return {
        "tokens": rows * length,
        "flops": 6 * rows * (length * language_weights + patches * tower_weights),
    }
