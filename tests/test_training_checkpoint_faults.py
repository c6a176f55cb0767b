"""Checkpoints when things go wrong from outside: kill -9, a full disk; and several processes."""

import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from test_training_checkpoint import (
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


def start(call, prefix=()):
    """`call` of this module in a process of its own, which may die."""
    code = f"import conftest, test_training_checkpoint_faults as t; t.{call}"
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def child(call, prefix=()):
    process = start(call, prefix)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(call, process.returncode, out, err)


def save_and_die(workdir, trigger):
    """Saves step 1, then step 2 with a kill -9 as soon as the file `trigger` is there."""
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


def check_every_listed_step(workdir, at_least, width):
    """Whatever is listed is whole; no step that was finished is lost; the run can go on."""
    entries = [entry for entry in orbax.steps(workdir) if entry.status != "leftover"]
    assert entries and entries[-1].step >= at_least
    assert all(path.name.isdecimal() for path in (workdir / "checkpoints").iterdir())
    for entry in entries:
        state = make_state(entry.step, width=width(entry.step))
        restored, meta = orbax.restore(workdir, entry.step, abstract(state))
        assert bits(restored) == bits(state) and meta == META
    newest = orbax.latest(workdir)
    run(workdir, [newest + 1], keep=1)
    assert statuses(workdir)[newest + 1] == "sealed"
    assert orbax.latest(workdir) == newest + 1


FIRST_WORDS = ["2/ema/_sharding", "2/commit_success.txt", "2/SHA256SUMS.tmp"]
MORE_WORDS = ["2", "2/params/manifest.ocdbt", "2/opt_state/d", "2/step/_METADATA"]
LAST_WORDS = ["2/orbax.checkpoint", "2/_CHECKPOINT_METADATA", "2/SHA256SUMS"]


@pytest.mark.parametrize(
    "trigger",
    FIRST_WORDS + [pytest.param(t, marks=pytest.mark.slow) for t in MORE_WORDS + LAST_WORDS],
)
def test_killed_while_saving(tmp_path, trigger):
    result = child(f"save_and_die({str(tmp_path)!r}, {trigger!r})")
    assert result.returncode == -signal.SIGKILL, result.stderr
    check_every_listed_step(tmp_path, 1, lambda step: 8 if step == 1 else BIG)


@pytest.mark.slow
def test_killed_at_random_times(tmp_path):
    rng = random.Random(0)
    for trial in range(8):
        workdir = tmp_path / str(trial)
        process = start(f"save_for_ever({str(workdir)!r})")
        for _ in range(3):
            finished = int(process.stdout.readline())
        time.sleep(rng.uniform(0, 1.0))
        process.kill()
        finished = max([finished, *map(int, process.stdout.read().split("\n")[:-1])])
        process.wait()
        check_every_listed_step(workdir, finished, lambda step: BIG)


def save_on_full_disk(workdir, how):
    """Step 1 fits, step 2 does not, step 3 fits again; prints the error of step 2."""
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


def check_full_disk_message(result, folder, why):
    assert result.returncode == 0, result.stderr
    message = result.stdout.strip()
    assert message.count("\n") == 0 and "Traceback" not in result.stderr
    assert message.startswith(f"checkpoint of step 2 could not be written ({folder}): ")
    assert why in message
    assert message.endswith("earlier checkpoints are untouched: [1]")


def test_full_disk(tmp_path):
    result = child(f"save_on_full_disk({str(tmp_path)!r}, 'limit')")
    check_full_disk_message(result, tmp_path / "checkpoints" / "2", "a limit on file sizes was hit")


def test_full_disk_on_a_small_file_system(tmp_path):
    script = f'mount -t tmpfs -o size=700k none {tmp_path} && exec "$0" "$@"'
    namespace = ["unshare", "--map-root-user", "--mount"]
    try:
        probe = [*namespace, "sh", "-c", script, "true"]
        allowed = subprocess.run(probe, capture_output=True).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("mounting a tmpfs in a namespace of its own is not permitted here")
    call = f"save_on_full_disk({str(tmp_path)!r}, 'mount')"
    result = child(call, prefix=[*namespace, "sh", "-c", script])
    check_full_disk_message(result, tmp_path / "checkpoints" / "2", "the disk is full")


# ------------------------------------------------------------------------------ several processes


def one_of_two(workdir, port, process):
    """Both processes save and restore a state that is sharded over them."""
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
    ours = [s.data.tobytes() for x in jax.tree.leaves(state) for s in x.addressable_shards]
    theirs = [s.data.tobytes() for x in jax.tree.leaves(restored) for s in x.addressable_shards]
    assert ours == theirs and meta == META
    if process == 0:
        flip(max(Path(workdir, "checkpoints/2/params/d").iterdir()), 50)
    multihost_utils.sync_global_devices("flipped")
    try:
        orbax.restore(workdir, 2, state)
    except ValueError as error:
        print(error)
    multihost_utils.sync_global_devices("done")


@pytest.mark.slow
def test_two_processes(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    both = [start(f"one_of_two({str(tmp_path)!r}, {port}, {process})") for process in range(2)]
    for process in both:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert "params/d/" in out and "newest good step: 1" in out
    state = make_state(1)
    assert bits(orbax.restore(tmp_path, 1, abstract(state, 4))[0]) == bits(state)
