"""`report.html`: a run on one page that needs nothing beside it, pictures included.

It is written from what lies in the workdir (`training/log.py` says what), so it can be made again
at any time, on any machine, also while the run goes on.
"""

import base64
import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from PIL import Image

from starflow2_jax import config, params
from starflow2_jax.evaluation import curves
from starflow2_jax.models import fae, streams
from starflow2_jax.training import fae_step, log, starflow2_step, step, vlm_step

FILE = "report.html"
_SAMPLE = re.compile(r"(?:(.+)_)?(\d+)\.png")
_STAGES = 6

_CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 0 auto;
       max-width: 60rem; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem;
       border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
.under { color: #666; margin: .2rem 0 1.2rem; }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; }
.card { border: 1px solid #ddd; border-radius: 6px; padding: .6rem .9rem; min-width: 8.5rem; }
.card b { display: block; font-size: 1.35rem; font-weight: 600; }
.card span { color: #666; font-size: .82rem; }
table { border-collapse: collapse; margin: .4rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .22rem 1.1rem .22rem 0; border-bottom: 1px solid #eee;
         vertical-align: top; } th { font-weight: 600; }
.n { text-align: right; padding-left: 1rem; }
code, pre { font: 13px/1.45 ui-monospace, monospace; } pre { background: #f6f6f6; padding: .7rem;
         border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere; margin: .4rem 0; }
img { max-width: 100%; } figure { margin: 0; } figcaption { color: #666; font-size: .82rem; }
.stages { display: grid; grid-template-columns: repeat(3, 1fr); gap: 1rem; margin-top: 1rem; }
.stages img { width: 100%; } summary { cursor: pointer; color: #555; }
"""


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
    cfg = log.read_config(workdir)
    if cfg is None:
        raise FileNotFoundError(f"{workdir} has no {log.CONFIG}: it is not the folder of a run")
    rows = log.read(workdir)
    measured = _measured(workdir)
    gaussian = _gaussian(rows, measured)
    title = cfg.get("name") or workdir.resolve().name
    body = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="under">{_text(_state(cfg, rows))}</p>',
        _cards(cfg, rows, measured, gaussian),
        _samples(workdir),
        _curves(rows, gaussian),
        _likelihoods(measured),
        _final(rows),
        _starts(workdir),
        _configuration(cfg),
    ]
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{_text(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body>\n</html>\n"
    )
    path.write_text(page, encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------ pieces


def _text(value: Any) -> str:
    return html.escape(str(value))


def _figure(value: Any) -> str:
    """A number for people."""
    if value is None:
        return "not finite"
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        return f"{value:.3g}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def cell(value):
        number = value is None or isinstance(value, int | float)
        return f'<td class="n">{_figure(value)}</td>' if number else f"<td>{_text(value)}</td>"

    # A heading stands over its column's numbers.
    kinds = [" class=n" if isinstance(value, int | float) else "" for value in rows[0]]
    titles = "".join(f"<th{kind}>{_text(name)}</th>" for name, kind in zip(head, kinds))
    lines = [titles, *("".join(map(cell, row)) for row in rows)]
    return "<table>" + "\n".join(f"<tr>{line}</tr>" for line in lines if line) + "</table>"


def _picture(data: bytes, alt: str, caption: str = "") -> str:
    source = base64.b64encode(data).decode()
    below = f"<figcaption>{_text(caption)}</figcaption>" if caption else ""
    return f'<figure><img alt="{_text(alt)}" src="data:image/png;base64,{source}">{below}</figure>'


def _shrunk(path: epath.Path, width: int) -> bytes:
    """A PNG, made smaller where it is wider than `width` pixels."""
    data = path.read_bytes()
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        if image.width <= width:
            return data
        size = (width, round(image.height * width / image.width))
        out = io.BytesIO()
        image.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(out, "PNG", optimize=True)
    return out.getvalue()


# ---------------------------------------------------------------------------------------- sections


def _state(cfg: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    steps, now = cfg["train"]["steps"], rows[-1]["step"] if rows else 0
    batch = cfg["train"]["batch_size"]
    return (
        f"step {now:,} of {steps:,}{', finished' if now >= steps else ''}; "
        f"{batch:,} images a step, {now * batch:,} seen"
    )


def _last(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    return next((row[name] for row in reversed(rows) if row.get(name) is not None), None)


def _declared(cfg: Mapping[str, Any]) -> Any:
    """Weights of a run's model, by its task."""
    task = cfg.get("task", "flow")
    if task == "flow":
        return step.declare(cfg, step.model_config(cfg))
    if task == "vlm":
        return vlm_step.declare(cfg, vlm_step.model_config(cfg))
    if task == "starflow2":
        return streams.declare(starflow2_step.model_config(cfg))
    return fae.declare(fae_step.model_config(cfg))


def _cards(cfg, rows, measured, gaussian) -> str:
    parameters = params.count(_declared(cfg))
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
    boxes = [
        f'<div class="card"><b>{_text(shown or _figure(value))}</b><span>{_text(name)}</span></div>'
        for name, value, shown in cards
        if value is not None
    ]
    return f'<div class="cards">{"".join(boxes)}</div>'


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
        parts.append(f"<h2>{_text(name.capitalize())}</h2>")
        parts.append(_picture(_shrunk(path, 1200), f"{name}, step {newest}", f"step {newest:,}"))
        if len(found) > 1:
            # Early steps change most: evenly spaced in the logarithm of their place.
            places = np.geomspace(1, len(found), min(_STAGES, len(found))).round().astype(int) - 1
            stages = [found[place] for place in sorted(set(places.tolist()))]
            shown = [_picture(_shrunk(p, 480), f"step {s}", f"step {s:,}") for s, p in stages]
            parts.append(f'<div class="stages">{"".join(shown)}</div>')
    return "\n".join(parts)


def _curves(rows: Sequence[Mapping[str, Any]], gaussian: float | None) -> str:
    found = {
        "nats per dimension": curves.likelihood(rows, gaussian),
        "loss, log-determinants, gradient norm, learning rate, speed": curves.parts(rows),
    }
    shown = [_picture(data, alt) for alt, data in found.items() if data]
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
                _figure(baseline["nats_per_dim"]),
                "not comparable" if bits is None else _figure(bits),
            )
            lines.append(
                (f"{name.replace('_', ' ')}, fitted to {baseline['fit']}", "", "", *values)
            )
        notes += [found["not_comparable"]] if found["not_comparable"] else []
    head = ("what", "images", "noise", "nats/dim (95% over images)", "bits/dim")
    below = "".join(f"<p>Bits/dim are {_text(note)}.</p>" for note in dict.fromkeys(notes))
    stamp = json.dumps(
        {
            key: measured[-1].get(key)
            for key in ("model", "data", "protocol", "devices", "versions")
        },
        indent=2,
    )
    return (
        f"<h2>Likelihood</h2>{_table(head, lines)}{below}"
        f"<details><summary>Protocol of the last one</summary><pre>{_text(stamp)}</pre></details>"
    )


def _spread(found: Mapping[str, Any], name: str) -> str:
    if found[name] is None:
        return "not comparable"
    pair = found.get(f"{name}_95")
    return _figure(found[name]) + (f" ({_figure(pair[0])} to {_figure(pair[1])})" if pair else "")


def _final(rows: Sequence[Mapping[str, Any]]) -> str:
    names = dict.fromkeys(
        name.removeprefix("eval/") for row in rows for name in row if name != "step"
    )
    # Even where the newest is not finite, it is the newest that counts.
    last = {name: row[name] for row in rows for name in row}
    lines = [(name, last.get(name, ""), last.get(f"eval/{name}", "")) for name in names]
    head = ("figure", "training", "evaluation data")
    return f"<h2>Last figures</h2>{_table(head, lines)}" if lines else ""


def _starts(workdir: epath.Path) -> str:
    path = workdir / log.RUN
    if not path.exists():
        logging.warning("%s is missing: the report names no command and no machine", path)
        return ""
    starts = json.loads(path.read_text())["starts"]
    parts = ["<h2>Commands and machine</h2>"]
    for start in starts:
        parts.append(f"<p>{_text(start['time'])}, from step {start['step']:,}</p>")
        # A flag on each line, in a form that can be pasted into a shell.
        lines = re.sub(r" (?='?--)", " \\\\\n    ", start["command"])
        parts.append(f"<pre>{_text(lines)}</pre>")
    last = starts[-1]
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    about = [("devices", last["devices"]), ("processes", str(last["processes"]))]
    parts.append(_table((), [*about, ("machine", last["machine"]), ("versions", versions)]))
    return "\n".join(parts)


def _configuration(cfg: Mapping[str, Any]) -> str:
    changed = config.differences(config.default(), cfg)
    names = [line.split(":", 1)[0] for line in changed]
    values = {**config.flat(cfg), **{f"model.{k}": v for k, v in cfg["model"].items()}}
    rows = [
        (name, json.dumps(values[name]), config.KEYS[name].doc if name in config.KEYS else "")
        for name in sorted(names, key=lambda name: (not name.startswith("model."), name))
        if name in values
    ]
    whole = _text(json.dumps(cfg, indent=2))
    return (
        f"<h2>Configuration</h2><p>Where it differs from the defaults:</p>"
        f"{_table(('key', 'value', 'meaning'), rows)}"
        f"<details><summary>All of it</summary><pre>{whole}</pre></details>"
    )
