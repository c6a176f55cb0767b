"""The page of `evaluate all`: examples, tables with every baseline, and the protocol."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from starflow2_jax.evaluation import stats, training_history
from starflow2_jax.evaluation.report import html
from starflow2_jax.evaluation.result_files import SHAPES_FILE, ResultFile
from starflow2_jax.evaluation.shapes import contact_sheets, example_cards, skills, summary
from starflow2_jax.evaluation.shapes.cases import Sample
from starflow2_jax.runtime import atomic
from starflow2_jax.training.logging import image_grid

Result = Mapping[str, Any]
Samples = Mapping[str, Sequence[Sample]]
PAGE = "report.html"


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
        "measures": dict(sample.measures),
    }


def write_folder(
    file: ResultFile, result: Result, samples: Samples, *, seed: int, overwrite: bool
) -> Result:
    """Write result, contact sheets and page to a folder; return the result with its stamp."""
    with atomic.folder(str(file.path), overwrite=overwrite) as temporary:
        result, _ = dataclasses.replace(file, path=temporary / SHAPES_FILE).write(result)
        for name, sheet in contact_sheets.make(samples, seed).items():
            atomic.write_file(temporary / f"{name}.png", image_grid.png(sheet))
        write(temporary / PAGE, result, samples, seed)
    return result


def write(path: epath.PathLike, result: Result, samples: Samples, seed: int = 0) -> None:
    """Write the page to `path`, with examples of each section."""
    model = result.get("model", {})
    body = [
        f"<h1>Evaluation on shapes: {html.escape(model.get('path', ''))}</h1>",
        f'<p class="under">{html.escape(_overview(result))}</p>',
        f"<p>{html.escape(result['note'])}</p>" if result.get("note") else "",
        html.cards(_cards(result)),
        skills.section(skills.judge(result["sections"])),
        html.bullets("Its training", training_history.lines(result.get("training", []))),
        *_sections(result, samples, seed),
        _likelihood_section(result),
        _text_section(result["sections"].get("text")),
        html.bullets("Not run", [f"{name}: {why}" for name, why in result["not_run"].items()]),
        _protocol_section(result),
    ]
    atomic.write_file(path, html.page("Evaluation on shapes", body))


def _overview(result: Result) -> str:
    counts = ", ".join(f"{count} of {task}" for task, count in result["cases"].items())
    seconds = f"; {result['seconds']:,.0f} s" if "seconds" in result else ""
    return f"{counts}{seconds}. Accuracies with 95% intervals; the mean weighs every tag alike."


def _cards(result: Result) -> list[tuple[str, str]]:
    cards = []
    for name, figures in summary.scored(result):
        if figures["score"]["seen"] is not None:
            cards.append((f"{name}, seen", summary.accuracy(figures["score"]["seen"])))
    for name, label, kind, unit, row in summary.likelihoods(result):
        if label == "seen" and (name, kind) in (("t2i", "image"), ("question", "text")):
            cards.append((f"{unit} of {name}", f"{row['nll']:.4f}"))
    return cards


def _sections(result: Result, samples: Samples, seed: int) -> Iterator[str]:
    tables: dict[str, list[str]] = {}
    for name, figures in summary.scored(result):
        for part, label in summary.PARTS.items():
            if figures["score"][part] is not None:
                table = _accuracy_table(f"{name}, {label}", figures, part)
                tables.setdefault(name.split(",")[0], []).append(table)
    for name, section_tables in tables.items():
        yield f"<h2>{html.escape(name.capitalize())}</h2>"
        yield example_cards.section(samples.get(name, ()), seed)
        yield from section_tables
        if name == "editing":
            psnr = result["sections"]["editing"]["psnr_outside_edit"]
            values = ", ".join(
                f"{summary.label_of(key)} {value:.1f}" for key, value in psnr.items()
            )
            yield f"<p>PSNR outside of what changes, dB: {html.escape(values)}.</p>"
        if name == "reasoning":
            yield from _gain_tables(result)


def _accuracy_table(title: str, figures: Mapping[str, Any], part: str) -> str:
    score = figures["score"][part]
    tags = list(score["tags"])

    def row(name, table, interval=False):
        return [name, *(summary.accuracy(table, tag, interval) for tag in ("", *tags))]

    counts = [str(score["tags"][tag]["count"]) for tag in tags]
    cases = ["cases", str(score["mean"]["count"]), *counts]
    rows = [row("the model", score, interval=True), cases]
    for name, table in summary.comparisons(figures).items():
        if table[part] is not None:
            # The claim about reasoning is the difference to these.
            has_intervals = "direct_answer" in figures["baselines"]
            interval = has_intervals and name in (*summary.GAINS, "reference_image")
            rows.append(row(summary.label_of(name), table[part], interval))
    return html.table([title, "mean of tags", *map(summary.label_of, tags)], rows)


def _gain_tables(result: Result) -> Iterator[str]:
    gains: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for label, what, table in summary.gains(result):
        gains.setdefault(label, []).append((what, table))
    for label, group in gains.items():
        head = [f"reasoning, {label}", "mean of tags", *map(summary.label_of, group[0][1]["tags"])]
        rows = [
            [what, *(stats.format_figure(row, "difference", "+.3f") for row in
                     (table["mean"], *table["tags"].values()))]
            for what, table in group
        ]  # fmt: skip
        yield html.table(head, rows)


def _likelihood_section(result: Result) -> str:
    rows = []
    for name, label, _, unit, row in summary.likelihoods(result):
        baselines = ", ".join(
            f"{summary.label_of(k)} {summary.nll(v)}" for k, v in row["baselines"].items()
        )
        rows.append([f"{name}, {label}", row["records"], summary.nll(row), unit, baselines])
    head = ("records", "number", "NLL (95%)", "unit", "baselines")
    return f"<h2>Likelihood</h2>{html.table(head, rows)}" if rows else ""


def _text_section(figures: Mapping[str, Any] | None) -> str:
    if not figures:
        return ""
    rows = [
        [name, summary.nll(figures[key]), f"{figures[key]['exact_match']:.3f}"]
        for name, key in (("the model", "model"), ("its frozen VLM alone", "vlm"))
    ]
    rows.append(["difference", summary.nll(figures["difference"]), ""])
    head = ("", "nats/token (95%)", "exact match")
    return f"<h2>Text alone</h2>{html.table(head, rows)}"


def _protocol_section(result: Result) -> str:
    protocol = dict(result["protocol"])
    comparisons = [
        [section, summary.label_of(name), meaning]
        for section, meanings in protocol.pop("comparisons").items()
        for name, meaning in meanings.items()
    ]
    rows = [[summary.label_of(name), str(meaning)] for name, meaning in protocol.items()]
    rows += [[key, str(result[key])] for key in ("command", "options", "data") if key in result]
    return (
        f"<h2>Baselines and ceilings</h2>{html.table(('', '', ''), comparisons)}"
        f"<h2>Protocol</h2>{html.table(('', ''), rows)}"
    )
