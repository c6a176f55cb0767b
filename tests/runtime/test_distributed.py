"""Process detection, and the errors of real processes that cannot form one job."""

import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
from helpers.paths import ROOT

from starflow2_jax import config
from starflow2_jax.runtime import distributed
from starflow2_jax.runtime.rendezvous import ProcessInfo


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


# --------------------------------------------------------------------------------------- detection

EXPLICIT = {
    "JAX_COORDINATOR_ADDRESS": "box:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3",
}  # fmt: skip
SLURM = {
    "SLURM_JOB_ID": "4005", "SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
    "SLURM_STEP_NODELIST": "gpu[017-019,030],login1",
}  # fmt: skip


@pytest.mark.fast
def test_a_single_process_needs_no_variables():
    assert distributed.detect({}) is None
    assert distributed.detect({**EXPLICIT, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}) is None
    # An interactive step of one task in a job of four.
    assert distributed.detect({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}) is None
    distributed.init_distributed()
    distributed.assert_equal_across_processes("anything", {"a": 1})
    distributed.abort_all("nothing happens")


@pytest.mark.fast
def test_explicit_variables_identify_the_process():
    assert distributed.detect(EXPLICIT) == ProcessInfo("box:1234", 4, 3)
    devices = distributed.detect({**EXPLICIT, "JAX_LOCAL_DEVICE_IDS": "4,5"}).local_devices
    assert devices == (4, 5)


@pytest.mark.fast
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"JAX_PROCESS_ID": ""}, "JAX_NUM_PROCESSES set, but not JAX_PROCESS_ID"),
        ({"JAX_COORDINATOR_ADDRESS": ""}, "not JAX_COORDINATOR_ADDRESS"),
        ({"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID=4 is not below JAX_NUM_PROCESSES=4"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES='two' is not a whole number"),
        ({"JAX_COORDINATOR_ADDRESS": "box"}, "'box' is not HOST:PORT"),
        ({"JAX_LOCAL_DEVICE_IDS": "0-3"}, "'0-3' is not a list such as"),
    ],
)
def test_variables_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        distributed.detect({**EXPLICIT, **changes})


@pytest.mark.fast
def test_slurm_variables_identify_the_process():
    assert distributed.detect(SLURM) == ProcessInfo("gpu017:61005", 4, 2)
    nodes = {"node7": "node7", "a-1,b[1-2]": "a-1", "n[08,10-12]": "n08", "x[1-2],y": "x1"}
    for listed, first in nodes.items():
        info = distributed.detect({**SLURM, "SLURM_STEP_NODELIST": listed})
        assert info.coordinator == f"{first}:61005"
    info = distributed.detect({**SLURM, "JAX_COORDINATOR_ADDRESS": "ib0:5"})
    assert info == ProcessInfo("ib0:5", 4, 2)


@pytest.mark.fast
def test_a_batch_shell_without_srun_is_told_at_once():
    shell = {name: SLURM[name] for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID")}
    with pytest.raises(ValueError, match="SLURM_NTASKS=4, but srun did not start this process"):
        distributed.detect(shell)
    assert distributed.detect({**shell, "SLURM_NTASKS": "1"}) is None
    assert distributed.detect({**shell, **EXPLICIT}) == ProcessInfo("box:1234", 4, 3)


@pytest.mark.fast
@pytest.mark.parametrize(
    "tasks, local, visible, devices",
    [
        ("1(x4)", "0", "0,1,2,3,4,5,6,7", None),  # a task a node takes all of it
        ("8(x4)", "3", "0,1,2,3,4,5,6,7", (3,)),
        ("2(x4)", "1", "0,1,2,3,4,5,6,7", (4, 5, 6, 7)),
        ("8(x4)", "3", "3", None),  # --gpus-per-task: it sees its own only
        ("8(x4)", "3", "", None),
    ],
)
def test_slurm_tasks_share_the_devices_of_a_node(tasks, local, visible, devices):
    changes = {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_LOCALID": local}
    info = distributed.detect({**SLURM, **changes, "CUDA_VISIBLE_DEVICES": visible})
    assert info.local_devices == devices


@pytest.mark.fast
def test_code_fingerprint_follows_names_and_contents(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text("one")
    monkeypatch.setattr(distributed, "__file__", str(tmp_path / "runtime" / "distributed.py"))
    fingerprints = {distributed.code_fingerprint()}
    (tmp_path / "a.py").write_text("two")
    fingerprints.add(distributed.code_fingerprint())
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    fingerprints.add(distributed.code_fingerprint())
    (tmp_path / "notes.txt").write_text("no source")
    assert len(fingerprints) == 3 and distributed.code_fingerprint() in fingerprints


# --------------------------------------------------------------------------------- real processes

PROGRAM = """
import json, os, sys, time
import jax
from starflow2_jax.runtime import cli, distributed
check_equal = distributed.assert_equal_across_processes
index = int(os.environ["JAX_PROCESS_ID"])
patient = dict.fromkeys(("initialization", "heartbeat", "shutdown"), 200)
def main(words):
    timeout = int(os.environ.get("PROBE", 200))
    distributed.init_distributed({**patient, "rendezvous_timeout": timeout})
    BODY
sys.argv = ["x"]
cli.run(main)
"""


def run(body, processes=2, **environ):
    """Return (exit status, output) of each process that runs `body` after the rendezvous."""
    port, started = free_port(), []
    for i in range(processes):
        variables = {
            name: value[i] if isinstance(value, list) else value for name, value in environ.items()
        }
        environment = {
            **os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2",
            "JAX_PROCESS_ID": str(i), "JAX_NUM_PROCESSES": str(processes),
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "PYTHONPATH": str(ROOT), **variables,
        }  # fmt: skip
        command = [sys.executable, "-c", PROGRAM.replace("BODY", body)]
        # Not in the repository, which python -c would put before PYTHONPATH.
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": "/"}
        started.append(subprocess.Popen(command, env=environment, **pipes))
    results = [(process.communicate(timeout=300)[0], process.returncode) for process in started]
    return [(status, output) for output, status in results]


def test_processes_agree_and_end_well():
    body = """check_equal("the data", {"a": [1, 2]}); print(jax.device_count())"""
    (first, output), (second, other) = run(body)
    assert first == second == 0, output + other
    assert "Traceback" not in output + other
    lines = [line for line in output.splitlines() if "Gloo" not in line]
    assert lines[-1] == other.splitlines()[-1] == "4"
    table = [line.split() for line in lines[:3]]
    assert table[0] == ["process", "host", "pid", "devices"]
    assert [row[0] for row in table[1:]] == ["0", "1"]
    assert all(row[3:] == ["2", "x", "cpu", "(cpu)"] for row in table[1:])


@pytest.mark.fast
def test_an_unexpected_number_of_devices_is_refused():
    results = run("pass", JAX_NUM_CPU_DEVICES=["2", "3"], STARFLOW2_DEVICES_PER_PROCESS="2")
    for status, output in results:
        last = output.splitlines()[-1]
        assert status == 1 and last.startswith("error: process 1 (") and "sees 3 x cpu" in last
        assert last.endswith("but STARFLOW2_DEVICES_PER_PROCESS=2 are expected")


@pytest.mark.fast
def test_each_process_reports_the_difference():
    body = """check_equal("the data", {"eval": 1, "data": {"sha": index, "n": 2}})"""
    for status, output in run(body):
        last = output.splitlines()[-1]
        assert status == 1 and last.endswith("differ in the data: data.sha: 0 and 1")


@pytest.mark.parametrize("failing", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_failing_process_ends_the_job(failing):
    """The others wait in a barrier without end, as in a collective."""
    body = (
        f'index == {failing} and (_ for _ in ()).throw(ValueError("record 7 is bad"));'
        "time.sleep(600)"
    )
    start_time = time.time()
    results = run(body)
    assert time.time() - start_time < 200
    for process, (status, output) in enumerate(results):
        last_line = output.splitlines()[-1]
        assert status == 1, output
        if process == failing:
            assert last_line == "error: record 7 is bad"
        else:
            assert last_line.startswith(f"error: process {failing} (")
            assert last_line.endswith(" of 2 stopped: record 7 is bad")


def test_processes_with_different_code_are_refused(tmp_path):
    """Process 1 has a package of its own, with one more comment."""
    copy = tmp_path / "starflow2_jax"
    shutil.copytree(ROOT / "starflow2_jax", copy, ignore=shutil.ignore_patterns("__pycache__"))
    with open(copy / "params.py", "a") as file:
        file.write("# another version\n")
    for status, output in run("pass", PYTHONPATH=[str(ROOT), str(tmp_path)]):
        assert status == 1
        assert "differ in the code: sources: " in output.splitlines()[-1]


@pytest.mark.fast
def test_timeouts_are_the_documented_ones():
    assert list(distributed.TIMEOUTS.values()) == [45, 45, 20, 30]
    keys = {
        f"distributed.{name}": config.KEYS[f"distributed.{name}"].default
        for name in distributed.TIMEOUTS
    }
    assert keys == {f"distributed.{name}": value for name, value in distributed.TIMEOUTS.items()}
