"""A training process for the tests: `python train_runner.py CONFIG.json WORKDIR [WHAT] [NOTES]`.

WHAT is `before:N` or `after:N`: the process kills itself with signal 9 when step N is to be saved,
or once it is committed and sealed; `writing:N` while its files are being written; `step:N` and
`data:N` when step N begins or its batch is made; `stop:N`: it stops after step N as on SIGTERM.
`P@` before it lets only process P do so. NOTES is a folder for what each process has seen: the ids
of its batches, and its part of the state after a restore.
"""

import json
import os
import pathlib
import signal
import sys
import threading
import time

import jax
import numpy as np

from starflow2_jax import train
from starflow2_jax.checkpoints import orbax
from starflow2_jax.data import image_batches, packed_batches
from starflow2_jax.runtime import distributed
from starflow2_jax.training import program as programs

if "OBJECT_STORE" in os.environ:
    import object_store

    object_store.use()
config, workdir = json.loads(pathlib.Path(sys.argv[1]).read_text()), sys.argv[2]
what = sys.argv[3] if len(sys.argv) > 3 else ""
notes = pathlib.Path(sys.argv[4]) if len(sys.argv) > 4 else None
who, _, what = what.rpartition("@")
when, _, step = what.partition(":")
process = os.environ.get("JAX_PROCESS_ID", "0")
if who not in ("", process):
    when = ""
save, restore, to_device = orbax.save, orbax.restore, programs.to_device


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def save_and_die(writer, number, state, meta):
    if number != int(step or -1) or when not in ("before", "writing", "after"):
        return save(writer, number, state, meta)
    if when == "before":
        orbax.wait(writer)
        die()
    if when == "writing":
        target = os.path.join(workdir, "checkpoints", str(number))

        def watch():
            while not os.path.exists(target):
                time.sleep(1e-3)
            die()

        threading.Thread(target=watch, daemon=True).start()
    save(writer, number, state, meta)
    orbax.wait(writer)
    die()


def note(name, text):
    if notes is not None:
        with open(notes / f"{name}_{process}.jsonl", "a") as file:
            file.write(text + "\n")


def restore_and_note(*args, **kwargs):
    """Every part of the state that this process holds, by number of the array and where it lies."""
    found = restore(*args, **kwargs)
    if notes is not None:
        parts = {}
        for number, leaf in enumerate(jax.tree.leaves(found[0])):
            for shard in leaf.addressable_shards:
                where = [[s.start or 0, s.stop or n] for s, n in zip(shard.index, leaf.shape)]
                parts[f"{number} {json.dumps(where)}"] = np.asarray(shard.data)
        np.savez(notes / f"restored_{args[1]}_{process}.npz", **parts)
    return found


def of_interest(batches):
    def noted(*args, start_step=0, **kwargs):
        made = batches(*args, start_step=start_step, **kwargs)
        for number, batch in enumerate(made, start_step + 1):
            if when == "data" and number == int(step):
                die()
            note("ids", json.dumps([number, batch["id"]]))
            yield batch

    return noted


def to_device_and_die(program, batch):
    to_device_and_die.calls = getattr(to_device_and_die, "calls", 0) + 1
    if when == "step" and to_device_and_die.calls == int(step):
        threading.Timer(0.01, die).start()  # the step is running by then, or soon will
    return to_device(program, batch)


orbax.save, orbax.restore = save_and_die, restore_and_note
image_batches.batches, packed_batches.batches = (
    of_interest(image_batches.batches),
    of_interest(packed_batches.batches),
)
programs.to_device = to_device_and_die
if when == "stop":
    distributed.stopper = lambda: lambda number: number == int(step)
train.train(config, workdir)
