"""The trainings that led to a model, from the configurations of its run and of those before it."""

from collections.abc import Mapping
from typing import Any

from starflow2_jax.checkpoints import model_folder
from starflow2_jax.checkpoints.open_model import open_model

MAX_STAGES = 8


def training_history(path: str) -> list[dict[str, Any]]:
    """Return `name`, `step`, `rows` of a step and `trainable` of each training, in order.

    The trainings are the run at `path` and, by `init.from`, those whose weights it started from, as
    far as their folders exist. Of a model folder only the last training is known.
    """
    stages: list[dict[str, Any]] = []
    while path and len(stages) < MAX_STAGES:
        saved = open_model(path)
        stages.append(_describe(saved.config, saved.step))
        path = str(saved.config.get("init", {}).get("from") or "")
        # A relative path means nothing to an exported folder, which may lie anywhere.
        if saved.is_folder or not path or not model_folder.locate(path).is_dir():
            break
    return stages[::-1]


def _describe(cfg: Mapping[str, Any], step: int | None) -> dict[str, Any]:
    train = cfg["train"]
    return {
        "name": cfg.get("name") or "",
        "step": train["steps"] if step is None else step,
        "rows": train["batch_size"],
        "trainable": list(train["trainable"]),
    }


def lines(stages: list[dict[str, Any]]) -> list[str]:
    """Return one line of text for each training."""
    return [
        f"{stage['name']}: {stage['step']:,} steps of {stage['rows']} rows, training "
        f"{', '.join(stage['trainable'])}"
        for stage in stages
    ]
