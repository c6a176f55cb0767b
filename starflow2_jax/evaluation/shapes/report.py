"""The result of `evaluate shapes` and `evaluate all` as lines of text, and as an HTML page."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from starflow2_jax.evaluation import stats, training_history
from starflow2_jax.evaluation.report import html
from starflow2_jax.evaluation.result_files import SHAPES_FILE, ResultFile
from starflow2_jax.evaluation.shapes import contact_sheets, editing, skills, suite
from starflow2_jax.evaluation.shapes.cases import Sample
from starflow2_jax.runtime import atomic
from starflow2_jax.training.logging import image_grid

Result = Mapping[str, Any]
PARTS = {"seen": "seen", "held_out": "held out"}
# What the images of reasoning add, by the baseline without them.
GAINS = {
    "direct_answer": "more correct with an image than without",
    "other_image": "more correct with its own image than with that of another case",
}


def summary_lines(result: Result) -> list[str]:
    """Return the headline figures as lines of text."""
    lines = [f"model      {result['model']['path']}"] if "model" in result else []
    for name, figures in _scored(result):
        for part, label in PARTS.items():
            if figures["score"][part] is not None:
                comparisons = [
                    f"{_label(key)} {_accuracy(table[part])}"
                    for key, table in _comparisons(figures).items()
                    if table[part] is not None
                ]
                score = _accuracy(figures["score"][part], interval=True)
                lines.append(f"{name}, {label}: {score}; {', '.join(comparisons)}")
    for label, what, table in _gains(result):
        figure = stats.format_figure(table["mean"], "difference", "+.3f")
        lines.append(f"reasoning, {label}: {figure} {what}")
    for name, label, kind, unit, row in _likelihoods(result):
        baselines = "".join(f", {_label(k)} {_nll(v)}" for k, v in row["baselines"].items())
        lines.append(f"likelihood, {name}, {label}, {kind}: {_nll(row)} {unit}{baselines}")
    if text := result["sections"].get("text"):
        lines.append(
            f"text alone: {_nll(text['model'])} nats/token, its VLM {_nll(text['vlm'])}, "
            f"difference {_nll(text['difference'])}; correct {text['model']['exact_match']:.3f}, "
            f"its VLM {text['vlm']['exact_match']:.3f}"
        )
    lines += [f"not run: {name}: {why}" for name, why in result["not_run"].items()]
    return [*lines, *skills.lines(skills.judge(result["sections"]))]


def sample_row(sample: Sample) -> dict[str, Any]:
    """Return a sample for JSON, without its images."""
    return {
        "id": sample.case.id,
        "tag": sample.case.tag,
        "holdout": sample.case.holdout,
        "prompt": sample.case.prompt_text,
        "answer": sample.text,
        "correct": sample.correct,
        "reason": sample.reason,
        "log_likelihood": sample.log_likelihood,
    }


def write_folder(
    file: ResultFile, result: Result, sheets: Mapping[str, np.ndarray], *, overwrite: bool
) -> Result:
    """Write result, sheets and page to the folder of a result; return the result with its stamp."""
    with atomic.folder(str(file.path), overwrite=overwrite) as temporary:
        result, _ = dataclasses.replace(file, path=temporary / SHAPES_FILE).write(result)
        for name, sheet in sheets.items():
            atomic.write_file(temporary / f"{name}.png", image_grid.png(sheet))
        write(temporary / "report.html", result, sheets)
    return result


def write(path: epath.PathLike, result: Result, sheets: Mapping[str, np.ndarray]) -> None:
    """Write the page to `path`, with the sheets of `contact_sheets.make`."""
    model = result.get("model", {})
    body = [
        f"<h1>Evaluation on shapes: {html.escape(model.get('path', ''))}</h1>",
        f'<p class="under">{html.escape(_overview(result))}</p>',
        f"<p>{html.escape(result['note'])}</p>" if result.get("note") else "",
        html.cards(_cards(result)),
        skills.section(skills.judge(result["sections"])),
        html.bullets("Its training", training_history.lines(result.get("training", []))),
        *_sections(result, sheets),
        _likelihood_section(result),
        _text_section(result["sections"].get("text")),
        html.bullets("Not run", [f"{name}: {why}" for name, why in result["not_run"].items()]),
        _protocol_section(result),
    ]
    atomic.write_file(path, html.page("Evaluation on shapes", body))


def _scored(result: Result) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (name, {score, baselines, ceilings}) of everything that is correct or not."""
    for name, figures in result["sections"].items():
        if name == "editing":
            for measure in editing.MEASURES:
                yield f"editing, {measure}", figures[measure]
        elif name in suite.SCORED_SECTIONS:
            yield name, {"ceilings": {}, **figures}
            if "image" in figures:
                yield f"{name}, the image", figures["image"]


def _comparisons(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {**figures.get("references", {}), **figures["baselines"], **figures["ceilings"]}


def _likelihoods(result: Result) -> Iterator[tuple[str, str, str, str, Mapping[str, Any]]]:
    """Yield (task, part, kind, unit, row) of every likelihood."""
    for task, parts in result["sections"].get("likelihood", {}).items():
        for part, figures in parts.items():
            for kind, unit in (("image", "nats/dim"), ("text", "nats/token")):
                if kind in figures:
                    yield task, PARTS.get(part, part), kind, unit, figures[kind]


def _gains(result: Result) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield (label, what, table) of what the generated images of reasoning add."""
    differences = result["sections"].get("reasoning", {}).get("differences", {})
    for part, label in PARTS.items():
        for name, what in GAINS.items():
            table = differences.get(name, {}).get(part)
            if table is not None:
                yield label, what, table


def _label(name: str) -> str:
    return name.replace("_", " ")


def _accuracy(table: Mapping[str, Any], tag: str = "", interval: bool = False) -> str:
    """Format the accuracy of a tag, or of their mean; empty if the tag has no cases."""
    row = table["tags"].get(tag) if tag else table["mean"]
    return "" if row is None else stats.format_figure(row, "correct", ".3f", interval)


def _nll(row: Mapping[str, Any]) -> str:
    return stats.format_figure(row, "nll", ".4f")


def _overview(result: Result) -> str:
    counts = ", ".join(f"{count} of {task}" for task, count in result["cases"].items())
    seconds = f"; {result['seconds']:,.0f} s" if "seconds" in result else ""
    return f"{counts}{seconds}. Accuracies with 95% intervals; the mean weighs every tag alike."


def _cards(result: Result) -> list[tuple[str, str]]:
    cards = []
    for name, figures in _scored(result):
        if figures["score"]["seen"] is not None:
            cards.append((f"{name}, seen", _accuracy(figures["score"]["seen"])))
    for name, label, kind, unit, row in _likelihoods(result):
        if label == "seen" and (name, kind) in (("t2i", "image"), ("question", "text")):
            cards.append((f"{unit} of {name}", f"{row['nll']:.4f}"))
    return cards


def _sections(result: Result, sheets: Mapping[str, np.ndarray]) -> Iterator[str]:
    tables: dict[str, list[str]] = {}
    for name, figures in _scored(result):
        for part, label in PARTS.items():
            if figures["score"][part] is not None:
                table = _accuracy_table(f"{name}, {label}", figures, part)
                tables.setdefault(name.split(",")[0], []).append(table)
    for name, section_tables in tables.items():
        yield f"<h2>{html.escape(name.capitalize())}</h2>"
        yield from section_tables
        if name == "editing":
            psnr = result["sections"]["editing"]["psnr_outside_edit"]
            values = ", ".join(f"{_label(key)} {value:.1f}" for key, value in psnr.items())
            yield f"<p>PSNR outside of what changes, dB: {html.escape(values)}.</p>"
        if name == "reasoning":
            yield from _gain_tables(result)
        for sheet, pixels in sheets.items():
            if sheet.split("_")[0] == name:
                title = contact_sheets.TITLES[sheet]
                yield html.image(image_grid.png(pixels), title, title)


def _accuracy_table(title: str, figures: Mapping[str, Any], part: str) -> str:
    score = figures["score"][part]
    tags = list(score["tags"])

    def row(name, table, interval=False):
        return [name, *(_accuracy(table, tag, interval) for tag in ("", *tags))]

    counts = [str(score["tags"][tag]["count"]) for tag in tags]
    cases = ["cases", str(score["mean"]["count"]), *counts]
    rows = [row("the model", score, interval=True), cases]
    for name, table in _comparisons(figures).items():
        if table[part] is not None:
            # The claim about reasoning is the difference to these.
            has_intervals = "direct_answer" in figures["baselines"]
            interval = has_intervals and name in (*GAINS, "reference_image")
            rows.append(row(_label(name), table[part], interval))
    return html.table([title, "mean of tags", *map(_label, tags)], rows)


def _gain_tables(result: Result) -> Iterator[str]:
    gains: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for label, what, table in _gains(result):
        gains.setdefault(label, []).append((what, table))
    for label, group in gains.items():
        head = [f"reasoning, {label}", "mean of tags", *map(_label, group[0][1]["tags"])]
        rows = [
            [what, *(stats.format_figure(row, "difference", "+.3f") for row in
                     (table["mean"], *table["tags"].values()))]
            for what, table in group
        ]  # fmt: skip
        yield html.table(head, rows)


def _likelihood_section(result: Result) -> str:
    rows = []
    for name, label, _, unit, row in _likelihoods(result):
        baselines = ", ".join(f"{_label(k)} {_nll(v)}" for k, v in row["baselines"].items())
        rows.append([f"{name}, {label}", row["records"], _nll(row), unit, baselines])
    head = ("records", "number", "NLL (95%)", "unit", "baselines")
    return f"<h2>Likelihood</h2>{html.table(head, rows)}" if rows else ""


def _text_section(figures: Mapping[str, Any] | None) -> str:
    if not figures:
        return ""
    rows = [
        [name, _nll(figures[key]), f"{figures[key]['exact_match']:.3f}"]
        for name, key in (("the model", "model"), ("its frozen VLM alone", "vlm"))
    ]
    rows.append(["difference", _nll(figures["difference"]), ""])
    head = ("", "nats/token (95%)", "exact match")
    return f"<h2>Text alone</h2>{html.table(head, rows)}"


def _protocol_section(result: Result) -> str:
    protocol = dict(result["protocol"])
    comparisons = [
        [section, _label(name), meaning]
        for section, meanings in protocol.pop("comparisons").items()
        for name, meaning in meanings.items()
    ]
    rows = [[_label(name), str(meaning)] for name, meaning in protocol.items()]
    rows += [[key, str(result[key])] for key in ("command", "options", "data") if key in result]
    return (
        f"<h2>Baselines and ceilings</h2>{html.table(('', '', ''), comparisons)}"
        f"<h2>Protocol</h2>{html.table(('', ''), rows)}"
    )
