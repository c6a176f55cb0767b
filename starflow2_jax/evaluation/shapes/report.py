"""What `evaluate shapes` and `evaluate all` found, as lines, and as a page with its sheets."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from starflow2_jax.evaluation.report import html as page
from starflow2_jax.evaluation.shapes import contact_sheets, editing, suite
from starflow2_jax.evaluation.shapes.cases import Sample
from starflow2_jax.training.logging import image_grid

Result = Mapping[str, Any]


def lines(result: Result) -> list[str]:
    """The headline figures for people."""
    shown = [f"model      {result['model']['path']}"] if "model" in result else []
    for name, found in _scored(result):
        beside = {**found.get("references", {}), **found["baselines"], **found["ceilings"]}
        for part in ("seen", "withheld"):
            if found["score"][part] is None:
                continue
            others = [
                f"{_words(key)} {_share(table[part])}"
                for key, table in beside.items()
                if table[part] is not None
            ]
            score = _share(found["score"][part], interval=True)
            shown.append(f"{name}, {part}: {score}; {', '.join(others)}")
    for name, part, kind, unit, row in _likelihoods(result):
        beside = "".join(f", {_words(key)} {_nats(o)}" for key, o in row["baselines"].items())
        shown.append(f"likelihood, {name}, {part}, {kind}: {_nats(row)} {unit}{beside}")
    if text := result["sections"].get("text"):
        shown.append(
            f"text alone: {_nats(text['model'])} nats/token, its VLM {_nats(text['vlm'])}, "
            f"difference {_nats(text['difference'])}; right {text['model']['right']:.3f}, "
            f"its VLM {text['vlm']['right']:.3f}"
        )
    return [*shown, *(f"not run: {name}: {why}" for name, why in result["not_run"].items())]


def told(sample: Sample) -> dict[str, Any]:
    """A sample for JSON, without its pictures."""
    case = sample.case
    return {
        "id": case.id,
        "tag": case.tag,
        "withheld": case.withheld,
        "asks": case.asks,
        "says": sample.says,
        "right": sample.right,
        "why": sample.why,
        "log_likelihood": sample.log_likelihood,
    }


def write(path: Any, result: Result, shown: Mapping[str, np.ndarray]) -> None:
    """Writes the page to `path`; `shown` are the `sheets`."""
    model = result.get("model", {})
    body = [
        f"<h1>Evaluation on shapes: {page.text(model.get('path', ''))}</h1>",
        f'<p class="under">{page.text(_about(result))}</p>',
        page.cards(_cards(result)),
        *_sections(result, shown),
        _likelihood(result),
        _text(result["sections"].get("text")),
        _not_run(result["not_run"]),
        _protocol(result),
    ]
    path.write_text(page.whole("Evaluation on shapes", body), encoding="utf-8")


# ------------------------------------------------------------------------------------------ pieces


def _scored(result: Result) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(name, {score, baselines, ceilings}) of everything that is right or wrong."""
    for name, found in result["sections"].items():
        if name == "editing":
            for measure in editing.MEASURES:
                yield f"editing, {measure}", found[measure]
        elif name in suite.SCORES:
            yield name, {"ceilings": {}, **found}
            if "picture" in found:
                yield f"{name}, the picture", found["picture"]


def _likelihoods(result: Result) -> Iterator[tuple[str, str, str, str, Mapping[str, Any]]]:
    """(task, part, kind, unit, row) of every likelihood."""
    for task, parts in result["sections"].get("likelihood", {}).items():
        for part, found in parts.items():
            for kind, unit in (("image", "nats/dim"), ("text", "nats/token")):
                if kind in found:
                    yield task, part, kind, unit, found[kind]


def _words(name: str) -> str:
    return name.replace("_", " ")


def _share(table: Mapping[str, Any], tag: str = "", interval: bool = False) -> str:
    row = table["tags"].get(tag) if tag else table["mean"]
    if row is None:
        return ""
    low, high = row["right_95"]
    return f"{row['right']:.3f}" + (f" ({low:.3f} to {high:.3f})" if interval else "")


def _nats(row: Mapping[str, Any]) -> str:
    pair = row["nats_95"]
    return f"{row['nats']:.4f}" + (f" ({pair[0]:.4f} to {pair[1]:.4f})" if pair else "")


def _about(result: Result) -> str:
    counts = ", ".join(f"{count} of {task}" for task, count in result["cases"].items())
    seconds = f"; {result['seconds']:,.0f} s" if "seconds" in result else ""
    return f"{counts}{seconds}. Shares with 95% intervals; mean over tags, each weighing alike."


def _cards(result: Result) -> list[tuple[str, str]]:
    found = []
    for name, table in _scored(result):
        if table["score"]["seen"] is not None:
            found.append((f"{name}, seen", _share(table["score"]["seen"])))
    for name, part, kind, unit, row in _likelihoods(result):
        if part == "seen" and (name, kind) in (("t2i", "image"), ("question", "text")):
            found.append((f"{unit} of {name}", f"{row['nats']:.4f}"))
    return found


def _sections(result: Result, shown: Mapping[str, np.ndarray]) -> Iterator[str]:
    """Of each section its tables and sheets."""
    tables: dict[str, list[str]] = {}
    for name, found in _scored(result):
        for part in ("seen", "withheld"):
            if found["score"][part] is not None:
                title = f"{name}, {part}"
                tables.setdefault(name.split(",")[0], []).append(_table(title, found, part))
    for name, made in tables.items():
        yield f"<h2>{page.text(name.capitalize())}</h2>"
        yield from made
        if name == "editing":
            rest = result["sections"]["editing"]["psnr_rest"]
            told = ", ".join(f"{_words(key)} {value:.1f}" for key, value in rest.items())
            yield f"<p>PSNR outside of what changes, dB: {page.text(told)}.</p>"
        for sheet, pixels in shown.items():
            if sheet.split("_")[0] == name:
                title = contact_sheets.TITLES[sheet]
                yield page.picture(image_grid.png(pixels), title, title)


def _table(title: str, found: Mapping[str, Any], part: str) -> str:
    tags = list(found["score"][part]["tags"])
    rows: list[Sequence[str]] = []
    row = found["score"][part]
    own = [_share(row, tag, interval=True) for tag in tags]
    rows.append(["the model", _share(row, interval=True), *own])
    counts = [str(row["tags"][tag]["count"]) for tag in tags]
    rows.append(["cases", str(row["mean"]["count"]), *counts])
    beside = {**found.get("references", {}), **found["baselines"], **found["ceilings"]}
    for name, table in beside.items():
        if table[part] is not None:
            other = [_share(table[part], tag) for tag in tags]
            rows.append([_words(name), _share(table[part]), *other])
    head = [title, "mean of tags", *(_words(tag) for tag in tags)]
    return page.table(head, rows)


def _likelihood(result: Result) -> str:
    rows = []
    for name, part, _, unit, row in _likelihoods(result):
        beside = ", ".join(f"{_words(key)} {_nats(o)}" for key, o in row["baselines"].items())
        rows.append([f"{name}, {part}", row["records"], _nats(row), unit, beside])
    head = ("records", "number", "nats (95%)", "", "beside it")
    return f"<h2>Likelihood</h2>{page.table(head, rows)}" if rows else ""


def _text(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    rows = [
        [name, _nats(found[key]), f"{found[key]['right']:.3f}"]
        for name, key in (("the model", "model"), ("its frozen VLM alone", "vlm"))
    ]
    rows.append(["difference", _nats(found["difference"]), ""])
    return f"<h2>Text alone</h2>{page.table(('', 'nats/token (95%)', 'answered right'), rows)}"


def _not_run(found: Mapping[str, str]) -> str:
    items = "".join(f"<li>{page.text(name)}: {page.text(why)}</li>" for name, why in found.items())
    return f"<h2>Not run</h2><ul>{items}</ul>" if items else ""


def _protocol(result: Result) -> str:
    protocol = dict(result["protocol"])
    rows = [
        [name, _words(key), told]
        for name, beside in protocol.pop("beside").items()
        for key, told in beside.items()
    ]
    plain = [[_words(name), str(told)] for name, told in protocol.items()]
    made = [[key, str(result[key])] for key in ("command", "options", "data") if key in result]
    return (
        f"<h2>What stands beside the scores</h2>{page.table(('', '', ''), rows)}"
        f"<h2>Protocol</h2>{page.table(('', ''), [*plain, *made])}"
    )
