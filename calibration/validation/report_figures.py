"""Draw a validation: predicted against measured times, error by size, residual maps, coverage.

Use :func:`part_figures` for all figures of a part of a :class:`calibration.validation.validate.Report`; the style is
that of :mod:`simulator.figures.style`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.validation.scores import by_size, coverage
from calibration.validation.validate import ReportPart
from simulator.arrays import FloatArray
from simulator.figures.layout import log_axis
from simulator.figures.style import BLACK, BLUE, COLUMN_IN, GREY, PAGE_IN, VERMILLION, paper_style
from simulator.workload import ROLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


MOST_POINTS = 6000
"""Points of a scatter plot; more enlarge the file without a clearer plot."""
MAP_LIMIT = 0.15
"""Signed error at the ends of the colour scale of a residual map."""
_LINES: tuple[tuple[str, str, str, str], ...] = (
    ("median", "median |error|", BLUE, "o-"),
    ("p95", "95th percentile", VERMILLION, "s-"),
    ("bias", "bias", GREY, "--"),
)


def _figure(width_in: float, height_in: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width_in, height_in), layout="constrained")


def predicted_measured(part: ReportPart) -> Figure:
    """Draw predicted against measured time on logarithmic axes, with the datasheet roofline; at most
    :data:`MOST_POINTS` rows."""
    rows = np.arange(len(part))
    if len(rows) > MOST_POINTS:
        rows = np.random.default_rng(0).choice(rows, MOST_POINTS, replace=False)
    x, y, roof = (1e6 * a[rows] for a in (part.measured_s, part.predicted_s, part.roofline_s))
    low, high = 0.7 * min(x.min(), y.min()), 1.4 * max(x.max(), y.max())
    figure = _figure(COLUMN_IN, COLUMN_IN * 0.82)
    ax = figure.add_subplot(title=f"{part.operator}, {part.dtype}", xlabel="measured (µs)", ylabel="predicted (µs)")
    ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    ax.plot(x, roof, ".", color=GREY, markersize=1.2, alpha=0.25, label="datasheet roofline", rasterized=True)
    ax.plot(x, y, ".", color=BLUE, markersize=1.6, alpha=0.4, label="model", rasterized=True)
    ax.plot([low, high], [low, high], color=BLACK, linewidth=0.8)
    for axis in (ax.xaxis, ax.yaxis):
        log_axis(axis, low, high, 6)
    for handle in ax.legend(loc="lower right").get_lines():
        handle.set(markersize=4, alpha=1.0)
    return figure


def error_by_size(part: ReportPart) -> Figure:
    """Draw median and 95th percentile of the absolute error, and the bias, over each size."""
    several = [name for name in part.sizes if name != "role" and len(np.unique(part.sizes[name])) > 2]
    names = several[:4] or [next(iter(part.sizes))]
    figure = _figure(PAGE_IN, 1.9)
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    panels[0].set_ylabel("error (%)")
    for ax, name in zip(panels, names, strict=True):
        ranges = by_size(part, name)
        x = np.array([np.sqrt(max(r["low"], 0.5) * max(r["high"], 0.5)) for r in ranges])
        ax.set(xscale="log", xlabel=name.replace("_", " "))
        for key, label, color, style in _LINES:
            ax.plot(x, [100.0 * r[key] for r in ranges], style, color=color, label=label)
        if len(x) > 1:
            log_axis(ax.xaxis, float(x.min()), float(x.max()), 5 if len(names) < 4 else 4)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def residual_map(part: ReportPart) -> Figure:
    """Draw the mean signed error over two sizes in octaves: positive where the prediction is too slow."""
    s = part.sizes
    if "m" in s:
        panels = [("m", s["m"], "n × k", s["n"] * s["k"]), ("n", s["n"], "k", s["k"])]
    elif "kv_heads" in s:
        length = "q_len" if "q_len" in s else "kv_len"
        panels = [(length, s[length], "batch × KV heads", s["batch"] * s["kv_heads"])]
    else:
        panels = [("bytes", s["bytes"], "", np.exp2(s["role"]))]
    figure = _figure(PAGE_IN if len(panels) > 1 else COLUMN_IN, 2.2)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (x_name, x, y_name, y) in zip(axes, panels, strict=True):
        image = _map(ax, x, y, part.error)
        ax.set(xlabel=x_name.replace("_", " "), ylabel=y_name)
    if "role" in s:
        codes = np.unique(s["role"]).astype(int)
        axes[0].set_yticks(codes + 0.5, [ROLES[code].replace("_", " ") for code in codes])
    figure.colorbar(image, ax=axes, label="predicted / measured - 1 (%)", extend="both")
    return figure


def _map(ax: Axes, x: FloatArray, y: FloatArray, error: FloatArray) -> Any:
    columns, rows = (np.floor(np.log2(np.maximum(v, 1.0)) + 1e-9).astype(int) for v in (x, y))
    edges = [np.arange(octave.min(), octave.max() + 2) for octave in (rows, columns)]
    count, _, _ = np.histogram2d(rows, columns, bins=edges)
    total, _, _ = np.histogram2d(rows, columns, bins=edges, weights=error)
    mean = np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)
    limit = 100.0 * MAP_LIMIT
    image = ax.pcolormesh(edges[1], edges[0], 100.0 * mean, cmap="RdBu_r", vmin=-limit, vmax=limit)
    ax.grid(False)
    for axis, edge in ((ax.xaxis, edges[1]), (ax.yaxis, edges[0])):
        ticks = edge[:: max(1, round((len(edge) - 1) / 6))]
        names = [f"{2**t:,}" if t < 14 else f"$2^{{{t}}}$" for t in ticks.tolist()]
        axis.set_ticks(ticks, names, parse_math=True)
    return image


def coverage_figure(part: ReportPart, level: float) -> Figure:
    """Draw the coverage by bottleneck and the level, with the half-width of the intervals as text."""
    rows = coverage(part)
    names, values = [r["bottleneck"] for r in rows], [100.0 * r["coverage"] for r in rows]
    figure = _figure(COLUMN_IN, 0.75 + 0.17 * len(rows))
    label = f"coverage of the {100 * level:.3g} % interval (%)"
    ax = figure.add_subplot(title=f"{part.operator}, {part.dtype}", xlabel=label)
    # marks instead of bars, because the axis does not begin at 0
    ax.hlines(names, 100.0 * level, values, color=BLUE, linewidth=1.2)
    ax.plot(values, names, "o", color=BLUE, clip_on=False, zorder=3)
    ax.axvline(100.0 * level, color=VERMILLION, linewidth=0.9)
    ax.set(xlim=(max(min(75.0, min(values) - 5.0), 0.0), 100.0), ylim=(len(rows) - 0.4, -0.6))
    ax.grid(axis="y", visible=False)
    for r in rows:
        width, place = f"±{100 * r['width']:.3g} %", (1.04, r["bottleneck"])
        ax.annotate(width, place, xycoords=("axes fraction", "data"), va="center", fontsize=6)
    return figure


def part_figures(part: ReportPart, level: float) -> Mapping[str, Figure]:
    """Return all figures of a part by name: "predicted", "sizes", "residuals", "coverage"."""
    with paper_style():
        return {
            "predicted": predicted_measured(part),
            "sizes": error_by_size(part),
            "residuals": residual_map(part),
            "coverage": coverage_figure(part, level),
        }


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG; equal figures give equal bytes."""
    out = io.BytesIO()
    with paper_style():
        figure.savefig(out, format="png", dpi=144, metadata={"Software": None})
    return out.getvalue()
