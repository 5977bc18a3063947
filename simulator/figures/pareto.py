"""Draw speedup against quality loss with the frontier; points that are not on the frontier are
faint.

A strip below each panel shows the fastest family within each quality budget, hatched if it is
dynamic.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from simulator.arrays import BoolArray, FloatArray
from simulator.figures import layout
from simulator.figures.style import (
    BLACK,
    GREY,
    INK,
    PALE_INK,
    Look,
    Style,
    in_order,
    label,
    paper_style,
    styles_of,
)
from simulator.prediction.pareto import Front, frontier
from simulator.prediction.quality import Axis
from simulator.prediction.requests import batch_name

# losses up to this value have a linear axis; a perplexity can rise by several times
LINEAR_UP_TO = 0.6
BEND = 0.1  # loss at which an axis with larger losses changes from linear to logarithmic
MOST_POINTS = 500  # of a panel; more cannot be distinguished
STRIP = 0.045  # height of the strip of fastest families, as a share of a panel's height


def fronts_of(fronts: Sequence[Front], rows: Sequence[str] = ()) -> Figure:
    """Draw frontiers on one metric under one protocol; ``rows`` are labels, by default phase, batch
    and length."""
    length = ", seq {}" if len({f.seq for f in fronts}) > 1 else ""
    rows = rows or [
        f"{f.phase}, {batch_name(f.phase)} {f.batch}{length.format(f.seq)}" for f in fronts
    ]
    data, omitted = _few(_points(fronts, rows))
    # a family's only method is named in the legend, one of several next to its points
    methods = {f: set(data["method"][data["family"] == f]) for f in in_order(data["family"])}
    only = {f: next(iter(names)) if len(names) == 1 else "" for f, names in methods.items()}
    data = layout.fitted(data)
    data = {**data, "method": np.where([bool(only[f]) for f in data["family"]], "", data["method"])}
    with paper_style():
        looks = styles_of({family: family for family in only})
        handles = _handles(only, looks, layout.interval(fronts[0].level))
        title = _title(fronts[0].axis, data["loss"])
        figure, panels = layout.panel_grid(
            data, 1.9, 0.66, handles=handles, legend=title, title=omitted, sharex=True, sharey=True
        )
        limits = _limits(data)
        for ax in panels.values():
            ax.set(yscale="log", ylim=limits)
            layout.log_axis(ax.yaxis, *limits, 7)
            _loss_axis(ax, 100 * data["loss"])
        # before the names of points, which depend on the layout
        layout.laid_out(figure, "speedup (log scale)")
        for place, ax in panels.items():
            _panel(ax, layout.of_panel(data, *place), looks)
    return figure


def _few(data: layout.FigurePoints) -> tuple[layout.FigurePoints, str]:
    """Return at most about :data:`MOST_POINTS` points per panel, all of its frontier among them,
    and a note if some are omitted."""
    keep = np.zeros(len(data["row"]), dtype=bool)
    for panel in dict.fromkeys(zip(data["row"], data["column"])):
        own = np.flatnonzero((data["row"] == panel[0]) & (data["column"] == panel[1]))
        keep[own[:: -(-len(own) // MOST_POINTS)]] = True
        keep[own[frontier(data["loss"][own], data["speedup"][own])]] = True
    note = f"{keep.sum():,} of {len(keep):,} points drawn, with all on a frontier"
    return {name: values[keep] for name, values in data.items()}, "" if keep.all() else note


def _points(fronts: Sequence[Front], rows: Sequence[str]) -> layout.FigurePoints:
    points = [p for front in fronts for p in front.points]
    names = {name: name for name in ("family", "method", "sparsity", "loss")}
    columns = layout.columns(points, **names, **layout.SPEEDUP)
    for name, labels in layout.placed(fronts, rows).items():
        pairs = zip(fronts, labels, strict=True)
        columns[name] = [label for front, label in pairs for _ in front.points]
    return layout.arrays(columns)


def _limits(data: layout.FigurePoints) -> tuple[float, float]:
    low, high = float(min(1.0, data["lower"].min())), float(max(1.05, data["upper"].max()))
    pad = (high / low) ** 0.05
    return low / pad, high * pad


def _scale(loss: FloatArray) -> str:
    """Return the scale of an axis of losses, %: linear for small ones, logarithmic for large ones,
    and bent for both."""
    if loss.max() <= 100 * LINEAR_UP_TO:
        return "linear"
    return "log" if loss.min() > 100 * BEND else "bent"


def _title(axis: Axis, loss: FloatArray) -> str:
    scales = {"bent": f" (linear to {100 * BEND:.0f} %, then logarithmic)", "log": " (log scale)"}
    scale = scales.get(_scale(100 * loss), "")
    protocol = textwrap.fill(axis.protocol, int(layout.width_of(2) / 0.058))
    return f"quality loss (%): {axis.metric}{scale}\n{protocol}".rstrip()


def _loss_axis(ax: Axes, loss: FloatArray) -> None:
    """Set an axis in per cent, which is logarithmic from a dotted line on if losses are large."""
    least, last = float(loss.min()), float(loss.max())
    first = min(0.0, least)
    if (scale := _scale(loss)) == "log":
        ax.set_xscale("log")
        ax.set_xlim(least / 1.6, last * 1.25)
        layout.log_axis(ax.xaxis, least / 1.6, last, 6)
    elif scale == "bent":
        ax.set_xscale("symlog", linthresh=100 * BEND, linscale=0.5)
        ax.axvline(100 * BEND, color=GREY, linewidth=0.7, linestyle=(0, (1, 2)), zorder=1.4)
        ax.set_xlim(first - 1.0 if first < 0 else 0.0, last * 1.25)
        # no tick near the end, whose label would overlap the next panel
        ticks = [
            t
            for t in (0, 10, 30, 100, 300, 1000, 3000, 10_000, 100_000, 1_000_000)
            if t <= last * 0.75
        ]
        layout.fixed_ticks(ax.xaxis, ticks, lambda value, _: f"{value:,.10g}")
    else:
        room = 0.08 * (last - first) or 1.0
        start = least - 3.0 * room if 2.0 * least > last else first - 0.4 * room * (first < 0)
        ax.set_xlim(start, last + room)
    ax.tick_params(axis="x", length=0, pad=7)  # below the strip
    ax.spines["bottom"].set_visible(False)


def _panel(ax: Axes, data: layout.FigurePoints, looks: Mapping[str, Style]) -> None:
    x, y = 100 * data["loss"].astype(float), data["speedup"].astype(float)
    optimal = frontier([0.0, *x], [1.0, *y])[1:] if len(x) else np.zeros(0, dtype=bool)
    order = [int(i) for i in np.lexsort((-y, x)) if optimal[i]]
    start, end = ax.get_xlim()
    steps_x = [start, *np.maximum(x[order], 0.0), end]
    steps_y = [1.0, *y[order], y[order[-1]] if order else 1.0]
    ax.axhline(1.0, color=INK, linewidth=0.7, zorder=1.5)
    ax.step(steps_x, steps_y, where="post", color=INK, linewidth=0.9, zorder=2)
    _draw_families(ax, data, (x, y), looks)
    _draw_points(ax, data, (x, y), optimal, looks)
    _draw_strip(ax, [looks[data["family"][i]] for i in order], [*x[order], end])
    bars = np.linspace(data["lower"], data["upper"], 12)
    clear_of = [
        (x, y),
        (np.broadcast_to(x, bars.shape).ravel(), bars.ravel()),
        _along(np.repeat(steps_x, 2)[1:], np.repeat(steps_y, 2)[:-1]),
        (np.linspace(start, end, 60), np.ones(60)),
    ]
    names = _point_names(data)
    for on_frontier, reach_pt, color in ((True, 30.0, BLACK), (False, 10.0, PALE_INK)):
        these = optimal == on_frontier
        look: dict[str, Any] = {"reach_pt": reach_pt, "color": color}
        layout.write_labels(ax, x[these], y[these], names[these], clear_of, **look)


def _draw_families(
    ax: Axes,
    data: layout.FigurePoints,
    at: tuple[FloatArray, FloatArray],
    looks: Mapping[str, Style],
) -> None:
    """Draw the fastest point of each family within each loss: families at equal quality."""
    x, y = at
    for family, style in looks.items():
        own = np.flatnonzero(data["family"] == family)
        own = own[np.argsort(x[own], kind="stable")]
        best = np.maximum.accumulate(y[own])
        steps: Look = {"color": style.color, "linewidth": 0.6, "alpha": 0.6, "zorder": 1.8}
        losses = [*x[own], *[ax.get_xlim()[1]] * bool(len(own))]
        ax.step(losses, [*best, *best[-1:]], where="post", **steps)


def _point_names(data: layout.FigurePoints) -> NDArray[Any]:
    pairs = zip(data["method"], data["sparsity"].tolist())
    names = [f"{method} {100 * sparsity:.3g}".strip() for method, sparsity in pairs]
    return np.array(names, dtype=object)


def _draw_points(
    ax: Axes,
    data: layout.FigurePoints,
    at: tuple[FloatArray, FloatArray],
    optimal: BoolArray,
    looks: Mapping[str, Style],
) -> None:
    x, y = at
    for name, style in looks.items():
        for best, alpha, size in ((True, 1.0, 4.2), (False, 0.35, 3.2)):
            these = (data["family"] == name) & (optimal == best)
            ends = data["lower"][these], data["upper"][these]
            bar: dict[str, Any] = {"linewidth": 0.9, "alpha": 0.8 * alpha, "zorder": 3}
            ax.vlines(x[these], *ends, color=style.color, **bar)
            marks = style.marks(linestyle="none", alpha=alpha, markersize=size, zorder=4)
            ax.plot(x[these], y[these], **marks)


def _draw_strip(ax: Axes, fastest: Sequence[Style], edges: Sequence[float]) -> None:
    """Draw the strip of the fastest families between losses."""
    look: dict[str, Any] = {"edgecolor": "white", "alpha": 0.9, "linewidth": 0, "clip_on": False}
    for i, style in enumerate(fastest):
        look |= {"facecolor": style.color, "hatch": "/////" if style.hollow else None}
        ax.axvspan(max(edges[i], 0.0), edges[i + 1], -STRIP, 0, **look)


def _along(x: FloatArray, y: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return points along the lines between some corners."""
    corners = np.arange(len(x))
    places = np.linspace(0, len(x) - 1, 20 * len(x))
    return np.interp(places, corners, x), np.interp(places, corners, y)


def _handles(only: Mapping[str, str], looks: Mapping[str, Style], interval: str) -> list[Any]:
    names = [
        f"{label(f)} ({method})" if method not in ("", f) else label(f)
        for f, method in only.items()
    ]
    marks = [
        Line2D([], [], **looks[f].marks(linestyle="none"), label=name)
        for f, name in zip(only, names)
    ]
    bar: dict[str, Any] = {
        "marker": "|",
        "markersize": 6,
        "markeredgewidth": 0.9,
        "linestyle": "none",
    }
    return [
        *marks,
        Line2D([], [], color=INK, linewidth=0.9, label="frontier"),
        Line2D([], [], color=INK, **bar, label=interval),
        Line2D([], [], linestyle="none", label="numbers: removed (%)"),
        Line2D([], [], color=GREY, linewidth=0.6, label="steps: best of a family"),
        Patch(color="#B8B8B8", linewidth=0, label="strip: fastest family"),
    ]
