"""Every evaluation of a tiny random STARFlow2: figures, files, and likelihoods by another way."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from helpers.starflow2_folders import PIXELS

from starflow2_jax import evaluate
from starflow2_jax.data import chat_layout, records
from starflow2_jax.evaluation import ask, interleaved_likelihood, scoring_batches, vqa
from starflow2_jax.evaluation.shapes import cases, suite, vqa as shapes_vqa
from starflow2_jax.inference import load, vlm
from starflow2_jax.inference.prompts import Part
from starflow2_jax.shapes import tasks as shapes_tasks
from starflow2_jax.training.tasks import vlm as vlm_task


@pytest.fixture(scope="module")
def model(parts):
    return load.load(parts[1])


def run_verb(verb, *flag_words, argv=()):
    values = flags.FlagValues()
    evaluate.define(values)
    values(["evaluate", *map(str, flag_words)])
    evaluate.main(verb, [*map(str, argv)], values)


# Every section is a few programs to compile.
FAST_SECTIONS = ("generation", "understanding")


@pytest.mark.parametrize(
    "sections", [FAST_SECTIONS, pytest.param(suite.SECTIONS, marks=pytest.mark.slow)]
)
def test_all_writes_a_page_figures_and_sheets(parts, tmp_path, capsys, sections):
    out = tmp_path / "out"
    only = () if sections == suite.SECTIONS else ("--only", ",".join(sections))
    argv = ("--model", parts[1], "--n", 1, "--out", out, *only)
    run_verb("all", *argv)
    printed = capsys.readouterr().out
    names = {path.name for path in out.iterdir()}
    assert {"report.html", "shapes.json", "generation_best.png", "generation_random.png",
            "generation_failed.png", "understanding.png"} <= names  # fmt: skip
    result = json.loads((out / "shapes.json").read_text())
    assert tuple(result["sections"]) == sections and not result["not_run"]
    counts = {"t2i": 8, "question": 16, "edit": 10, "reason": 6, "reason_free": 6, "text": 5}
    tasks = [task for name in sections for task in suite.TASKS.get(name, ())]
    assert result["cases"] == {task: counts[task] for task in tasks}
    assert len(result["samples"]["generation"]) == 8
    understanding = result["sections"]["understanding"]
    assert set(understanding["references"]) == {"vlm_baseline", "vlm_baseline_blank_image"}
    assert understanding["score"]["seen"]["mean"]["count"] == 8
    assert result["model"]["step"] == 1 and result["model"]["sha256"]
    assert re.search(r"\ngeneration +0\.\d+ \(", printed) and "written" in printed
    if sections == FAST_SECTIONS:
        # The folder is compared with the model, which is measured again: no answer differs.
        run_verb("compare", *argv[2:4], *only, argv=(out, parts[1]))
        table = capsys.readouterr().out.splitlines()
        assert table[0].startswith("A  ") and "step 1" in table[0]
        rows = [line for line in table if line.startswith(("generation", "understanding"))]
        assert len(rows) == 4 and all("+0.000 (" in row and "better" not in row for row in rows)
    with pytest.raises(FileExistsError, match="out exists already; --overwrite replaces it"):
        run_verb("all", *argv)
    if sections != suite.SECTIONS:
        return
    assert {"editing.png", "reasoning.png"} <= names and "text per token" in printed
    for task, kinds in (("t2i", {"image"}), ("question", {"text"}), ("reason", {"image", "text"})):
        row = result["sections"]["likelihood"][task]["seen"]
        assert set(row) == {*kinds, "per_record"} and all(
            np.isfinite(row[kind]["nll"]) for kind in kinds
        )


def test_the_showcase_is_one_page_of_examples(parts, tmp_path, capsys):
    out = tmp_path / "examples"
    argv = (
        "--model",
        parts[1],
        "--n",
        1,
        "--out",
        out,
        "--only",
        "generation",
        "--note",
        "A <note>",
    )
    run_verb("showcase", *argv)
    page = (out / "showcase.html").read_text()
    result = json.loads((out / "shapes.json").read_text())
    assert {name: len(rows) for name, rows in result["samples"].items()} == {
        "prompt": 1, "generation": 6
    }  # fmt: skip
    assert page.count('<img alt="') == 7 and "A &lt;note&gt;" in page
    assert "a red circle above a blue square" in page and 'class="no"' in page
    assert result["training"] == [
        {"name": "", "step": 1, "rows": result["training"][0]["rows"],
         "trainable": ["adapter", "shallow", "deep", "skip"]}
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert "drawings from captions are right" in printed and f"{out}/showcase.html" in printed
    with pytest.raises(ValueError, match="showcase: --model and --out are needed"):
        run_verb("showcase", "--model", parts[1])


def test_shapes_takes_folders_and_sections(parts, tmp_path, capsys):
    for task, count in (("text", 6), ("question", 8)):
        rows = shapes_tasks.make_records(2, count, PIXELS, tasks=[task])
        records.write(tmp_path / task, rows)
    argv = ("--model", parts[1], "--data", f"{tmp_path}/text,{tmp_path}/question")
    run_verb("shapes", *argv, "--only", "text,generation", "--json")
    result = json.loads(capsys.readouterr().out)
    assert result["not_run"] == {"generation": "no cases of task t2i"}
    assert set(result["sections"]) == {"text"} and len(result["data"]["fingerprints"]) == 2
    # The result of a run is written to its folder.
    files = [path.name for path in Path(parts[1], "evaluation").iterdir()]
    assert files == ["shapes_00000001_text-question.json"]
    with pytest.raises(FileExistsError):
        run_verb("shapes", *argv, "--only", "text")
    for message, bad in (
        (r"--only: unknown section 'edits'; did you mean 'editing'\?", ("--only", "edits")),
        ("--model is needed", ("--model", "")),
    ):
        with pytest.raises(ValueError, match=message):
            run_verb("shapes", *argv, *bad)


def test_answers_do_not_depend_on_the_batch_size(model):
    questions = cases.generate(1, 1, PIXELS, ["question"])
    prompts = [case.prompt for case in questions]
    texts = {}
    for batch_size in (3, 16):
        answer_fn = suite.make_answer_fn(model, questions, batch_size=batch_size)
        texts[batch_size] = [ask.answer_text(parts) for parts in answer_fn(prompts, "text")]
    assert texts[3] == texts[16] and len(set(texts[16])) > 1
    # The noise of a prompt's image depends on its position alone.
    first_answers = suite.make_answer_fn(model, questions)(prompts[:6], "text")
    assert ask.answer_text(first_answers[5]) == texts[16][5]
    order = ask.batch_order([3, 9, 1, 7, 8], 2)
    assert sorted(order) == [0, 1, 2, 3, 4] and order[::2] == [1, 4, 3]


def test_likelihood_of_records_is_that_of_their_parts(model):
    captions = [case.record for case in cases.generate(1, 1, PIXELS, ["t2i"])]
    sums, x = interleaved_likelihood.score_records(model, captions, batch_size=3)
    assert len(x) == len(captions) == 8
    nll = interleaved_likelihood.per_dim(sums)["nats_per_dim"] * sums["count"]
    conversations = [
        [Part("text", "user", record.segs[0].s), Part("image", "assistant", latent=latent)]
        for record, latent in zip(captions, x)
    ]
    expected = [-row[1] for row in model.log_likelihood(conversations)]
    np.testing.assert_allclose(nll, expected, rtol=1e-4)
    # Without text the likelihood is another, of the same latents.
    no_text, same = interleaved_likelihood.score_records(model, captions, batch_size=8, null="text")
    np.testing.assert_array_equal(x, same)
    assert (np.abs(no_text["half_square"] - sums["half_square"]) > 1e-3).all()


def test_text_skill_of_the_vlm_is_that_of_other_programs(parts, model):
    """Compare with the VLM's own program, and with the Pretzel without its skips."""
    rows = [case.record for case in cases.generate(0, 2, PIXELS, ["text"])]
    skill = interleaved_likelihood.measure_text_skill(model, rows, batch_size=4)
    reference = vlm.load(str(parts[0] / "vlm"))
    nll = tokens = 0.0
    for batch, count in scoring_batches.batches(rows, model.tokenizer, 4, size=4):
        images = np.zeros((len(batch["ids"]), 1, PIXELS, PIXELS, 3), np.uint8)
        scores = vlm.score(reference, {**batch, "images": images})
        nll += scores["nll"][:count].sum()
        tokens += scores["tokens"][:count].sum()
    assert skill["vlm"]["nll"] == pytest.approx(nll / tokens, abs=2e-5)
    zero_skip = jax.tree.map(np.zeros_like, model.params["skip"])
    without_skip = dataclasses.replace(model, params={**model.params, "skip": zero_skip})
    same = interleaved_likelihood.measure_text_skill(without_skip, rows, batch_size=6)
    assert same["model"]["nll"] == pytest.approx(skill["vlm"]["nll"], abs=2e-5)
    assert abs(same["difference"]["nll"]) < 2e-5
    difference = skill["model"]["nll"] - skill["vlm"]["nll"]
    assert skill["difference"]["nll"] == pytest.approx(difference, abs=3e-5)
    assert abs(difference) > 1e-3


def test_likelihood_of_a_folder_weighs_dimensions_and_tokens_alike(parts, tmp_path, capsys):
    mixed = list(shapes_tasks.make_records(3, 6, PIXELS, tasks=["edit", "question", "t2i"]))
    records.write(tmp_path / "data", mixed)
    argv = ("--model", parts[1], "--data", tmp_path / "data", "--out", tmp_path / "result.json")
    run_verb("likelihood", *argv, "--batch_size", 4)
    assert "likelihood, records, all, image: " in capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    figures = result["sections"]["likelihood"]["records"]["all"]
    model = load.load(parts[1])
    sums = interleaved_likelihood.score_records(model, mixed, batch_size=6)[0]
    has_image = sums["count"] > 0
    assert has_image.tolist() == [True, False, True] * 2 and figures["image"]["records"] == 4
    # The beginning of an image and the end of the turn are tokens, too.
    assert figures["text"]["records"] == 6 and (sums["text/count"][has_image] == 2).all()
    assert figures["text"]["nll"] == pytest.approx(
        sums["text/nll"].sum() / sums["text/count"].sum(), abs=2e-5
    )


def test_a_vlm_scores_cases_like_the_records_of_a_folder(parts, tmp_path):
    reference = vlm.load(str(parts[0] / "vlm"))
    questions = cases.generate(0, 1, PIXELS, ["question"])
    questions = [case for case in questions if not case.is_held_out]
    rows = [case.record for case in questions]
    records.write(tmp_path / "data", rows)
    options = vlm_task.data_options(
        reference.cfg,
        reference.model_config,
        path=str(tmp_path / "data"),
        mixture=(),
        tokenizer=reference.tokenizer_folder,
    )

    def score(batch):
        return vlm.score(reference, batch)

    expected = {a.id: (a.nll, a.correct) for a in vqa.score_answers(score, options)}
    tokenizer = chat_layout.open_tokenizer(reference.tokenizer_folder)
    batches = scoring_batches.batches(rows, tokenizer, 4, size=3)
    nll = [value for batch, count in batches for value in score(batch)["nll"][:count, 0]]
    assert nll == pytest.approx([expected[case.id][0] for case in questions], rel=1e-4)
    correct = [expected[case.id][1] for case in questions]
    assert shapes_vqa.vlm_is_correct(reference, questions) == correct
    large = cases.generate(0, 1, 32, ["question"])
    with pytest.raises(ValueError, match=r"shape \(32, 32, 3\), but the VLM reads .* 16 x 16"):
        shapes_vqa.vlm_is_correct(reference, large)


def test_sections_that_a_stage_has_not_trained_are_named(model):
    def with_zeros(name, part):
        zeros = jax.tree.map(np.zeros_like, model.params[name][part])
        subtree = {**model.params[name], part: zeros}
        return dataclasses.replace(model, params={**model.params, name: subtree})

    stage1, stage2 = with_zeros("adapter", "down"), with_zeros("deep", "proj_out")
    assert set(suite.unsupported_sections(stage1)) == {"understanding", "reasoning"}
    assert set(suite.unsupported_sections(stage2)) == {"generation", "editing", "reasoning"}
    assert suite.unsupported_sections(model) == {}
    reasons = suite.unsupported_sections(dataclasses.replace(model, codec=None))
    assert "codec" in reasons["generation"]


def test_understanding_of_a_vlm_compares_with_gray_images(parts, capsys):
    folder = parts[0] / "vlm"
    run_verb("understanding", "--model", folder, "--data", parts[0] / "data", "--json")
    result = json.loads(capsys.readouterr().out)
    assert set(result["baselines"]) == {"blank_image"}
    counts = [
        table["all"]["count"] for table in (result["kinds"], result["baselines"]["blank_image"])
    ]
    assert counts[0] == counts[1] > 0
