"""`report.html`: a run on one page, written at any time from the files in its workdir."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from starflow2_jax import config, params
from starflow2_jax.checkpoints import orbax, steps
from starflow2_jax.data import untrusted
from starflow2_jax.evaluation import stats
from starflow2_jax.evaluation.report import html, plots
from starflow2_jax.runtime import atomic
from starflow2_jax.training.logging import run_log
from starflow2_jax.training.tasks import registry
from starflow2_jax.training.workdir import read_records

FILE = "report.html"
_SAMPLE_FILE = re.compile(r"(?:(.+)_)?(\d+)\.png")
_MAX_STAGES = 6
# Baselines of `interleaved_likelihood.measure_records` in words.
RECORD_BASELINES = {
    "no_text": "without the user's words",
    "gaussian": "by one Gaussian for each channel",
    "blank_image": "with gray images in the prompt",
}


def write(workdir: epath.PathLike) -> epath.Path:
    """Write `report.html` into a run's folder and replace an older one."""
    workdir = epath.Path(workdir)
    path = workdir / FILE
    if jax.process_index():
        return path
    newest_step = steps.latest(workdir)
    # Orbax reads in all processes at once, and only one of them writes the report. Resuming checks
    # the files against the checkpoint in any case.
    reads_checkpoint = newest_step is not None and jax.process_count() == 1
    meta = orbax.read_meta(workdir) if reads_checkpoint else {}
    cfg = read_records(workdir, meta)
    if cfg is None:
        raise FileNotFoundError(f"{workdir} has no {run_log.CONFIG}: it is not the folder of a run")
    rows = run_log.read_rows(workdir)
    likelihoods = _read_results(workdir, "likelihood*.json")
    gaussian = _gaussian_baseline(rows, likelihoods)
    title = cfg.get("name") or workdir.resolve().name
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="under">{html.escape(_progress(cfg, rows))}</p>',
        _cards(cfg, rows, likelihoods, gaussian),
        _samples(workdir),
        _curves(rows, gaussian),
        _likelihood_section(likelihoods),
        _records_section(_read_results(workdir, "rows_likelihood*.json")),
        _last_values(rows),
        _starts(workdir),
        _configuration(cfg),
    ]
    atomic.write_file(path, html.page(title, body))
    return path


def _progress(cfg: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    step, steps = rows[-1]["step"] if rows else 0, cfg["train"]["steps"]
    batch_size = cfg["train"]["batch_size"]
    # A row of these tasks packs several records.
    unit = "rows" if registry.kind(cfg) in ("vlm", "starflow2") else "images"
    return (
        f"step {step:,} of {steps:,}{', finished' if step >= steps else ''}; "
        f"{batch_size:,} {unit} a step, {step * batch_size:,} seen"
    )


def _last(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Return the newest finite value of a metric."""
    return next((row[name] for row in reversed(rows) if row.get(name) is not None), None)


def _cards(cfg, rows, likelihoods, gaussian) -> str:
    parameters = params.count(registry.declare_model(cfg))
    mfu = _last(rows, "mfu")
    tokens = _last(rows, "tokens_per_second")
    bits = next((m["bits_per_dim"] for m in reversed(likelihoods) if m.get("bits_per_dim")), None)
    cards = [
        ("nats/dim, evaluation data", _last(rows, "eval/nats_per_dim"), None),
        ("nats/dim, training", _last(rows, "nats_per_dim"), None),
        ("nats/dim, Gaussian per dimension", gaussian, None),
        ("bits/dim", bits, None),
        ("nats/token, evaluation data", _last(rows, "eval/text_nats"), None),
        ("exact match of records", _last(rows, "eval/record_accuracy"), None),
        ("PSNR, dB", _last(rows, "eval/psnr"), None),
        ("relative error of features", _last(rows, "eval/relative_error"), None),
        ("parameters", parameters, None),
        ("tokens/s", tokens, None if tokens is None else f"{tokens:,.0f}"),
        ("model FLOPs utilization (MFU)", mfu, None if mfu is None else f"{mfu:.1%}"),
    ]
    return html.cards([(n, label or html.number(v)) for n, v, label in cards if v is not None])


def _samples(workdir: epath.Path) -> str:
    grids: dict[str, list[tuple[int, epath.Path]]] = {}
    folder = workdir / "samples"
    for path in sorted(folder.iterdir()) if folder.exists() else []:
        if match := _SAMPLE_FILE.fullmatch(path.name):
            grids.setdefault(match[1] or "samples", []).append((int(match[2]), path))
    parts = []
    for name, files in sorted(grids.items(), key=lambda item: (item[0] != "samples", item[0])):
        files.sort()
        step, path = files[-1]
        newest = html.image(html.shrink_png(path, 1200), f"{name}, step {step}", f"step {step:,}")
        parts += [f"<h2>{html.escape(name.capitalize())}</h2>", newest]
        if len(files) > 1:
            # Early steps change most, so the stages are spaced evenly in log(index).
            count = min(_MAX_STAGES, len(files))
            indices = np.geomspace(1, len(files), count).round().astype(int) - 1
            stages = [files[i] for i in sorted(set(indices.tolist()))]
            images = [
                html.image(html.shrink_png(p, 480), f"step {s}", f"step {s:,}") for s, p in stages
            ]
            parts.append(f'<div class="stages">{"".join(images)}</div>')
    return "\n".join(parts)


def _curves(rows: Sequence[Mapping[str, Any]], gaussian: float | None) -> str:
    figures = {
        "nats per dimension": plots.likelihood(rows, gaussian),
        "loss, log-determinants, gradient norm, learning rate, speed": plots.training_curves(rows),
    }
    images = [html.image(data, alt) for alt, data in figures.items() if data]
    return "\n".join(["<h2>Curves</h2>", *images]) if images else ""


def _read_results(workdir: epath.Path, pattern: str) -> list[dict[str, Any]]:
    """Return the results that `evaluate likelihood` wrote into a run's folder."""
    folder = workdir / "evaluation"
    paths = sorted(folder.glob(pattern)) if folder.exists() else []
    return [untrusted.read_json(path, dict[str, Any]) for path in paths]


def _gaussian_baseline(rows, likelihoods) -> float | None:
    """Return the Gaussian's nats/dim, as training logged it or else as `evaluate` measured it."""
    logged = _last(rows, "eval/gaussian_nats_per_dim")
    measured = [
        result["baselines"]["gaussian_per_dimension"]["nats_per_dim"]
        for result in likelihoods
        if result.get("baselines")
    ]
    return logged if logged is not None or not measured else measured[-1]


def _likelihood_section(likelihoods: Sequence[Mapping[str, Any]]) -> str:
    if not likelihoods:
        return ""
    table, notes = [], []
    for result in likelihoods:
        step, path = result["model"]["step"], result["data"]["path"]
        label = f"{'model folder' if step is None else f'step {step:,}'}, {path}"
        noise = " ".join(str(value) for value in result["protocol"]["noise"].values())
        figures = [_with_interval(result, name) for name in ("nats_per_dim", "bits_per_dim")]
        table.append((label, result["rows"], noise, *figures))
        for name, baseline in result["baselines"].items():
            label = f"{name.replace('_', ' ')}, fitted to {baseline['fit']}"
            figures = [_with_interval(baseline, name) for name in ("nats_per_dim", "bits_per_dim")]
            table.append((label, "", "", *figures))
        notes += [result["not_comparable"]] if result["not_comparable"] else []
    head = ("what", "images", "noise", "nats/dim (95% over images)", "bits/dim")
    below = "".join(f"<p>Bits/dim are {html.escape(note)}.</p>" for note in dict.fromkeys(notes))
    names = ("model", "data", "protocol", "devices", "versions")
    stamp = json.dumps({name: likelihoods[-1].get(name) for name in names}, indent=2)
    return (
        f"<h2>Likelihood</h2>{html.table(head, table)}{below}"
        "<details><summary>Protocol of the last one</summary>"
        f"<pre>{html.escape(stamp)}</pre></details>"
    )


def _records_section(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the likelihoods of records under a STARFlow2, next to their baselines."""
    table = []
    for result in results:
        figures = result["sections"]["likelihood"]["records"]["all"]
        for kind, unit in (("image", "nats/dim"), ("text", "nats/token")):
            if kind not in figures:
                continue
            row, step = figures[kind], result["model"]["step"]
            name = f"{kind} in {result['data']['path']}, step {step or 0:,}"
            table.append((name, row["records"], stats.format_figure(row, "nll", ".4f"), unit))
            table += [
                (f"... {RECORD_BASELINES[key]}", "", stats.format_figure(b, "nll", ".4f"), unit)
                for key, b in row["baselines"].items()
            ]
    if not table:
        return ""
    head = ("what", "records", "NLL (95%)", "unit")
    return f"<h2>Likelihood of records</h2>{html.table(head, table)}"


def _with_interval(row: Mapping[str, Any], name: str) -> str:
    return "not comparable" if row[name] is None else stats.format_figure(row, name, ".4f")


def _last_values(rows: Sequence[Mapping[str, Any]]) -> str:
    names = dict.fromkeys(
        name.removeprefix("eval/") for row in rows for name in row if name != "step"
    )
    # The newest value counts even if it is not finite.
    last = {name: row[name] for row in rows for name in row}
    table = [(name, last.get(name, ""), last.get(f"eval/{name}", "")) for name in names]
    head = ("figure", "training", "evaluation data")
    return f"<h2>Last figures</h2>{html.table(head, table)}" if table else ""


def _starts(workdir: epath.Path) -> str:
    run = run_log.read_run(workdir)
    if run is None:
        file = workdir / run_log.RUN
        logging.warning("%s is missing, so the report names no command and no machine", file)
        return ""
    starts = run["starts"]
    parts = ["<h2>Commands and machine</h2>"]
    for start in starts:
        parts.append(f"<p>{html.escape(start['time'])}, from step {start['step']:,}</p>")
        parts.append(f"<pre>{html.escape(_shell_lines(start['command']))}</pre>")
    last = starts[-1]
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    about = [("devices", last["devices"]), ("processes", str(last["processes"]))]
    parts.append(html.table((), [*about, ("machine", last["machine"]), ("versions", versions)]))
    return "\n".join(parts)


def _shell_lines(command: str) -> str:
    """Return a command with one flag on each line, so that it can be pasted into a shell."""
    first, *words = shlex.split(command)
    lines = shlex.quote(first)
    for word in words:
        lines += (" \\\n    " if word.startswith("--") else " ") + shlex.quote(word)
    return lines


def _configuration(cfg: Mapping[str, Any]) -> str:
    changed = config.differences(config.default(), cfg)
    names = [line.split(":", 1)[0] for line in changed]
    values = {**config.flat(cfg), **{f"model.{k}": v for k, v in cfg["model"].items()}}
    rows = [
        (name, json.dumps(values[name]), config.KEYS[name].doc if name in config.KEYS else "")
        for name in sorted(names, key=lambda name: (not name.startswith("model."), name))
        if name in values
    ]
    full = html.escape(json.dumps(cfg, indent=2))
    return (
        f"<h2>Configuration</h2><p>Keys that differ from the defaults:</p>"
        f"{html.table(('key', 'value', 'meaning'), rows)}"
        f"<details><summary>All of it</summary><pre>{full}</pre></details>"
    )
