"""Run the ablations that are not done yet, one after the other, and write their table.

python -m experiments.ablations.run --variant tiny
python -m experiments.ablations.run --variant small --data /data/starflow2 --shard 0/4
python -m experiments.ablations.run --only pretzel,mot_frozen --table

Outside a checkout of the repository, the module is starflow2_jax.experiments.ablations.run.

rows.py defines the runs. Every run has a folder OUT/VARIANT/ROW/SEED with its log, and is skipped
if its result exists. The table contains all results in OUT, whichever process wrote them.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags
from etils import epath

from starflow2_jax import config
from starflow2_jax.data import untrusted
from starflow2_jax.latents import write
from starflow2_jax.runtime import atomic, child_process, cli

from . import rows, table

Job = tuple[str, int]
LOG, JUDGED = "log.txt", "generation.json"
# Paths of frozen models and data may change: training compares their contents.
RELOCATABLE_KEYS = ("vlm.path", "fae.path", "data.mixture")


def define(values: flags.FlagValues) -> None:
    """Define the flags of this command, in addition to those of `rows`."""
    text, number = flags.DEFINE_string, flags.DEFINE_integer
    flags.DEFINE_list("only", [], "names of rows; all of them by default", flag_values=values)
    text("shard", "0/1", "i/n: every n-th run, the i-th first", flag_values=values)
    number("seeds", 0, "seeds of every row; 0: as in rows.py", 0, flag_values=values)
    number("generation", 0, "captions of each tag that are drawn and judged, 0 for none", 0,
           flag_values=values)  # fmt: skip
    text("out", "runs/ablations", "folder of runs and tables", flag_values=values)
    flags.DEFINE_bool("table", False, "write the table and run nothing", flag_values=values)


def jobs(only: Sequence[str], shard: str, seeds: int = 0) -> list[Job]:
    """Return (row, seed) of a shard: the first seed of every row, core rows first, then the second.

    Raises:
        ValueError: A row is unknown, or the shard is not i/n.
    """
    for name in only:
        if name not in rows.ROWS:
            raise ValueError(f"--only: no row {name!r}{config.nearest(name, rows.ROWS)}")
    number, count = write.parse_shard(shard)
    names = [name for name in rows.ROWS if not only or name in only]
    ordered = sorted(
        (seed, not rows.ROWS[name].core, i, name)
        for i, name in enumerate(names)
        for seed in range(seeds or rows.ROWS[name].seeds)
    )
    return [(name, seed) for seed, _, _, name in ordered][number::count]


def is_done(folder: epath.Path, cfg: dict[str, Any]) -> bool:
    """Return whether a run's result exists.

    Raises:
        ValueError: It belongs to another configuration; names the differing keys.
    """
    path = folder / table.RESULT
    if not path.exists():
        return False
    stored = config.upgrade(_read_result(path)["config"])
    differing = [
        row for row in config.differences(stored, cfg) if not row.startswith(RELOCATABLE_KEYS)
    ]
    if differing:
        raise ValueError(f"{path} is of another configuration:\n  " + "\n  ".join(differing))
    return True


def _read_result(path: epath.Path) -> dict[str, Any]:
    """Return the JSON object of a result; ValueError names a file that is none."""
    result = untrusted.read_json(path, dict[str, Any])
    if not isinstance(result.get("config"), dict):
        raise ValueError(f"{path}: has no `config`; expected the result of an ablation")
    return result


def sweep(
    todo: Sequence[Job], done: Callable[[Job], bool], start: Callable[[Job], bool]
) -> list[Job]:
    """Start the jobs that are not done, in order, and return those that failed."""
    failed = []
    for number, job in enumerate(todo, 1):
        name, seed = job
        label = f"[{number}/{len(todo)}] {name}, seed {seed}"
        if done(job):
            print(f"{label}: done already", flush=True)
            continue
        print(f"{label} ...", flush=True)
        start_time = time.time()
        succeeded = start(job)
        status = "done" if succeeded else "FAILED"
        print(f"{label}: {status} in {time.time() - start_time:.0f} s", flush=True)
        if not succeeded:
            failed.append(job)
    return failed


def results(out: epath.Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Return all results in a folder, by row and seed."""
    by_row: dict[str, dict[int, dict[str, Any]]] = {}
    for name in rows.ROWS:
        for path in sorted((out / name).glob(f"*/{table.RESULT}")):
            result = _read_result(path)
            judged = path.parent / JUDGED
            if judged.exists():
                result["generation"] = _mean_of_tags(untrusted.read_json(judged, dict[str, Any]))
            by_row.setdefault(name, {})[int(path.parent.name)] = result
    return by_row


def _mean_of_tags(judged: dict[str, Any]) -> float | None:
    """Return the generation score on combinations of attributes that occur in training."""
    section = judged["sections"].get("generation")
    return section and section["score"]["seen"]["mean"]["correct"]


def write_table(out: epath.Path, variant: str, steps: int) -> str:
    """Write `table.md` and `table.json`; return the markdown. 0 steps are those of the budget."""
    built = table.build(results(out))
    budget = " ".join(_budget(variant).split()) + (f", but {steps} steps" if steps else "")
    text = table.markdown(built, f"Variant {variant}. Of every run: {budget}")
    stored = {"variant": variant, "rows": built}
    atomic.write_file(out / "table.json", json.dumps(stored, indent=2) + "\n")
    atomic.write_file(out / "table.md", text)
    return text


def _budget(variant: str) -> str:
    """Return the variant's line of the docstring of rows.py."""
    lines = [line.strip() for line in (rows.__doc__ or "").splitlines()]
    return next(line for line in lines if line.startswith(f"{variant} ")).removeprefix(variant)


def _start(arguments: Sequence[str], log: epath.Path) -> bool:
    """Run a module in a process that ends with this one, so that nothing of a run outlives it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(os.fspath(log), "a") as stream:
        command = [sys.executable, "-m", *arguments]
        status = child_process.run(command, stream)
    if status:
        last_line = log.read_text().strip().splitlines()[-1:]
        print(f"  {' '.join(last_line)} (see {log})", flush=True)
    return status == 0


def main(argv: list[str]) -> None:
    """Parse the flags, run, and write the table."""
    values = flags.FLAGS
    if argv:
        raise ValueError(f"unexpected argument {argv[0]!r}")
    steps = f"_{values.steps}_steps" if values.steps else ""
    out = epath.Path(values.out) / f"{values.variant}{steps}"
    shared_flags = [
        f"--{name}={values[name].value}" for name in ("variant", "data", "vlm", "fae", "steps")
    ]

    def folder(job):
        name, seed = job
        return out / name / str(seed)

    def is_judged(job):
        return bool(values.generation) and rows.ROWS[job[0]].latents == "fae"

    def done(job):
        judged = not is_judged(job) or (folder(job) / JUDGED).exists()
        return is_done(folder(job), rows.settings(values, *job)) and judged

    def start(job):
        workdir, (name, seed) = folder(job), job
        if not (workdir / table.RESULT).exists():
            run_flags = [f"--row={name}", f"--seed={seed}", f"--workdir={workdir}"]
            if not _start([f"{__package__}.one", *shared_flags, *run_flags], workdir / LOG):
                return False
        if not is_judged(job):
            return True
        judge_flags = [f"--model={workdir}", "--only=generation", f"--n={values.generation}"]
        judge_flags += [f"--out={workdir / JUDGED}"]
        judge_flags += [f"--fae={values.fae}"] if values.fae else []
        return _start(["starflow2_jax.evaluate", "shapes", *judge_flags], workdir / LOG)

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
