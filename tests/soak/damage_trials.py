"""Flip a bit of a file that a command reads, cut the file, or remove it.

The command then says in one error which file is damaged, or it does not need what was damaged and
its output is that of intact files.
"""

import random
import shutil
from pathlib import Path

from soak import snapshots
from soak.assets import Assets
from soak.cases import Case
from soak.fork_server import Ending, Job
from soak.outcomes import Outcome

_MAX_FILES = 4  # of a folder's array data that count as one each, so that others come as often


def damage(path: Path, rng: random.Random) -> str:
    """Damage a file, and return how."""
    data = bytearray(path.read_bytes())
    kind = rng.choices(("flip", "cut", "remove", "noise"), (6, 2, 1, 1))[0]
    if not data or kind == "remove":
        path.unlink()
        return "removed"
    if kind == "cut":
        size = rng.randrange(len(data))
        path.write_bytes(data[:size])
        return f"cut to {size} of {len(data)} bytes"
    first = rng.randrange(len(data))
    if kind == "flip":
        bit = rng.randrange(8)
        data[first] ^= 1 << bit
        path.write_bytes(data)
        return f"bit {bit} of byte {first} flipped"
    size = rng.randint(1, 16)
    data[first : first + size] = rng.randbytes(len(data[first : first + size]))
    path.write_bytes(data)
    return f"{size} random bytes at {first}"


class DamageTrials:
    """Trials of one command."""

    group = "damage"

    def __init__(self, name: str, case: Case, assets: Assets, folder: Path):
        self.target, self.case, self.assets, self.folder = name, case, assets, folder
        self.intact: tuple[str, dict[str, str], str] | None = None

    def run(self, rng: random.Random) -> Outcome:
        """Damage a file, run the command, and compare."""
        if self.intact is None:
            self._prepare()
            ending = self._start()
            if ending.status:
                message = f"{ending.output}{ending.errors}"
                raise RuntimeError(f"{self.target} fails on intact files: {message}")
            self.intact = self._results(ending)
        self._prepare()
        file = self._choose(rng)
        name = file.relative_to(self.folder).as_posix()
        done = damage(file, rng)
        outcome = self._classify(self._start(), file)
        return Outcome(outcome.kind, f"{name} {done}: {outcome.detail}")

    def _prepare(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        for name in self.case.inputs:
            self.assets.copy(name, self.folder)

    def _choose(self, rng: random.Random) -> Path:
        """Return a file, each kind of folder with the same chance."""
        root = self.folder / rng.choice(self.case.damaged)
        if root.is_file():
            return root
        groups: dict[str, list[Path]] = {}
        for path in sorted(p for p in root.rglob("*") if p.is_file()):
            groups.setdefault(str(path.parent), []).append(path)
        # Orbax names its data files at random; their order is that of their sizes.
        weights = [min(len(files), _MAX_FILES) for files in groups.values()]
        files = rng.choices(list(groups.values()), weights)[0]
        return rng.choice(sorted(files, key=lambda path: (path.stat().st_size, path.name)))

    def _start(self) -> Ending:
        job = Job(self.case.module, self.case.arguments, str(self.folder), timeout=120)
        return self.assets.server.run(job)

    def _results(self, ending: Ending) -> tuple[str, dict[str, str], str]:
        arrays = ""
        if "run" in self.case.outputs:
            job = Job("soak.snapshots:print_arrays", ("run",), str(self.folder))
            arrays = self.assets.server.run(job).output
        # Commands that write files print progress and durations.
        printed = "" if self.case.outputs else snapshots.normalize(ending.output)
        return (
            printed,
            snapshots.take(self.folder, self.case.outputs),
            arrays,
        )

    def _classify(self, ending: Ending, file: Path) -> Outcome:
        text = f"{ending.output}\n{ending.errors}"
        if ending.timed_out:
            return Outcome("hang", "it did not end")
        if ending.status < 0:
            return Outcome("signal", f"signal {-ending.status}: {ending.errors[-300:]}")
        if "Traceback (most recent call last)" in text:
            return Outcome("traceback", ending.errors[-800:])
        if file.name in text or (ending.status and self._names_folder_of(file, text)):
            return Outcome("good")
        if ending.status:
            return Outcome("unnamed", ending.errors[-500:])
        if self._results(ending) == self.intact:
            return Outcome("harmless")
        return Outcome("silent", f"the output differs, and no word of it: {ending.output[-300:]}")

    def _names_folder_of(self, file: Path, text: str) -> bool:
        """Return True if a removed file's empty place is named by the path of its folder."""
        folder = file.parent.relative_to(self.folder).as_posix()
        return not file.exists() and folder in text
