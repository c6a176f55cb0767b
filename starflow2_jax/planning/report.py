"""A plan as a table for people, and as a picture."""

import io
from collections.abc import Sequence
from typing import Any

GIB = 2**30
# Lines about one layout, of exchanges that it does not mean.
MOST = 3
Row = dict[str, Any]
_SHORT = {"all-gather": "gather", "all-reduce": "reduce", "reduce-scatter": "scatter",
          "all-to-all": "to-all", "collective-permute": "permute"}  # fmt: skip
_PARTS = (
    ("params", "#1f5fa8"),
    ("ema", "#6f9fd0"),
    ("optimizer", "#a9c4e0"),
    ("frozen", "#7a7a7a"),
    ("batch", "#c9c9c9"),
    ("cache", "#4f8f5f"),
    ("temporaries", "#c8501e"),
)


def lines(rows: Sequence[Row]) -> list[str]:
    """A table with a row a layout, in Markdown, and below it what is to be said of single ones."""
    head = ["layout", "mesh", "batch", "remat", "GiB/chip", "of which state", "fits", "TFLOP/chip",
            "GB moved", "collectives, GB sent", "step", "tokens/s", "MFU at most",
            "compile"]  # fmt: skip
    body = [_cells(row) for row in rows]
    wide = [max(len(r[n]) for r in [head, *body]) for n in range(len(head))]
    line = lambda cells: "| " + " | ".join(c.ljust(w) for c, w in zip(cells, wide)) + " |"
    found = [line(head), "|" + "|".join("-" * (w + 2) for w in wide) + "|", *map(line, body)]
    for row in rows:
        name = f"{row['layout']} {_mesh(row)}".strip()
        if "error" in row:
            found.append(f"{name}: {row['error']}")
        elif not row["fits"]:
            over = row["memory"]["over"] / GIB
            found.append(f"{name} does not fit by {over:,.2f} GiB a chip; what would help:")
            found += [f"  {hint}" for hint in row["advice"]]
        told = row.get("unintended", [])
        found += [f"{name}: {line}" for line in told[:MOST]]
        if len(told) > MOST:
            found.append(f"{name}: and {len(told) - MOST} more that the layout does not mean")
        if row.get("unknown_loops"):
            found.append(f"{name}: loops of unknown length, counted once: "
                         f"{', '.join(row['unknown_loops'])}")  # fmt: skip
    return found


def _mesh(row):
    return ",".join(f"{axis}={size}" for axis, size in row["mesh"].items()) or "1 device"


def _cells(row):
    told = [row["layout"], _mesh(row), str(row.get("batch", "")), str(row.get("remat", ""))]
    if "error" in row:
        return told + ["-"] * 10
    held = row["memory"]
    state = sum(held["declared"].values()) / GIB
    told += [f"{held['peak'] / GIB:,.2f}", f"{state:,.2f}"]
    told.append("yes" if row["fits"] else f"no, +{held['over'] / GIB:,.2f}")
    if "flops" not in row:
        return [*told, *["-"] * 6, f"{row['compile_s']:.0f} s"]
    sent = [
        f"{_SHORT.get(c['kind'], c['kind'])} {c['axes']} {c['wire'] / 1e9:,.3g}"
        for c in row["collectives"]
        if c["wire"] >= 0.01 * max(e["wire"] for e in row["collectives"])
    ]
    told += [f"{row['flops'] / 1e12:,.4g}", f"{row['bytes'] / 1e9:,.4g}", ", ".join(sent) or "none"]
    if "step_s" in row:
        span = (row["step_s"], row["step_without_overlap_s"])
        told.append(" to ".join(f"{1000 * s:,.0f}" for s in span) + " ms")
        told.append(f"{row['tokens_per_s']:,.0f}")
        told.append(f"{100 * row['mfu_bound']:.0f}%" if "mfu_bound" in row else "-")
    else:
        told += ["-"] * 3
    return [*told, f"{row['compile_s']:.0f} s"]


def picture(rows: Sequence[Row], title: str) -> bytes:
    """PNG with, for every layout, bars of memory on a chip and of the time of a step."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if "memory" in row]
    names = [f"{row['layout']}\n{_mesh(row)}" for row in rows]
    figure = Figure(figsize=(max(6.0, 1.6 * len(rows) + 2), 6.4), layout="constrained")
    top, bottom = figure.subplots(2, 1)
    base = [0.0] * len(rows)
    for part, colour in _PARTS:
        values = [_part(row, part) / GIB for row in rows]
        if any(values):
            top.bar(names, values, 0.6, base, color=colour, label=part)
            base = [b + v for b, v in zip(base, values)]
    capacity = max((row["memory"]["capacity"] for row in rows), default=0) / GIB
    if capacity:
        top.axhline(capacity, color="black", lw=1, ls="--", label="memory of a chip")
    top.set_ylabel("GiB on a chip")
    top.set_title(title, loc="left")
    top.legend(fontsize=8, ncols=4, frameon=False)
    for n, (part, colour) in enumerate(
        (("compute_s", "#1f5fa8"), ("memory_s", "#6f9fd0"), ("network_s", "#c8501e"))
    ):
        at = [i + 0.22 * (n - 1) for i in range(len(rows))]
        bottom.bar(at, [1000 * row.get(part, 0.0) for row in rows], 0.2, color=colour,
                   label=part.removesuffix("_s"))  # fmt: skip
    bottom.set_xticks(range(len(rows)), names)
    bottom.set_ylabel("ms a step")
    bottom.legend(fontsize=8, ncols=3, frameon=False)
    for axes in (top, bottom):
        axes.tick_params(axis="x", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    return data.getvalue()


def _part(row, part):
    held = row["memory"]
    if part != "temporaries":
        return held["declared"].get(part, 0)
    return max(held["peak"] - sum(held["declared"].values()), 0)
