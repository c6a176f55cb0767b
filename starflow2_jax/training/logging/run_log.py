"""The log of a run in its workdir.

    WORKDIR/metrics.jsonl        one JSON object per row: `step` and metrics; nan and inf are null
            config.json          the resolved configuration
            run.json             id of the run; command, machine and versions of every start
            samples/00000500.png grids of generated images, NAME_00000500.png for other names
            nonfinite/           the batch of a step whose loss or gradient was not finite
            tensorboard/ ...     files of the trackers in `log.trackers`

Only process 0 writes, except in `dump_batch`; on the others every function returns at once. WORKDIR
may be a gs:// path. Then `metrics.jsonl` is a local file, which `upload` copies at each checkpoint.
"""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import io
import json
import math
import os
import platform
import secrets
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import jax
import msgspec
import numpy as np
from etils import epath

from starflow2_jax import config
from starflow2_jax.data import untrusted
from starflow2_jax.training.logging import image_grid, throughput
from starflow2_jax.training.logging.trackers import Tracker, open_trackers

METRICS, CONFIG, RUN = "metrics.jsonl", "config.json", "run.json"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@dataclasses.dataclass
class Log:
    """An open log: its file, its trackers, and the clock of the progress line."""

    workdir: epath.Path
    writes: bool
    path: Path | None = None
    file: BinaryIO | None = None
    trackers: list[Tracker] = dataclasses.field(default_factory=list)
    clock: throughput.Clock = dataclasses.field(default_factory=throughput.Clock)
    unfinished_line: bool = False


def _remote(path: epath.Path) -> bool:
    return "://" in str(path)


def _write(path: epath.Path, data: bytes) -> None:
    """Write a file completely or not at all, as an object store does by itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if _remote(path):
        path.write_bytes(data)
        return
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(data)
    partial.replace(path)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def open(workdir: epath.PathLike, cfg: Mapping[str, Any], *, step: int = 0) -> Log:
    """Open the log of a run: remove rows after `step`, open trackers, add this start to `run.json`.

    `step` is the restored one, 0 for a new run.
    """
    workdir = epath.Path(workdir)
    if jax.process_index():
        return Log(workdir, writes=False)
    truncate(workdir, step)
    starts, run_id = [], secrets.token_hex(4)
    if (workdir / RUN).exists():
        run = read_run(workdir)
        starts, run_id = run["starts"], run["id"]
    # Before anything is written, so that a tracker that fails leaves no trace.
    opened_trackers = open_trackers(
        cfg["log"]["trackers"],
        workdir,
        project=cfg["log"]["project"],
        run_id=run_id,
        step=step,
        config=config.to_dict(cfg),
    )
    _write(workdir / RUN, _json({"id": run_id, "starts": [*starts, _start(step)]}))
    log = Log(workdir, writes=True, path=Path(str(workdir / METRICS)), trackers=opened_trackers)
    if _remote(workdir):
        log.path = Path(tempfile.mkdtemp(prefix="metrics_")) / METRICS
        if (workdir / METRICS).exists():
            log.path.write_bytes((workdir / METRICS).read_bytes())
    # Unbuffered and appending: a row is one write, so a kill loses at most the row being written.
    log.file = log.path.open("ab", buffering=0)
    return log


def upload(log: Log) -> None:
    """Copy `metrics.jsonl` to a remote workdir; call it at each checkpoint."""
    if log.writes and _remote(log.workdir):
        _write(log.workdir / METRICS, log.path.read_bytes())


def close(log: Log) -> None:
    """Upload, and close file and trackers. It may be called twice."""
    if not log.writes or log.file.closed:
        return
    _end_line(log)
    upload(log)
    log.file.close()
    for tracker in log.trackers:
        tracker.end()


def _start(step: int) -> dict[str, Any]:
    start_time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"time": start_time, "step": step, "command": command_line(), **environment()}


def command_line() -> str:
    """Return the command that started this process."""
    return shlex.join([os.path.basename(sys.orig_argv[0]), *sys.orig_argv[1:]])


def environment() -> dict[str, Any]:
    """Return the versions, machine and devices that results depend on besides the command."""
    versions = {"python": platform.python_version()}
    for name in ("starflow2_jax", *PACKAGES):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        rows = Path("/proc/cpuinfo").read_text().split("model name", 1)[1]
        cpu = rows.split(":", 1)[1].splitlines()[0].strip()
    return {
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "machine": f"{platform.system()}, {cpu}, {os.cpu_count()} cores",
        "versions": versions,
    }


def write_row(log: Log, step: int, values: Mapping[str, Any]) -> None:
    """Write one row of metrics, numbers or 0-d arrays, and send it to the trackers."""
    if not log.writes:
        return
    plain = {name: _number(name, value) for name, value in values.items()}
    line = {"step": int(step), **{k: v if math.isfinite(v) else None for k, v in plain.items()}}
    log.file.write((json.dumps(line, allow_nan=False) + "\n").encode())
    for tracker in log.trackers:
        tracker.scalars(int(step), plain)


def _number(name: str, value: Any) -> int | float:
    array = np.asarray(value)
    if array.size != 1 or (array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16"):
        raise ValueError(f"log: {name} is {array.dtype}{list(array.shape)}, expected one number")
    return int(array.item()) if array.dtype.kind in "biu" else float(array.item())


def read_rows(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """Return the rows of `metrics.jsonl`, an empty list if there is none.

    A last line without a line end was cut off by a kill and is left out.
    """
    path = epath.Path(workdir) / METRICS
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            values = json.loads(line)
            values["step"] = int(values["step"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path}: line {number} is {line[:60]!r}, expected a JSON object with `step`"
            ) from None
        rows.append(values)
    return rows


def truncate(workdir: epath.PathLike, step: int) -> None:
    """Remove rows after `step`, and a partly written last one, from `metrics.jsonl`."""
    path = epath.Path(workdir) / METRICS
    if not path.exists() or jax.process_index():
        return
    rows = [json.dumps(row) + "\n" for row in read_rows(workdir) if row["step"] <= step]
    text = "".join(rows).encode()
    if text != path.read_bytes():
        _write(path, text)


def save_config(workdir: epath.PathLike, cfg: Mapping[str, Any]) -> None:
    """Write `config.json`."""
    if not jax.process_index():
        _write(epath.Path(workdir) / CONFIG, _json(config.to_dict(cfg)))


def read_config(workdir: epath.PathLike) -> dict[str, Any] | None:
    """Return the configuration that `save_config` wrote, or None."""
    path = epath.Path(workdir) / CONFIG
    if not path.exists():
        return None
    stored = untrusted.read_json(path, dict[str, Any])
    try:
        return config.upgrade(stored)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a configuration: {error!r}") from error


class _Start(msgspec.Struct):
    """A start of a run, as `run.json` has it."""

    time: str
    step: int
    command: str
    versions: dict[str, str]
    devices: str
    processes: int
    machine: str


class _Run(msgspec.Struct):
    id: str
    starts: Annotated[list[_Start], msgspec.Meta(min_length=1)]


def read_run(workdir: epath.PathLike) -> dict[str, Any]:
    """Return the contents of `run.json`, `id` and `starts`.

    Raises:
        ValueError: The file is damaged; names it.
    """
    path = epath.Path(workdir) / RUN
    run = untrusted.read_json(path, dict[str, Any])
    untrusted.convert(run, _Run, str(path))
    return run


def dump_batch(
    workdir: epath.PathLike,
    step: int,
    batch: Mapping[str, Any],
    ids: Sequence[str],
    metrics: Mapping[str, Any],
) -> epath.Path:
    """Save the batch of a step that was not finite, and return the path of its arrays.

    Each process saves its own rows, to `nonfinite/STEP[_pPROCESS].npz`, and step, ids and metrics
    to a `.json` with the same name.
    """
    process = f"_p{jax.process_index()}" if jax.process_count() > 1 else ""
    path = epath.Path(workdir) / "nonfinite" / f"{int(step):08d}{process}.npz"
    arrays = {name: np.asarray(value) for name, value in batch.items() if name != "id"}
    data = io.BytesIO()
    np.savez(data, **arrays)
    _write(path, data.getvalue())
    # As text: JSON has no nan.
    texts = {name: str(_number(name, value)) for name, value in metrics.items()}
    metadata = {"step": int(step), "ids": list(ids), "metrics": texts}
    _write(path.with_suffix(".json"), _json(metadata))
    return path


def print_progress(log: Log, step: int, steps: int, values: Mapping[str, Any]) -> None:
    """Print one line of progress: rewritten in place on a terminal, a new line elsewhere."""
    if not log.writes:
        return
    forms = {
        "loss": lambda v: f"loss {v:.4f}",
        "nats_per_dim": lambda v: f"nats/dim {v:.4f}",
        "tokens_per_second": lambda v: f"{_short(v)} tokens/s",
        "mfu": lambda v: f"MFU {v:.0%}",
    }
    parts = [f"step {step:,}/{steps:,} ({step / max(steps, 1):.0%})"]
    parts += [form(float(values[name])) for name, form in forms.items() if name in values]
    left = throughput.seconds_left(log.clock, step, steps)
    if left is not None:
        parts.append(f"{datetime.timedelta(seconds=round(left))} left")
    line = "  ".join(parts)
    if sys.stdout.isatty() and step < steps:
        print(f"\r\x1b[2K{line}", end="", flush=True)
        log.unfinished_line = True
    else:
        print_line(log, line)


def print_line(log: Log, text: str) -> None:
    """Print a line below the progress line."""
    if log.writes:
        _end_line(log)
        print(text, flush=True)


def _end_line(log: Log) -> None:
    if log.unfinished_line:
        print(flush=True)
    log.unfinished_line = False


def _short(value: float) -> str:
    """Format 12,345 as `12.3k`."""
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.0f}"


def write_samples(
    log: Log,
    step: int,
    images: np.ndarray,
    captions: Sequence[str] | None = None,
    *,
    name: str = "samples",
    columns: int | None = None,
) -> epath.Path | None:
    """Write a grid of images uint8 [n, H, W, 3] to `samples/` and send it to the trackers."""
    if not log.writes:
        return None
    pixels = image_grid.grid(images, captions, columns)
    prefix = "" if name == "samples" else f"{name}_"
    path = log.workdir / "samples" / f"{prefix}{int(step):08d}.png"
    _write(path, image_grid.png(pixels))
    for tracker in log.trackers:
        tracker.image(int(step), name, pixels)
    return path
