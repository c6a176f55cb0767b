"""The ablation table: means over seeds with their 95% intervals, as markdown and JSON."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .rows import ROWS

# The file in every run's folder.
RESULT = "result.json"
# Two-sided 95% points of Student's t by the number of seeds, with one degree of freedom less.
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306,
           10: 2.262}  # fmt: skip
LIKELIHOODS = {
    "image_nats": "image nats/dim",
    "text_nats": "text nats/token",
    "questions": "questions right",
    "text_alone_before": "text alone, before",
    "text_alone": "text alone, after",
    "skip_share": "share of the VLM skip",
    "skip_cosine": "its cosine",
}
JUDGED_METRICS = {
    "generation": "generation",
    "changed": "edits: changed",
    "preserved": "kept",
    "edits": "both",
    "reasoning": "reasoning",
    "without_image": "without its image",
    "encoded_again": "its image encoded again",
}
METRICS = {**LIKELIHOODS, **JUDGED_METRICS, "cache_speedup": "answer without the cache, times"}
NOT_RUN = "not run"
NOTES = (
    "Lower is better for nats, higher for shares. Intervals are over seeds (Student's t); (1) "
    "marks a single seed, which has none. * trains over 5% more or fewer weights than the Pretzel. "
    "† its images have other latents or noise, so their nats do not compare with those of other "
    "rows. A metric that was not measured is -. Drawings, edits and answers are judged on kinds of "
    "cases that training has shown."
)


def judged_metrics(judged: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a result of `evaluate shapes`, without those that were not run."""
    sections = judged["sections"]
    editing, reasoning = sections.get("editing", {}), sections.get("reasoning", {})
    baselines = reasoning.get("baselines", {})
    tables = {
        "generation": sections.get("generation", {}).get("score"),
        "changed": editing.get("changed", {}).get("score"),
        "preserved": editing.get("preserved", {}).get("score"),
        "edits": editing.get("both", {}).get("score"),
        "reasoning": reasoning.get("score"),
        "without_image": baselines.get("direct_answer"),
        "encoded_again": baselines.get("encoded_again"),
    }
    return {name: t["seen"]["mean"]["correct"] for name, t in tables.items() if t and t["seen"]}


def build(results: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return a dict for each row of `ROWS`.

    Its keys are `row`, `what`, `core`, `seeds` (with a result), `wanted` (number of seeds planned),
    `trained` parameters, mean `seconds` of training, and for every metric `mean`, `interval` (half
    of the 95% interval; None for one seed) and `seeds`.

    Args:
        results: by row and seed, as `one.run` writes them.
    """
    return [_row(name, results.get(name, {})) for name in ROWS]


def _row(name: str, runs: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    row = ROWS[name]
    results = [runs[seed] for seed in sorted(runs)]
    entry: dict[str, Any] = {
        "row": name,
        "what": row.what,
        "core": row.core,
        "seeds": sorted(runs),
        "wanted": row.seeds,
        "matched": row.matched,
        "comparable": row.comparable,
    }
    if results:
        entry["trained"] = results[0]["trained"]
        entry["seconds"] = sum(run["seconds"]["training"] for run in results) / len(results)
    for metric in METRICS:
        values = [run[metric] for run in results if run.get(metric) is not None]
        if values:
            entry[metric] = interval(values)
    return entry


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Return `mean`, `interval` and `seeds` of one metric.

    Raises:
        ValueError: There are more seeds than entries of `STUDENT`.
    """
    count, mean = len(values), sum(values) / len(values)
    if count == 1:
        return {"mean": mean, "interval": None, "seeds": 1}
    if count not in STUDENT:
        raise ValueError(f"table: {count} seeds; intervals are known for at most {max(STUDENT)}")
    variance = sum((v - mean) ** 2 for v in values) / (count - 1)
    return {"mean": mean, "interval": STUDENT[count] * math.sqrt(variance / count), "seeds": count}


def markdown(table: Sequence[Mapping[str, Any]], budget: str = "") -> str:
    """Return two tables as markdown, of likelihoods and of what was judged, rows as in `ROWS`."""
    parts = [budget] if budget else []
    parts.append(_table(table, LIKELIHOODS, with_counts=True))
    if any(metric in row for row in table for metric in JUDGED_METRICS):
        parts.append(_table(table, JUDGED_METRICS, with_counts=False))
    return "\n\n".join([*parts, NOTES]) + "\n"


def _table(
    table: Sequence[Mapping[str, Any]], metrics: Mapping[str, str], *, with_counts: bool
) -> str:
    """Return a table of some metrics; without counts, rows that have none of them are left out."""
    head = ["row", *(("seeds", "trained") if with_counts else ()), *metrics.values()]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in table:
        marks = ("" if row["matched"] else "*") + ("" if row["comparable"] else "†")
        cells = [f"{row['what']}{marks}"]
        if with_counts:
            cells += [f"{len(row['seeds'])} of {row['wanted']}"]
            cells += [f"{row['trained']:,}" if row["seeds"] else NOT_RUN]
        elif not any(metric in row for metric in metrics):
            continue
        empty = not row["seeds"]
        cells += ["" if empty else _cell(row.get(metric)) for metric in metrics]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(metric: Mapping[str, Any] | None) -> str:
    if metric is None:
        return "-"
    if metric["interval"] is None:
        return f"{metric['mean']:.3f} (1)"
    return f"{metric['mean']:.3f} ± {metric['interval']:.3f}"
