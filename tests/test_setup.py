"""Tests of the packaging metadata: an installation has every package and every model file."""

import ast
import re
import runpy
import shutil
import tomllib
from pathlib import Path

import pytest
import yaml
from helpers.paths import ROOT
from packaging.requirements import Requirement
from setuptools import Distribution
from setuptools.command.build_py import build_py

import starflow2_jax

pytestmark = pytest.mark.fast

PACKAGE = ROOT / "starflow2_jax"
METADATA = tomllib.loads((ROOT / "pyproject.toml").read_text())


def packed(root, patterns):
    """Return the data files that setuptools finds in the folder of the package."""
    command = build_py(Distribution({"package_data": patterns}))
    command.package_data, command.exclude_package_data = patterns, {}
    command.manifest_files = {}
    files = command.find_data_files("starflow2_jax", str(root / "starflow2_jax"))
    return {str(Path(path).relative_to(root / "starflow2_jax")) for path in files}


def test_model_folders_are_packed_with_all_that_is_in_them(tmp_path):
    shutil.copytree(
        PACKAGE, tmp_path / "starflow2_jax", ignore=shutil.ignore_patterns("__pycache__")
    )
    pretrained = tmp_path / "starflow2_jax" / "pretrained"
    for folder in ("vlm_tiny", "starflow2_tiny", "starflow2_tiny/vlm", "starflow2_tiny/fae"):
        (pretrained / folder).mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "model.safetensors", "sha256.json", "chat_template.jinja"):
            (pretrained / folder / name).touch()
    folders = (pretrained, pretrained.parent / "serving" / "page")
    paths = [path for folder in folders for path in folder.rglob("*")]
    files = {str(p.relative_to(pretrained.parent)) for p in paths if p.is_file()}
    patterns = METADATA["tool"]["setuptools"]["package-data"]
    assert len(files) >= 16 and files | {"py.typed"} == packed(tmp_path, patterns)
    assert packed(tmp_path, {"starflow2_jax": []}) == {"py.typed"}


def test_every_folder_with_modules_is_a_package_of_the_installation(monkeypatch):
    arguments = {}
    monkeypatch.setattr("setuptools.setup", arguments.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    files = [p.relative_to(ROOT) for name in ("starflow2_jax", "experiments")
             for p in (ROOT / name).rglob("*.py")]  # fmt: skip
    folders = {".".join(file.parent.parts) for file in files}
    expected = {re.sub("^experiments", "starflow2_jax.experiments", name) for name in folders}
    assert expected == set(arguments["packages"])
    assert arguments["package_dir"] == {"starflow2_jax.experiments": "experiments"}
    # An editable installation finds no package without this file.
    assert all((ROOT / folder.replace(".", "/") / "__init__.py").is_file() for folder in folders)


def test_the_version_is_a_literal_that_setuptools_reads_without_an_import():
    assert METADATA["tool"]["setuptools"]["dynamic"]["version"] == {
        "attr": "starflow2_jax.__version__"
    }
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    values = [ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)]
    assert values == [starflow2_jax.__version__]


def test_pre_commit_runs_a_ruff_within_the_bounds_of_the_tests():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (release,) = [repo["rev"] for repo in hooks if repo["repo"].endswith("/ruff-pre-commit")]
    bounds = [r for r in METADATA["project"]["optional-dependencies"]["test"] if "ruff" in r]
    assert Requirement(bounds[0]).specifier.contains(release.removeprefix("v"))


def test_the_citation_agrees_with_the_metadata():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["title"] == METADATA["project"]["name"]
    assert citation["license"] == METADATA["project"]["license"]
    assert citation["references"][0]["url"] == "https://arxiv.org/abs/2605.08029"
