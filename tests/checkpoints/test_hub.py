"""Models are read from the Hugging Face Hub, pinned, verified, from the cache when offline."""

import json
import pathlib

import numpy as np
import pytest
from helpers import fake_hub

from starflow2_jax.checkpoints import hub, model_folder
from starflow2_jax.checkpoints.open_model import open_model

CONFIG = {"name": "tiny", "task": "flow"}
OTHER = "0" * 40


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serve `user/tiny`: a model folder with another folder in it, code and a pickle."""
    hub.pull.cache_clear(), model_folder._pull.cache_clear()
    inner = tmp_path / "vlm_source"
    model_folder.write_folder(inner, {"b": np.arange(4.0)}, {"name": "inner"})
    model_folder.write_folder(tmp_path / "tiny", {"a": np.ones(3)}, CONFIG, folders={"vlm": inner})
    with fake_hub.serve() as hub_server:
        code = {
            "modeling.py": b"raise SystemExit",
            "old/weights.bin": b"\x80\x04.",
            "card.md": b"#",
        }
        hub_server.add_folder("user/tiny", tmp_path / "tiny", **code)
        fake_hub.use(hub_server, tmp_path / "cache", monkeypatch)
        yield hub_server
    hub.pull.cache_clear(), model_folder._pull.cache_clear()


def restart():
    """Forget what this process has read, as a new one would."""
    hub.pull.cache_clear(), model_folder._pull.cache_clear()


def head(server, repo="user/tiny"):
    return server.repos[repo].branches["main"]


@pytest.mark.fast
def test_addresses_have_a_repository_a_revision_and_a_folder():
    commit = "a" * 40
    for text, expected in {
        "hf://user/name": ("user/name", "", ""),
        "hf://models/user/name/": ("user/name", "", ""),
        "hf://models/name": ("models/name", "", ""),
        "hf://user/name@v1.0": ("user/name", "v1.0", ""),
        "hf://user/name@a%2Fb/vlm": ("user/name", "a/b", "vlm"),
        "hf://user/name@refs/pr/3/vlm": ("user/name", "refs/pr/3", "vlm"),
        f"hf://user/n.a-m_e@{commit}/a/b.safetensors": ("user/n.a-m_e", commit, "a/b.safetensors"),
    }.items():
        address = hub.parse(text)
        assert (address.repo, address.revision, address.folder) == expected
        assert hub.parse(str(address)) == address
        assert address.is_pinned == (commit in text)
    for text in (
        *("hf://", "hf://user", "hf:/user/name", "hf://user/name@", "hf://user/name/../other"),
        *("hf://datasets/user/name", "hf://spaces/user/name", "hf://user/name@a b", "hf://-u/name"),
        *("hf://user/name@v1/.", "hf://user/name?x=1", "hf://user/name@v1//vlm"),
    ):
        with pytest.raises(ValueError, match=r"expected hf://USER/NAME"):
            hub.parse(text)
    assert hub.join("hf://user/name@v1", "vlm") == "hf://user/name@v1/vlm"
    assert hub.join("models/a", "vlm") == "models/a/vlm"
    pinned = f"hf://user/name@{commit}"
    assert hub.is_same_model("hf://user/name", pinned) and hub.is_same_model(pinned, pinned)
    assert not hub.is_same_model("hf://user/name/vlm", pinned)
    assert not hub.is_same_model(f"hf://user/name@{OTHER}", pinned)


@pytest.mark.fast
def test_a_model_is_downloaded_without_its_code_and_pinned(server):
    saved = open_model("hf://user/tiny")
    assert saved.is_folder and saved.config["name"] == "tiny"
    folder = pathlib.Path(saved.path)
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert {"config.json", "model.safetensors", "vlm/model.safetensors", "card.md"} <= names
    assert not [name for name in names if name.endswith((".py", ".bin"))]
    assert not [request for request in server.requests if ".py" in request or ".bin" in request]
    assert hub.pin("hf://user/tiny") == f"hf://user/tiny@{head(server)}"
    assert hub.pin("models/a") == "models/a" and hub.pin("gs://a/b") == "gs://a/b"
    inner = model_folder.locate(f"hf://user/tiny@{head(server)}/vlm")
    assert model_folder.read_config(inner)["name"] == "inner"
    # An address is the same commit until the process ends.
    pinned = hub.pin("hf://user/tiny")
    server.add("user/tiny", {"config.json": b"{}"})
    assert hub.pin("hf://user/tiny") == pinned
    restart()
    assert hub.pin("hf://user/tiny") != pinned
    assert open_model(pinned).config["name"] == "tiny"


@pytest.mark.parametrize("name", ["model.safetensors", "vlm/config.json"])
def test_a_flipped_bit_is_one_error_that_names_the_file(server, name):
    data = server.files("user/tiny")[name]
    server.served[name] = data[:-1] + bytes([data[-1] ^ 1])
    with pytest.raises(
        ValueError, match=rf"^hf://user/tiny@\w+: {name} is damaged: .*delete "
    ) as e:
        open_model("hf://user/tiny")
    assert "\n" not in str(e.value)
    # The advice of the message helps.
    server.served.clear()
    pathlib.Path(str(e.value).split("delete ")[1].split(" and run")[0]).unlink()
    assert open_model("hf://user/tiny").config["name"] == "tiny"


def test_a_bit_flipped_in_the_cache_is_found_without_a_network(server, monkeypatch, tmp_path):
    file = pathlib.Path(open_model("hf://user/tiny").path, "model.safetensors").resolve()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    restart()
    fake_hub.use(server, tmp_path / "cache", monkeypatch, offline=True)
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        open_model("hf://user/tiny")


def test_a_repository_that_was_changed_after_the_export_is_refused(server):
    files = server.files("user/tiny")
    changed = {**files, "config.json": files["config.json"].replace(b"tiny", b"tint")}
    server.add("user/tiny", changed)
    with pytest.raises(ValueError, match=r"not the folder that was exported: config.json has sha"):
        open_model("hf://user/tiny")
    missing = {name: data for name, data in files.items() if name != "vlm/model.safetensors"}
    server.add("user/missing", missing)
    with pytest.raises(ValueError, match=r"vlm/model.safetensors is missing"):
        open_model("hf://user/missing")


def test_published_models_have_no_digests_of_their_own(server):
    files = {"config.json": b'{"a": 1}', "model.safetensors": b"weights"}
    server.add("org/published", files)
    folder = model_folder.locate("hf://org/published")
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    server.add("org/published", {**files, "model.safetensors": b"weightz"})
    server.served["model.safetensors"] = b"weights"
    restart()
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        model_folder.locate("hf://org/published")
    assert model_folder.locate("hf://user/tiny/vlm/config.json").is_file()


def test_offline_reads_the_cache_alone(server, monkeypatch, tmp_path):
    pinned = hub.pin("hf://user/tiny")
    restart()
    fake_hub.use(server, tmp_path / "cache", monkeypatch, offline=True)
    count = len(server.requests)
    assert hub.pin("hf://user/tiny") == pinned
    assert open_model(pinned).config["name"] == "tiny"
    with pytest.raises(OSError, match=r"^hf://user/else: HF_HUB_OFFLINE is set, and the cache"):
        open_model("hf://user/else")
    assert len(server.requests) == count


def test_a_hub_that_cannot_be_reached_leaves_the_cache(server, monkeypatch, tmp_path):
    from huggingface_hub import constants

    pinned = hub.pin("hf://user/tiny")
    restart()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert hub.pin("hf://user/tiny") == pinned
    with pytest.raises(OSError, match=r"^hf://user/else: the Hub cannot be reached"):
        open_model("hf://user/else")


def test_errors_say_what_to_do(server):
    server.add("user/private", {"config.json": b"{}"}, private=True)
    server.add("user/gated", {"config.json": b"{}"}, gated=True)
    server.add("user/empty", {"notes.md": b"#"})
    for address, message in {
        "hf://user/nothing": "there is no such repository, or it is private: log in with",
        "hf://user/private": "there is no such repository, or it is private: log in with",
        "hf://user/gated": "access is granted on request",
        "hf://user/tiny@v9": "the repository has no such revision",
        f"hf://user/tiny@{OTHER}": "the repository has no such revision",
        "hf://user/tiny/fae": "the repository has no fae",
        "hf://user/empty": "no model folder",
    }.items():
        with pytest.raises(FileNotFoundError, match=f"hf://.*: {message}"):
            open_model(address)


def test_private_models_are_read_with_a_token(server, monkeypatch):
    server.add("user/private", {**server.files("user/tiny")}, private=True)
    monkeypatch.setenv("HF_TOKEN", fake_hub.TOKEN)
    assert json.loads(pathlib.Path(open_model("hf://user/private").path, "config.json").read_text())
