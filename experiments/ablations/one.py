"""One run of the ablation table: write missing latents, train, measure.

python -m experiments.ablations.one --variant tiny --row mot_frozen --seed 1 --workdir runs/x \
  --source runs/stages/mot_frozen/stage2
python -m experiments.ablations.one --variant tiny --row pretzel --stage 1 --workdir runs/stage1
"""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from etils import epath

from starflow2_jax import params, train
from starflow2_jax.checkpoints import steps
from starflow2_jax.inference import load
from starflow2_jax.runtime import allocator, atomic, cli, folder_lock
from starflow2_jax.training.logging import run_log
from starflow2_jax.training.tasks import starflow2

from . import cache_cost, latents, rows, scores, start, table

# The folder of a run for initial weights that are not those of an earlier run alone.
START = "start"


def run(
    cfg: dict[str, Any],
    kind: str,
    held_out: Sequence[Mapping[str, Any]],
    workdir: str,
    *,
    fae: str = "",
    with_cache: bool = False,
) -> dict[str, Any]:
    """Train and measure; write the result and return it.

    Args:
        kind: of latents: `fae`, `pixels` or `features`.
        held_out: see `rows.held_out`; empty to train alone, as in an earlier stage.
        fae: the codec that makes the latents.
        with_cache: measure what the cache saves, too (`cache_cost`).

    Raises:
        ValueError, OSError, RuntimeError: See `train.train`, `latents.make` and `scores.measure`.
        RuntimeError: Training stopped before its last step; nothing is measured.
    """
    start_time = time.time()
    model = starflow2.model_config(cfg)
    eval_entries = [e for e in held_out if not e.get("text") or epath.Path(e["path"]).exists()]
    with_codec = {**cfg, "fae": {**cfg["fae"], "path": fae or cfg["fae"]["path"]}}
    latents.make(kind, with_codec, model.flow.side, [*cfg["data"]["mixture"], *eval_entries])
    training_start = time.time()
    train.train(cfg, workdir)
    last_step, num_steps = steps.latest(workdir) or 0, cfg["train"]["steps"]
    if last_step < num_steps:
        raise RuntimeError(
            f"{workdir}: training was stopped at step {last_step} of {num_steps}; the same command "
            "resumes it"
        )
    trained = params.split(model.declare(), tuple(cfg["train"]["trainable"]))[0]
    scoring_start = time.time()
    result = {
        "config": cfg,
        "trained": params.count(trained),
        **(scores.measure(workdir, eval_entries) if eval_entries else {}),
        **(_measure_cache(workdir, fae) if with_cache else {}),
        "seconds": {
            "latents": round(training_start - start_time, 1),
            "training": round(
                _training_seconds(workdir, num_steps, scoring_start - training_start), 1
            ),
            "scores": round(time.time() - scoring_start, 1),
        },
        "command": run_log.command_line(),
        **run_log.environment(),
    }
    file = epath.Path(workdir) / table.RESULT
    atomic.write_file(file, json.dumps(result, indent=2) + "\n")
    return result


def _measure_cache(workdir: str, fae: str) -> dict[str, float]:
    return cache_cost.measure(load.load_starflow2(workdir, fae=fae))


def _training_seconds(workdir: str, num_steps: int, last_start: float) -> float:
    """Return the seconds of a training by its log, as the last start of several is a part of it.

    Args:
        last_start: seconds of the last start, the result if no speed was logged.
    """
    logged = [row["seconds_per_step"] for row in run_log.read_rows(workdir)
              if row.get("seconds_per_step") is not None]  # fmt: skip
    return num_steps * sum(logged) / len(logged) if logged else last_start


def main(argv: list[str]) -> None:
    """Parse the flags and run."""
    values = flags.FLAGS
    if argv or not values.row or not values.workdir:
        raise ValueError("--row and --workdir are needed, and no other arguments")
    stage, workdir = values.stage, values.workdir
    cfg = rows.settings(values, values.row, values["seed"].value or 0, stage)
    codec = values.fae or rows.configuration(values.variant, "pretzel").fae.path
    held_out = ()
    if stage == 3:
        held_out = rows.held_out(values.variant, values.row, data=values.data)
    with folder_lock.lock(workdir, "makes this run of the table", ".ablation.lock"):
        if values.source:
            # Before stage 2 the adapter has learned nothing, so a row's own one starts as it says.
            fresh = ("adapter",) if stage == 2 and "adapter" in cfg["train"]["trainable"] else ()
            folder = f"{workdir}/{START}"
            cfg["init"]["from"] = start.write(cfg, values.source, folder, fresh)
        run(
            cfg,
            rows.ROWS[values.row].latents,
            held_out,
            workdir,
            fae=codec,
            with_cache=stage == 3 and values.row == "pretzel",
        )


if __name__ == "__main__":
    rows.define(flags.FLAGS)
    flags.DEFINE_string("row", None, "a name in rows.py")
    flags.DEFINE_integer("stage", 3, "stage to train; 3 is measured, too", 1, 3)
    flags.DEFINE_string("source", "", "workdir of the stage whose weights it starts from")
    allocator.keep_freed_memory()
    cli.run(main)
