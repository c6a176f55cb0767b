"""A plan as a Markdown table, and as a chart."""

import io
from collections.abc import Sequence
from typing import Any

GIB = 2**30
# Lines about unexpected collectives of one layout.
MAX_UNEXPECTED = 3
Row = dict[str, Any]
_SHORT = {"all-gather": "gather", "all-reduce": "reduce", "reduce-scatter": "scatter",
          "all-to-all": "to-all", "collective-permute": "permute"}  # fmt: skip
_HEADER = ("layout", "mesh", "batch", "remat", "GiB/chip", "state (cache)", "fits", "TFLOP/chip",
           "GB moved", "collectives, GB sent", "step", "tokens/s", "MFU at most",
           "compile")  # fmt: skip
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
    """Format a Markdown table with a row per layout, and below it remarks on single layouts."""
    table = [list(_HEADER), *(_cells(row) for row in rows)]
    widths = [max(len(cells[n]) for cells in table) for n in range(len(_HEADER))]

    def format_row(cells):
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths)) + " |"

    text = [format_row(table[0]), "|" + "|".join("-" * (w + 2) for w in widths) + "|"]
    text += map(format_row, table[1:])
    for row in rows:
        name = f"{row['layout']} {_mesh(row)}".strip()
        if "error" in row:
            text.append(f"{name}: {row['error']}")
        elif not row["fits"]:
            over = row["memory"]["over"] / GIB
            text.append(f"{name} does not fit by {over:,.2f} GiB a chip; this would help:")
            text += [f"  {hint}" for hint in row["advice"]]
        unexpected = row.get("unexpected", [])
        text += [f"{name}: {line}" for line in unexpected[:MAX_UNEXPECTED]]
        if len(unexpected) > MAX_UNEXPECTED:
            text.append(f"{name}: and {len(unexpected) - MAX_UNEXPECTED} more unexpected ones")
        if row.get("unknown_loops"):
            loops = ", ".join(row["unknown_loops"])
            text.append(f"{name}: loops of unknown length, counted once: {loops}")
    return text


def _mesh(row):
    return ",".join(f"{axis}={size}" for axis, size in row["mesh"].items()) or "1 device"


def _cells(row):
    cells = [row["layout"], _mesh(row), str(row.get("batch", "")), str(row.get("remat", ""))]
    if "error" in row:
        return cells + ["-"] * 10
    memory = row["memory"]
    state = sum(memory["declared"].values()) / GIB
    cache = memory["declared"].get("cache")
    cells.append(f"{memory['peak'] / GIB:,.2f}")
    cells.append(f"{state:,.2f}" if cache is None else f"{state:,.2f} ({cache / GIB:,.2f})")
    cells.append("yes" if row["fits"] else f"no, +{memory['over'] / GIB:,.2f}")
    if "flops" not in row:
        return [*cells, *["-"] * 6, f"{row['compile_s']:.0f} s"]
    largest = max((c["wire"] for c in row["collectives"]), default=0.0)
    collectives = [
        f"{_SHORT.get(c['kind'], c['kind'])} {c['axes']} {c['wire'] / 1e9:,.3g}"
        for c in row["collectives"]
        if c["wire"] >= 0.01 * largest
    ]
    cells += [f"{row['flops'] / 1e12:,.4g}", f"{row['bytes'] / 1e9:,.4g}"]
    cells.append(", ".join(collectives) or "none")
    if "step_s" in row:
        bounds = (row["step_s"], row["step_without_overlap_s"])
        cells.append(" to ".join(f"{1000 * s:,.0f}" for s in bounds) + " ms")
        cells.append(f"{row['tokens_per_s']:,.0f}")
        cells.append(f"{100 * row['mfu_bound']:.0f}%" if "mfu_bound" in row else "-")
    else:
        cells += ["-"] * 3
    return [*cells, f"{row['compile_s']:.0f} s"]


def chart(rows: Sequence[Row], title: str) -> bytes:
    """Draw a PNG with bars of memory per chip and of step time for every layout."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if "memory" in row]
    names = [f"{row['layout']}\n{_mesh(row)}" for row in rows]
    figure = Figure(figsize=(max(6.0, 1.6 * len(rows) + 2), 6.4), layout="constrained")
    top, bottom = figure.subplots(2, 1)
    base = [0.0] * len(rows)
    for part, color in _PARTS:
        values = [_part(row, part) / GIB for row in rows]
        if any(values):
            top.bar(names, values, 0.6, base, color=color, label=part)
            base = [b + v for b, v in zip(base, values)]
    capacity = max((row["memory"]["capacity"] for row in rows), default=0) / GIB
    if capacity:
        top.axhline(capacity, color="black", lw=1, ls="--", label="memory of a chip")
    top.set_ylabel("GiB on a chip")
    top.set_title(title, loc="left")
    top.legend(fontsize=8, ncols=4, frameon=False)
    for n, (part, color) in enumerate(
        (("compute_s", "#1f5fa8"), ("memory_s", "#6f9fd0"), ("network_s", "#c8501e"))
    ):
        x = [i + 0.22 * (n - 1) for i in range(len(rows))]
        heights = [1000 * row.get(part, 0.0) for row in rows]
        bottom.bar(x, heights, 0.2, color=color, label=part.removesuffix("_s"))
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
    memory = row["memory"]
    if part != "temporaries":
        return memory["declared"].get(part, 0)
    return max(memory["peak"] - sum(memory["declared"].values()), 0)
