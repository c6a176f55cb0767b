"""Figures with intervals: against SciPy and closed forms."""

import numpy as np
import pytest
from scipy.stats import binomtest

from starflow2_jax.evaluation import stats


@pytest.mark.fast
def test_wilson_intervals_are_those_of_scipy():
    for correct, count in ((95, 100), (3, 10), (0, 5), (5, 5), (1, 1)):
        expected = binomtest(correct, count).proportion_ci(method="wilson")
        interval = stats.wilson_interval(correct, count)
        # SciPy's two-sided 95% point of the normal distribution is 1.95996.
        assert interval == pytest.approx([expected.low, expected.high], abs=1e-4)
    assert stats.wilson_interval(0, 0) == [0.0, 1.0]
    low, high = stats.wilson_interval(2.5, 7.25)
    assert 0 < low < 2.5 / 7.25 < high < 1


@pytest.mark.fast
def test_accuracies_and_means_are_rounded_only_where_they_say_so():
    assert stats.accuracy([True, False, True]) == {
        "count": 3, "correct": 0.6667, "correct_95": stats.wilson_interval(2, 3)
    }  # fmt: skip
    assert stats.accuracy([]) == {"count": 0, "correct": None, "correct_95": [0.0, 1.0]}
    values = [1.0, 2.0, 4.0]
    figure = stats.mean(values, "psnr")
    half_width = 1.96 * np.std(values, ddof=1) / np.sqrt(3)
    assert figure["psnr"] == pytest.approx(7 / 3)
    assert figure["psnr_95"] == pytest.approx([7 / 3 - half_width, 7 / 3 + half_width])
    assert stats.mean([1.0], "psnr") == {"psnr": 1.0, "psnr_95": None}
    assert stats.format_figure(figure, "psnr", ".1f") == "2.3 (0.6 to 4.1)"
    assert stats.format_figure({"psnr": 1.0, "psnr_95": None}, "psnr", ".1f") == "1.0"
