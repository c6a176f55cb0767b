"""What an installation brings: the model folders that ship, with all that lies in them."""

import shutil
from pathlib import Path

from setuptools import Distribution
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "starflow2_jax"


def packed(root, patterns):
    """The data files that setuptools finds for the package, from its folder."""
    command = build_py(Distribution({"package_data": patterns}))
    command.package_data, command.exclude_package_data = patterns, {}
    command.manifest_files = {}
    found = command.find_data_files("starflow2_jax", str(root / "starflow2_jax"))
    return {str(Path(path).relative_to(root / "starflow2_jax")) for path in found}


def patterns(monkeypatch):
    """`package_data` as setup.py gives it."""
    given = {}
    monkeypatch.setattr("setuptools.setup", given.update)
    exec(compile((ROOT / "setup.py").read_text(), "setup.py", "exec"),
         {"__file__": str(ROOT / "setup.py")})  # fmt: skip
    return given["package_data"]


def test_model_folders_are_packed_with_all_that_is_in_them(tmp_path, monkeypatch):
    shutil.copytree(
        PACKAGE, tmp_path / "starflow2_jax", ignore=shutil.ignore_patterns("__pycache__")
    )
    shipped = tmp_path / "starflow2_jax" / "pretrained"
    for folder in ("vlm_tiny", "starflow2_tiny", "starflow2_tiny/vlm", "starflow2_tiny/fae"):
        (shipped / folder).mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "model.safetensors", "sha256.json", "chat_template.jinja"):
            (shipped / folder / name).touch()
    files = {str(p.relative_to(shipped.parent)) for p in shipped.rglob("*") if p.is_file()}
    given = patterns(monkeypatch)
    assert len(files) >= 16 and files == packed(tmp_path, given)
    assert not packed(tmp_path, {"starflow2_jax": []})
