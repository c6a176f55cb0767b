"""The training program of an experiment: what train, plan, bench and the tests all run.

`build(cfg, mesh)` gives the jitted step, initialiser and evaluation, with every input and output
pinned to its sharding, and their abstract values, from which anything can be lowered ahead of time.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh

from starflow2_jax import config
from starflow2_jax.mesh import batch_sharding, check_batch, place_rows, replicated
from starflow2_jax.models import flow
from starflow2_jax.models.flow import FlowConfig
from starflow2_jax.params import (
    ParamSpec,
    Tree,
    abstract as abstract_params,
    init as init_params,
    normal,
    shardings as param_shardings,
    split as split_params,
)
from starflow2_jax.training import optimizer, preprocess
from starflow2_jax.training.losses.flow import flow_loss, per_dim


@struct.dataclass
class TrainState:
    """Everything that a step changes. The key of all randomness is the seed and `step`."""

    step: jax.Array
    params: Any
    ema: Any
    opt_state: Any


@dataclass(frozen=True)
class Program:
    """An experiment, built for a mesh.

    Attributes:
        declared: ParamSpecs of every top-level subtree. The trained ones are in `TrainState.params`
            with those that a checkpoint carries along; the others are the step's `frozen` argument.
        init: key -> (TrainState, frozen), born sharded.
        step: (state, frozen, batch) -> (state, metrics); donates the state.
        evaluate: (params, frozen, batch, row ids [b], mask [b]) -> masked sums of the parts that
            `loss.flow_loss` names; noise depends on the row id alone.
        abstract_state, abstract_frozen, abstract_batch: ShapeDtypeStructs with shardings.
        identity: sha256 of what frozen subtrees are read from, by name; empty where all are drawn.
        means: summed metrics to readable figures, the first of which stands for the others.
        show: (params, frozen, batch) -> what is made of the batch's images, uint8 [B, H, W, 3];
            None for a flow.
    """

    cfg: Mapping[str, Any]
    mesh: Mesh
    model: Any
    declared: Tree
    init: Callable
    step: Callable
    evaluate: Callable
    abstract_state: TrainState
    abstract_frozen: Any
    abstract_batch: Any
    identity: Mapping[str, str] = dataclasses.field(default_factory=dict)
    means: Callable = per_dim
    show: Callable | None = None

    def lower_step(self) -> jax.stages.Lowered:
        """The training step, lowered from abstract values."""
        with jax.set_mesh(self.mesh):
            return self.step.lower(self.abstract_state, self.abstract_frozen, self.abstract_batch)


def model_config(cfg: Mapping[str, Any]) -> FlowConfig:
    """The flow of an experiment.

    Raises:
        ValueError: an unknown model key, or image keys that do not fit the model's.
    """
    group = config.model_group(cfg)
    model = config.build(FlowConfig, group, "model")
    image = cfg["image"]
    if image["pixels"]:
        if image["pixels"] != model.side * image["patch"]:
            raise ValueError(
                f"config: image.pixels={image['pixels']} is not model.side={model.side} x "
                f"image.patch={image['patch']}"
            )
        if model.channels != 3 * image["patch"] ** 2:
            raise ValueError(
                f"config: model.channels={model.channels} must be 3 x image.patch^2 = "
                f"{3 * image['patch'] ** 2}"
            )
    return model


def declare(cfg: Mapping[str, Any], model: FlowConfig) -> dict[str, Any]:
    """Weights of an experiment: the flow, and a token embedding where text is embedded here."""
    tree: dict[str, Any] = {"flow": flow.declare(model)}
    vocabulary = cfg["text"]["vocabulary"]
    if vocabulary:
        shape = (vocabulary, model.text_channels)
        tree["text"] = {"embed": ParamSpec(shape, ("vocab", None), normal(1.0))}
    return tree


def frozen_weights(
    cfg: Mapping[str, Any], declared: Mapping[str, Any], mesh: Mesh | None = None
) -> dict[str, Any]:
    """The subtrees that an experiment does not train, as its run drew them from the seed.

    Checkpoints hold only the others.
    """
    frozen = split_params(declared, tuple(cfg["train"]["trainable"]))[1]
    if not frozen:
        return {}
    where = None if mesh is None else param_shardings(frozen, mesh, cfg["layout"])
    draw = jax.jit(partial(init_params, tree=frozen), out_shardings=where)
    return draw(jax.random.key(cfg["seed"]))


def build(cfg: Mapping[str, Any], mesh: Mesh, *, null_text: Any = None) -> Program:
    """Build an experiment's program for a mesh.

    Args:
        null_text: features [n, E] of the empty prompt, which dropped rows are given; zeros where
            None.

    Raises:
        ValueError: a batch that the mesh does not divide, a layout that does not fit a weight, or
            an unknown subtree in train.trainable; names the key.
    """
    model = model_config(cfg)
    train, rows = cfg["train"], cfg["train"]["batch_size"]
    check_batch(rows, mesh)
    check_batch(rows // train["microbatches"], mesh, "rows of a microbatch")
    declared = declare(cfg, model)
    null_text = preprocess.pad_text(null_text, model)
    trained, frozen = split_params(declared, tuple(train["trainable"]))
    tx = optimizer.optimizer(cfg["optim"], train["steps"])
    everywhere = replicated(mesh)
    where = param_shardings(trained, mesh, cfg["layout"])
    where_frozen = param_shardings(frozen, mesh, cfg["layout"])
    where_batch = batch_sharding(mesh)
    moments = optimizer.state_shardings(tx, abstract_params(trained), where, mesh)
    where_state = TrainState(everywhere, where, where, moments)

    def init(key):
        params = init_params(key, trained)
        # A copy: the step donates both.
        ema = jax.tree.map(jnp.copy, params)
        state = TrainState(jnp.zeros((), jnp.int32), params, ema, tx.init(params))
        return state, init_params(key, frozen)

    def loss(params, frozen, batch, keys, train, drop):
        params = {**params, **frozen}
        x = preprocess.tokens(batch, keys, cfg, train)
        conditioning = preprocess.conditions(params, batch, keys, drop, null_text)
        penalty = cfg["loss"]["latent_penalty"] if train else 0.0
        return flow_loss(params["flow"], x, model, conditioning, latent_penalty=penalty)

    def gradients(params, frozen, batch, keys):
        def mean(params, batch, keys):
            each, sums = loss(params, frozen, batch, keys, True, cfg["cfg_dropout"]["text"])
            mean = each.sum() / (rows * model.tokens * model.channels)
            return mean, {"loss": mean, **jax.tree.map(jnp.sum, sums)}

        return accumulate(mean, params, (batch, keys), rows, train["microbatches"])

    def step(state, frozen, batch):
        keys = preprocess.row_keys(cfg["seed"], state.step, jnp.arange(rows))
        grads, metrics = gradients(state.params, frozen, batch, keys)
        return update(state, grads, metrics, tx, cfg)

    def evaluate(params, frozen, batch, row_ids, mask):
        keys = preprocess.row_keys(cfg["seed"] + 1, 0, row_ids)

        sums = loss(params, frozen, batch, keys, False, 0.0)[1]
        return jax.tree.map(lambda each: (mask * each).sum(), sums)

    abstract = preprocess.abstract_batch(cfg, model, rows)
    batch = {
        name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where_batch)
        for name, a in abstract.items()
    }
    place = lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
    shapes = jax.eval_shape(init, jax.random.key(0))
    abstract_state, abstract_frozen = jax.tree.map(place, shapes, (where_state, where_frozen))
    pinned = {"in_shardings": (where_state, where_frozen, where_batch), "donate_argnums": 0}
    return Program(
        cfg=cfg,
        mesh=mesh,
        model=model,
        declared=declared,
        init=jax.jit(init, out_shardings=(where_state, where_frozen)),
        step=jax.jit(step, out_shardings=(where_state, everywhere), **pinned),
        evaluate=jax.jit(evaluate, out_shardings=everywhere),
        abstract_state=abstract_state,
        abstract_frozen=abstract_frozen,
        abstract_batch=batch,
    )


def update(
    state: TrainState,
    grads: Tree,
    metrics: Mapping[str, jax.Array],
    tx: optax.GradientTransformation,
    cfg: Mapping[str, Any],
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The state after a step, and `metrics` with the gradient's norm and the rate.

    A step that is not finite changes nothing but the counter, so the run stops in good state.

    Args:
        grads: of some of the state's subtrees; the others, and their averages, stay as they are.
    """
    norm = optax.global_norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
    pick = lambda tree: {name: tree[name] for name in grads}
    old, old_ema = pick(state.params), pick(state.ema)
    updates, moments = tx.update(grads, state.opt_state, old)
    params = optax.apply_updates(old, updates)
    ema = optimizer.update_ema(old_ema, params, cfg["train"]["ema"], state.step)
    keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
    lr = optimizer.schedule(cfg["optim"], cfg["train"]["steps"])(state.step)
    state = TrainState(
        state.step + 1,
        {**state.params, **keep(params, old)},
        {**state.ema, **keep(ema, old_ema)},
        keep(moments, state.opt_state),
    )
    return state, {**metrics, "grad_norm": norm, "finite": finite, "lr": lr}


def accumulate(mean: Callable, params: Tree, rows_of: Any, rows: int, parts: int) -> tuple:
    """Gradient and auxiliary sums of `mean(params, *rows_of) -> (its share of the mean, sums)`.

    Args:
        rows_of: a tuple of trees of arrays with `rows` rows; parts: microbatches, taken in turn.
    """

    def part(carry, now):
        grads, sums = jax.grad(mean, has_aux=True)(params, *now)
        return jax.tree.map(jnp.add, carry, (grads, sums)), None

    if parts == 1:
        return jax.grad(mean, has_aux=True)(params, *rows_of)
    # Part m takes rows m, m + parts, ...: every device keeps its own rows.
    cut = lambda a: a.reshape(rows // parts, parts, *a.shape[1:]).swapaxes(0, 1)
    now = jax.tree.map(cut, rows_of)
    first = jax.tree.map(lambda a: a[0], now)
    shapes = jax.eval_shape(lambda now: jax.grad(mean, has_aux=True)(params, *now), first)
    nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    return jax.lax.scan(part, nothing, now)[0]


def to_device(program: Program, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """A host's rows of a batch as global arrays; names that the step does not read are left out.

    Raises:
        ValueError: an array that is missing or has another shape than the step expects.
    """
    placed = {}
    for name, expected in program.abstract_batch.items():
        if name not in batch:
            raise ValueError(f"batch: {name!r} is missing; the pipeline gave {sorted(batch)}")
        rows = np.asarray(batch[name], expected.dtype)
        if rows.shape[1:] != expected.shape[1:]:
            raise ValueError(
                f"batch: {name!r} has rows of shape {rows.shape[1:]}, expected {expected.shape[1:]}"
            )
        placed[name] = place_rows(rows, program.mesh)
    return placed
