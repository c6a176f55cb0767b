"""Runs the ablations that are not done yet, one after the other, and writes their table.

python -m experiments.ablations.run --variant tiny
python -m experiments.ablations.run --variant small --data /data/starflow2 --shard 0/4
python -m experiments.ablations.run --only pretzel,mot_frozen --table

Outside a checkout of the repository, the module is starflow2_jax.experiments.ablations.run.

What a run is, rows.py says. Every run has a folder OUT/VARIANT/ROW/SEED with its log, and is
skipped once its result lies there; the table takes all results that are there, whoever made them.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags
from etils import epath

from starflow2_jax import config
from starflow2_jax.latents import write
from starflow2_jax.runtime import cli

from . import rows, table

Job = tuple[str, int]
LOG, JUDGED = "log.txt", "generation.json"


def define(values: flags.FlagValues) -> None:
    """Defines the flags of this command, beside those of `rows`."""
    text, number = flags.DEFINE_string, flags.DEFINE_integer
    flags.DEFINE_list("only", [], "names of rows; all of them by default", flag_values=values)
    text("shard", "0/1", "i/n: every n-th run, the i-th first", flag_values=values)
    number("seeds", 0, "of every row, other than rows.py says", 0, flag_values=values)
    number("generation", 0, "captions of each tag that are drawn and judged, 0 for none", 0,
           flag_values=values)  # fmt: skip
    text("out", "runs/ablations", "folder of runs and tables", flag_values=values)
    flags.DEFINE_bool("table", False, "write the table and run nothing", flag_values=values)


def jobs(only: Sequence[str], shard: str, seeds: int = 0) -> list[Job]:
    """(row, seed) of a shard: first seeds of all rows, the core ones first, then second ones, ...

    Raises:
        ValueError: an unknown row, or a shard that is not i/n.
    """
    for name in only:
        if name not in rows.ROWS:
            raise ValueError(f"--only: no row {name!r}{config.nearest(name, rows.ROWS)}")
    number, count = write.parse_shard(shard)
    names = [name for name in rows.ROWS if not only or name in only]
    many = lambda name: seeds or rows.ROWS[name].seeds
    every = [(seed, not rows.ROWS[name].core, i, name)
             for i, name in enumerate(names) for seed in range(many(name))]  # fmt: skip
    return [(name, seed) for seed, _, _, name in sorted(every)][number::count]


def is_done(folder: epath.Path, cfg: dict[str, Any]) -> bool:
    """Whether a run's result is there.

    Raises:
        ValueError: it is that of another configuration; names what differs.
    """
    path = folder / table.RESULT
    if not path.exists():
        return False
    found = config.upgrade(json.loads(path.read_text())["config"])
    # Where the frozen parts lie may differ: training compares what is in them.
    own = [row for row in config.differences(found, cfg) if not row.startswith(_MAY_MOVE)]
    if own:
        raise ValueError(f"{path} is of another configuration:\n  " + "\n  ".join(own))
    return True


_MAY_MOVE = ("vlm.path", "fae.path", "data.mixture")


def sweep(
    todo: Sequence[Job], done: Callable[[Job], bool], start: Callable[[Job], bool]
) -> list[Job]:
    """Starts what is not done, in order; the jobs that failed. One that fails stops no other."""
    failed = []
    for number, job in enumerate(todo, 1):
        name, seed = job
        said = f"[{number}/{len(todo)}] {name}, seed {seed}"
        if done(job):
            print(f"{said}: done already", flush=True)
            continue
        print(f"{said} ...", flush=True)
        began = time.time()
        good = start(job)
        print(f"{said}: {'done' if good else 'FAILED'} in {time.time() - began:.0f} s", flush=True)
        if not good:
            failed.append(job)
    return failed


def results(out: epath.Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Results by row and seed, as many as lie under a folder."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for name in rows.ROWS:
        for path in sorted((out / name).glob(f"*/{table.RESULT}")):
            result = json.loads(path.read_text())
            judged = path.parent / JUDGED
            if judged.exists():
                result["generation"] = _mean_of_tags(json.loads(judged.read_text()))
            found.setdefault(name, {})[int(path.parent.name)] = result
    return found


def _mean_of_tags(judged: dict[str, Any]) -> float | None:
    """What `evaluate shapes --only generation` says of combinations that training has shown."""
    section = judged["sections"].get("generation")
    return section and section["score"]["seen"]["mean"]["correct"]


def write_table(out: epath.Path, variant: str, steps: int) -> str:
    """Writes `table.md` and `table.json`; the markdown. Steps: 0 for those of the budget."""
    made = table.build(results(out))
    budget = " ".join(_budget(variant).split()) + (f", but {steps} steps" if steps else "")
    text = table.markdown(made, f"Variant {variant}. Of every run: {budget}")
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.json").write_text(json.dumps({"variant": variant, "rows": made}, indent=2) + "\n")
    (out / "table.md").write_text(text)
    return text


def _budget(variant: str) -> str:
    """The variant's line of the head of rows.py."""
    lines = [line.strip() for line in (rows.__doc__ or "").splitlines()]
    return next(line for line in lines if line.startswith(f"{variant} ")).removeprefix(variant)


def _start(arguments: Sequence[str], log: epath.Path) -> bool:
    """Runs a module of ours in a process of its own, so that nothing of a run outlives it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(os.fspath(log), "a") as stream:
        ended = subprocess.run([sys.executable, "-m", *arguments], stdout=stream,
                               stderr=subprocess.STDOUT, check=False)  # fmt: skip
    if ended.returncode:
        last = log.read_text().strip().splitlines()[-1:]
        print(f"  {' '.join(last)} (see {log})", flush=True)
    return ended.returncode == 0


def main(words: list[str]) -> None:
    """See the module's docstring."""
    values = flags.FLAGS
    if words:
        raise ValueError(f"unexpected argument {words[0]!r}")
    steps = f"_{values.steps}_steps" if values.steps else ""
    out = epath.Path(values.out) / f"{values.variant}{steps}"
    folder = lambda job: out / job[0] / str(job[1])
    judges = lambda job: bool(values.generation) and rows.ROWS[job[0]].latents == "fae"
    names = ("variant", "data", "vlm", "fae", "steps")
    same = [f"--{name}={values[name].value}" for name in names]

    def done(job):
        judged = not judges(job) or (folder(job) / JUDGED).exists()
        return is_done(folder(job), rows.settings(values, *job)) and judged

    def start(job):
        where = folder(job)
        own = [f"--row={job[0]}", f"--seed={job[1]}", f"--workdir={where}"]
        good = (where / table.RESULT).exists() or _start(
            [f"{__package__}.one", *same, *own], where / LOG
        )
        if not good or not judges(job):
            return good
        own = [f"--model={where}", "--only=generation", f"--n={values.generation}"]
        own += [f"--out={where / JUDGED}", *([f"--fae={values.fae}"] if values.fae else [])]
        return _start(["starflow2_jax.evaluate", "shapes", *own], where / LOG)

    todo = jobs(values.only, values.shard, values.seeds)
    failed = [] if values.table else sweep(todo, done, start)
    print(write_table(out, values.variant, values.steps), end="", flush=True)
    if failed:
        listed = ", ".join(f"{name} {seed}" for name, seed in failed)
        raise RuntimeError(f"{len(failed)} of {len(todo)} runs failed: {listed}")


if __name__ == "__main__":
    rows.define(flags.FLAGS)
    define(flags.FLAGS)
    cli.run(main)
