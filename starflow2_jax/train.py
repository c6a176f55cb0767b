"""Train an experiment: same command and same workdir resume it.

python -m starflow2_jax.train --config experiments/tarflow_pixels.py:tiny --workdir runs/tiny
python -m starflow2_jax.train --config starflow2:tarflow_pixels:cifar --config.optim.lr=3e-4 --workdir runs/a
python -m starflow2_jax.train --config experiments/starflow_t2i.py:3b --layout fsdp --mesh fsdp=-1 --workdir runs/3b --dry_run
"""  # noqa: E501

import time
from collections.abc import Callable
from typing import Any

import jax
from absl import flags
from etils import epath
from ml_collections import config_flags

from starflow2_jax import config, params
from starflow2_jax.checkpoints import orbax, steps as step_folders
from starflow2_jax.evaluation import likelihood, sample_grids
from starflow2_jax.evaluation.report import run_report
from starflow2_jax.inference import flow_sampler as generation
from starflow2_jax.latents import batch_encoder
from starflow2_jax.mesh import host_rows, make_mesh
from starflow2_jax.runtime import allocator, cli, distributed
from starflow2_jax.training import init_from, program as programs
from starflow2_jax.training.logging import run_log as logs, throughput
from starflow2_jax.training.tasks import registry

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "FILE.py[:variant] or starflow2:NAME[:variant]"
)
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of checkpoints, metrics, samples, report")
_LAYOUT = flags.DEFINE_string("layout", None, "where weights live; overrides the config")
_MESH = flags.DEFINE_string("mesh", None, "such as data=2,fsdp=4; overrides the config")
_SEED = flags.DEFINE_integer("seed", None, "overrides the config")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "build, compile, print the tables, and end")

# Keys that may differ when a run goes on: they change where and what is shown, not what is learnt.
FREE_KEYS = (
    *("layout", "mesh", "attention", "log.", "checkpoint.", "data.threads", "eval_data.threads"),
    "distributed.",
    # Their contents are compared instead.
    *("teacher.path", "init.fae", "fae.path", "fae.lpips", "vlm.path"),
)
PATH_KEYS = ("data.path", "data.latents", "data.features", "data.mixture", "eval_data.")


def main(words: list[str]) -> None:
    """See the module's docstring."""
    if words:
        raise ValueError(f"unexpected argument {words[0]!r}")
    if _CONFIG.value is None or not (_WORKDIR.value or _DRY_RUN.value):
        raise ValueError("--config and --workdir are needed (--dry_run does without --workdir)")
    for name, flag in (("layout", _LAYOUT), ("mesh", _MESH), ("seed", _SEED)):
        if flag.value is not None:
            _CONFIG.value[name] = flag.value
    train(config.to_dict(_CONFIG.value), _WORKDIR.value, dry_run=_DRY_RUN.value)


def train(cfg: dict[str, Any], workdir: str | None, *, dry_run: bool = False) -> None:
    """Run or resume an experiment.

    Args:
        cfg: a resolved configuration (`config.to_dict`).

    Raises:
        ValueError: a bad key, data or checkpoint, or a workdir of another configuration.
        RuntimeError: a step that was not finite (its batch is dumped), or a save that failed.
    """
    # ------------------------------------------------------------- configuration, data, workdir
    config.check(cfg)
    distributed.init_distributed(cfg["distributed"])
    distributed.assert_equal_across_processes("the configuration", cfg)
    task = registry.make_task(cfg, dry_run=dry_run)
    model, reader = task.model_config, task.reader
    fae = batch_encoder.open(cfg, getattr(model, "flow", model))
    of = lambda group: batch_encoder.options(task.data_options(group), fae)
    data = None
    if not dry_run:
        given = [group for group in ("data", "eval_data") if _given(cfg[group])]
        data = {
            g: batch_encoder.describe(reader.describe(of(g)), fae, f"{g}.latents") for g in given
        }
        if "data" not in data:
            raise ValueError("config: data.path or data.mixture is needed")
        distributed.assert_equal_across_processes(
            "the data", {group: told["fingerprints"] for group, told in data.items()}
        )
        _check_classes(cfg, data)

    null_text = _null_text(data["data"]) if data else None
    steps, newest = cfg["train"]["steps"], None
    if not dry_run:
        workdir = epath.Path(workdir)
        distributed.assert_equal_across_processes(
            f"what they see in {workdir}", {"newest step": step_folders.latest(workdir)}
        )
        newest = _check_workdir(workdir, cfg, data)
        if newest == steps:
            if not (workdir / run_report.FILE).exists():
                run_report.write(workdir)  # the run was killed between its last step and this
            print(f"{workdir} is finished: step {newest} of {steps}", flush=True)
            return

    # ----------------------------------------------------------------------------- mesh, program
    cli.use_compilation_cache()
    mesh = make_mesh(cfg["mesh"])
    peak = throughput.peak_flops()  # on one device, so before a mesh is set
    jax.set_mesh(mesh)
    if null_text is not None:
        task = registry.make_task(cfg, null_text=null_text)
    program = programs.build_program(cfg, mesh, task)
    if jax.process_index() == 0:
        print(overview(program), flush=True)
    began = time.perf_counter()
    compiled = program.lower_step().compile()
    print(f"compiled in {time.perf_counter() - began:.1f} s; {_memory(compiled)}", flush=True)
    if dry_run:
        return
    distributed.wait_for_all()

    # ------------------------------------------------------------------------------------- start
    state, frozen = program.init(jax.random.key(cfg["seed"]))
    frozen_files = {**task.frozen_identity(), **batch_encoder.identity(data["data"])}
    if newest is not None:  # 1. resume
        del state
        state, then = orbax.restore(workdir, newest, program.abstract_state)
        orbax.check_frozen(workdir, then, frozen_files)
        print(f"resumed {workdir} at step {newest}", flush=True)
    elif cfg["init"]["from"]:  # 2. weights of another run
        state = init_from.init_from_checkpoint(
            program, state, cfg["init"]["from"], ema=cfg["init"]["ema"], identity=frozen_files
        )
        print(f"started from the weights of {cfg['init']['from']}", flush=True)
    # 3. otherwise from the initialised weights
    first = newest or 0
    classes = data["data"]["classes"]
    meta = {
        "config": cfg,
        "data": data,
        "classes": classes,
        "null_text": null_text,
        "frozen": frozen_files,
        "versions": logs.environment(),
    }
    logs.save_config(workdir, cfg)
    log = logs.open(workdir, cfg, step=first)
    writer = orbax.open(
        workdir,
        keep=cfg["checkpoint"]["keep"],
        keep_every=cfg["checkpoint"]["keep_every"] or None,
    )
    show = _shower(program, frozen, data, of, fae) if cfg["sample"]["every"] else None
    stop_asked = distributed.preemption_handler()
    batches = reader.batches(
        of("data"),
        batch_size=cfg["train"]["batch_size"],
        start_step=first,
        rows=host_rows(cfg["train"]["batch_size"], mesh),
    )
    batches = batch_encoder.encoded(batches, fae)
    work = {**task.step_cost(), "peak": peak}
    window: list[dict[str, Any]] = []
    waiting = None

    def settle() -> None:
        """Read the figures of the last step; stop where they are not finite."""
        number, metrics, batch = waiting
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not values["finite"]:
            arrays = {name: a for name, a in batch.items() if name != "id"}
            path = logs.dump(workdir, number, arrays, batch["id"], values)
            raise RuntimeError(
                f"step {number}: loss {values['loss']}, gradient norm {values['grad_norm']} is not "
                f"finite; the batch (ids {', '.join(batch['id'][:4])}, ...) is in {path}; weights "
                f"of this step were not changed, the newest checkpoint is intact"
            )
        window.append(values)
        if number % cfg["log"]["every"] == 0 or number == steps:
            row = _summary(window, task.finalize_metrics)
            row |= throughput.rates(log.clock, number, **work)
            logs.row(log, number, row)
            logs.progress(log, number, steps, row)
            window.clear()

    # -------------------------------------------------------------------------------------- loop
    profile = tuple(cfg["log"]["profile_steps"])
    number, stopped = first, False
    try:
        for number in range(first + 1, steps + 1):
            if profile and number == profile[0]:
                jax.profiler.start_trace(str(workdir / "profile"))
            batch = next(batches)
            state, metrics = compiled(state, frozen, programs.to_device(program, batch))
            if waiting is not None:
                settle()  # one step late, so that the device never waits for the host
            waiting = (number, metrics, batch)
            if profile and number == profile[1]:
                jax.block_until_ready(metrics)
                jax.profiler.stop_trace()
            stopped = stop_asked(number) and number < steps
            last = number == steps or stopped
            due = lambda every: last or (every and number % every == 0)  # noqa: B023
            showing = due(cfg["sample"]["every"]) and cfg["sample"]["every"] and not stopped
            measuring = due(cfg["evaluate"]["every"]) and "eval_data" in data and not stopped
            saving = due(cfg["checkpoint"]["every"])
            if showing or measuring or saving:
                settle()
                waiting = None
            if showing and show is not None:
                with throughput.pause(log.clock, after=metrics):
                    for name, images, captions, columns in show(state):
                        logs.samples(log, number, images, captions, name=name, columns=columns)
                    distributed.wait_for_all()
            if measuring:
                with throughput.pause(log.clock, after=metrics):
                    _evaluate(program, state, frozen, log, number, of("eval_data"), fae)
            if saving:  # last: a step that is restored has all that belongs to it
                with throughput.pause(log.clock, after=metrics):
                    orbax.save(writer, number, state, {**meta, "step": number})
                    logs.upload(log)
            if stopped:
                break
        orbax.wait(writer)
    finally:
        orbax.close(writer)
        logs.close(log)
    if stopped:
        print(f"stopped by SIGTERM at step {number}, saved; the same command resumes", flush=True)
        return
    if jax.process_index() == 0:
        print(f"done: {run_report.write(workdir)}", flush=True)


# ------------------------------------------------------------------------------------------ pieces


def overview(program: programs.Program) -> str:
    """The table of weights, trained or frozen, and what the run is."""
    trained = set(program.cfg["train"]["trainable"])
    where = params.flatten(
        params.shardings(program.task.declared, program.mesh, program.cfg["layout"])
    )

    def note(name):
        kind = "trained" if name.split("/")[0] in trained else "frozen"
        axes = [str(axis) for axis in where[name].spec if axis]
        return f"{kind} {'x'.join(axes)}".rstrip()

    shape = (
        ", ".join(f"{axis}={n}" for axis, n in program.mesh.shape.items() if n > 1) or "1 device"
    )
    lines = params.table(program.task.declared, note)
    return "\n".join([*lines, f"layout {program.cfg['layout']} over {shape}"])


def _memory(compiled: Any) -> str:
    found = compiled.memory_analysis()
    parts = {
        "arguments": found.argument_size_in_bytes,
        "outputs": found.output_size_in_bytes,
        "aliased": found.alias_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
    }
    return "per device: " + ", ".join(f"{n} {b / 2**20:,.0f} MiB" for n, b in parts.items())


def _given(group: dict[str, Any]) -> bool:
    return bool(group["path"] or group["mixture"])


def _check_classes(cfg: dict[str, Any], data: dict[str, Any]) -> None:
    """ValueError where labels are not those of the model: a number too high would go unnoticed."""
    wanted = cfg["model"].get("classes", 0)
    for group, told in data.items() if wanted else ():
        count = len(told["classes"] or ()) if cfg[group]["labels"] else 0
        if count != wanted:
            raise ValueError(f"config: model.classes={wanted}, but {group} gives {count} classes")
        if told["classes"] != data["data"]["classes"]:
            raise ValueError(f"config: the classes of {group} are not those of data")


def _check_workdir(workdir: epath.Path, cfg: dict[str, Any], data: dict[str, Any]) -> int | None:
    """The newest step to resume from, None in a new workdir.

    Raises:
        ValueError: the workdir is another experiment's, its data have changed, or its newest step
            is there in part.
    """
    step_folders.check_copied(workdir)
    newest = step_folders.latest(workdir)
    saved = logs.read_config(workdir)
    if saved is None:
        return newest
    moved = newest is not None and _fingerprints(orbax.read_meta(workdir)["data"])
    same_data = moved == _fingerprints(data)
    free = FREE_KEYS + (PATH_KEYS if same_data else ())
    differing = [row for row in config.differences(saved, cfg) if not row.startswith(free)]
    if differing:
        raise ValueError(f"{workdir} holds another configuration:\n  " + "\n  ".join(differing))
    if newest is not None and not same_data:
        raise ValueError(
            f"{workdir}: the data have changed since step {newest}: fingerprints {moved} then, "
            f"{_fingerprints(data)} now"
        )
    return newest


def _null_text(data: dict[str, Any]) -> list | None:
    """Features of the empty prompt, as `prepare features` keeps them."""
    for features in data["features"]:
        if "null_text" in features:
            return features["null_text"]
    return None


def _fingerprints(data: dict[str, Any]) -> list[str]:
    """Of the records, and of the encoder where latents are read."""
    told = data["data"]
    encoders = [features.get("fae") for features in told["features"]]
    return [*told["fingerprints"], *(encoder["sha256"] for encoder in encoders if encoder)]


def _summary(window: list[dict[str, Any]], means: Callable) -> dict[str, float]:
    """Means over the steps since the last row; gradient norm and rate of the newest."""
    sums = {name: sum(values[name] for values in window) for name in window[0]}
    newest = {name: window[-1][name] for name in ("grad_norm", "lr")}
    return {"loss": sums["loss"] / len(window), **means(sums), **newest}


def _shower(program, frozen, data, of, fae) -> Callable | None:
    """A function of the state that draws what sample grids show; None where nothing is drawn."""
    cfg, task = program.cfg, program.task
    model = task.model_config
    group = "eval_data" if "eval_data" in data else "data"
    if task.sample_kind == "flow":
        told = data["data"]
        held = ("", tuple(told["classes"] or ()), _null_text(told))

        def flow(state):
            shown = generation.FlowModel(cfg, model, {**state.ema, **frozen}, *held)
            return [sample_grids.draw_flow_grid(shown, of(group))]

        return flow
    if task.sample_kind == "interleaved":
        codec = batch_encoder.decoder(data["data"], fae)
        grids = sample_grids.prepare(cfg, model, of(group), codec, program.mesh)
        if isinstance(grids, str):
            if jax.process_index() == 0:
                print(f"no sample grids are drawn: {grids}", flush=True)
            return None
        return lambda state: sample_grids.draw_from_params(grids, {**state.ema, **frozen})
    if not task.sample_kind:
        return None
    options = of(group)
    return lambda state: [sample_grids.draw_reconstruction_grid(program, state, frozen, options)]


def _evaluate(program, state, frozen, log, number, options, fae=None) -> None:
    evaluate = program.cfg["evaluate"]
    ways = program.mesh.shape["data"] * program.mesh.shape["fsdp"]
    size = -(-evaluate["batch_size"] // ways) * ways  # no figure depends on it
    batches = program.task.reader.eval_batches(
        options, batch_size=size, rows=host_rows(size, program.mesh)
    )
    batches = batch_encoder.encoded(likelihood.limit(batches, evaluate["rows"], size), fae)
    values = likelihood.evaluate(program, state.ema, frozen, batches)
    logs.row(log, number, {f"eval/{name}": value for name, value in values.items()})
    first = "{} {:.4f}".format(*next(iter(values.items())))
    logs.say(log, f"step {number}: evaluation {first}")


if __name__ == "__main__":
    allocator.keep_freed_memory()
    cli.run(main)
