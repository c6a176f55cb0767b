"""The training program of a small vision-language model; interface of `training/program.py`.

Next-token cross entropy over interleaved rows whose images the model sees with its own tower. Two
terms train the tower itself. A linear layer reads the pixels back from its features, so that they
keep what no question asks for (the latent codec builds on them). And the model's own head reads
from every feature the words of the region that it lies in: one signal a patch where an answer gives
one a picture, and what is seen and what is said lie in one space, in which attention finds a shape
by its word.

Axes: B rows, T positions, M images of a row, N features of an image, C width, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from starflow2_jax import config
from starflow2_jax.mesh import batch_sharding, check_batch, replicated
from starflow2_jax.models import layers, qwen, qwen_vision
from starflow2_jax.models.patches import patchify, scale_pixels
from starflow2_jax.models.qwen import QwenConfig
from starflow2_jax.models.qwen_vision import VisionConfig
from starflow2_jax.params import (
    ParamSpec,
    Tree,
    abstract as abstract_params,
    init as init_params,
    shardings as param_shardings,
    zeros,
)
from starflow2_jax.training import optimizer
from starflow2_jax.training.losses import text as text_loss
from starflow2_jax.training.program import Program, TrainState, accumulate

# Regions of an image, four objects and the ground, and words of each, at most.
REGIONS = (5, 8)


def model_config(cfg: Mapping[str, Any]) -> QwenConfig:
    """The model of an experiment.

    Raises:
        ValueError: an unknown model key, no tower, or images that it cannot cut.
    """
    group = config.model_group(cfg)
    if not group.get("vision"):
        raise ValueError("config: model.vision is missing: a model that sees needs a tower")
    vision = config.build(VisionConfig, group["vision"], "model.vision")
    model = config.build(QwenConfig, {**group, "vision": vision}, "model")
    qwen_vision.check_size(cfg["image"]["pixels"], cfg["image"]["pixels"], vision)
    return model


def side(cfg: Mapping[str, Any], model: QwenConfig) -> int:
    """Rows (= columns) of an image's features."""
    return cfg["image"]["pixels"] // (model.vision.patch * model.vision.merge)


def declare(cfg: Mapping[str, Any], model: QwenConfig) -> dict[str, Any]:
    """Weights of an experiment: the model, and the layer that reads pixels back."""
    values = 3 * (model.vision.patch * model.vision.merge) ** 2
    return {
        "vlm": qwen.declare(model),
        "pixel_probe": {
            "weight": ParamSpec((model.width, values), ("embed", None)),
            "bias": ParamSpec((values,), (None,), zeros),
        },
    }


def build(cfg: Mapping[str, Any], mesh: Mesh) -> Program:
    """Build the program of an experiment with `task="vlm"`.

    Raises:
        ValueError: a batch that the mesh does not divide, a layout that does not fit a weight, or a
            wrong train.trainable.
    """
    model = model_config(cfg)
    train, rows = cfg["train"], cfg["train"]["batch_size"]
    check_batch(rows, mesh)
    check_batch(rows // train["microbatches"], mesh, "rows of a microbatch")
    declared = declare(cfg, model)
    if sorted(train["trainable"]) != sorted(declared):
        raise ValueError(
            f"config: train.trainable={list(train['trainable'])}, but task='vlm' trains "
            f"{list(declared)}"
        )
    tx = optimizer.optimizer(cfg["optim"], train["steps"])
    everywhere, where_batch = replicated(mesh), batch_sharding(mesh)
    where = param_shardings(declared, mesh, cfg["layout"])
    moments = optimizer.state_shardings(tx, abstract_params(declared), where, mesh)
    where_state = TrainState(everywhere, where, where, moments)

    def init(key):
        params = init_params(key, declared)
        ema = jax.tree.map(jnp.copy, params)
        return TrainState(jnp.zeros((), jnp.int32), params, ema, tx.init(params)), {}

    def gradients(params, batch):
        # Of the global batch, so that microbatches and hosts add up to the same mean.
        count = jnp.maximum(text_loss.targets(batch).sum(), 1)
        images = rows * batch["images"].shape[1]

        def mean(params, batch, count):
            sums = row_sums(params, batch, cfg, model)
            loss = cfg["vlm"]["text_loss_weight"] * (sums["nll"] / count[0]).sum()
            loss += cfg["vlm"]["pixel_loss_weight"] * sums["pixel_square"].sum() / images
            loss += cfg["vlm"]["region_loss_weight"] * sums["word_nats"].sum() / images
            return loss, {"loss": loss, **jax.tree.map(jnp.sum, sums)}

        shared = jnp.full((rows,), count, jnp.float32)
        return accumulate(mean, params, (batch, shared), rows, train["microbatches"])

    def step(state, frozen, batch):
        del frozen
        grads, metrics = gradients(state.params, batch)
        norm = optax.global_norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
        updates, after = tx.update(grads, state.opt_state, state.params)
        if not cfg["vlm"]["train_tower"]:
            # Nor by weight decay.
            still = jax.tree.map(jnp.zeros_like, updates["vlm"]["vision"])
            updates = {**updates, "vlm": {**updates["vlm"], "vision": still}}
        params = optax.apply_updates(state.params, updates)
        ema = optimizer.update_ema(state.ema, params, train["ema"], state.step)
        keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        lr = optimizer.schedule(cfg["optim"], train["steps"])(state.step)
        state = TrainState(
            state.step + 1,
            keep(params, state.params),
            keep(ema, state.ema),
            keep(after, state.opt_state),
        )
        return state, {**metrics, "grad_norm": norm, "finite": finite, "lr": lr}

    def evaluate(params, frozen, batch, row_ids, mask):
        del frozen, row_ids
        sums = row_sums(params, batch, cfg, model)
        return jax.tree.map(lambda each: (mask * each).sum(), sums)

    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=where_batch)
        for name, (shape, dtype) in batch_shapes(cfg, side(cfg, model), rows).items()
    }
    place = lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
    shapes = jax.eval_shape(init, jax.random.key(0))[0]
    pinned = {"in_shardings": (where_state, {}, where_batch), "donate_argnums": 0}
    return Program(
        cfg=cfg,
        mesh=mesh,
        model=model,
        declared=declared,
        init=jax.jit(init, out_shardings=(where_state, {})),
        step=jax.jit(step, out_shardings=(where_state, everywhere), **pinned),
        evaluate=jax.jit(evaluate, out_shardings=everywhere),
        abstract_state=jax.tree.map(place, shapes, where_state),
        abstract_frozen={},
        abstract_batch=batch,
        means=means,
    )


def batch_shapes(cfg: Mapping[str, Any], side: int, rows: int) -> dict[str, tuple]:
    """Shape and dtype of the arrays of `data.packed_batches` that a step reads."""
    text, pixels = cfg["text"], cfg["image"]["pixels"]
    places = text["images"] or text["length"] // (side**2 + 2)
    length = (rows, text["length"])
    told = {}
    if cfg["vlm"]["region_loss_weight"]:
        told["region"] = ((rows, places, side**2), jnp.int32)
        told["region_words"] = ((rows, places, *REGIONS), jnp.int32)
    return {
        **told,
        "ids": (length, jnp.int32),
        "segments": (length, jnp.int32),
        "image": (length, jnp.int32),
        "target": (length, jnp.bool_),
        "positions": ((*length, 3), jnp.int32),
        "images": ((rows, places, pixels, pixels, 3), jnp.uint8),
    }


def see(params: Tree, images: jax.Array, model: QwenConfig) -> jax.Array:
    """The tower's features [B, M, N, C] of images uint8 [B, M, H, W, 3]."""
    given = qwen_vision.normalize(images.reshape(-1, *images.shape[2:]))
    seen = qwen_vision.encode_images(params["vision"], given, model.vision)
    return seen.reshape(*images.shape[:2], -1, model.width)


def read(
    params: Tree, batch: Mapping[str, jax.Array], seen: jax.Array, model: QwenConfig
) -> jax.Array:
    """Logits [B, T - 1, V] of what follows each position, of rows whose images look like `seen`."""
    h = qwen.embed(params, batch["ids"], model)
    h = qwen.scatter_row_features(h, batch["image"], seen.reshape(len(seen), -1, model.width))
    h, _ = qwen.apply_layers(params, h, model, batch["positions"], segments=batch["segments"])
    return qwen.logits(params, h[:, :-1], model)


def row_sums(
    params: Tree, batch: Mapping[str, jax.Array], cfg: Mapping[str, Any], model: QwenConfig
) -> dict[str, jax.Array]:
    """Return sums of each row [B]: `text_loss.row_sums` (zeros if `vlm.text_loss_weight` is 0) and
    over its `images` `pixel_square` and `word_nats`."""
    seen, group = see(params["vlm"], batch["images"], model), cfg["vlm"]
    if not group["train_tower"]:
        seen = jax.lax.stop_gradient(seen)
    if group["text_loss_weight"]:
        sums = text_loss.row_sums(read(params["vlm"], batch, seen, model), batch)
    else:
        sums = dict.fromkeys(text_loss.NAMES, jnp.zeros(len(seen)))
    block = model.vision.patch * model.vision.merge
    image = scale_pixels(batch["images"])
    rows, places = image.shape[:2]
    wanted = patchify(image.reshape(-1, *image.shape[2:]), block, "channel_last")
    found = layers.at_least_float32(layers.linear(params["pixel_probe"], seen))
    square = jnp.square(found.reshape(wanted.shape) - wanted).mean((1, 2))
    sums["pixel_square"] = square.reshape(rows, places).sum(1)
    sums["word_nats"] = jnp.zeros(rows)
    if group["region_loss_weight"]:
        sums["word_nats"] = word_nats(params["vlm"], batch, seen, model)
    return {**sums, "images": jnp.full((rows,), places, jnp.float32)}


def word_nats(
    params: Tree, batch: Mapping[str, jax.Array], seen: jax.Array, model: QwenConfig
) -> jax.Array:
    """Nats of the words of each image's regions under what the model's head reads from its
    features, a sum over images [B].

    The words of a region are a bag, each equally often; every region of an image counts as much,
    and of a region every feature.

    Args:
        batch: `region` and `region_words` of `data.packed_batches`; seen: [B, M, N, C].
    """
    logits = qwen.logits(params, qwen.final_norm(params, seen, model), model)
    words = batch["region_words"]
    bag = jax.nn.one_hot(words, logits.shape[-1]).sum(3)  # -1 gives none
    bag = bag / jnp.maximum((words >= 0).sum(3), 1)[..., None]
    inside = jax.nn.one_hot(batch["region"], words.shape[2])
    count = inside.sum(2)  # of features [B, M, R]
    share = inside / jnp.maximum(count, 1)[:, :, None]
    share = share / jnp.maximum((count > 0).sum(2), 1)[..., None, None]
    wanted = jnp.einsum("bmnr,bmrv->bmnv", share, bag)
    return -(wanted * jax.nn.log_softmax(logits)).sum((1, 2, 3))


def means(sums: Mapping[str, Any]) -> dict[str, Any]:
    """Nats per target token, and how many tokens and whole records are likeliest as they are."""
    tokens, records = (sums[name] or 1 for name in ("tokens", "records"))
    return {
        "text_nats": sums["nll"] / tokens,
        "text_accuracy": sums["right"] / tokens,
        "record_accuracy": sums["records_right"] / records,
        "pixel_square": sums["pixel_square"] / sums["images"],
        "word_nats": sums["word_nats"] / sums["images"],
    }
