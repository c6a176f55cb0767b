"""The shapes suite: an oracle scores 1 everywhere, and baselines score as they should."""

import dataclasses
import json
import re

import numpy as np
import pytest

from starflow2_jax.data import records
from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.evaluation import stats
from starflow2_jax.evaluation.shapes import (
    accuracy,
    cases as cases_lib,
    contact_sheets,
    editing,
    example_cards,
    reasoning,
    report,
    suite,
    summary,
)
from starflow2_jax.inference.prompts import Part
from starflow2_jax.shapes import generator, holdout, tasks as shapes_tasks

PIXELS = 64
SECTIONS = ("generation", "understanding", "editing", "reasoning")


@pytest.fixture(scope="module")
def cases():
    return cases_lib.generate(0, 4, PIXELS)


def prompt_key(prompt):
    return tuple(part if isinstance(part, str) else part.tobytes() for part in prompt)


def oracle(cases):
    """Return an `AnswerFn` that answers every case with its reference.

    It answers unknown prompts with an empty background and "?".
    """
    cases_by_prompt = {prompt_key(case.prompt): case for case in cases}
    background = generator.draw(generator.Scene("cream", 0.0, ()), PIXELS)

    def answer(prompts, kind):
        answers = []
        for prompt in prompts:
            case = cases_by_prompt.get(prompt_key(p for p in prompt if not isinstance(p, Part)))
            pixels = background if case is None else case.reference_image
            text = "?" if case is None else case.reference_text
            image_part = Part("image", image=pixels, log_likelihood=-1.0)
            text_part = Part("text", text=text, log_likelihood=-1.0)
            parts = {"image": [image_part], "text": [text_part], "both": [image_part, text_part]}
            answers.append(parts[kind])
        return answers

    return answer


def perfect_codec(images):
    return images


@pytest.fixture(scope="module")
def oracle_run(cases):
    return suite.run(cases, oracle(cases), only=SECTIONS, reconstruct_fn=perfect_codec)


def scores(table):
    return {part: None if t is None else t["mean"]["correct"] for part, t in table.items()}


ALL, NONE = {"seen": 1.0, "held_out": 1.0}, {"seen": 0.0, "held_out": 0.0}


@pytest.mark.fast
def test_an_oracle_is_correct_in_everything(oracle_run):
    sections = oracle_run[0]["sections"]
    for name in ("generation", "understanding", "reasoning"):
        assert scores(sections[name]["score"]) == ALL, name
    assert scores(sections["reasoning"]["image"]["score"]) == ALL
    for measure in editing.MEASURES:
        assert scores(sections["editing"][measure]["score"]) == ALL
        assert scores(sections["editing"][measure]["ceilings"]["reference_image"]) == ALL
    assert sections["editing"]["psnr_outside_edit"]["score"] == pytest.approx(68.1, abs=0.1)
    assert set(sections["generation"]["score"]["seen"]["tags"]) == set(generator.TAGS)
    assert set(sections["generation"]["score"]["held_out"]["tags"]) == set(cases_lib.PAIR_TAGS)
    for name in ("generation", "editing", "reasoning"):
        assert all(sample.correct and not sample.reason for sample in oracle_run[1][name])


def test_baselines_do_not_reach_the_oracle(oracle_run):
    sections = oracle_run[0]["sections"]
    generation = sections["generation"]["baselines"]
    assert scores(generation["blank_image"]) == NONE
    for name in ("shuffled", "chance", "constant_image"):
        assert all(value < 0.7 for value in scores(generation[name]).values()), name
    # The oracle's images are the references, so two baselines are the same.
    assert generation["shuffled"] == generation["chance"]
    edits = sections["editing"]
    assert scores(edits["changed"]["baselines"]["copy"]) == NONE
    assert scores(edits["preserved"]["baselines"]["copy"]) == ALL
    for name in ("copy", "blank_source", "blank_image"):
        assert scores(edits["both"]["baselines"][name]) == NONE, name
    assert scores(edits["preserved"]["baselines"]["blank_image"]) == NONE
    for section, blank in (("understanding", "blank_image"), ("reasoning", "blank_source")):
        baselines = sections[section]["baselines"]
        assert scores(baselines[blank]) == NONE
        for name in ("chance", "most_frequent"):
            assert all(0 < value < 1 for value in scores(baselines[name]).values())
    # The oracle needs no intermediate image to know the text.
    assert scores(sections["reasoning"]["baselines"]["direct_answer"]) == ALL


@pytest.mark.fast
def test_edits_are_judged_by_what_changes_and_what_stays(cases):
    case = next(c for c in cases if c.tag == "recolor" and len(c.scenes[0].objects) == 3)
    source, target = case.scenes

    def judge(scene):
        return editing.judge(generator.draw(scene, PIXELS), case)

    assert judge(target) == {"changed": True, "preserved": True, "both": True, "reason": ""}
    assert judge(source)["changed"] is False and judge(source)["preserved"] is True
    assert judge(source)["reason"].startswith("expected")
    # What stays may not move, nor go, and nothing may come.
    a, b, c = target.objects
    swapped = (a, dataclasses.replace(b, x=c.x, y=c.y), dataclasses.replace(c, x=b.x, y=b.y))
    verdict = judge(dataclasses.replace(target, objects=swapped))
    assert verdict["changed"] and not verdict["preserved"] and not verdict["both"]
    assert "is not where it was" in verdict["reason"]
    verdict = judge(dataclasses.replace(target, objects=(a, b)))
    assert not verdict["changed"] and not verdict["preserved"]
    used_shapes = {o.shape for o in (*source.objects, *target.objects)}
    extra = generator.place_object(
        np.random.default_rng(0),
        target.objects,
        min(set(generator.SHAPES) - used_shapes),
        "pink",
        "small",
    )
    verdict = judge(dataclasses.replace(target, objects=(*target.objects, extra)))
    assert verdict["changed"] and verdict["preserved"] and not verdict["both"]
    assert verdict["reason"] == "4 objects, expected 3"


def test_cases_name_what_of_them_is_held_out(cases):
    for case in cases:
        if case.task == "t2i":
            named = case.scenes[0].objects if case.tag in cases_lib.PAIR_TAGS else ()
            assert case.is_held_out == any(map(holdout.is_withheld_pair, named))
        else:
            assert case.holdout == case.record.meta["withheld"]

    def count(task, held_out):
        return sum(c.task == task and c.is_held_out == held_out for c in cases)

    for task, tags in cases_lib.TAGS.items():
        assert count(task, False) == 4 * len(tags), task
    assert count("t2i", True) == 4 and count("question", True) == 2 * 8
    assert count("text", True) == 2 * 2
    assert len({case.id for case in cases}) == len(cases)
    edits = cases_lib.generate(0, 4, PIXELS, ["edit"])
    assert [c.id for c in edits] == [c.id for c in cases if c.task == "edit"]
    assert {c.record.src for c in edits} == {f"shapes:{cases_lib.FIRST_SEED}"}


def test_folders_provide_the_cases_of_their_records(tmp_path, cases):
    tasks = ["t2i", "question", "multi"]
    records.write(tmp_path / "mixed", shapes_tasks.make_records(5, 96, PIXELS, tasks=tasks))
    edits = [case.record for case in cases if case.task == "edit" and not case.is_held_out]
    records.write(tmp_path / "edits", edits)
    loaded = cases_lib.read([str(tmp_path / "mixed"), str(tmp_path / "edits")])
    assert {c.task for c in loaded} == {"t2i", "question", "edit"}
    assert len(loaded) == 64 + len(edits)
    limited = cases_lib.read([str(tmp_path / "mixed")], n=2)
    groups = [(c.task, c.tag, c.is_held_out) for c in limited]
    assert all(groups.count(group) <= 2 for group in groups)
    records.write(tmp_path / "none", shapes_tasks.make_records(0, 4, PIXELS, tasks=["multi"]))
    with pytest.raises(DatasetError, match=r"no record of the shapes benchmark has one of .* t2i"):
        cases_lib.read([str(tmp_path / "none")])


@pytest.mark.fast
def test_means_weigh_tags_alike(cases):
    captions = [c for c in cases if c.task == "t2i" and not c.is_held_out]
    colors = [c for c in captions if c.tag == "colors"][:1]
    subset = colors + [c for c in captions if c.tag != "colors"]
    correct = [c.tag == "colors" for c in subset]
    table = accuracy.by_tag(subset, correct)
    assert table["mean"]["correct"] == pytest.approx(1 / 6, abs=1e-4)
    assert table["tags"]["colors"] == stats.accuracy([True])
    # One color of six tags is worth far fewer cases than its 21.
    effective_count = 36 / (1 + 5 / 4)
    expected = stats.wilson_interval(effective_count / 6, effective_count)
    assert table["mean"]["correct_95"] == expected
    candidates = accuracy.other_cases(subset)
    assert all(i not in group and group for i, group in enumerate(candidates))
    assert all(
        subset[j].tag == subset[i].tag for i, group in enumerate(candidates[1:], 1) for j in group
    )
    next_cases = accuracy.next_in_tag(subset)
    assert sorted(next_cases[1:]) == list(range(1, len(subset)))


def test_page_lines_and_sheets_show_the_result(tmp_path, oracle_run):
    result, samples = oracle_run
    result = {**result, "not_run": {"likelihood": "no <model>"}}
    sheets = contact_sheets.make(samples)
    assert set(sheets) == {"generation_best", "generation_random", "understanding", "editing",
                           "reasoning"}  # fmt: skip
    wrong = [s._replace(correct=False, reason="found none") for s in samples["generation"]]
    assert "generation_failed" in contact_sheets.make({"generation": wrong})
    # Source, generated and reference image, twice a row.
    assert sheets["editing"].shape[1] == 4 + 6 * (2 * PIXELS + 4)
    report.write(tmp_path / "page.html", result, samples)
    page = (tmp_path / "page.html").read_text()
    # Two examples of every tag and one of those with held-out cases, each with all of its images.
    selected = example_cards.choose(samples["generation"])
    assert len(selected) == 2 * len(generator.TAGS) + len(cases_lib.PAIR_TAGS)
    for name in ("understanding", "editing", "reasoning"):
        selected += example_cards.choose(samples[name])
    num_images = sum(len(sample.images) for sample in selected)
    assert page.count("data:image/png;base64") == num_images and "<html" in page
    assert page.count("✓ right") == len(selected)
    assert "no &lt;model&gt;" in page and "color attr" in page and "own vision tower" in page
    assert "more correct with an image than without" in page
    assert "editing, preserved, held out" in page
    lines = summary.summary_lines(result)
    # The head, four capabilities, and what reasoning gains from its image.
    assert max(map(len, lines[:7])) < 160 and lines[7] == "not run: likelihood: no <model>"
    assert lines[1].startswith("generation") and lines[1].count("1.000 (") == 2
    assert re.search(r"shuffled 0\.\d{3}, chance 0\.\d{3}, codec reconstruction 1\.000", lines[1])
    assert re.search(r"\+0.000 \(-0.\d+ to \+0.\d+\) .* more correct with an image", lines[5])
    assert "more correct with its own image than with that of another case" in lines[6]
    assert lines[8].startswith("It can draw what a caption asks for.")
    verdict = example_cards.example(
        samples["editing"][0]._replace(
            correct=False, measures={"changed": True, "preserved": False, "both": False}, reason="<"
        )
    )
    assert "✗ wrong; change made: yes; rest kept: no; &lt;" in verdict
    assert verdict.index("source") < verdict.index("result") < verdict.index("expected")
    json.dumps([report.sample_row(s) for group in samples.values() for s in group])


def test_a_free_choice_is_judged_by_the_drawn_image(cases):
    """The correct answer after an image is what that image shows, whatever the reference shows."""
    free = [case for case in cases if case.task == "reason_free"]
    for case in free:
        verdict, answer = reasoning.read_image(case.reference_image, case)
        assert verdict.correct and answer == case.reference_text
        verdict, answer = reasoning.read_image(case.prompt_images[0], case)
        assert not verdict.correct and answer is None
    case = next(c for c in free if c.tag == "free_color")
    old, item = case.scenes[0].objects[0], case.scenes[1].objects[0]
    color = next(c for c in generator.COLORS if c not in (old.color, item.color))
    objects = (dataclasses.replace(item, color=color), *case.scenes[1].objects[1:])
    pixels = generator.draw(dataclasses.replace(case.scenes[1], objects=objects), PIXELS)

    def answer_fn(text, direct_text=""):
        """Return a function that draws the other color, and answers with these texts."""

        def answer(prompts, kind):
            parts = [Part("image", image=pixels, log_likelihood=-1.0)] * (kind != "text")
            return [[*parts, Part("text", text=text if parts else direct_text)] for _ in prompts]

        return answer

    def measure(*texts):
        figures, samples = reasoning.measure([case], answer_fn(*texts))
        part = "held_out" if case.is_held_out else "seen"
        rows = {name: t[part]["mean"]["correct"] for name, t in figures["baselines"].items()}
        row = figures["differences"]["direct_answer"][part]["mean"]
        return figures["score"][part]["mean"]["correct"], rows["direct_answer"], row, samples[0]

    score, direct, gain, sample = measure(color, item.color)
    assert (score, direct, gain["difference"]) == (1, 0, 1) and sample.reason == ""
    score, direct, gain, sample = measure(item.color, color)
    assert (score, direct, gain["difference"]) == (0, 1, -1)
    assert sample.reason == f"correct: {color}"
    pixels = case.prompt_images[0]  # no choice at all: what is said after it cannot be right
    score, direct, _, sample = measure(old.color, item.color)
    assert (score, direct) == (0, 1) and sample.reason.startswith("image: ")


@pytest.mark.fast
def test_differences_have_paired_intervals(cases):
    subset = [c for c in cases if c.task == "reason" and not c.is_held_out]
    first = [1.0] * len(subset)
    second = [float(k % 2) for k in range(len(subset))]
    table = accuracy.difference(subset, first, second)
    assert table["held_out"] is None
    mean = table["seen"]["mean"]
    values = np.subtract(first, second)
    assert mean["difference"] == pytest.approx(values.mean()) and mean["count"] == len(subset)
    assert mean["difference_95"][0] > 0 and mean["difference_95"][1] < 1
    # Equal answers differ by nothing, but a dozen pairs do not show that to the last digit.
    equal = accuracy.difference(subset, first, first)["seen"]["mean"]
    assert equal["difference"] == 0 and equal["difference_95"][0] == -equal["difference_95"][1] < 0


@pytest.mark.fast
def test_the_interval_of_pairs_is_that_of_agresti_and_min():
    """15 of 100 pairs speak for the first, 5 for the second."""
    values = [1.0] * 15 + [-1.0] * 5 + [0.0] * 80
    row = stats.mean_difference([values])
    center = 10 / 102
    half_width = stats.Z_95 * np.sqrt(21 / 102 - center**2) / np.sqrt(102)
    assert row["difference"] == 0.1
    expected = [center - half_width, center + half_width]
    np.testing.assert_allclose(row["difference_95"], expected, atol=1e-4)
    # Four pairs are no proof, as by McNemar's exact test.
    assert stats.mean_difference([[1.0] * 4 + [0.0] * 92])["difference_95"][0] < 0
    halves = stats.mean_difference([values[::2], values[1::2]])
    np.testing.assert_allclose(halves["difference_95"], row["difference_95"], atol=2e-3)


def test_an_answer_that_copies_the_image_depends_on_it(cases):
    """A model that reads its own image is wrong with the image of another case, or without one."""
    subset = [c for c in cases if c.tag == "zoom" and not c.is_held_out]
    oracle_fn = oracle(subset)
    answers = {c.reference_image.tobytes(): c.reference_text for c in subset}

    def answer(prompts, kind):
        if kind != "text":
            return oracle_fn(prompts, kind)
        inputs = [[p for p in prompt if isinstance(p, Part)] for prompt in prompts]
        texts = [answers[parts[0].image.tobytes()] if parts else "?" for parts in inputs]
        return [[Part("text", text=text)] for text in texts]

    figures, _ = reasoning.measure(subset, answer)
    rows = {name: scores(table)["seen"] for name, table in figures["baselines"].items()}
    assert scores(figures["score"])["seen"] == 1 and rows["direct_answer"] == 0
    assert scores(figures["ceilings"]["reference_image"])["seen"] == 1
    next_cases = [subset[j] for j in accuracy.next_in_tag(subset)]
    same = np.mean([a.reference_text == b.reference_text for a, b in zip(subset, next_cases)])
    assert rows["other_image"] == pytest.approx(same) and same < 1
    row = figures["differences"]["other_image"]["seen"]["mean"]
    assert row["difference"] == pytest.approx(1 - same, abs=1e-4)
