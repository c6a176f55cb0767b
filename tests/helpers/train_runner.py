"""A training process for the tests: `python train_runner.py CONFIG.json WORKDIR [EVENT] [NOTES]`.

EVENT says when the process ends itself by signal 9:
    before:N   step N is about to be saved
    writing:N  the files of step N are being written
    after:N    step N is saved, committed and sealed
    step:N     the N-th step of this process is running
    data:N     the batch of step N has been read
`stop:N` stops training after step N as SIGTERM would. A prefix `P@` restricts the event to process
P. NOTES is a folder in which each process leaves the ids of its batches, and its shards of the
state after a restore.
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

if "OBJECT_STORE" in os.environ:
    import object_store

    object_store.use()
config, workdir = json.loads(pathlib.Path(sys.argv[1]).read_text()), sys.argv[2]
event = sys.argv[3] if len(sys.argv) > 3 else ""
notes = pathlib.Path(sys.argv[4]) if len(sys.argv) > 4 else None
process = os.environ.get("JAX_PROCESS_ID", "0")
only_process, _, event = event.rpartition("@")
kind, _, step = event.partition(":")
if only_process not in ("", process):
    kind = ""
save, restore, to_device = orbax.save, orbax.restore, train.to_device


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def save_and_die(writer, number, state, meta):
    if number != int(step or -1) or kind not in ("before", "writing", "after"):
        return save(writer, number, state, meta)
    if kind == "before":
        orbax.wait(writer)
        die()
    if kind == "writing":
        folder = os.path.join(workdir, "checkpoints", str(number))

        def die_once_it_exists():
            while not os.path.exists(folder):
                time.sleep(1e-3)
            die()

        threading.Thread(target=die_once_it_exists, daemon=True).start()
    save(writer, number, state, meta)
    orbax.wait(writer)
    die()


def restore_and_note(*args, **kwargs):
    """Restore, and write every addressable shard by the number of its array and its index."""
    restored = restore(*args, **kwargs)
    if notes is not None:
        shards = {}
        for number, leaf in enumerate(jax.tree.leaves(restored[0])):
            for shard in leaf.addressable_shards:
                index = [[s.start or 0, s.stop or n] for s, n in zip(shard.index, leaf.shape)]
                shards[f"{number} {json.dumps(index)}"] = np.asarray(shard.data)
        np.savez(notes / f"restored_{args[1]}_{process}.npz", **shards)
    return restored


def note_ids(batches):
    """Wrap a function that yields batches, so that it notes their ids and dies at `data:N`."""

    def noting_batches(*args, start_step=0, **kwargs):
        stream = batches(*args, start_step=start_step, **kwargs)
        for number, batch in enumerate(stream, start_step + 1):
            if kind == "data" and number == int(step):
                die()
            if notes is not None:
                with open(notes / f"ids_{process}.jsonl", "a") as file:
                    file.write(json.dumps([number, batch["id"]]) + "\n")
            yield batch

    return noting_batches


def to_device_and_die(program, batch):
    to_device_and_die.calls = getattr(to_device_and_die, "calls", 0) + 1
    if kind == "step" and to_device_and_die.calls == int(step):
        threading.Timer(0.01, die).start()  # by then the step runs, or is about to
    return to_device(program, batch)


def replace(module, name, function):
    assert hasattr(module, name), f"{module.__name__} has no {name}"
    setattr(module, name, function)


replace(orbax, "save", save_and_die)
replace(orbax, "restore", restore_and_note)
replace(image_batches, "batches", note_ids(image_batches.batches))
replace(packed_batches, "batches", note_ids(packed_batches.batches))
replace(train, "to_device", to_device_and_die)
if kind == "stop":
    replace(distributed, "preemption_handler", lambda: lambda number: number == int(step))
train.train(config, workdir)
