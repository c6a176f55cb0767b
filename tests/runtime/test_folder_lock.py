"""A folder has one writer, whose lock ends with it, and children end with their parent."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from etils import epath
from helpers import object_store
from helpers.paths import ROOT, TESTS

from starflow2_jax.runtime import child_process, folder_lock

pytestmark = pytest.mark.fast

OWNER = """
import sys, time
from starflow2_jax.runtime import folder_lock
if sys.argv[1].startswith("gs://"):
    from helpers import object_store
    object_store.register()
    folder_lock.RENEWAL = 0.5
with folder_lock.lock(sys.argv[1], "trains"):
    print("locked", flush=True)
    time.sleep(60)
"""
# Starts a child that follows it, prints its number, and waits.
PARENT = """
import sys
from starflow2_jax.runtime import child_process
child = "import os, sys, time; from starflow2_jax.runtime import child_process as c; "
child += "c.end_with_parent(); print(os.getpid(), c.PARENT in os.environ, flush=True); "
child += "time.sleep(60)"
with open(sys.argv[1], "w") as output:
    print(child_process.run([sys.executable, "-c", child], output), flush=True)
"""


def start(code, *args):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}"}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """An object store, in which a lease is renewed often."""
    (tmp_path / "objects").mkdir()
    monkeypatch.setenv("OBJECT_STORE", str(tmp_path / "objects"))
    object_store.register()
    monkeypatch.setattr(folder_lock, "RENEWAL", 0.5)
    return epath.Path("gs://bucket")


@pytest.fixture(params=["file", "lease"])
def workdir(request, tmp_path):
    if request.param == "file":
        return epath.Path(tmp_path / "w")
    return request.getfixturevalue("bucket") / "w"


def test_a_second_process_is_refused_until_the_first_has_ended(workdir, tmp_path):
    owner = start(OWNER, workdir)
    assert owner.stdout.readline() == "locked\n"
    expected = rf"/w: another process trains here \(process {owner.pid} on \S+\); end it first"
    with (
        pytest.raises(folder_lock.LockedError, match=expected),
        folder_lock.lock(workdir, "trains"),
    ):
        pass
    owner.kill()
    owner.wait()
    assert (workdir / ".lock").exists()
    with folder_lock.lock(workdir, "trains"):
        assert json.loads((workdir / ".lock").read_text())["pid"] == os.getpid()
        with (
            pytest.raises(folder_lock.LockedError, match=f"process {os.getpid()} on"),
            folder_lock.lock(workdir, "trains"),
        ):
            pass
    assert not (workdir / ".lock").exists()
    with folder_lock.lock(tmp_path / "new", "trains"):
        pass
    assert not (tmp_path / "new").exists()


def test_a_lease_of_another_host_is_taken_over_once_it_is_not_renewed(bucket, monkeypatch):
    monkeypatch.setattr(folder_lock, "EXPIRY", 0.5)
    for text in (json.dumps({"pid": 1, "host": "elsewhere", "id": "x", "count": 7}), "no JSON"):
        (bucket / "w" / ".lock").write_text(text)
        start_time = time.monotonic()
        with folder_lock.lock(bucket / "w", "trains"):
            assert time.monotonic() - start_time > 0.4
            wait_for(lambda: json.loads((bucket / "w" / ".lock").read_text())["count"] > 0)


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid):
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_ends_with_its_parent(tmp_path, number):
    parent = start(PARENT, tmp_path / "log")
    wait_for(lambda: (tmp_path / "log").exists() and (tmp_path / "log").read_text().endswith("\n"))
    child, has_variable = (tmp_path / "log").read_text().split()
    assert is_running(child) and has_variable == "False"
    parent.send_signal(number)
    assert parent.wait(60) == (128 + number if number == signal.SIGTERM else -number)
    wait_for(lambda: not is_running(child))


def test_a_child_of_a_parent_that_has_ended_is_killed(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    code = "import time; from starflow2_jax.runtime import child_process as c; "
    code += "c.end_with_parent(); time.sleep(60)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), child_process.PARENT: str(ended.pid)}
    child = subprocess.run([sys.executable, "-c", code], env=environment, timeout=60)
    assert child.returncode == -signal.SIGKILL
