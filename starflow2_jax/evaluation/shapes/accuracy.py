"""Accuracy of a model by tag, with held-out pairs separate, and the baselines that need no model.

`correct_for(j, i)` in this file says whether the answer to case j is correct for case i.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from starflow2_jax.evaluation import stats
from starflow2_jax.evaluation.shapes.cases import Case

# Upper bound on the other cases of a tag that a case is compared with.
MAX_OTHERS = 32
PROTOCOL = (
    "shares with 95% by Wilson's score interval over cases; the mean of tags weighs every tag "
    "alike, its interval that of as many cases as would give the same variance; differences are "
    "of the same cases, their interval Agresti and Min's for pairs"
)


def by_tag(cases: Sequence[Case], correct: Sequence[float]) -> dict[str, Any]:
    """Return `tags`, the accuracy of each tag, and `mean`, which weighs every tag alike."""
    groups: dict[str, list[float]] = defaultdict(list)
    for case, value in zip(cases, correct, strict=True):
        groups[case.tag].append(float(value))
    mean = sum(sum(group) / len(group) for group in groups.values()) / len(groups)
    # With equal accuracies, the mean of tags has the variance of this many independent cases.
    effective_count = len(groups) ** 2 / sum(1 / len(group) for group in groups.values())
    interval = stats.wilson_interval(mean * effective_count, effective_count)
    return {
        "tags": {tag: stats.accuracy(group) for tag, group in groups.items()},
        "mean": {"count": len(cases), "correct": round(mean, 4), "correct_95": interval},
    }


def split_by_holdout(cases: Sequence[Case], correct: Sequence[float]) -> dict[str, Any]:
    """Return the accuracy `by_tag` of the `seen` and of the `held_out` cases, None without any."""
    tables = {}
    for name, held_out in (("seen", False), ("held_out", True)):
        part = [(c, value) for c, value in zip(cases, correct) if c.is_held_out == held_out]
        tables[name] = by_tag(*zip(*part)) if part else None
    return tables


def difference(
    cases: Sequence[Case], first: Sequence[float], second: Sequence[float]
) -> dict[str, Any]:
    """Return by how much the first accuracy exceeds the second, over the same cases.

    The parts, tags and mean are those of `split_by_holdout`, intervals those of
    `stats.mean_difference`.
    """
    tables: dict[str, Any] = {}
    for name, held_out in (("seen", False), ("held_out", True)):
        groups: dict[str, list[float]] = defaultdict(list)
        for case, a, b in zip(cases, first, second, strict=True):
            if case.is_held_out == held_out:
                groups[case.tag].append(float(a) - float(b))
        tables[name] = _difference_table(groups) if groups else None
    return tables


def _difference_table(groups: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    tags = {
        tag: {"count": len(group), **stats.mean_difference([group])}
        for tag, group in groups.items()
    }
    count = sum(map(len, groups.values()))
    mean = {"count": count, **stats.mean_difference(list(groups.values()))}
    return {"tags": tags, "mean": mean}


def compare(
    cases: Sequence[Case], correct: Sequence[float], baselines: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """Return `score` and `baselines`, as from `split_by_holdout`, and `differences` to them.

    Args:
        correct: of each case, 0 to 1.
        baselines: the same of other answers, by name.
    """
    return {
        "score": split_by_holdout(cases, correct),
        "baselines": {name: split_by_holdout(cases, row) for name, row in baselines.items()},
        "differences": {name: difference(cases, correct, row) for name, row in baselines.items()},
    }


def group_by_tag(cases: Sequence[Case]) -> dict[tuple[str, bool], list[int]]:
    """Return the indices of the cases of each (tag, held out or not)."""
    groups: dict[tuple[str, bool], list[int]] = defaultdict(list)
    for i, case in enumerate(cases):
        groups[case.tag, case.is_held_out].append(i)
    return dict(groups)


def other_cases(cases: Sequence[Case]) -> list[list[int]]:
    """Return for each case those after it in its tag, cyclically, at most `MAX_OTHERS`."""
    groups, rows = group_by_tag(cases), []
    for i, case in enumerate(cases):
        group = groups[case.tag, case.is_held_out]
        group = group if len(group) > 1 else list(range(len(cases)))
        position = group.index(i)
        rows.append((group[position + 1 :] + group[:position])[:MAX_OTHERS] or [i])
    return rows


def next_in_tag(cases: Sequence[Case]) -> list[int]:
    """Return for each case the next one with the same tag, cyclically."""
    return [group[0] for group in other_cases(cases)]


def shuffled(cases: Sequence[Case], correct_for: Callable[[int, int], bool]) -> list[float]:
    """Return for each case the share of its `other_cases` whose answer is correct for it."""
    return [
        sum(correct_for(j, i) for j in group) / len(group)
        for i, group in enumerate(other_cases(cases))
    ]


def best_constant(cases: Sequence[Case], correct_for: Callable[[int, int], bool]) -> list[bool]:
    """Return for each case whether the best constant answer (of `MAX_OTHERS`) is correct for it."""
    correct = [False] * len(cases)
    for group in group_by_tag(cases).values():
        best = max(group[:MAX_OTHERS], key=lambda j: sum(correct_for(j, i) for i in group))
        for i in group:
            correct[i] = correct_for(best, i)
    return correct


def chance_of_text(cases: Sequence[Case]) -> list[float]:
    """Return for each case one over the number of different reference texts of its tag."""
    texts: dict[str, set[str]] = defaultdict(set)
    for case in cases:
        texts[case.tag].add(case.reference_text)
    return [1 / len(texts[case.tag]) for case in cases]


def most_frequent_text(cases: Sequence[Case]) -> list[bool]:
    """Return for each case whether its reference text is the most frequent one of its tag."""
    correct = [False] * len(cases)
    for group in group_by_tag(cases).values():
        counts = Counter(cases[i].reference_text for i in group)
        mode = counts.most_common(1)[0][0]
        for i in group:
            correct[i] = cases[i].reference_text == mode
    return correct
