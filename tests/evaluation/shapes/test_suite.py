"""The tasks of the shapes world: an oracle scores 1 everywhere, and baselines as they should."""

import dataclasses
import json

import numpy as np
import pytest

from starflow2_jax.data import records
from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.evaluation.shapes import accuracy, cases, contact_sheets, editing, report, suite
from starflow2_jax.inference.prompts import Part
from starflow2_jax.shapes import generator, holdout, tasks as shapes_tasks

PIXELS = 64
ASKED = ("generation", "understanding", "editing", "reasoning")


@pytest.fixture(scope="module")
def given():
    return cases.drawn(0, 4, PIXELS)


def key(prompt):
    return tuple(part if isinstance(part, str) else part.tobytes() for part in prompt)


def oracle(given):
    """Answers every case as it should be; what it does not know with an empty ground and "?"."""
    known = {key(case.given): case for case in given}
    ground = generator.draw(generator.Scene("cream", 0.0, ()), PIXELS)

    def ask(prompts, kind):
        rows = []
        for prompt in prompts:
            asked = [part for part in prompt if not isinstance(part, Part)]
            case = known.get(key(asked))
            picture = ground if case is None else case.picture
            drawn = Part("image", image=picture, log_likelihood=-1.0)
            words = Part("text", text="?" if case is None else case.words, log_likelihood=-1.0)
            rows.append({"picture": [drawn], "words": [words], "both": [drawn, words]}[kind])
        return rows

    return ask


def through(images):
    return images


@pytest.fixture(scope="module")
def measured(given):
    return suite.run(given, oracle(given), only=ASKED, keeps=through)


def scores(table):
    return {part: None if t is None else t["mean"]["right"] for part, t in table.items()}


ALL, NONE = {"seen": 1.0, "withheld": 1.0}, {"seen": 0.0, "withheld": 0.0}


@pytest.mark.fast
def test_an_oracle_is_right_in_everything(measured):
    sections = measured[0]["sections"]
    for name in ("generation", "understanding", "reasoning"):
        assert scores(sections[name]["score"]) == ALL, name
    assert scores(sections["reasoning"]["picture"]["score"]) == ALL
    for measure in editing.MEASURES:
        assert scores(sections["editing"][measure]["score"]) == ALL
        assert scores(sections["editing"][measure]["ceilings"]["as_drawn"]) == ALL
    assert sections["editing"]["psnr_rest"]["score"] == pytest.approx(68.1, abs=0.1)
    assert set(sections["generation"]["score"]["seen"]["tags"]) == set(generator.TAGS)
    assert set(sections["generation"]["score"]["withheld"]["tags"]) == set(cases.NAMED)
    for name in ("generation", "editing", "reasoning"):
        assert all(sample.right and not sample.why for sample in measured[1][name])


def test_baselines_do_not_reach_it(measured):
    sections = measured[0]["sections"]
    drawn = sections["generation"]["baselines"]
    assert scores(drawn["blank_picture"]) == NONE
    for name in ("shuffled", "chance", "one_picture"):
        assert all(value < 0.7 for value in scores(drawn[name]).values()), name
    # The oracle's pictures are the right ones, so that two baselines are one.
    assert drawn["shuffled"] == drawn["chance"]
    edits = sections["editing"]
    assert scores(edits["changed"]["baselines"]["copy"]) == NONE
    assert scores(edits["kept"]["baselines"]["copy"]) == ALL
    for name in ("copy", "blind", "blank_picture"):
        assert scores(edits["both"]["baselines"][name]) == NONE, name
    assert scores(edits["kept"]["baselines"]["blank_picture"]) == NONE
    for name in ("understanding", "reasoning"):
        beside = sections[name]["baselines"]
        blind = "blank_picture" if name == "understanding" else "blind"
        assert scores(beside[blind]) == NONE
        for other in ("chance", "most_frequent"):
            assert all(0 < value < 1 for value in scores(beside[other]).values())
    # The model that answers at once is asked without a picture to draw, and knows the words.
    assert scores(sections["reasoning"]["baselines"]["without_picture"]) == ALL


@pytest.mark.fast
def test_edits_are_judged_by_what_changes_and_what_stays(given):
    case = next(c for c in given if c.tag == "recolor" and len(c.scenes[0].objects) == 3)
    source, target = case.scenes
    draw = lambda scene: generator.draw(scene, PIXELS)
    judged = lambda scene: editing.judge(draw(scene), case)
    assert judged(target) == {"changed": True, "kept": True, "both": True, "why": ""}
    assert judged(source)["changed"] is False and judged(source)["kept"] is True
    assert judged(source)["why"].startswith("expected")
    # What stays may not move, nor go, and nothing may come.
    a, b, c = target.objects
    swapped = (a, dataclasses.replace(b, x=c.x, y=c.y), dataclasses.replace(c, x=b.x, y=b.y))
    moved = dataclasses.replace(target, objects=swapped)
    told = judged(moved)
    assert told["changed"] and not told["kept"] and not told["both"]
    assert "is not where it was" in told["why"]
    gone = judged(dataclasses.replace(target, objects=(a, b)))
    assert not gone["changed"] and not gone["kept"]
    taken = {o.shape for o in (*source.objects, *target.objects)}
    rng = np.random.default_rng(0)
    new = generator.place_object(
        rng, target.objects, min(set(generator.SHAPES) - taken), "pink", "small"
    )
    more = judged(dataclasses.replace(target, objects=(*target.objects, new)))
    assert more["changed"] and more["kept"] and not more["both"]
    assert more["why"] == "4 objects, expected 3"


def test_cases_say_what_is_withheld(given):
    for case in given:
        if case.task == "t2i":
            named = case.scenes[0].objects if case.tag in cases.NAMED else ()
            assert case.seen == (not any(map(holdout.is_withheld_pair, named)))
        else:
            assert case.withheld == case.record.meta["withheld"]
    count = lambda task, seen: sum(c.task == task and c.seen == seen for c in given)
    for task, tags in cases.TAGS.items():
        assert count(task, True) == 4 * len(tags), task
    assert count("t2i", False) == 4 and count("question", False) == 2 * 8
    assert count("text", False) == 2 * 2
    assert len({case.id for case in given}) == len(given)
    again = cases.drawn(0, 4, PIXELS, ["edit"])
    assert [c.id for c in again] == [c.id for c in given if c.task == "edit"]
    assert {c.record.src for c in again} == {f"shapes:{cases.FIRST_SEED}"}


def test_folders_give_the_cases_of_their_records(tmp_path, given):
    tasks = ["t2i", "question", "multi"]
    made = list(shapes_tasks.make_records(5, 96, PIXELS, tasks=tasks))
    records.write(tmp_path / "mixed", made)
    edits = [case.record for case in given if case.task == "edit" and case.seen]
    records.write(tmp_path / "edits", edits)
    found = cases.read([str(tmp_path / "mixed"), str(tmp_path / "edits")])
    assert {c.task for c in found} == {"t2i", "question", "edit"}
    assert len(found) == 64 + len(edits)
    few = cases.read([str(tmp_path / "mixed")], n=2)
    kinds = [(c.task, c.tag, c.seen) for c in few]
    assert all(kinds.count(kind) <= 2 for kind in kinds)
    records.write(tmp_path / "none", shapes_tasks.make_records(0, 4, PIXELS, tasks=["multi"]))
    with pytest.raises(DatasetError, match="no record of the shapes world with a task of t2i"):
        cases.read([str(tmp_path / "none")])


@pytest.mark.fast
def test_means_weigh_tags_alike(given):
    own = [c for c in given if c.task == "t2i" and c.seen]
    own = [c for c in own if c.tag == "colors"][:1] + [c for c in own if c.tag != "colors"]
    right = [c.tag == "colors" for c in own]
    table = accuracy.table(own, right)
    assert table["mean"]["right"] == pytest.approx(1 / 6, abs=1e-4)
    assert table["tags"]["colors"] == accuracy.share([True])
    # One colour of six tags is as good as far fewer than its 21 cases.
    alike = 36 / (1 + 5 / 4)
    low, high = table["mean"]["right_95"]
    assert (low, high) == tuple(accuracy.wilson(alike / 6, alike))
    others = accuracy.others(own)
    assert all(i not in rest and rest for i, rest in enumerate(others))
    assert all(own[j].tag == own[i].tag for i, rest in enumerate(others[1:], 1) for j in rest)
    partners = accuracy.partners(own)
    assert sorted(partners[1:]) == list(range(1, len(own)))


def test_page_lines_and_sheets(tmp_path, measured):
    result, samples = measured
    result = {**result, "not_run": {"likelihood": "no <model>"}}
    shown = contact_sheets.make(samples)
    assert set(shown) == {"generation_best", "generation_random", "understanding", "editing",
                          "reasoning"}  # fmt: skip
    wrong = [s._replace(right=False, why="found none") for s in samples["generation"]]
    assert "generation_failed" in contact_sheets.make({"generation": wrong})
    # Source, drawn and right, twice a row.
    assert shown["editing"].shape[1] == 4 + 6 * (2 * PIXELS + 4)
    report.write(tmp_path / "page.html", result, shown)
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/png;base64") == len(shown) and "<html" in page
    assert "no &lt;model&gt;" in page and "color attr" in page and "own tower" in page
    told = "\n".join(report.lines(result))
    assert "generation, seen: 1.000 (" in told and "not run: likelihood" in told
    assert "editing, kept, withheld: 1.000" in told
    json.dumps([report.told(s) for rows in samples.values() for s in rows])
