"""The launchers' choice of interpreter and when they install, on an environment that is faked."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What `python -m pip`, `-m venv` and the version checks are asked for is written to a log.
FAKE = """#!/bin/bash
case "$*" in
  *version_info*3,\\ 11*) exit {too_old} ;;
  *ensurepip*) exit 0 ;;
  *%d.%d*) echo {version} ;;
  "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; echo "venv $3" >> {log} ;;
  "-m pip --version") exit 0 ;;
  "-m pip install"*) echo "install ${{*: -1}}" >> {log}; exit {pip_status} ;;
  -) sha256sum setup.py; echo {version} ;;
  *) echo "$0" ;;
esac
"""


@pytest.fixture
def call(tmp_path):
    """Runs `prepare_environment WORDS` in a folder whose path holds only fake interpreters."""
    (tmp_path / "setup.py").write_text("one\n")
    log = tmp_path / "log"
    path = tmp_path / "path"
    path.mkdir()
    for tool in ("cat", "sed", "mkdir", "cp", "sha256sum", "tr", "bash", "env"):
        found = subprocess.run(["which", tool], capture_output=True, text=True).stdout.strip()
        (path / tool).symlink_to(found)

    def python(name, *, version="3.11", too_old=0, pip_status=0):
        text = FAKE.format(version=version, too_old=too_old, pip_status=pip_status, log=log)
        (path / name).write_text(text)
        (path / name).chmod(0o755)

    def run(words, **variables):
        script = f'source "{ROOT}/launch/environment.sh"; set -eu; prepare_environment {words}'
        log.unlink(missing_ok=True)
        done = subprocess.run(
            [path / "bash", "-c", script],
            cwd=tmp_path,
            env={"PATH": str(path), **variables},
            capture_output=True,
            text=True,
        )
        return done, log.read_text().split("\n")[:-1] if log.exists() else []

    run.python, run.folder = python, tmp_path
    return run


def test_installs_once_and_again_where_setup_has_changed(call):
    call.python("python3")
    assert call("test")[1] == ["venv .venv", "install .[test]"]
    assert call("test")[1] == call("")[1] == []
    assert call("test parity")[1] == ["install .[parity]"]
    assert call("test parity")[1] == []
    (call.folder / "setup.py").write_text("two\n")
    assert call("")[1] == ["install ."]
    assert call("test")[1] == ["install .[test]"]


def test_a_failed_install_is_tried_again(call):
    call.python("python3", pip_status=1)
    done, log = call("test")
    assert done.returncode == 1 and "pip could not install" in done.stderr
    assert log == ["venv .venv", "install .[test]"]
    assert call("test")[1] == ["install .[test]"]


def test_takes_the_first_python_that_runs_and_is_new_enough(call):
    call.python("python3", too_old=1)
    (call.folder / "path" / "python3.12").write_text("#!/bin/bash\nexit 127\n")
    os.chmod(call.folder / "path" / "python3.12", 0o755)
    done, _ = call("")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "Python 3.11 or newer is needed" in done.stderr
    assert not (call.folder / ".venv").exists()
    call.python("python3.11")
    assert "path/python3.11" in call("")[0].stdout


def test_another_python_than_that_of_the_environment_is_refused(call):
    call.python("python3")
    call.python("python3.12", version="3.12")
    call("")
    done, log = call("", PYTHON="python3.12")
    assert done.returncode == 1 and log == []
    assert ".venv has Python 3.11, PYTHON=python3.12 is 3.12" in done.stderr
    assert call("", PYTHON="python3.12", VENV=".venv312")[1] == ["venv .venv312", "install ."]
    done, _ = call("", PYTHON="python9")
    assert done.returncode == 1 and "PYTHON=python9 does not run" in done.stderr


@pytest.mark.parametrize("words", [["--pairty"], ["slow"]])
def test_an_unknown_argument_is_named(words):
    done = subprocess.run(
        ["bash", ROOT / "launch/test.sh", *words], capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 1 and f"unknown argument {words[0]}" in done.stderr
