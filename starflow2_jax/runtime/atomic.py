"""Write files and folders that appear complete or not at all.

Both are written under a temporary name next to the final one, `.NAME.partial`, flushed to the disk,
and renamed. A folder that replaces another one is exchanged with it in a single operation, so that
a complete version stands at the path at every moment.

The writer holds a lock (flock) on what it writes. A `.partial` name without a lock is the leftover
of a killed process, which the next writer of NAME removes. A process number would not tell, since
containers give the same number again. On file systems without locks, what has not changed for a day
is a leftover.

Objects of an object store (`gs://`) are complete when they appear, and are written directly.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from etils import epath

_PARTIAL = re.compile(r"\..+\.partial")
# Seconds without a change after which a temporary file that cannot be locked is a leftover.
_MAX_AGE = 24 * 3600
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Errors of file systems that cannot exchange two folders.
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV)
# Temporary names leave the end of a name out that would exceed the limit of 255 bytes.
_MAX_NAME_BYTES = 200


def is_remote(path: epath.PathLike) -> bool:
    """Return True for a path of an object store."""
    return "://" in os.fspath(path)


def is_partial(name: str) -> bool:
    """Return True if `name` is that of an unfinished file or folder."""
    return _PARTIAL.fullmatch(name) is not None


def write_file(path: epath.PathLike, data: str | bytes | Iterable[Any]) -> None:
    """Write a file, and create its folder. If that fails, what was at `path` is unchanged.

    Args:
        path: local, or of an object store.
        data: text (UTF-8), bytes, or an iterable of parts that are bytes or memoryviews.
    """
    parts: Iterable[Any] = [data.encode()] if isinstance(data, str) else data
    parts = [data] if isinstance(data, bytes | bytearray | memoryview) else parts
    if is_remote(path):
        epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
        epath.Path(path).write_bytes(b"".join(parts))
        return
    with file(path) as temporary, temporary.open("r+b") as stream:
        for part in parts:
            stream.write(part)


@contextlib.contextmanager
def file(path: epath.PathLike) -> Iterator[Path]:
    """Yield the temporary path of a local file, which exists and is empty; rename it at the end.

    Nothing is renamed if the block raises an error. What is no regular file, such as `/dev/null`,
    is yielded itself.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file() and not path.is_dir():
        yield path
        return
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, lock = _create(path, is_folder=False)
        try:
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(lock)


@contextlib.contextmanager
def folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder, and rename it to `path` at the end.

    Nothing is renamed if the block raises an error.

    Args:
        path: local; the folders above it are created.
        overwrite: exchange it with what is at `path`, which is then removed. Otherwise anything but
            an empty folder at `path` is an error.
    """
    path = Path(os.path.realpath(path))
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        recover(path)
        temporary, lock = _create(path, is_folder=True)
        try:
            yield temporary
            for parent, _, names in os.walk(temporary):
                for name in names:
                    sync(Path(parent, name))
                sync(Path(parent))
            if overwrite and path.exists():
                _replace_folder(temporary, path)
            else:
                os.rename(temporary, path)
            sync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            os.close(lock)


def recover(path: str | os.PathLike[str]) -> None:
    """Remove what killed writers of `path` left, and put back a folder that they moved aside.

    A folder is moved aside only on file systems that cannot exchange two folders.
    """
    path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        return
    for entry in _temporaries(path):
        _remove_leftover(entry)
    _recover_earlier(path)
    aside = _temporary_name(path, "replaced")
    if aside.exists():
        if path.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.rename(aside, path)


def remove_folder(path: str | os.PathLike[str]) -> None:
    """Remove a folder at once: it is renamed first, so that a kill leaves no part of it there."""
    path = Path(os.path.realpath(path))
    recover(path)
    removed = _temporary_name(path, f"{secrets.token_hex(4)}.partial")
    os.rename(path, removed)
    shutil.rmtree(removed, ignore_errors=True)


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Remove the unfinished files of killed processes directly under a local folder."""
    if not is_remote(path) and os.path.isdir(path):
        for entry in os.scandir(path):
            if is_partial(entry.name):
                _remove_leftover(Path(entry.path))


def sync(path: str | os.PathLike[str]) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems flush no folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not os.path.isdir(path):
            raise
    finally:
        os.close(descriptor)


# -------------------------------------------------------------------------------- temporary names


def _temporary_name(path: Path, ending: str) -> Path:
    name = os.fsdecode(os.fsencode(path.name)[:_MAX_NAME_BYTES])
    return path.with_name(f".{name}.{ending}")


def _temporaries(path: Path) -> list[Path]:
    """Return the unfinished files or folders of `path`."""
    prefix = _temporary_name(path, "").name
    pattern = re.compile(re.escape(prefix) + r"([0-9a-f]{8}\.)?partial")
    names = os.listdir(path.parent)
    return [path.parent / name for name in sorted(names) if pattern.fullmatch(name)]


def _recover_earlier(path: Path) -> None:
    """Remove what releases before 0.2 left of `path`, and put back a folder that they moved aside.

    Their names end in a process number, which says nothing in containers, and they held no lock:
    what has not changed for a day is a leftover.
    """
    start, number = re.escape(f".{path.name}."), r"\d{1,10}"
    unfinished = re.compile(rf"{start}(building-{number}|{number}\.tmp)")
    replaced = re.compile(rf"{start}(old-{number}|{number}\.old)")
    for name in sorted(os.listdir(path.parent)):
        folder = path.parent / name
        is_replaced = replaced.fullmatch(name) is not None
        if not (is_replaced or unfinished.fullmatch(name)) or not folder.is_dir():
            continue
        if time.time() - _newest(folder) < _MAX_AGE:
            continue
        if is_replaced and not path.exists():
            os.rename(folder, path)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _create(path: Path, *, is_folder: bool) -> tuple[Path, int]:
    """Create the temporary of `path`, and return it with the descriptor that holds its lock."""
    # A writer that finds the plain name in use by another process adds a random part.
    for ending in ("partial", *(f"{secrets.token_hex(4)}.partial" for _ in range(20))):
        temporary = _temporary_name(path, ending)
        if temporary.exists() and not _remove_leftover(temporary):
            continue
        try:
            if is_folder:
                temporary.mkdir()
                descriptor = os.open(temporary, os.O_RDONLY)
            else:
                descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except (FileExistsError, FileNotFoundError):
            if path.parent.is_dir():
                continue  # another process was faster
            raise
        # Between its creation and the lock, another process may have taken it for a leftover.
        if lock(descriptor) is not False and is_same(temporary, descriptor):
            return temporary, descriptor
        os.close(descriptor)
    raise OSError(errno.EBUSY, f"{path}: other processes are writing it")


def is_same(path: Path, descriptor: int) -> bool:
    """Return True if the open file or folder is the one at `path`."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def lock(descriptor: int) -> bool | None:
    """Lock a file or folder until the descriptor is closed or the process ends.

    Returns:
        False if another descriptor holds the lock, None if the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _remove_leftover(path: Path) -> bool:
    """Remove an unfinished file or folder that no process is writing; return True if it is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        locked = lock(descriptor)
        if locked is False or (locked is None and time.time() - _newest(path) < _MAX_AGE):
            return False
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        return not path.exists()
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _newest(path: Path) -> float:
    """Return the time of the last change under a path."""
    return max(entry.lstat().st_mtime for entry in (path, *path.rglob("*")))


# ------------------------------------------------------------------------------------- replacement


def _replace_folder(temporary: Path, path: Path) -> None:
    """Put a folder in the place of another one; `temporary` is then the old one or absent."""
    if _exchange(temporary, path):
        return
    # Without an exchange, nothing is at the path between two renames; `recover` ends what a kill
    # interrupts there.
    aside = _temporary_name(path, "replaced")
    os.rename(path, aside)
    os.rename(temporary, path)
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two paths at once. Return False if this system or file system cannot."""
    libc, names = ctypes.CDLL(None, use_errno=True), (os.fsencode(first), os.fsencode(second))
    try:
        if sys.platform == "darwin":
            failed = libc.renamex_np(*names, 2)  # RENAME_SWAP
        else:
            current = -100  # AT_FDCWD: relative paths start at the working directory
            failed = libc.renameat2(current, names[0], current, names[1], 2)  # RENAME_EXCHANGE
    except AttributeError:
        return False
    if failed and ctypes.get_errno() not in _NO_EXCHANGE:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(second))
    return not failed


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name `path` in an error of the file system that says nothing of it."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            reason = f"the disk is full: {os.strerror(error.errno)}"
            raise OSError(error.errno, f"{path} could not be written: {reason}") from error
        if error.errno and error.filename is None and str(path) not in str(error):
            raise OSError(error.errno, f"{path} could not be written: {error}") from error
        raise
