"""A tiny random STARFlow2 put to every task: figures, files, and likelihoods by another way."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from helpers.starflow2_folders import PIXELS

from starflow2_jax import evaluate
from starflow2_jax.data import records
from starflow2_jax.evaluation import interleaved_likelihood, scoring_batches, vqa
from starflow2_jax.evaluation.shapes import ask as asking, cases, suite, vqa as questions
from starflow2_jax.inference import load, vlm as readers
from starflow2_jax.inference.prompts import Part
from starflow2_jax.shapes import tasks as shapes_tasks
from starflow2_jax.training.tasks import vlm


@pytest.fixture(scope="module")
def model(parts):
    return load.load(parts[1])


def ran(verb, *words):
    values = flags.FlagValues()
    evaluate.define(values)
    values(["evaluate", *map(str, words)])
    evaluate.main(verb, [], values)


# Every section is a few programs to compile.
SOME = ("generation", "understanding")


@pytest.mark.parametrize("only", [SOME, pytest.param(suite.SECTIONS, marks=pytest.mark.slow)])
def test_all_writes_a_page_figures_and_sheets(parts, tmp_path, capsys, only):
    out, whole = tmp_path / "out", only == suite.SECTIONS
    words = ("--model", parts[1], "--n", 1, "--out", out)
    ran("all", *words, *(() if whole else ("--only", ",".join(only))))
    said = capsys.readouterr().out
    names = {path.name for path in out.iterdir()}
    assert {"report.html", "shapes.json", "generation_best.png", "generation_random.png",
            "generation_failed.png", "understanding.png"} <= names  # fmt: skip
    result = json.loads((out / "shapes.json").read_text())
    assert tuple(result["sections"]) == only and not result["not_run"]
    counts = {"t2i": 8, "question": 16, "edit": 10, "reason": 6, "text": 5}
    asked = [task for section, task in suite.TASKS.items() if section in only]
    assert result["cases"] == {task: counts[task] for task in asked}
    assert len(result["samples"]["generation"]) == 8
    found = result["sections"]["understanding"]
    assert set(found["references"]) == {"own_eyes", "own_eyes_blank"}
    assert found["score"]["seen"]["mean"]["count"] == 8
    assert result["model"]["step"] == 1 and result["model"]["sha256"]
    assert "generation, seen: 0." in said and "written" in said
    with pytest.raises(FileExistsError, match="out is there already; --overwrite replaces it"):
        ran("all", *words)
    if not whole:
        return
    assert {"editing.png", "reasoning.png"} <= names and "text alone" in said
    for task, kinds in (("t2i", {"image"}), ("question", {"text"}), ("reason", {"image", "text"})):
        row = result["sections"]["likelihood"][task]["seen"]
        assert set(row) == kinds and all(np.isfinite(row[kind]["nats"]) for kind in kinds)


def test_shapes_takes_folders_and_sections(parts, tmp_path, capsys):
    for task, count in (("text", 6), ("question", 8)):
        made = shapes_tasks.make_records(2, count, PIXELS, tasks=[task])
        records.write(tmp_path / task, made)
    words = ("--model", parts[1], "--data", f"{tmp_path}/text,{tmp_path}/question")
    ran("shapes", *words, "--only", "text,generation", "--json")
    result = json.loads(capsys.readouterr().out)
    assert result["not_run"] == {"generation": "no cases of task t2i"}
    assert set(result["sections"]) == {"text"} and len(result["data"]["fingerprints"]) == 2
    # A run keeps its figures.
    kept = [path.name for path in Path(parts[1], "evaluation").iterdir()]
    assert kept == ["shapes_00000001_text-question.json"]
    with pytest.raises(FileExistsError):
        ran("shapes", *words, "--only", "text")
    for message, bad in (
        (r"--only: unknown section 'edits'; did you mean 'editing'\?", ("--only", "edits")),
        ("--model is needed", ("--model", "")),
    ):
        with pytest.raises(ValueError, match=message):
            ran("shapes", *words, *bad)


def test_answers_do_not_depend_on_how_many_are_asked_together(model):
    given = cases.drawn(1, 1, PIXELS, ["question"])
    prompts = [case.given for case in given]
    rows = {}
    for together in (3, 16):
        ask = suite.asker(model, given, rows=together)
        rows[together] = [asking.said(row) for row in ask(prompts, "words")]
    assert rows[3] == rows[16] and len(set(rows[16])) > 1
    # The noise on its picture is that of its place.
    fewer = suite.asker(model, given)(prompts[:6], "words")
    assert asking.said(fewer[5]) == rows[16][5]
    order = asking._order([3, 9, 1, 7, 8], 2)
    assert sorted(order) == [0, 1, 2, 3, 4] and order[::2] == [1, 4, 3]


def test_likelihood_is_that_of_its_parts(model):
    given = [case.record for case in cases.drawn(1, 1, PIXELS, ["t2i"])]
    rows, x = interleaved_likelihood.sums(model, given, size=3)
    assert len(x) == len(given) == 8
    nats = interleaved_likelihood.per_dim(rows)["nats_per_dim"] * rows["count"]
    told = [
        [Part("text", "user", record.segs[0].s), Part("image", "assistant", latent=latent)]
        for record, latent in zip(given, x)
    ]
    expected = [-row[1] for row in model.log_likelihood(told)]
    np.testing.assert_allclose(nats, expected, rtol=1e-4)
    # Without words it is another likelihood, of the same latents.
    silent, same = interleaved_likelihood.sums(model, given, size=8, null="text")
    np.testing.assert_array_equal(x, same)
    assert (np.abs(silent["half_square"] - rows["half_square"]) > 1e-3).all()


def test_text_alone_is_that_of_the_vlm(parts, model):
    """Against the reader's program, and against the Pretzel whose skips are taken out."""
    given = cases.drawn(0, 2, PIXELS, ["text"])
    found = interleaved_likelihood.skill(model, given, size=4)
    reader = readers.load(str(parts[0] / "vlm"))
    nats = tokens = 0.0
    for batch, count in scoring_batches.batches(
        [c.record for c in given], model.tokenizer, 4, size=4
    ):
        images = np.zeros((len(batch["ids"]), 1, PIXELS, PIXELS, 3), np.uint8)
        scores = readers.score(reader, {**batch, "images": images})
        nats += scores["nll"][:count].sum()
        tokens += scores["tokens"][:count].sum()
    assert found["vlm"]["nats"] == pytest.approx(nats / tokens, abs=2e-5)
    silent = jax.tree.map(np.zeros_like, model.params["skip"])
    alone = dataclasses.replace(model, params={**model.params, "skip": silent})
    same = interleaved_likelihood.skill(alone, given, size=6)
    assert same["model"]["nats"] == pytest.approx(found["vlm"]["nats"], abs=2e-5)
    assert abs(same["difference"]["nats"]) < 2e-5
    more = found["model"]["nats"] - found["vlm"]["nats"]
    assert found["difference"]["nats"] == pytest.approx(more, abs=3e-5) and abs(more) > 1e-3


def test_likelihood_of_a_folder(parts, tmp_path, capsys):
    """Of records of several kinds together: every dimension and token weighs alike."""
    made = list(shapes_tasks.make_records(3, 6, PIXELS, tasks=["edit", "question", "t2i"]))
    records.write(tmp_path / "data", made)
    words = ("--model", parts[1], "--data", tmp_path / "data", "--out", tmp_path / "found.json")
    ran("likelihood", *words, "--batch_size", 4)
    assert "likelihood, records, all, image: " in capsys.readouterr().out
    result = json.loads((tmp_path / "found.json").read_text())
    found = result["sections"]["likelihood"]["records"]["all"]
    model = load.load(parts[1])
    rows = interleaved_likelihood.sums(model, made, size=6)[0]
    drawn = rows["count"] > 0
    assert drawn.tolist() == [True, False, True] * 2 and found["image"]["records"] == 4
    # The beginning of a picture and the end of the turn are tokens, too.
    assert found["text"]["records"] == 6 and (rows["text/count"][drawn] == 2).all()
    assert found["text"]["nats"] == pytest.approx(
        rows["text/nll"].sum() / rows["text/count"].sum(), abs=2e-5
    )


def test_a_reader_scores_rows_as_it_does_those_of_a_folder(parts, tmp_path):
    reader = readers.load(str(parts[0] / "vlm"))
    given = cases.drawn(0, 1, PIXELS, ["question"])
    records.write(tmp_path / "data", [case.record for case in given if case.seen])
    own = {"path": str(tmp_path / "data"), "mixture": (), "tokenizer": reader.tokenizer_folder}
    options = vlm.data_options(reader.cfg, reader.model_config, **own)
    score = lambda batch: readers.score(reader, batch)
    expected = {a.id: (a.nats, a.right) for a in vqa.answers(score, options)}
    seen = [case for case in given if case.seen]
    held = model_tokenizer(reader)
    laid = scoring_batches.batches([case.record for case in seen], held, 4, size=3)
    nats = [row for batch, count in laid for row in score(batch)["nll"][:count, 0]]
    assert nats == pytest.approx([expected[case.id][0] for case in seen], rel=1e-4)
    assert questions.by_reader(reader, seen) == [expected[case.id][1] for case in seen]
    with pytest.raises(ValueError, match=r"a picture \(32, 32, 3\), the VLM reads 16"):
        questions.by_reader(reader, cases.drawn(0, 1, 32, ["question"]))


def model_tokenizer(reader):
    from starflow2_jax.data import chat_layout

    return chat_layout.open_tokenizer(reader.tokenizer_folder)


def test_what_a_stage_has_not_learnt_is_said(model):
    zero = lambda name, part: {
        **model.params,
        name: {**model.params[name], part: jax.tree.map(np.zeros_like, model.params[name][part])},
    }
    first = dataclasses.replace(model, params=zero("adapter", "down"))
    assert set(suite.unable(first)) == {"understanding", "editing", "reasoning"}
    second = dataclasses.replace(model, params=zero("deep", "proj_out"))
    assert set(suite.unable(second)) == {"generation", "editing", "reasoning"}
    assert suite.unable(model) == {}
    bare = suite.unable(dataclasses.replace(model, codec=None))
    assert "codec" in bare["generation"]
