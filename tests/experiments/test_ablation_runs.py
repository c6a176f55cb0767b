"""Runs of the ablations: latents, initial weights, training and scores at very small sizes."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import interleaved_dataset
from helpers.paths import ROOT

from experiments.ablations import latents, one, scores, start, table
from starflow2_jax import config, params
from starflow2_jax.checkpoints import model_folder
from starflow2_jax.checkpoints.open_model import open_model
from starflow2_jax.data import array_store, records
from starflow2_jax.models import starflow2
from starflow2_jax.models.ablations import mot
from starflow2_jax.shapes import tasks
from starflow2_jax.training.losses.interleaved import LossTerms


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folders of pictures with captions and questions, of text alone, and their tokenizer."""
    folder = tmp_path_factory.mktemp("world")
    path, held_out = interleaved_dataset.make(folder, count=24, tasks=("t2i", "question", "text"))
    words = folder / "text"
    records.write(words, tasks.make_records(4, 8, 16, tasks=["text"]))
    return path, str(words), held_out


def test_pixels_are_latents_of_unit_variance(data, tmp_path):
    path, words, _ = data
    cfg = {"fae": {"path": ""}, "data": {"mixture": ({"path": path},)}}
    entries = [
        {"path": path, "latents": str(tmp_path / "a")},
        {"path": words, "latents": str(tmp_path / "b")},
    ]
    latents.make("pixels", cfg, 2, entries)
    held_out = records.read(path)
    stored = array_store.read(str(tmp_path / "a"), held_out.manifest)
    x = np.concatenate([stored[i][1]["latent_mean"] for i in range(len(held_out))])
    assert x.shape[1:] == (4, 48)
    np.testing.assert_allclose(x.mean((0, 1)), 0, atol=1e-4)
    np.testing.assert_allclose(x.std((0, 1)), 1, atol=1e-4)
    before = (tmp_path / "a" / "dataset.json").stat().st_mtime_ns
    latents.make("pixels", cfg, 2, entries)
    assert (tmp_path / "a" / "dataset.json").stat().st_mtime_ns == before


def test_a_record_is_right_where_each_of_its_tokens_is():
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 3, 3, 0] + [0] * 6])
    stored = LossTerms(
        target_index=np.array([[1, 3, 4, 5, 7, 9]]),
        token=np.array([[True, True, True, False, True, False]]),
        nll=np.array([[1.0, 0.5, 0.25, 0.0, 2.0, 0.0]]),
        correct=np.array([[True, True, False, False, True, False]]),
    )
    results_by_row = scores.by_record(stored, segments)
    np.testing.assert_array_equal(results_by_row["tokens"], [[1, 2, 1]])
    np.testing.assert_array_equal(results_by_row["wrong"], [[0, 1, 0]])
    np.testing.assert_array_equal(results_by_row["nll"], [[1.0, 0.75, 2.0]])


def test_a_run_starts_from_the_weights_that_fit(tmp_path):
    pretzel, _ = small_models()
    source = config.to_dict(config.default()) | {"task": "starflow2"}
    source["model"] = starflow2.options(pretzel)
    declared = {n: t for n, t in pretzel.declare().items() if n != "vlm"}
    weights = params.flatten(params.init(jax.random.key(7), declared))
    weights = {name: np.asarray(a) + 1 for name, a in weights.items()}
    folder = tmp_path / "source"
    stored = source | {"frozen": {"vlm": "1"}, "parts": []}
    model_folder.write_folder(folder, params.unflatten(weights), stored)

    def initial(cfg, fresh=()):
        path = start.write(cfg, str(folder), str(tmp_path / f"{len(fresh)}_{cfg['name']}"), fresh)
        return path, open_model(path)

    assert start.write(source, str(folder), str(tmp_path / "unused")) == str(folder)
    broad = dataclasses.replace(pretzel, skip_into="width")
    cfg = source | {"name": "broad", "model": starflow2.options(broad)}
    path, saved = initial(cfg)
    assert saved.frozen == {"vlm": "1"} and initial(cfg)[0] == path  # again: the same folder
    declared = {n: t for n, t in broad.declare().items() if n != "vlm"}
    loaded = params.flatten(saved.read_params(declared))
    for name, array in loaded.items():
        expected_array = 0 if name == "skip/vlm/weight" else weights[name]
        np.testing.assert_array_equal(array, np.broadcast_to(expected_array, array.shape))
    fresh = params.flatten(initial(source, ("adapter",))[1].read_params(
        {n: t for n, t in pretzel.declare().items() if n != "vlm"}
    ))  # fmt: skip
    assert not fresh["adapter/down/weight"].any() and fresh["skip/vlm/weight"].all()
    narrow = dataclasses.replace(pretzel.flow, width=20, layers=(1, 1, 2))
    cfg = source | {"model": starflow2.options(dataclasses.replace(pretzel, flow=narrow))}
    with pytest.raises(ValueError, match=r"deep/.* is \["):
        initial(cfg | {"name": "narrow"})


def small_models():
    """Return a very small Pretzel on pixels, and the mixture that matches it."""
    vlm = dataclasses.replace(
        starflow2.preset("tiny").vlm, width=32, layers=2, heads=2, kv_heads=1, mlp_width=48,
        sections=(2, 3, 3),
    )  # fmt: skip
    sizes = {"side": 2, "channels": 48, "width": 40, "head_dim": 20, "layers": (1, 1, 2)}
    pretzel = starflow2.PretzelConfig(vlm, starflow2.flow_config(vlm.width, **sizes))
    return pretzel, mot.matching(pretzel, 24)


def small_run(data, model=None):
    """Configuration and held-out data of a very small model, by default the frozen mixture."""
    path, words, tokenizer = data
    cfg = config.default()
    cfg.task, cfg.train.trainable = "starflow2", ("shallow", "deep")
    cfg.model.update(starflow2.options(model or small_models()[1]))
    cfg.data.mixture = ({"path": path, "weight": 1.0, "latents": f"{path}_pixels"},)
    cfg.text.tokenizer, cfg.text.length, cfg.text.images = tokenizer, 128, 2
    cfg.train.batch_size, cfg.train.steps, cfg.checkpoint.every, cfg.optim.warmup = 4, 2, 2, 1
    cfg.sample.every = cfg.evaluate.every = 0
    cfg.train.ema, cfg.optim.lr, cfg.data.threads = 0.0, 1e-2, 1
    config.check(cfg)
    held_out = (
        {"path": path, "latents": f"{path}_pixels"},
        {"path": words, "latents": f"{words}_pixels", "text": True},
    )
    return config.to_dict(cfg), held_out


def execute(code, *words):
    """Run code in a process with one unoptimized device, and return what it prints."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    command = [sys.executable, "-c", code, *map(str, words)]
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def test_a_run_trains_measures_and_leaves_the_text_of_a_frozen_vlm_alone(data, tmp_path):
    cfg, held_out = small_run(data)
    code = (
        "import json, sys\nfrom experiments.ablations import one\n"
        "cfg, held = json.load(open(sys.argv[1]))\n"
        "one.run(cfg, 'pixels', tuple(held), sys.argv[2])\n"
    )
    config_file = tmp_path / "given.json"
    config_file.write_text(json.dumps([cfg, held_out]))
    execute(code, config_file, tmp_path / "run")
    stored = json.loads((tmp_path / "run" / table.RESULT).read_text())
    assert np.isfinite(stored["image_nats"]) and stored["text_nats"] > 0
    assert 0 <= stored["questions"] <= 1 and stored["questions_count"] > 0
    # There is no image in these rows, so the expert has no part in them.
    assert stored["text_alone"] == pytest.approx(stored["text_alone_before"], rel=1e-6)
    assert stored["config"] == cfg and stored["seconds"]["training"] > 0


def test_a_stage_and_a_row_that_starts_from_it(data, tmp_path):
    """Stage 1 of a Pretzel, then stage 3 with another skip, measured with the skip's share."""
    pretzel, _ = small_models()
    stage1, held_out = small_run(data, pretzel)
    broad = dataclasses.replace(pretzel, skip_into="width", skips=("vlm",))
    row, _ = small_run(data, broad)
    row["train"]["trainable"] = ["adapter", "shallow", "deep", "skip"]
    code = (
        "import json, sys\nfrom experiments.ablations import one, start\n"
        "stage1, row, held, folder = json.load(open(sys.argv[1]))\n"
        "one.run(stage1, 'pixels', (), folder + '/stage1')\n"
        "path = start.write(row, folder + '/stage1', folder + '/row/start')\n"
        "row['init']['from'] = path\n"
        "one.run(row, 'pixels', tuple(held), folder + '/row')\n"
    )
    config_file = tmp_path / "configs.json"
    config_file.write_text(json.dumps([stage1, row, held_out, str(tmp_path)]))
    output = execute(code, config_file)
    first = json.loads((tmp_path / "stage1" / table.RESULT).read_text())
    assert "image_nats" not in first and first["seconds"]["training"] > 0
    stored = json.loads((tmp_path / "row" / table.RESULT).read_text())
    assert f"started from the weights of {tmp_path}/row/start" in output
    assert 0 < stored["skip_share"] < 1 and -1 <= stored["skip_cosine"] <= 1
    assert np.isfinite(stored["image_nats"]) and "cache_speedup" not in stored


def test_what_was_stopped_half_way_is_not_measured(data, tmp_path, monkeypatch):
    """A training that is told to stop saves and ends well."""
    cfg, held_out = small_run(data)
    monkeypatch.setattr(one.train, "train", lambda cfg, workdir: None)
    with pytest.raises(RuntimeError, match="stopped at step 0 of"):
        one.run(cfg, "pixels", tuple(held_out), str(tmp_path / "run"))
    assert not (tmp_path / "run" / table.RESULT).exists()
