"""Kill a command at a random crash point, and run it again.

After the kill, every output is absent, as it was before, or as the unbroken command leaves it. The
same command then ends well, its outputs equal those of the unbroken command bit for bit, and
nothing else is left.
"""

import dataclasses
import random
import shutil
import signal
from pathlib import Path

from soak import snapshots
from soak.assets import Assets
from soak.cases import Case
from soak.fork_server import Ending, ForkServer, Job
from soak.outcomes import Outcome

# Files that grow, or that a later part of the command replaces.
_GROWING = ("metrics.jsonl", ".generate.json", ".job.json", "settings.json", "unfinished.json")


@dataclasses.dataclass
class Unbroken:
    """The outputs of a command that nobody killed, before and after it."""

    calls: int  # that change files
    seconds: float
    before: dict[str, str]
    contents: dict[str, str]
    arrays: str  # digests of the arrays of its checkpoints


class KillTrials:
    """Trials of one command."""

    group = "kill"

    def __init__(self, name: str, case: Case, assets: Assets, folder: Path):
        self.target, self.case, self.assets, self.folder = name, case, assets, folder
        self.unbroken: Unbroken | None = None

    @property
    def server(self) -> ForkServer:
        """Return the server that runs the command."""
        return self.assets.server

    def run(self, rng: random.Random) -> Outcome:
        """Kill the command once or more, run it to its end, and compare."""
        if self.unbroken is None:
            self.unbroken = self._run_unbroken()
        self._prepare()
        modes = (
            ("before", "middle", "after", "full") if self.server.library else ("before", "after")
        )
        history = []
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            mode = rng.choice(modes)
            if rng.random() < 0.15:
                options = {"kill_after": rng.uniform(0.02, self.unbroken.seconds)}
                history.append(f"killed after {options['kill_after']:.2f} s")
            else:
                number = rng.randint(1, max(self.unbroken.calls, 1))
                options = {"mode": mode, "number": number}
                history.append(f"{mode} call {number} of {self.unbroken.calls}")
            ending = self._start(**options)
            outcome = self._check_ending(ending, options) or self._check_contents()
            if outcome is not None:
                return dataclasses.replace(
                    outcome, detail=f"{'; '.join(history)}: {outcome.detail}"
                )
        outcome = self._check_last(self._start())
        return dataclasses.replace(outcome, detail=f"{'; '.join(history)}: {outcome.detail}")

    def _prepare(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        for name in self.case.inputs:
            self.assets.copy(name, self.folder)
        for output, name in self.case.before:
            shutil.rmtree(self.folder / output, ignore_errors=True)
            self.assets.copy(name, self.folder, output)

    def _start(self, **options) -> Ending:
        return self.server.run(
            Job(self.case.module, self.case.arguments, str(self.folder), **options)
        )

    def _run_unbroken(self) -> Unbroken:
        self._prepare()
        before = snapshots.take(self.folder, self.case.outputs)
        ending = self._start(mode="before")
        if ending.status:
            raise RuntimeError(f"{self.target} fails unbroken: {ending.output}{ending.errors}")
        contents = snapshots.take(self.folder, self.case.outputs)
        return Unbroken(ending.calls, ending.seconds, before, contents, self._arrays())

    def _arrays(self) -> str:
        if not (self.folder / "run" / "checkpoints").exists() or "run" not in self.case.outputs:
            return ""
        ending = self.server.run(Job("soak.snapshots:print_arrays", ("run",), str(self.folder)))
        return ending.output or ending.errors

    def _check_ending(self, ending: Ending, options: dict) -> Outcome | None:
        """Return the failure of a command that was killed, or whose disk was full."""
        if ending.has_orphans:
            return Outcome("lost", "a process that it started lives on")
        if ending.timed_out:
            return Outcome("hang", "it did not end")
        if ending.status in (-signal.SIGKILL, 0):
            return None
        if ending.status < 0:
            return Outcome("signal", f"signal {-ending.status}: {ending.errors[-300:]}")
        if "Traceback (most recent call last)" in ending.errors:
            return Outcome("traceback", ending.errors[-600:])
        message = ending.errors.strip().splitlines()[-1:] or [""]
        is_named = "disk is full" in message[0] or "No space left" in message[0]
        if options.get("mode") == "full" and not is_named:
            return Outcome("half", f"a full disk is not named: {message[0][:300]}")
        return None

    def _check_contents(self) -> Outcome | None:
        """Return the failure if an output is neither absent, nor old, nor complete."""
        unbroken = self.unbroken
        contents = snapshots.take(self.folder, self.case.outputs)
        for name, content in contents.items():
            allowed = {unbroken.before.get(name), unbroken.contents.get(name)}
            if content in allowed or name.endswith(_GROWING) or "/checkpoints/" in name:
                continue
            if Path(name).name.startswith("."):
                continue  # a note of the command to itself
            return Outcome("half", f"{name} is neither old nor complete")
        for output, _ in self.case.before:
            if not any(name.split("/")[0] == output.split("/")[0] for name in contents):
                return Outcome("lost", f"nothing is at {output}")
        return None

    def _check_last(self, ending: Ending) -> Outcome:
        if ending.timed_out:
            return Outcome("hang", "the same command did not end")
        if "Traceback (most recent call last)" in ending.errors:
            return Outcome("traceback", f"the same command: {ending.errors[-600:]}")
        if ending.status:
            return Outcome("refused", f"the same command: {ending.errors[-600:]}")
        contents = snapshots.take(self.folder, self.case.outputs)
        different = sorted(
            name
            for name in contents.keys() | self.unbroken.contents.keys()
            if contents.get(name) != self.unbroken.contents.get(name)
        )
        if different:
            return Outcome("lost", f"not as the unbroken command leaves it: {different[:5]}")
        arrays = self._arrays()
        if arrays != self.unbroken.arrays:
            return Outcome("lost", f"arrays of checkpoints differ: {arrays[-600:]}")
        if rest := snapshots.leftovers(self.folder):
            return Outcome("leftover", f"it leaves {rest[:5]}")
        return Outcome("good")
