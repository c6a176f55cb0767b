"""A program compiled for a TPU up to its machine code, which nobody runs and which takes longest.

The compiler writes down the program and where its arrays lie before it turns to machine code; these
are all that a plan reads. It cannot be stopped, except with its process: `apart` gives it one.
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

_PROGRAM = "*.after_optimizations_after_buffer_assignment.txt"
_PLACES = "*.after_optimizations-buffer-assignment.txt"
_USAGE = "*.after_optimizations-memory-usage-report.txt"
_WAIT = 0.2  # seconds


@dataclass(frozen=True)
class Halfway:
    """What `jax.stages.Compiled` says of a program, as far as it goes without machine code.

    Attributes: as those of `Compiled.memory_analysis()`.
    """

    text: str
    argument_size_in_bytes: int
    output_size_in_bytes: int
    alias_size_in_bytes: int
    temp_size_in_bytes: int
    generated_code_size_in_bytes: int = 0

    def as_text(self) -> str:
        """The program."""
        return self.text

    def memory_analysis(self) -> "Halfway":
        """Its bytes."""
        return self


def until_code(lowered: Any) -> Any:
    """The compiled program, or as much of it as there is when machine code is begun.

    The compiler may go on in a thread of its own: for processes that soon end, see `apart`.

    Raises:
        JaxRuntimeError: as `lowered.compile()`, such as a program too large.
    """
    folder = pathlib.Path(tempfile.mkdtemp(prefix="plan_"))
    done: dict[str, Any] = {}
    options = {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}

    def work():
        try:
            done["made"] = lowered.compile(compiler_options=options)
        except BaseException as error:  # handed to the thread that waits
            done["error"] = error

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(_WAIT)
            if (found := read(folder)) is not None:
                return found
    finally:
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
    if "error" in done:
        raise done["error"]
    return done["made"]


def read(folder: pathlib.Path) -> Halfway | None:
    """What the compiler has written down in a folder; None while anything is missing of it."""
    texts = []
    for pattern in (_PROGRAM, _PLACES, _USAGE):
        found = sorted(folder.glob(pattern))
        if not found:
            return None
        texts.append(found[-1].read_text())
    program, places, usage = texts
    total = re.search(r"Memory Space: default \(color=0\)\s+Total bytes: (\d+)", usage)
    # The entry is the last of its computations.
    entry = program.find("\nENTRY ")
    if entry < 0 or not program[entry:].rstrip().endswith("\n}") or not total:
        return None
    sizes = {"argument": 0, "output": 0, "alias": 0}
    for size, rest in re.findall(r"^allocation \d+: size (\d+), (.*)$", places, re.M):
        if re.search(r"\bcolor [1-9]", rest):  # not of main memory
            continue
        given, kept = "parameter " in rest, "maybe-live-out" in rest
        sizes["argument"] += int(size) * given
        sizes["output"] += int(size) * kept
        sizes["alias"] += int(size) * (given and kept)
    held = sizes["argument"] + sizes["output"] - sizes["alias"]
    return Halfway(
        program, sizes["argument"], sizes["output"], sizes["alias"], int(total[1]) - held
    )


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in a process of its own, which ends with it whatever else goes on there.

    Args:
        function: a module's; it, its arguments and its result can be pickled.

    Raises:
        RuntimeError: the process ended without an answer. Else what the function raises.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(theirs, os.getpid(), function, args))
    child.start()
    theirs.close()
    try:
        good, answer = ours.recv()
    except EOFError:
        child.join()
        raise RuntimeError(
            f"plan: the compiler's process ended with code {child.exitcode} and no answer; "
            "--whole compiles in this one and shows why"
        ) from None
    finally:
        child.kill()
        child.join()
    if not good:
        raise answer
    return answer


def _answer(pipe, parent, function, args):
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    # As in the command: a libtpu without a TPU would be waited for.
    jax.config.update("jax_platforms", "cpu")
    try:
        said = (True, function(*args))
    except (ValueError, RuntimeError) as error:
        said = (False, type(error)(str(error)) if type(error).__module__ == "builtins"
                else RuntimeError(str(error)))  # fmt: skip
    pipe.send(said)
    pipe.close()
    time.sleep(_WAIT)
    os._exit(0)


def _end_with(parent):
    """Ends this process once the one that asked is gone, whose end nothing else says."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
