"""The documentation site builds without a warning; this needs the extra `docs`."""

import subprocess
import sys

import pytest
from helpers.paths import ROOT

pytest.importorskip("furo", reason="needs the extra docs")


def test_the_site_builds_without_warnings(tmp_path):
    words = ["-W", "--keep-going", "-q", "-b", "html", ROOT / "docs", tmp_path / "site"]
    result = subprocess.run(
        [sys.executable, "-m", "sphinx", *map(str, words)], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    pages = {path.relative_to(tmp_path / "site").as_posix() for path in tmp_path.rglob("*.html")}
    sources = {path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")}
    assert {path.with_suffix(".html").as_posix() for path in sources} <= pages
