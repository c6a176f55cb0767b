"""Tests of the command line: the list of commands, and experiments by their names."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import ROOT

from starflow2_jax import __main__, __version__, convert
from starflow2_jax.runtime import cli


def run(*words, code=None, cwd=ROOT):
    """Run `python -m WORDS`, or a program text with WORDS as its arguments."""
    return subprocess.run(
        [sys.executable, *(("-c", code) if code else ("-m",)), *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )


def test_the_commands_are_listed_with_one_line_each_and_without_importing_jax():
    code = (
        "import sys\nfrom starflow2_jax.__main__ import main\nmain()\n"
        "print(sorted({'jax', 'numpy', 'absl'} & set(sys.modules)))"
    )
    for words in ([], ["--help"], ["help"]):
        result = run(*words, code=code)
        assert result.returncode == 0, result.stderr
        *lines, imported = result.stdout.splitlines()
        assert imported == "[]"
        names = [line.split()[0] for line in lines if line.startswith("  ")]
        assert names == list(__main__.COMMANDS)
    files = (ROOT / "starflow2_jax").glob("*.py")
    modules = {file.stem for file in files if "\nif __name__ ==" in file.read_text()}
    assert modules == {"__main__", *names}


def test_a_command_by_its_name_is_its_module():
    expected = run("starflow2_jax.convert", "lst")
    actual = run("starflow2_jax", "convert", "lst")
    assert "unknown verb 'lst'; did you mean 'list'" in expected.stderr
    assert convert.__doc__.splitlines()[0] in expected.stderr
    assert actual.stdout == expected.stdout and actual.stderr == expected.stderr
    assert actual.returncode == expected.returncode == 1


def test_the_version_and_an_unknown_command(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["starflow2", "--version"])
    __main__.main()
    assert capsys.readouterr().out == f"{__version__}\n"
    monkeypatch.setattr(sys, "argv", ["starflow2", "trian"])
    with pytest.raises(SystemExit, match="unknown command 'trian'; did you mean 'train'"):
        __main__.main()


# ------------------------------------------------------------------------------------- experiments


def test_experiments_of_the_package_are_found_by_name():
    for name in ("stage1_t2i", "ablations/rows"):
        path, _, variant = cli.experiment_path(f"starflow2:{name}:a:b").partition(":")
        assert Path(path) == ROOT / "experiments" / f"{name}.py" and variant == "a:b"
    cfg = runpy.run_path(cli.experiment_path("starflow2:tarflow_pixels"))["get_config"]("tiny")
    assert cfg.name == "tarflow_pixels_tiny"
    for value in ("experiments/tarflow_pixels.py:tiny", "x.py", "runs/starflow2:x"):
        assert cli.experiment_path(value) == value


def test_experiments_are_named_with_the_flag_config_alone():
    path = str(ROOT / "experiments" / "finetune.py")
    argv = ["train", "--config", "starflow2:finetune:a", "--config=starflow2:finetune", "--workdir",
            "starflow2:finetune", "--config.name=starflow2:finetune"]  # fmt: skip
    expected = [*argv[:2], f"{path}:a", f"--config={path}", *argv[4:]]
    assert cli.locate_experiments(argv) == expected


def test_an_unknown_experiment_is_one_line_that_lists_the_others(tmp_path):
    result = run("starflow2_jax", "train", "--config", "starflow2:stage1:tiny", cwd=tmp_path)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    message = "error: --config: the package has no experiment 'stage1'; did you mean"
    assert result.stderr.startswith(message)
    for experiment in ("ablations/rows", "finetune", "stage1_t2i", "stage3_joint"):
        assert experiment in result.stderr
    assert "table" not in result.stderr
