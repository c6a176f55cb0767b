"""Pieces of a page that needs nothing beside it: text, tables, cards, pictures, the whole."""

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
"""


def text(value: Any) -> str:
    """Escaped."""
    return html.escape(str(value))


def figure(value: Any) -> str:
    """A number for people."""
    if value is None:
        return "not finite"
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        return f"{value:.3g}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4f}"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Numbers stand to the right, as does the heading over them."""

    def cell(value):
        number = value is None or isinstance(value, int | float)
        return f'<td class="n">{figure(value)}</td>' if number else f"<td>{text(value)}</td>"

    # A heading stands over its column's numbers.
    kinds = [" class=n" if isinstance(value, int | float) else "" for value in rows[0]]
    titles = "".join(f"<th{kind}>{text(name)}</th>" for name, kind in zip(head, kinds))
    lines = [titles, *("".join(map(cell, row)) for row in rows)]
    return "<table>" + "\n".join(f"<tr>{line}</tr>" for line in lines if line) + "</table>"


def cards(shown: Sequence[tuple[str, str]]) -> str:
    """Boxes with a figure and its name, given as (name, figure)."""
    boxes = [
        f'<div class="card"><b>{text(value)}</b><span>{text(name)}</span></div>'
        for name, value in shown
    ]
    return f'<div class="cards">{"".join(boxes)}</div>'


def picture(data: bytes, alt: str, caption: str = "") -> str:
    """A PNG in the page itself."""
    source = base64.b64encode(data).decode()
    below = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    return f'<figure><img alt="{text(alt)}" src="data:image/png;base64,{source}">{below}</figure>'


def shrunk(path: epath.Path, width: int) -> bytes:
    """A PNG, made smaller where it is wider than `width` pixels."""
    data = path.read_bytes()
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        if image.width <= width:
            return data
        size = (width, round(image.height * width / image.width))
        out = io.BytesIO()
        image.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(out, "PNG", optimize=True)
    return out.getvalue()


def whole(title: str, body: Sequence[str]) -> str:
    """The page of a title and sections, those that are empty left out."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{text(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body>\n</html>\n"
    )
