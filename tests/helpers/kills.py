"""Kill a function at every call that changes files, in forks of a process that runs no jax."""

import os
import pathlib
import subprocess
import sys
import textwrap

from helpers.paths import ROOT

CALLS = ("open", "mkdir", "rename", "replace", "unlink", "fsync", "close", "rmdir")

# Forks are made by a process of their own, since a process with threads must not fork.
PROGRAM = """
import os, pathlib, signal, sys
{setup}

def run(last):
    "Run `write` in a fork, which kills itself before or after the call with number `last`."
    reader, writer = os.pipe()
    if child := os.fork():
        os.close(writer)
        count = int(os.read(reader, 16) or 0)
        os.close(reader)
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL), status
        return count
    exit_fork, pipe_write, kill, pid = os._exit, os.write, os.kill, os.getpid()
    calls = 0

    def tick():
        nonlocal calls
        calls += 1
        if calls == last:
            kill(pid, signal.SIGKILL)

    def around(function):
        def call(*args, **kwargs):
            tick()
            result = function(*args, **kwargs)
            tick()
            return result
        return call

    for name in {calls}:
        setattr(os, name, around(getattr(os, name)))
    try:
        write()
        pipe_write(writer, str(calls).encode())
    except BaseException:
        import traceback
        traceback.print_exc()
        exit_fork(1)
    exit_fork(0)

prepare()
count = run(0)
for last in range(1, count + 1, {every}):
    prepare()
    run(last)
    check_killed()
    run(0)
    check_finished()
    sys.stderr.flush()
print(count)
"""


def kill_everywhere(setup: str, *args: object, every: int = 1) -> int:
    """Kill `write` at every call in turn, and run it again after that; return the number of calls.

    Args:
        setup: code of a program that defines `prepare` (called before each run), `write`,
            `check_killed` (called after a kill) and `check_finished` (called after the next run).
        args: arguments of the program.
        every: kill at every n-th call only.
    """
    program = PROGRAM.replace("{setup}", textwrap.dedent(setup)).replace("{calls}", repr(CALLS))
    program = program.replace("{every}", str(every))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    result = subprocess.run(
        [sys.executable, "-c", program, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return int(result.stdout.splitlines()[-1])


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    """Return the bytes of every file under a folder, by relative name."""
    files = (path for path in pathlib.Path(folder).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
