"""Paired differences of two results of the shapes suite, and what cannot be compared."""

import json

import numpy as np
import pytest

from starflow2_jax.evaluation import stats
from starflow2_jax.evaluation.shapes import compare

pytestmark = pytest.mark.fast


def make_result(correct, nll=(), count=2.0):
    rows = [
        {
            "id": f"case{i}",
            "tag": "colors" if i % 2 else "counting",
            "holdout": "none" if i < 16 else "pair",
            "prompt": f"prompt {i}",
            "correct": bool(value),
            "measures": {"changed": bool(value), "preserved": None, "both": bool(value)},
        }
        for i, value in enumerate(correct)
    ]
    table = {
        "id": [f"r{i}" for i in range(len(nll))],
        "image_nll": list(nll),
        "image_count": [count] * len(nll),
        "text_nll": [0.0] * len(nll),
        "text_count": [0.0] * len(nll),
    }
    return {
        "model": {"path": "model", "step": 3},
        "sections": {"likelihood": {"t2i": {"seen": {"per_record": table}}}} if len(nll) else {},
        "samples": {"editing": rows} if len(rows) else {},
    }


def test_differences_are_those_of_the_pairs():
    first, second = np.ones(20), np.arange(20) % 4 > 0
    first[[1, 3]] = 0
    nll = np.random.default_rng(0).normal(size=(2, 9))
    result = compare.compare(make_result(first, nll[0]), make_result(second, nll[1]))
    assert set(result["accuracy"]) == {"editing", "editing, changed"}
    row = result["accuracy"]["editing"]["seen"]
    assert (row["count"], row["first_only"], row["second_only"]) == (16, 4, 2)
    assert row["difference"] == pytest.approx((first[:16] - second[:16]).mean())
    assert row["first"] - row["second"] == pytest.approx(row["difference"])
    assert row["p"] == pytest.approx(2 * sum((1, 6, 15)) / 2**6)
    assert row["tags"]["counting"]["difference"] == 0.5
    assert result["accuracy"]["editing"]["held_out"]["count"] == 4
    difference = result["likelihood"]["t2i, seen, image"]
    assert difference["difference"] == pytest.approx((nll[0] - nll[1]).sum() / 18, abs=1e-5)
    low, high = difference["difference_95"]
    deviation = (nll[0] - nll[1]).std(ddof=1) / 2 / 3
    assert (high - low) / 2 == pytest.approx(stats.Z_95 * deviation, abs=1e-4)
    lines = compare.lines(result)
    assert lines[:2] == ["A  model, step 3", "B  model, step 3"] and len(lines) == 8
    json.dumps(result)


def test_a_better_model_is_named_and_an_equal_one_is_not():
    def verdict(first, second):
        return compare.lines(compare.compare(make_result(first), make_result(second)))[3]

    assert verdict(np.ones(16), np.zeros(16)).endswith("A is better")
    assert verdict(np.zeros(16), np.ones(16)).endswith("B is better")
    same = verdict(np.ones(16), np.ones(16))
    assert "better" not in same and "+0.000 (-0." in same  # equal answers are no proof of equality
    result = compare.compare(make_result([], np.zeros(4)), make_result([], np.arange(4.0) + 9))
    assert compare.lines(result)[3].endswith("A is better")  # a lower NLL


def test_results_of_other_cases_are_refused():
    first, other = make_result(np.ones(4)), make_result(np.ones(4))
    other["samples"]["editing"][2]["prompt"] = "another"
    with pytest.raises(ValueError, match="case2 asks 'prompt 2' in one result and 'another'"):
        compare.compare(first, other)
    other["samples"] = {"editing": [{**r, "id": "x"} for r in first["samples"]["editing"]]}
    with pytest.raises(ValueError, match=r"share no cases; measure both with the same --data"):
        compare.compare(first, other)
    result = compare.compare(
        make_result(np.ones(4), np.ones(3)), make_result(np.ones(4), np.ones(3), count=4.0)
    )
    assert "not_comparable" in result["likelihood"]["t2i, seen, image"]
    assert any("other numbers of dimensions" in line for line in compare.lines(result))


def test_results_are_read_from_folders_and_files(tmp_path):
    assert compare.read(str(tmp_path)) is None
    (tmp_path / "shapes.json").write_text(json.dumps(make_result([1])))
    assert compare.read(str(tmp_path)) == compare.read(str(tmp_path / "shapes.json"))
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json is no result of the shapes suite"):
        compare.read(str(tmp_path / "other.json"))


def test_intervals_of_paired_proportions_cover():
    """Intervals of many samples cover the true difference as often as they say."""
    random = np.random.default_rng(1)
    covered = []
    for _ in range(400):
        kinds = random.choice(3, 24, p=(0.3, 0.1, 0.6))
        row = stats.mean_difference([(kinds == 0).astype(int) - (kinds == 1)])
        covered.append(row["difference_95"][0] <= 0.2 <= row["difference_95"][1])
    assert np.mean(covered) > 0.92
