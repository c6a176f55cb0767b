"""The parts of a training step in milliseconds, measured one by one, and their sum.

`steps` times the loop (data, encoding, transfer, step, the rest of the host), `parts` the programs
inside a step: forward passes of increasing length, the gradient, and the optimizer. Every program
is timed once per round, so that a drift of the machine affects all of them. A step is one program
that XLA schedules as a whole, so the sum of the parts differs from it by some per cent.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from starflow2_jax import config
from starflow2_jax.benchmarking.timing import WARM_UP, Result
from starflow2_jax.mesh import host_rows, make_mesh
from starflow2_jax.training import preprocess, program as programs
from starflow2_jax.training.losses import interleaved
from starflow2_jax.training.program import Program, StepContext
from starflow2_jax.training.tasks import registry

# Largest difference between a step and the sum of its parts, as a share of the step.
TOLERANCE = 0.05
Programs = Mapping[str, Callable[[], Any]]


def rounds(timed: Programs, repeats: int) -> dict[str, float]:
    """Return the median milliseconds of each program, which take turns after `WARM_UP` rounds."""
    times: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(WARM_UP + repeats):
        for name, run in timed.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if turn >= WARM_UP:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def differences(cumulative: Mapping[str, float]) -> dict[str, float]:
    """Return what each entry adds to the one before it."""
    values = list(cumulative.values())
    return {name: b - a for name, a, b in zip(cumulative, [0.0, *values], values)}


def table(parts: Mapping[str, float], step_ms: float) -> Result:
    """Return the parts as `..._ms` with their sum, and its distance from the step in per cent.

    `adds_up` is whether that is at most `TOLERANCE`.
    """
    total = sum(parts.values())
    row: Result = {f"{name}_ms": ms for name, ms in parts.items()}
    row |= {"sum_ms": total, "step_ms": step_ms, "sum_off_percent": 100 * (total / step_ms - 1)}
    return row | {"adds_up": abs(total / step_ms - 1) <= TOLERANCE}


def loss_parts(
    loss: Callable,
    optimizer: Any,
    step: Callable,
    params: Any,
    inputs: tuple,
    repeats: int,
) -> Result:
    """Return forward pass, backward pass and optimizer of a step of loss(params, *inputs).

    Args:
        optimizer: an optax transformation, whose update `step` applies.
        step: (params, moments, *inputs) -> new params, moments and loss; donates the first two.
    """

    def copied():
        return [jax.tree.map(jnp.copy, params), optimizer.init(params)]

    def update(params, moments, grads):
        updates, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments

    current, updated = copied(), copied()
    update = jax.jit(update, donate_argnums=(0, 1))
    gradient = partial(jax.jit(jax.value_and_grad(loss)), params, *inputs)
    grads = gradient()[1]

    def run_step():
        *current[:], value = step(*current, *inputs)
        return value

    def run_update():
        updated[:] = update(*updated, grads)
        return updated

    forward = partial(jax.jit(loss), params, *inputs)
    timed = {"forward": forward, "backward": gradient, "optimizer": run_update, "step": run_step}
    return _result(rounds(timed, repeats))


def parts(program: Program, state: Any, frozen: Any, batch: Any, repeats: int) -> Result:
    """Return the parts of a training step on a batch, next to the whole step.

    Args:
        state: it is taken over, as the step donates it.
    """
    task, rows = program.task, program.cfg["train"]["batch_size"]
    seed, settings = program.cfg["seed"], programs.run_config(program.cfg)
    inputs = (state, frozen, batch)
    functions = forward_functions(program)

    def gradient(state, frozen, batch):
        keys = preprocess.row_keys(seed, 0, jnp.arange(rows))
        context = StepContext(frozen, state, task.batch_totals(batch))

        def share_of_loss(trained):
            loss, sums, observed = task.loss(trained, batch, keys, context)
            return loss, ({"loss": loss, **jax.tree.map(jnp.sum, sums)}, observed)

        trained = {name: state.params[name] for name in task.trainable}
        return jax.grad(share_of_loss, has_aux=True)(trained)

    cumulative = {name: partial(jax.jit(run), *inputs) for name, run in functions.items()}
    cumulative["backward"] = partial(jax.jit(gradient), *inputs)
    grads, (metrics, observed) = cumulative["backward"]()
    change = partial(programs.update, settings=settings, task=task)
    updated, current = [jax.tree.map(jnp.copy, state)], [jax.tree.map(jnp.copy, state)]
    # The old state is an argument that the new one replaces in memory, as in the step.
    update = jax.jit(change, donate_argnums=0)

    def optimizer():
        updated[0], result = update(updated[0], grads, metrics, observed)
        return updated[0], result

    def step():
        current[0], result = program.step(current[0], frozen, batch)
        return current[0], result

    return _result(rounds({**cumulative, "optimizer": optimizer, "step": step}, repeats))


def _result(timed: dict[str, float]) -> Result:
    """Return the table of cumulative times with those of `optimizer` and `step`."""
    step_ms, optimizer_ms = timed.pop("step"), timed.pop("optimizer")
    return table({**differences(timed), "optimizer": optimizer_ms}, step_ms)


def forward_functions(program: Program) -> dict[str, Callable]:
    """Return functions of (state, frozen, batch) that compute ever more of the loss, by name."""
    cfg, task, model = program.cfg, program.task, program.task.model_config
    rows, seed = cfg["train"]["batch_size"], cfg["seed"]

    def keys_of(batch):
        del batch
        return preprocess.row_keys(seed, 0, jnp.arange(rows))

    def loss(state, frozen, batch):
        return task.evaluate({**frozen, **state.params}, batch, keys_of(batch))

    if not task.packed or not hasattr(model, "deep"):
        return {"forward": loss}
    stage = interleaved.stage_of(cfg["train"]["trainable"], model)
    positions = cfg["text"].get("vlm_positions", 0)

    def shallow(state, frozen, batch):
        x = interleaved.sample_latents(batch, keys_of(batch), cfg)
        return interleaved.backbone_inputs({**frozen, **state.params}, batch, x, model, stage)

    def vlm(state, frozen, batch):
        inputs, outputs, log_dets = shallow(state, frozen, batch)
        params = {**frozen, **state.params}
        if interleaved.reads_fewer_vlm_states(model, stage, positions):
            y = interleaved.fewer_vlm_states(params, inputs, batch, model, positions)
        else:
            y = model.forward(params, inputs, with_flow=False, with_skips=stage.text).vlm_states
        return y, outputs, log_dets

    return {"shallow_forward": shallow, "vlm_forward": vlm, "deep_forward_and_loss": loss}


def loop(
    program: Program,
    executable: Callable,
    state: Any,
    frozen: Any,
    batches: Iterator,
    encode: Callable[[Any], Any],
    repeats: int,
) -> Result:
    """Return the milliseconds of one turn of a loop that waits for each of its parts.

    In `train` the device computes a step while the host prepares the next batch.
    """
    names = ("data", "encoding", "transfer", "step", "host")
    turns: list[list[float]] = []
    for _ in range(WARM_UP + repeats):
        marks = [time.perf_counter()]

        def mark(marks=marks):
            marks.append(time.perf_counter())

        batch = next(batches)
        mark()
        batch = encode(batch)
        mark()
        placed = jax.block_until_ready(programs.to_device(program, batch))
        mark()
        state, metrics = executable(state, frozen, placed)
        jax.block_until_ready((state, metrics))
        mark()
        jax.device_get(metrics)
        mark()
        turns.append([1000 * (b - a) for a, b in itertools.pairwise(marks)])
    columns = zip(*turns[WARM_UP:])
    return {f"loop_{n}_ms": statistics.median(c) for n, c in zip(names, columns)}


def experiment(cfg: Mapping[str, Any], repeats: int) -> Result:
    """Return the breakdown of an experiment's step on its data, from random weights."""
    from starflow2_jax.latents import batch_encoder
    from starflow2_jax.training import run_data

    config.check(cfg)
    task = registry.make_task(cfg)
    codec = batch_encoder.open(cfg, getattr(task.model_config, "flow", task.model_config))
    data = run_data.open_data(cfg, task, codec)
    device_mesh, rows = make_mesh(cfg["mesh"]), cfg["train"]["batch_size"]
    program = programs.build_program(cfg, device_mesh, task)
    batches = task.reader.batches(
        data.options("data"), batch_size=rows, rows=host_rows(rows, device_mesh)
    )

    def encode(batch):
        return batch if codec is None else batch_encoder.encode(batch, codec)

    with jax.set_mesh(device_mesh):
        executable = program.lower_step().compile()
        state, frozen = program.init(jax.random.key(cfg["seed"]))
        batch = programs.to_device(program, encode(next(batches)))
        row = parts(program, state, frozen, batch, repeats)
        row |= loop(program, executable, state, frozen, batches, encode, repeats)
    work = task.step_cost()
    row |= {"row": f"train {cfg['name'] or 'experiment'}", "batch": rows}
    return row | {"tokens_per_s": 1000 * work["tokens"] / row["step_ms"], "flops": work["flops"]}
