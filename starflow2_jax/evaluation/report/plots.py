"""Plots of a run's metrics, from the rows of `metrics.jsonl`."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Row = Mapping[str, Any]

TRAIN, EVAL, PLAIN = "#1f5fa8", "#c8501e", "#444444"
_STYLE = {
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.edgecolor": "#999999",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.edgecolor": "none",
}


def series(rows: Sequence[Row], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and values of a metric, of the rows that logged a finite value."""
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    steps, values = np.array(points, np.float64).reshape(-1, 2).T
    return steps, values


def log_det_names(rows: Sequence[Row]) -> list[str]:
    """Return the logged metrics `log_det/i`, in order from the data to the noise."""
    names = {name for row in rows for name in row if name.startswith("log_det/")}
    return sorted(names, key=lambda name: int(name.split("/")[1]))


def smooth(values: np.ndarray) -> np.ndarray:
    """Return the running mean over about a fortieth of the curve, unbiased at its start."""
    decay = 1 - 1 / max(1.0, len(values) / 40)
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean = decay * mean + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        out.append(mean / weight)
    return np.array(out)


def likelihood(rows: Sequence[Row], gaussian: float | None) -> bytes | None:
    """Return a PNG of nats/dim in training and evaluation, None if neither was logged."""
    train, held_out = series(rows, "nats_per_dim"), series(rows, "eval/nats_per_dim")
    if not len(train[0]) and not len(held_out[0]):
        return None
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure((9.6, 3.8), layout="constrained")
        axes = figure.subplots()
        _plot_curve(axes, *train, TRAIN, "training (each row, and its running mean)")
        if len(held_out[0]):
            axes.plot(*held_out, "o-", color=EVAL, ms=4, lw=1.2, label="evaluation data")
        levels = [train[1], held_out[1]]
        if gaussian is not None:
            axes.axhline(gaussian, color=PLAIN, ls="--", lw=1, label="Gaussian per dimension")
            levels.append(np.array([gaussian]))
        _set_limits(axes, levels)
        axes.set(xlabel="step", ylabel="nats / dim", title="Negative log-likelihood")
        axes.legend(loc="upper right")
        return _png(figure)


def training_curves(rows: Sequence[Row]) -> bytes | None:
    """Return a PNG of loss, log-determinants, gradient norm, rates and speed; None without any."""
    panels = {
        "Loss": (["loss"], "loss"),
        "log det of each block, from the data to the noise": (log_det_names(rows), "nats / dim"),
        "Gradient norm": (["grad_norm"], "norm before clipping"),
        "Learning rate": (["lr"], "learning rate"),
        "Speed": (["tokens_per_second"], "tokens / s"),
        "Mean square of z, halved": (["half_square_z"], "0.5 when z is standard normal"),
    }
    panels = {
        title: (logged, label)
        for title, (names, label) in panels.items()
        if (logged := [name for name in names if len(series(rows, name)[0])])
    }
    if not panels:
        return None
    import matplotlib
    from matplotlib.figure import Figure

    num_rows = -(-len(panels) // 2)
    with matplotlib.rc_context(_STYLE):
        figure = Figure((9.6, 2.9 * num_rows), layout="constrained")
        grid = figure.subplots(num_rows, 2, squeeze=False).ravel()
        for axes, (title, (names, label)) in zip(grid, panels.items()):
            if len(names) == 1:
                if title == "Learning rate":
                    axes.plot(*series(rows, names[0]), color=TRAIN, lw=1.4)
                else:
                    _plot_curve(axes, *series(rows, names[0]), TRAIN, None)
                _set_limits(axes, [series(rows, names[0])[1]])
            else:
                _plot_log_dets(axes, rows, names)
            if title == "Gradient norm":
                axes.set_yscale("log")
                axes.autoscale(axis="y")
            axes.set(xlabel="step", ylabel=label, title=title)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        return _png(figure)


def _plot_log_dets(axes, rows, names) -> None:
    from matplotlib import colormaps

    shades = colormaps["viridis"](np.linspace(0.05, 0.85, len(names)))
    for name, shade in zip(names, shades):
        steps, values = series(rows, name)
        axes.plot(steps, smooth(values), color=shade, lw=1.2, label=name.split("/")[1])
    axes.legend(title="block", ncols=2, fontsize=8)


def _plot_curve(axes, steps, values, color, label) -> None:
    if len(values):
        axes.plot(steps, values, color=color, lw=0.6, alpha=0.3)
        axes.plot(steps, smooth(values), color=color, lw=1.4, label=label)


def _set_limits(axes, curves: Sequence[np.ndarray]) -> None:
    """Set the vertical scale by all but the first, steep part of each curve."""
    values = np.concatenate([curve[len(curve) // 20 :] for curve in curves if len(curve)])
    low, high = values.min(), np.percentile(values, 99.5)
    # A horizontal line (a curve of one value) must stay visible.
    high = max([high, *(float(v[0]) for v in curves if len(v) == 1)])
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    axes.set_ylim(low - margin, high + margin)


def _png(figure: Any) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=160)
    return data.getvalue()
