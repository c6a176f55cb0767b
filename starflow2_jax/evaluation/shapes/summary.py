"""The result of the shapes suite as a short table: one line per capability.

Everything else that was measured is in the JSON file and on the page.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from starflow2_jax.evaluation import stats
from starflow2_jax.evaluation.shapes import editing, skills, suite

Result = Mapping[str, Any]
PARTS = {"seen": "seen", "held_out": "held out"}
# What the images of reasoning add, by the baseline without them.
GAINS = {
    "direct_answer": "more correct with an image than without",
    "other_image": "more correct with its own image than with that of another case",
}
# The comparisons of each section that the table shows; the page shows all of them.
_HEADLINES = {
    "generation": ("shuffled", "chance", "codec_reconstruction"),
    "understanding": ("vlm_baseline", "blank_image", "most_frequent"),
    "editing": ("copy", "blank_source", "codec_reconstruction"),
    "reasoning": ("direct_answer", "blank_source", "reference_image"),
}
_HEAD = ("", "correct (95%)", "held out (95%)", "compare with")


def summary_lines(result: Result) -> list[str]:
    """Return the headline figures as a table, what was not run, and what the model can do."""
    lines = [f"model      {result['model']['path']}"] if "model" in result else []
    rows = [*_accuracy_rows(result), *_gain_rows(result)]
    if rows:
        lines += align([_HEAD, *rows])
    nll_rows = [*_likelihood_rows(result), *_text_rows(result)]
    if nll_rows:
        head = ("", "nats (95%)", "held out (95%)", "compare with")
        lines += ["", *align([head, *nll_rows])] if rows else align([head, *nll_rows])
    lines += [f"not run: {name}: {why}" for name, why in result["not_run"].items()]
    return [*lines, *skills.lines(skills.judge(result["sections"]))]


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of cells as lines with aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows]


def likelihood_lines(result: Result) -> list[str]:
    """Return every likelihood of a result with its baselines, one on a line."""
    lines = [f"model      {result['model']['path']}"] if "model" in result else []
    for name, label, kind, unit, row in likelihoods(result):
        baselines = "".join(f", {label_of(k)} {nll(v)}" for k, v in row["baselines"].items())
        lines.append(f"likelihood, {name}, {label}, {kind}: {nll(row)} {unit}{baselines}")
    return lines


def _accuracy_rows(result: Result) -> Iterator[list[str]]:
    for name, figures in scored(result):
        section = name.split(",")[0]
        if name not in (section, f"{section}, both"):
            continue
        tables = comparisons(figures)
        part = "seen" if figures["score"]["seen"] is not None else "held_out"
        compared = [
            f"{label_of(key)} {accuracy(tables[key][part])}"
            for key in _HEADLINES[section]
            if key in tables and tables[key][part] is not None
        ]
        scores = [
            "-" if table is None else accuracy(table, interval=True)
            for table in (figures["score"][part] for part in PARTS)
        ]
        yield [section, *scores, ", ".join(compared)]


def _gain_rows(result: Result) -> Iterator[list[str]]:
    tables: dict[str, dict[str, str]] = {}
    for label, what, table in gains(result):
        figure = stats.format_figure(table["mean"], "difference", "+.3f")
        tables.setdefault(what, {})[label] = figure
    for what, cells in tables.items():
        yield ["  difference", *(cells.get(label, "-") for label in PARTS.values()), what]


def _likelihood_rows(result: Result) -> Iterator[list[str]]:
    kinds = {("t2i", "image"): "image per dim", ("question", "text"): "answers per token"}
    for (task, kind), title in kinds.items():
        rows = {
            label: row
            for name, label, row_kind, _, row in likelihoods(result)
            if (name, row_kind) == (task, kind)
        }
        if rows:
            first = rows.get("seen") or next(iter(rows.values()))
            compared = [f"{label_of(k)} {v['nll']:.4f}" for k, v in first["baselines"].items()]
            cells = [nll(rows[label]) if label in rows else "-" for label in PARTS.values()]
            yield [title, *cells, ", ".join(compared)]


def _text_rows(result: Result) -> Iterator[list[str]]:
    if text := result["sections"].get("text"):
        compared = f"its VLM {text['vlm']['nll']:.4f}, difference {nll(text['difference'])}"
        yield ["text per token", nll(text["model"]), "-", compared]


def scored(result: Result) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (name, {score, baselines, ceilings}) of everything that is correct or not."""
    for name, figures in result["sections"].items():
        if name == "editing":
            for measure in editing.MEASURES:
                yield f"editing, {measure}", figures[measure]
        elif name in suite.SCORED_SECTIONS:
            yield name, {"ceilings": {}, **figures}
            if "image" in figures:
                yield f"{name}, the image", figures["image"]


def comparisons(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tables that a score is compared with, by name."""
    return {**figures.get("references", {}), **figures["baselines"], **figures["ceilings"]}


def likelihoods(result: Result) -> Iterator[tuple[str, str, str, str, Mapping[str, Any]]]:
    """Yield (task, part, kind, unit, row) of every likelihood."""
    for task, parts in result["sections"].get("likelihood", {}).items():
        for part, figures in parts.items():
            for kind, unit in (("image", "nats/dim"), ("text", "nats/token")):
                if kind in figures:
                    yield task, PARTS.get(part, part), kind, unit, figures[kind]


def gains(result: Result) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield (label, what, table) of what the generated images of reasoning add."""
    differences = result["sections"].get("reasoning", {}).get("differences", {})
    for part, label in PARTS.items():
        for name, what in GAINS.items():
            table = differences.get(name, {}).get(part)
            if table is not None:
                yield label, what, table


def label_of(name: str) -> str:
    """Return the name of a comparison or tag as words."""
    return name.replace("_", " ")


def accuracy(table: Mapping[str, Any], tag: str = "", interval: bool = False) -> str:
    """Format the accuracy of a tag, or of their mean; empty if the tag has no cases."""
    row = table["tags"].get(tag) if tag else table["mean"]
    return "" if row is None else stats.format_figure(row, "correct", ".3f", interval)


def nll(row: Mapping[str, Any]) -> str:
    """Format a negative log-likelihood with its interval."""
    return stats.format_figure(row, "nll", ".4f")
