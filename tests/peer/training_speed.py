"""Records per second of a training experiment, with its data pipeline, by wall clock and CPU time.

    python tests/peer/training_speed.py --config experiments/stage3_joint.py:tiny --steps 20

To compare commits, run it in a work tree of each, in turn, with PYTHONPATH set to that tree and in
the same folder of data. CPU time, of all threads of the process, is what a machine with other work
allows to compare. Steps start from random weights.
"""

import json
import statistics
import time

import jax
from absl import app, flags
from ml_collections import config_flags

from starflow2_jax import config, train
from starflow2_jax.latents import batch_encoder
from starflow2_jax.training import run_data
from starflow2_jax.training.program import to_device
from starflow2_jax.training.tasks import registry

CONFIG = config_flags.DEFINE_config_file("config", None, "FILE.py[:variant]")
STEPS = flags.DEFINE_integer("steps", 20, "measured steps, after three others", 1)


def measure(cfg, num_steps):
    """Return the medians of a step's seconds, and the mean number of records in its batch."""
    task = registry.make_task(cfg)
    codec = batch_encoder.open(cfg, getattr(task.model_config, "flow", task.model_config))
    data = run_data.open_data(cfg, task, codec)
    program, step, _ = train.compile_step(cfg, task)
    state, frozen = program.init(jax.random.key(cfg["seed"]))
    batches = data.batches(batch_size=cfg["train"]["batch_size"])
    wall, cpu, records = [], [], []
    for _ in range(3 + num_steps):
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        batch = next(batches)
        state, metrics = step(state, frozen, to_device(program, batch))
        jax.block_until_ready(metrics)
        wall.append(time.perf_counter() - wall_start)
        cpu.append(time.process_time() - cpu_start)
        records.append(sum(len(ids.split("\n")) for ids in batch["id"]))
    result = {"wall": statistics.median(wall[3:]), "cpu": statistics.median(cpu[3:])}
    return {**result, "records": statistics.mean(records[3:]), "jax": jax.__version__}


def main(argv):
    """Print the figures of an experiment as JSON."""
    del argv
    cfg = config.to_dict(CONFIG.value)
    result = measure(cfg, STEPS.value)
    result |= {
        f"records_per_{name}_second": result["records"] / result[name] for name in ("wall", "cpu")
    }
    print(json.dumps({name: round(v, 3) if name != "jax" else v for name, v in result.items()}))


if __name__ == "__main__":
    app.run(main)
