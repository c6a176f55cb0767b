"""Exported STARFlow2 folders are complete, are compared with their digests, and lose nothing."""

import json
import shutil

import jax
import numpy as np
import pytest
from absl import flags
from helpers import starflow2_folders
from helpers.checkpoint_states import flip
from helpers.kills import contents

from starflow2_jax import convert, params
from starflow2_jax.checkpoints import digest, model_folder, open_model
from starflow2_jax.inference import load
from starflow2_jax.latents import codec
from starflow2_jax.models import starflow2


def run(*words):
    """Run `convert words...` in this process."""
    values = flags.FlagValues()
    convert.define(values)
    verb, *rest = values(["convert", *map(str, words)])[1:]
    convert.main(verb, rest, values)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model folder with its VLM and codec in it."""
    root, workdir = starflow2_folders.make(tmp_path_factory.mktemp("parts"))
    run("export", "--model", workdir, "--out", root / "model")
    return root / "model"


def problems_of(folder):
    try:
        return model_folder.verify(folder)
    except (ValueError, FileNotFoundError) as error:
        return [str(error)]


def test_every_file_has_a_digest_and_damage_of_any_is_named(exported, tmp_path, capsys):
    names = set(contents(exported))
    assert {"vlm/tokenizer.json", "fae/config.json", "fae/model.safetensors"} <= names
    assert set(model_folder.read_digests(exported)) == names - {"sha256.json"}
    run("verify", "--model", exported)
    for name in sorted(names):
        copy = tmp_path / "copy"
        shutil.copytree(exported, copy)
        flip(copy / name, (copy / name).stat().st_size // 2)
        assert any(name in problem for problem in problems_of(copy)), name
        (copy / name).unlink()
        assert any(name in problem for problem in problems_of(copy)), name
        shutil.rmtree(copy)
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    (copy / "fae" / "added.txt").write_text("x")
    assert model_folder.verify(copy) == ["fae/added.txt is not in sha256.json"]
    capsys.readouterr()
    with pytest.raises(ValueError, match="1 of what was checked is damaged"):
        run("verify", "--model", copy)
    assert "added.txt" in capsys.readouterr().out


def test_a_damaged_record_of_a_frozen_model_is_not_blamed_on_that_model(exported, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    text = (copy / "config.json").read_text()
    stored = json.loads(text)["frozen"]["fae"]
    damaged = stored.replace(stored[7], "f" if stored[7] != "f" else "e", 1)
    (copy / "config.json").write_text(text.replace(stored, damaged))
    for read in (load.load, load.read_config, open_model.open_model):
        with pytest.raises(ValueError, match=r"copy is damaged: config\.json has sha256"):
            read(str(copy))


def test_a_damaged_or_missing_part_is_refused_by_load(exported, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    flip(copy / "vlm" / "tokenizer_config.json", 40)
    with pytest.raises(ValueError, match=r"is damaged: vlm/tokenizer_config\.json has sha256"):
        load.load(str(copy))
    shutil.copy(exported / "vlm" / "tokenizer_config.json", copy / "vlm")
    flip(copy / "vlm" / "model.safetensors", 9999)
    with pytest.raises(ValueError, match=r"is damaged: vlm/model\.safetensors has sha256"):
        load.load(str(copy))
    shutil.copy(exported / "vlm" / "model.safetensors", copy / "vlm")
    shutil.rmtree(copy / "fae")
    missing = r"its codec is missing: there is no folder .*copy/fae"
    with pytest.raises(FileNotFoundError, match=missing):
        load.load(str(copy))
    with pytest.raises(ValueError, match="1 of what was checked is damaged"):
        run("verify", "--model", copy)
    # As exported before parts and inner files were recorded.
    cfg = json.loads((copy / "config.json").read_text())
    del cfg["parts"]
    (copy / "config.json").write_text(json.dumps(cfg, indent=2, sort_keys=True) + "\n")
    sums = json.loads((copy / "sha256.json").read_text())
    sums["config.json"] = digest.sha256_file(copy / "config.json")
    (copy / "sha256.json").write_text(json.dumps(sums))
    with pytest.raises(FileNotFoundError, match=missing):
        load.load(str(copy))
    shutil.copytree(exported / "fae", copy / "fae")
    names = ("config.json", "model.safetensors")
    sums = {name: digest.sha256_file(copy / name) for name in names}
    (copy / "sha256.json").write_text(json.dumps(sums))
    assert load.load(str(copy)).codec is not None
    flip(copy / "fae" / "config.json", 40)
    assert any(p.startswith("fae/config.json has") for p in model_folder.verify(copy))
    with pytest.raises(ValueError, match=r"config\.json"):
        load.load(str(copy))


def test_exporting_onto_itself_loses_nothing(exported, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(exported, copy)
    before = contents(copy)
    run("export", "--model", copy, "--out", copy)  # complete already
    assert contents(copy) == before
    for embed in ("--embed", "--noembed"):
        run("export", "--model", copy, "--out", copy, "--overwrite", embed)
        assert contents(copy) == before and [p.name for p in tmp_path.iterdir()] == ["model"]
    for part in ("vlm", "fae"):
        with pytest.raises(ValueError, match="would be replaced in part"):
            run("export", "--model", copy, "--out", copy / part, "--overwrite")
        with pytest.raises(ValueError, match="would be replaced in part"):
            run("export", "--model", copy / part, "--out", copy, "--overwrite")
    assert contents(copy) == before


def test_a_vlm_that_was_trained_is_exported_with_the_model(tmp_path):
    root, _ = starflow2_folders.make(tmp_path)
    trained = ("vlm", *starflow2.SUBTREES)
    latent_codec = codec.load(str(root / "fae"))
    workdir = starflow2_folders.save_run(root / "trained", root, latent_codec, trainable=trained)
    run("export", "--model", workdir, "--out", root / "model")
    models = [load.load(path) for path in (workdir, str(root / "model"))]
    jax.tree.map(np.testing.assert_array_equal, models[0].params, models[1].params)
    original = params.flatten(load.load(str(root / "run")).params["vlm"])
    exported = params.flatten(models[1].params["vlm"])
    assert any(np.any(original[name] != exported[name]) for name in original)
