"""Times training, sampling, reading and loading on this machine, beside what the machine can do.

python -m starflow2_jax.bench machine --json
python -m starflow2_jax.bench train --preset peer_starflow
python -m starflow2_jax.bench sample --preset peer_starflow --batch 8 --guidance 2.5
python -m starflow2_jax.bench train --preset stage3 --batch 4 --json

The presets are the work of two published PyTorch programs at a small size: random weights (proj_out
of standard deviation 0.005), Gaussian input, the same batch at every step. A training step is
forward, loss without regulariser, backward and AdamW; sampling is every block with a cache.
`stage1` and `stage3` are the stages of STARFlow2 in bfloat16, `--size paper` by default: the step
that `train` runs, rows full of images; sampling draws an image and words after a prompt. Presets
need nothing but jax, flax, optax, numpy and absl. `train --config` runs an experiment's own step.

Times are medians of --repeats after three warm-up runs. `cores_elsewhere` says how many cores other
processes used meanwhile: where it is not near 0, take the minimum, or measure again. Beside PyTorch
on the same machine: tests/peer/side_by_side.py.
"""

import dataclasses
import json
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from starflow2_jax.benchmarking import stages
from starflow2_jax.benchmarking.timing import (
    Result,
    about,
    compiled,
    machine,
    shares,
    status_mb,
    timed,
)
from starflow2_jax.inference.guidance import Guidance
from starflow2_jax.inference.inverse import Jacobi, inverse, is_guided
from starflow2_jax.models import flops, flow, starflow2
from starflow2_jax.models.flow import FlowConfig
from starflow2_jax.params import init as init_params
from starflow2_jax.runtime import allocator, cli
from starflow2_jax.training.losses.flow import flow_loss

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


def define(values: flags.FlagValues) -> None:
    """Defines the flags of this command."""
    flags.DEFINE_enum("preset", None, [*PRESETS, *stages.STAGES], "train, sample: work that "
                      "is fixed here", flag_values=values)  # fmt: skip
    flags.DEFINE_enum("size", "paper", list(starflow2.PRESETS), "presets stage1, stage3: of the "
                      "model", flag_values=values)  # fmt: skip
    flags.DEFINE_integer("batch", None, "rows; the default is 8 and 4 in training (stages: 4 a "
                         "device), 1 in sampling, 64 in data", 1, flag_values=values)  # fmt: skip
    flags.DEFINE_float("guidance", 0.0, "sample: guidance weight", 0.0, flag_values=values)
    flags.DEFINE_string("jacobi", None, "sample: BLOCK,THRESHOLD of Jacobi iteration instead of "
                        "sequential sampling", flag_values=values)  # fmt: skip
    flags.DEFINE_enum("compute_dtype", None, ("float32", "bfloat16"), "presets: dtype of matmuls; "
                      "the default is bfloat16 for stages, else float32",
                      flag_values=values)  # fmt: skip
    flags.DEFINE_string("data", None, "data: dataset folder", flag_values=values)
    flags.DEFINE_string("model", None, "load: workdir, step or model folder", flag_values=values)
    flags.DEFINE_integer("repeats", 9, "timed runs", 1, flag_values=values)
    flags.DEFINE_boolean("json", False, "print the result as JSON", flag_values=values)
    try:
        from ml_collections import config_flags
    except ImportError:  # A machine where only presets are timed.
        return
    config_flags.DEFINE_config_file("config", None, "train: FILE.py[:variant] or "
                                    "starflow2:NAME[:variant]", flag_values=values)  # fmt: skip


# ------------------------------------------------------------------------------- the peers' work


def preset(name: str, dtype: str = "float32", classes: int = 0) -> tuple[FlowConfig, Any]:
    """The flow of a preset and its random weights."""
    own = None if dtype == "float32" else dtype
    cfg = dataclasses.replace(PRESETS[name], compute_dtype=own, classes=classes)
    params = init_params(jax.random.key(0), flow.declare(cfg))
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
    from starflow2_jax.mesh import host_rows, make_mesh
    from starflow2_jax.training import program as step

    config.check(cfg)
    program = step.build(cfg, make_mesh(cfg["mesh"]))
    draw = np.random.default_rng(0)

    def array(spec):
        if spec.dtype == jnp.uint8:
            return draw.integers(0, 256, spec.shape, np.uint8)
        if jnp.issubdtype(spec.dtype, jnp.integer):
            return np.zeros(spec.shape, spec.dtype)
        return draw.standard_normal(spec.shape, np.float32)

    held = len(host_rows(cfg["train"]["batch_size"], program.mesh))
    share = lambda spec: spec.update(shape=(held, *spec.shape[1:]))
    batch = {name: array(share(spec)) for name, spec in program.abstract_batch.items()}
    batch = step.to_device(program, batch)
    start = time.perf_counter()
    ready = program.lower_step().compile()
    seconds = time.perf_counter() - start
    with jax.set_mesh(program.mesh):
        state, frozen = program.init(jax.random.key(cfg["seed"]))
    current = [state]

    def run():
        current[0], metrics = ready(current[0], frozen, batch)
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
    from starflow2_jax.data import image_batches, records

    first = records.read(folder)[0]
    pixels = min(first.imgs[0].h, first.imgs[0].w)
    options = {"path": folder, "pixels": pixels, "resize": "center_crop"}
    row: Result = {"row": f"data {folder}", "batch": rows, "pixels": pixels}
    for name, threads in (("one_thread", 0), ("loader", 4)):
        stream = image_batches.batches({**options, "threads": threads}, batch_size=rows)
        found = timed(lambda stream=stream: next(stream)["image"].sum(), repeats)
        row[f"{name}_images_per_s"] = 1000 * rows / found["ms"]
        row |= {f"{name}_{key}": value for key, value in found.items()}
    return row


def read_model(path: str, repeats: int) -> Result:
    """Time and peak memory to read a workdir, a step or a model folder, digests checked.

    Raises:
        FileNotFoundError, ValueError: as `generation.model.load`.
    """
    from starflow2_jax.inference import flow_sampler

    before = status_mb("VmRSS")
    found = timed(lambda: flow_sampler.load(path).params, repeats, warm_up=1)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(flow_sampler.load(path).params))
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
    repeats, dtype = values.repeats, values.compute_dtype or "float32"
    stage = values.preset in stages.STAGES and verb in ("train", "sample")
    if verb == "machine":
        row = machine(repeats)
    elif verb == "train" and experiment is not None and not values.preset:
        row = train_experiment(experiment, repeats, machine())
    elif verb in ("train", "sample") and not values.preset:
        names = " or ".join([*PRESETS, *stages.STAGES])
        raise ValueError(f"bench {verb}: --preset is needed: {names}")
    elif stage:
        row = _time_stage(verb, values)
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


def _time_stage(verb: str, values: flags.FlagValues) -> Result:
    dtype = values.compute_dtype or "bfloat16"
    args = (values.preset, values.size)
    if verb == "train":
        rows = values.batch or 4 * jax.device_count()
        return stages.train(*args, rows, dtype, values.repeats)
    if values.guidance or values.jacobi:
        raise ValueError("bench sample: --guidance and --jacobi are of the other presets")
    return stages.sample(*args, values.batch or 1, dtype, values.repeats, machine())


def needed(values: flags.FlagValues, name: str) -> str:
    """A flag's value, or a ValueError that it is missing."""
    if not values[name].value:
        raise ValueError(f"bench: --{name} is needed")
    return values[name].value


if __name__ == "__main__":
    define(flags.FLAGS)
    allocator.keep_freed_memory()
    cli.run(main, VERBS)
