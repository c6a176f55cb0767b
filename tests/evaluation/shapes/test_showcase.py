"""The page of examples, and the verdicts in plain words."""

import numpy as np
import pytest

from starflow2_jax.evaluation.shapes import accuracy, cases as cases_lib, showcase, skills, suite
from starflow2_jax.evaluation.shapes.cases import Sample
from starflow2_jax.shapes import detector, generator

pytestmark = pytest.mark.fast


def test_examples_are_of_every_kind_and_of_what_training_shows():
    groups = showcase.make_cases(0, 64, suite.SECTIONS)
    assert list(groups) == list(showcase.EXAMPLES) == list(showcase.TITLES)
    assert len({case.id for case in groups["prompt"]}) == 4
    assert len(groups["generation"]) == 2 * len(generator.TAGS)
    assert not any(case.is_held_out for group in groups.values() for case in group)
    assert list(showcase.make_cases(0, 64, ("editing",), 1)) == ["editing"]
    case = groups["prompt"][0]
    assert case.prompt == (showcase.PROMPT,)
    assert detector.check_facts(detector.detect(case.reference_image), case.facts).correct
    upside_down = case.reference_image[::-1]
    assert not detector.check_facts(detector.detect(upside_down), case.facts).correct


def test_the_page_shows_pictures_texts_and_verdicts(tmp_path):
    groups = showcase.make_cases(0, 64, ("editing", "reasoning"), 1)
    samples = {
        name: [
            Sample(c, (*c.prompt_images, c.reference_image), "two", k == 0, "<none>", None)
            for k, c in enumerate(group)
        ]
        for name, group in groups.items()
    }
    result = {
        "options": {"seed": 0},
        "correct": {"editing": 1, "reasoning": 1},
        "samples": samples,
        "not_run": {"generation": "no codec"},
    }
    showcase.write(tmp_path / "page.html", result, samples)
    page = (tmp_path / "page.html").read_text()
    assert page.count("<img ") == 2 * (5 + 6)
    assert page.count('class="yes">right') == 2 and page.count("wrong: &lt;none&gt;") == 9
    assert page.count("Its answer: two") == 6 and "generation: no codec" in page
    assert "<b>1 of 5</b>" in page
    assert groups["editing"][0].prompt_text in page
    lines = showcase.summary_lines(result, "out")
    assert lines[0] == "1 of 5 edits are right and keep the rest" and lines[-1].endswith(
        "out/showcase.html"
    )


def sections_of(correct, **baselines):
    """Return the figures of one section from the cases that are correct, by baseline."""
    cases = [
        case
        for case in cases_lib.generate(0, 20, 16, ["t2i"])
        if case.tag in generator.SINGLE_OBJECT_TAGS and not case.is_held_out
    ]
    count = len(cases)
    assert count == 40

    def row(number):
        return (np.arange(count) % 20 < number / 2).astype(float)

    groups = {name: row(number) for name, number in baselines.items()}
    return {"generation": accuracy.compare(cases, row(correct), groups)}


def test_a_skill_is_above_all_of_its_baselines():
    (verdict,) = skills.judge(sections_of(30, chance=8, blank_image=0, shuffled=8))
    assert verdict["above"] and verdict["count"] == 40 and verdict["correct"] == 0.75
    (line,) = skills.lines([verdict])
    assert line.startswith("It can draw what a caption asks for. 0.750 (0.")
    assert line.endswith("above (chance; a blank image; shuffled).")
    page = skills.section([verdict])
    assert page.count("<td>above</td>") == 3 and "not above</td>" not in page
    (verdict,) = skills.judge(sections_of(12, chance=10, blank_image=0, shuffled=10))
    assert not verdict["above"]
    assert "It can only partly draw" in skills.lines([verdict])[0]
    assert "above (a blank image), not above (chance; shuffled)." in skills.lines([verdict])[0]
    # Two right drawings of forty are not above none.
    (verdict,) = skills.judge(sections_of(2, chance=10, blank_image=0, shuffled=2))
    assert skills.lines([verdict])[0].startswith("It cannot draw what a caption asks for. 0.050")
    assert skills.section([verdict]).count("not above</td>") == 3
    assert skills.judge({}) == [] and skills.section([]) == ""
