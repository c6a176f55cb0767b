"""The Dockerfile copies all that an installation needs, and its commands do what they should.

No image is built here.
"""

import fnmatch
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import PurePosixPath

import pytest
from helpers.paths import ROOT
from packaging.requirements import Requirement

import starflow2_jax

DOCKERFILE = ROOT / "Dockerfile"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions():
    """Return (instruction, arguments) of every line of the Dockerfile, continued ones joined."""
    text = DOCKERFILE.read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines()]
    return [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]


def copied(stage=None):
    """Return (sources, target) of every COPY from the repository, in one stage or in all."""
    stages = itertools.accumulate(name == "FROM" for name, _ in instructions())
    rows = [
        shlex.split(rest)
        for number, (name, rest) in zip(stages, instructions())
        if name == "COPY" and stage in (None, number)
    ]
    return [(row[:-1], row[-1]) for row in rows if not row[0].startswith("--from")]


def run_lines():
    return [rest for name, rest in instructions() if name == "RUN"]


def is_ignored(path):
    """Return True if .dockerignore leaves a path out of the build."""
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.lstrip("!")
        if not line or line.startswith("#"):
            continue
        parents = [
            path,
            *(p.as_posix() for p in PurePosixPath(path).parents if p.as_posix() != "."),
        ]
        names = [p.rsplit("/", 1)[-1] for p in parents]
        candidates = names if pattern.startswith("**/") else parents
        if any(fnmatch.fnmatch(name, pattern.removeprefix("**/")) for name in candidates):
            ignored = not line.startswith("!")
    return ignored


def requirements(*arguments):
    line = next(line for line in run_lines() if "requirements.py" in line).split(">")[0]
    words = shlex.split(line.replace('"${EXTRAS}"', shlex.join(arguments) or "''"))
    assert words[:2] == ["python", "launch/requirements.py"]
    return subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True)


def test_what_is_copied_exists_and_is_not_ignored():
    sources = [source for names, _ in copied() for source in names]
    assert {
        "pyproject.toml",
        "setup.py",
        "README.md",
        "LICENSE",
        "starflow2_jax",
        "experiments",
    } <= {*sources}
    for source in sources:
        assert (ROOT / source).exists() and not is_ignored(source), source
    for path in (".git/config", "runs/a", "tests/conftest.py", "starflow2_jax/__pycache__/a.pyc"):
        assert is_ignored(path), path
    assert not is_ignored("starflow2_jax/pretrained/fae_tiny/model.safetensors")


def test_the_requirements_are_those_of_the_package_and_its_extras():
    lines = requirements().stdout.splitlines()
    assert lines == PROJECT["dependencies"] and all(Requirement(line) for line in lines)
    assert requirements("cuda").stdout.splitlines() == [*lines, "jax[cuda13]"]
    nested = requirements("dev,torch").stdout
    assert "pytest" in nested and "pre-commit" in nested and "starflow2_jax[" not in nested
    unknown = requirements("gpu")
    assert unknown.returncode == 1 and "there is no extra 'gpu'" in unknown.stderr


def test_names_agree():
    arguments = dict(re.findall(r"^ARG (\w+)=(\S*)", DOCKERFILE.read_text(), re.M))
    assert f"Python :: {arguments['PYTHON']}" in " ".join(PROJECT["classifiers"])
    (entry,) = [json.loads(rest) for name, rest in instructions() if name == "ENTRYPOINT"]
    assert entry[0] in PROJECT["scripts"]
    users = [rest for name, rest in instructions() if name == "USER"]
    assert users == ["1000"], "the container must not run as root"


@pytest.mark.slow
def test_the_copied_files_install(tmp_path):
    """Run the last installation of the Dockerfile on just the files that it copies."""
    source, target = tmp_path / "src", tmp_path / "target"
    for names, place in copied(stage=1):
        for name in names:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, source / place, dirs_exist_ok=True)
            else:
                (source / place).mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, source / place)
    (line,) = [line for line in run_lines() if line.endswith("--no-deps .")]
    words = [sys.executable, "-m", *shlex.split(line), "--no-build-isolation"]
    done = subprocess.run(
        [*words, "--target", str(target)], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    package = target / "starflow2_jax"
    for name in ("pretrained/starflow2_tiny/model.safetensors", "experiments/finetune.py"):
        assert (package / name).is_file(), name
    version = subprocess.run(
        [sys.executable, "-m", "starflow2_jax", "--version"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
    )
    assert version.stdout.strip() == starflow2_jax.__version__
