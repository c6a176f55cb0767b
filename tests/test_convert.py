"""The convert command imports and exports weights and inspects checkpoints."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import flags
from helpers.checkpoint_states import flip
from helpers.paths import GOLDEN
from safetensors.numpy import load_file, save_file

from starflow2_jax import config, convert
from starflow2_jax.checkpoints import model_folder, orbax
from starflow2_jax.models import flow
from starflow2_jax.params import count as count_params, flatten, init as init_params
from starflow2_jax.training.tasks.flow import declare, model_config

TARFLOW = "img_size=16 patch_size=4 channel_size=3 channels=64 blocks=4 layers_per_block=2"
STARFLOW = (
    "img_size=8 patch_size=1 channel_size=4 channels=64 blocks=4 layers_per_block=2 2 2 4 "
    "head_dim=32 rope=1 sos=1 txt_size=8 cond_top_only=1 use_softplus=1 use_final_norm=1 "
    "soft_clip=4 seq_order=L2R"
)


def run(*words):
    """Run `convert words...` in this process."""
    values = flags.FlagValues()
    convert.define(values)
    verb, *rest = values(["convert", *map(str, words)])[1:]
    convert.main(verb, rest, values)


def golden(name):
    with np.load(GOLDEN / f"{name}_tiny.npz") as arrays:
        state = {k: arrays[k] for k in arrays.files if k.startswith("params/")}
        inputs = {k: arrays[k] for k in ("x", "y")}
        z = arrays["f32/fwd/z" if name == "starflow" else "f32/cond/y/z"]
        inputs["tokens"] = (
            arrays["x"].transpose(0, 2, 3, 1).reshape(2, 64, 4)
            if name == "starflow"
            else arrays["patchify_x"]
        )
    return {k.removeprefix("params/"): v for k, v in state.items()}, inputs, z


@pytest.fixture
def public(tmp_path):
    for name in ("tarflow", "starflow"):
        save_file(golden(name)[0], tmp_path / f"{name}.safetensors")
    return tmp_path


def opened(path):
    cfg = model_folder.read_config(path)
    config.check(cfg)
    model = model_config(cfg)
    return cfg, model, model_folder.read_folder(path, declare(cfg, model))


@pytest.mark.fast
def test_a_tarflow_becomes_a_model_folder(public, capsys):
    out = public / "model"
    options = TARFLOW + " noise_std=0.07 lr=1e-4"
    run("tarflow", public / "tarflow.safetensors", "--options", options, "--out", out)
    printed = capsys.readouterr().out
    assert "442,752 parameters" in printed and "left out, as no part of the flow: lr" in printed
    cfg, model, params = opened(out)
    assert cfg["image"] | {"flip": 0} == {
        "pixels": 16,
        "patch": 4,
        "channel_order": "channel_first",
        "flip": 0,
    }
    assert (
        cfg["noise"] == {"kind": "gaussian", "sigma": 0.07, "context_sigma": None}
        and cfg["data"]["labels"]
    )
    _, inputs, z = golden("tarflow")
    latents, _ = flow.forward(
        params["flow"], inputs["tokens"], model, flow.Conditioning(labels=inputs["y"])
    )
    np.testing.assert_allclose(latents, z, atol=1e-5)


def test_a_starflow_becomes_a_model_folder_and_back(public, capsys):
    source, out, back = public / "starflow.safetensors", public / "model", public / "back"
    run("starflow", source, "--options", STARFLOW, "--out", out, "--json")
    result = json.loads(capsys.readouterr().out)
    assert result["parameters"] == 505_072
    assert result["noise"] == {"kind": "gaussian", "sigma": 0.3}
    cfg, model, params = opened(out)
    assert cfg["image"]["pixels"] == 0 and cfg["data"]["text"] == "features"
    _, inputs, z = golden("starflow")
    latents, _ = flow.forward(
        params["flow"], inputs["tokens"], model, flow.Conditioning(text=inputs["y"])
    )
    np.testing.assert_allclose(latents, z.transpose(0, 2, 3, 1).reshape(latents.shape), atol=1e-5)

    run("export", "--model", out, "--public", "--out", back)
    state, written = golden("starflow")[0], load_file(back / "model.safetensors")
    assert all(np.array_equal(array, state[name]) for name, array in written.items())
    assert len(written) == 146
    run("starflow", back, "--options", back / "options.yaml", "--out", public / "again")
    assert (public / "again" / "model.safetensors").read_bytes() == (
        out / "model.safetensors"
    ).read_bytes()


def test_a_pth_file_becomes_a_model_folder(public):
    torch = pytest.importorskip("torch")
    state = {k: torch.from_numpy(v) for k, v in golden("tarflow")[0].items()}
    torch.save(state, public / "x.pth")
    run("tarflow", public / "x.pth", "--options", TARFLOW, "--out", public / "a")
    run("tarflow", public / "tarflow.safetensors", "--options", TARFLOW, "--out", public / "b")
    assert (public / "a" / "sha256.json").read_text() == (public / "b" / "sha256.json").read_text()


def test_bad_input_writes_nothing(public):
    source, out = public / "tarflow.safetensors", public / "model"
    for words, error, message in (
        (("tarflow", source, "--options", TARFLOW), ValueError, "--out is needed"),
        (("tarflow", source, "--out", out), ValueError, "--options is needed"),
        (("tarflow", "--options", TARFLOW, "--out", out), ValueError, "expected one INPUT"),
        (
            ("tarflow", public / "no.pth", "--options", TARFLOW, "--out", out),
            FileNotFoundError,
            "no such file",
        ),
        (
            ("tarflow", source, "--options", TARFLOW + " family=starflow", "--out", out),
            ValueError,
            "the verb is tarflow",
        ),
        (
            ("starflow", source, "--options", TARFLOW, "--out", out),
            ValueError,
            "4 unexpected: blocks.0.class_embed",
        ),
        (
            ("tarflow", source, "--options", TARFLOW.replace("64", "96"), "--out", out),
            ValueError,
            "misshapen: .*expected",
        ),
    ):
        with pytest.raises(error, match=message):
            run(*words)
        assert sorted(p.name for p in public.iterdir()) == [
            "starflow.safetensors",
            "tarflow.safetensors",
        ]


def test_only_overwrite_replaces_a_folder(public):
    out = public / "model"
    words = ("tarflow", public / "tarflow.safetensors", "--options", TARFLOW, "--out", out)
    run(*words)
    changed_at = out.stat().st_mtime_ns
    run(*words)  # a killed process may have written all of it
    assert out.stat().st_mtime_ns == changed_at
    flip(out / "model.safetensors", 5000)
    with pytest.raises(FileExistsError, match="exists already"):
        run(*words)
    run(*words, "--overwrite")
    run("verify", "--model", out)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    cfg = config.to_dict(config.default())
    cfg["model"] = {"side": 2, "channels": 12, "width": 64, "layers": [1, 1]}
    cfg["image"].update(pixels=4, patch=2, channel_order="channel_last")
    cfg["model"] |= {"text_channels": 8, "text_length": 4}
    cfg["text"]["vocabulary"] = 257
    params = init_params(jax.random.key(0), declare(cfg, model_config(cfg)))
    writer = orbax.open(path)
    for step in (1, 2):
        ema = jax.tree.map(lambda a, step=step: a + step, params)
        state = {"params": params, "ema": ema}
        meta = {"config": {**cfg, "train": {**cfg["train"], "trainable": ["flow", "text"]}}}
        orbax.save(writer, step, state, {**meta, "step": step, "classes": ["cat"]})
    orbax.close(writer)
    return path, params


def test_a_run_is_exported_with_averaged_or_raw_weights(workdir, tmp_path):
    path, params = workdir
    for words, plus in (
        ((path,), 2),
        ((path / "checkpoints" / "1",), 1),
        ((path, "--noema"), 0),
    ):
        out = tmp_path / f"model{plus}"
        run("export", "--model", *words, "--out", out)
        cfg = model_folder.read_config(out)
        assert cfg.pop("classes") == ["cat"]
        read = model_folder.read_folder(out, declare(cfg, model_config(cfg)))
        for name, leaf in flatten(params).items():
            np.testing.assert_array_equal(flatten(read)[name], leaf + plus)
    # Drawn from the seed, a subtree that is not trained is in no checkpoint but in the folder.
    meta = {"config": {**cfg, "train": {**cfg["train"], "trainable": ["flow"]}}, "step": 1}
    writer = orbax.open(tmp_path / "frozen")
    orbax.save(writer, 1, {"ema": {"flow": params["flow"]}}, meta)
    orbax.close(writer)
    run("export", "--model", tmp_path / "frozen", "--out", tmp_path / "thawed")
    read = model_folder.read_folder(tmp_path / "thawed", declare(cfg, model_config(cfg)))
    initial = init_params(jax.random.key(cfg["seed"]), declare(cfg, model_config(cfg)))
    np.testing.assert_array_equal(read["text"]["embed"], initial["text"]["embed"])
    again = tmp_path / "again"
    run("export", "--model", tmp_path / "model2", "--out", again)
    assert (again / "sha256.json").read_text() == (tmp_path / "model2/sha256.json").read_text()
    run("export", "--model", path, "--public", "--out", tmp_path / "public")
    options = tmp_path / "public" / "options.yaml"
    run("starflow", tmp_path / "public", "--options", options, "--out", tmp_path / "back")
    cfg, _, read = opened(tmp_path / "back")
    assert cfg["image"]["pixels"] == 4 and cfg["image"]["channel_order"] == "channel_last"
    start = params["flow"]["blocks"]["0"]["start"]
    np.testing.assert_array_equal(read["flow"]["blocks"]["0"]["start"], start + 2)


@pytest.mark.fast
def test_list_show_and_verify_describe_a_run(workdir, tmp_path, capsys):
    path, params = workdir
    run("list", "--workdir", path, "--json")
    rows = json.loads(capsys.readouterr().out)
    assert [(row["step"], row["status"]) for row in rows] == [(1, "sealed"), (2, "sealed")]
    run("show", "--model", path / "checkpoints" / "1", "--json")
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 2 * len(flatten(params))
    assert sum(row["bytes"] for row in rows) == 2 * 4 * count_params(params)
    run("verify", "--workdir", path)
    assert capsys.readouterr().out == "step 1: sealed, good\nstep 2: sealed, good\n"
    run("export", "--model", path, "--out", tmp_path / "m")
    capsys.readouterr()
    run("show", "--model", tmp_path / "m")
    assert f"{4 * count_params(params):,}" in capsys.readouterr().out
    tensors = tmp_path / "m" / "model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    with pytest.raises(ValueError, match="1 of what was checked is damaged"):
        run("verify", "--model", tmp_path / "m")
    assert "model.safetensors has sha256" in capsys.readouterr().out
    for verb in ("list", "verify"):
        with pytest.raises(FileNotFoundError, match="no checkpoints"):
            run(verb, "--workdir", tmp_path)


def test_a_run_of_another_model_is_refused(workdir, tmp_path):
    path, params = workdir
    writer = orbax.open(tmp_path / "run")
    state = {"ema": {"flow": params["flow"]}}
    orbax.save(writer, 1, state, orbax.read_meta(path))
    orbax.close(writer)
    with pytest.raises(ValueError, match=r"1 missing: ema\.text\.embed"):
        run("export", "--model", tmp_path / "run", "--out", tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_the_command_line_suggests_verbs_and_flags(tmp_path):
    def call(*words):
        words = [sys.executable, "-m", "starflow2_jax.convert", *words]
        return subprocess.run(words, capture_output=True, text=True, env={**os.environ})

    result = call("shwo")
    assert result.returncode != 0 and "did you mean 'show'" in result.stdout + result.stderr
    result = call("verify", "--workdir", str(tmp_path))
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.strip() == f"error: {tmp_path}: no checkpoints in it"
    result = call("show", "--modle", "x")
    assert result.returncode != 0 and "Did you mean: model" in result.stderr
