"""Training steps and samples under several interpreters, and so jax versions, step by step in turn.

    python tests/peer/jax_versions.py --python venv310/bin/python --python venv312/bin/python \
        --work train:peer_tarflow train:stage3 sample:peer_starflow:8

Each interpreter builds the same program in a process of its own, which then runs one step at a time
when it is its turn, so that a drift of the machine affects all of them. The package is that of
PYTHONPATH.
"""

import argparse
import statistics
import subprocess
import sys
import time


def serve(run, repeats=0, warm_up=3):
    """Run once for every line of the input, and print the milliseconds."""
    import jax

    for _ in range(warm_up):
        jax.block_until_ready(run())
    print("ready", jax.__version__, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        jax.block_until_ready(run())
        print("ms", 1000 * (time.perf_counter() - start), flush=True)
    sys.exit(0)


def build(work):
    """Build a workload of `bench`, whose measurement becomes `serve`."""
    from starflow2_jax import bench
    from starflow2_jax.benchmarking import stages
    from starflow2_jax.runtime import allocator, cli

    allocator.keep_freed_memory()
    cli.use_compilation_cache()
    bench.measure = stages.measure = serve
    verb, preset, *rows = work.split(":")
    rows = int(rows[0]) if rows else None
    if preset in stages.STAGES:
        stages.train(preset, "tiny", rows or 16, "float32", 1)
    elif verb == "train":
        bench.train_preset(preset, rows, "float32", 1, {})
    else:
        bench.sample_preset(preset, rows or 1, 0.0, None, "float32", 1, {})


def answer(process):
    """Return the next result of a worker, as words."""
    for line in process.stdout:
        if line.startswith(("ready ", "ms ")):
            return line.split()[1]
    raise SystemExit(f"{' '.join(process.args)} ended: {process.poll()}")


def compare(work, interpreters, rounds):
    """Print the median of each interpreter, and its ratio to the first by rounds."""
    workers = [
        subprocess.Popen(
            [python, __file__, "--build", work],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for python in interpreters
    ]
    versions = [answer(process) for process in workers]
    times = [[] for _ in workers]
    for turn in range(rounds):
        order = range(len(workers))
        for i in order if turn % 2 == 0 else reversed(order):
            workers[i].stdin.write("step\n")
            workers[i].stdin.flush()
            times[i].append(float(answer(workers[i])))
    for process in workers:
        process.stdin.close()
        process.wait()
    for version, ms in zip(versions, times):
        ratios = [a / b for a, b in zip(times[0], ms)]
        print(
            f"{work}, jax {version}: {statistics.median(ms):.0f} ms ({min(ms):.0f}), jax "
            f"{versions[0]} takes {statistics.median(ratios):.2f} times as long "
            f"({min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", action="append", help="an interpreter with jax")
    parser.add_argument("--work", nargs="+", default=["train:peer_tarflow"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--build", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.build:
        build(args.build)
    for work in args.work:
        compare(work, args.python, args.rounds)


if __name__ == "__main__":
    main()
