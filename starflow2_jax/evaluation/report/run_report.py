"""`report.html`: a run on one page that needs nothing beside it, pictures included.

It is written from what lies in the workdir (`training/logging/run_log.py` says what), so it can be
made again at any time, on any machine, also while the run goes on.
"""

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
from starflow2_jax.evaluation.report import html as page, plots
from starflow2_jax.training.logging import run_log
from starflow2_jax.training.tasks import registry

FILE = "report.html"
_SAMPLE = re.compile(r"(?:(.+)_)?(\d+)\.png")
_STAGES = 6


def write(workdir: epath.PathLike) -> epath.Path:
    """Writes `report.html` into a run's folder, over the one before.

    Raises:
        FileNotFoundError: the folder has no `config.json`, so no run has been there.
        ValueError: `metrics.jsonl` or another of the run's records is damaged; names it.
    """
    workdir = epath.Path(workdir)
    path = workdir / FILE
    if jax.process_index():
        return path
    cfg = run_log.read_config(workdir)
    if cfg is None:
        raise FileNotFoundError(f"{workdir} has no {run_log.CONFIG}: it is not the folder of a run")
    rows = run_log.read(workdir)
    measured = _measured(workdir)
    gaussian = _gaussian(rows, measured)
    title = cfg.get("name") or workdir.resolve().name
    body = [
        f"<h1>{page.text(title)}</h1>",
        f'<p class="under">{page.text(_state(cfg, rows))}</p>',
        _cards(cfg, rows, measured, gaussian),
        _samples(workdir),
        _curves(rows, gaussian),
        _likelihoods(measured),
        _final(rows),
        _starts(workdir),
        _configuration(cfg),
    ]
    path.write_text(page.whole(title, body), encoding="utf-8")
    return path


# ---------------------------------------------------------------------------------------- sections


def _state(cfg: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    steps, now = cfg["train"]["steps"], rows[-1]["step"] if rows else 0
    batch, what = cfg["train"]["batch_size"], "images"
    if cfg.get("task") in ("vlm", "starflow2"):
        what = "rows"  # of several records
    return (
        f"step {now:,} of {steps:,}{', finished' if now >= steps else ''}; "
        f"{batch:,} {what} a step, {now * batch:,} seen"
    )


def _last(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    return next((row[name] for row in reversed(rows) if row.get(name) is not None), None)


def _cards(cfg, rows, measured, gaussian) -> str:
    parameters = params.count(registry.declare_model(cfg))
    mfu = _last(rows, "mfu")
    tokens = _last(rows, "tokens_per_second")
    bits = next((m["bits_per_dim"] for m in reversed(measured) if m.get("bits_per_dim")), None)
    cards = [
        ("nats/dim, evaluation data", _last(rows, "eval/nats_per_dim"), None),
        ("nats/dim, training", _last(rows, "nats_per_dim"), None),
        ("nats/dim, Gaussian per dimension", gaussian, None),
        ("bits/dim", bits, None),
        ("nats/token, evaluation data", _last(rows, "eval/text_nats"), None),
        ("records answered right", _last(rows, "eval/record_accuracy"), None),
        ("PSNR, dB", _last(rows, "eval/psnr"), None),
        ("relative error of features", _last(rows, "eval/relative_error"), None),
        ("parameters", parameters, None),
        ("tokens/s", tokens, None if tokens is None else f"{tokens:,.0f}"),
        ("of the peak (MFU)", mfu, None if mfu is None else f"{mfu:.1%}"),
    ]
    shown = [(n, shown or page.figure(v)) for n, v, shown in cards if v is not None]
    return page.cards(shown)


def _samples(workdir: epath.Path) -> str:
    """The newest grid of each name, and how it came to be."""
    grids: dict[str, list[tuple[int, epath.Path]]] = {}
    folder = workdir / "samples"
    for path in sorted(folder.iterdir()) if folder.exists() else []:
        if found := _SAMPLE.fullmatch(path.name):
            grids.setdefault(found[1] or "samples", []).append((int(found[2]), path))
    parts = []
    for name, found in sorted(grids.items(), key=lambda item: (item[0] != "samples", item[0])):
        found.sort()
        newest, path = found[-1]
        parts.append(f"<h2>{page.text(name.capitalize())}</h2>")
        parts.append(
            page.picture(page.shrunk(path, 1200), f"{name}, step {newest}", f"step {newest:,}")
        )
        if len(found) > 1:
            # Early steps change most: evenly spaced in the logarithm of their place.
            places = np.geomspace(1, len(found), min(_STAGES, len(found))).round().astype(int) - 1
            stages = [found[place] for place in sorted(set(places.tolist()))]
            shown = [
                page.picture(page.shrunk(p, 480), f"step {s}", f"step {s:,}") for s, p in stages
            ]
            parts.append(f'<div class="stages">{"".join(shown)}</div>')
    return "\n".join(parts)


def _curves(rows: Sequence[Mapping[str, Any]], gaussian: float | None) -> str:
    found = {
        "nats per dimension": plots.likelihood(rows, gaussian),
        "loss, log-determinants, gradient norm, learning rate, speed": plots.parts(rows),
    }
    shown = [page.picture(data, alt) for alt, data in found.items() if data]
    return "\n".join(["<h2>Curves</h2>", *shown]) if shown else ""


def _measured(workdir: epath.Path) -> list[dict[str, Any]]:
    """Results of `evaluate likelihood`, by name of their files."""
    folder = workdir / "evaluation"
    results = []
    for path in sorted(folder.glob("likelihood*.json")) if folder.exists() else []:
        try:
            results.append(json.loads(path.read_text()))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
    return results


def _gaussian(rows, measured) -> float | None:
    """nats/dim of the Gaussian baseline, as training logged it or `evaluate` found it."""
    logged = _last(rows, "eval/gaussian_nats_per_dim")
    found = [m["baselines"]["gaussian_per_dimension"] for m in measured if m.get("baselines")]
    return logged if logged is not None or not found else found[-1]["nats_per_dim"]


def _likelihoods(measured: Sequence[Mapping[str, Any]]) -> str:
    if not measured:
        return ""
    lines, notes = [], []
    for found in measured:
        data, protocol = found["data"], found["protocol"]
        noise = " ".join(str(value) for value in protocol["noise"].values())
        number = found["model"]["step"]
        what = f"{'model folder' if number is None else f'step {number:,}'}, {data['path']}"
        spreads = (_spread(found, "nats_per_dim"), _spread(found, "bits_per_dim"))
        lines.append((what, found["rows"], noise, *spreads))
        for name, baseline in found["baselines"].items():
            bits = baseline["bits_per_dim"]
            values = (
                page.figure(baseline["nats_per_dim"]),
                "not comparable" if bits is None else page.figure(bits),
            )
            lines.append(
                (f"{name.replace('_', ' ')}, fitted to {baseline['fit']}", "", "", *values)
            )
        notes += [found["not_comparable"]] if found["not_comparable"] else []
    head = ("what", "images", "noise", "nats/dim (95% over images)", "bits/dim")
    below = "".join(f"<p>Bits/dim are {page.text(note)}.</p>" for note in dict.fromkeys(notes))
    stamp = json.dumps(
        {
            key: measured[-1].get(key)
            for key in ("model", "data", "protocol", "devices", "versions")
        },
        indent=2,
    )
    return (
        f"<h2>Likelihood</h2>{page.table(head, lines)}{below}"
        "<details><summary>Protocol of the last one</summary>"
        f"<pre>{page.text(stamp)}</pre></details>"
    )


def _spread(found: Mapping[str, Any], name: str) -> str:
    if found[name] is None:
        return "not comparable"
    pair = found.get(f"{name}_95")
    return page.figure(found[name]) + (
        f" ({page.figure(pair[0])} to {page.figure(pair[1])})" if pair else ""
    )


def _final(rows: Sequence[Mapping[str, Any]]) -> str:
    names = dict.fromkeys(
        name.removeprefix("eval/") for row in rows for name in row if name != "step"
    )
    # Even where the newest is not finite, it is the newest that counts.
    last = {name: row[name] for row in rows for name in row}
    lines = [(name, last.get(name, ""), last.get(f"eval/{name}", "")) for name in names]
    head = ("figure", "training", "evaluation data")
    return f"<h2>Last figures</h2>{page.table(head, lines)}" if lines else ""


def _starts(workdir: epath.Path) -> str:
    path = workdir / run_log.RUN
    if not path.exists():
        logging.warning("%s is missing: the report names no command and no machine", path)
        return ""
    starts = json.loads(path.read_text())["starts"]
    parts = ["<h2>Commands and machine</h2>"]
    for start in starts:
        parts.append(f"<p>{page.text(start['time'])}, from step {start['step']:,}</p>")
        parts.append(f"<pre>{page.text(_pasted(start['command']))}</pre>")
    last = starts[-1]
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    about = [("devices", last["devices"]), ("processes", str(last["processes"]))]
    parts.append(page.table((), [*about, ("machine", last["machine"]), ("versions", versions)]))
    return "\n".join(parts)


def _pasted(command: str) -> str:
    """A command with a flag on each line, in a form that can be pasted into a shell."""
    breaks = lambda word: " \\\n    " if word.startswith("--") else " "
    first, *words = shlex.split(command)
    return shlex.quote(first) + "".join(breaks(word) + shlex.quote(word) for word in words)


def _configuration(cfg: Mapping[str, Any]) -> str:
    changed = config.differences(config.default(), cfg)
    names = [line.split(":", 1)[0] for line in changed]
    values = {**config.flat(cfg), **{f"model.{k}": v for k, v in cfg["model"].items()}}
    rows = [
        (name, json.dumps(values[name]), config.KEYS[name].doc if name in config.KEYS else "")
        for name in sorted(names, key=lambda name: (not name.startswith("model."), name))
        if name in values
    ]
    whole = page.text(json.dumps(cfg, indent=2))
    return (
        f"<h2>Configuration</h2><p>Where it differs from the defaults:</p>"
        f"{page.table(('key', 'value', 'meaning'), rows)}"
        f"<details><summary>All of it</summary><pre>{whole}</pre></details>"
    )
