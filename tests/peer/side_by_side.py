"""`bench` and the eager torch programs on one machine, turn by turn, and the ratios.

    python tests/peer/side_by_side.py --rounds 3 --repeats 3
    python tests/peer/side_by_side.py --only "sample_starflow --batch 8"

Every turn is a process of its own; a round runs each program once. Small machines drift by tens of
per cent within minutes: ratios come from the two medians over all rounds, and the lowest and the
highest ratio of a single round stand beside them. Needs the `parity` extra and a quiet machine.
`--torch_python` names the interpreter of the torch programs if this one has no torch.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROWS = (
    "train_tarflow",
    "train_starflow",
    "sample_starflow --batch 1",
    "sample_starflow --batch 8",
    "sample_starflow --batch 1 --guidance 2.5",
    "sample_starflow --batch 1 --jacobi",
    "sample_tarflow --batch 1",
    "sample_tarflow --batch 8",
)


def commands(row: str, repeats: int, torch_python: str) -> tuple[list[str], list[str]]:
    """Return the command lines of a row: of this package and of torch."""
    name, *options = row.split()
    verb, family = name.split("_")
    shared = [*options, "--repeats", str(repeats)]
    torch_command = [torch_python, str(HERE / "torch_flow.py"), "--row", name, *shared]
    jax_command = [sys.executable, "-m", "starflow2_jax.bench", verb, "--preset", f"peer_{family}"]
    jacobi = {"--jacobi": "--jacobi=16,1e-3"}
    return [*jax_command, *(jacobi.get(word, word) for word in shared), "--json"], torch_command


def run(command: list[str]) -> dict:
    """Run a program, and return the JSON object at the end of its output."""
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout[done.stdout.index("{") :])


def compare(row: str, rounds: int, repeats: int, torch_python: str = sys.executable) -> dict:
    """Return the medians in ms, and the time of torch over that of this package."""
    jax_command, torch_command = commands(row, repeats, torch_python)
    results = [(run(jax_command), run(torch_command)) for _ in range(rounds)]
    pairs = [(jax["ms"], torch["median_ms"]) for jax, torch in results]
    median = [statistics.median(times) for times in zip(*pairs)]
    ratios = [torch_ms / jax_ms for jax_ms, torch_ms in pairs]
    result = {"row": row, "ours_ms": round(median[0]), "torch_ms": round(median[1])}
    result["ratio"] = round(median[1] / median[0], 2)
    result |= {"ratio_min": round(min(ratios), 2), "ratio_max": round(max(ratios), 2)}
    result["peak_mb"] = [round(max(one[i]["peak_mb"] for one in results)) for i in (0, 1)]
    for name in ("share_of_matmul_rate", "share_of_bound"):
        if name in results[0][0]:
            result[name] = round(statistics.median(jax[name] for jax, _ in results), 2)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help=f"one row; all are: {'; '.join(ROWS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--torch_python", default=sys.executable)
    args = parser.parse_args()
    for row in [args.only] if args.only else ROWS:
        result = compare(row, args.rounds, args.repeats, args.torch_python)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
