"""The seconds of every run of the table, measured or estimated, so that it can be run in pieces."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from starflow2_jax.data import untrusted
from starflow2_jax.training.logging import run_log
from starflow2_jax.training.tasks import starflow2

from . import table
from .jobs import JUDGED, Job, folder, is_judged, read_result

# FLOP/s of a small training on two cores, until a run has measured that of this machine.
DEFAULT_RATE = 6.5e10
# Seconds to compile, to score, and to draw and judge one case of each tag.
COMPILE, SCORES, JUDGE = 60, 30, 6


def markdown(
    todo: Sequence[Job],
    out: epath.Path,
    settings: Callable[[str, int, int], Mapping[str, Any]],
    judge: int,
) -> str:
    """Return the seconds of every run and their sum as markdown.

    Args:
        settings: (row, seed, stage) -> configuration.
        judge: cases of each tag that are judged.
    """
    rate = measured_rate(out) or DEFAULT_RATE
    lines = ["| run | seconds | |", "|---|---|---|"]
    total = remaining = 0.0
    for job in todo:
        path = folder(out, job) / table.RESULT
        if path.exists():
            seconds, source = _measured(path), "measured"
        else:
            cfg = settings(job.row, job.seed, job.stage)
            cases = judge if is_judged(job) else 0
            seconds, source = estimate(cfg, job.stage, cases, rate), "estimated"
            remaining += seconds
        total += seconds
        lines.append(f"| {job} | {seconds:,.0f} | {source} |")
    lines.append(f"| all {len(todo)} runs | {total:,.0f} | |")
    lines.append(f"| those that are left | {remaining:,.0f} | at {rate / 1e9:.0f} GFLOP/s |")
    return "\n".join(lines) + "\n"


def estimate(cfg: Mapping[str, Any], stage: int, cases: int, rate: float) -> float:
    """Return the seconds that a run takes at `rate` FLOP/s."""
    model = starflow2.model_config(cfg)
    flops = starflow2.step_cost(cfg, model, model.declare())["flops"]
    training = cfg["train"]["steps"] * flops / rate
    return training + COMPILE + (SCORES if stage == 3 else 0) + JUDGE * cases


def measured_rate(out: epath.Path) -> float | None:
    """Return the median FLOP/s that the runs in a folder have logged, None without any."""
    # ROW/SEED and stages/ROW/STAGE.
    patterns = (f"*/*/{run_log.METRICS}", f"*/*/*/{run_log.METRICS}")
    logged = [
        row["flops_per_second"]
        for pattern in patterns
        for path in out.glob(pattern)
        for row in run_log.read_rows(path.parent)
        if row.get("flops_per_second")
    ]
    return statistics.median(logged) if logged else None


def _measured(path: epath.Path) -> float:
    """Return the seconds of training, scoring and, if it was, judging of a run."""
    judged = path.parent / JUDGED
    seconds = untrusted.read_json(judged, dict[str, Any])["seconds"] if judged.exists() else 0.0
    return sum(read_result(path)["seconds"].values()) + seconds
