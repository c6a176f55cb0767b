"""Model folders are uploaded whole and undamaged or not at all, with a card."""

import hashlib
import json

import numpy as np
import pytest
from absl import flags
from helpers import fake_hub
from helpers.checkpoint_states import flip

from starflow2_jax import convert
from starflow2_jax.checkpoints import hub, model_card, model_folder
from starflow2_jax.checkpoints.open_model import open_model

CONFIG = {"name": "tiny", "task": "flow", "image": {"pixels": 8}, "model": {}}


def run(*words):
    """Run `convert words...` in this process."""
    values = flags.FlagValues()
    convert.define(values)
    verb, *rest = values(["convert", *map(str, words)])[1:]
    convert.main(verb, rest, values)


@pytest.fixture
def server(tmp_path, monkeypatch):
    hub.pull.cache_clear(), model_folder._pull.cache_clear()
    with fake_hub.serve() as hub_server:
        fake_hub.use(hub_server, tmp_path / "cache", monkeypatch)
        monkeypatch.setenv("HF_TOKEN", fake_hub.TOKEN)
        yield hub_server
    hub.pull.cache_clear(), model_folder._pull.cache_clear()


@pytest.fixture
def folder(tmp_path):
    """Write a model folder, in which lies a file that is not part of it."""
    tree = {"a": np.arange(6.0), "b": np.ones((2, 3))}
    model_folder.write_folder(tmp_path / "tiny", tree, CONFIG, shard_bytes=40)
    (tmp_path / "tiny" / ".env").write_text("HF_TOKEN=secret")
    return tmp_path / "tiny"


def result_of(folder, **changes):
    """Return a result of `evaluate` about a model folder."""
    digests = (folder / model_folder.DIGEST_FILE).read_bytes()
    return {
        "model": {"path": str(folder), "sha256": hashlib.sha256(digests).hexdigest()},
        "data": {"path": "data/shapes64_test"},
        "nats_per_dim": -1.25, "nats_per_dim_95": [-1.5, -1.0], "rows": 64,
        "baselines": {"gray_image": {"correct": 0.25, "correct_95": [0.2, 0.3], "count": 40}},
        "sections": {"generation": {"score": {"seen": {
            "mean": {"correct": 0.5, "correct_95": [0.4, 0.6], "count": 40},
            "tags": {"color": {"correct": 0.1, "correct_95": [0.0, 0.2], "count": 4}},
        }}}},
        "kinds": {"quiz/color": {"correct": 0.0, "correct_95": [0, 1], "records": 1},
                  "all": {"correct": 0.875, "correct_95": [0.5, 1], "records": 8}},
        "time": "2026-11-30T12:00:00+00:00",
        "command": "python -m starflow2_jax.evaluate likelihood --model tiny",
        "machine": "Linux, 2 cores", "devices": "1 x cpu", "versions": {"jax": "0.10.2"},
        **changes,
    }  # fmt: skip


PUSH = ("push", "--repo=user/tiny", "--license=apache-2.0")


def test_a_folder_is_uploaded_and_read_again(server, folder, capsys):
    run(*PUSH, f"--model={folder}", "--json")
    address = json.loads(capsys.readouterr().out)["address"]
    assert address == f"hf://user/tiny@{server.repos['user/tiny'].branches['main']}"
    files = server.files("user/tiny")
    assert files.keys() - {".gitattributes", "README.md"} == {
        path.name for path in folder.iterdir() if path.name != ".env"
    }
    assert all(files[name] == (folder / name).read_bytes() for name in files if "model" in name)
    assert not server.repos["user/tiny"].private
    run("verify", f"--model={address}")
    assert "good" in capsys.readouterr().out
    run("show", f"--model={address}")
    assert "float64" in capsys.readouterr().out
    # A later version removes the shards of the earlier one, and nothing else.
    model_folder.write_folder(folder, {"a": np.ones(3)}, CONFIG, overwrite=True)
    server.add("user/tiny", {**files, "sample.png": b"picture"})
    run(*PUSH, f"--model={folder}")
    names = server.files("user/tiny").keys()
    assert {"model.safetensors", "sample.png", "README.md"} <= names
    assert not [name for name in names if "-of-" in name or name.endswith("index.json")]
    assert open_model("hf://user/tiny").config["name"] == "tiny"


def test_nothing_is_uploaded_from_a_damaged_folder(server, folder):
    flip(folder / "model-00001-of-00002.safetensors", -1)
    with pytest.raises(ValueError, match=r"model-00001-of-00002.safetensors has sha256"):
        run(*PUSH, f"--model={folder}")
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00001-of-00002.safetensors"):
        run(*PUSH, f"--model={folder}")
    assert not server.requests


def test_what_the_hub_has_stored_is_compared(server, folder):
    server.stored["model-00002-of-00002.safetensors"] = b"other bytes"
    with pytest.raises(
        ValueError, match=r"upload is damaged.*model-00002-of-00002.safetensors has"
    ):
        run(*PUSH, f"--model={folder}")
    server.stored = {"config.json": b"{}"}
    with pytest.raises(ValueError, match=r"upload is damaged.*config.json has git's sha1"):
        run(*PUSH, f"--model={folder}")


def test_private_models_do_not_become_public(server, folder):
    run(*PUSH, f"--model={folder}", "--private")
    assert server.repos["user/tiny"].private
    server.add("user/public", {"config.json": b"{}"})
    count = len(server.writes())
    with pytest.raises(ValueError, match=r"user/public exists and is public; nothing was uploaded"):
        run("push", "--repo=user/public", "--license=mit", f"--model={folder}", "--private")
    assert len(server.writes()) == count


def test_a_push_without_a_token_says_how_to_log_in(server, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("HF_TOKEN_PATH", "/nonexistent")
    with pytest.raises(OSError, match=r"^hf://user/tiny: the Hub refused access.*hf auth login"):
        run(*PUSH, f"--model={folder}")
    assert "user/tiny" not in server.repos


def test_a_dry_run_writes_the_files_and_uploads_nothing(server, folder, tmp_path):
    out = tmp_path / "out"
    run(*PUSH, f"--model={folder}", "--dry_run", f"--out={out}")
    assert not server.requests
    names = {path.name for path in out.iterdir()}
    assert "README.md" in names and ".env" not in names and not model_folder.verify(out)
    with pytest.raises(FileExistsError, match="--overwrite"):
        run(*PUSH, f"--model={folder}", "--dry_run", f"--out={out}")
    run(*PUSH, f"--model={folder}", "--dry_run", f"--out={out}", "--overwrite")
    # A card that somebody wrote is not replaced.
    (folder / "README.md").write_text("# By hand\n")
    run(*PUSH, f"--model={folder}", "--dry_run", f"--out={out}", "--overwrite")
    assert (out / "README.md").read_text() == "# By hand\n"


def test_flags_are_checked(server, folder, tmp_path):
    for words, message in (
        (("push", "--repo=user/tiny", f"--model={folder}"), "--license is needed"),
        (("push", "--repo=tiny", "--license=mit", f"--model={folder}"), "expected hf://USER/NAME"),
        ((*PUSH, f"--model={folder}", "--dry_run"), "--out is needed"),
    ):
        with pytest.raises(ValueError, match=message):
            run(*words)
    with pytest.raises(FileNotFoundError):
        run(*PUSH, f"--model={tmp_path / 'nothing'}")
    assert not server.requests


def test_the_card_has_metadata_commands_and_figures_with_their_stamps(folder, tmp_path):
    from huggingface_hub import ModelCard

    result = tmp_path / "likelihood.json"
    result.write_text(json.dumps(result_of(folder)))
    out = tmp_path / "out"
    run(
        *PUSH, f"--model={folder}", "--dry_run", f"--out={out}", f"--results={result}",
        "--base_model=org/base",
    )  # fmt: skip
    card = ModelCard.load(out / "README.md")
    metadata = card.data.to_dict()
    assert metadata["license"] == "apache-2.0" and metadata["base_model"] == ["org/base"]
    assert metadata["library_name"] == "starflow2_jax" and "jax" in metadata["tags"]
    assert metadata["pipeline_tag"] == "unconditional-image-generation"
    values = {(r.metric_name, r.metric_value): r for r in card.data.eval_results}
    assert values.keys() == {
        *(("nats_per_dim", -1.25), ("generation, seen: correct", 0.5), ("correct", 0.875))
    }
    figure = values["generation, seen: correct", 0.5]
    assert figure.metric_type == "accuracy" and figure.dataset_name == "data/shapes64_test"
    assert figure.metric_args == {"count": 40, "interval_95": [0.4, 0.6]}
    for text in (
        *("| nats_per_dim | -1.25 (-1.5 to -1) | 64 |", "12 parameters, images of 8 pixels"),
        "| baselines, gray image: correct | 0.25 (0.2 to 0.3) | 40 |",
        *("2026-11-30T12:00:00+00:00", "Linux, 2 cores", "jax 0.10.2"),
        "python -m starflow2_jax.evaluate likelihood --model tiny",
        "python -m starflow2_jax.generate --model hf://user/tiny --n 4",
    ):
        assert text in card.content, text


@pytest.mark.fast
def test_results_of_other_models_and_other_files_are_refused(folder, tmp_path):
    path = tmp_path / "result.json"
    for result, message in (
        (result_of(folder, model={"path": "runs/a", "sha256": "0"}), "a result of another model"),
        (result_of(folder, command=""), "not a result of `evaluate`"),
        ({"nats_per_dim": 1.0}, "not a result of `evaluate`"),
    ):
        path.write_text(json.dumps(result))
        with pytest.raises(ValueError, match=message):
            model_card.read_result(str(path), str(folder))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("config", "tag"),
    [
        ({"task": "starflow2"}, "any-to-any"),
        ({"task": "vlm"}, "image-text-to-text"),
        ({"task": "fae_pixels"}, "image-feature-extraction"),
        ({"task": "flow", "model": {"text_length": 8}}, "text-to-image"),
        ({"init": {"from": f"hf://org/base@{'a' * 40}"}}, "unconditional-image-generation"),
    ],
)
def test_the_card_of_every_kind_of_model(config, tag, folder):
    model_folder.write_folder(folder, {"a": np.ones(3)}, config, overwrite=True)
    options = model_card.CardOptions("user/tiny", "mit")
    text = model_card.make_card(open_model(folder), options, parameters=3)
    assert f"pipeline_tag: {tag}\n" in text and "hf://user/tiny" in text
    assert ("- org/base" in text) == ("init" in config)
