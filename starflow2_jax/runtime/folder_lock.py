"""Let one process at a time write a folder.

On a local or shared file system a process holds a lock (flock) on `FOLDER/.lock`, which ends with
the process, however that ends; the file says who has it. Object stores, and file systems without
locks, have a lease instead: the process renews `.lock` every few seconds, and another one takes it
over once it is not renewed. Clocks of different hosts are never compared.
"""

import contextlib
import errno
import json
import math
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import logging
from etils import epath

from starflow2_jax.runtime import atomic, json_text

FILE = ".lock"
# Seconds between two renewals of a lease, and without one after which it is taken over.
RENEWAL = 15.0
EXPIRY = 60.0


class LockedError(RuntimeError):
    """Another process writes the folder."""


@contextlib.contextmanager
def lock(folder: epath.PathLike, purpose: str, name: str = FILE) -> Iterator[None]:
    """Exclude other processes from a folder, which is created, until the block ends.

    A folder that was created and is empty at the end is removed.

    Args:
        folder: local, or of an object store.
        purpose: what is done in it, for the error message, such as `trains`.
        name: of the file of the lock in the folder.

    Raises:
        LockedError: Another process has the lock; names its number and host.
    """
    file = epath.Path(folder) / name
    owner = _describe_process()
    descriptor, is_new = None, not file.parent.exists()
    if not atomic.is_remote(folder):
        descriptor = _lock_file(Path(os.fspath(file)), owner, purpose)
    if descriptor is None:
        with _lease(file, owner, purpose):
            yield
        return
    try:
        yield
    finally:
        # While the lock is in force, so that no other process loses the file.
        Path(os.fspath(file)).unlink(missing_ok=True)
        os.close(descriptor)
        if is_new:
            with contextlib.suppress(OSError):
                os.rmdir(folder)


def _describe_process() -> dict[str, Any]:
    """Return what identifies this process: number, host, and the time it started."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "start": _start_of(os.getpid()),
        "id": secrets.token_hex(8),
    }


def _start_of(pid: int) -> str:
    """Return boot, namespace and time of the start of a process, empty if it is not running."""
    with contextlib.suppress(OSError, IndexError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # Containers on one host see other processes under the same numbers.
        namespace = os.stat("/proc/self/ns/pid").st_ino
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else f"{boot}/{namespace} {fields[19]}"
    return ""


def _error(file: epath.PathLike, purpose: str) -> LockedError:
    owner = _read(file)
    return LockedError(
        f"{os.path.dirname(os.fspath(file))}: another process {purpose} here (process "
        f"{owner.get('pid')} on {owner.get('host')}); end it first, or choose another folder"
    )


def _read(file: epath.PathLike) -> dict[str, Any]:
    """Return the owner in the file of a lock, an empty dict if there is no file."""
    file = epath.Path(file)
    try:
        # An object store may have an error of its own for what is absent.
        owner = json_text.decode(file.read_bytes(), str(file)) if file.exists() else {}
    except FileNotFoundError:
        return {}
    except ValueError:
        owner = None
    return owner if isinstance(owner, dict) else {"pid": None}


def _lock_file(file: Path, owner: dict[str, Any], purpose: str) -> int | None:
    """Lock a local file and return its descriptor, or None if the file system has no locks."""
    file.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        result = atomic.lock(descriptor)
        if result and atomic.is_same(file, descriptor):
            break
        os.close(descriptor)
        if result is None:
            return None
        if result is False:
            raise _error(file, purpose)
        # The owner before removed the file between its opening and its lock.
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, (json.dumps(owner) + "\n").encode(), 0)
    return descriptor


@contextlib.contextmanager
def _lease(file: epath.Path, owner: dict[str, Any], purpose: str) -> Iterator[None]:
    _wait_for_lease(file, owner, purpose)
    ended = threading.Event()
    thread = threading.Thread(target=_renew, args=(file, owner, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if _read(file).get("id") == owner["id"]:
            file.unlink(missing_ok=True)


def _wait_for_lease(file: epath.Path, owner: dict[str, Any], purpose: str) -> None:
    """Write a lease once that of another process is absent or no longer renewed."""
    stored = _read(file)
    if stored and not _has_ended(stored, owner):
        logging.warning("%s: waiting up to %.0f s for a lease of %s on %s to be renewed or to end",
                        file, EXPIRY, stored.get("pid"), stored.get("host"))  # fmt: skip
        interval = min(1.0, RENEWAL / 4)
        # Readings are counted, not the clock: a machine that was suspended, with the owner on it,
        # would find that all of the time has passed before the owner can renew its lease.
        for _ in range(math.ceil(EXPIRY / interval)):
            if (current := _read(file)) != stored:
                if current:
                    raise _error(file, purpose)
                break
            time.sleep(interval)
    atomic.write_file(file, json.dumps({**owner, "count": 0}) + "\n")
    # Of two processes that wrote at the same time, the last one has it.
    time.sleep(min(2.0, RENEWAL / 4))
    if _read(file).get("id") != owner["id"]:
        raise _error(file, purpose)


def _has_ended(stored: dict[str, Any], owner: dict[str, Any]) -> bool:
    """Return True if the process of a lease was on this host and has ended."""
    start, pid = stored.get("start"), stored.get("pid")
    is_known = bool(start) and isinstance(pid, int) and stored.get("host") == owner["host"]
    same_boot = str(start).split(" ")[0] == str(owner["start"]).split(" ")[0]
    return is_known and same_boot and _start_of(pid) != start


def _renew(file: epath.Path, owner: dict[str, Any], ended: threading.Event) -> None:
    count = 0
    while not ended.wait(RENEWAL):
        count += 1
        try:
            stored = _read(file)
            if stored.get("id", owner["id"]) != owner["id"]:
                print(f"error: {file}: process {stored.get('pid')} on {stored.get('host')} has "
                      "taken over this folder", file=sys.stderr, flush=True)  # fmt: skip
                os._exit(1)
            atomic.write_file(file, json.dumps({**owner, "count": count}) + "\n")
        except OSError as error:
            if error.errno == errno.ENOENT:
                return  # the folder was removed
            logging.warning("%s could not be renewed: %s", file, error)
