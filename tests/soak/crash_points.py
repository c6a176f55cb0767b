"""Kill a process, or fill its disk, at the n-th call that changes a file under a folder.

With a C compiler, `crash_shim.c` is preloaded, which sees the calls of every library. Without one,
Python's `os` is patched as in `helpers.kills`: fewer crash points, and no full disk.
"""

import ctypes
import os
import shutil
import signal
import subprocess
from pathlib import Path

from helpers.kills import CALLS

MODES = {"before": 1, "middle": 2, "after": 3, "full": 4}
_PRELOAD = "LD_PRELOAD"
_count = 0


def build(folder: Path) -> Path | None:
    """Compile the shim into a folder; None if there is no compiler or it fails."""
    library = folder / "crash_shim.so"
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    source = Path(__file__).with_name("crash_shim.c")
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source)]
    built = subprocess.run(command, capture_output=True)
    return library if built.returncode == 0 else None


def environment(library: Path | None) -> dict[str, str]:
    """Return the variables of a process whose forks can be armed."""
    return {_PRELOAD: str(library)} if library else {}


def arm(mode: str, number: int, folder: str) -> None:
    """Count calls under a folder from now on, and act at the call with a number (0: only count).

    Args:
        mode: kill `before` or `after` a call, or in the `middle` of a write; or the disk is `full`.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "soak_arm"):
        library.soak_arm(MODES[mode], ctypes.c_long(number), os.fsencode(folder))
        return
    _patch(mode, number)


def count() -> int:
    """Return how many calls there were since `arm`."""
    library = ctypes.CDLL(None)
    return library.soak_count() if hasattr(library, "soak_count") else _count


def _patch(mode: str, number: int) -> None:
    def around(function):
        def call(*args, **options):
            global _count
            _count += 1
            is_next = _count == number
            if is_next and mode == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **options)
            if is_next:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for name in CALLS:
        setattr(os, name, around(getattr(os, name)))
