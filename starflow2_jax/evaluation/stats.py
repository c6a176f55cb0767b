"""Figures with their 95% intervals: accuracies, means, and ratios of sums.

A figure `name` is stored with its interval `[low, high]` as `name_95`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Z_95 = 1.96  # two-sided 95% point of the standard normal distribution


def wilson_interval(correct: float, count: float) -> list[float]:
    """Return Wilson's 95% interval of a binomial proportion; both numbers may be fractions."""
    if not count:
        return [0.0, 1.0]
    share = correct / count
    center = share + Z_95**2 / (2 * count)
    half_width = Z_95 * math.sqrt(share * (1 - share) / count + (Z_95 / (2 * count)) ** 2)
    scale = 1 + Z_95**2 / count
    low, high = (center - half_width) / scale, (center + half_width) / scale
    return [round(float(max(low, 0.0)), 4), round(float(min(high, 1.0)), 4)]


def accuracy(correct: Sequence[float]) -> dict[str, Any]:
    """Return `count`, the share `correct` and its interval; each case counts for 0 to 1."""
    count, total = len(correct), float(sum(correct))
    share = round(total / count, 4) if count else None
    return {"count": count, "correct": share, "correct_95": wilson_interval(total, count)}


def mean(values: Sequence[float] | np.ndarray, name: str) -> dict[str, Any]:
    """Return the mean of independent values as `name`, and its interval (None of one value)."""
    values = np.asarray(values, np.float64)
    average, interval = float(values.mean()), None
    if len(values) > 1:
        half_width = Z_95 * float(values.std(ddof=1)) / math.sqrt(len(values))
        interval = [average - half_width, average + half_width]
    return {name: average, f"{name}_95": interval}


def mean_difference(groups: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Return the mean over groups of their mean difference of paired accuracies, and its interval.

    The interval is Agresti and Min's (2005): half a pair in each of the four cells, here shared by
    the groups. It is wider than 1.96 standard errors where few pairs differ, and never of width 0.

    Args:
        groups: differences -1 to 1, one of each pair; no group is empty.
    """
    extra = 2 / len(groups)  # pairs added to each group, half of which differ
    centers, variances, means = [], [], []
    for group in groups:
        values = np.asarray(group, np.float64)
        count = len(values) + extra
        center = values.sum() / count
        variance = ((values**2).sum() + extra / 2) / count - center**2
        means.append(values.mean())
        centers.append(center)
        variances.append(variance / count)
    center, half_width = float(np.mean(centers)), Z_95 * math.sqrt(sum(variances)) / len(groups)
    interval = [max(center - half_width, -1.0), min(center + half_width, 1.0)]
    return {
        "difference": round(float(np.mean(means)), 4),
        "difference_95": [round(bound, 4) for bound in interval],
    }


def nll_ratio(nll: np.ndarray, counts: np.ndarray) -> dict[str, Any]:
    """Return sum(nll) / sum(counts), both [records], with the interval of the delta method."""
    total, records = counts.sum(), len(nll)
    ratio, interval = float(nll.sum() / total), None
    if records > 1:
        square = np.square(nll - ratio * counts).sum() * records / (records - 1)
        half_width = Z_95 * float(np.sqrt(square) / total)
        interval = [round(ratio - half_width, 5), round(ratio + half_width, 5)]
    return {"records": records, "nll": round(ratio, 5), "nll_95": interval}


def format_figure(row: Mapping[str, Any], name: str, spec: str, interval: bool = True) -> str:
    """Format a figure as "value (low to high)", each by the format `spec`."""
    text, bounds = f"{row[name]:{spec}}", row.get(f"{name}_95")
    if interval and bounds:
        text += f" ({bounds[0]:{spec}} to {bounds[1]:{spec}})"
    return text
