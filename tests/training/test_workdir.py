"""Workdirs whose checkpoints could not be written, or not be read again, are refused first."""

import os

import pytest
from etils import epath

from starflow2_jax.training import workdir

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("name", ["a[1]", "[2024] project/a", "a]", "a*", "a?b"])
def test_a_path_that_is_a_pattern_is_refused(tmp_path, name, monkeypatch):
    for path in (tmp_path / name, f"gs://bucket/{name}"):
        with pytest.raises(ValueError, match=r"--workdir .* taken for a pattern"):
            workdir.check_path(epath.Path(path))
    folder = tmp_path / name
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match="taken for a pattern"):
        workdir.check_path(epath.Path("runs/a"))


def test_a_path_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    for name in ("a {1} #%20:'=,\u00fc", "a/b/c"):
        workdir.check_path(epath.Path(tmp_path / name))
    (tmp_path / "file").write_text("")
    for name in ("file", "file/runs"):
        with pytest.raises(ValueError, match="file is a file, expected a folder"):
            workdir.check_path(epath.Path(tmp_path / name))
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(ValueError, match="link is a link to nothing"):
        workdir.check_path(epath.Path(tmp_path / "link"))
    # The user of a test may be root, who can write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="cannot be written"):
        workdir.check_path(epath.Path(tmp_path / "a"))
