"""The ablation table: means over seeds with their 95% intervals, as markdown and JSON."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .rows import ROWS

# What every run leaves in its folder.
RESULT = "result.json"
# By the number of seeds: two-sided 95% points of Student's t with one degree of freedom less.
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306,
           10: 2.262}  # fmt: skip
FIGURES = {
    "image_nats": "image nats/dim",
    "text_nats": "text nats/token",
    "questions": "questions right",
    "text_alone_before": "text alone, before",
    "text_alone": "after",
    "generation": "generation",
}
NOT_RUN = "not run"
NOTES = (
    "Lower is better for nats, higher for shares. Intervals are over seeds (Student's t); (1) "
    "marks a single seed, which has none. * trains more weights than the Pretzel by over 5%. † its "
    "images are of other latents or noise, so that their nats are not those of the other rows. "
    "A figure that was not measured is -."
)


def build(results: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """A dict a row of `ROWS`: `row`, `what`, `core`, `seeds` (those that are there), `wanted` (how
    many there should be), `trained` weights, mean `seconds` of training, and of every figure
    `mean`, `interval` (half of the 95% interval; None of one seed) and `seeds`.

    Args:
        results: by row and seed, as `one.run` writes them.
    """
    return [_row(name, results.get(name, {})) for name in ROWS]


def _row(name: str, runs: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    row = ROWS[name]
    held = [runs[seed] for seed in sorted(runs)]
    found: dict[str, Any] = {"row": name, "what": row.what, "core": row.core}
    found |= {"seeds": sorted(runs), "wanted": row.seeds, "matched": row.matched}
    found["comparable"] = row.comparable
    if held:
        found["trained"] = held[0]["trained"]
        found["seconds"] = sum(run["seconds"]["training"] for run in held) / len(held)
    for figure in FIGURES:
        values = [run[figure] for run in held if run.get(figure) is not None]
        if values:
            found[figure] = interval(values)
    return found


def interval(values: Sequence[float]) -> dict[str, Any]:
    """`mean`, `interval` and `seeds` of one figure.

    Raises:
        ValueError: more seeds than `STUDENT` knows.
    """
    count, mean = len(values), sum(values) / len(values)
    if count == 1:
        return {"mean": mean, "interval": None, "seeds": 1}
    if count not in STUDENT:
        raise ValueError(f"table: intervals are known of at most {max(STUDENT)} seeds, not {count}")
    variance = sum((v - mean) ** 2 for v in values) / (count - 1)
    return {"mean": mean, "interval": STUDENT[count] * math.sqrt(variance / count), "seeds": count}


def markdown(table: Sequence[Mapping[str, Any]], budget: str = "") -> str:
    """The table for people; the core rows first, as `ROWS` has them."""
    head = ["row", "seeds", "trained", *FIGURES.values()]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in table:
        marks = ("" if row["matched"] else "*") + ("" if row["comparable"] else "†")
        cells = [f"{row['what']}{marks}", f"{len(row['seeds'])} of {row['wanted']}"]
        if row["seeds"]:
            cells += [f"{row['trained']:,}", *(_cell(row.get(figure)) for figure in FIGURES)]
        else:
            cells += [NOT_RUN, *("" for _ in FIGURES)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*([budget, ""] if budget else []), *lines, "", NOTES]) + "\n"


def _cell(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return "-"
    if figure["interval"] is None:
        return f"{figure['mean']:.3f} (1)"
    return f"{figure['mean']:.3f} ± {figure['interval']:.3f}"
