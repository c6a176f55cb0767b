"""The training program, which train, plan, bench and the tests all run.

`build_program` turns a task into the jitted step, initializer and evaluation, with every input and
output pinned to its sharding, and their abstract values, from which they can be lowered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh

from starflow2_jax.mesh import batch_sharding, check_batch, frozen_layout, place_rows, replicated
from starflow2_jax.params import (
    Tree,
    abstract as abstract_params,
    count as count_params,
    init as init_params,
    shardings as param_shardings,
    split as split_params,
)
from starflow2_jax.runtime import memory
from starflow2_jax.training import optimizer, preprocess
from starflow2_jax.training.run_config import RunConfig, run_config

if TYPE_CHECKING:
    from starflow2_jax.training.tasks.task import Task


Batch = Mapping[str, jax.Array]


@struct.dataclass
class TrainState:
    """Everything that a step changes. All randomness derives from the seed and `step`."""

    step: jax.Array
    params: Any
    ema: Any
    opt_state: Any


class StepContext(NamedTuple):
    """Everything that a microbatch's loss depends on besides its rows and trained parameters."""

    frozen: Tree  # the subtrees outside the state
    state: TrainState  # before the step: its step, its average and its untrained subtrees
    totals: Mapping[str, jax.Array]  # `Task.batch_totals` of the global batch


@dataclass(frozen=True)
class Program:
    """A task, compiled for a mesh."""

    cfg: Mapping[str, Any]
    mesh: Mesh
    task: Task
    init: Callable  # key -> (TrainState, frozen params), created sharded
    step: Callable  # (state, frozen, batch) -> (state, metrics); donates the state
    # (params, frozen, batch, row ids [B], mask [B]) -> metrics, masked and summed. The noise of a
    # row depends on its id alone.
    evaluate: Callable
    # (params, frozen, batch) -> uint8 images [B, H, W, 3]; only for a task with `reconstruct`
    reconstruct: Callable
    # ShapeDtypeStructs with shardings:
    abstract_state: TrainState
    abstract_frozen: Any
    abstract_batch: Any

    def lower_step(self) -> jax.stages.Lowered:
        """Lower the training step from abstract values."""
        with jax.set_mesh(self.mesh):
            return self.step.lower(self.abstract_state, self.abstract_frozen, self.abstract_batch)


def build_program(cfg: Mapping[str, Any], device_mesh: Mesh, task: Task) -> Program:
    """Build a task's program for a mesh."""
    layout, seed, settings = cfg["layout"], cfg["seed"], run_config(cfg)
    layout_of_frozen = frozen_layout(cfg)
    rows = settings.train.batch_size
    check_memory(cfg, task, memory.NO_MACHINE)
    check_batch(rows, device_mesh)
    check_batch(rows // settings.train.microbatches, device_mesh, "rows of a microbatch")
    state_specs, frozen_specs = split_params(task.declared, task.trainable + task.carried)
    everywhere, batch_rows = replicated(device_mesh), batch_sharding(device_mesh)
    params_shardings = param_shardings(state_specs, device_mesh, layout)
    state_shardings = TrainState(
        step=everywhere,
        params=params_shardings,
        ema=params_shardings,
        opt_state=optimizer.state_shardings(
            task.optimizer,
            abstract_params(_pick(state_specs, task.trainable)),
            _pick(params_shardings, task.trainable),
            device_mesh,
        ),
    )
    frozen_shardings = param_shardings(frozen_specs, device_mesh, layout_of_frozen)
    init = partial(init_state, specs=state_specs, task=task)
    jitted_init = jax.jit(init, out_shardings=state_shardings)

    def load_and_init(key):
        frozen = task.load_params(device_mesh)
        loaded = {name: frozen.pop(name) for name in task.loaded}
        return jitted_init(key, loaded), frozen

    def place(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    abstract_loaded = abstract_params(_pick(state_specs, task.loaded))
    abstract_state = jax.eval_shape(init, jax.random.key(0), abstract_loaded)
    return Program(
        cfg=cfg,
        mesh=device_mesh,
        task=task,
        init=load_and_init,
        step=jax.jit(
            partial(step, seed=seed, settings=settings, task=task),
            in_shardings=(state_shardings, frozen_shardings, batch_rows),
            out_shardings=(state_shardings, everywhere),
            donate_argnums=0,
        ),
        evaluate=jax.jit(partial(evaluate, seed=seed, task=task), out_shardings=everywhere),
        reconstruct=jax.jit(partial(reconstruct, seed=seed, task=task), out_shardings=everywhere),
        abstract_state=jax.tree.map(place, abstract_state, state_shardings),
        abstract_frozen=abstract_params(
            frozen_specs, device_mesh, layout_of_frozen, task.frozen_dtype
        ),
        abstract_batch={name: place(a, batch_rows) for name, a in task.abstract_batch.items()},
    )


def check_memory(cfg: Mapping[str, Any], task: Task, limit: int) -> None:
    """Raise ValueError if what a run certainly holds at a time exceeds `limit` bytes.

    It is the state, with at least one moment of the optimizer for every trained parameter, and a
    batch of training, of evaluation or of samples.
    """
    settings = run_config(cfg)
    state, frozen = split_params(task.declared, task.trainable + task.carried)
    trained = count_params(_pick(state, task.trainable))
    row = memory.nbytes(task.abstract_batch.values()) // settings.train.batch_size
    pictures = settings.sample.count * 3 * cfg["image"]["pixels"] ** 2
    sizes = {
        "the state": 4 * (3 * trained + 2 * (count_params(state) - trained)),
        "frozen parameters": jnp.dtype(task.frozen_dtype).itemsize * count_params(frozen),
    }
    for name, size in (
        (f"a batch of {settings.train.batch_size} rows", row * settings.train.batch_size),
        (f"evaluation of {settings.evaluate.batch_size} rows", row * settings.evaluate.batch_size),
        (f"a grid of {settings.sample.count} samples", pictures),
    ):
        memory.check("config: the run", {**sizes, name: size}, limit)


def _pick(tree: Tree, names: Iterable[str]) -> dict[str, Any]:
    return {name: tree[name] for name in names}


def init_state(key: jax.Array, loaded: Tree, *, specs: Tree, task: Task) -> TrainState:
    """Return the state of step 0: the subtrees in `loaded`, and the others drawn from `key`."""
    random_specs = {name: tree for name, tree in specs.items() if name not in loaded}
    params = {**init_params(key, random_specs), **loaded}
    # A copy, because the step donates both.
    ema = jax.tree.map(jnp.copy, params)
    opt_state = task.optimizer.init(_pick(params, task.trainable))
    return TrainState(jnp.zeros((), jnp.int32), params, ema, opt_state)


def step(
    state: TrainState, frozen: Tree, batch: Batch, *, seed: int, settings: RunConfig, task: Task
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Run one training step on a global batch."""
    rows, microbatches = settings.train.batch_size, settings.train.microbatches
    keys = preprocess.row_keys(seed, state.step, jnp.arange(rows))
    context = StepContext(frozen, state, task.batch_totals(batch))

    def share_of_loss(params, batch, keys):
        loss, sums, observed = task.loss(params, batch, keys, context)
        return loss, ({"loss": loss, **jax.tree.map(jnp.sum, sums)}, observed)

    trainable = _pick(state.params, task.trainable)
    grads, (metrics, observed) = accumulate(
        share_of_loss, trainable, (batch, keys), rows, microbatches
    )
    return update(state, grads, metrics, observed, settings=settings, task=task)


def evaluate(
    params: Tree,
    frozen: Tree,
    batch: Batch,
    row_ids: jax.Array,
    mask: jax.Array,
    *,
    seed: int,
    task: Task,
) -> dict[str, jax.Array]:
    """Return the metrics of a batch without dropout, masked and summed over its rows."""
    keys = preprocess.row_keys(seed + 1, 0, row_ids)
    sums = task.evaluate({**frozen, **params}, batch, keys)
    return jax.tree.map(lambda row_values: (mask * row_values).sum(), sums)


def reconstruct(params: Tree, frozen: Tree, batch: Batch, *, seed: int, task: Task) -> jax.Array:
    """Return the reconstructions of a batch of images, uint8 [B, H, W, 3]."""
    keys = preprocess.row_keys(seed, 0, jnp.arange(len(batch["image"])))
    return task.reconstruct({**frozen, **params}, batch, keys)


def update(
    state: TrainState,
    grads: Tree,
    metrics: Mapping[str, jax.Array],
    observed: Any,
    *,
    settings: RunConfig,
    task: Task,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Return the state after a step, and `metrics` with the gradient norm and learning rate.

    If the loss or a gradient is not finite, only the step counter changes, so that the run can stop
    with intact weights. Subtrees without gradients do not change unless the task tracks them, from
    `observed`.
    """
    norm = optax.global_norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
    params = _pick(state.params, grads)
    updates, opt_state = task.optimizer.update(grads, state.opt_state, params, step=state.step)
    params = optax.apply_updates(params, updates)
    ema = optimizer.update_ema(_pick(state.ema, grads), params, settings.train.ema, state.step)
    if task.track:
        params |= task.track(state.params, observed["params"], metrics, state.step)
        ema |= task.track(state.ema, observed["ema"], metrics, state.step)

    def keep_finite(new, old):
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

    learning_rate = optimizer.schedule(settings.optim, settings.train.steps)(state.step)
    state = TrainState(
        state.step + 1,
        {**state.params, **keep_finite(params, _pick(state.params, params))},
        {**state.ema, **keep_finite(ema, _pick(state.ema, ema))},
        keep_finite(opt_state, state.opt_state),
    )
    return state, {**metrics, "grad_norm": norm, "finite": finite, "lr": learning_rate}


def accumulate(
    share_of_loss: Callable, params: Tree, batch: tuple, rows: int, microbatches: int
) -> tuple[Tree, Any]:
    """Return the gradient of a sum over microbatches, and the summed auxiliary results.

    `share_of_loss` maps (params, *batch) to (a microbatch's share of the loss, auxiliary results).
    """
    gradient = jax.grad(share_of_loss, has_aux=True)
    if microbatches == 1:
        return gradient(params, *batch)

    def cut(a):
        # Microbatch m takes rows m, m + microbatches, ...: every device keeps its own rows.
        return a.reshape(rows // microbatches, microbatches, *a.shape[1:]).swapaxes(0, 1)

    def add_gradient(total, part):
        return jax.tree.map(jnp.add, total, gradient(params, *part)), None

    parts = jax.tree.map(cut, batch)
    first_part = jax.tree.map(lambda a: a[0], parts)
    shapes = jax.eval_shape(lambda part: gradient(params, *part), first_part)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    return jax.lax.scan(add_gradient, zeros, parts)[0]


def to_device(program: Program, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Check a host's rows of the arrays that the step reads, and return them as global arrays."""
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
