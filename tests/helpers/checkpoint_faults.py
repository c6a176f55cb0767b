"""Checkpoint programs that run, and sometimes die, in separate processes."""

import os
import resource
import signal
import threading
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from helpers.checkpoint_states import (
    META,
    abstract,
    bits,
    flip,
    make_plain_state,
    make_state,
    mesh_of,
    run,
    sharding,
    statuses,
)
from starflow2_jax.checkpoints import orbax

BIG = 4096


def save_and_die(workdir, trigger):
    """Save step 1, then step 2 with a kill -9 as soon as the file `trigger` exists."""
    run(Path(workdir), [1])

    def watch():
        while not os.path.exists(f"{workdir}/checkpoints/{trigger}"):
            time.sleep(0)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    writer = orbax.open(workdir, keep=1)
    orbax.save(writer, 2, make_state(2, width=BIG), META)
    orbax.close(writer)
    time.sleep(60)


def save_for_ever(workdir):
    writer = orbax.open(workdir, keep=2)
    for step in range(1, 1000):
        orbax.save(writer, step, make_state(step, width=BIG), META)
        print(step - 1, flush=True)  # the step before is committed and sealed by now


def save_on_full_disk(workdir, how):
    """Save steps 1 and 3, which fit, and print the error of step 2, which does not."""
    writer = orbax.open(workdir)
    orbax.save(writer, 1, make_state(1), META)
    orbax.wait(writer)
    if how == "limit":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    try:
        orbax.save(writer, 2, make_state(2, width=BIG), META)
        orbax.wait(writer)
    except RuntimeError as error:
        print(error)
    assert statuses(workdir) == {1: "sealed"}
    assert bits(orbax.restore(workdir, 1, abstract(make_state(1)))[0]) == bits(make_state(1))
    orbax.save(writer, 3, make_state(3), META)
    orbax.close(writer)
    assert statuses(workdir) == {1: "sealed", 3: "sealed"}
    assert not any(report.problems for report in orbax.verify(workdir))


def one_of_two(workdir, port, process):
    """Save and restore a state that is sharded over two processes."""
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"localhost:{port}", 2, process)
    mesh = mesh_of(4)
    host = jax.tree.map(np.asarray, make_plain_state(1))
    state = jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding(mesh, x), lambda i: x[i]), host
    )
    writer = orbax.open(workdir)
    for step in (1, 2):
        orbax.save(writer, step, state, META)
    orbax.close(writer)
    restored, meta = orbax.restore(workdir, None, state)
    assert not any(leaf.is_fully_addressable for leaf in jax.tree.leaves(restored))

    def shard_bytes(tree):
        return [s.data.tobytes() for x in jax.tree.leaves(tree) for s in x.addressable_shards]

    assert shard_bytes(restored) == shard_bytes(state) and meta == META
    if process == 0:
        flip(max(Path(workdir, "checkpoints/2/params/d").iterdir()), 50)
    multihost_utils.sync_global_devices("flipped")
    try:
        orbax.restore(workdir, 2, state)
    except ValueError as error:
        print(error)
    multihost_utils.sync_global_devices("done")
