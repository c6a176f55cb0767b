"""Train an experiment. The same command with the same workdir resumes it.

python -m starflow2_jax.train --config experiments/tarflow_pixels.py:tiny --workdir runs/tiny
python -m starflow2_jax.train --config starflow2:tarflow_pixels:cifar --config.optim.lr=3e-4 --workdir runs/a
python -m starflow2_jax.train --config experiments/starflow_t2i.py:3b --layout fsdp --mesh fsdp=-1 --workdir runs/3b --dry_run
"""  # noqa: E501

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from absl import flags
from etils import epath
from ml_collections import config_flags

from starflow2_jax import config, params
from starflow2_jax.checkpoints import orbax
from starflow2_jax.config import checks
from starflow2_jax.evaluation import likelihood, sample_grids
from starflow2_jax.evaluation.report import run_report
from starflow2_jax.inference.flow_sampler import FlowModel
from starflow2_jax.latents import batch_encoder
from starflow2_jax.mesh import host_rows, make_mesh
from starflow2_jax.runtime import allocator, cli, distributed, folder_lock, memory
from starflow2_jax.training import run_data
from starflow2_jax.training.init_from import init_from_checkpoint
from starflow2_jax.training.logging import run_log, throughput, trackers
from starflow2_jax.training.program import (
    Program,
    TrainState,
    build_program,
    check_memory,
    to_device,
)
from starflow2_jax.training.run_config import RunConfig, run_config
from starflow2_jax.training.run_data import RunData
from starflow2_jax.training.tasks import registry
from starflow2_jax.training.tasks.task import Task
from starflow2_jax.training.workdir import check_path, check_workdir, pin_models

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "FILE.py[:variant] or starflow2:NAME[:variant]"
)
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of checkpoints, metrics, samples, report")
_LAYOUT = flags.DEFINE_string("layout", None, "sharding layout; overrides the config")
_MESH = flags.DEFINE_string("mesh", None, "such as data=2,fsdp=4; overrides the config")
_SEED = flags.DEFINE_integer("seed", None, "overrides the config", 0, checks.MAX_SEED)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "build, compile, print the tables, and end")


def main(argv: list[str]) -> None:
    """Parse the flags and train."""
    if argv:
        raise ValueError(f"unexpected argument {argv[0]!r}")
    if _CONFIG.value is None or not (_WORKDIR.value or _DRY_RUN.value):
        raise ValueError("--config and --workdir are needed (--dry_run does without --workdir)")
    for name, flag in (("layout", _LAYOUT), ("mesh", _MESH), ("seed", _SEED)):
        if flag.value is not None:
            _CONFIG.value[name] = flag.value
    train(config.to_dict(_CONFIG.value), _WORKDIR.value, dry_run=_DRY_RUN.value)


def train(cfg: dict[str, Any], workdir: str | None, *, dry_run: bool = False) -> None:
    """Run or resume an experiment from a resolved configuration (see `config.to_dict`).

    With `dry_run`, compile the step, print the tables, and end.
    """
    config.check(cfg)
    distributed.init_distributed(cfg["distributed"])
    cfg = pin_models(cfg, workdir)
    distributed.assert_equal_across_processes("the configuration", cfg)
    if dry_run:
        task = registry.make_task(cfg, dry_run=True)
        batch_encoder.open(cfg, getattr(task.model_config, "flow", task.model_config))
        compile_step(cfg, task)
        return
    check_path(workdir)
    # One process of a run, since the others share its folder.
    is_first = jax.process_index() == 0
    if is_first:
        trackers.check(cfg["log"]["trackers"])
    with folder_lock.lock(workdir, "trains") if is_first else contextlib.nullcontext():
        _train(cfg, epath.Path(workdir))


def _train(cfg: dict[str, Any], workdir: epath.Path) -> None:
    """Run or resume an experiment in a folder that no other run uses."""
    task = registry.make_task(cfg)
    codec = batch_encoder.open(cfg, getattr(task.model_config, "flow", task.model_config))
    data = run_data.open_data(cfg, task, codec)
    if jax.process_index() == 0:
        print(run_data.summary(data), flush=True)
    newest_step = check_workdir(workdir, cfg, data)
    if newest_step == cfg["train"]["steps"]:
        orbax.seal(workdir, newest_step)
        if not (workdir / run_report.FILE).exists():
            run_report.write(workdir)  # the run was killed after its last step
        print(f"{workdir} is finished: step {newest_step} of {newest_step}", flush=True)
        return
    if data.null_text is not None:
        task = registry.make_task(cfg, null_text=data.null_text)
    check_memory(cfg, task, memory.capacity())
    compiled = compile_step(cfg, task)
    distributed.wait_for_all()
    state, frozen, identity = init_or_restore(compiled.program, data, workdir, newest_step)
    run = open_run(compiled, frozen, identity, data, workdir, newest_step or 0)
    try:
        last_step = train_loop(run, state, newest_step or 0)
        orbax.wait(run.writer)
    finally:
        orbax.close(run.writer)
        run_log.close(run.log)
    if last_step < run.config.train.steps:
        print(
            f"stopped by a signal at step {last_step}, saved; the same command resumes", flush=True
        )
    elif jax.process_index() == 0:
        print(f"done: {run_report.write(workdir)}", flush=True)


class CompiledStep(NamedTuple):
    """A program, its compiled step, and the total peak FLOP/s of all devices."""

    program: Program
    step: Callable
    peak_flops: float


def compile_step(cfg: Mapping[str, Any], task: Task) -> CompiledStep:
    """Build the program on the mesh, print its tables, and compile its step."""
    cli.use_compilation_cache()
    device_mesh = make_mesh(cfg["mesh"])
    peak_flops = throughput.peak_flops()  # on one device, so before a mesh is set
    jax.set_mesh(device_mesh)
    program = build_program(cfg, device_mesh, task)
    if jax.process_index() == 0:
        print(overview(program), flush=True)
    start_time = time.perf_counter()
    step = program.lower_step().compile()
    seconds = time.perf_counter() - start_time
    print(f"compiled in {seconds:.1f} s; {_memory(step)}", flush=True)
    return CompiledStep(program, step, peak_flops)


def overview(program: Program) -> str:
    """Return the table of parameters with their sharding, and the mesh."""
    layout = program.cfg["layout"]
    declared, trainable = program.task.declared, program.cfg["train"]["trainable"]
    shardings = params.flatten(params.shardings(declared, program.mesh, layout))

    def note(name):
        status = "trained" if name.split("/")[0] in trainable else "frozen"
        axes = [str(axis) for axis in shardings[name].spec if axis]
        return f"{status} {'x'.join(axes)}".rstrip()

    sizes = [f"{axis}={n}" for axis, n in program.mesh.shape.items() if n > 1]
    mesh_line = f"layout {layout} over {', '.join(sizes) or '1 device'}"
    return "\n".join([*params.table(declared, note), mesh_line])


def _memory(step: Any) -> str:
    analysis = step.memory_analysis()
    sizes = {
        "arguments": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes,
        "aliased": analysis.alias_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
    }
    return "per device: " + ", ".join(f"{n} {b / 2**20:,.0f} MiB" for n, b in sizes.items())


def init_or_restore(
    program: Program, data: RunData, workdir: epath.Path, newest_step: int | None
) -> tuple[TrainState, Any, dict[str, str]]:
    """Return the state to start from, the frozen parameters, and the sha256 of their files."""
    init = program.cfg["init"]
    state, frozen = program.init(jax.random.key(program.cfg["seed"]))
    latents = batch_encoder.identity(data.descriptions["data"])
    identity = {**program.task.frozen_identity(), **latents}
    if newest_step is not None:
        del state  # its memory is needed
        state, meta = orbax.restore(workdir, newest_step, program.abstract_state)
        orbax.check_frozen(workdir, meta, identity)
        orbax.seal(workdir, newest_step, is_restored=True)
        print(f"resumed {workdir} at step {newest_step}", flush=True)
    elif init["from"]:
        state = init_from_checkpoint(
            program, state, init["from"], ema=init["ema"], identity=identity
        )
        print(f"started from the weights of {init['from']}", flush=True)
    return state, frozen, identity


@dataclass(frozen=True)
class Run:
    """Everything that the loop uses and does not change."""

    config: RunConfig
    program: Program
    step: Callable  # the compiled step
    frozen: Any  # the parameters outside the state
    data: RunData
    workdir: epath.Path
    log: run_log.Log
    writer: Any
    metadata: Mapping[str, Any]  # what every checkpoint stores besides the state
    speed: Mapping[str, float]  # arguments of `throughput.rates`
    # state -> grids of samples; None if no samples are drawn
    draw_samples: Callable[[TrainState], Iterable[sample_grids.Grid]] | None


class PendingStep(NamedTuple):
    """A step whose metrics have not been read yet, so that the device never waits for the host."""

    number: int
    metrics: Mapping[str, jax.Array]
    batch: Mapping[str, Any]


def open_run(
    compiled: CompiledStep,
    frozen: Any,
    identity: Mapping[str, str],
    data: RunData,
    workdir: epath.Path,
    first_step: int,
) -> Run:
    """Open the log and the checkpoint writer of a run."""
    program = compiled.program
    cfg, settings = program.cfg, run_config(program.cfg)
    log = run_log.open(workdir, cfg, step=first_step)
    writer = orbax.open(
        workdir, keep=settings.checkpoint.keep, keep_every=settings.checkpoint.keep_every or None
    )
    metadata = {
        "config": cfg,
        "data": data.descriptions,
        "classes": data.descriptions["data"]["classes"],
        "null_text": data.null_text,
        "frozen": identity,
        "versions": run_log.environment(),
    }
    return Run(
        config=settings,
        program=program,
        step=compiled.step,
        frozen=frozen,
        data=data,
        workdir=workdir,
        log=log,
        writer=writer,
        metadata=metadata,
        speed={**program.task.step_cost(), "peak": compiled.peak_flops},
        draw_samples=make_sample_fn(program, frozen, data) if settings.sample.every else None,
    )


def train_loop(run: Run, state: TrainState, first_step: int) -> int:
    """Train until the last step or SIGTERM; return the number of the step that was saved last."""
    num_steps, batch_size = run.config.train.steps, run.config.train.batch_size
    profile_steps = tuple(run.config.log.profile_steps) or (None, None)
    stop_requested = distributed.preemption_handler()
    batches = run.data.batches(
        batch_size=batch_size, start_step=first_step, rows=host_rows(batch_size, run.program.mesh)
    )
    number, pending, window = first_step, None, []
    for number in range(first_step + 1, num_steps + 1):
        if number == profile_steps[0]:
            jax.profiler.start_trace(str(run.workdir / "profile"))
        batch = next(batches)
        state, metrics = run.step(state, run.frozen, to_device(run.program, batch))
        if pending is not None:
            log_step(run, pending, window)
        pending = PendingStep(number, metrics, batch)
        if number == profile_steps[1]:
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
        stopped = stop_requested(number) and number < num_steps
        actions = actions_after(run, number, stopped)
        if actions:
            log_step(run, pending, window)
            pending = None
        for action in actions:
            with throughput.pause(run.log.clock, wait_for=metrics):
                action(run, state, number)
        if stopped:
            break
    return number


def log_step(run: Run, pending: PendingStep, window: list[dict[str, float]]) -> None:
    """Add the metrics of a step to the window, and log the window if the step ends it.

    Raises:
        RuntimeError: The loss or the gradient is not finite; the batch is saved.
    """
    number, metrics, batch = pending
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if not values["finite"]:
        ids = ", ".join("\n".join(batch["id"][:4]).split("\n")[:4])
        path = run_log.dump_batch(run.workdir, number, batch, batch["id"], values)
        raise RuntimeError(
            f"step {number}: loss {values['loss']}, gradient norm {values['grad_norm']} is not "
            f"finite; the batch (ids {ids}, ...) is in {path}; this "
            f"step did not change the weights, and the newest checkpoint is intact"
        )
    window.append(values)
    if number % run.config.log.every == 0 or number == run.config.train.steps:
        row = summarize(window, run.program.task)
        row |= throughput.rates(run.log.clock, number, **run.speed)
        run_log.write_row(run.log, number, row)
        run_log.print_progress(run.log, number, run.config.train.steps, row)
        window.clear()


def summarize(window: list[dict[str, float]], task: Task) -> dict[str, float]:
    """Return means over the steps of a window; gradient norm and learning rate of the last one."""
    sums = {name: sum(values[name] for values in window) for name in window[0]}
    last = {name: window[-1][name] for name in ("grad_norm", "lr")}
    return {"loss": sums["loss"] / len(window), **task.finalize_metrics(sums), **last}


def actions_after(run: Run, number: int, stopped: bool) -> list[Callable]:
    """Return the functions of (run, state, number) to call after a step; saving comes last."""
    settings = run.config

    def is_time(every: int) -> bool:
        return number == settings.train.steps or bool(every and number % every == 0)

    actions: list[Callable] = []
    if run.draw_samples and is_time(settings.sample.every) and not stopped:
        actions.append(log_samples)
    if "eval_data" in run.data.descriptions and is_time(settings.evaluate.every) and not stopped:
        actions.append(log_evaluation)
    if is_time(settings.checkpoint.every) or stopped:
        actions.append(save_checkpoint)
    return actions


def log_samples(run: Run, state: TrainState, number: int) -> None:
    """Draw and log the sample grids."""
    for name, images, captions, columns in run.draw_samples(state):
        run_log.write_samples(run.log, number, images, captions, name=name, columns=columns)
    distributed.wait_for_all()


def log_evaluation(run: Run, state: TrainState, number: int) -> None:
    """Evaluate the averaged parameters on the evaluation data and log the metrics."""
    values = evaluate(run.program, state.ema, run.frozen, run.data)
    run_log.write_row(run.log, number, {f"eval/{name}": value for name, value in values.items()})
    name, value = next(iter(values.items()))
    run_log.print_line(run.log, f"step {number}: evaluation {name} {value:.4f}")


def save_checkpoint(run: Run, state: TrainState, number: int) -> None:
    """Save the state, with a record of the log up to it."""
    metadata = {**run.metadata, "step": number, "metrics": run_log.record(run.log)}
    orbax.save(run.writer, number, state, metadata)


def evaluate(program: Program, ema: Any, frozen: Any, data: RunData) -> dict[str, float]:
    """Return the metrics of the first `evaluate.rows` rows of the evaluation data."""
    settings, shape = run_config(program.cfg).evaluate, program.mesh.shape
    shards = shape["data"] * shape["fsdp"]
    batch_size = -(-settings.batch_size // shards) * shards  # no metric depends on it
    batches = data.task.reader.eval_batches(
        data.options("eval_data"), batch_size=batch_size, rows=host_rows(batch_size, program.mesh)
    )
    batches = likelihood.limit(batches, settings.rows, batch_size)
    return likelihood.evaluate(program, ema, frozen, batch_encoder.encoded(batches, data.codec))


def make_sample_fn(
    program: Program, frozen: Any, data: RunData
) -> Callable[[TrainState], Iterable[sample_grids.Grid]] | None:
    """Return a function from a state to its sample grids; None if none can be drawn."""
    cfg, task = program.cfg, program.task
    options = data.options(data.held_out_group)

    def sample_flow(state):
        model = FlowModel(
            cfg=cfg,
            model_config=task.model_config,
            params={**state.ema, **frozen},
            classes=data.classes,
            null_text=data.null_text,
        )
        return [sample_grids.draw_flow_grid(model, options)]

    def sample_reconstructions(state):
        return [sample_grids.draw_reconstruction_grid(program, state, frozen, options)]

    if task.sample_kind == "flow":
        return sample_flow
    if task.sample_kind == "reconstruction":
        return sample_reconstructions
    if task.sample_kind != "interleaved":
        return None
    codec = batch_encoder.decoder(data.descriptions["data"], data.codec)
    grids = sample_grids.prepare(cfg, task.model_config, options, codec, program.mesh)
    if isinstance(grids, str):
        if jax.process_index() == 0:
            print(f"no sample grids are drawn: {grids}", flush=True)
        return None
    return lambda state: sample_grids.draw_from_params(grids, {**state.ema, **frozen})


if __name__ == "__main__":
    allocator.keep_freed_memory()
    cli.run(main)
