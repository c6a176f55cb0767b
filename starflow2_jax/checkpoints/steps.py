"""The step folders of a run: list them, find the one to restore, check and remove them.

A folder is a committed checkpoint once Orbax has written `commit_success.txt` into it, and sealed
once its digests exist as well. Nothing here opens an array.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from absl import logging
from etils import epath

from starflow2_jax.checkpoints import digest
from starflow2_jax.runtime import atomic

COMMIT_FILE = "commit_success.txt"
FOLDER = "checkpoints"


# Files with the values of a part's arrays.
_VALUES = re.compile(r"[^/]+/ocdbt\.process_[^/]+/d/.*", re.DOTALL)
# Orbax finds the files of a checkpoint by patterns, and takes its folder for a part of them.
_PATTERN_CHARACTERS = "[]*?"


def pattern_problem(path: epath.PathLike) -> str:
    """Return why checkpoints under a path cannot be read, empty if they can."""
    special = [character for character in _PATTERN_CHARACTERS if character in str(path)]
    if not special:
        return ""
    return (
        f"checkpoints under a path with {' '.join(special)} cannot be read again, as it is taken "
        "for a pattern; choose another path"
    )


class StepFolder(NamedTuple):
    """One folder under `WORKDIR/checkpoints`."""

    step: int  # number of the step
    # `sealed` (committed, with digests), `unsealed` (committed, but the process was killed before
    # it wrote digests) or `leftover` (never committed, or its commit file was lost; never restored)
    status: str
    path: epath.Path  # the folder


def absolute(path: epath.PathLike) -> epath.Path:
    """Return an absolute path, as Orbax requires. Object store paths (`gs://`) are unchanged."""
    path = epath.Path(path)
    return path if atomic.is_remote(path) else path.resolve()


def folder(workdir: epath.PathLike) -> epath.Path:
    """Return `WORKDIR/checkpoints` as an absolute path."""
    return absolute(workdir) / FOLDER


def steps(workdir: epath.PathLike) -> list[StepFolder]:
    """Return every step folder in order of step, whatever its status."""
    directory = folder(workdir)
    if not directory.exists():
        return []
    entries = []
    for path in directory.iterdir():
        if path.name.isdecimal():
            is_committed = (path / COMMIT_FILE).exists()
            is_sealed = (path / digest.SIDECAR).exists()
            status = "leftover" if not is_committed else "sealed" if is_sealed else "unsealed"
            entries.append(StepFolder(int(path.name), status, path))
    return sorted(entries)


def committed(workdir: epath.PathLike) -> list[StepFolder]:
    """Return the steps that can be restored, in order."""
    return [entry for entry in steps(workdir) if entry.status != "leftover"]


def latest(workdir: epath.PathLike) -> int | None:
    """Return the number of the newest committed step, or None if there is none."""
    entries = committed(workdir)
    return entries[-1].step if entries else None


def check_copied(workdir: epath.PathLike) -> None:
    """Refuse a run whose newest step has digests (written last) but no commit file.

    Neither a save nor the removal of an old step leaves that state; an interrupted copy does.
    Silently taking the step before it, or starting from scratch, would lose training.
    """
    entries = steps(workdir)
    if not entries or entries[-1].status != "leftover":
        return
    newest, previous = entries[-1], latest(workdir)
    if (newest.path / digest.SIDECAR).exists():
        alternative = (
            "the run would begin anew" if previous is None else f"step {previous} is whole"
        )
        raise ValueError(
            f"the checkpoint of step {newest.step} is copied in part: {newest.path} has "
            f"{digest.SIDECAR} and no {COMMIT_FILE}; copy it again, or move it away ({alternative})"
        )


def locate(path: epath.PathLike) -> tuple[epath.Path, int | None]:
    """Split the path of a run, or of one step `RUN/checkpoints/120`, into workdir and step."""
    path = epath.Path(path)
    if path.name.isdecimal() and path.parent.name == FOLDER:
        return path.parent.parent, int(path.name)
    return path, None


def _broadcast(value: int) -> int:
    """Return process 0's value: hosts may see a shared file system at different times."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def find(workdir: epath.PathLike, step: int | None) -> StepFolder:
    """Return the committed folder of `step`, or the newest one if `step` is None."""
    directory = folder(workdir)
    entries = {entry.step: entry for entry in steps(workdir)}
    good = [entry.step for entry in entries.values() if entry.status != "leftover"]
    if step is None:
        return _find_newest(directory, entries, good)
    listed = f"committed steps in {directory}: {good or 'none'}"
    if step not in entries:
        raise FileNotFoundError(f"there is no checkpoint of step {step}; {listed}")
    if entries[step].status == "leftover":
        raise FileNotFoundError(
            f"the checkpoint of step {step} has no {COMMIT_FILE}: it was cut off while saving, "
            f"or copied or deleted in part; {listed}"
        )
    return entries[step]


def _find_newest(
    directory: epath.Path, entries: dict[int, StepFolder], good: list[int]
) -> StepFolder:
    newest = _broadcast(good[-1] if good else -1)
    skipped = [s for s in entries if s > newest and entries[s].status == "leftover"]
    if newest < 0:
        note = f"; {skipped} have no {COMMIT_FILE}" if skipped else ""
        raise FileNotFoundError(f"no committed checkpoint in {directory}{note}")
    if skipped:
        message = "%s: skipping %s, without %s (save cut off, or a partial copy); taking step %d"
        logging.warning(message, directory, skipped, COMMIT_FILE, newest)
    if newest not in entries:
        raise FileNotFoundError(
            f"process {jax.process_index()} does not see step {newest} in {directory}, which "
            "process 0 sees: the directory has to be shared by all hosts"
        )
    return entries[newest]


def newest_good(workdir: epath.PathLike, other_than: int) -> str:
    """Return a phrase for an error message: the newest other step whose digests all match."""
    for entry in reversed(committed(workdir)):
        if entry.step != other_than and entry.status == "sealed":
            try:
                if not digest.mismatches(entry.path, digest.read(entry.path)):
                    return f"newest good step: {entry.step}"
            except ValueError:
                logging.warning("step %d is damaged as well", entry.step)
    return "no other step with good digests"


def damaged_files(path: epath.Path, parts: Sequence[str] | None) -> dict[str, str] | None:
    """Return the problem of each damaged file of a step, or None if the step has no sidecar.

    The hosts share the files among them. `parts` names the Orbax parts whose arrays to check, in
    addition to the files that describe the step and every part; None checks all.
    """
    expected = digest.read(path)
    if expected is None:
        return None
    if parts is not None:
        # Orbax reads the descriptions of all parts that are there (those of the arrays are in the
        # part's own `d/`, their values in that of each process), and names no file if one is
        # damaged. A copy may lack a part that is not read, such as the optimizer's.
        expected = {
            name: value
            for name, value in expected.items()
            if "/" not in name
            or name.split("/")[0] in parts
            or (not _VALUES.fullmatch(name) and (path / name.split("/")[0]).exists())
        }
    names = sorted(expected)
    share = names[jax.process_index() :: jax.process_count()]
    problems = digest.mismatches(path, {name: expected[name] for name in share})
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        flags = np.array([name in problems for name in names], np.int32)
        flags = np.atleast_2d(multihost_utils.process_allgather(flags)).any(axis=0)
        problems = {name: problems.get(name, "damaged") for name, bad in zip(names, flags) if bad}
    return problems


def check_files(workdir: epath.PathLike, entry: StepFolder, parts: Sequence[str] | None) -> None:
    """Check a step's files against their digests; log a warning if the step is unsealed."""
    try:
        problems = damaged_files(entry.path, parts)
    except ValueError as error:
        raise ValueError(f"{error}; {newest_good(workdir, entry.step)}") from None
    if problems is None:
        logging.warning(
            "%s has no %s (stopped between commit and digests): restoring it unchecked; "
            "`convert verify --seal` reads it through and writes them",
            entry.path,
            digest.SIDECAR,
        )
    elif problems:
        listed = "; ".join(f"{entry.path / name}: {text}" for name, text in problems.items())
        raise ValueError(
            f"checkpoint of step {entry.step} is damaged: {listed}; "
            f"{newest_good(workdir, entry.step)}"
        )


def remove(path: epath.Path) -> None:
    """Remove a step, its commit file first, so that an interrupted removal leaves no valid step."""
    try:
        (path / COMMIT_FILE).unlink(missing_ok=True)
        path.rmtree()
    except OSError as error:
        logging.warning("could not remove %s, will try again: %s", path, error)


def retain(workdir: epath.PathLike, saved: int, keep: int | None, keep_every: int | None) -> None:
    """Remove old steps (see `orbax.open`), and leftovers older than `saved`, the newest step."""
    for entry in steps(workdir):
        if entry.status == "leftover" and entry.step < saved:
            remove(entry.path)
    if keep is None:
        return
    for entry in committed(workdir)[:-keep]:
        pinned = keep_every and entry.step % keep_every == 0
        if entry.step != saved and not pinned:
            remove(entry.path)
