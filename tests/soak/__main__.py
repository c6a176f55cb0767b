"""Run the soak test: `python -m soak MINUTES [SEED] [TRIAL]`; see launch/soak.sh."""

import shlex
import sys
import tempfile
from pathlib import Path

from soak import schedule


def main() -> None:
    """Parse the arguments, run, print the table, and end with status 1 after a failure."""
    minutes, seed, trial = float(sys.argv[1]), 0, ""
    if len(sys.argv) > 2:
        seed = int(sys.argv[2])
    if len(sys.argv) > 3:
        trial = sys.argv[3]
    with tempfile.TemporaryDirectory(prefix="soak_") as folder:
        soak = schedule.Soak(Path(folder), seed, report=lambda text: print(text, flush=True))
        try:
            if trial:
                soak.run_one(trial)
            else:
                soak.run(60 * minutes)
        finally:
            soak.close()
    print(f"seed {seed}: {shlex.join(sys.argv[1:])}\n\n{soak.tally.table()}", flush=True)
    sys.exit(1 if soak.tally.failures else 0)


if __name__ == "__main__":
    main()
