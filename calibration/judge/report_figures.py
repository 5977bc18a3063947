"""Figures of a validation: predicted against measured times, error over each size, residual maps, coverage. Arrays in, matplotlib figures
out.

Use :func:`part_figures` for all figures of a part of a :class:`calibration.validate.Report`; the look is that of
:mod:`simulator.figures.style`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from calibration.judge.scores import by_size, coverage
from calibration.judge.validate import Part
from simulator.figures.layout import log_axis
from simulator.figures.style import BLACK, BLUE, COLUMN_IN, GREY, PAGE_IN, VERMILLION, paper_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

F = NDArray[np.float64]

MOST_POINTS = 6000
"""Points of a scatter plot; more make the file large and the plot no clearer."""
MAP_LIMIT = 0.15
"""Signed error at which the colours of a residual map end."""


def predicted_measured(part: Part, *, seed: int = 0) -> Figure:
    """Predicted against measured time, both logarithmic, with the datasheet roofline below.

    Parameters
    ----------
    part : Part
    seed : int
        Of the choice of :data:`MOST_POINTS` points.

    Returns
    -------
    Figure
    """
    from matplotlib.figure import Figure

    rows = np.arange(len(part))
    if len(rows) > MOST_POINTS:
        rows = np.random.default_rng(seed).choice(rows, MOST_POINTS, replace=False)
    x, y, roof = (1e6 * a[rows] for a in (part.measured_s, part.predicted_s, part.roofline_s))
    with paper_style():
        figure = Figure(figsize=(COLUMN_IN, COLUMN_IN * 0.82))
        ax = figure.add_axes((0.19, 0.14, 0.78, 0.77))
        low, high = 0.7 * min(x.min(), y.min()), 1.4 * max(x.max(), y.max())
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set(
            xlim=(low, high),
            ylim=(low, high),
            xlabel="measured (us)",
            ylabel="predicted (us)",
            title=f"{part.operator}, {part.dtype}",
        )
        ax.plot(x, roof, ".", color=GREY, markersize=1.2, alpha=0.25, label="datasheet roofline", rasterized=True)
        ax.plot(x, y, ".", color=BLUE, markersize=1.6, alpha=0.4, label="model", rasterized=True)
        ax.plot([low, high], [low, high], color=BLACK, linewidth=0.8)
        log_axis(ax.xaxis, low, high, 6)
        log_axis(ax.yaxis, low, high, 6)
        legend = ax.legend(loc="lower right")
        for handle in legend.get_lines():
            handle.set(markersize=4, alpha=1.0)
    return figure


def error_by_size(part: Part) -> Figure:
    """Median and 95th percentile of the absolute error, and the bias, over each size."""
    from matplotlib.figure import Figure

    names = [name for name in part.sizes if name != "role" and len(np.unique(part.sizes[name])) > 2][:4] or [
        next(iter(part.sizes))
    ]
    with paper_style():
        figure = Figure(figsize=(PAGE_IN, 1.9))
        left, gap, right = 0.065, 0.05, 0.012
        width = (1.0 - left - right - gap * (len(names) - 1)) / len(names)
        top = 0.0
        panels: list[Axes] = []
        for i, name in enumerate(names):
            ax = figure.add_axes((left + i * (width + gap), 0.22, width, 0.64))
            ranges = by_size(part, name)
            x = np.array([np.sqrt(max(r["low"], 0.5) * max(r["high"], 0.5)) for r in ranges])
            ax.set_xscale("log")
            for key, color, mark in (("median", BLUE, "o"), ("p95", VERMILLION, "s")):
                values = np.array([100.0 * r[key] for r in ranges])
                top = max(top, float(values.max()))
                ax.plot(
                    x,
                    values,
                    color=color,
                    marker=mark,
                    label={"median": "median |error|", "p95": "95th percentile"}[key],
                )
            ax.plot(x, [100.0 * r["bias"] for r in ranges], color=GREY, linestyle="--", label="bias")
            ax.set(xlabel=name.replace("_", " "))
            if len(x) > 1:
                log_axis(ax.xaxis, float(x.min()), float(x.max()), 5)
            panels.append(ax)
        low = min(
            0.0,
            min(float(np.min(np.asarray(line.get_ydata(), dtype=float))) for ax in panels for line in ax.get_lines()),
        )
        for ax in panels:
            ax.set_ylim(1.15 * low - 0.5, 1.12 * top + 0.5)
        panels[0].set_ylabel("error (%)")
        figure.legend(
            *panels[0].get_legend_handles_labels(),
            loc="upper center",
            ncol=3,
            bbox_to_anchor=(0.5, 1.0),
            borderaxespad=0.2,
        )
    return figure


def residual_map(part: Part) -> Figure:
    """Mean signed error over two sizes in octaves: where the model is too slow (positive) or too fast.

    GEMMs: m against n k, and n against k. Attention: length against batch x KV heads.
    """
    from matplotlib.figure import Figure

    s = part.sizes
    if "m" in s:
        panels = [("m", s["m"], "n k", s["n"] * s["k"]), ("n", s["n"], "k", s["k"])]
    elif "kv_heads" in s:
        length = "q_len" if "q_len" in s else "kv_len"
        panels = [(length, s[length], "batch x KV heads", s["batch"] * s["kv_heads"])]
    else:
        panels = [("bytes", s["bytes"], "operator", np.exp2(s.get("role", np.zeros(len(part)))))]
    with paper_style():
        figure = Figure(figsize=(PAGE_IN if len(panels) > 1 else COLUMN_IN, 2.2))
        image: Any = None
        each = 0.86 / len(panels)
        for i, (x_name, x, y_name, y) in enumerate(panels):
            ax = figure.add_axes((0.075 + i * each, 0.18, each - 0.085 - 0.03 * (len(panels) == 1), 0.72))
            image = _map(ax, x, y, part.error)
            ax.set(xlabel=f"{x_name.replace('_', ' ')}", ylabel=y_name)
        bar = figure.colorbar(image, cax=figure.add_axes((0.91, 0.18, 0.018, 0.72)))
        bar.set_label("predicted / measured - 1 (%)")
    return figure


def _map(ax: Axes, x: F, y: F, error: F) -> Any:
    columns, rows = (np.floor(np.log2(np.maximum(v, 1.0)) + 1e-9).astype(int) for v in (x, y))
    c0, r0 = columns.min(), rows.min()
    shape = (rows.max() - r0 + 1, columns.max() - c0 + 1)
    total, count = np.zeros(shape), np.zeros(shape)
    np.add.at(total, (rows - r0, columns - c0), error)
    np.add.at(count, (rows - r0, columns - c0), 1.0)
    mean = np.full(shape, np.nan)
    np.divide(total, count, out=mean, where=count > 0)
    extent = (c0 - 0.0, c0 + shape[1], r0 - 0.0, r0 + shape[0])
    limit = 100.0 * MAP_LIMIT
    image = ax.imshow(
        100.0 * mean,
        origin="lower",
        aspect="auto",
        extent=extent,
        cmap="RdBu_r",
        vmin=-limit,
        vmax=limit,
        interpolation="nearest",
    )
    ax.grid(False)
    for axis, low, high in ((ax.xaxis, c0, c0 + shape[1]), (ax.yaxis, r0, r0 + shape[0])):
        step = max(1, round((high - low) / 6))
        ticks = list(range(int(low), int(high) + 1, step))
        axis.set_ticks(ticks, [f"{2**t:,}" if t < 14 else f"$2^{{{t}}}$" for t in ticks])
    return image


def coverage_figure(part: Part, level: float = 0.9) -> Figure:
    """Share of measured times inside their interval, by regime, beside the level asked for; the interval's half width as text."""
    from matplotlib.figure import Figure

    found = coverage(part)
    with paper_style():
        figure = Figure(figsize=(COLUMN_IN, 0.75 + 0.17 * len(found)))
        height = figure.get_figheight()
        ax = figure.add_axes((0.27, 0.42 / height, 0.58, 1.0 - 0.7 / height))
        places = np.arange(len(found))[::-1]
        values = [100.0 * f["coverage"] for f in found]
        ax.barh(places, values, color=[BLUE if f["regime"] == "all" else "#9CC5E3" for f in found], height=0.62)
        ax.axvline(100.0 * level, color=VERMILLION, linewidth=0.9)
        ax.set_yticks(places, [f["regime"] for f in found])
        low = min(75.0, min(values) - 5.0)
        ax.set(
            xlim=(max(low, 0.0), 100.0),
            ylim=(-0.6, len(found) - 0.4),
            xlabel=f"inside the {100 * level:.3g} % interval (%)",
        )
        ax.set_title(f"{part.operator}, {part.dtype}", pad=4)
        ax.grid(axis="y", visible=False)
        for place, f in zip(places, found, strict=True):
            ax.annotate(
                f"±{100 * f['width']:.3g} %", (1.02, place), xycoords=("axes fraction", "data"), va="center", fontsize=6
            )
    return figure


def part_figures(part: Part, level: float = 0.9) -> Mapping[str, Figure]:
    """All figures of a part by name: "predicted", "sizes", "residuals", "coverage"."""
    return {
        "predicted": predicted_measured(part),
        "sizes": error_by_size(part),
        "residuals": residual_map(part),
        "coverage": coverage_figure(part, level),
    }


def png(figure: Figure, dpi: int = 144) -> bytes:
    """A figure as the bytes of a PNG; the same figure gives the same bytes."""
    out = io.BytesIO()
    with paper_style():
        figure.savefig(out, format="png", dpi=dpi, metadata={"Software": None})
    return out.getvalue()
