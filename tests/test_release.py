"""Tests of a release: it builds, and its wheel works in an environment outside the repository.

They need the extra `release`; `bash launch/test.sh --release` installs it.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers.paths import ROOT
from PIL import Image

from starflow2_jax import __main__, __version__

pytest.importorskip("twine", reason="needs the extra release")

SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "starflow2_jax", "experiments",
           "tests")  # fmt: skip

# Loads every experiment by its name, and prints where the package lies.
LOAD_EXPERIMENTS = """
import runpy, sys
from starflow2_jax.runtime import cli
for name in sys.argv[1:]:
    path = cli.experiment_path(f"starflow2:{name}")
    assert runpy.run_path(path)["get_config"]().name, path
import starflow2_jax.experiments.ablations.run
print(cli.__file__)
"""


def run(*words, cwd, **variables):
    """Run a command that must succeed, without the repository on its path; return its output."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    result = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env={**environment, "JAX_PLATFORMS": "cpu", **variables},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Build the source archive, and from it the wheel; return their folder."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, source)
    options = ("--no-isolation", "--outdir", folder)
    run(sys.executable, "-m", "build", *options, source, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(dist):
    return dist / f"starflow2_jax-{__version__}-py3-none-any.whl"


@pytest.fixture(scope="module")
def bin_folder(wheel, tmp_path_factory):
    """Install the wheel into a new environment, which takes its dependencies from this one."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--no-index", "--no-deps", wheel, cwd=environment)
    paths = {"base": environment, "platbase": environment}
    packages = Path(sysconfig.get_path("purelib", "venv", paths))
    # This does not add the editable installation of the repository: Python follows no .pth file
    # from a folder that another .pth file names.
    dependencies = [path for path in sys.path if Path(path).name.endswith("-packages")]
    packages.joinpath("dependencies.pth").write_text("\n".join(dependencies) + "\n")
    return environment / "bin"


def test_the_public_modules_pass_pyright():
    run(sys.executable, "-m", "pyright", "--pythonpath", sys.executable, cwd=ROOT)


def test_the_archives_pass_twine_check(dist, wheel):
    archives = sorted(dist.iterdir())
    assert archives == [wheel, dist / f"starflow2_jax-{__version__}.tar.gz"]
    output = run(sys.executable, "-m", "twine", "check", "--strict", *archives, cwd=dist)
    assert output.count("PASSED") == 2


def test_the_wheel_has_the_package_its_models_and_experiments_and_nothing_else(wheel):
    names = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    expected = {Path("starflow2_jax", folder, path.relative_to(ROOT / source))
                for source, folder in (("starflow2_jax", ""), ("experiments", "experiments"))
                for path in (ROOT / source).rglob("*")
                if path.is_file() and path.suffix != ".pyc"}  # fmt: skip
    assert {name for name in names if name.parts[0] == "starflow2_jax"} == expected
    assert {name.parts[0] for name in names} == {
        "starflow2_jax", f"starflow2_jax-{__version__}.dist-info"
    }  # fmt: skip
    for name in ("py.typed", "pretrained/README.md", "pretrained/starflow2_tiny/sha256.json",
                 "experiments/ablations/rows.py"):  # fmt: skip
        assert Path("starflow2_jax", name) in names


def test_an_installed_wheel_lists_its_commands_and_loads_its_experiments(bin_folder, tmp_path):
    for command in ([bin_folder / "starflow2"], [bin_folder / "python", "-m", "starflow2_jax"]):
        output = run(*command, cwd=tmp_path)
        assert all(f"\n  {name} " in output for name in __main__.COMMANDS)
    names = [path.stem for path in (ROOT / "experiments").glob("[a-z]*.py")] + ["ablations/rows"]
    output = run(bin_folder / "python", "-c", LOAD_EXPERIMENTS, *names, cwd=tmp_path)
    assert Path(output.strip()).is_relative_to(bin_folder.parent)


def test_an_installed_wheel_draws_an_image(bin_folder, tmp_path):
    words = ("generate", "--prompt", "a red circle", "--n", "1", "--out", tmp_path / "out")
    run(bin_folder / "starflow2", *words, cwd=tmp_path)
    (path,) = (tmp_path / "out").rglob("*.png")
    image = np.asarray(Image.open(path))
    assert image.shape == (64, 64, 3) and image.std() > 10
