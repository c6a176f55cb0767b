"""The claims of STARFlow2 (arXiv 2605.08029) that the table tests, each by comparisons of rows.

A comparison is the mean difference of a metric between two rows, seed by seed, with Student's t
interval; or, without a second row, the mean of a metric. It holds if the interval lies where the
claim says, does not hold if the interval lies wholly outside, and is undecided if it does neither,
or if there are fewer than two seeds. A claim holds if all of its comparisons do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import table

Results = Mapping[str, Mapping[int, Mapping[str, Any]]]

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
# The row of stage 1 of the Pretzel, which has one seed and is compared with every seed of another.
STAGE1 = "stage1"
# Differences of shares, and of nats per token, that are not worth the name of a loss.
SHARE, NATS = 0.05, 0.02


@dataclass(frozen=True)
class Comparison:
    """A difference that a claim is about.

    Attributes:
        metric: of the first row.
        first, second: names of rows; an empty second compares with nothing.
        low, high: bounds between which the difference (or the metric) lies if the claim is true.
        second_metric: of the second row, by default that of the first.
    """

    metric: str
    first: str
    second: str = ""
    low: float | None = None
    high: float | None = None
    second_metric: str = ""

    @property
    def what(self) -> str:
        """The comparison in words."""
        name = table.METRICS[self.metric]
        if not self.second:
            return f"{name}: {self.first}"
        if self.second == self.first:
            return f"{name} - {table.METRICS[self.second_metric]}: {self.first}"
        return f"{name}: {self.first} - {self.second}"

    @property
    def expected(self) -> str:
        """The bounds in words."""
        if self.low is not None and self.high is not None:
            return f"{self.low:g} to {self.high:g}"
        return f"> {self.low:g}" if self.low is not None else f"< {self.high:g}"


@dataclass(frozen=True)
class Claim:
    """A claim and the comparisons that test it."""

    text: str
    comparisons: tuple[Comparison, ...]


CLAIMS = (
    Claim(
        "A mixture of transformers with a frozen VLM is too weak at generation",
        (
            Comparison("generation", "pretzel", "mot_frozen", low=0),
            Comparison("image_nats", "pretzel", "mot_frozen", high=0),
        ),
    ),
    Claim(
        "A mixture of transformers that is trained as a whole loses understanding",
        (
            Comparison("text_alone", "mot_joint", "mot_joint", low=0,
                       second_metric="text_alone_before"),
            Comparison("questions", "pretzel", "mot_joint", low=0),
        ),
    ),
    Claim(
        "The Pretzel keeps both: understanding as before, generation like a joint mixture",
        (
            Comparison("text_alone", "pretzel", "pretzel", high=NATS,
                       second_metric="text_alone_before"),
            Comparison("generation", "pretzel", "mot_joint", low=-SHARE),
            Comparison("questions", "pretzel", "mot_joint", low=-SHARE),
        ),
    ),
    Claim(
        "Stage 3 raises generation over stage 1, and over as many more steps of stage 1",
        (
            Comparison("generation", "pretzel", STAGE1, low=0),
            Comparison("generation", "pretzel", "stage1_again", low=0),
        ),
    ),
    Claim(
        "The VLM skip carries part of the deep input, nearly orthogonal to u (paper: 0.47, 0)",
        (
            Comparison("skip_share", "pretzel", low=0.1),
            Comparison("skip_cosine", "pretzel", low=-0.2, high=0.2),
        ),
    ),
    Claim(
        "What the VLM skip carries helps drawing, edits and reasoning",
        (
            Comparison("generation", "pretzel", "skip_deep", low=0),
            Comparison("preserved", "pretzel", "skip_deep", low=0),
            Comparison("changed", "pretzel", "skip_deep", low=0),
            Comparison("reasoning", "pretzel", "skip_deep", low=0),
        ),
    ),
    Claim(
        "The same of a skip that leads into the flow's width",
        (
            Comparison("skip_share", "skip_into_width", low=0.1),
            Comparison("generation", "skip_into_width", "skip_deep", low=0),
            Comparison("preserved", "skip_into_width", "skip_deep", low=0),
            Comparison("changed", "skip_into_width", "skip_deep", low=0),
            Comparison("reasoning", "skip_into_width", "skip_deep", low=0),
        ),
    ),
    Claim(
        "One cache needs no encoding again: answers are as good, and sooner",
        (
            Comparison("reasoning", "pretzel", "pretzel", low=-SHARE,
                       second_metric="encoded_again"),
            Comparison("cache_speedup", "pretzel", low=1),
        ),
    ),
)  # fmt: skip


def evaluate(results: Results) -> list[dict[str, Any]]:
    """Return `text`, `verdict` and `comparisons` of every claim.

    A comparison has `what`, `expected`, `verdict`, and `mean`, `interval` (half of it, None for one
    seed) and `seeds` if both rows were measured.
    """
    rows = []
    for claim in CLAIMS:
        comparisons = [_compare(results, comparison) for comparison in claim.comparisons]
        verdicts = [row["verdict"] for row in comparisons]
        verdict = FAILS if FAILS in verdicts else UNDECIDED
        if set(verdicts) == {HOLDS}:
            verdict = HOLDS
        rows.append({"text": claim.text, "verdict": verdict, "comparisons": comparisons})
    return rows


def _compare(results: Results, comparison: Comparison) -> dict[str, Any]:
    row: dict[str, Any] = {"what": comparison.what, "expected": comparison.expected}
    values = _values(results, comparison)
    if not values:
        return {**row, "verdict": UNDECIDED}
    figure = table.interval(values)
    if figure["interval"] is None:
        return {**row, **figure, "verdict": UNDECIDED}
    low, high = (figure["mean"] + sign * figure["interval"] for sign in (-1, 1))
    inside = (comparison.low is None or low > comparison.low) and (
        comparison.high is None or high < comparison.high
    )
    outside = (comparison.low is not None and high <= comparison.low) or (
        comparison.high is not None and low >= comparison.high
    )
    return {**row, **figure, "verdict": HOLDS if inside else FAILS if outside else UNDECIDED}


def _values(results: Results, comparison: Comparison) -> list[float]:
    """Return the metric, or the difference, of every seed that has it."""
    first = _metric(results, comparison.first, comparison.metric)
    if not comparison.second:
        return list(first.values())
    second = _metric(results, comparison.second, comparison.second_metric or comparison.metric)
    if comparison.second == STAGE1:
        second = {seed: value for value in second.values() for seed in first}
    return [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]


def _metric(results: Results, name: str, metric: str) -> dict[int, float]:
    runs = results.get(name, {})
    return {seed: runs[seed][metric] for seed in sorted(runs) if runs[seed].get(metric) is not None}


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the claims as a table of markdown."""
    lines = ["| claim, and what is compared | difference (95%) | expected | |", "|---|---|---|---|"]
    for claim in rows:
        lines.append(f"| **{claim['text']}** | | | **{claim['verdict']}** |")
        for row in claim["comparisons"]:
            cells = (row["what"], _figure(row), row["expected"], row["verdict"])
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _figure(row: Mapping[str, Any]) -> str:
    if "mean" not in row:
        return table.NOT_RUN
    half = "" if row["interval"] is None else f" ± {row['interval']:.3f}"
    return f"{row['mean']:+.3f}{half} ({row['seeds']})"
