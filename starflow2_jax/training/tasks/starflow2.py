"""The training program of STARFlow2's stages, with the interface of `training/program.py`.

A stage trains the subtrees that `train.trainable` names. The other `models.starflow2.SUBTREES`
are carried along in the state, so that the next stage finds all of them. The frozen VLM is an
argument of the step and in no checkpoint.
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
    teacher as teacher_weights,
)
from starflow2_jax.checkpoints.model_folder import CONFIG_FILE, read_config
from starflow2_jax.mesh import batch_sharding, check_batch, replicated
from starflow2_jax.models import flops, qwen, starflow2 as pretzel
from starflow2_jax.models.ablations.crossings import CrossingsConfig
from starflow2_jax.models.ablations.mot import MoTConfig
from starflow2_jax.models.backbone import BackboneConfig
from starflow2_jax.models.flow import FlowConfig
from starflow2_jax.models.qwen import QwenConfig
from starflow2_jax.models.starflow2 import PretzelConfig
from starflow2_jax.params import (
    Tree,
    abstract as abstract_params,
    init as init_params,
    shardings as param_shardings,
    split as split_params,
)
from starflow2_jax.training import optimizer, preprocess
from starflow2_jax.training.losses import interleaved
from starflow2_jax.training.program import Program, TrainState, accumulate, update

KINDS = {kind.kind: kind for kind in (PretzelConfig, CrossingsConfig, MoTConfig)}


def model_config(cfg: Mapping[str, Any]) -> BackboneConfig:
    """The model of an experiment.

    `model.vlm` may be empty where `vlm.path` is given, whose configuration then holds; what it
    names must be as there. `model.flow` needs sizes only (see `starflow2.flow_defaults`).
    `model.kind` is `pretzel` by default, or `crossings` if the group has that key; its config class
    (`KINDS`) says which fields there are.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: an unknown or missing key, one that does not fit, or a VLM of other sizes.
    """
    group, own = dict(cfg["model"]), {"compute_dtype": cfg["compute_dtype"]}
    kind = group.pop("kind", "crossings" if "crossings" in group else "pretzel")
    if kind not in KINDS:
        raise ValueError(f"config: model.kind={kind!r} is not one of {', '.join(KINDS)}")
    if cfg.get("attention", "auto") != "auto":
        own["attention"] = cfg["attention"]
    given = dict(group.pop("vlm", None) or {})
    if cfg["vlm"]["path"]:
        given = _as_stored(given, str(model_folder.locate(cfg["vlm"]["path"])))
    vlm = config.build(QwenConfig, {**given, "vision": None, **own}, "model.vlm")
    sizes = dict(group.pop("flow", None) or {})
    defaults = pretzel.flow_defaults(vlm.width, len(sizes.get("layers", ())))
    flow = config.build(FlowConfig, {**defaults, **sizes, **own}, "model.flow")
    return config.build(KINDS[kind], {**group, "vlm": vlm, "flow": flow}, "model")


def _as_stored(given: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """The fields of a folder's `QwenConfig`; `remat` and `attention` are ours to choose."""
    found = vars(qwen_options.read_options(read_config(folder), str(Path(folder) / CONFIG_FILE)))
    for name, value in given.items():
        value = tuple(value) if isinstance(value, list) else value
        own = name in ("vision", "remat", "attention", "compute_dtype") or name not in found
        if not own and value != found[name]:
            raise ValueError(
                f"config: model.vlm.{name}={value!r}, but the model in vlm.path={folder!r} has "
                f"{found[name]!r}"
            )
    ours = {"remat": given.get("remat", "none"), "attention": given.get("attention", "auto")}
    return {**given, **found, **ours}


def places(cfg: Mapping[str, Any], model: BackboneConfig) -> int:
    """M, images of a row at most.

    Raises:
        ValueError: a row that has no room for an image.
    """
    text, patches = cfg["text"], model.patches
    found = text["images"] or text["length"] // (patches + 2)
    if found * (patches + 2) > text["length"] or not found:
        raise ValueError(
            f"config: text.length={text['length']} has no room for {max(found, 1)} images of "
            f"{patches} patches and 2 delimiters"
        )
    return found


def abstract_batch(cfg: Mapping[str, Any], model: BackboneConfig, rows: int) -> dict[str, Any]:
    """Shapes and dtypes of a batch of `rows` rows (see `losses.interleaved`)."""
    length = (rows, cfg["text"]["length"])
    latent = (rows, places(cfg, model), model.patches, model.flow.channels)
    shapes = {
        "ids": (length, jnp.int32),
        "segments": (length, jnp.int32),
        "image": (length, jnp.int32),
        "target": (length, jnp.bool_),
        "positions": ((*length, 3), jnp.int32),
        "flow_positions": ((*length, 3), jnp.int32),
        "latent_mean": (latent, jnp.float32),
        "latent_logvar": (latent, jnp.float32),
    }
    return {name: jax.ShapeDtypeStruct(*of) for name, of in shapes.items()}


def work(cfg: Mapping[str, Any], model: BackboneConfig, declared: Tree) -> dict[str, float]:
    """Return the tokens and FLOPs of a training step (see `flops.interleaved_step`)."""
    length, count = cfg["text"]["length"], cfg["train"]["batch_size"]
    done = flops.interleaved_step(
        model,
        declared,
        cfg["train"]["trainable"],
        length=length,
        num_images=places(cfg, model),
        num_targets=cfg["text"]["max_targets"] or length,
    )
    return {"tokens": count * length, "flops": count * done}


def frozen_vlm(cfg: Mapping[str, Any], model: BackboneConfig, mesh: Mesh, dtype: Any) -> Tree:
    """The VLM's weights without its tower, sharded: of `vlm.path`, or else drawn from the seed.

    Raises:
        FileNotFoundError, ValueError: as `checkpoints.convert.qwen.load`.
    """
    tree = {"vlm": qwen.declare(model.vlm)}
    if cfg["vlm"]["path"]:
        args = (model_folder.locate(cfg["vlm"]["path"]), mesh, cfg["layout"], dtype)
        return {"vlm": qwen_weights.load(*args, only=tuple(tree["vlm"]))[1]}
    where = param_shardings(tree, mesh, cfg["layout"])
    draw = jax.jit(partial(init_params, tree=tree, dtype=dtype), out_shardings=where)
    return draw(jax.random.key(cfg["seed"]))


def build(cfg: Mapping[str, Any], mesh: Mesh, vlm: Tree | None = None) -> Program:
    """Build the program of an experiment with `task="starflow2"`.

    Its `init` reads the VLM. Where `train.trainable` names it, too, it is a part of the state.

    Args:
        vlm: its weights, where they are there already; else as `frozen_vlm`.

    Raises:
        FileNotFoundError: no such folder of a VLM.
        ValueError: a batch that the mesh does not divide, a layout that does not fit a weight, an
            unknown subtree in train.trainable, or a VLM that does not fit; names the key.
    """
    model = model_config(cfg)
    train, rows, parts = cfg["train"], cfg["train"]["batch_size"], cfg["train"]["microbatches"]
    check_batch(rows, mesh)
    check_batch(rows // parts, mesh, "rows of a microbatch")
    declared = model.declare()
    trained = split_params(declared, tuple(train["trainable"]))[0]
    stage = interleaved.stage_of(trained, model)
    if not (stage.images or stage.text):
        raise ValueError("config: train.trainable is empty")
    held = {*pretzel.SUBTREES, *trained} & {*declared}
    state_tree, frozen_tree = split_params(declared, tuple(sorted(held)))
    held_dtype = jnp.float32 if "vlm" in trained else jnp.dtype(cfg["frozen_dtype"])

    everywhere, where_batch = replicated(mesh), batch_sharding(mesh)
    where = param_shardings(state_tree, mesh, cfg["layout"])
    where_frozen = param_shardings(frozen_tree, mesh, cfg["layout"])
    pick = lambda tree: {name: tree[name] for name in trained}
    tx = optimizer.optimizer(cfg["optim"], train["steps"])
    moments = optimizer.state_shardings(tx, abstract_params(trained), pick(where), mesh)
    where_state = TrainState(everywhere, where, where, moments)

    def first(key, read):
        params = {**init_params(key, {n: w for n, w in state_tree.items() if n != "vlm"}), **read}
        # A copy: the step donates both.
        ema = jax.tree.map(jnp.copy, params)
        return TrainState(jnp.zeros((), jnp.int32), params, ema, tx.init(pick(params)))

    begin = jax.jit(first, out_shardings=where_state)

    def init(key):
        if vlm is not None:
            place = {"vlm": param_shardings(declared["vlm"], mesh, cfg["layout"])}
            read = jax.device_put({"vlm": vlm}, place)
        else:
            read = frozen_vlm(cfg, model, mesh, held_dtype)
        return (begin(key, read), {}) if "vlm" in trained else (begin(key, {}), read)

    def sums(params, batch, keys):
        x = interleaved.sample_latents(batch, keys, cfg)
        found = interleaved.loss_terms(
            params,
            batch,
            x,
            model,
            stage,
            text_into_flow=cfg["loss"]["text_into_flow"],
            text_targets=cfg["text"]["max_targets"],
            text_chunk=cfg["text"]["logit_chunk"],
        )
        return interleaved.row_metrics(found, batch, stage)

    def step(state, frozen, batch):
        keys = preprocess.row_keys(cfg["seed"], state.step, jnp.arange(rows))
        # Of the global batch, so that microbatches, devices and hosts add up to the same loss.
        totals = jax.tree.map(jnp.sum, interleaved.target_counts(batch, stage))
        others = {**frozen, **{n: tree for n, tree in state.params.items() if n not in trained}}

        def mean(params, batch, keys):
            made = sums({**others, **params}, batch, keys)
            weight, penalty = cfg["loss"]["text_weight"], cfg["loss"]["latent_penalty"]
            each = interleaved.per_example_loss(
                made, totals, text_weight=weight, latent_penalty=penalty
            )
            loss = each.sum()
            return loss, {"loss": loss, **jax.tree.map(jnp.sum, made)}

        grads, metrics = accumulate(mean, pick(state.params), (batch, keys), rows, parts)
        return update(state, grads, metrics, tx, cfg)

    def evaluate(params, frozen, batch, row_ids, mask):
        keys = preprocess.row_keys(cfg["seed"] + 1, 0, row_ids)
        made = sums({**frozen, **params}, batch, keys)
        return jax.tree.map(lambda each: (mask * each).sum(), made)

    batch = {
        name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where_batch)
        for name, a in abstract_batch(cfg, model, rows).items()
    }
    place = lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
    read = abstract_params({"vlm": declared["vlm"]}) if "vlm" in trained else {}
    shapes = jax.eval_shape(first, jax.random.key(0), read)
    pinned = {"in_shardings": (where_state, where_frozen, where_batch), "donate_argnums": 0}
    path = cfg["vlm"]["path"]
    return Program(
        cfg=cfg,
        mesh=mesh,
        model=model,
        declared=declared,
        init=init,
        step=jax.jit(step, out_shardings=(where_state, everywhere), **pinned),
        evaluate=jax.jit(evaluate, out_shardings=everywhere),
        abstract_state=jax.tree.map(place, shapes, where_state),
        abstract_frozen=abstract_params(frozen_tree, mesh, cfg["layout"], held_dtype),
        abstract_batch=batch,
        identity={"vlm": teacher_weights.identity(path)} if path else {},
        means=interleaved.finalize_metrics,
    )
