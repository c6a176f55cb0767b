"""The step folders of a run: which there are, which are whole, which go.

A folder is a checkpoint once Orbax has written `commit_success.txt` into it, and sealed once the
digests are there too. Nothing here opens an array.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from absl import logging
from etils import epath

from starflow2_jax.checkpoints import digest

COMMIT_FILE = "commit_success.txt"
FOLDER = "checkpoints"


class Step(NamedTuple):
    """One folder under `WORKDIR/checkpoints`.

    status: `sealed` (committed, digests written), `unsealed` (committed, no digests: killed in
    between) or `leftover` (never committed, or its commit file was lost; never restored).
    """

    step: int
    status: str
    path: epath.Path


def absolute(path: epath.PathLike) -> epath.Path:
    """A path that Orbax takes: not relative. One of an object store, `gs://`, is whole as it is."""
    path = epath.Path(path)
    return path if "://" in os.fspath(path) else path.resolve()


def folder(workdir: epath.PathLike) -> epath.Path:
    """`WORKDIR/checkpoints`, absolute."""
    return absolute(workdir) / FOLDER


def steps(workdir: epath.PathLike) -> list[Step]:
    """Every step folder, in order of step, whatever its status."""
    directory = folder(workdir)
    if not directory.exists():
        return []
    found = []
    for path in directory.iterdir():
        if path.name.isdecimal():
            committed, sealed = (path / COMMIT_FILE).exists(), (path / digest.SIDECAR).exists()
            status = "leftover" if not committed else "sealed" if sealed else "unsealed"
            found.append(Step(int(path.name), status, path))
    return sorted(found)


def committed(workdir: epath.PathLike) -> list[Step]:
    """The steps that can be restored, in order."""
    return [entry for entry in steps(workdir) if entry.status != "leftover"]


def latest(workdir: epath.PathLike) -> int | None:
    """Number of the newest committed step; None where there is none."""
    entries = committed(workdir)
    return entries[-1].step if entries else None


def check_copied(workdir: epath.PathLike) -> None:
    """ValueError where the newest step has digests, which come last, and no commit file.

    No save leaves that behind, and no removal of an old step; a copy cut short does. To take the
    step before it, or to begin anew, is not what is wanted then.
    """
    entries = steps(workdir)
    if entries and entries[-1].status == "leftover":
        newest, before = entries[-1], latest(workdir)
        if (newest.path / digest.SIDECAR).exists():
            rest = "the run would begin anew" if before is None else f"step {before} is whole"
            raise ValueError(
                f"the checkpoint of step {newest.step} is copied in part: {newest.path} has "
                f"{digest.SIDECAR} and no {COMMIT_FILE}; copy it again, or move it away ({rest})"
            )


def locate(path: epath.PathLike) -> tuple[epath.Path, int | None]:
    """(workdir, step) of the path of a run (step None) or of one step, `RUN/checkpoints/120`."""
    path = epath.Path(path)
    if path.name.isdecimal() and path.parent.name == FOLDER:
        return path.parent.parent, int(path.name)
    return path, None


def _on_all(value: int) -> int:
    """Process 0's value: a shared file system need not look the same to every host at once."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def find(workdir: epath.PathLike, step: int | None) -> Step:
    """The committed step asked for, or the newest; FileNotFoundError says what there is instead."""
    directory = folder(workdir)
    entries = {entry.step: entry for entry in steps(workdir)}
    good = [entry.step for entry in entries.values() if entry.status != "leftover"]
    if step is None:
        newest = _on_all(good[-1] if good else -1)
        passed_over = [s for s in entries if s > newest and entries[s].status == "leftover"]
        if newest < 0:
            note = f"; {passed_over} have no {COMMIT_FILE}" if passed_over else ""
            raise FileNotFoundError(f"no committed checkpoint in {directory}{note}")
        if passed_over:
            logging.warning(
                "%s: passing over %s, which have no %s (cut off while saving, or a partial copy); "
                "taking step %d",
                *(directory, passed_over, COMMIT_FILE, newest),
            )
        if newest not in entries:
            raise FileNotFoundError(
                f"process {jax.process_index()} does not see step {newest} in {directory}, which "
                "process 0 sees: the directory has to be shared by all hosts"
            )
        return entries[newest]
    there = f"committed steps in {directory}: {good or 'none'}"
    if step not in entries:
        raise FileNotFoundError(f"there is no checkpoint of step {step}; {there}")
    if entries[step].status == "leftover":
        raise FileNotFoundError(
            f"the checkpoint of step {step} has no {COMMIT_FILE}: it was cut off while saving, "
            f"or copied or deleted in part; {there}"
        )
    return entries[step]


def newest_good(workdir: epath.PathLike, other_than: int) -> str:
    """For an error message: the newest other step whose digests are all right."""
    for entry in reversed(committed(workdir)):
        if entry.step != other_than and entry.status == "sealed":
            try:
                if not digest.mismatches(entry.path, digest.read(entry.path)):
                    return f"newest good step: {entry.step}"
            except ValueError:
                logging.warning("step %d is damaged as well", entry.step)
    return "no other step with good digests"


def wrong_files(path: epath.Path, parts: Sequence[str] | None) -> dict[str, str] | None:
    """What `digest` finds wrong with a step's files (of `parts`, and those that belong to no part).

    None where the step has no sidecar. The hosts share the files among them.
    """
    expected = digest.read(path)
    if expected is None:
        return None
    if parts is not None:
        expected = {n: v for n, v in expected.items() if "/" not in n or n.split("/")[0] in parts}
    names = sorted(expected)
    share = names[jax.process_index() :: jax.process_count()]
    wrong = digest.mismatches(path, {name: expected[name] for name in share})
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        flags = np.array([name in wrong for name in names], np.int32)
        flags = np.atleast_2d(multihost_utils.process_allgather(flags)).any(axis=0)
        wrong = {name: wrong.get(name, "damaged") for name, bad in zip(names, flags) if bad}
    return wrong


def check_files(workdir: epath.PathLike, entry: Step, parts: Sequence[str] | None) -> None:
    """ValueError where a file of a sealed step differs from its digest; a warning if unsealed."""
    try:
        wrong = wrong_files(entry.path, parts)
    except ValueError as error:
        raise ValueError(f"{error}; {newest_good(workdir, entry.step)}") from None
    if wrong is None:
        logging.warning(
            "%s has no %s (stopped between commit and digests): restoring it unchecked; "
            "`convert verify --seal` reads it through and writes them",
            *(entry.path, digest.SIDECAR),
        )
    elif wrong:
        listed = "; ".join(f"{entry.path / name}: {what}" for name, what in wrong.items())
        raise ValueError(
            f"checkpoint of step {entry.step} is damaged: {listed}; "
            f"{newest_good(workdir, entry.step)}"
        )


def remove(path: epath.Path) -> None:
    """Removes a step, its commit file first: a removal cut short leaves no step that is listed."""
    try:
        (path / COMMIT_FILE).unlink(missing_ok=True)
        path.rmtree()
    except OSError as error:
        logging.warning("could not remove %s, will try again: %s", path, error)


def retain(workdir: epath.PathLike, saved: int, keep: int | None, keep_every: int | None) -> None:
    """Removes steps beyond `keep`, and leftovers older than the step that was just committed."""
    for entry in steps(workdir):
        if entry.status == "leftover" and entry.step < saved:
            remove(entry.path)
    if keep is None:
        return
    for entry in committed(workdir)[:-keep]:
        pinned = keep_every and entry.step % keep_every == 0
        if entry.step != saved and not pinned:
            remove(entry.path)
