"""Run commands of the package in forks of one process that has imported everything.

A fork saves the seconds that a start of Python with jax takes. The process that forks has started
no backend of jax and no threads of its own.

    server = ForkServer(folder)
    server.run(Job("starflow2_jax.prepare", ("import", ...), cwd)) -> Ending
"""

import atexit
import contextlib
import dataclasses
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

from helpers.paths import ROOT

from soak import crash_points
from starflow2_jax.runtime import child_process

# Modules that the commands import; the commands themselves define flags when they start.
PRELOADED = """
helpers.starflow2_folders matplotlib.pyplot pyarrow.parquet safetensors
soak.fuzz_data soak.fuzz_models
starflow2_jax.checkpoints.open_model starflow2_jax.checkpoints.orbax tokenizers transformers
starflow2_jax.evaluation.codec starflow2_jax.evaluation.report.run_report
starflow2_jax.evaluation.shapes.report starflow2_jax.evaluation.shapes.suite
starflow2_jax.importers.registry starflow2_jax.inference.load starflow2_jax.latents.write
starflow2_jax.training.init_from starflow2_jax.training.run_data
starflow2_jax.training.tasks.registry
"""
LIGHT = "PIL.Image starflow2_jax.importers.registry soak.fuzz_data soak.fuzz_models"
_ORPHAN_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Job:
    """A command or function to run in a fork, and how to end it."""

    module: str  # of a command, or `module:function` of a function of strings
    arguments: tuple[str, ...]
    cwd: str
    timeout: float = 240.0  # seconds
    mode: str = ""  # see `crash_points.arm`; empty: not armed
    number: int = 0
    kill_after: float = 0.0  # seconds after which the process is killed; 0: never
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Ending:
    """The end of a job."""

    status: int  # exit status; -N after signal N
    seconds: float
    output: str  # stdout
    errors: str  # stderr
    timed_out: bool
    calls: int  # that changed files, of an armed job that ended by itself
    has_orphans: bool  # a process that it started outlived it


class ForkServer:
    """A process that runs jobs in forks, one after the other."""

    def __init__(self, folder: Path, preload: str = PRELOADED):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.library = crash_points.build(folder)
        variables = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "TOKENIZERS_PARALLELISM": "false",
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            **crash_points.environment(self.library),
            child_process.PARENT: str(os.getpid()),
        }
        variables.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "programs"))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "soak.fork_server", preload],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=variables,
            cwd=folder,
        )
        self.process.stdout.readline()  # it has imported the modules

    def run(self, job: Job) -> Ending:
        """Run a job to its end."""
        names = {name: str(self.folder / name) for name in ("stdout", "stderr")}
        request = {**dataclasses.asdict(job), **names}
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"the fork server ended with status {self.process.wait()}")
        texts = [Path(names[n]).read_text("utf-8", "replace") for n in ("stdout", "stderr")]
        return Ending(output=texts[0], errors=texts[1], **json.loads(line))

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


# --------------------------------------------------------------------------------------- the server


def serve(preload: str) -> None:
    """Read jobs from stdin and write how they ended to stdout, until stdin is closed."""
    child_process.end_with_parent()
    os.environ.pop("LD_PRELOAD", None)  # processes that a job starts are not armed
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in preload.split():
        importlib.import_module(name)
    replies.write("ready\n")
    replies.flush()
    for line in sys.stdin:
        reply = _run(json.loads(line))
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _run(job: dict) -> dict:
    reader, writer = os.pipe()
    start_time = time.monotonic()
    pid = os.fork()
    if not pid:
        os.close(reader)
        _run_in_fork(job, writer)
    os.close(writer)
    with contextlib.suppress(PermissionError, ProcessLookupError):
        os.setpgid(pid, pid)
    limit = job["kill_after"] or job["timeout"]
    is_over = _wait(pid, limit)
    if not is_over:
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    seconds = time.monotonic() - start_time
    calls = int(os.read(reader, 32) or 0) if is_over else 0
    os.close(reader)
    return {
        "status": status,
        "seconds": seconds,
        "timed_out": not is_over and not job["kill_after"],
        "calls": calls,
        "has_orphans": _end_group(pid),
    }


def _wait(pid: int, seconds: float) -> bool:
    """Return True if a process ends within some seconds; it remains to be collected."""
    descriptor = os.pidfd_open(pid)
    try:
        return bool(select.select([descriptor], [], [], seconds)[0])
    finally:
        os.close(descriptor)


def _end_group(pid: int) -> bool:
    """Return True if processes of a group outlive its first one; they are killed."""
    deadline = time.monotonic() + _ORPHAN_SECONDS
    while time.monotonic() < deadline:
        try:
            os.killpg(pid, 0)
        except (ProcessLookupError, PermissionError):
            return False
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    return True


def _run_in_fork(job: dict, writer: int) -> None:
    """Run a job and end this process as the interpreter does."""
    status = 1
    try:
        with contextlib.suppress(PermissionError):
            os.setpgid(0, 0)
        child_process.die_with_parent()
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            file = os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(file, descriptor)
        os.chdir(job["cwd"])
        os.environ.update(job["environment"])
        if job["mode"]:
            crash_points.arm(job["mode"], job["number"], os.path.realpath(job["cwd"]))
        status = _call(job["module"], job["arguments"])
        threading._shutdown()
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        if job["mode"]:
            os.write(writer, str(crash_points.count()).encode())
        os._exit(status)


def _call(module: str, arguments: list[str]) -> int:
    name, _, function = module.partition(":")
    if function:
        getattr(importlib.import_module(name), function)(*arguments)
        return 0
    sys.argv = [name, *arguments]
    sys.orig_argv = ["python", "-m", name, *arguments]
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    serve(sys.argv[1])
