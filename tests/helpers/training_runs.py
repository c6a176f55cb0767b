"""Training runs of a tiny TarFlow in processes of their own, and the files that they leave."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np

from helpers.tiny_flow import experiment
from starflow2_jax import config, mesh
from starflow2_jax.checkpoints import orbax
from starflow2_jax.training.logging import run_log
from starflow2_jax.training.tasks import registry

RUNNER = pathlib.Path(__file__).with_name("train_runner.py")
CLOCKS = ("seconds_per_step", "tokens_per_second", "flops_per_second", "mfu")


def run_config(data, **changes):
    """Return the configuration of a short run on a dataset, with dotted keys changed."""
    base = {
        "model.classes": 8, "train.steps": 6, "optim.lr": 1e-3, "checkpoint.every": 2,
        "checkpoint.keep": 9, "log.every": 1, "sample.every": 3, "sample.count": 2,
        "evaluate.every": 3, "evaluate.rows": 16, "evaluate.batch_size": 16, "mesh": "data=-1",
    }  # fmt: skip
    cfg = experiment()
    for group in ("data", "eval_data"):
        cfg[group] |= {"path": str(data), "labels": True, "threads": 1}
    for name, value in {**base, **changes}.items():
        *path, last = name.split(".")
        group = cfg
        for part in path:
            group = group[part]
        group[last] = value
    config.check(cfg)
    return cfg


def start(cfg, workdir, event="", devices=1):
    """Start a process that trains; `train_runner` says which events end it."""
    file = workdir.with_suffix(".json")
    file.write_text(json.dumps(cfg))
    return subprocess.Popen(
        [sys.executable, str(RUNNER), str(file), str(workdir), event],
        env=environment(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def environment(devices=1):
    """Return the environment of a process with virtual CPU devices and quickly compiled programs.

    conftest.py sets the cache of compiled programs, which all processes of a test run share.
    """
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }


def finish(process, expected=0):
    """Wait for a process, check its exit status, and return what it printed."""
    output = process.communicate(timeout=300)[0].decode()
    assert process.returncode == expected, output[-3000:]
    return output


def state_of(workdir, number, cfg):
    """Return the state of a step of a flow's run, restored on one device, as numpy arrays."""
    program = registry.build({**cfg, "mesh": "data=1"}, mesh.make_mesh("data=1", jax.devices()[:1]))
    state, _ = orbax.restore(workdir, number, program.abstract_state)
    return jax.tree.map(np.asarray, state)


def rows_of(workdir):
    """Return the metric rows of a run without those that depend on the clock."""
    rows = run_log.read_rows(workdir)
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in rows]
