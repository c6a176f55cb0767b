"""Processes that end with the process that started them, however that ends."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO

PARENT = "STARFLOW2_PARENT"  # the variable with the number of the process that a process ends with


def run(command: Sequence[str], output: IO) -> int:
    """Run a command of this package to its end and return its exit status.

    SIGTERM is passed on, and ends this process as well once the command has ended.

    Args:
        output: an open file for its standard output and errors.
    """
    environment = {**os.environ, PARENT: str(os.getpid())}
    process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    stopped = False

    def stop(signal_number, frame):
        nonlocal stopped
        stopped = True
        process.terminate()

    is_main = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, stop) if is_main else None
    try:
        status = process.wait()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        if is_main:
            signal.signal(signal.SIGTERM, previous)
    if stopped:
        sys.exit(128 + signal.SIGTERM)
    return status


def end_with_parent() -> None:
    """Let this process be killed when the process ends that `STARFLOW2_PARENT` names.

    It does nothing without that variable, which is removed for the processes that this one starts.
    """
    parent = os.environ.pop(PARENT, "")
    if parent.isdigit():
        follow(int(parent))


def follow(parent: int) -> None:
    """Kill this process when its parent, which is expected to be process `parent`, ends."""
    die_with_parent()
    # The parent may have ended before, and elsewhere no signal announces its end.
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def die_with_parent() -> None:
    """Let Linux kill this process when its parent ends from this call on."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _watch(parent: int) -> None:
    while True:
        try:
            os.kill(parent, 0)
        except ProcessLookupError:
            os.kill(os.getpid(), signal.SIGKILL)
        except PermissionError:
            return  # a process of another user has that number: this is another namespace
        if sys.platform == "linux" and os.getppid() == parent:
            return  # the signal is set, and the parent was there after that
        time.sleep(1)
