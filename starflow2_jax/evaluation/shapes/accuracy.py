"""Shares of what is right, by tag, seen and withheld apart, with their 95% intervals."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from starflow2_jax.evaluation.shapes.cases import Case
from starflow2_jax.evaluation.vqa import wilson

# Of a tag as many others are held against a case at most.
MOST = 32
PROTOCOL = (
    "shares with 95% by Wilson's score interval over cases; the mean of tags weighs every tag "
    "alike, its interval that of as many cases as would give the same variance"
)


def share(right: Sequence[float]) -> dict[str, Any]:
    """`count`, `right` (a share) and `right_95` of verdicts, or of numbers in [0, 1]."""
    count, total = len(right), float(sum(right))
    found = round(total / count, 4) if count else None
    return {"count": count, "right": found, "right_95": wilson(total, count)}


def table(cases: Sequence[Case], right: Sequence[float]) -> dict[str, Any]:
    """`tags`: the share of each tag, in their order; `mean`: of the tags, each weighing alike."""
    groups: dict[str, list[float]] = defaultdict(list)
    for case, value in zip(cases, right, strict=True):
        groups[case.tag].append(float(value))
    tags = {tag: share(group) for tag, group in groups.items()}
    mean = sum(sum(group) / len(group) for group in groups.values()) / len(groups)
    # So many cases have the variance of the mean of tags, were the share the same in each.
    alike = len(groups) ** 2 / sum(1 / len(group) for group in groups.values())
    interval = wilson(mean * alike, alike)
    whole = {"count": len(cases), "right": round(mean, 4), "right_95": interval}
    return {"tags": tags, "mean": whole}


def apart(cases: Sequence[Case], right: Sequence[float]) -> dict[str, Any]:
    """The `table` of what is `seen` and that of what is `withheld`; None where there is nothing."""
    found = {}
    for name, seen in (("seen", True), ("withheld", False)):
        own = [(case, value) for case, value in zip(cases, right) if case.seen == seen]
        found[name] = table(*zip(*own)) if own else None
    return found


def groups(cases: Sequence[Case]) -> dict[tuple[str, bool], list[int]]:
    """Places of the cases of each tag, seen and withheld apart."""
    found: dict[tuple[str, bool], list[int]] = defaultdict(list)
    for i, case in enumerate(cases):
        found[case.tag, case.seen].append(i)
    return dict(found)


def others(cases: Sequence[Case]) -> list[list[int]]:
    """Of each case those behind it of its tag, round to the first, at most `MOST`; where it is
    alone, those of all tags."""
    own, found = groups(cases), []
    for i, case in enumerate(cases):
        same = own[case.tag, case.seen]
        same = same if len(same) > 1 else list(range(len(cases)))
        at = same.index(i)
        found.append((same[at + 1 :] + same[:at])[:MOST] or [i])
    return found


def partners(cases: Sequence[Case]) -> list[int]:
    """Of each case the next of its tag; every one is somebody's."""
    return [rest[0] for rest in others(cases)]


def shuffled(cases: Sequence[Case], holds: Callable[[int, int], bool]) -> list[float]:
    """Of each case i the share of `others` j whose answer is right for i: `holds(j, i)`."""
    return [sum(holds(j, i) for j in own) / len(own) for i, own in enumerate(others(cases))]


def most_frequent(cases: Sequence[Case], holds: Callable[[int, int], bool]) -> list[bool]:
    """Whether the one answer that is right most often for its tag is right for each case.

    Args:
        holds: (j, i): the right answer to j is right for i. The first `MOST` of a tag are tried.
    """
    found = [False] * len(cases)
    for own in groups(cases).values():
        best = max(own[:MOST], key=lambda j: sum(holds(j, i) for i in own))
        for i in own:
            found[i] = holds(best, i)
    return found


def chance_of_words(cases: Sequence[Case]) -> list[float]:
    """Of each case one over the number of different right answers of its tag."""
    own = {tag: {case.words for case in cases if case.tag == tag} for tag in {c.tag for c in cases}}
    return [1 / len(own[case.tag]) for case in cases]


def frequent_words(cases: Sequence[Case]) -> list[bool]:
    """Whether each case's words are the most frequent ones of its tag."""
    found = [False] * len(cases)
    for own in groups(cases).values():
        words = Counter(cases[i].words for i in own).most_common(1)[0][0]
        for i in own:
            found[i] = cases[i].words == words
    return found
