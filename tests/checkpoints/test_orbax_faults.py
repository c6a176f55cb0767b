"""Checkpoints survive kill -9 and full disks, and work with several processes."""

import os
import random
import signal
import socket
import subprocess
import sys
import time

import pytest
from helpers.checkpoint_faults import BIG
from helpers.checkpoint_states import (
    META,
    abstract,
    bits,
    make_state,
    run,
    statuses,
)
from helpers.paths import PYTHONPATH

from starflow2_jax.checkpoints import orbax, steps


def start(call, prefix=()):
    """Start a function of `checkpoint_faults` in a separate process, which may die."""
    code = "from helpers import cpu_devices; cpu_devices.configure(); "
    code += f"from helpers import checkpoint_faults; checkpoint_faults.{call}"
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def child(call, prefix=()):
    process = start(call, prefix)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(call, process.returncode, out, err)


def check_every_listed_step(workdir, at_least, width):
    """Check that every listed step is complete, none is lost, and the run can continue."""
    entries = [entry for entry in steps.steps(workdir) if entry.status != "leftover"]
    assert entries and entries[-1].step >= at_least
    assert all(path.name.isdecimal() for path in (workdir / "checkpoints").iterdir())
    for entry in entries:
        state = make_state(entry.step, width=width(entry.step))
        restored, meta = orbax.restore(workdir, entry.step, abstract(state))
        assert bits(restored) == bits(state) and meta == META
    newest = steps.latest(workdir)
    run(workdir, [newest + 1], keep=1)
    assert statuses(workdir)[newest + 1] == "sealed"
    assert steps.latest(workdir) == newest + 1


FIRST_WORDS = ["2/ema/_sharding", "2/commit_success.txt", "2/.SHA256SUMS.partial"]
MORE_WORDS = ["2", "2/params/manifest.ocdbt", "2/opt_state/d", "2/step/_METADATA"]
LAST_WORDS = ["2/orbax.checkpoint", "2/_CHECKPOINT_METADATA", "2/SHA256SUMS"]


@pytest.mark.parametrize(
    "trigger",
    FIRST_WORDS + [pytest.param(t, marks=pytest.mark.slow) for t in MORE_WORDS + LAST_WORDS],
)
def test_a_kill_while_saving_loses_no_finished_step(tmp_path, trigger):
    result = child(f"save_and_die({str(tmp_path)!r}, {trigger!r})")
    assert result.returncode == -signal.SIGKILL, result.stderr
    check_every_listed_step(tmp_path, 1, lambda step: 8 if step == 1 else BIG)


@pytest.mark.slow
def test_kills_at_random_times_lose_no_finished_step(tmp_path):
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


def check_full_disk_message(result, folder, why):
    assert result.returncode == 0, result.stderr
    message = result.stdout.strip()
    assert message.count("\n") == 0 and "Traceback" not in result.stderr
    assert message.startswith(f"checkpoint of step 2 could not be written ({folder}): ")
    assert why in message
    assert message.endswith("earlier checkpoints are untouched: [1]")


def test_a_full_disk_is_reported_and_keeps_earlier_steps(tmp_path):
    result = child(f"save_on_full_disk({str(tmp_path)!r}, 'limit')")
    check_full_disk_message(result, tmp_path / "checkpoints" / "2", "a limit on file sizes was hit")


def test_a_full_file_system_is_reported_and_keeps_earlier_steps(tmp_path):
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


@pytest.mark.slow
def test_two_processes_save_and_restore_one_state(tmp_path):
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
