"""Two results of the shapes suite, case by case: differences with their 95% intervals.

Both models have answered the same cases, so the difference of each case is what counts: its
interval is narrower than the two intervals of the models suggest.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from starflow2_jax.data import untrusted
from starflow2_jax.evaluation import stats
from starflow2_jax.evaluation.result_files import SHAPES_FILE
from starflow2_jax.evaluation.shapes import summary

Result = Mapping[str, Any]
PROTOCOL = (
    "differences first minus second over the cases that both have answered; accuracies as the mean "
    "of tags with 95% by the interval of Agresti and Min (2005) for pairs, and p by the exact sign "
    "test over cases of which one answer is right; NLL with 95% by the delta method"
)


class _Pair(NamedTuple):
    """A case that both models have answered."""

    tag: str
    part: str  # seen or held_out
    first: bool
    second: bool


def read(path: str) -> Result | None:
    """Return the result in a folder of `evaluate all` or in a JSON file; None if there is none."""
    file = epath.Path(path)
    if (file / SHAPES_FILE).exists():
        file = file / SHAPES_FILE
    elif file.suffix != ".json":
        return None
    result = untrusted.read_json(file, dict[str, Any])
    if "sections" not in result:
        raise ValueError(
            f"{file} is no result of the shapes suite; expected a file of `evaluate shapes`, a "
            "folder of `evaluate all`, or a model"
        )
    return result


def compare(first: Result, second: Result) -> dict[str, Any]:
    """Return the paired differences of two results by section and part.

    Raises:
        ValueError: The results share no cases, or a case has another prompt in the other one.
    """
    accuracies = {}
    for name, pairs in _accuracy_pairs(first, second):
        parts = {part: [p for p in pairs if p.part == part] for part in summary.PARTS}
        accuracies[name] = {part: _differ(rows) for part, rows in parts.items() if rows}
    likelihoods = dict(_likelihood_differences(first, second))
    if not accuracies and not likelihoods:
        raise ValueError(
            "compare: the two results share no cases; measure both with the same --data or --seed, "
            "--n and --only"
        )
    return {
        "first": _describe(first),
        "second": _describe(second),
        "accuracy": accuracies,
        "likelihood": likelihoods,
        "protocol": PROTOCOL,
    }


def _describe(result: Result) -> dict[str, Any]:
    names = ("model", "data", "options", "versions")
    return {name: result[name] for name in names if name in result}


def _accuracy_pairs(first: Result, second: Result) -> Iterator[tuple[str, list[_Pair]]]:
    """Yield (section or its measure, pairs) of everything that is correct or not."""
    for section, rows in first.get("samples", {}).items():
        second_rows = {row["id"]: row for row in second.get("samples", {}).get(section, ())}
        matches = [(row, second_rows[row["id"]]) for row in rows if row["id"] in second_rows]
        for row, other in matches:
            if (row["prompt"], row["tag"]) != (other["prompt"], other["tag"]):
                raise ValueError(
                    f"compare: {section}: case {row['id']} asks {row['prompt']!r} in one result "
                    f"and {other['prompt']!r} in the other; they are of different data or seeds"
                )
        measures = dict.fromkeys(name for row, _ in matches for name in row.get("measures", {}))
        for measure in ("", *(name for name in measures if name != "both")):
            pairs = [_pair(row, other, measure) for row, other in matches]
            pairs = [pair for pair in pairs if pair is not None]
            if pairs:
                yield f"{section}, {summary.label_of(measure)}" if measure else section, pairs


def _pair(row: Mapping[str, Any], other: Mapping[str, Any], measure: str) -> _Pair | None:
    """Return the pair of two answers by a measure, by `correct` if it is empty."""
    values = [r["measures"].get(measure) if measure else r["correct"] for r in (row, other)]
    if None in values:
        return None
    part = "seen" if row["holdout"] == "none" else "held_out"
    return _Pair(row["tag"], part, bool(values[0]), bool(values[1]))


def _differ(pairs: Sequence[_Pair]) -> dict[str, Any]:
    """Return the accuracies of pairs, their difference by tag and in the mean of tags."""
    from scipy import stats as scipy_stats

    groups: dict[str, list[_Pair]] = defaultdict(list)
    for pair in pairs:
        groups[pair.tag].append(pair)
    differences = {tag: [p.first - p.second for p in group] for tag, group in groups.items()}
    first_only = sum(pair.first > pair.second for pair in pairs)
    second_only = sum(pair.first < pair.second for pair in pairs)
    changed = first_only + second_only
    return {
        "count": len(pairs),
        "first": _mean_of_tags(groups, "first"),
        "second": _mean_of_tags(groups, "second"),
        **stats.mean_difference(list(differences.values())),
        "first_only": first_only,
        "second_only": second_only,
        "p": float(scipy_stats.binomtest(first_only, changed).pvalue) if changed else 1.0,
        "tags": {
            tag: {"count": len(values), **stats.mean_difference([values])}
            for tag, values in differences.items()
        },
    }


def _mean_of_tags(groups: Mapping[str, Sequence[_Pair]], name: str) -> float:
    return float(np.mean([np.mean([getattr(pair, name) for pair in g]) for g in groups.values()]))


def _likelihood_differences(first: Result, second: Result) -> Iterator[tuple[str, Any]]:
    """Yield (name, difference) of the NLL of every task, part and kind that both results have."""
    for name, tables in _likelihood_tables(first, second):
        positions = {id: j for j, id in enumerate(tables[1]["id"])}
        matches = [(i, positions[id]) for i, id in enumerate(tables[0]["id"]) if id in positions]
        for kind in ("image", "text"):
            nll, counts = (
                np.array([(tables[0][key][i], tables[1][key][j]) for i, j in matches])
                for key in (f"{kind}_nll", f"{kind}_count")
            )
            is_target = (counts.reshape(-1, 2) > 0).all(1)
            if is_target.any():
                yield f"{name}, {kind}", _nll_difference(nll[is_target], counts[is_target])


def _nll_difference(nll: np.ndarray, counts: np.ndarray) -> dict[str, Any]:
    """Return the difference of the NLL per dimension or token; nll and counts are [records, 2]."""
    if (counts[:, 0] != counts[:, 1]).any():
        return {"not_comparable": "other numbers of dimensions or tokens"}
    row = stats.nll_ratio(nll[:, 0] - nll[:, 1], counts[:, 0])
    first, second = (nll.sum(0) / counts.sum(0)).tolist()
    return {
        "records": row["records"],
        "first": first,
        "second": second,
        "difference": row["nll"],
        "difference_95": row["nll_95"],
    }


def _likelihood_tables(first: Result, second: Result) -> Iterator[tuple[str, list[Any]]]:
    """Yield (name, the two `per_record` tables) of every task and part in both results."""
    tables = [result["sections"].get("likelihood", {}) for result in (first, second)]
    for task, parts in tables[0].items():
        for part in parts:
            rows = [table.get(task, {}).get(part, {}).get("per_record") for table in tables]
            if all(rows):
                yield f"{task}, {summary.PARTS.get(part, part)}", rows
    texts = [result["sections"].get("text", {}).get("per_record") for result in (first, second)]
    if all(texts):
        yield "text alone", texts


def lines(result: Result) -> list[str]:
    """Return a comparison as a table."""
    names = [result[key].get("model", {}) for key in ("first", "second")]
    head = [
        f"{label}  {name.get('path', '?')}"
        + (f", step {name['step']:,}" if name.get("step") is not None else "")
        for label, name in zip("AB", names)
    ]
    rows = [("", "cases", "A", "B", "A - B (95%)", "only A", "only B", "p", "")]
    for name, parts in result["accuracy"].items():
        for part, row in parts.items():
            label = name if part == "seen" else f"{name}, {summary.PARTS[part]}"
            counts = (str(row["first_only"]), str(row["second_only"]), f"{row['p']:.2g}")
            figures = (f"{row['first']:.3f}", f"{row['second']:.3f}")
            difference = stats.format_figure(row, "difference", "+.3f")
            rows.append(
                (label, str(row["count"]), *figures, difference, *counts, _verdict(row, sign=1))
            )
    for name, row in result["likelihood"].items():
        if "not_comparable" in row:
            rows.append((f"NLL, {name}", "", "", "", row["not_comparable"], "", "", "", ""))
            continue
        figures = (f"{row['first']:.4f}", f"{row['second']:.4f}")
        difference = stats.format_figure(row, "difference", "+.4f")
        cells = (f"NLL, {name}", str(row["records"]), *figures, difference, "", "", "")
        rows.append((*cells, _verdict(row, sign=-1)))
    return [*head, *summary.align(rows)]


def _verdict(row: Mapping[str, Any], sign: int) -> str:
    """Return which model is better, empty if the interval includes 0."""
    low, high = row["difference_95"] or (-1.0, 1.0)
    if low <= 0 <= high:
        return ""
    return "A is better" if low * sign > 0 else "B is better"
