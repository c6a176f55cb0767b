"""One run of the ablation table: latents where they are missing, training, scores.

python -m experiments.ablations.one --variant tiny --row mot_frozen --seed 1 --workdir runs/x
"""

import json
import time
from typing import Any

from absl import flags
from etils import epath

from starflow2_jax import params, train
from starflow2_jax.checkpoints import steps
from starflow2_jax.runtime import allocator, cli
from starflow2_jax.training.logging import run_log
from starflow2_jax.training.tasks import starflow2

from . import latents, rows, scores, table


def run(
    cfg: dict[str, Any], kind: str, held_out: tuple, workdir: str, *, fae: str = ""
) -> dict[str, Any]:
    """Trains and measures; writes and gives the result.

    Args:
        kind: of latents; held_out: as `rows.held_out`; fae: the codec that makes them.

    Raises:
        ValueError, OSError, RuntimeError: as `train.train`, `latents.make` and `scores.measure`.
        RuntimeError: training was told to stop before its last step; nothing is measured then.
    """
    began = time.time()
    model = starflow2.model_config(cfg)
    there = [e for e in held_out if not e.get("text") or epath.Path(e["path"]).exists()]
    made = {**cfg, "fae": {**cfg["fae"], "path": fae or cfg["fae"]["path"]}}
    latents.make(kind, made, model.flow.side, [*cfg["data"]["mixture"], *there])
    training = time.time()
    train.train(cfg, workdir)
    reached, wanted = steps.latest(workdir) or 0, cfg["train"]["steps"]
    if reached < wanted:
        raise RuntimeError(f"{workdir}: training was stopped at step {reached} of {wanted}; "
                           "the same command goes on")  # fmt: skip
    trained = params.split(model.declare(), tuple(cfg["train"]["trainable"]))[0]
    scoring = time.time()
    result = {
        "config": cfg,
        "trained": params.count(trained),
        **scores.measure(workdir, there),
        "seconds": {
            "latents": round(training - began, 1),
            "training": round(scoring - training, 1),
            "scores": round(time.time() - scoring, 1),
        },
        "command": run_log.command_line(),
        **run_log.environment(),
    }
    (epath.Path(workdir) / table.RESULT).write_text(json.dumps(result, indent=2) + "\n")
    return result


def main(words: list[str]) -> None:
    """See the module's docstring."""
    values = flags.FLAGS
    if words or not values.row or not values.workdir:
        raise ValueError("--row and --workdir are needed, and no other words")
    cfg = rows.settings(values, values.row, values["seed"].value or 0)
    codec = values.fae or rows.configuration(values.variant, "pretzel").fae.path
    held = rows.held_out(values.variant, values.row, data=values.data)
    run(cfg, rows.ROWS[values.row].latents, held, values.workdir, fae=codec)


if __name__ == "__main__":
    rows.define(flags.FLAGS)
    flags.DEFINE_string("row", None, "a name in rows.py")
    allocator.keep_freed_memory()
    cli.run(main)
