"""The training program of a small vision-language model, with the interface of `training/step.py`.

Next-token cross entropy over interleaved rows whose images the model sees with its own tower; a
small term lets a linear layer read the pixels back from the tower's features, so that they keep
what no question asks for (the latent codec builds on them).

Axes: B rows, T positions, M images of a row, N features of an image, C width, S records of a row.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from starflow2_jax import config
from starflow2_jax import mesh as meshes
from starflow2_jax import params as weights
from starflow2_jax.models import layers, qwen, qwen_vision
from starflow2_jax.models.patches import patchify
from starflow2_jax.models.qwen import Config
from starflow2_jax.models.qwen_vision import VisionConfig
from starflow2_jax.params import Tree, Weight, zeros
from starflow2_jax.training import inputs, optim, text_loss
from starflow2_jax.training.step import Program, TrainState, accumulate


def model_config(cfg: Mapping[str, Any]) -> Config:
    """The model of an experiment.

    Raises:
        ValueError: an unknown model key, no tower, or images that it cannot cut.
    """
    group = config.model_group(cfg)
    if not group.get("vision"):
        raise ValueError("config: model.vision is missing: a model that sees needs a tower")
    vision = config.build(VisionConfig, group["vision"], "model.vision")
    model = config.build(Config, {**group, "vision": vision}, "model")
    qwen_vision.check_size(cfg["image"]["pixels"], cfg["image"]["pixels"], vision)
    return model


def side(cfg: Mapping[str, Any], model: Config) -> int:
    """Rows (= columns) of an image's features."""
    return cfg["image"]["pixels"] // (model.vision.patch * model.vision.merge)


def declare(cfg: Mapping[str, Any], model: Config) -> dict[str, Any]:
    """Weights of an experiment: the model, and the linear layer that reads pixels back."""
    block = model.vision.patch * model.vision.merge
    pixels = 3 * block**2
    read = {
        "weight": Weight((model.width, pixels), ("embed", None)),
        "bias": Weight((pixels,), (None,), zeros),
    }
    return {"vlm": qwen.declare(model), "pixel_probe": read}


def build(cfg: Mapping[str, Any], mesh: Mesh) -> Program:
    """Build the program of an experiment with `task="vlm"`.

    Raises:
        ValueError: a batch that the mesh does not divide, a layout that does not fit a weight, or a
            wrong train.trains.
    """
    model = model_config(cfg)
    train, rows = cfg["train"], cfg["train"]["batch_size"]
    meshes.check_batch(rows, mesh)
    meshes.check_batch(rows // train["microbatches"], mesh, "rows of a microbatch")
    declared = declare(cfg, model)
    if sorted(train["trains"]) != sorted(declared):
        raise ValueError(
            f"config: train.trains={list(train['trains'])}, but task='vlm' trains {list(declared)}"
        )
    tx = optim.optimizer(cfg["optim"], train["steps"])
    everywhere, where_batch = meshes.replicated(mesh), meshes.batch_sharding(mesh)
    where = weights.shardings(declared, mesh, cfg["layout"])
    moments = optim.state_shardings(tx, weights.abstract(declared), where, mesh)
    where_state = TrainState(everywhere, where, where, moments)

    def init(key):
        params = weights.init(key, declared)
        ema = jax.tree.map(jnp.copy, params)
        return TrainState(jnp.zeros((), jnp.int32), params, ema, tx.init(params)), {}

    def gradients(params, batch):
        # Of the global batch, so that microbatches and hosts add up to the same mean.
        count = jnp.maximum(text_loss.targets(batch).sum(), 1)
        images = rows * batch["images"].shape[1]

        def mean(params, batch, count):
            sums = row_sums(params, batch, cfg, model)
            loss = (sums["nll"] / count[0]).sum()
            loss += cfg["vlm"]["reconstruction"] * sums["pixel_square"].sum() / images
            return loss, {"loss": loss, **jax.tree.map(jnp.sum, sums)}

        shared = jnp.full((rows,), count, jnp.float32)
        return accumulate(mean, params, (batch, shared), rows, train["microbatches"])

    def step(state, frozen, batch):
        del frozen
        grads, metrics = gradients(state.params, batch)
        norm = optax.global_norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
        updates, after = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = optim.update_ema(state.ema, params, train["ema"], state.step)
        keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        lr = optim.schedule(cfg["optim"], train["steps"])(state.step)
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
    """Shape and dtype of the arrays of `data.rows` that a step reads."""
    text, pixels = cfg["text"], cfg["image"]["pixels"]
    places = text["images"] or text["length"] // (side**2 + 2)
    length = (rows, text["length"])
    return {
        "ids": (length, jnp.int32),
        "segments": (length, jnp.int32),
        "image": (length, jnp.int32),
        "target": (length, jnp.bool_),
        "positions": ((*length, 3), jnp.int32),
        "images": ((rows, places, pixels, pixels, 3), jnp.uint8),
    }


def states(
    params: Tree, batch: Mapping[str, jax.Array], model: Config
) -> tuple[jax.Array, jax.Array]:
    """What the head reads [B, T, C], and the tower's features [B, M, N, C], of rows with images."""
    vlm, images = params["vlm"], batch["images"]
    rows, places = images.shape[:2]
    given = qwen_vision.normalise(images.reshape(-1, *images.shape[2:]))
    seen = qwen_vision.encode_images(vlm["vision"], given, model.vision)
    h = qwen.embed(vlm, batch["ids"], model)
    h = qwen.place_images(h, batch["image"], seen.reshape(rows, -1, model.width))
    h = qwen.run(vlm, h, batch["positions"], None, model, segments=batch["segments"])
    return h, seen.reshape(rows, places, -1, model.width)


def row_sums(
    params: Tree, batch: Mapping[str, jax.Array], cfg: Mapping[str, Any], model: Config
) -> dict[str, jax.Array]:
    """Sums of each row [B]: those of `text_loss.sums`, and `pixel_square` of `images`."""
    h, seen = states(params, batch, model)
    logits = qwen.logits(params["vlm"], h[:, :-1], model)
    sums = text_loss.sums(logits, batch)
    block = model.vision.patch * model.vision.merge
    image = inputs.scale_pixels(batch["images"])
    rows, places = image.shape[:2]
    wanted = patchify(image.reshape(-1, *image.shape[2:]), block, "channel_last")
    found = layers.at_least_float32(layers.linear(params["pixel_probe"], seen))
    square = jnp.square(found.reshape(wanted.shape) - wanted).mean((1, 2))
    square = square.reshape(rows, places).sum(1)
    return {**sums, "pixel_square": square, "images": jnp.full((rows,), places, jnp.float32)}


def means(sums: Mapping[str, Any]) -> dict[str, Any]:
    """Nats per target token, and how many tokens and whole records are likeliest as they are."""
    tokens, records = (sums[name] or 1 for name in ("tokens", "records"))
    return {
        "nats_per_token": sums["nll"] / tokens,
        "token_accuracy": sums["right"] / tokens,
        "record_accuracy": sums["records_right"] / records,
        "pixel_square": sums["pixel_square"] / sums["images"],
    }
