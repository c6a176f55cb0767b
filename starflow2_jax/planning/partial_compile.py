"""Compilation for a TPU without code generation, the slowest phase, which a plan does not need.

The compiler dumps the optimized program and its buffer assignment before it generates machine code.
It can be stopped only together with its process, so `run_in_subprocess` gives it one.
"""

import multiprocessing
import os
import pathlib
import re
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from starflow2_jax.runtime import child_process

_PROGRAM = "*.after_optimizations_after_buffer_assignment.txt"
_BUFFERS = "*.after_optimizations-buffer-assignment.txt"
_USAGE = "*.after_optimizations-memory-usage-report.txt"
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class PartialExecutable:
    """The parts of `jax.stages.Compiled` that are known before code generation.

    The sizes are named as in `Compiled.memory_analysis()`.
    """

    text: str
    argument_size_in_bytes: int
    output_size_in_bytes: int
    alias_size_in_bytes: int
    temp_size_in_bytes: int
    generated_code_size_in_bytes: int = 0

    def as_text(self) -> str:
        """Return the text of the program."""
        return self.text

    def memory_analysis(self) -> "PartialExecutable":
        """Return the object that holds the sizes."""
        return self


def compile_without_codegen(lowered: Any) -> Any:
    """Return a `PartialExecutable`, or the compiled program if the compiler finishes first.

    The compiler may continue in a thread of this process; see `run_in_subprocess`.
    """
    folder = pathlib.Path(tempfile.mkdtemp(prefix="plan_"))
    outcome: dict[str, Any] = {}

    def compile_all():
        try:
            outcome["executable"] = lowered.compile(
                compiler_options={"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}
            )
        except BaseException as error:  # raised again in the waiting thread
            outcome["error"] = error

    thread = threading.Thread(target=compile_all, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(_POLL_SECONDS)
            if (executable := read_dump(folder)) is not None:
                return executable
    finally:
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
    if "error" in outcome:
        raise outcome["error"]
    return outcome["executable"]


def read_dump(folder: pathlib.Path) -> PartialExecutable | None:
    """Read the compiler's dump from a folder; return None while it is incomplete."""
    texts = []
    for pattern in (_PROGRAM, _BUFFERS, _USAGE):
        paths = sorted(folder.glob(pattern))
        if not paths:
            return None
        texts.append(paths[-1].read_text())
    program, buffers, usage = texts
    total = re.search(r"Memory Space: default \(color=0\)\s+Total bytes: (\d+)", usage)
    # The entry is the last computation in the text.
    entry = program.find("\nENTRY ")
    if entry < 0 or not program[entry:].rstrip().endswith("\n}") or not total:
        return None
    sizes = {"argument": 0, "output": 0, "alias": 0}
    for size, rest in re.findall(r"^allocation \d+: size (\d+), (.*)$", buffers, re.M):
        if re.search(r"\bcolor [1-9]", rest):  # not in main memory
            continue
        is_argument, is_output = "parameter " in rest, "maybe-live-out" in rest
        sizes["argument"] += int(size) * is_argument
        sizes["output"] += int(size) * is_output
        sizes["alias"] += int(size) * (is_argument and is_output)
    return PartialExecutable(
        text=program,
        argument_size_in_bytes=sizes["argument"],
        output_size_in_bytes=sizes["output"],
        alias_size_in_bytes=sizes["alias"],
        temp_size_in_bytes=int(total[1]) - sizes["argument"] - sizes["output"] + sizes["alias"],
    )


def run_in_subprocess(function: Callable[..., Any], *args: Any) -> Any:
    """Return `function(*args)`, computed in a new process that is killed afterwards.

    The function, its arguments and its result must be picklable. Its errors are raised here.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_run_child, args=(sender, os.getpid(), function, args))
    child.start()
    sender.close()
    try:
        succeeded, result = receiver.recv()
    except EOFError:
        child.join()
        raise RuntimeError(
            f"plan: the compiler's process ended with code {child.exitcode} and no answer; "
            "--whole compiles in this process and shows why"
        ) from None
    finally:
        child.kill()
        child.join()
    if not succeeded:
        raise result
    return result


def _run_child(pipe, parent, function, args):
    child_process.follow(parent)
    # As in the command: jax would wait for a TPU if libtpu is installed without one.
    jax.config.update("jax_platforms", "cpu")
    try:
        outcome = (True, function(*args))
    except (ValueError, RuntimeError) as error:
        is_builtin = type(error).__module__ == "builtins"
        outcome = (False, (type(error) if is_builtin else RuntimeError)(str(error)))
    pipe.send(outcome)
    pipe.close()
    time.sleep(_POLL_SECONDS)
    os._exit(0)
