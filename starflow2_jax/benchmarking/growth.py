"""Measure how costs grow: with rows, images, records and the size of a checkpoint.

python -m starflow2_jax.bench growth --only train,sample,checkpoints --out growth/
python -m starflow2_jax.bench growth --only data --records 1000000 --out growth/

Each part appends its rows to `growth.json`, and `growth.png` shows all of them. The models have the
`tiny` preset. The exponent of a cost is the slope of the last two points: 1 is linear.
"""

import gc
import io
import json
import math
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from starflow2_jax.benchmarking import stages, timing
from starflow2_jax.benchmarking.timing import Result
from starflow2_jax.checkpoints import orbax
from starflow2_jax.mesh import make_mesh
from starflow2_jax.runtime import atomic, json_text
from starflow2_jax.training.program import to_device
from starflow2_jax.training.tasks import registry

STAGE, DTYPE = "stage3", "float32"
# (what grows, length, images of a row, rows) of training steps.
STEPS = (
    *(("positions of a row", length, length // 85, 2) for length in (256, 512, 1024)),
    *(("rows of a batch", 256, 3, rows) for rows in (1, 4, 16)),
    *(("images of a row", 768, images, 2) for images in (1, 3, 9)),
)
SAMPLED_IMAGES = (1, 4, 16)
CHECKPOINT_MB = (1, 16, 256, 1024)
PARTS = ("train", "sample", "checkpoints", "data")
RESUMED_STEP, RESUMED_ROWS = 100_000, 16


def measure(part: str, repeats: int, records: int) -> Iterator[Result]:
    """Yield the rows of a part, each with `part`, what `grows`, its `size`, and costs."""
    if part == "train":
        return _train(repeats)
    if part == "sample":
        return _sample(repeats)
    return _checkpoints(repeats) if part == "checkpoints" else _data(records)


def _train(repeats: int) -> Iterator[Result]:
    mesh = make_mesh("data=-1")
    for grows, length, images, rows in STEPS:
        cfg = stages.experiment(STAGE, "tiny", rows, DTYPE)
        cfg["text"] |= {"length": length, "images": images}
        program = registry.build(cfg, mesh)
        executable = program.lower_step().compile()
        with jax.set_mesh(mesh):
            state, frozen = program.init(jax.random.key(0))
            batch = stages.rows_of_images(cfg, program.task.model_config, rows)
            batch, current = to_device(program, batch), [state]
            del state

            def run(executable=executable, current=current, frozen=frozen, batch=batch):
                current[0], metrics = executable(current[0], frozen, batch)
                return metrics

            ms = timing.measure(run, repeats, warm_up=1)["ms_min"]
        size = {"positions of a row": length, "rows of a batch": rows, "images of a row": images}
        work = program.task.step_cost()["flops"]
        yield {
            "part": "train", "grows": grows, "size": size[grows], "step_ms": ms,
            "gflop": work / 1e9, "gflops": work / ms / 1e6,
        }  # fmt: skip


def _sample(repeats: int) -> Iterator[Result]:
    rates = {"matmul_float32_gflops": 1.0, "copy_gb_per_s": 1.0}  # of no interest
    for count in SAMPLED_IMAGES:
        row = stages.sample(STAGE, "tiny", count, DTYPE, repeats, rates)
        yield {
            "part": "sample", "grows": "images at once", "size": count,
            "images_ms": row["image_ms_min"],
        }  # fmt: skip


def _checkpoints(repeats: int) -> Iterator[Result]:
    for megabytes in CHECKPOINT_MB:
        # Arrays of at most 16 MB, as weights are.
        size = min(megabytes, 16)
        names = [f"{k:03d}" for k in range(megabytes // size)]
        # Random, as storage compresses what is alike.
        arrays = [
            jax.random.normal(jax.random.key(k), (size, 256, 1024)) for k in range(len(names))
        ]
        state = {"params": dict(zip(names, arrays))}
        jax.block_until_ready(state)
        seconds: dict[str, list[float]] = {"save_s": [], "restore_s": []}
        for _ in range(repeats):
            with tempfile.TemporaryDirectory() as workdir:
                writer = orbax.open(workdir)
                start = time.perf_counter()
                orbax.save(writer, 1, state, {})
                orbax.close(writer)
                seconds["save_s"].append(time.perf_counter() - start)
                start = time.perf_counter()
                jax.block_until_ready(orbax.restore(workdir, 1, state)[0])
                seconds["restore_s"].append(time.perf_counter() - start)
        costs = {name: min(values) for name, values in seconds.items()}
        yield {"part": "checkpoints", "grows": "MB of a checkpoint", "size": megabytes, **costs}


def _data(most: int) -> Iterator[Result]:
    """Yield the costs of data sets of 1,000 records and tenfold up to `most`.

    Seconds are those of the processor, all threads together; `..._mb` is memory above that before.
    """
    for digits in range(3, round(math.log10(most)) + 1):
        with tempfile.TemporaryDirectory() as name:
            yield _data_costs(pathlib.Path(name), 10**digits)


def _data_costs(folder: pathlib.Path, count: int) -> Result:
    from starflow2_jax.benchmarking import data_rows
    from starflow2_jax.data import packed_batches, packing, records, statistics
    from starflow2_jax.data.packing import PackingSpec

    data, tar, spec = str(folder / "data"), folder / "images.tar", PackingSpec(512, 16, 8)
    options = data_rows.row_options(data, packing=spec, grid_side=4, pixels=32, threads=0)
    packed_batches.open_tokenizer(options)  # imports are no cost of data
    data_rows.write_tar(tar, count, side=32)
    row: Result = {"part": "data", "grows": "records", "size": count}

    def first_batch(step: int) -> Any:
        return next(packed_batches.batches(options, batch_size=RESUMED_ROWS, start_step=step))

    _cost(row, "import", lambda: data_rows.import_tar(tar, folder / "data"))
    tar.unlink()
    _cost(row, "statistics", lambda: statistics.describe(records.read(data)))
    _cost(row, "plan", lambda: packing.load_or_make_plan(data, data_rows.TOKENIZER, spec))
    _cost(row, "describe", lambda: packed_batches.describe(options))
    _cost(row, "first_batch", lambda: first_batch(0))
    _cost(row, "resume", lambda: first_batch(RESUMED_STEP))
    _cost(row, "resume_again", lambda: first_batch(RESUMED_STEP))
    return row


def _cost(row: Result, name: str, run: Callable[[], Any]) -> None:
    """Add the processor seconds of `run`, and the memory that it needs, to a row."""
    gc.collect()
    before = timing.status_mb("VmRSS") or 0.0
    timing.reset_peak()
    start = time.process_time()
    run()
    row[f"{name}_s"] = time.process_time() - start
    row[f"{name}_mb"] = max(0.0, (timing.status_mb("VmHWM") or 0.0) - before)


def exponents(rows: Sequence[Result]) -> dict[str, float]:
    """Return the slope of each cost, in logarithms, over the two largest sizes of what grows."""
    slopes = {}
    for grows in dict.fromkeys(row["grows"] for row in rows):
        small, large = sorted(_rows_of(rows, grows), key=lambda row: row["size"])[-2:]
        octaves = math.log(large["size"] / small["size"])
        for name in _costs(large):
            if small[name] > 0 and large[name] > 0:
                slope = math.log(large[name] / small[name]) / octaves
                slopes[f"{name} by {grows}"] = round(slope, 2)
    return slopes


def _rows_of(rows: Sequence[Result], grows: str) -> list[Result]:
    return [row for row in rows if row["grows"] == grows]


def _costs(row: Result) -> list[str]:
    return [name for name in row if name.endswith(("_ms", "_s", "_mb"))]


def write(out: str, part: str, rows: Sequence[Result]) -> dict[str, float]:
    """Replace the rows of a part in `growth.json`, draw `growth.png`, and return the exponents."""
    folder = pathlib.Path(out)
    file = folder / "growth.json"
    stored = json_text.decode(file.read_bytes(), str(file)) if file.exists() else []
    joined = [row for row in stored if row["part"] != part] + list(rows)
    atomic.write_file(file, json.dumps(joined, indent=1) + "\n")
    atomic.write_file(folder / "growth.png", plot(joined))
    return exponents(rows)


def plot(rows: Sequence[Result]) -> bytes:
    """Return a PNG with the costs by each size that grows, on logarithmic axes."""
    from matplotlib.figure import Figure

    panels = [
        (grows, unit, label)
        for grows in dict.fromkeys(row["grows"] for row in rows)
        for unit, label in (("_ms", "milliseconds"), ("_s", "seconds"), ("_mb", "MB of memory"))
        if any(name.endswith(unit) for name in _costs(_rows_of(rows, grows)[0]))
    ]
    columns = min(4, len(panels))
    height = -(-len(panels) // columns)
    figure = Figure((3.4 * columns, 2.9 * height), layout="constrained")
    axes = np.ravel(figure.subplots(height, columns, squeeze=False))
    for axis, (grows, unit, label) in zip(axes, panels):
        points = sorted(_rows_of(rows, grows), key=lambda row: row["size"])
        sizes = np.asarray([row["size"] for row in points], float)
        for name in _costs(points[0]):
            # Less than a megabyte is what the process has left of earlier parts.
            if name.endswith(unit) and (unit != "_mb" or points[-1][name] > 1):
                values = [max(row[name], 1e-3) for row in points]
                axis.plot(sizes, values, "o-", ms=3, lw=1.2, label=name.removesuffix(unit))
        top = axis.get_ylim()[1]
        axis.plot(sizes, top * sizes / sizes[-1], ":", color="#999999", lw=1, label="linear")
        axis.set(xscale="log", yscale="log", xlabel=grows, ylabel=label)
        for direction in (axis.xaxis, axis.yaxis):
            direction.set_major_formatter("{x:g}")
            direction.set_minor_formatter("")
        axis.grid(True, which="both", color="#eeeeee")
        axis.legend(fontsize=6.5, frameon=False)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
