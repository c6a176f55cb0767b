"""Save and restore checkpoints. This is the only file that talks to Orbax.

    WORKDIR/checkpoints/120/                    one folder per step
                            params/ ema/ ...    one Orbax part for each field of the state
                            _CHECKPOINT_METADATA    holds `meta`: resolved config, model identity
                            commit_success.txt  written last by Orbax; without it there is no step
                            SHA256SUMS          written after that by process 0: the step is sealed

Each field has a part of its own so that a sampler reads (and checks) `ema` without the optimizer.

Saving is asynchronous. `save` returns when the arrays are on the host; the files, the digests and
the retention follow in one background thread, whose errors are raised by the next `save`, `wait` or
`close`. With several processes, each of them must call every function here alike.
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

from starflow2_jax.checkpoints import digest, steps
from starflow2_jax.checkpoints.steps import COMMIT_FILE, StepFolder
from starflow2_jax.checkpoints.tensor_files import raise_problems
from starflow2_jax.config import upgrade

# Bytes read and decoded at a time, in addition to the arrays themselves. Orbax's default has no
# limit and reads all arrays at once.
MAX_READ_BYTES = 1 << 29


class ArrayInfo(NamedTuple):
    """One array of a stored step, without its values."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


class StepReport(NamedTuple):
    """Result of `verify` for one step; `problems` is empty if nothing is wrong."""

    step: int
    status: str
    problems: list[str]


@dataclasses.dataclass
class _HostArray:
    """An abstract array without a sharding: Orbax reads it into a numpy array, on no device."""

    shape: tuple[int, ...]
    dtype: np.dtype


@dataclasses.dataclass
class Writer:
    """The state of saving: where to save, what to keep, and the one write in flight."""

    workdir: epath.Path
    keep: int | None
    keep_every: int | None
    pool: concurrent.futures.ThreadPoolExecutor
    pending: concurrent.futures.Future | None = None

    def folder(self, step: int) -> epath.Path:
        """Return the folder of a step."""
        return self.workdir / steps.FOLDER / str(step)


def _is_worth_logging(record: std_logging.LogRecord) -> bool:
    """Return False for Orbax's info messages (some 80 lines per save) and thread tracebacks.

    Orbax logs a traceback in each thread that a failed write passes through. It raises the error as
    well, and `save` reports it once.
    """
    if "_SignalingThread.run()" in record.getMessage():
        return False
    return record.levelno >= std_logging.WARNING or "orbax" not in record.pathname


def _context() -> ocp.Context:
    logging.get_absl_logger().addFilter(_is_worth_logging)
    context = ocp.Context()
    # Orbax's default on a local disk is an atomic rename. Under it, a step that lost its commit
    # file in a partial copy would still be listed and restored.
    context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE
    return context


def _parts(state: Any) -> dict[str, Any]:
    """Return the top-level fields of a dataclass or mapping."""
    if dataclasses.is_dataclass(state):
        return {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    if isinstance(state, Mapping):
        return dict(state)
    raise TypeError(f"a state is a dataclass or a mapping of named parts, not {type(state)}")


def _shapes_and_dtypes(parts: Any) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Return (shape, dtype) by dotted name, e.g. `opt_state.1.0.mu.blocks.0.start`."""
    described = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(parts)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise TypeError(f"{name} is a {type(leaf).__name__}; a state holds arrays only")
        described[name] = (tuple(leaf.shape), np.dtype(leaf.dtype))
    return described


def _reason(error: BaseException) -> str:
    """Return the first line of an error, after a plain explanation of the known causes."""
    text = str(error).strip() or type(error).__name__
    explanations = {
        "No space left": "the disk is full: ",
        "uota exceeded": "the disk quota is used up: ",
        "File too large": "a limit on file sizes was hit: ",
    }
    prefix = next((plain for phrase, plain in explanations.items() if phrase in text), "")
    return prefix + text.splitlines()[0][:400]


# ----------------------------------------------------------------------------------------- saving


def open(workdir: epath.PathLike, *, keep: int | None = 3, keep_every: int | None = None) -> Writer:
    """Return a writer for `workdir/checkpoints`; create the folder if it is absent.

    Args:
        keep: how many of the newest steps to keep; None keeps all.
        keep_every: steps divisible by this are never removed.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"keep={keep}: at least one checkpoint has to be kept (None keeps all)")
    workdir = steps.absolute(workdir)
    (workdir / steps.FOLDER).mkdir(parents=True, exist_ok=True)
    pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
    return Writer(workdir, keep, keep_every, pool)


def save(writer: Writer, step: int, state: Any, meta: Mapping[str, Any]) -> None:
    """Start to save `state`. Return once its arrays are on the host, so that they may be donated.

    Args:
        state: dataclass or mapping; each field is a pytree of arrays with any sharding. A field
            without arrays (`None`, an empty dict) is not stored, and `restore` returns it as it is
            in the abstract state.
        meta: anything JSON can hold (tuples come back as lists); `read_meta` returns it.

    Raises:
        RuntimeError: This or the previous save failed; the message says which step, where and why.
        ValueError: The step is committed already.
        TypeError: `meta` is not JSON, or a leaf is not an array.
    """
    wait(writer)
    step, path = int(step), writer.folder(int(step))
    if (path / COMMIT_FILE).exists():
        raise ValueError(f"{path} is a committed checkpoint already; nothing was written over")
    parts = {name: tree for name, tree in _parts(state).items() if jax.tree.leaves(tree)}
    _shapes_and_dtypes(parts)
    json.dumps(meta)
    try:
        with _context():
            response = ocp.save_checkpointables_async(
                path, parts, overwrite=True, custom_metadata=dict(meta)
            )
    except Exception as error:
        raise _save_error(writer, step, error) from error
    writer.pending = writer.pool.submit(_finish, writer, step, response)


def _finish(writer: Writer, step: int, response: ocp.AsyncResponse) -> None:
    """Wait for the commit, then seal the step, then remove old ones (in the background thread)."""
    try:
        response.result()
        if jax.process_index() == 0:
            digest.write(writer.folder(step))
    except Exception as error:
        raise _save_error(writer, step, error) from error
    if jax.process_index() == 0:
        steps.retain(writer.workdir, step, writer.keep, writer.keep_every)


def _save_error(writer: Writer, step: int, error: Exception) -> RuntimeError:
    """Return the error of a failed save, after removing what it wrote, to free the disk."""
    path = writer.folder(step)
    failure = "could not be written"
    if (path / COMMIT_FILE).exists():
        failure = "is committed, but its digests could not be written"
    elif jax.process_index() == 0 and path.exists():
        steps.remove(path)
    earlier = [entry.step for entry in steps.committed(writer.workdir) if entry.step != step]
    note = f"earlier checkpoints are untouched: {earlier}" if earlier else "there is no earlier one"
    return RuntimeError(f"checkpoint of step {step} {failure} ({path}): {_reason(error)}; {note}")


def wait(writer: Writer) -> None:
    """Block until the save in flight is committed and sealed. Raise its error, if any, once."""
    pending, writer.pending = writer.pending, None
    if pending is not None:
        pending.result()


def close(writer: Writer) -> None:
    """Wait for the save in flight, then end the background thread and with it the writer's use."""
    try:
        wait(writer)
    finally:
        writer.pool.shutdown()


# -------------------------------------------------------------------------------------- restoring


def _read_metadata(entry: StepFolder) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the array metadata of each part and `meta`, as stored."""
    try:
        with _context():
            stored = ocp.checkpointables_metadata(entry.path)
    except Exception as error:
        raise ValueError(f"{entry.path} cannot be read: {_reason(error)}") from error
    unreadable = [name for name, tree in stored.metadata.items() if tree is None]
    if unreadable:
        parts = ", ".join(str(entry.path / name) for name in unreadable)
        reason = steps.pattern_problem(entry.path)
        raise ValueError(
            f"{parts}: the description of the arrays (_METADATA and d/) cannot be read"
            + (f": {reason}" if reason else "")
        )
    meta = dict(stored.custom_metadata or {})
    if "config" in meta:
        meta["config"] = upgrade(meta["config"])
    return dict(stored.metadata), meta


def _compare(entry: StepFolder, stored: Mapping[str, Any], requested: Mapping[str, Any]) -> None:
    """Raise one ValueError that lists missing, unexpected and misshapen arrays together."""
    actual, expected = _shapes_and_dtypes(stored), _shapes_and_dtypes(requested)

    def text(array: tuple[tuple[int, ...], np.dtype]) -> str:
        return f"{array[1]}{list(array[0])}"

    problems = {
        "missing": [name for name in expected if name not in actual],
        "unexpected": [name for name in actual if name not in expected],
        "of another shape or dtype": [
            f"{name} is {text(actual[name])}, expected {text(expected[name])}"
            for name in expected
            if name in actual and actual[name] != expected[name]
        ],
    }
    raise_problems(f"{entry.path} is the checkpoint of another model or optimizer", problems)


def _restore_target(leaf: Any) -> jax.ShapeDtypeStruct:
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
    """Read a step into the shapes, dtypes and shardings of `abstract_state`.

    Args:
        abstract_state: the saved state as ShapeDtypeStructs (or arrays) with the shardings of the
            result, on any mesh; an array without a sharding goes to the first device.
        verify: compare the sha256 of every file that is read before anything is read.
        only: names of parts, e.g. `("ema",)`. The others are neither read nor checked, and
            `abstract_state` need not contain them.

    Returns:
        (state of the type of `abstract_state`, meta); with `only`, a dict of those parts.

    Raises:
        FileNotFoundError: There is no such committed step.
        ValueError: Files are damaged (named, with the newest good step), or this is the checkpoint
            of another model (missing, unexpected and misshapen arrays are listed together).
    """
    entry = steps.find(workdir, step)
    requested = _parts(abstract_state)
    if only is not None:
        absent = [name for name in only if name not in requested]
        if absent:
            raise ValueError(f"only={tuple(only)}: the abstract state has no {absent}")
        requested = {name: requested[name] for name in only}
    if verify:
        steps.check_files(workdir, entry, only)
    stored, meta = _read_metadata(entry)
    if only is not None:
        stored = {name: tree for name, tree in stored.items() if name in only}
    _compare(entry, stored, requested)
    targets = {
        name: jax.tree.map(_restore_target, tree)
        for name, tree in requested.items()
        if jax.tree.leaves(tree)
    }
    # Orbax refuses an array that is larger than the limit.
    largest = max((t.size * t.dtype.itemsize for t in jax.tree.leaves(targets)), default=0)
    context = _context()
    context.memory.read_concurrent_bytes = max(MAX_READ_BYTES, 2 * largest)
    try:
        with context:
            loaded = ocp.load_checkpointables(entry.path, targets) if targets else {}
    except Exception as error:
        cause = error.__cause__ or error
        raise ValueError(
            f"{entry.path} cannot be read: {_reason(cause)}; "
            f"{steps.newest_good(workdir, entry.step)}"
        ) from error
    parts = {name: loaded.get(name, tree) for name, tree in requested.items()}
    if only is None and dataclasses.is_dataclass(abstract_state):
        return dataclasses.replace(abstract_state, **parts), meta
    return parts, meta


# -------------------------------------------------------------------------------------- inspecting


def read_meta(workdir: epath.PathLike, step: int | None = None) -> dict[str, Any]:
    """Return the `meta` of a step, checked against its digest. No array is read."""
    entry = steps.find(workdir, step)
    steps.check_files(workdir, entry, ())
    return _read_metadata(entry)[1]


def show(workdir: epath.PathLike, step: int | None = None) -> list[ArrayInfo]:
    """Return name, shape, dtype and bytes of every stored array."""
    entry = steps.find(workdir, step)
    steps.check_files(workdir, entry, ())
    arrays = _shapes_and_dtypes(_read_metadata(entry)[0])
    return [
        ArrayInfo(name, shape, dtype.name, int(np.prod(shape)) * dtype.itemsize)
        for name, (shape, dtype) in arrays.items()
    ]


def verify(
    workdir: epath.PathLike, step: int | None = None, *, seal: bool = False
) -> list[StepReport]:
    """Check one step, or all of them if `step` is None, against their digests.

    Args:
        seal: read every array of an unsealed step through, part by part in host memory, and write
            its digests if all can be read. Nothing else is ever written.
    """
    reports = []
    for entry in steps.steps(workdir) if step is None else [steps.find(workdir, step)]:
        status, problems = entry.status, []
        try:
            if status == "sealed":
                damaged = digest.mismatches(entry.path, digest.read(entry.path))
                problems = [f"{name}: {problem}" for name, problem in damaged.items()]
                if not problems:
                    _read_metadata(entry)  # intact files may still be unreadable
            elif status == "leftover":
                problems = [f"no {COMMIT_FILE}: saving was cut off, or it was lost in a copy"]
            elif seal:
                _read_through(entry)
                digest.write(entry.path)
                status = "sealed"
        except ValueError as error:
            problems = [str(error)]
        reports.append(StepReport(entry.step, status, problems))
    return reports


def seal(workdir: epath.PathLike, step: int, *, is_restored: bool = False) -> None:
    """Write the digests of a step whose process was killed between the commit and the digests.

    Args:
        workdir: the run.
        step: number of the step; nothing is done if it has digests.
        is_restored: all its arrays were just restored. Otherwise they are read through first, and
            with several processes, which would have to agree on it, nothing is done.

    Raises:
        ValueError: An array cannot be read.
    """
    entry = steps.find(workdir, step)
    if entry.status != "unsealed" or not (is_restored or jax.process_count() == 1):
        return
    if not is_restored:
        _read_through(entry)
    if jax.process_index() == 0:
        digest.write(entry.path)


def _read_through(entry: StepFolder) -> None:
    """Raise a ValueError if an array of a step cannot be read."""
    for name, tree in _read_metadata(entry)[0].items():
        host = jax.tree.map(lambda leaf: _HostArray(leaf.shape, leaf.dtype), tree)
        try:
            with _context():
                ocp.load_checkpointables(entry.path, {name: host})
        except Exception as error:
            cause = error.__cause__ or error
            raise ValueError(f"{entry.path / name} cannot be read: {_reason(cause)}") from error


def check_frozen(
    workdir: str | epath.Path, meta: Mapping[str, Any], identity: Mapping[str, str]
) -> None:
    """Refuse to resume a run whose frozen models have changed.

    `identity` has the sha256 of every frozen model as it is now, by name.
    """
    recorded = meta.get("frozen") or {}
    for name in sorted({*recorded, *identity}):
        if recorded.get(name) != identity.get(name):
            raise ValueError(
                f"{workdir}: {name} has changed since the checkpoint: sha256 "
                f"{recorded.get(name)} then, {identity.get(name)} now"
            )
