"""Time training, sampling, data reading and model loading, next to the rates of the machine.

python -m starflow2_jax.bench machine --json
python -m starflow2_jax.bench train --preset peer_starflow
python -m starflow2_jax.bench sample --preset peer_starflow --batch 8 --guidance 2.5
python -m starflow2_jax.bench train --preset stage3 --batch 4 --json
python -m starflow2_jax.bench train --config experiments/stage3_joint.py:tiny --breakdown
python -m starflow2_jax.bench data --step_ms 306 --hosts 32

The peer presets repeat the work of two published PyTorch programs at a small size: random weights
(proj_out of standard deviation 0.005), Gaussian input, the same batch at every step. A training
step is forward, loss without regularizer, backward and AdamW; sampling runs every block with a
cache. `stage1` and `stage3` are the stages of STARFlow2 in bfloat16, with `--size paper` by
default: training runs the step of `train` on rows full of images; sampling draws an image and text
after a prompt. Presets need only jax, flax, optax, numpy and absl. `train --config` times the step
of an experiment. `train --breakdown` also times its parts, which add up to the step within 5%
(`benchmarking.breakdown`); of an experiment it reads the data, too. `data` writes captioned JPEGs
and reads them as rows of stage 1 at paper size; the step of a plan says how many cores of a host
that takes. `growth` plots costs by sizes.

Times are medians of --repeats after three warm-up runs. `cores_elsewhere` is the number of cores
that other processes used; if it is not near 0, take the minimum or measure again. A comparison
with PyTorch on the same machine is in tests/peer/side_by_side.py.
"""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from starflow2_jax.benchmarking import breakdown, stages
from starflow2_jax.benchmarking.timing import (
    Result,
    compile_timed,
    describe_machine,
    machine_rates,
    measure,
    status_mb,
    utilization,
)
from starflow2_jax.inference.guidance import Guidance
from starflow2_jax.inference.inverse import Jacobi, inverse, is_guided, prepare_params
from starflow2_jax.models import flops, flow, starflow2
from starflow2_jax.models.flow import Conditioning, FlowConfig
from starflow2_jax.params import init as init_params
from starflow2_jax.runtime import allocator, cli
from starflow2_jax.training.losses.flow import flow_loss

VERBS = {
    "machine": "matmul rates and memory bandwidth",
    "train": "a training step (--preset or --config)",
    "sample": "a batch of samples (--preset --batch --guidance --jacobi)",
    "data": "images/s of interleaved rows, or of a dataset folder's images (--data)",
    "growth": "cost by sizes of rows, batches, data sets and checkpoints (--only --records --out)",
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


def define(values: flags.FlagValues) -> None:
    """Define the flags of this command."""
    flags.DEFINE_enum("preset", None, [*PRESETS, *stages.STAGES], "train, sample: a workload "
                      "of fixed size", flag_values=values)  # fmt: skip
    flags.DEFINE_enum("size", "paper", list(starflow2.PRESETS), "presets stage1, stage3: "
                      "size of the model", flag_values=values)  # fmt: skip
    cli.define_integer("batch", None, "rows; the default is 8 and 4 in training (stages: 4 a "
                         "device), 1 in sampling, 64 in data", 1, 100_000_000,
                       flag_values=values)  # fmt: skip
    cli.define_number("guidance", 0.0, "sample: guidance weight", flag_values=values)
    flags.DEFINE_string("jacobi", None, "sample: BLOCK,THRESHOLD of Jacobi iteration instead of "
                        "sequential sampling", flag_values=values)  # fmt: skip
    flags.DEFINE_enum("compute_dtype", None, ("float32", "bfloat16"), "presets: dtype of matmuls; "
                      "the default is bfloat16 for stages, else float32",
                      flag_values=values)  # fmt: skip
    flags.DEFINE_string("data", None, "data: dataset folder", flag_values=values)
    cli.define_number("step_ms", 306.0, "data: step of 256 rows, by a plan", flag_values=values)
    cli.define_integer("hosts", 32, "data: hosts that share these rows", 1, 1_000_000,
                       flag_values=values)  # fmt: skip
    flags.DEFINE_list("only", ["train", "sample", "checkpoints"], "growth: parts, of train, "
                      "sample, checkpoints, data", flag_values=values)  # fmt: skip
    cli.define_integer("records", 100_000, "growth: records of the largest data set", 10_000,
                       100_000_000, flag_values=values)  # fmt: skip
    flags.DEFINE_string("out", None, "growth: folder of growth.json and growth.png",
                        flag_values=values)  # fmt: skip
    flags.DEFINE_string("model", None, "load: workdir, step or model folder", flag_values=values)
    cli.define_integer("repeats", 9, "timed runs", 1, 1_000_000, flag_values=values)
    flags.DEFINE_boolean("breakdown", False, "train: the parts of the step in ms, and their sum",
                         flag_values=values)  # fmt: skip
    flags.DEFINE_boolean("json", False, "print the result as JSON", flag_values=values)
    try:
        from ml_collections import config_flags
    except ImportError:  # On a bare machine only presets are timed.
        return
    config_flags.DEFINE_config_file("config", None, "train: FILE.py[:variant] or "
                                    "starflow2:NAME[:variant]", flag_values=values)  # fmt: skip


# ------------------------------------------------------------------------------- peer presets


def preset(name: str, dtype: str = "float32", classes: int = 0) -> tuple[FlowConfig, Any]:
    """Return the flow of a preset and its random weights."""
    compute_dtype = None if dtype == "float32" else dtype
    cfg = dataclasses.replace(PRESETS[name], compute_dtype=compute_dtype, classes=classes)
    params = init_params(jax.random.key(0), flow.declare(cfg))
    for i, block in params["blocks"].items():
        head = block["proj_out"]
        key = jax.random.fold_in(jax.random.key(1), int(i))
        head["weight"] = 0.005 * jax.random.normal(key, head["weight"].shape)
    return cfg, params


def preset_inputs(cfg: FlowConfig, rows: int) -> tuple[jax.Array, Conditioning]:
    """Return Gaussian tokens [B, T, D] and the conditioning of the flow."""
    keys = jax.random.split(jax.random.key(2), 3)
    x = jax.random.normal(keys[0], (rows, cfg.tokens, cfg.channels))
    text = labels = None
    if cfg.text_channels:
        shape = (rows, cfg.text_length, cfg.text_channels)
        text = jax.random.normal(keys[1], shape)
    if cfg.classes:
        labels = jax.random.randint(keys[2], (rows,), 0, cfg.classes)
    return x, Conditioning(text=text, labels=labels)


def train_preset(
    name: str,
    rows: int | None,
    dtype: str,
    repeats: int,
    rates: Result,
    *,
    with_parts: bool = False,
) -> Result:
    """Time a training step of a preset; `rates` are those of `machine_rates`.

    `with_parts` adds the entries of `breakdown.loss_parts`.
    """
    cfg, params = preset(name, dtype)
    rows = rows or TRAIN_ROWS[name]
    x, conditioning = preset_inputs(cfg, rows)
    adamw = optax.adamw(1e-4, b1=0.9, b2=0.95, weight_decay=1e-4)

    def mean_loss(params, x, conditioning):
        return flow_loss(params, x, cfg, conditioning)[0].sum() / x.size

    def step(params, moments, x, conditioning):
        value, grads = jax.value_and_grad(mean_loss)(params, x, conditioning)
        updates, moments = adamw.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, value

    state = [params, adamw.init(params)]
    jitted = jax.jit(step, donate_argnums=(0, 1))
    executable, seconds = compile_timed(jitted, *state, x, conditioning)

    def run():
        *state[:], loss = executable(*state, x, conditioning)
        return loss

    row = {"row": f"train {name}", "batch": rows, "dtype": dtype, "compile_s": seconds}
    row |= measure(run, repeats)
    row["tokens_per_s"] = 1000 * rows * cfg.tokens / row["ms"]
    if with_parts:
        inputs = (x, conditioning)
        row |= breakdown.loss_parts(mean_loss, adamw, executable, state[0], inputs, repeats)
    return row | utilization(
        row["ms"], rates, flops.train_step(cfg, rows, cfg.tokens, cfg.text_length)
    )


def sample_preset(
    name: str,
    rows: int,
    guidance: float,
    jacobi: Jacobi | None,
    dtype: str,
    repeats: int,
    rates: Result,
) -> Result:
    """Time a batch of samples of a preset; `rates` are those of `machine_rates`."""
    tarflow = name == "peer_tarflow"
    cfg, params = preset(name, dtype, 10 if guidance and tarflow else 0)
    z, conditioning = preset_inputs(cfg, rows)
    guided = None
    if guidance:
        rule, on = ("linear_log_scale", "unconditional") if tarflow else ("product", "all")
        guided = Guidance(guidance, rule=rule, temperature_on=on)

    params = prepare_params(params)

    def draw(params, z, conditioning, guided):
        return inverse(params, z, cfg, conditioning, jacobi=jacobi, guidance=guided)

    executable, seconds = compile_timed(jax.jit(draw), params, z, conditioning, guided)
    row = {"row": f"sample {name}", "batch": rows, "dtype": dtype, "guidance": guidance}
    row |= {"jacobi": f"{jacobi.block},{jacobi.threshold:g}" if jacobi else None}
    row |= {
        "compile_s": seconds,
        **measure(lambda: executable(params, z, conditioning, guided), repeats),
    }
    passes = np.asarray(executable(params, z, conditioning, guided)[1]["passes"])
    num_flops = num_bytes = 0
    for i, count in enumerate(passes.tolist()):
        branch_rows = rows * (2 if is_guided(guided, cfg.block(i)) else 1)
        share = count * (jacobi.block if jacobi else 1) / cfg.tokens
        num_flops += (
            share * branch_rows * flops.block_forward(cfg, i, cfg.tokens, cfg.text_length, True)
        )
        size = jnp.dtype(dtype).itemsize
        num_bytes += count * flops.pass_bytes(
            cfg, i, branch_rows, cfg.tokens, cfg.text_length, size
        )
    row |= {"passes": int(passes.sum()), "tokens_per_s": 1000 * rows * cfg.tokens / row["ms"]}
    return row | utilization(row["ms"], rates, num_flops, num_bytes)


# -------------------------------------------------------------------- experiments, data and models


def train_experiment(cfg: Mapping[str, Any], repeats: int, rates: Result) -> Result:
    """Time the training step of an experiment on one random batch."""
    from starflow2_jax import config
    from starflow2_jax.mesh import host_rows, make_mesh
    from starflow2_jax.runtime import memory
    from starflow2_jax.training.program import check_memory, to_device
    from starflow2_jax.training.tasks import registry

    config.check(cfg)
    program = registry.build(cfg, make_mesh(cfg["mesh"]))
    check_memory(cfg, program.task, memory.capacity())
    draw = np.random.default_rng(0)

    def array(spec):
        if spec.dtype == jnp.uint8:
            return draw.integers(0, 256, spec.shape, np.uint8)
        if jnp.issubdtype(spec.dtype, jnp.integer):
            return np.zeros(spec.shape, spec.dtype)
        return draw.standard_normal(spec.shape, np.float32)

    host_batch = len(host_rows(cfg["train"]["batch_size"], program.mesh))
    batch = {
        name: array(spec.update(shape=(host_batch, *spec.shape[1:])))
        for name, spec in program.abstract_batch.items()
    }
    batch = to_device(program, batch)
    start = time.perf_counter()
    executable = program.lower_step().compile()
    seconds = time.perf_counter() - start
    with jax.set_mesh(program.mesh):
        state, frozen = program.init(jax.random.key(cfg["seed"]))
    current = [state]

    def run():
        current[0], metrics = executable(current[0], frozen, batch)
        return metrics

    model, rows = program.task.model_config, cfg["train"]["batch_size"]
    row = {"row": f"train {cfg['name'] or 'experiment'}", "batch": rows}
    row |= {"dtype": cfg["compute_dtype"], "compile_s": seconds, **measure(run, repeats)}
    row["tokens_per_s"] = 1000 * rows * model.tokens / row["ms"]
    num_flops = flops.train_step(model, rows, model.tokens, model.text_length)
    return row | utilization(row["ms"], rates, num_flops)


def read_data(folder: str, rows: int, repeats: int) -> Result:
    """Time the decoding of a dataset folder, in one thread and in the loader's threads.

    All images are scaled and cropped to squares of the first image's short side.
    """
    from starflow2_jax.data import image_batches, records

    first = records.read(folder)[0]
    pixels = min(first.imgs[0].h, first.imgs[0].w)
    row: Result = {"row": f"data {folder}", "batch": rows, "pixels": pixels}
    for name, threads in (("one_thread", 0), ("loader", 4)):
        stream = image_batches.batches(
            {"path": folder, "pixels": pixels, "resize": "center_crop", "threads": threads},
            batch_size=rows,
        )
        timing = measure(lambda stream=stream: next(stream)["image"].sum(), repeats)
        row[f"{name}_images_per_s"] = 1000 * rows / timing["ms"]
        row |= {f"{name}_{key}": value for key, value in timing.items()}
    return row


def read_rows(step_ms: float, hosts: int, repeats: int) -> Result:
    """Time the reading of interleaved rows, in one and two threads and processes."""
    from starflow2_jax.benchmarking import data_rows

    loaders = ((0, 0), (0, 1), (0, 2), (1, 1), (2, 1))
    target = data_rows.Slice(step_ms=step_ms, hosts=hosts)
    return {"row": "data rows", **data_rows.measure_rows(2000, 5 * repeats, loaders, target)}


def measure_growth(parts: Sequence[str], out: str, repeats: int, records: int) -> Result:
    """Measure parts of `benchmarking.growth`, and return the exponent of each cost."""
    from starflow2_jax.benchmarking import growth

    if unknown := [part for part in parts if part not in growth.PARTS]:
        raise ValueError(f"--only: {unknown[0]!r} is not one of {', '.join(growth.PARTS)}")
    row: Result = {"row": "growth", "out": out}
    for part in parts:
        rows = []
        for result in growth.measure(part, repeats, records):
            print(json.dumps(result), flush=True)
            rows.append(result)
        row |= growth.write(out, part, rows)
    return row


def read_model(path: str, repeats: int) -> Result:
    """Time the reading of a workdir, a step or a model folder, including its digests."""
    from starflow2_jax.checkpoints import hub
    from starflow2_jax.inference import flow_sampler

    before = status_mb("VmRSS")
    timing = measure(lambda: flow_sampler.load_flow(path).params, repeats, warm_up=1)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(flow_sampler.load_flow(path).params))
    row = {"row": f"load {hub.pin(path)}", "model_mb": size / 2**20, "before_mb": before, **timing}
    return row | {"mb_per_s": size / 2**20 / timing["ms"] * 1000}


# ---------------------------------------------------------------------------------------- command


def lines(row: Result) -> list[str]:
    """Format a result as lines of a name and a value with four significant digits."""

    def text(value):
        if not isinstance(value, float):
            return str(value)
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"

    row = {name: value for name, value in row.items() if value is not None}
    width = max(map(len, row))
    return [f"{name:{width}}  {text(value)}" for name, value in row.items()]


def parse_jacobi(text: str | None) -> Jacobi | None:
    """Parse `BLOCK,THRESHOLD`; raise ValueError for any other form."""
    if not text:
        return None
    try:
        block, threshold = text.split(",")
        return Jacobi(int(block), float(threshold))
    except ValueError:
        expected = "expected BLOCK,THRESHOLD such as 16,1e-3"
        raise ValueError(f"--jacobi={text!r}: {expected}") from None


def main(verb: str, argv: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
    """Run one verb and print its result."""
    if argv:
        raise ValueError(f"unexpected argument {argv[0]!r}")
    experiment = values["config"].value if "config" in values else None
    repeats, dtype = values.repeats, values.compute_dtype or "float32"
    stage = values.preset in stages.STAGES and verb in ("train", "sample")
    if verb == "machine":
        row = machine_rates(repeats)
    elif verb == "train" and experiment is not None and values.breakdown:
        row = breakdown.experiment(experiment, repeats)
        row |= utilization(row["step_ms"], machine_rates(), row.pop("flops"))
    elif verb == "train" and experiment is not None and not values.preset:
        row = train_experiment(experiment, repeats, machine_rates())
    elif verb in ("train", "sample") and not values.preset:
        names = " or ".join([*PRESETS, *stages.STAGES])
        raise ValueError(f"bench {verb}: --preset is needed: {names}")
    elif stage:
        row = _time_stage(verb, values)
    elif verb == "train":
        row = train_preset(
            values.preset,
            values.batch,
            dtype,
            repeats,
            machine_rates(),
            with_parts=values.breakdown,
        )
    elif verb == "sample":
        row = sample_preset(
            values.preset,
            values.batch or 1,
            values.guidance,
            parse_jacobi(values.jacobi),
            dtype,
            repeats,
            machine_rates(),
        )
    elif verb == "growth":
        row = measure_growth(values.only, required(values, "out"), repeats, values.records)
    elif verb == "data" and values.data:
        row = read_data(values.data, values.batch or 64, repeats)
    elif verb == "data":
        row = read_rows(values.step_ms, values.hosts, repeats)
    else:
        row = read_model(required(values, "model"), repeats)
    row = {**describe_machine(), **row}
    print(json.dumps(row, indent=2) if values.json else "\n".join(lines(row)))


def _time_stage(verb: str, values: flags.FlagValues) -> Result:
    dtype = values.compute_dtype or "bfloat16"
    name, size = values.preset, values.size
    if verb == "train":
        rows = values.batch or 4 * jax.device_count()
        return stages.train(name, size, rows, dtype, values.repeats, values.breakdown)
    if values.guidance or values.jacobi:
        raise ValueError("bench sample: --guidance and --jacobi apply to the peer presets only")
    return stages.sample(name, size, values.batch or 1, dtype, values.repeats, machine_rates())


def required(values: flags.FlagValues, name: str) -> str:
    """Return the value of a flag, or raise ValueError if it is missing."""
    if not values[name].value:
        raise ValueError(f"bench: --{name} is needed")
    return values[name].value


if __name__ == "__main__":
    define(flags.FLAGS)
    allocator.keep_freed_memory()
    cli.run(main, VERBS)
