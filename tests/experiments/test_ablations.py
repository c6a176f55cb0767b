"""The ablations: rows that build, of equal size; runs that are skipped, cut in shards, told of."""

import json

import pytest
from etils import epath

from experiments.ablations import claims, jobs, rows, run, table, times
from starflow2_jax import config, params
from starflow2_jax.models import starflow2
from starflow2_jax.training.tasks import starflow2 as starflow2_step

CORE = ("pretzel", "mot_frozen", "mot_joint", "no_skips", "skip_vlm", "skip_deep",
        "skip_into_width", "stage1_again")  # fmt: skip

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
    if name == "stage1_again":
        return
    assert [e["path"] for e in cfg["data"]["mixture"]] == [
        e["path"] for e in first["data"]["mixture"]
    ]


@pytest.mark.fast
def test_rows_continue_the_stages_that_their_flow_has():
    assert [rows.stage_row("no_skips", stage) for stage in (1, 2)] == ["pretzel"] * 2
    assert [rows.stage_row("mot_joint", stage) for stage in (1, 2)] == ["mot_frozen"] * 2
    assert [rows.stage_row("adapter_linear", s) for s in (1, 2)] == ["pretzel", "adapter_linear"]
    assert [rows.stage_row("shallow_3", stage) for stage in (1, 2)] == ["shallow_3"] * 2
    with_own = [name for name in rows.ROWS if rows.stage_row(name, 1) == name]
    assert set(with_own) == {
        "pretzel", "mot_frozen", "pixels", "features", "shallow_1", "shallow_3", "shallow_4",
        "equal_blocks", "noise_0.1", "noise_0.5", "noisy_context", "released_positions",
    }  # fmt: skip


@pytest.mark.parametrize("variant", rows.VARIANTS)
def test_the_stages_of_a_row_have_the_model_of_its_stage_3(variant):
    for name in rows.ROWS:
        cfgs = {stage: rows.configuration(variant, name, stage=stage) for stage in (1, 2, 3)}
        for stage in (1, 2):
            source = rows.configuration(variant, rows.stage_row(name, stage), stage=stage)
            config.check(source)
            assert source.train.steps >= rows.STEPS[variant][stage]
            same = dict(source.model.flow) == dict(cfgs[3].model.flow)
            assert same and source.noise == cfgs[3].noise, (name, stage)
            assert source.data.mixture and not source.data.path
        assert cfgs[3].train.steps == rows.STEPS[variant][3]
    # A mixture's stage 2 reads as many images as the Pretzel's, and goes on drawing.
    cfg = rows.configuration("tiny", "mot_frozen", stage=2)
    assert cfg.train.steps == 2 * rows.STEPS["tiny"][2] and len(cfg.data.mixture) == 4
    assert cfg.data.mixture[0]["weight"] == 1 == sum(e["weight"] for e in cfg.data.mixture[1:])


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
def test_shards_hold_every_run_once_and_stages_come_before_their_rows():
    all_jobs = jobs.jobs([], "0/1")
    runs = [job for job in all_jobs if job.stage == 3]
    assert len(all_jobs) == len(set(all_jobs))
    assert len(runs) == 3 * len(CORE) + len(rows.ROWS) - len(CORE)
    assert [job.row for job in runs[: len(CORE)]] == list(CORE)
    seeds = [job.seed for job in runs]
    assert seeds == sorted(seeds)
    for job in runs:
        before = all_jobs[: all_jobs.index(job)]
        assert all(stage in before for stage in jobs.needed_stages(job.row)), job
    parts = [jobs.jobs([], f"{i}/4") for i in range(4)]
    assert sorted(j for part in parts for j in part if j.stage == 3) == sorted(runs)
    assert jobs.jobs(["pixels", "no_skips"], "0/1", seeds=1) == [
        ("pretzel", 0, 1), ("pretzel", 0, 2), ("no_skips", 0, 3),
        ("pixels", 0, 1), ("pixels", 0, 2), ("pixels", 0, 3),
    ]  # fmt: skip
    assert [str(job) for job in jobs.jobs(["stage1_again"], "0/1", seeds=1)] == [
        "pretzel, stage 1", "stage1_again, seed 0"
    ]  # fmt: skip
    out = epath.Path("out")
    assert jobs.source(out, jobs.Job("adapter_linear", 0, 2)) == "out/stages/pretzel/stage1"
    assert jobs.source(out, jobs.Job("mot_joint", 2)) == "out/stages/mot_frozen/stage2"
    assert jobs.source(out, jobs.Job("stage1_again", 1)) == "out/stages/pretzel/stage1"
    assert jobs.source(out, jobs.Job("pretzel", 0, 1)) == ""
    with pytest.raises(ValueError, match="no row 'pixel'; did you mean 'pixels'"):
        jobs.jobs(["pixel"], "0/1")
    with pytest.raises(ValueError, match="expected i/n"):
        jobs.jobs([], "4/4")


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


def test_what_is_done_is_skipped_and_a_failure_stops_what_needs_it_alone(tmp_path, capsys):
    result(tmp_path, "pretzel", 0)
    started, tables = [], []

    def begin(job):
        started.append(str(job))
        return job != ("mot_frozen", 0, 1)

    def done(job):
        cfg = config.to_dict(rows.configuration("tiny", job.row, stage=job.stage))
        return jobs.is_done(jobs.folder(epath.Path(tmp_path), job), cfg | {"seed": job.seed})

    todo = jobs.jobs(["pretzel", "mot_frozen"], "0/1", seeds=1)
    failed = run.sweep(todo, done, begin, lambda: tables.append(1))
    assert started == ["pretzel, stage 1", "pretzel, stage 2", "mot_frozen, stage 1"]
    assert [str(job) for job in failed] == [
        "mot_frozen, stage 1", "mot_frozen, stage 2", "mot_frozen, seed 0"
    ]  # fmt: skip
    assert len(tables) == 2
    output = capsys.readouterr().out
    assert "pretzel, seed 0: done already" in output and "mot_frozen, stage 1: FAILED" in output
    assert "mot_frozen, seed 0: FAILED, because mot_frozen, stage 1 has" in output


def test_a_result_of_other_settings_is_refused(tmp_path):
    cfg = result(tmp_path, "pretzel", 0)
    folder = epath.Path(tmp_path) / "pretzel" / "0"
    moved = {**cfg, "vlm": {**cfg["vlm"], "path": "/elsewhere"}}
    assert jobs.is_done(folder, moved)
    assert not jobs.is_done(folder.parent / "1", cfg)
    other = {**cfg, "train": {**cfg["train"], "steps": 3}}
    with pytest.raises(ValueError, match=r"train\.steps: \d+ -> 3"):
        jobs.is_done(folder, other)


def judged(folder, **correct):
    """Write what the shapes suite says about a run."""

    def figures(value):
        return {"seen": {"mean": {"correct": value}}, "held_out": None}

    reasoning = {
        "score": figures(correct["reasoning"]),
        "baselines": {"direct_answer": figures(0.25), "encoded_again": figures(0.5)},
    }
    sections = {"generation": {"score": figures(correct["generation"])}, "reasoning": reasoning}
    (folder / jobs.JUDGED).write_text(json.dumps({"sections": sections, "seconds": 9.0}))


def test_the_table_says_means_intervals_seeds_and_what_was_not_run(tmp_path):
    for seed, nats in enumerate((1.0, 1.2, 1.4)):
        result(tmp_path, "pretzel", seed, image_nats=nats, questions=0.5)
    result(tmp_path, "pixels", 0, image_nats=0.25)
    judged(tmp_path / "pixels" / "0", generation=0.75, reasoning=0.5)
    text = run.write_table(epath.Path(tmp_path), "tiny")
    stored_table = json.loads((tmp_path / "table.json").read_text())
    results_by_row = {row["row"]: row for row in stored_table["rows"]}
    assert set(results_by_row) == set(rows.ROWS) and (tmp_path / "table.md").read_text() == text
    assert {claim["verdict"] for claim in stored_table["claims"]} == {claims.UNDECIDED}
    stored = results_by_row["pretzel"]["image_nats"]
    # Student's t of two degrees of freedom, by hand: 4.303 x 0.2 / sqrt(3).
    assert stored["mean"] == pytest.approx(1.2) and stored["interval"] == pytest.approx(
        0.49687, 1e-4
    )
    assert (
        results_by_row["pretzel"]["seeds"] == [0, 1, 2]
        and results_by_row["pretzel"]["seconds"] == 61.0
    )
    likelihoods, judgements = text.split("\n\n")[1:3]
    lines = {line.split("|")[1].strip(): line for line in likelihoods.splitlines()}
    assert "| 3 of 3 | 1,000 | 1.200 ± 0.497 | - | 0.500 ± 0.000 |" in lines["the Pretzel"]
    pixels = f"{rows.ROWS['pixels'].what}†"
    assert "| 1 of 1 |" in lines[pixels] and "0.250 (1)" in lines[pixels]
    assert "| 0 of 3 | not run |" in lines["mixture of transformers, all trained*"]
    lines = {line.split("|")[1].strip(): line for line in judgements.splitlines()}
    assert set(lines) == {"row", "---", pixels}
    assert "| 0.750 (1) | - | - | - | 0.500 (1) | 0.250 (1) | 0.500 (1) |" in lines[pixels]
    assert "400 of 8 rows" in text
    assert "but 9, 8, 7 steps" in run.write_table(epath.Path(tmp_path), "tiny", "9, 8, 7")


@pytest.mark.fast
def test_claims_are_decided_by_intervals_over_seeds():
    def seeds(**metrics):
        return {k: {name: v[k] for name, v in metrics.items()} for k in range(3)}

    results = {
        "pretzel": seeds(generation=(0.5, 0.52, 0.54), image_nats=(0.4, 0.41, 0.42),
                         text_alone=(0.1, 0.1, 0.1), text_alone_before=(0.1, 0.1, 0.1),
                         skip_share=(0.02, 0.03, 0.02), skip_cosine=(0.0, 0.01, 0.0)),
        "mot_frozen": seeds(generation=(0.2, 0.22, 0.25), image_nats=(0.5, 0.51, 0.53)),
        "stage1_again": seeds(generation=(0.4, 0.7, 0.5)),
        "stage1": {0: {"generation": 0.3}},
    }  # fmt: skip
    by_text = {claim["text"].split(",")[0]: claim for claim in claims.evaluate(results)}
    frozen = by_text["A mixture of transformers with a frozen VLM is too weak at generation"]
    assert frozen["verdict"] == claims.HOLDS
    assert frozen["comparisons"][0]["mean"] == pytest.approx(0.2967, abs=1e-3)
    assert by_text["The VLM skip carries part of the deep input"]["verdict"] == claims.FAILS
    raised = by_text["Stage 3 raises generation over stage 1"]
    assert [row["verdict"] for row in raised["comparisons"]] == [claims.HOLDS, claims.UNDECIDED]
    assert raised["verdict"] == claims.UNDECIDED and raised["comparisons"][0]["seeds"] == 3
    text = claims.markdown(claims.evaluate(results))
    assert "| generation: pretzel - stage1 | +0.220 ± 0.050 (3) | > 0 | holds |" in text
    assert "not run" in text
    for claim in claims.CLAIMS:
        for comparison in claim.comparisons:
            assert {comparison.first, comparison.second} <= {*rows.ROWS, claims.STAGE1, ""}
            assert comparison.metric in table.METRICS


def test_the_seconds_of_every_run_are_measured_or_estimated(tmp_path):
    cfg = result(tmp_path, "pretzel", 0)
    judged(tmp_path / "pretzel" / "0", generation=0.5, reasoning=0.5)

    def settings(row, seed, stage):
        return cfg

    todo = [jobs.Job("pretzel"), jobs.Job("pretzel", 1)]
    lines = times.markdown(todo, epath.Path(tmp_path), settings, 16).splitlines()
    assert lines[2] == "| pretzel, seed 0 | 69 | measured |"
    seconds = times.estimate(cfg, 3, 16, times.DEFAULT_RATE)
    assert lines[3] == f"| pretzel, seed 1 | {seconds:,.0f} | estimated |"
    assert lines[5] == f"| those that are left | {seconds:,.0f} | at 65 GFLOP/s |"
    assert 100 < seconds < 3000 and times.estimate(cfg, 1, 0, 1e30) == times.COMPILE
