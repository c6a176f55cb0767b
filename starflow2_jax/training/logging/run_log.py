"""The log of a run in its workdir.

    WORKDIR/metrics.jsonl        one JSON object per row: `step` and metrics; nan and inf are null
            config.json          the resolved configuration
            run.json             id of the run; command, machine and versions of every start;
                                 sha256 of config.json and of itself
            samples/00000500.png grids of generated images, NAME_00000500.png for other names
            nonfinite/           the batch of a step whose loss or gradient was not finite
            tensorboard/ ...     files of the trackers in `log.trackers`

Only process 0 writes, except in `dump_batch`; on the others every function returns at once. WORKDIR
may be a gs:// path. Then `metrics.jsonl` is a local file, which `upload` copies at each checkpoint.
"""

import contextlib
import dataclasses
import datetime
import hashlib
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
from absl import logging
from etils import epath

from starflow2_jax import config
from starflow2_jax.data import untrusted
from starflow2_jax.runtime import atomic, json_text
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
    num_bytes: int = 0  # of `metrics.jsonl`
    digest: Any = dataclasses.field(default_factory=hashlib.sha256)  # of the same
    unfinished_line: bool = False


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
    run = read_run(workdir) or {"id": secrets.token_hex(4), "starts": []}
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
    _save_records(workdir, cfg, {"id": run_id, "starts": [*starts, _start(step)]})
    log = Log(workdir, writes=True, path=Path(str(workdir / METRICS)), trackers=opened_trackers)
    if atomic.is_remote(workdir):
        log.path = Path(tempfile.mkdtemp(prefix="metrics_")) / METRICS
        if (workdir / METRICS).exists():
            log.path.write_bytes((workdir / METRICS).read_bytes())
    stored = log.path.read_bytes() if log.path.exists() else b""
    log.num_bytes, log.digest = len(stored), hashlib.sha256(stored)
    # Unbuffered and appending: a row is one write, so a kill loses at most the row being written.
    log.file = log.path.open("ab", buffering=0)
    return log


def record(log: Log) -> dict[str, Any] | None:
    """Return number and sha256 of the bytes of `metrics.jsonl`, for the next checkpoint.

    They are on the disk then, and uploaded if the workdir is remote. None except on process 0.
    """
    if not log.writes:
        return None
    os.fsync(log.file.fileno())
    upload(log)
    return {"bytes": log.num_bytes, "sha256": log.digest.hexdigest()}


def upload(log: Log) -> None:
    """Copy `metrics.jsonl` to a remote workdir; call it at each checkpoint."""
    if log.writes and atomic.is_remote(log.workdir):
        atomic.write_file(log.workdir / METRICS, log.path.read_bytes())


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
    values = {"step": int(step), **{k: v if math.isfinite(v) else None for k, v in plain.items()}}
    line = (json.dumps(values, allow_nan=False) + "\n").encode()
    log.file.write(line)
    log.digest.update(line)
    log.num_bytes += len(line)
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
            values = json_text.decode(line, str(path))
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
        atomic.write_file(path, text)


def check_metrics(workdir: epath.PathLike, meta: Mapping[str, Any]) -> None:
    """Compare `metrics.jsonl` with its record in the `meta` of a checkpoint, see `record`.

    Raises:
        ValueError: Its rows up to the checkpoint are not those that were written.
    """
    path = epath.Path(workdir) / METRICS
    recorded = meta.get("metrics")
    if not recorded or not recorded["bytes"]:
        return
    # Rows are after the checkpoint if the file was moved away and the run went on.
    if not path.exists() or all(row["step"] > meta["step"] for row in read_rows(workdir)):
        logging.warning("%s is missing: the metrics before the checkpoint are lost", path)
        return
    actual = hashlib.sha256(path.read_bytes()[: recorded["bytes"]]).hexdigest()
    if actual != recorded["sha256"]:
        raise ValueError(
            f"{path} is damaged: its first {recorded['bytes']} bytes are not those that the newest "
            "checkpoint recorded; copy it again, or move it away to go on without these metrics"
        )


def save_config(workdir: epath.PathLike, cfg: Mapping[str, Any]) -> None:
    """Write `config.json`, and its sha256 into `run.json` if that exists."""
    if not jax.process_index():
        _save_records(epath.Path(workdir), cfg, read_run(workdir))


def _save_records(
    workdir: epath.Path, cfg: Mapping[str, Any], run: Mapping[str, Any] | None
) -> None:
    """Write `config.json`, and `run.json` with the sha256 of it."""
    data = _json(config.to_dict(cfg))
    # Both are in `run.json` while one replaces the other, whenever this process is killed.
    stored = [(workdir / CONFIG).read_bytes()] if (workdir / CONFIG).exists() else []
    sums = [hashlib.sha256(text).hexdigest() for text in (*stored, data)]
    if run is not None:
        run = {**run, "config_sha256": list(dict.fromkeys(sums))}
        atomic.write_file(workdir / RUN, _json({**run, "sha256": _sha256_of(run)}))
    atomic.write_file(workdir / CONFIG, data)


def _sha256_of(run: Mapping[str, Any]) -> str:
    """Return the sha256 of the values of `run.json`, except for `sha256`."""
    values = {name: value for name, value in run.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def read_config(workdir: epath.PathLike) -> dict[str, Any] | None:
    """Return the configuration that `save_config` wrote, or None.

    Raises:
        ValueError: The file is damaged.
    """
    path = epath.Path(workdir) / CONFIG
    if not path.exists():
        return None
    stored = untrusted.read_json(path, dict[str, Any])
    sums = (read_run(workdir) or {}).get("config_sha256")
    if sums and hashlib.sha256(path.read_bytes()).hexdigest() not in sums:
        raise ValueError(
            f"{path} is damaged: {RUN} recorded another sha256; copy it again, or move it away, "
            "and the configuration in the newest checkpoint is compared instead"
        )
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
    # Runs of earlier versions have no digests.
    config_sha256: list[str] = []
    sha256: str = ""


def read_run(workdir: epath.PathLike) -> dict[str, Any] | None:
    """Return the contents of `run.json`, `id` and `starts`, or None if there is none.

    Raises:
        ValueError: The file is damaged; names it.
    """
    path = epath.Path(workdir) / RUN
    if not path.exists():
        return None
    run = untrusted.read_json(path, dict[str, Any])
    untrusted.convert(run, _Run, str(path))
    if run.get("sha256", _sha256_of(run)) != _sha256_of(run):
        raise ValueError(
            f"{path} is damaged: it does not match its own sha256; copy it again, or move it away, "
            "and the run goes on under another id"
        )
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
    atomic.write_file(path, data.getvalue())
    # As text: JSON has no nan.
    texts = {name: str(_number(name, value)) for name, value in metrics.items()}
    metadata = {"step": int(step), "ids": list(ids), "metrics": texts}
    atomic.write_file(path.with_suffix(".json"), _json(metadata))
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
    atomic.write_file(path, image_grid.png(pixels))
    for tracker in log.trackers:
        tracker.image(int(step), name, pixels)
    return path
