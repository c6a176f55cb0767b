"""Give readers damaged and hostile inputs: many cases in a fork, which signals and hangs may end.

Every input is accepted, and its values are valid, or refused by one error that names it.
"""

import dataclasses
import random
import re
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from soak.fork_server import ForkServer, Job
from soak.outcomes import Outcome

# Part of the name of every input; an error has to contain it.
NAME = "THE"
_CASE_SECONDS = 120
_CASE_CPU_SECONDS = 20  # a busy machine needs more time, but no more work
_CASE_BYTES = 4 << 30  # of address space beyond that of the server
_TIME_SIGNALS = (-signal.SIGALRM, -signal.SIGPROF)
# What a command reports in one line; see `runtime.cli.run`.
_ERRORS = (ValueError, OSError, RuntimeError)


@dataclasses.dataclass(frozen=True)
class Reader:
    """A reader of untrusted input."""

    name: str
    make: Callable[[random.Random, Path], Any]  # writes an input to a folder; None: no such input
    read: Callable[[Any], Any]  # what a command does with it
    problem: Callable[[Any], str] = lambda value: ""  # what is wrong with what was read
    cases: int = 40  # in a trial
    mark: str = NAME  # pattern of what an error has to contain


class FuzzTrials:
    """Trials of one reader; each is a number of cases."""

    group = "fuzz"

    def __init__(self, reader: Reader, server: ForkServer, folder: Path):
        self.target, self.reader, self.server, self.folder = reader.name, reader, server, folder

    def run(self, rng: random.Random) -> list[Outcome]:
        """Run the cases, and start anew behind each that ends the process."""
        seed, outcomes, first = str(rng.randrange(2**63)), [], 0
        log = self.folder / "log"
        while first < self.reader.cases:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            arguments = (self.target, seed, str(first), str(log))
            timeout = 2.0 * _CASE_SECONDS + 5.0 * self.reader.cases
            job = Job("soak.fuzz_trials:run_cases", arguments, str(self.folder), timeout)
            ending = self.server.run(job)
            lines = log.read_text("utf-8").splitlines() if log.exists() else []
            for line in lines:
                kind, _, detail = line.partition("\t")
                outcomes.append(Outcome(kind, detail))
            first += len(lines)
            if first < self.reader.cases:
                kind = "hang" if ending.timed_out or ending.status in _TIME_SIGNALS else "signal"
                text = f"case {first}: ended with {ending.status}: {ending.errors[-400:]}"
                outcomes.append(Outcome(kind, text))
                first += 1
        return outcomes


def all_readers() -> dict[str, Reader]:
    """Return every reader by its name."""
    from soak import fuzz_data, fuzz_models

    return {reader.name: reader for reader in (*fuzz_data.READERS, *fuzz_models.READERS)}


def run_cases(name: str, seed: str, first: str, log: str) -> None:
    """Run the cases of a trial from a number on, and write a line for each to a file."""
    reader = all_readers()[name]
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = (size + _CASE_BYTES, resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_AS, limit)
    with open(log, "w", encoding="utf-8") as file:
        for number in range(int(first), reader.cases):
            signal.alarm(_CASE_SECONDS)
            signal.setitimer(signal.ITIMER_PROF, _CASE_CPU_SECONDS)
            outcome = run_case(reader, random.Random(f"{seed} {number}"), Path(f"case{number}"))
            signal.alarm(0)
            signal.setitimer(signal.ITIMER_PROF, 0)
            detail = f"case {number}: {outcome.detail}" if outcome.is_failure else ""
            file.write(f"{outcome.kind}\t{ascii(detail)[1:-1]}\n")
            file.flush()


def run_case(reader: Reader, rng: random.Random, folder: Path) -> Outcome:
    """Make an input, read it, and say how that went."""
    folder.mkdir()
    value = reader.make(rng, folder)
    if value is None:
        return Outcome("skipped")
    try:
        result = reader.read(value)
    except _ERRORS as error:
        text = str(error)
        if re.search(reader.mark, text):
            return Outcome("good")
        return Outcome("unnamed", f"{type(error).__name__}: {text[:300]}")
    except BaseException as error:
        return Outcome("traceback", f"{type(error).__name__}: {str(error)[:300]}")
    if problem := reader.problem(result):
        return Outcome("accepted", problem)
    return Outcome("good")
