"""Run the ablations that are not done yet, one after the other, and write their table.

python -m experiments.ablations.run --variant tiny
python -m experiments.ablations.run --variant tiny --times
python -m experiments.ablations.run --variant small --data /data/starflow2 --shard 0/4
python -m experiments.ablations.run --only pretzel,mot_frozen --table

Outside a checkout of the repository, the module is starflow2_jax.experiments.ablations.run.

rows.py defines the runs. Stages 1 and 2 are trained in OUT/VARIANT/stages/ROW/stage1 and stage2,
when the first row needs them; every run of stage 3 has a folder OUT/VARIANT/ROW/SEED. A run with a
result is skipped, and one that was stopped or killed goes on from its newest checkpoint. After each
run the table and the claims are written again, from all results in OUT, whichever process wrote
them. Two shards that need the same stage at the same time need not both train it: one of them fails
because the folder is in use; start it again later.
"""

import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags
from etils import epath

from starflow2_jax.data import untrusted
from starflow2_jax.runtime import atomic, child_process, cli

from . import claims, rows, table, times
from .jobs import (
    JUDGED,
    Job,
    folder,
    is_done,
    is_judged,
    jobs,
    needed_stages,
    read_result,
    source,
)

LOG = "log.txt"
# Sections of the shapes suite on which runs are judged.
SECTIONS = "generation,editing,reasoning"
TEST_DATA = ("t2i", "edit", "reasoning")
JUDGED_CASES = {"tiny": 16, "small": 0}


def define(values: flags.FlagValues) -> None:
    """Define the flags of this command, in addition to those of `rows`."""
    text, number = flags.DEFINE_string, flags.DEFINE_integer
    flags.DEFINE_list("only", [], "names of rows; all of them by default", flag_values=values)
    text("shard", "0/1", "i/n: every n-th run, the i-th first", flag_values=values)
    number("seeds", 0, "seeds of every row; 0: as in rows.py", 0, flag_values=values)
    number("judge", None, "cases of each tag that are drawn, edited and reasoned about, and judged "
           "(16 of tiny; none of small, whose data may be any)", 0, flag_values=values)  # fmt: skip
    text("out", "runs/ablations", "folder of runs and tables", flag_values=values)
    flags.DEFINE_bool("table", False, "write the table and run nothing", flag_values=values)
    flags.DEFINE_bool("times", False, "print the seconds of every run and run nothing",
                      flag_values=values)  # fmt: skip


def sweep(
    todo: Sequence[Job],
    done: Callable[[Job], bool],
    start: Callable[[Job], bool],
    on_success: Callable[[], Any] = lambda: None,
) -> list[Job]:
    """Start the jobs that are not done, in order, and return those that failed.

    `on_success` is called after every job that has succeeded.
    """
    failed = []
    for number, job in enumerate(todo, 1):
        label = f"[{number}/{len(todo)}] {job}"
        if done(job):
            print(f"{label}: done already", flush=True)
            continue
        missing = [stage for stage in needed_stages(job.row) if stage in failed]
        if missing and job not in missing:
            print(f"{label}: FAILED, because {missing[0]} has", flush=True)
            failed.append(job)
            continue
        print(f"{label} ...", flush=True)
        start_time = time.time()
        succeeded = start(job)
        status = "done" if succeeded else "FAILED"
        print(f"{label}: {status} in {time.time() - start_time:.0f} s", flush=True)
        if succeeded:
            on_success()
        else:
            failed.append(job)
    return failed


def results(out: epath.Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Return the results in a folder, by row and seed; `stage1` is stage 1 of the Pretzel."""
    by_row: dict[str, dict[int, dict[str, Any]]] = {}
    paths = [(name, p) for name in rows.ROWS for p in (out / name).glob(f"*/{table.RESULT}")]
    first = folder(out, Job("pretzel", 0, 1)) / table.RESULT
    paths += [(claims.STAGE1, first)] if first.exists() else []
    for name, path in sorted(paths):
        result = read_result(path)
        judged = path.parent / JUDGED
        if judged.exists():
            result |= table.judged_metrics(untrusted.read_json(judged, dict[str, Any]))
        seed = 0 if name == claims.STAGE1 else int(path.parent.name)
        by_row.setdefault(name, {})[seed] = result
    return by_row


def write_table(out: epath.Path, variant: str, steps: str = "") -> str:
    """Write `table.md` and `table.json`; return the markdown. `steps` names other budgets."""
    by_row = results(out)
    built, tested = table.build(by_row), claims.evaluate(by_row)
    budget = " ".join(_budget(variant).split()) + (f", but {steps} steps" if steps else "")
    text = table.markdown(built, f"Variant {variant}. Stages 1, 2 and 3 of every run: {budget}")
    text += "\n" + claims.markdown(tested)
    stored = {"variant": variant, "rows": built, "claims": tested}
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
    with log.open("a") as stream:
        command = [sys.executable, "-m", *arguments]
        status = child_process.run(command, stream)
    if status:
        last_line = log.read_text().strip().splitlines()[-1:]
        print(f"  {' '.join(last_line)} (see {log})", flush=True)
    return status == 0


def num_judged(values: flags.FlagValues) -> int:
    """Return the number of cases of each tag that are judged."""
    return JUDGED_CASES[values.variant] if values.judge is None else values.judge


def start_job(values: flags.FlagValues, out: epath.Path, job: Job) -> bool:
    """Train and measure a run, and judge it; return whether both have succeeded."""
    workdir = folder(out, job)
    if not (workdir / table.RESULT).exists():
        names = ("variant", "data", "vlm", "fae", *rows.STEPS_FLAGS.values())
        argv = [f"--{name}={values[name].value}" for name in names]
        argv += [f"--row={job.row}", f"--seed={job.seed}", f"--stage={job.stage}"]
        argv += [f"--workdir={workdir}", f"--source={source(out, job)}"]
        if not _start([f"{__package__}.one", *argv], workdir / LOG):
            return False
    if not num_judged(values) or not is_judged(job) or (workdir / JUDGED).exists():
        return True
    held_out = rows.held_out(values.variant, job.row, data=values.data)
    folders = [e["path"] for e in held_out if any(f"/{n}" in e["path"] for n in TEST_DATA)]
    argv = [f"--model={workdir}", f"--only={SECTIONS}", f"--n={num_judged(values)}"]
    argv += [f"--data={','.join(folders)}", f"--out={workdir / JUDGED}"]
    argv += [f"--fae={values.fae}"] if values.fae else []
    return _start(["starflow2_jax.evaluate", "shapes", *argv], workdir / LOG)


def main(argv: list[str]) -> None:
    """Parse the flags, run, and write the table."""
    values = flags.FLAGS
    if argv:
        raise ValueError(f"unexpected argument {argv[0]!r}")
    steps = "_".join(str(values[flag].value) for flag in rows.STEPS_FLAGS.values())
    steps = "" if steps == "0_0_0" else steps
    out = epath.Path(values.out) / (f"{values.variant}_{steps}_steps" if steps else values.variant)
    todo = jobs(values.only, values.shard, values.seeds)
    if values.times:
        settings = functools.partial(rows.settings, values)
        print(times.markdown(todo, out, settings, num_judged(values)), end="", flush=True)
        return

    def done(job):
        cfg = rows.settings(values, job.row, job.seed, job.stage)
        judged = not (num_judged(values) and is_judged(job))
        judged = judged or (folder(out, job) / JUDGED).exists()
        return is_done(folder(out, job), cfg) and judged

    write_now = functools.partial(write_table, out, values.variant, steps.replace("_", ", "))
    failed = []
    if not values.table:
        failed = sweep(todo, done, functools.partial(start_job, values, out), write_now)
    print(write_now(), end="", flush=True)
    if failed:
        listed = "; ".join(map(str, failed))
        raise RuntimeError(f"{len(failed)} of {len(todo)} runs failed: {listed}")


if __name__ == "__main__":
    rows.define(flags.FLAGS)
    define(flags.FLAGS)
    cli.run(main)
