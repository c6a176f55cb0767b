"""The launchers' choice of interpreter and when they install, on an environment that is faked."""

import os
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.paths import ROOT

# What `python -m pip`, `-m venv` and the version checks are asked for is written to a log.
FAKE = """#!/bin/bash
case "$*" in
  *version_info*3,\\ 11*) exit {too_old} ;;
  *ensurepip*) exit 0 ;;
  *%d.%d*) echo {version} ;;
  "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; echo "venv $3" >> {log} ;;
  "-m pip --version") exit 0 ;;
  "-m pip install"*) echo "install ${{*: -1}}" >> {log}; exit {pip_status} ;;
  -) sha256sum pyproject.toml setup.py; echo {version} ;;
  *) echo "$0" ;;
esac
"""


@pytest.fixture
def call(tmp_path):
    """Run `prepare_environment WORDS` in a folder that has only fake interpreters on its path."""
    for name in ("pyproject.toml", "setup.py"):
        (tmp_path / name).write_text("one\n")
    log = tmp_path / "log"
    path = tmp_path / "path"
    path.mkdir()
    for tool in ("cat", "sed", "mkdir", "cp", "sha256sum", "tr", "bash", "env"):
        executable = subprocess.run(["which", tool], capture_output=True, text=True).stdout.strip()
        (path / tool).symlink_to(executable)

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


@pytest.mark.parametrize("name", ["pyproject.toml", "setup.py"])
def test_installs_once_and_again_after_the_metadata_changed(call, name):
    call.python("python3")
    assert call("test")[1] == ["venv .venv", "install .[test]"]
    assert call("test")[1] == call("")[1] == []
    assert call("test parity")[1] == ["install .[parity]"]
    assert call("test parity")[1] == []
    (call.folder / name).write_text("two\n")
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


# ------------------------------------------------------------------------------ data and the demo

# Says where and with what it was called; `-` is one of the launchers' own programs.
LOGGING = """#!/bin/bash
case "$*" in
  *version_info* | "-m pip"*) exit 0 ;;
  -*" "* ) [ "$1" = - ] && exit {unfinished}; echo "$PWD $*" >> {log} ;;
  -) echo key ;;
esac
"""


def logging_python(folder, unfinished=0):
    """Return a fake interpreter in a virtual environment, and its log."""
    (folder / "venv" / "bin").mkdir(parents=True)
    python, log = folder / "venv" / "bin" / "python", folder / "log"
    python.write_text(LOGGING.format(log=log, unfinished=unfinished))
    python.chmod(0o755)
    return python, log


def folders_of(variant="tiny"):
    """Return the path of every dataset that the stages name."""
    folders = set()
    for name in ("stage1_t2i", "stage2_i2t", "stage3_joint"):
        cfg = runpy.run_path(str(ROOT / "experiments" / f"{name}.py"))["get_config"](variant)
        for group in (cfg.data, cfg.eval_data):
            entries = group.mixture or (group,)
            folders |= {entry["path"] for entry in entries}
            folders |= {entry["latents"] for entry in entries}
    return folders


def test_the_tiny_data_are_those_that_the_stages_name(tmp_path):
    python, log = logging_python(tmp_path)
    counts = {}
    for words in ([], ["4"]):
        subprocess.run(
            ["bash", ROOT / "launch/data_tiny.sh", *words],
            cwd=tmp_path, env={**os.environ, "PYTHON": str(python)}, check=True,
        )  # fmt: skip
        calls = [line.split() for line in log.read_text().splitlines()]
        log.unlink()
        balanced = {c[c.index("--out") + 1] for c in calls if "--balance_answers" in c}
        assert balanced == {f"data_cache/reasoning64{end}" for end in ("", "_test")}
        calls = [[word for word in call if word != "--balance_answers"] for call in calls]
        flags = [dict(zip(call[4::2], call[5::2])) for call in calls]
        assert [call[1:4] for call in calls] == [
            ["-m", "starflow2_jax.prepare", verb]
            for verb in ("import", "latents")
            for _ in range(12)
        ]
        encoded = {flag["--out"]: flag["--data"] for flag in flags[12:]}
        assert all(name == f"{data}_latents" for name, data in encoded.items())
        assert all(flag["--fae"] == "pretrained/fae_tiny" for flag in flags[12:])
        counts[len(words)] = {flag["--out"]: flag for flag in flags[:12]}
        assert set(encoded.values()) == set(counts[len(words)])
        assert {*counts[len(words)], *encoded} == folders_of()
    for name, flag in counts[0].items():
        # Never the same pictures to learn from and to be measured with.
        share = 1 if name.endswith("_test") else 4
        assert int(flag["--n"]) == share * int(counts[1][name]["--n"])
        assert flag["--pixels"] == "64" and flag["--withheld"] == "leave_out"
    assert len({flag["--seed"] for flag in counts[0].values()}) == len(counts[0])


def test_the_small_world_shows_single_objects_in_captions_and_reasoning(tmp_path):
    python, log = logging_python(tmp_path)
    command = ["bash", ROOT / "launch/data_tiny.sh", "4", "single"]
    env = {**os.environ, "PYTHON": str(python), "FAE": ""}
    subprocess.run(command, cwd=tmp_path, env=env, check=True)
    lines = log.read_text().splitlines()
    single = [line.split("--out ")[1].split()[0] for line in lines if "--tags" in line]
    folders = [
        f"data_cache/{name}64{end}" for name in ("t2i", "reasoning") for end in ("", "_test")
    ]
    assert sorted(single) == sorted(folders) and len(lines) == 12
    assert all("single_object,colors" in line for line in lines if "--tags" in line)
    command[-1] = "large"
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "expected all or single, got large" in done.stderr


def test_too_few_data_is_a_clear_error(tmp_path):
    for word in ("0", "half", "-1"):
        done = subprocess.run(
            ["bash", ROOT / "launch/data_tiny.sh", word],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1 and f"expected a whole number, got {word}" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_data_of_the_codec_are_read_from_the_tars_that_exist(tmp_path):
    python, log = logging_python(tmp_path)
    tars = tmp_path / "my tars"
    tars.mkdir()

    def imports(*words):
        done = subprocess.run(
            ["bash", ROOT / "launch/data_wide.sh", tars, *words],
            cwd=tmp_path, env={**os.environ, "PYTHON": str(python)}, check=True,
            capture_output=True, text=True,
        )  # fmt: skip
        calls = [line.split(" --")[1:] for line in log.read_text().splitlines()]
        log.unlink()
        flags = [dict(word.split(" ", 1) for word in call) for call in calls]
        return {flag["out"]: flag for flag in flags}, done.stderr

    without, warning = imports()
    names = [
        f"data_cache/{name}64{end}" for name in ("procedural", "shapes") for end in ("", "_test")
    ]
    assert sorted(without) == names
    assert f"there is no {tars}/cifar10_test.tar, so data_cache/cifar64_test is left out" in warning
    for name in ("twemoji_train", "twemoji_test", "cifar10_train", "cifar10_test"):
        (tars / f"{name}.tar").touch()
    complete, warning = imports()
    divided, _ = imports("4")
    assert len(complete) == 10 and not warning and complete.items() >= without.items()
    for name, flag in complete.items():
        share = 1 if name.endswith("_test") else 4
        assert int(flag["n"]) // share == int(divided[name]["n"])
        assert flag["pixels"] == "64"
    seeds = [flag["seed"] for flag in without.values()]
    assert len(set(seeds)) == len(seeds)
    emoji = complete["data_cache/emoji64"]
    assert emoji["source"] == f"{tars}/twemoji_train.tar"
    assert emoji["background"] == "white,random,random"
    assert complete["data_cache/emoji64_test"]["background"] == "white"


PREPARE_IMPORT = ["starflow2_jax.prepare", "import"]


@pytest.fixture
def demo(tmp_path):
    """Return a function that runs a copy of the demo with an interpreter that only logs."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")

    def run(*words, unfinished=0, **variables):
        shutil.rmtree(tmp_path / "venv", ignore_errors=True)
        log = logging_python(tmp_path, unfinished)[1]
        log.unlink(missing_ok=True)
        done = subprocess.run(
            ["bash", tmp_path / "launch/demo.sh", *words], capture_output=True, text=True, cwd="/",
            # PYTHON would be compared with the interpreter of VENV, a script without a version.
            env={**os.environ, "VENV": str(tmp_path / "venv"), "PYTHON": "", **variables},
        )  # fmt: skip
        return done, log.read_text().splitlines() if log.exists() else []

    run.folder = tmp_path / "runs" / "demo"
    return run


def test_the_demo_runs_its_parts_in_order(demo):
    done, calls = demo()
    assert done.returncode == 0, done.stderr
    assert {call.split()[0] for call in calls} == {str(demo.folder)}
    words = [call.split()[2:] for call in calls]
    assert [call[0].removeprefix("starflow2_jax.") for call in words] == [
        "evaluate", *["prepare"] * 24, *["train"] * 3, *["evaluate"] * 2,
    ]  # fmt: skip
    trained = [(Path(call[2]).name, call[4]) for call in words if call[0].endswith("train")]
    assert trained == [
        ("stage1_t2i.py:tiny", "runs/stage1"), ("stage2_i2t.py:tiny", "runs/stage2"),
        ("stage3_joint.py:tiny", "runs/stage3"),
    ]  # fmt: skip
    for (name, _), (_, before) in zip(trained[1:], trained):
        path = ROOT / "experiments" / name.split(":")[0]
        assert runpy.run_path(str(path))["get_config"]().init["from"] == before
    assert [call[1] for call in (words[0], *words[-2:])] == ["showcase", "all", "report"]
    assert words[0][2:] == [
        "--model",
        "pretrained/starflow2_tiny",
        "--out",
        "examples",
        "--overwrite",
    ]
    datasets = words[-2][words[-2].index("--data") + 1].split(",")
    imported = {call[call.index("--out") + 1] for call in words if call[:2] == PREPARE_IMPORT}
    assert set(datasets) < imported and all(name.endswith("64_test") for name in datasets)
    note = " ".join(words[-2])
    assert "320, 80 and 200 steps" in note and "captions and reasoning show one object" in note
    for name in (
        "install",
        "shipped model",
        "data",
        "stage 1",
        "evaluation",
        "all but the install",
    ):
        assert name in done.stdout.split("\nTimes\n")[1]


def test_the_steps_of_the_demo_can_be_chosen(demo):
    done, calls = demo(STEPS="3 2 1")
    steps = [word for call in calls for word in call.split() if "train.steps" in word]
    assert done.returncode == 0 and steps == [f"--config.train.steps={n}" for n in (3, 2, 1)]
    done, calls = demo(STEPS="3")
    assert done.returncode == 1 and "STEPS=3: expected three numbers" in done.stderr and not calls


def test_the_demo_stops_where_training_did_and_takes_no_words(demo):
    done, calls = demo(unfinished=1)
    assert done.returncode == 1 and len(calls) == 26
    assert "training was stopped before its end; the same command resumes it" in done.stderr
    done, calls = demo("--fast")
    assert done.returncode == 1 and "takes no arguments; got --fast" in done.stderr and not calls
