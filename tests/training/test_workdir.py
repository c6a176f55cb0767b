"""Workdirs whose checkpoints could not be written, or not be read again, are refused first."""

import dataclasses
import os

import pytest
from etils import epath

from starflow2_jax import config
from starflow2_jax.training import workdir
from starflow2_jax.training.logging import run_log

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


def test_addresses_are_pinned_and_a_run_keeps_its_commits(tmp_path, monkeypatch):
    commits = {"hf://user/a": "1" * 40, "hf://user/b@v1": "2" * 40}

    def pin(path):
        address = workdir.hub.parse(path)
        commit = commits.get(path, address.revision)
        return str(dataclasses.replace(address, revision=commit))

    monkeypatch.setattr(workdir.hub, "pin", pin)
    cfg = config.default()
    cfg.vlm.path, cfg.init["from"], cfg.fae.path = "hf://user/a", "hf://user/b@v1", "pretrained/c"
    pinned = workdir.pin_models(cfg, None)
    expected = {**config.flat(config.to_dict(cfg))}
    expected |= {"vlm.path": f"hf://user/a@{'1' * 40}", "init.from": f"hf://user/b@{'2' * 40}"}
    assert config.flat(pinned) == expected
    run_log.save_config(tmp_path, pinned)
    # The Hub has newer commits, which the run does not take.
    commits |= {"hf://user/a": "3" * 40, "hf://user/b@v1": "4" * 40}
    assert workdir.pin_models(cfg, tmp_path) == pinned
    assert workdir.pin_models(pinned, tmp_path) == pinned
    assert workdir.pin_models(cfg, tmp_path / "new")["vlm"]["path"] == f"hf://user/a@{'3' * 40}"
    # Another repository or commit is what the command says.
    cfg.vlm.path = f"hf://user/a@{'5' * 40}"
    assert workdir.pin_models(cfg, tmp_path)["vlm"]["path"] == cfg.vlm.path
    keys = set(config.KEYS)
    assert set(workdir.MODEL_PATH_KEYS) <= keys
