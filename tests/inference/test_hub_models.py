"""A STARFlow2 on the Hugging Face Hub is loaded, fine-tuned and re-exported by its address."""

import json
import runpy
import subprocess
import sys

import pytest
from helpers import fake_hub
from helpers.checkpoint_states import flip
from helpers.paths import ROOT

from starflow2_jax import convert
from starflow2_jax.checkpoints import hub, model_folder
from starflow2_jax.evaluation import result_files
from starflow2_jax.inference import load
from starflow2_jax.latents import codec


@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory):
    """A model folder that holds everything."""
    path = tmp_path_factory.mktemp("model") / "starflow2"
    load.export(parts[1], str(path))
    return path


@pytest.fixture
def server(folder, tmp_path, monkeypatch):
    hub.pull.cache_clear(), model_folder._pull.cache_clear()
    with fake_hub.serve() as hub_server:
        hub_server.add_folder("user/model", folder)
        fake_hub.use(hub_server, tmp_path / "cache", monkeypatch)
        yield hub_server
    hub.pull.cache_clear(), model_folder._pull.cache_clear()


def test_a_model_is_loaded_and_names_its_commit(server, folder, tmp_path):
    address = "hf://user/model"
    model, pinned = load.load(address), hub.pin(address)
    assert pinned == f"{address}@{server.repos['user/model'].branches['main']}"
    assert model.source == pinned and model.codec is not None
    assert model.cfg["vlm"]["path"] == f"{pinned}/vlm"
    assert model.cfg["fae"]["path"] == f"{pinned}/fae"
    described = result_files.describe_model(address)
    assert described == {**result_files.describe_model(str(folder)), "path": pinned}
    assert codec.open_encoder(f"{address}/fae")[1]["path"] == f"{pinned}/fae"
    # Codec and VLM of the Hub may be those of a local model.
    local = load.load(str(folder), vlm=f"{address}/vlm", fae=f"{address}/fae")
    assert local.cfg["fae"]["path"] == f"{address}/fae"
    # An export without its parts names them by their commit.
    load.export(address, str(tmp_path / "out"), embed=False)
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert stored["vlm"]["path"] == f"{pinned}/vlm" and stored["parts"] == []
    assert load.load(str(tmp_path / "out")).cfg["fae"]["path"] == f"{pinned}/fae"


def test_an_experiment_starts_from_an_address(server):
    get_config = runpy.run_path(str(ROOT / "experiments" / "finetune.py"))["get_config"]
    cfg, pinned = get_config("hf://user/model"), hub.pin("hf://user/model")
    assert cfg.init["from"] == "hf://user/model"
    assert (cfg.vlm.path, cfg.fae.path) == (f"{pinned}/vlm", f"{pinned}/fae")


def test_parts_outside_of_the_folder_are_not_pushed(parts, tmp_path):
    load.export(parts[1], str(tmp_path / "part"), embed=False)
    words = ["--repo=user/model", "--license=mit", f"--model={tmp_path / 'part'}"]
    with pytest.raises(ValueError, match=r"its VLM is in .*vlm; `convert export`.*its codec is in"):
        push(*words)
    words[-1] = f"--model={parts[1]}"
    with pytest.raises(ValueError, match="is a run; push the folder that `convert export`"):
        push(*words)


def push(*words):
    from absl import flags

    values = flags.FlagValues()
    convert.define(values)
    values(["convert", *words])
    convert.main("push", [], values)


def test_commands_use_the_environment_of_the_hub(folder, tmp_path, monkeypatch):
    with fake_hub.serve() as server:
        environment = fake_hub.environment(server, tmp_path / "cache", HF_TOKEN=fake_hub.TOKEN)

        def run(*words, **variables):
            return subprocess.run(
                [sys.executable, "-m", "starflow2_jax", "convert", *map(str, words)],
                env={**launch_environment(), **environment, **variables},
                capture_output=True,
                text=True,
            )

        pushed = run("push", "--model", folder, "--repo=user/new", "--license=mit", "--private")
        assert pushed.returncode == 0, pushed.stderr
        address = pushed.stdout.split("--model ")[1].strip()
        assert address == f"hf://user/new@{server.repos['user/new'].branches['main']}"
        # The copy in the cache is read, and its damage is one line.
        fake_hub.use(server, tmp_path / "cache", monkeypatch)
        monkeypatch.setenv("HF_TOKEN", fake_hub.TOKEN)
        file = model_folder.locate(address) / "fae" / "model.safetensors"
        flip(file.resolve(), -1)
        damaged = run("verify", "--model", address, HF_HUB_OFFLINE="1")
        assert damaged.returncode == 1 and damaged.stderr.count("\n") == 1
        assert f"error: {address}: fae/model.safetensors is damaged" in damaged.stderr


def launch_environment():
    """Return the environment of this process without the virtual devices of the tests."""
    from helpers.training_runs import environment

    return {**environment(), "PYTHONPATH": str(ROOT)}
