"""The ablations: rows that build, of equal size; runs that are skipped, cut in shards, told of."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from etils import epath
from helpers import interleaved_dataset
from helpers.paths import ROOT

from experiments.ablations import latents, one, rows, run, scores, table
from starflow2_jax import config, params
from starflow2_jax.data import array_store, records
from starflow2_jax.models import starflow2
from starflow2_jax.models.ablations import mot
from starflow2_jax.shapes import tasks
from starflow2_jax.training.losses.interleaved import LossTerms
from starflow2_jax.training.tasks import starflow2 as starflow2_step

CORE = ("pretzel", "mot_frozen", "mot_joint", "no_skips", "skip_vlm", "skip_deep")

# -------------------------------------------------------------------------------------------- rows


def trained(variant, name):
    """A row's configuration, its model and how many weights it trains; its VLM drawn."""
    cfg = rows.get_config(f"{variant}/{name}")
    config.check(cfg)
    plain = config.to_dict(cfg)
    plain["vlm"]["path"] = ""
    model = starflow2_step.model_config(plain)
    trained_specs = params.split(model.declare(), tuple(cfg.train.trainable))[0]
    return plain, model, params.count(trained_specs)


def is_near(count, expected_count):
    return abs(count / expected_count - 1) < 0.05


@pytest.mark.parametrize("name", [n for n, row in rows.ROWS.items() if not row.matched])
def test_a_row_that_is_not_matched_differs_in_some_variant(name):
    pairs = [[trained(v, n)[2] for n in (name, "pretzel")] for v in rows.VARIANTS]
    assert not all(is_near(*pair) for pair in pairs), pairs


@pytest.mark.parametrize("variant", rows.VARIANTS)
@pytest.mark.parametrize("name", rows.ROWS)
def test_a_row_trains_as_many_weights_as_the_pretzel_or_says_so(variant, name):
    first, _, expected_count = trained(variant, "pretzel")
    cfg, model, count = trained(variant, name)
    assert model.num_patches == starflow2.preset(variant).num_patches
    assert is_near(count, expected_count) or not rows.ROWS[name].matched
    # All but what the row is about: same data, order, steps, rates.
    free = ("model", "name", "loss", "noise", "data.mixture", "fae.path", "train.trainable")
    differing = config.differences(first, cfg)
    assert all(row.startswith(free) for row in differing)
    assert bool(differing) == (name != "pretzel")
    assert [e["path"] for e in cfg["data"]["mixture"]] == [
        e["path"] for e in first["data"]["mixture"]
    ]


@pytest.mark.fast
def test_the_core_has_three_seeds_and_the_others_one():
    assert tuple(name for name, row in rows.ROWS.items() if row.core) == CORE
    assert {row.seeds for row in rows.ROWS.values() if row.core} == {3}
    assert {row.seeds for row in rows.ROWS.values() if not row.core} == {1}


def test_data_lie_where_they_are_told_to():
    cfg = rows.configuration("tiny", "pixels", data="/mine", steps=7)
    assert cfg.train.steps == cfg.checkpoint.every == 7 and cfg.fae.path == ""
    first = cfg.data.mixture[0]
    assert first["path"].startswith("/mine/t2i") and first["latents"] == f"{first['path']}_pixels"
    words = rows.held_out("tiny", "pretzel", data="/t2i")[-1]
    assert words["text"] and words["path"].startswith("/t2i/text")


@pytest.mark.fast
def test_an_unknown_row_is_a_key_error():
    for which in ("tiny/mot", "large/pretzel", "tiny"):
        with pytest.raises(KeyError, match=which):
            rows.get_config(which)


# ------------------------------------------------------------------------------------------ runner


@pytest.mark.fast
def test_shards_hold_every_run_once_and_first_seeds_first():
    all_jobs = run.jobs([], "0/1")
    assert len(all_jobs) == len(set(all_jobs)) == 3 * 6 + len(rows.ROWS) - 6
    assert [name for name, _ in all_jobs[:6]] == list(CORE)
    seeds = [seed for _, seed in all_jobs]
    assert seeds == sorted(seeds)
    parts = [run.jobs([], f"{i}/4") for i in range(4)]
    assert sorted(job for part in parts for job in part) == sorted(all_jobs)
    assert run.jobs(["pixels", "pretzel"], "0/1") == [
        ("pretzel", 0), ("pixels", 0), ("pretzel", 1), ("pretzel", 2)
    ]  # fmt: skip
    assert run.jobs(["pixels"], "0/1", seeds=2) == [("pixels", 0), ("pixels", 1)]
    with pytest.raises(ValueError, match="no row 'pixel'; did you mean 'pixels'"):
        run.jobs(["pixel"], "0/1")
    with pytest.raises(ValueError, match="expected i/n"):
        run.jobs([], "4/4")


def result(folder, name, seed, **figures):
    path = folder / name / str(seed) / table.RESULT
    path.parent.mkdir(parents=True)
    cfg = config.to_dict(rows.configuration("tiny", name)) | {"seed": seed}
    contents = {
        "config": cfg,
        "trained": 1000,
        "seconds": {"training": 60.0 + seed},
        **figures,
    }
    path.write_text(json.dumps(contents))
    return cfg


def test_what_is_done_is_skipped_and_a_failure_stops_nothing_else(tmp_path, capsys):
    result(tmp_path, "pretzel", 0)
    started = []

    def start(job):
        started.append(job)
        return job != ("mot_frozen", 0)

    def done(job):
        cfg = config.to_dict(rows.configuration("tiny", job[0])) | {"seed": job[1]}
        return run.is_done(epath.Path(tmp_path) / job[0] / str(job[1]), cfg)

    failed = run.sweep(run.jobs(["pretzel", "mot_frozen", "pixels"], "0/1")[:4], done, start)
    assert started == [("mot_frozen", 0), ("pixels", 0), ("pretzel", 1)]
    assert failed == [("mot_frozen", 0)]
    output = capsys.readouterr().out
    assert "pretzel, seed 0: done already" in output and "mot_frozen, seed 0: FAILED" in output


def test_a_result_of_other_settings_is_refused(tmp_path):
    cfg = result(tmp_path, "pretzel", 0)
    folder = epath.Path(tmp_path) / "pretzel" / "0"
    moved = {**cfg, "vlm": {**cfg["vlm"], "path": "/elsewhere"}}
    assert run.is_done(folder, moved)
    assert not run.is_done(folder.parent / "1", cfg)
    other = {**cfg, "train": {**cfg["train"], "steps": 3}}
    with pytest.raises(ValueError, match=r"train\.steps: \d+ -> 3"):
        run.is_done(folder, other)


def test_the_table_says_means_intervals_seeds_and_what_was_not_run(tmp_path):
    for seed, nats in enumerate((1.0, 1.2, 1.4)):
        result(tmp_path, "pretzel", seed, image_nats=nats, questions=0.5)
    result(tmp_path, "pixels", 0, image_nats=0.25)
    judged = {"sections": {"generation": {"score": {"seen": {"mean": {"correct": 0.75}}}}}}
    (tmp_path / "pixels" / "0" / run.JUDGED).write_text(json.dumps(judged))
    text = run.write_table(epath.Path(tmp_path), "tiny", 0)
    results_by_row = {
        row["row"]: row for row in json.loads((tmp_path / "table.json").read_text())["rows"]
    }
    assert set(results_by_row) == set(rows.ROWS) and (tmp_path / "table.md").read_text() == text
    stored = results_by_row["pretzel"]["image_nats"]
    # Student's t of two degrees of freedom, by hand: 4.303 x 0.2 / sqrt(3).
    assert stored["mean"] == pytest.approx(1.2) and stored["interval"] == pytest.approx(
        0.49687, 1e-4
    )
    assert (
        results_by_row["pretzel"]["seeds"] == [0, 1, 2]
        and results_by_row["pretzel"]["seconds"] == 61.0
    )
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if "|" in line}
    assert "| 3 of 3 | 1,000 | 1.200 ± 0.497 | - | 0.500 ± 0.000 |" in lines["the Pretzel"]
    pixels = lines[f"{rows.ROWS['pixels'].what}†"]
    assert "| 1 of 1 |" in pixels and "0.250 (1)" in pixels and "0.750 (1)" in pixels
    assert "| 0 of 3 | not run |" in lines["mixture of transformers, all trained*"]
    assert "400 steps" in text
    assert "but 7 steps" in run.write_table(epath.Path(tmp_path), "tiny", 7)


# ----------------------------------------------------------------------------------- latents, a run


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


def small_run(data):
    """Configuration and held-out data of a very small frozen mixture on pixels."""
    path, words, tokenizer = data
    vlm = dataclasses.replace(
        starflow2.preset("tiny").vlm, width=32, layers=2, heads=2, kv_heads=1, mlp_width=48,
        sections=(2, 3, 3),
    )  # fmt: skip
    sizes = {"side": 2, "channels": 48, "width": 40, "head_dim": 20, "layers": (1, 1, 2)}
    pretzel = starflow2.PretzelConfig(vlm, starflow2.flow_config(vlm.width, **sizes))
    cfg = config.default()
    cfg.task, cfg.train.trainable = "starflow2", ("shallow", "deep")
    cfg.model.update(starflow2.options(mot.matching(pretzel, 24)))
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


def test_a_run_trains_measures_and_leaves_the_text_of_a_frozen_vlm_alone(data, tmp_path):
    cfg, held_out = small_run(data)
    code = (
        "import json, sys\nfrom experiments.ablations import one\n"
        "cfg, held = json.load(open(sys.argv[1]))\n"
        "one.run(cfg, 'pixels', tuple(held), sys.argv[2])\n"
    )
    config_file = tmp_path / "given.json"
    config_file.write_text(json.dumps([cfg, held_out]))
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    command = [sys.executable, "-c", code, str(config_file), str(tmp_path / "run")]
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    stored = json.loads((tmp_path / "run" / table.RESULT).read_text())
    assert np.isfinite(stored["image_nats"]) and stored["text_nats"] > 0
    assert 0 <= stored["questions"] <= 1 and stored["questions_count"] > 0
    # There is no image in these rows, so the expert has no part in them.
    assert stored["text_alone"] == pytest.approx(stored["text_alone_before"], rel=1e-6)
    assert stored["config"] == cfg and stored["seconds"]["training"] > 0


def test_what_was_stopped_half_way_is_not_measured(data, tmp_path, monkeypatch):
    """A training that is told to stop saves and ends well."""
    cfg, held_out = small_run(data)
    monkeypatch.setattr(one.train, "train", lambda cfg, workdir: None)
    with pytest.raises(RuntimeError, match="stopped at step 0 of"):
        one.run(cfg, "pixels", tuple(held_out), str(tmp_path / "run"))
    assert not (tmp_path / "run" / table.RESULT).exists()
