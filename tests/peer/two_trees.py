"""Training steps of an experiment by several work trees, in turn in one process on the same rows.

    python tests/peer/two_trees.py --config experiments/stage1_t2i.py:tiny \\
        --tree old=../main --tree new=. --steps 10

Processes that take turns differ by 10% from run to run on a small machine, and so do their ratios.
Steps that take turns in one process share its memory and its minute: their ratios repeat to 1%.
The rows are those of the first tree's data pipeline, without its time. Steps start from the same
random weights, so that the losses must agree to rounding.
"""

import argparse
import importlib
import importlib.util
import os
import statistics
import sys
import time


def import_from(tree):
    """Make the next imports of the package come from a work tree, and return an importer."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "starflow2_jax"]:
        del sys.modules[name]
    sys.path[0] = os.path.abspath(tree)
    return lambda name: importlib.import_module(f"starflow2_jax.{name}")


def read_config(path, package):
    """Return the plain configuration FILE.py:variant."""
    path, _, variant = path.partition(":")
    spec = importlib.util.spec_from_file_location("experiment", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return package("config").to_dict(module.get_config(variant or "tiny"))


def read_batches(cfg, package, count):
    """Return the first host batches of an experiment."""
    encoder, registry = package("latents.batch_encoder"), package("training.tasks.registry")
    task = registry.make_task(cfg)
    codec = encoder.open(cfg, getattr(task.model_config, "flow", task.model_config))
    data = package("training.run_data").open_data(cfg, task, codec)
    batches = data.batches(batch_size=cfg["train"]["batch_size"])
    return [next(batches) for _ in range(count)]


def start(cfg, package, batches):
    """Return a function of a turn's number that runs a step and returns its loss."""
    import jax

    programs, mesh = package("training.program"), package("mesh").make_mesh(cfg["mesh"])
    jax.set_mesh(mesh)
    task = package("training.tasks.registry").make_task(cfg)
    program = programs.build_program(cfg, mesh, task)
    executable = program.lower_step().compile()
    state, frozen = program.init(jax.random.key(cfg["seed"]))
    placed, current = [programs.to_device(program, batch) for batch in batches], [state]

    def run(turn):
        current[0], metrics = executable(current[0], frozen, placed[turn % len(placed)])
        jax.block_until_ready((current[0], metrics))
        return float(metrics["loss"])

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="FILE.py[:variant], read for each tree")
    parser.add_argument("--tree", action="append", required=True, help="NAME=FOLDER, the old first")
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    trees = [tree.partition("=")[::2] for tree in args.tree]
    batches, steps = None, {}
    for name, folder in trees:
        package = import_from(folder)
        package("runtime.allocator").keep_freed_memory()
        package("runtime.cli").use_compilation_cache()
        cfg = read_config(args.config, package)
        batches = batches or read_batches(cfg, package, 8)
        steps[name] = start(cfg, package, batches)
    times = {name: [] for name in steps}
    losses = {name: [] for name in steps}
    for turn in range(2 + args.steps):
        # The order alternates, because a step leaves the caches to the next one.
        for name in sorted(steps, reverse=turn % 2 == 1):
            begin = time.perf_counter()
            losses[name].append(steps[name](turn))
            times[name].append(time.perf_counter() - begin)
    first = trees[0][0]
    for name in steps:
        ratios = [a / b for a, b in zip(times[first][2:], times[name][2:])]
        difference = max(abs(a - b) for a, b in zip(losses[first], losses[name]))
        print(
            f"{name}: {1000 * statistics.median(times[name][2:]):.0f} ms, {first} / {name} "
            f"{statistics.median(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f}), "
            f"losses differ by {difference:.1e}"
        )


if __name__ == "__main__":
    main()
