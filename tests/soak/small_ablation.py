"""The runner of the ablations with two jobs that only write files: `small_ablation OUT`.

Each job is a process of its own, as a training is, and ends with the runner.
"""

import json
import sys
import time
from pathlib import Path

from starflow2_jax.runtime import atomic, child_process, folder_lock

RESULT = "result.json"
FILES = 5
SECONDS = 0.1  # of the work before each file


def main() -> None:
    """Run the jobs that are not done, and write a table of their results."""
    from etils import epath

    from experiments.ablations import run
    from experiments.ablations.jobs import Job

    out = Path(sys.argv[1])

    def start(job):
        folder = epath.Path(out / job.row)
        return run._start(["soak.small_ablation", str(folder), "job"], folder / run.LOG)

    def done(job):
        return (out / job.row / RESULT).exists()

    jobs = [Job("pretzel"), Job("no_skips")]
    if failed := run.sweep(jobs, done, start):
        sys.exit(f"error: {failed} failed")
    rows = {job.row: json.loads((out / job.row / RESULT).read_text()) for job in jobs}
    atomic.write_file(out / "table.json", json.dumps(rows) + "\n")


def run_job(folder: str) -> None:
    """Write some files, and a result at last."""
    child_process.end_with_parent()
    with folder_lock.lock(folder, "makes this run of the table", ".ablation.lock"):
        for number in range(FILES):
            time.sleep(SECONDS)
            atomic.write_file(Path(folder) / f"{number}.txt", f"{number}\n")
        atomic.write_file(Path(folder) / RESULT, json.dumps({"files": FILES}) + "\n")


if __name__ == "__main__":
    try:
        if len(sys.argv) > 2:
            run_job(sys.argv[1])
        else:
            main()
    except OSError as error:
        sys.exit(f"error: {error}")
