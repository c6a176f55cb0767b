"""One run of the ablation table: write missing latents, train, measure.

python -m experiments.ablations.one --variant tiny --row mot_frozen --seed 1 --workdir runs/x
"""

import json
import time
from typing import Any

from absl import flags
from etils import epath

from starflow2_jax import params, train
from starflow2_jax.checkpoints import steps
from starflow2_jax.runtime import allocator, atomic, cli, folder_lock
from starflow2_jax.training.logging import run_log
from starflow2_jax.training.tasks import starflow2

from . import latents, rows, scores, table


def run(
    cfg: dict[str, Any], kind: str, held_out: tuple, workdir: str, *, fae: str = ""
) -> dict[str, Any]:
    """Train and measure; write the result and return it.

    Args:
        kind: of latents: `fae`, `pixels` or `features`.
        held_out: see `rows.held_out`.
        fae: the codec that makes the latents.

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
        **scores.measure(workdir, eval_entries),
        "seconds": {
            "latents": round(training_start - start_time, 1),
            "training": round(scoring_start - training_start, 1),
            "scores": round(time.time() - scoring_start, 1),
        },
        "command": run_log.command_line(),
        **run_log.environment(),
    }
    file = epath.Path(workdir) / table.RESULT
    atomic.write_file(file, json.dumps(result, indent=2) + "\n")
    return result


def main(argv: list[str]) -> None:
    """Parse the flags and run."""
    values = flags.FLAGS
    if argv or not values.row or not values.workdir:
        raise ValueError("--row and --workdir are needed, and no other arguments")
    cfg = rows.settings(values, values.row, values["seed"].value or 0)
    codec = values.fae or rows.configuration(values.variant, "pretzel").fae.path
    held_out = rows.held_out(values.variant, values.row, data=values.data)
    with folder_lock.lock(values.workdir, "makes this run of the table", ".ablation.lock"):
        run(cfg, rows.ROWS[values.row].latents, held_out, values.workdir, fae=codec)


if __name__ == "__main__":
    rows.define(flags.FLAGS)
    flags.DEFINE_string("row", None, "a name in rows.py")
    allocator.keep_freed_memory()
    cli.run(main)
