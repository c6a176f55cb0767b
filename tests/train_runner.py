"""A training process for the tests: `python train_runner.py CONFIG.json WORKDIR [KILL]`.

KILL is `before:N` or `after:N`: the process kills itself with signal 9 when step N is to be saved,
or once it is committed and sealed; `writing:N` while its files are being written.
"""

import json
import os
import pathlib
import signal
import sys
import threading
import time

from starflow2_jax import train
from starflow2_jax.training import checkpoint

config, workdir = json.loads(pathlib.Path(sys.argv[1]).read_text()), sys.argv[2]
when, _, step = (sys.argv[3] if len(sys.argv) > 3 else "").partition(":")
save = checkpoint.save


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def save_and_die(writer, number, state, meta):
    if when and number == int(step):
        if when == "before":
            checkpoint.wait(writer)
            die()
        if when == "writing":
            target = os.path.join(workdir, "checkpoints", str(number))

            def watch():
                while not os.path.exists(target):
                    time.sleep(1e-3)
                die()

            threading.Thread(target=watch, daemon=True).start()
        save(writer, number, state, meta)
        checkpoint.wait(writer)
        die()
    save(writer, number, state, meta)


checkpoint.save = save_and_die
train.train(config, workdir)
