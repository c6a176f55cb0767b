"""Times training, sampling, reading and loading on this machine, beside what the machine can do.

python -m starflow2_jax.bench machine --json
python -m starflow2_jax.bench train --preset peer_starflow
python -m starflow2_jax.bench sample --preset peer_starflow --batch 8 --guidance 2.5

The presets are the work of two published PyTorch programs at a small size: random weights (proj_out
of standard deviation 0.005), Gaussian input, the same batch at every step. A training step is
forward, loss without regulariser, backward and AdamW; sampling is every block with a cache. They
need nothing but jax, flax, optax, numpy and absl. `train --config` runs an experiment's own step.

Times are medians of --repeats after two warm-up runs. `cores_elsewhere` says how many cores other
processes used meanwhile: where it is not near 0, take the minimum, or measure again. Beside PyTorch
on the same machine: tests/peer/side_by_side.py.
"""

import dataclasses
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from starflow2_jax import command
from starflow2_jax import params as weights
from starflow2_jax.generation.guidance import Guidance
from starflow2_jax.generation.inverse import Jacobi, inverse, is_guided
from starflow2_jax.models import flops, flow
from starflow2_jax.models.flow import FlowConfig
from starflow2_jax.training.loss import flow_loss

VERBS = {
    "machine": "matmul rates and memory bandwidth",
    "train": "a training step (--preset or --config)",
    "sample": "a batch of samples (--preset --batch --guidance --jacobi)",
    "data": "images/s of a dataset folder through the pipeline (--data)",
    "load": "time and memory to read a trained model (--model)",
}
PRESETS = {
    "peer_tarflow": flow.tarflow(16, 12, 256, (4, 4, 4, 4)),
    "peer_starflow": FlowConfig(
        side=16,
        channels=16,
        width=512,
        layers=(2, 2, 2, 8),
        order="L2R",
        soft_clip=4.0,
        final_norm=True,
        text_channels=768,
        text_length=32,
    ),
}
TRAIN_ROWS = {"peer_tarflow": 8, "peer_starflow": 4}
WARM_UP = 2
Result = dict[str, Any]


def define(values: flags.FlagValues) -> None:
    """Defines the flags of this command."""
    flags.DEFINE_enum("preset", None, list(PRESETS), "train, sample: work that is fixed here",
                      flag_values=values)  # fmt: skip
    flags.DEFINE_integer("batch", None, "rows; the default is 8 and 4 in training, 1 in sampling, "
                         "64 in data", 1, flag_values=values)  # fmt: skip
    flags.DEFINE_float("guidance", 0.0, "sample: guidance weight", 0.0, flag_values=values)
    flags.DEFINE_string("jacobi", None, "sample: BLOCK,THRESHOLD of Jacobi iteration instead of "
                        "sequential sampling", flag_values=values)  # fmt: skip
    flags.DEFINE_enum("compute_dtype", "float32", ("float32", "bfloat16"), "presets: dtype of "
                      "matmuls", flag_values=values)  # fmt: skip
    flags.DEFINE_string("data", None, "data: dataset folder", flag_values=values)
    flags.DEFINE_string("model", None, "load: workdir, step or model folder", flag_values=values)
    flags.DEFINE_integer("repeats", 9, "timed runs", 1, flag_values=values)
    flags.DEFINE_boolean("json", False, "print the result as JSON", flag_values=values)
    try:
        from ml_collections import config_flags
    except ImportError:  # A machine where only presets are timed.
        return
    config_flags.DEFINE_config_file("config", None, "train: FILE.py[:variant]", flag_values=values)


# ----------------------------------------------------------------------------------------- timing


def timed(run: Callable[[], Any], repeats: int, warm_up: int = WARM_UP) -> Result:
    """Milliseconds of `run`, whose result is waited for, and memory while it ran.

    Returns:
        `ms` (median), `ms_min`, `ms_max`, `repeats`; `cores_elsewhere`, mean number of cores that
        other processes kept busy, and `peak_mb`, None where the system does not tell.
    """
    for _ in range(warm_up):
        jax.block_until_ready(run())
    _forget_peak()
    took, began, busy, own = [], time.perf_counter(), _busy_seconds(), time.process_time()
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        took.append(1000 * (time.perf_counter() - start))
    elsewhere = None
    if busy is not None:
        others = _busy_seconds() - busy - (time.process_time() - own)
        elsewhere = round(max(others, 0.0) / (time.perf_counter() - began), 2)
    return {
        "ms": statistics.median(took),
        "ms_min": min(took),
        "ms_max": max(took),
        "repeats": repeats,
        "cores_elsewhere": elsewhere,
        "peak_mb": _peak_mb(),
    }


def _busy_seconds() -> float | None:
    """Seconds of all cores spent on anything so far, time taken by the hypervisor included."""
    if not os.access("/proc/stat", os.R_OK):
        return None
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _idle, _wait, irq, soft, steal = (int(n) for n in fields[:8])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def _forget_peak() -> None:
    """Start the kernel's record of this process's peak memory anew, where there is one."""
    if os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_mb() -> float | None:
    """Peak memory of the device, or on a CPU of the process, since `_forget_peak`."""
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    return _status_mb("VmHWM") if peak is None else peak / 2**20


def _status_mb(name: str) -> float | None:
    """A line of the kernel's account of this process: VmRSS is resident now, VmHWM at most."""
    if not os.access("/proc/self/status", os.R_OK):
        return None
    rows = Path("/proc/self/status").read_text().splitlines()
    return next((int(row.split()[1]) / 1024 for row in rows if row.startswith(name)), None)


def compiled(function: Any, *args: Any) -> tuple[Callable, float]:
    """A jitted `function` compiled for `args`, and the seconds that took."""
    start = time.perf_counter()
    ready = function.lower(*args).compile()
    return ready, time.perf_counter() - start


# ---------------------------------------------------------------------------------------- machine


def machine(repeats: int = 9, side: int = 2048, pairs: int = 20) -> Result:
    """What the default device can do: the rates beside which the other rows are set.

    Args:
        side: of the square matrices that are multiplied; pairs: of a 512 x 2048 and a 2048 x 512
            float32 matrix (8 MiB together) that are copied, added up, and multiplied with a vector
            in turn, as a decode step does. 20 of them exceed the caches of a CPU.
    """
    rates: Result = {}
    for dtype in ("float32", "bfloat16"):
        a = jax.random.normal(jax.random.key(0), (side, side), dtype)
        ms = timed(partial(jax.jit(jnp.matmul), a, a), repeats)["ms"]
        rates[f"matmul_{dtype}_gflops"] = 2 * side**3 / ms / 1e6
    whole = jnp.ones((pairs * 1024, 2048))
    held = [whole + 0]
    double = jax.jit(lambda w: w * 2, donate_argnums=0)

    def scale():
        # In place: a new array would be timed with the kernel's work of providing its pages.
        held[0] = double(held[0])
        return held[0]

    def decode(h, *pairs):
        for up, down in pairs:
            h = jnp.tanh(h @ up) @ down
        return h

    pair = lambda i: (jnp.full((512, 2048), 1e-3 * i), jnp.full((2048, 512), 1e-3 * i))
    for name, moved, run in (
        ("copy", 2 * whole.nbytes, scale),
        ("sum", whole.nbytes, partial(jax.jit(jnp.sum), whole)),
        (
            "matvec",
            whole.nbytes,
            partial(jax.jit(decode), jnp.ones((1, 512)), *map(pair, range(pairs))),
        ),
    ):
        rates[f"{name}_gb_per_s"] = moved / timed(run, repeats)["ms"] / 1e6
    return {**about(), **rates}


def about() -> Result:
    """The machine and the versions that a row was measured with."""
    device = jax.devices()[0]
    return {
        "device": f"{jax.device_count()} x {device.device_kind}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def shares(ms: float, rates: Result, work: float, moved: float = 0.0) -> Result:
    """What `ms` for `work` FLOPs and `moved` bytes means, beside the rates of `machine`.

    Returns:
        `gflop`, `gflops` (a second) and its share of the float32 matmul rate; where bytes are given
        `bound_ms`, the time that reading them takes at the best bandwidth, and its share.
    """
    gflops = work / ms / 1e6
    found = {"gflop": work / 1e9, "gflops": gflops}
    found["share_of_matmul_rate"] = gflops / rates["matmul_float32_gflops"]
    if moved:
        best = max(rate for name, rate in rates.items() if name.endswith("gb_per_s"))
        found |= {"gb": moved / 1e9, "gb_per_s": moved / ms / 1e6, "machine_gb_per_s": best}
        found |= {"bound_ms": moved / best / 1e6, "share_of_bound": moved / best / 1e6 / ms}
    return found


# ------------------------------------------------------------------------------- the peers' work


def preset(name: str, dtype: str = "float32", classes: int = 0) -> tuple[FlowConfig, Any]:
    """The flow of a preset and its random weights."""
    own = None if dtype == "float32" else dtype
    cfg = dataclasses.replace(PRESETS[name], compute_dtype=own, classes=classes)
    params = weights.init(jax.random.key(0), flow.declare(cfg))
    for i, block in params["blocks"].items():
        head = block["proj_out"]
        key = jax.random.fold_in(jax.random.key(1), int(i))
        head["weight"] = 0.005 * jax.random.normal(key, head["weight"].shape)
    return cfg, params


def preset_inputs(cfg: FlowConfig, rows: int) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Gaussian tokens [B, T, D], and what the flow is conditioned on."""
    keys = jax.random.split(jax.random.key(2), 3)
    x, given = jax.random.normal(keys[0], (rows, cfg.tokens, cfg.channels)), {}
    if cfg.text_channels:
        shape = (rows, cfg.text_length, cfg.text_channels)
        given["text"] = jax.random.normal(keys[1], shape)
    if cfg.classes:
        given["labels"] = jax.random.randint(keys[2], (rows,), 0, cfg.classes)
    return x, given


def train_preset(name: str, rows: int | None, dtype: str, repeats: int, rates: Result) -> Result:
    """A training step of a preset; `rates` are those of `machine`."""
    cfg, params = preset(name, dtype)
    rows = rows or TRAIN_ROWS[name]
    x, given = preset_inputs(cfg, rows)
    adamw = optax.adamw(1e-4, b1=0.9, b2=0.95, weight_decay=1e-4)

    def step(params, moments, x, given):
        loss = lambda params: flow_loss(params, x, cfg, **given)[0].sum() / x.size
        value, grads = jax.value_and_grad(loss)(params)
        updates, moments = adamw.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, value

    held = [params, adamw.init(params)]
    ready, seconds = compiled(jax.jit(step, donate_argnums=(0, 1)), *held, x, given)

    def run():
        *held[:], loss = ready(*held, x, given)
        return loss

    row = {"row": f"train {name}", "batch": rows, "dtype": dtype, "compile_s": seconds}
    row |= timed(run, repeats)
    row["tokens_per_s"] = 1000 * rows * cfg.tokens / row["ms"]
    return row | shares(row["ms"], rates, flops.train_step(cfg, rows, cfg.tokens, cfg.text_length))


def sample_preset(
    name: str,
    rows: int,
    guidance: float,
    jacobi: Jacobi | None,
    dtype: str,
    repeats: int,
    rates: Result,
) -> Result:
    """A batch of samples of a preset, all blocks; `rates` are those of `machine`."""
    tarflow = name == "peer_tarflow"
    cfg, params = preset(name, dtype, 10 if guidance and tarflow else 0)
    z, given = preset_inputs(cfg, rows)
    if guidance:
        rule, on = ("linear_log_scale", "unconditional") if tarflow else ("product", "all")
        given["guidance"] = Guidance(guidance, rule=rule, temperature_on=on)
    draw = lambda params, z, given: inverse(params, z, cfg, jacobi=jacobi, **given)
    ready, seconds = compiled(jax.jit(draw), params, z, given)
    row = {"row": f"sample {name}", "batch": rows, "dtype": dtype, "guidance": guidance}
    row |= {"jacobi": f"{jacobi.block},{jacobi.threshold:g}" if jacobi else None}
    row |= {"compile_s": seconds, **timed(lambda: ready(params, z, given), repeats)}
    passes = np.asarray(ready(params, z, given)[1]["passes"])
    work = moved = 0
    for i, count in enumerate(passes.tolist()):
        doubled = rows * (2 if is_guided(given.get("guidance"), cfg.block(i)) else 1)
        share = count * (jacobi.block if jacobi else 1) / cfg.tokens
        work += share * doubled * flops.block_forward(cfg, i, cfg.tokens, cfg.text_length, True)
        size = jnp.dtype(dtype).itemsize
        moved += count * flops.pass_bytes(cfg, i, doubled, cfg.tokens, cfg.text_length, size)
    row |= {"passes": int(passes.sum()), "tokens_per_s": 1000 * rows * cfg.tokens / row["ms"]}
    return row | shares(row["ms"], rates, work, moved)


# -------------------------------------------------------------------- experiments, data and models


def train_experiment(cfg: Mapping[str, Any], repeats: int, rates: Result) -> Result:
    """The step of an experiment as `train` runs it, over one random batch again and again.

    Raises:
        ValueError: what `config.check` and `step.build` say of the configuration.
    """
    from starflow2_jax import config
    from starflow2_jax.mesh import make_mesh
    from starflow2_jax.training import step

    config.check(cfg)
    program = step.build(cfg, make_mesh(cfg["mesh"]))
    draw = np.random.default_rng(0)

    def array(spec):
        if spec.dtype == jnp.uint8:
            return draw.integers(0, 256, spec.shape, np.uint8)
        if jnp.issubdtype(spec.dtype, jnp.integer):
            return np.zeros(spec.shape, spec.dtype)
        return draw.standard_normal(spec.shape, np.float32)

    share = lambda spec: spec.update(shape=(spec.shape[0] // jax.process_count(), *spec.shape[1:]))
    batch = {name: array(share(spec)) for name, spec in program.abstract_batch.items()}
    batch = step.to_device(program, batch)
    start = time.perf_counter()
    ready = program.lower_step().compile()
    seconds = time.perf_counter() - start
    with jax.set_mesh(program.mesh):
        state, frozen = program.init(jax.random.key(cfg["seed"]))
    held = [state]

    def run():
        held[0], metrics = ready(held[0], frozen, batch)
        return metrics

    model, rows = program.model, cfg["train"]["batch_size"]
    row = {"row": f"train {cfg['name'] or 'experiment'}", "batch": rows}
    row |= {"dtype": cfg["compute_dtype"], "compile_s": seconds, **timed(run, repeats)}
    row["tokens_per_s"] = 1000 * rows * model.tokens / row["ms"]
    work = flops.train_step(model, rows, model.tokens, model.text_length)
    return row | shares(row["ms"], rates, work)


def read_data(folder: str, rows: int, repeats: int) -> Result:
    """Decoded images/s of a dataset folder: read in one thread, and by the loader's threads.

    Images are scaled and cropped to squares of the first one's short side, where they are not.

    Raises:
        DatasetError: the folder is not a dataset.
    """
    from starflow2_jax.data import pipeline, records

    first = records.read(folder)[0]
    pixels = min(first.imgs[0].h, first.imgs[0].w)
    options = {"path": folder, "pixels": pixels, "resize": "center_crop"}
    row: Result = {"row": f"data {folder}", "batch": rows, "pixels": pixels}
    for name, threads in (("one_thread", 0), ("loader", 4)):
        stream = pipeline.batches({**options, "threads": threads}, batch_size=rows)
        found = timed(lambda stream=stream: next(stream)["image"].sum(), repeats)
        row[f"{name}_images_per_s"] = 1000 * rows / found["ms"]
        row |= {f"{name}_{key}": value for key, value in found.items()}
    return row


def read_model(path: str, repeats: int) -> Result:
    """Time and peak memory to read a workdir, a step or a model folder, digests checked.

    Raises:
        FileNotFoundError, ValueError: as `generation.model.load`.
    """
    from starflow2_jax.generation import model

    before = _status_mb("VmRSS")
    found = timed(lambda: model.load(path).params, repeats, warm_up=1)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.load(path).params))
    row = {"row": f"load {path}", "model_mb": size / 2**20, "before_mb": before, **found}
    return row | {"mb_per_s": size / 2**20 / found["ms"] * 1000}


# ---------------------------------------------------------------------------------------- command


def lines(row: Result) -> list[str]:
    """A result for people: a name, a value with as many digits as it deserves."""
    shown = {name: value for name, value in row.items() if value is not None}
    wide = max(map(len, shown))
    number = lambda v: f"{v:,.4g}" if isinstance(v, float) and abs(v) < 1e4 else f"{v:,.0f}"
    text = lambda v: number(v) if isinstance(v, float) else str(v)
    return [f"{name:{wide}}  {text(value)}" for name, value in shown.items()]


def parse_jacobi(text: str | None) -> Jacobi | None:
    """`"16,1e-3"` to its block and threshold; ValueError says what was expected."""
    if not text:
        return None
    try:
        block, threshold = text.split(",")
        return Jacobi(int(block), float(threshold))
    except ValueError:
        expected = "expected BLOCK,THRESHOLD such as 16,1e-3"
        raise ValueError(f"--jacobi={text!r}: {expected}") from None


def main(verb: str, words: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
    """Runs one verb and prints its result."""
    if words:
        raise ValueError(f"unexpected argument {words[0]!r}")
    experiment = values["config"].value if "config" in values else None
    repeats, dtype = values.repeats, values.compute_dtype
    if verb == "machine":
        row = machine(repeats)
    elif verb == "train" and experiment is not None and not values.preset:
        row = train_experiment(experiment, repeats, machine())
    elif verb in ("train", "sample") and not values.preset:
        raise ValueError(f"bench {verb}: --preset is needed: {' or '.join(PRESETS)}")
    elif verb == "train":
        row = train_preset(values.preset, values.batch, dtype, repeats, machine())
    elif verb == "sample":
        how = (values.guidance, parse_jacobi(values.jacobi), dtype, repeats, machine())
        row = sample_preset(values.preset, values.batch or 1, *how)
    elif verb == "data":
        row = read_data(needed(values, "data"), values.batch or 64, repeats)
    else:
        row = read_model(needed(values, "model"), repeats)
    row = {**about(), **row}
    print(json.dumps(row, indent=2) if values.json else "\n".join(lines(row)))


def needed(values: flags.FlagValues, name: str) -> str:
    """A flag's value, or a ValueError that it is missing."""
    if not values[name].value:
        raise ValueError(f"bench: --{name} is needed")
    return values[name].value


if __name__ == "__main__":
    define(flags.FLAGS)
    command.run(main, VERBS)
