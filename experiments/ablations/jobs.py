"""The runs of the ablation table, their folders, and whether they are done."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from etils import epath

from starflow2_jax import config
from starflow2_jax.data import untrusted
from starflow2_jax.latents import write

from . import rows, table

JUDGED, STAGES = "judged.json", "stages"
# Paths of frozen models, data and initial weights may change: training compares their contents.
RELOCATABLE_KEYS = ("vlm.path", "fae.path", "data.mixture", "init.from")


class Job(NamedTuple):
    """A run: a row of stage 3 with its seed, or stage 1 or 2 of a row, which have one seed."""

    row: str
    seed: int = 0
    stage: int = 3

    def __str__(self) -> str:
        return f"{self.row}, " + (f"seed {self.seed}" if self.stage == 3 else f"stage {self.stage}")


def jobs(only: Sequence[str], shard: str, seeds: int = 0) -> list[Job]:
    """Return the runs of a shard: the first seed of every row, core rows first, then the second.

    The stages that a row needs come before the first run that needs them.

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
    runs = [Job(name, seed) for seed, _, _, name in ordered][number::count]
    return list(dict.fromkeys(job for run in runs for job in (*needed_stages(run.row), run)))


def needed_stages(name: str) -> list[Job]:
    """Return the runs of stages 1 and 2 that a row continues."""
    stages = range(1, rows.ROWS[name].start + 1)
    return [Job(rows.stage_row(name, stage), 0, stage) for stage in stages]


def folder(out: epath.Path, job: Job) -> epath.Path:
    """Return the workdir of a run."""
    if job.stage == 3:
        return out / job.row / str(job.seed)
    return out / STAGES / job.row / f"stage{job.stage}"


def source(out: epath.Path, job: Job) -> str:
    """Return the workdir of the stage whose weights a run starts from, "" for a stage 1."""
    stage = rows.ROWS[job.row].start if job.stage == 3 else job.stage - 1
    return str(folder(out, Job(rows.stage_row(job.row, stage), 0, stage))) if stage else ""


def is_done(folder: epath.Path, cfg: dict[str, Any]) -> bool:
    """Return whether a run's result exists.

    Raises:
        ValueError: It belongs to another configuration; names the differing keys.
    """
    path = folder / table.RESULT
    if not path.exists():
        return False
    stored = config.upgrade(read_result(path)["config"])
    differing = [
        row for row in config.differences(stored, cfg) if not row.startswith(RELOCATABLE_KEYS)
    ]
    if differing:
        raise ValueError(f"{path} is of another configuration:\n  " + "\n  ".join(differing))
    return True


def read_result(path: epath.Path) -> dict[str, Any]:
    """Return the JSON object of a result; ValueError names a file that is none."""
    result = untrusted.read_json(path, dict[str, Any])
    if not isinstance(result.get("config"), dict):
        raise ValueError(f"{path}: has no `config`; expected the result of an ablation")
    return result


def is_judged(job: Job) -> bool:
    """Return whether images of a run can be judged: its flow draws what the codec decodes.

    Of the earlier stages, stage 1 of the Pretzel is compared with stage 3.
    """
    if job.stage != 3:
        return job == Job("pretzel", 0, 1)
    return rows.ROWS[job.row].latents == "fae"
