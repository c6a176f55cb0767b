"""Pieces of an HTML page without external files: text, tables, cards, images, and the page."""

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

from etils import epath
from PIL import Image

CSS = """
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
.examples { display: flex; flex-wrap: wrap; gap: 1.4rem 1.6rem; margin-top: .8rem; }
.example p { margin: .25rem 0 0; } .example .pictures { display: flex; gap: .4rem; }
.example { width: min-content; min-width: 11rem; } .example img { width: 11rem; max-width: none;
         border: 1px solid #ddd; }
.yes { color: #17692f; } .no { color: #a3261d; } h3 { font-size: 1rem; margin: 1.3rem 0 .1rem; }
"""


def escape(value: Any) -> str:
    """Return a value as text, escaped for HTML."""
    return html.escape(str(value))


def number(value: float | None) -> str:
    """Return a number with a readable number of digits; None stands for one that is not finite."""
    if value is None:
        return "not finite"
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        return f"{value:.3g}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4f}"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table in which numbers and the headings above them are aligned to the right."""

    def cell(value):
        if value is None or isinstance(value, int | float):
            return f'<td class="n">{number(value)}</td>'
        return f"<td>{escape(value)}</td>"

    classes = [" class=n" if isinstance(value, int | float) else "" for value in rows[0]]
    titles = "".join(f"<th{kind}>{escape(name)}</th>" for name, kind in zip(head, classes))
    lines = [titles, *("".join(map(cell, row)) for row in rows)]
    return "<table>" + "\n".join(f"<tr>{line}</tr>" for line in lines if line) + "</table>"


def cards(figures: Sequence[tuple[str, str]]) -> str:
    """Return boxes, one for each (name, figure)."""
    boxes = [
        f'<div class="card"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
        for name, value in figures
    ]
    return f'<div class="cards">{"".join(boxes)}</div>'


def image(data: bytes, alt: str, caption: str = "") -> str:
    """Return a PNG, embedded in the page."""
    source = base64.b64encode(data).decode()
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img alt="{escape(alt)}" src="data:image/png;base64,{source}">{below}</figure>'


def example(
    pictures: Sequence[tuple[bytes, str]], texts: Sequence[str], verdict: str, correct: bool
) -> str:
    """Return pictures (PNG, caption) side by side, with texts and a verdict below them."""
    figures = "".join(image(data, caption or texts[0], caption) for data, caption in pictures)
    lines = "".join(f"<p>{escape(text)}</p>" for text in texts)
    mark = f'<p class="{"yes" if correct else "no"}">{escape(verdict)}</p>'
    return f'<div class="example"><div class="pictures">{figures}</div>{lines}{mark}</div>'


def bullets(title: str, items: Sequence[str]) -> str:
    """Return a heading and a list; empty without items."""
    lines = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f"<h2>{escape(title)}</h2><ul>{lines}</ul>" if items else ""


def shrink_png(path: epath.Path, width: int) -> bytes:
    """Return the PNG at `path`, scaled down to `width` pixels if it is wider.

    Raises:
        ValueError: The file is damaged.
    """
    data = path.read_bytes()
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as original:
            original.verify()  # the checksums of all of its parts
        with Image.open(io.BytesIO(data), formats=("PNG",)) as original:
            original.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is a damaged PNG: {error}") from error
    with Image.open(io.BytesIO(data), formats=("PNG",)) as original:
        if original.width <= width:
            return data
        size = (width, round(original.height * width / original.width))
        out = io.BytesIO()
        scaled = original.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        scaled.save(out, "PNG", optimize=True)
    return out.getvalue()


def page(title: str, body: Sequence[str]) -> str:
    """Return the page of a title and its sections; empty sections are left out."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body>\n</html>\n"
    )
