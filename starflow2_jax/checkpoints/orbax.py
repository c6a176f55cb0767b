"""Checkpoints: the only file that talks to Orbax.

    WORKDIR/checkpoints/120/                    one folder a step
                            params/ ema/ ...    one Orbax part for each field of the state
                            _CHECKPOINT_METADATA    with `meta`: resolved config, model identity
                            commit_success.txt  written last by Orbax; without it there is no step
                            SHA256SUMS          written after that by process 0: the step is sealed

A part of its own for each field lets a sampler read (and check) `ema` without the optimizer.
Saving is asynchronous: `save` returns when the arrays are on the host, the files, the digests and
the retention follow in one background thread, whose errors come out of the next `save`, `wait` or
`close`. Where there are several processes, each of them calls every function here alike; only
`steps`, `latest` and `locate` may be called by one alone.
"""

import concurrent.futures
import dataclasses
import json
import logging as std_logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from etils import epath
from orbax.checkpoint import v1 as ocp

from starflow2_jax.checkpoints import digest
from starflow2_jax.checkpoints.steps import (
    COMMIT_FILE,
    FOLDER,
    Step,
    absolute,
    check_files,
    committed,
    find,
    latest as latest,
    locate as locate,
    newest_good,
    remove,
    retain,
    steps,
)
from starflow2_jax.config import upgrade

# Beside the arrays themselves; without a limit all of them are read at once.
READ_AT_ONCE = 1 << 29


class Row(NamedTuple):
    """One array of a stored step."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


class Report(NamedTuple):
    """Result of `verify` for one step; `problems` is empty when nothing is wrong."""

    step: int
    status: str
    problems: list[str]


@dataclasses.dataclass
class _Host:
    """An abstract array without a sharding: Orbax reads it into a numpy array, on no device."""

    shape: tuple[int, ...]
    dtype: np.dtype


@dataclasses.dataclass
class Writer:
    """What `open` returns: where to save, what to keep, and the one write in flight."""

    workdir: epath.Path
    keep: int | None
    keep_every: int | None
    pool: concurrent.futures.ThreadPoolExecutor
    pending: concurrent.futures.Future | None = None


def _worth_showing(record: std_logging.LogRecord) -> bool:
    """Drops Orbax's own log below warnings (some 80 lines a save), and the tracebacks that it logs
    in each thread a failed write passes through: it raises them too, and `save` says it once."""
    if "_SignalingThread.run()" in record.getMessage():
        return False
    return record.levelno >= std_logging.WARNING or "orbax" not in record.pathname


def _context() -> ocp.Context:
    logging.get_absl_logger().addFilter(_worth_showing)
    context = ocp.Context()
    # Said out loud: the default on a local disk is an atomic rename, under which a step that lost
    # its commit file in a partial copy is still listed and restored.
    context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE
    return context


def _parts(state: Any) -> dict[str, Any]:
    """The top-level fields of a dataclass or mapping."""
    if dataclasses.is_dataclass(state):
        return {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    if isinstance(state, Mapping):
        return dict(state)
    raise TypeError(f"a state is a dataclass or a mapping of named parts, not {type(state)}")


def _described(parts: Any) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """(shape, dtype) by dotted name, e.g. `opt_state.1.0.mu.blocks.0.start`."""
    described = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(parts)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise TypeError(f"{name} is a {type(leaf).__name__}; a state holds arrays only")
        described[name] = (tuple(leaf.shape), np.dtype(leaf.dtype))
    return described


def _reason(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    known = {
        "No space left": "the disk is full: ",
        "uota exceeded": "the disk quota is used up: ",
        "File too large": "a limit on file sizes was hit: ",
    }
    prefix = next((said for words, said in known.items() if words in text), "")
    return prefix + text.splitlines()[0][:400]


# ----------------------------------------------------------------------------------------- saving


def open(workdir: epath.PathLike, *, keep: int | None = 3, keep_every: int | None = None) -> Writer:
    """A writer for `workdir/checkpoints`, made if absent.

    Args:
      keep: how many of the newest steps to keep; None keeps all.
      keep_every: steps divisible by this are never removed.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"keep={keep}: at least one checkpoint has to be kept (None keeps all)")
    workdir = absolute(workdir)
    (workdir / FOLDER).mkdir(parents=True, exist_ok=True)
    pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
    return Writer(workdir, keep, keep_every, pool)


def save(writer: Writer, step: int, state: Any, meta: Mapping[str, Any]) -> None:
    """Starts to save `state`; returns once its arrays are on the host, so they may be donated.

    Args:
      step: number of the step; one that is committed already is refused.
      state: dataclass or mapping; each field is a pytree of arrays with any sharding. A field
        without arrays (`None`, an empty dict) is not stored and comes back as it is asked for.
      meta: anything JSON can hold (tuples come back as lists); read back by `read_meta`.

    Raises:
      RuntimeError: this or the previous save failed; says which step, where and why.
      ValueError: the step exists.  TypeError: `meta` is not JSON, or a leaf is not an array.
    """
    wait(writer)
    step, path = int(step), writer.workdir / FOLDER / str(int(step))
    if (path / COMMIT_FILE).exists():
        raise ValueError(f"{path} is a committed checkpoint already; nothing was written over")
    parts = {name: tree for name, tree in _parts(state).items() if jax.tree.leaves(tree)}
    _described(parts)
    json.dumps(meta)
    try:
        with _context():
            response = ocp.save_checkpointables_async(
                path, parts, overwrite=True, custom_metadata=dict(meta)
            )
    except Exception as error:
        raise _failed(writer, step, error) from error
    writer.pending = writer.pool.submit(_finish, writer, step, response)


def _finish(writer: Writer, step: int, response: ocp.AsyncResponse) -> None:
    """The background thread: wait for the commit, then seal the step, then remove old ones."""
    try:
        response.result()
        if jax.process_index() == 0:
            digest.write(writer.workdir / FOLDER / str(step))
    except Exception as error:
        raise _failed(writer, step, error) from error
    if jax.process_index() == 0:
        retain(writer.workdir, step, writer.keep, writer.keep_every)


def _failed(writer: Writer, step: int, error: Exception) -> RuntimeError:
    """The one message of a failed save. What was written of the step goes, to free the disk."""
    path = writer.workdir / FOLDER / str(step)
    what = "could not be written"
    if (path / COMMIT_FILE).exists():
        what = "is committed, but its digests could not be written"
    elif jax.process_index() == 0 and path.exists():
        remove(path)
    others = [entry.step for entry in committed(writer.workdir) if entry.step != step]
    kept = f"earlier checkpoints are untouched: {others}" if others else "there is no earlier one"
    return RuntimeError(f"checkpoint of step {step} {what} ({path}): {_reason(error)}; {kept}")


def wait(writer: Writer) -> None:
    """Blocks until the save in flight is committed and sealed; raises its error, if any, once."""
    pending, writer.pending = writer.pending, None
    if pending is not None:
        pending.result()


def close(writer: Writer) -> None:
    """`wait`, then ends the background thread. The writer is of no use afterwards."""
    try:
        wait(writer)
    finally:
        writer.pool.shutdown()


# -------------------------------------------------------------------------------------- restoring


def _stored(entry: Step) -> tuple[dict[str, Any], dict[str, Any]]:
    """(array metadata of each part, meta) as stored."""
    try:
        with _context():
            found = ocp.checkpointables_metadata(entry.path)
    except Exception as error:
        raise ValueError(f"{entry.path} cannot be read: {_reason(error)}") from error
    unreadable = [name for name, tree in found.metadata.items() if tree is None]
    if unreadable:
        raise ValueError(f"{entry.path}: the description of {unreadable} cannot be read")
    meta = dict(found.custom_metadata or {})
    if "config" in meta:
        meta["config"] = upgrade(meta["config"])
    return dict(found.metadata), meta


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:20])
    return shown + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def _compare(entry: Step, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """One ValueError with every missing, unexpected and misshapen name together."""
    there, asked = _described(stored), _described(wanted)
    missing = [name for name in asked if name not in there]
    unexpected = [name for name in there if name not in asked]
    differ = []
    for name in asked:
        if name in there and there[name] != asked[name]:
            (shape, dtype), (want_shape, want_dtype) = there[name], asked[name]
            differ.append(
                f"{name} is {dtype}{list(shape)}, expected {want_dtype}{list(want_shape)}"
            )
    if missing or unexpected or differ:
        problems = {
            "missing": missing,
            "unexpected": unexpected,
            "of another shape or dtype": differ,
        }
        text = "; ".join(f"{len(n)} {kind}: {_listed(n)}" for kind, n in problems.items() if n)
        raise ValueError(f"{entry.path} is the checkpoint of another model or optimizer. {text}")


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        if jax.process_count() > 1:
            raise ValueError("with several processes every abstract array needs a sharding")
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def restore(
    workdir: epath.PathLike,
    step: int | None,
    abstract_state: Any,
    *,
    verify: bool = True,
    only: Sequence[str] | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Reads a step into the shapes, dtypes and (current) shardings of `abstract_state`.

    Args:
      workdir: the run's directory.
      step: None takes the newest committed step.
      abstract_state: what was saved, as ShapeDtypeStructs (or arrays) with the shardings wanted
        now, of any mesh; without a sharding an array goes to the first device.
      verify: compare the sha256 of every file that is read before anything is read.
      only: names of parts, e.g. `("ema",)`; the others are not read, not even to be checked, and
        `abstract_state` need not hold them.

    Returns:
      (state of the type of `abstract_state`, meta); with `only`, a dict of those parts.

    Raises:
      FileNotFoundError: no such committed step.
      ValueError: damaged files (named, with the newest good step), or the checkpoint of another
        model (missing, unexpected and misshapen names together).
    """
    entry = find(workdir, step)
    wanted = _parts(abstract_state)
    if only is not None:
        absent = [name for name in only if name not in wanted]
        if absent:
            raise ValueError(f"only={tuple(only)}: the abstract state has no {absent}")
        wanted = {name: wanted[name] for name in only}
    if verify:
        check_files(workdir, entry, only)
    stored, meta = _stored(entry)
    if only is not None:
        stored = {name: tree for name, tree in stored.items() if name in only}
    _compare(entry, stored, wanted)
    targets = {
        n: jax.tree.map(_target, tree) for n, tree in wanted.items() if jax.tree.leaves(tree)
    }
    # Bytes that are read and decoded at a time; one array has to fit.
    largest = max((t.size * t.dtype.itemsize for t in jax.tree.leaves(targets)), default=0)
    context = _context()
    context.memory.read_concurrent_bytes = max(READ_AT_ONCE, 2 * largest)
    try:
        with context:
            loaded = ocp.load_checkpointables(entry.path, targets) if targets else {}
    except Exception as error:
        cause = error.__cause__ or error
        raise ValueError(
            f"{entry.path} cannot be read: {_reason(cause)}; {newest_good(workdir, entry.step)}"
        ) from error
    parts = {name: loaded.get(name, tree) for name, tree in wanted.items()}
    if only is None and dataclasses.is_dataclass(abstract_state):
        return dataclasses.replace(abstract_state, **parts), meta
    return parts, meta


# ---------------------------------------------------------------------------------------- looking


def read_meta(workdir: epath.PathLike, step: int | None = None) -> dict[str, Any]:
    """The `meta` that was given to `save`; checked against its digest, no array is read."""
    entry = find(workdir, step)
    check_files(workdir, entry, ())
    return _stored(entry)[1]


def show(workdir: epath.PathLike, step: int | None = None) -> list[Row]:
    """Name, shape, dtype and bytes of every stored array."""
    described = _described(_stored(find(workdir, step))[0])
    return [
        Row(name, shape, dtype.name, int(np.prod(shape)) * dtype.itemsize)
        for name, (shape, dtype) in described.items()
    ]


def verify(workdir: epath.PathLike, step: int | None = None, *, seal: bool = False) -> list[Report]:
    """Checks one step, or all of them, against their digests.

    Args:
      seal: read every array of an unsealed step through, part by part in host memory, and write its
        digests if all can be read. Nothing else is ever written.
    """
    reports = []
    for entry in steps(workdir) if step is None else [find(workdir, step)]:
        status, problems = entry.status, []
        try:
            if status == "sealed":
                wrong = digest.mismatches(entry.path, digest.read(entry.path))
                problems = [f"{name}: {what}" for name, what in wrong.items()]
            elif status == "leftover":
                problems = [f"no {COMMIT_FILE}: saving was cut off, or it was lost in a copy"]
            elif seal:
                _read_through(entry)
                digest.write(entry.path)
                status = "sealed"
        except ValueError as error:
            problems = [str(error)]
        reports.append(Report(entry.step, status, problems))
    return reports


def _read_through(entry: Step) -> None:
    for name, tree in _stored(entry)[0].items():
        host = jax.tree.map(lambda leaf: _Host(leaf.shape, leaf.dtype), tree)
        try:
            with _context():
                ocp.load_checkpointables(entry.path, {name: host})
        except Exception as error:
            cause = error.__cause__ or error
            raise ValueError(f"{entry.path / name} cannot be read: {_reason(cause)}") from error


def check_frozen(
    workdir: str | epath.Path, meta: Mapping[str, Any], identity: Mapping[str, str]
) -> None:
    """ValueError where what is frozen is read from other files than when the run began."""
    before = meta.get("frozen") or {}
    for name in sorted({*before, *identity}):
        if before.get(name) != identity.get(name):
            raise ValueError(
                f"{workdir}: {name} has changed since the checkpoint: sha256 {before.get(name)} "
                f"then, {identity.get(name)} now"
            )
