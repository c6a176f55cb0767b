"""Choose the next trial, run it, and count: the time is shared by the groups and their targets.

A trial is named GROUP/TARGET:NUMBER, such as `kill/train:3`, and depends on its name and the seed
alone.
"""

import random
import time
from collections.abc import Callable
from pathlib import Path

from soak.assets import Assets
from soak.cases import CASES
from soak.damage_trials import DamageTrials
from soak.fork_server import PRELOADED, ForkServer
from soak.fuzz_trials import FuzzTrials, all_readers
from soak.kill_trials import KillTrials
from soak.outcomes import Outcome, Tally

# Shares of the time.
SHARES = {"kill": 0.5, "damage": 0.4, "fuzz": 0.1}


_REPORT_SECONDS = 60.0


class Soak:
    """A soak test in a folder."""

    def __init__(
        self,
        folder: Path,
        seed: int,
        report: Callable[[str], None] = print,
        preload: str = PRELOADED,
        targets: Callable[[str], bool] = lambda name: True,
    ):
        self.seed, self.report, self.tally = seed, report, Tally()
        self.server = ForkServer(folder / "server", preload)
        if self.server.library is None:
            report("no C compiler: kills at the calls of Python's os module only")
        assets = Assets(folder / "assets", self.server)
        killed = {n: case for n, case in CASES.items() if case.is_killed}
        damaged = {n: case for n, case in CASES.items() if case.damaged}
        self.targets = [
            *(KillTrials(n, case, assets, folder / "trial") for n, case in killed.items()),
            *(DamageTrials(n, case, assets, folder / "trial") for n, case in damaged.items()),
            *(
                FuzzTrials(reader, self.server, folder / "trial")
                for reader in all_readers().values()
            ),
        ]
        self.targets = [t for t in self.targets if targets(f"{t.group}/{t.target}")]
        self.seconds = {f"{t.group}/{t.target}": 0.0 for t in self.targets}
        self.numbers = dict.fromkeys(self.seconds, 0)

    def run(self, seconds: float) -> None:
        """Run trials for some seconds, and report every minute."""
        start_time = reported = time.monotonic()
        while (current := time.monotonic()) < start_time + seconds:
            if current - reported > _REPORT_SECONDS:
                minutes, trials = (current - start_time) / 60, sum(self.numbers.values())
                self.report(f"{minutes:.0f} min: {trials} trials, {self.tally.failures} failures")
                reported = current
            target = self._next_target()
            name = f"{target.group}/{target.target}"
            self._run_trial(target, self.numbers[name])
            self.numbers[name] += 1

    def run_one(self, trial: str) -> None:
        """Run the trial with a name."""
        name, _, number = trial.rpartition(":")
        targets = {f"{target.group}/{target.target}": target for target in self.targets}
        if name not in targets:
            raise ValueError(f"{trial}: no such trial; targets: {', '.join(targets)}")
        self._run_trial(targets[name], int(number))

    def close(self) -> None:
        """End the server."""
        self.server.close()

    def _next_target(self):
        """Return the target that has had the least time, of the group with the least for it."""
        spent = dict.fromkeys(SHARES, 0.0)
        for target in self.targets:
            spent[target.group] += self.seconds[f"{target.group}/{target.target}"]
        groups = {target.group for target in self.targets}
        group = min(sorted(groups), key=lambda name: spent[name] / SHARES[name])
        return min(
            (target for target in self.targets if target.group == group),
            key=lambda target: self.seconds[f"{group}/{target.target}"],
        )

    def _run_trial(self, target, number: int) -> None:
        name = f"{target.group}/{target.target}"
        start_time = time.monotonic()
        rng = random.Random(f"{self.seed} {name} {number}")
        try:
            outcomes = target.run(rng)
        except RuntimeError as error:
            outcomes = Outcome("traceback", f"the trial itself failed: {error}")
        self.seconds[name] += time.monotonic() - start_time
        for outcome in [outcomes] if isinstance(outcomes, Outcome) else outcomes:
            self.tally.add(target.group, target.target, outcome)
            if outcome.is_failure:
                trial = f"{name}:{number}"
                self.report(
                    f"FAILED {outcome.kind}: {trial}: {outcome.detail}\n"
                    f"  again: bash launch/soak.sh 0 {self.seed} '{trial}'"
                )
