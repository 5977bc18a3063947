"""Draw speedup against quality loss with the frontier; points that are not on the frontier are
faint."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from simulator.arrays import BoolArray, FloatArray
from simulator.figures import layout
from simulator.figures.style import (
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

# losses up to this value have a linear axis; a perplexity can rise by several times
LINEAR_UP_TO = 0.6
BEND = 0.1  # loss at which an axis with larger losses changes from linear to logarithmic
MOST_POINTS = 500  # most points of a panel; more cannot be distinguished


def fronts_of(fronts: Sequence[Front]) -> Figure:
    """Draw frontiers on one metric under one protocol."""
    lengths = len({f.seq for f in fronts}) > 1
    rows = [layout.setting_label(f, seq=lengths) for f in fronts]
    data, omitted = _few(_points(fronts, rows))
    # a family's only method is named in the legend, one of several next to its points
    methods = {f: set(data["method"][data["family"] == f]) for f in in_order(data["family"])}
    only = {f: next(iter(names)) if len(names) == 1 else "" for f, names in methods.items()}
    data = layout.fitted(data)
    data = {**data, "method": np.where([bool(only[f]) for f in data["family"]], "", data["method"])}
    looks = styles_of({family: family for family in only})
    with paper_style():
        figure, panels = layout.panel_grid(
            data,
            1.9,
            0.66,
            handles=_handles(only, looks, fronts[0].level),
            legend=_title(fronts[0].axis, data["loss"]),
            title=omitted,
            sharex=True,
            sharey=True,
        )
        limits = layout.padded(data["lower"], data["upper"], [1.0, 1.05])
        for ax in panels.values():
            layout.log_axis(ax, "y", 7, limits)
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


def _title(axis: Axis, loss: FloatArray) -> str:
    bent = f" (linear to {100 * BEND:.0f} %, then logarithmic)" if loss.max() > LINEAR_UP_TO else ""
    protocol = textwrap.fill(axis.protocol, int(layout.width_of(2) / 0.058))
    return f"quality loss (%): {axis.metric}{bent}\n{protocol}".rstrip()


def _loss_axis(ax: Axes, loss: FloatArray) -> None:
    """Set an axis in per cent, which is logarithmic from a dotted line on if losses are large."""
    least, last = float(loss.min()), float(loss.max())
    room = 0.08 * (last - min(0.0, least)) or 1.0
    if last <= 100 * LINEAR_UP_TO:
        start = least - 3.0 * room if 2.0 * least > last else min(0.0, least - 0.4 * room)
        ax.set_xlim(start, last + room)
        return
    ax.set_xscale("symlog", linthresh=100 * BEND, linscale=0.5)
    ax.axvline(100 * BEND, color=GREY, linewidth=0.7, linestyle=(0, (1, 2)), zorder=1.4)
    start = least / 1.6 if least > 100 * BEND else min(0.0, least - 1.0)
    ax.set_xlim(start, last * 1.25)
    # no tick near the end, whose label would overlap the next panel
    rounds = [0.0, *(m * 10.0**power for power in range(1, 7) for m in (1, 3))]
    ticks = [tick for tick in rounds if start <= tick <= last * 0.75]
    layout.fixed_ticks(ax.xaxis, ticks)


def _panel(ax: Axes, data: layout.FigurePoints, looks: Mapping[str, Style]) -> None:
    x, y = 100 * data["loss"].astype(float), data["speedup"].astype(float)
    optimal = frontier([0.0, *x], [1.0, *y])[1:] if len(x) else np.zeros(0, dtype=bool)
    order = [int(i) for i in np.lexsort((-y, x)) if optimal[i]]
    start, end = ax.get_xlim()
    steps_x = [start, *np.maximum(x[order], 0.0), end]
    steps_y = [1.0, *y[order], y[order[-1]] if order else 1.0]
    ax.axhline(1.0, color=INK, linewidth=0.7, zorder=1.5)
    ax.step(steps_x, steps_y, where="post", color=INK, linewidth=0.9, zorder=2)
    for family, style in looks.items():
        _draw_family(ax, {**data, "x": x, "best": optimal}, data["family"] == family, style)
    clear_of = [
        (x, y),
        *((x, bar) for bar in np.linspace(data["lower"], data["upper"], 12)),
        _along(np.repeat(steps_x, 2)[1:], np.repeat(steps_y, 2)[:-1]),
        (np.linspace(start, end, 60), np.ones(60)),
    ]
    names = _point_names(data)
    layout.write_labels(
        ax, x[optimal], y[optimal], names[optimal].tolist(), clear_of, reach_pt=30.0
    )
    pale: Look = {"reach_pt": 10.0, "color": PALE_INK}
    layout.write_labels(ax, x[~optimal], y[~optimal], names[~optimal].tolist(), clear_of, **pale)


def _draw_family(ax: Axes, data: layout.FigurePoints, own: BoolArray, style: Style) -> None:
    """Draw the points of a family, faint unless they are on the frontier, and its fastest point
    within each loss: families at equal quality."""
    x, y = data["x"][own], data["speedup"][own]
    order = np.argsort(x, kind="stable")
    best = np.maximum.accumulate(y[order])
    losses = [*x[order], *[ax.get_xlim()[1]] * bool(len(order))]
    thin: Look = {"color": style.color, "linewidth": 0.6, "alpha": 0.6, "zorder": 1.8}
    ax.step(losses, [*best, *best[-1:]], where="post", **thin)
    for best_ones, alpha, size in ((True, 1.0, 4.2), (False, 0.35, 3.2)):
        these = own & (data["best"] == best_ones)
        ends = data["lower"][these], data["upper"][these]
        marks = style.marks(linestyle="none", alpha=alpha, markersize=size)
        layout.with_intervals(ax, data["x"][these], data["speedup"][these], ends, **marks)


def _point_names(data: layout.FigurePoints) -> NDArray[Any]:
    pairs = zip(data["method"], data["sparsity"].tolist())
    names = [f"{method} {100 * sparsity:.3g}".strip() for method, sparsity in pairs]
    return np.array(names, dtype=object)


def _along(x: FloatArray, y: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return points along the lines between some corners."""
    corners = np.arange(len(x))
    places = np.linspace(0, len(x) - 1, 20 * len(x))
    return np.interp(places, corners, x), np.interp(places, corners, y)


def _handles(only: Mapping[str, str], looks: Mapping[str, Style], level: float) -> list[Any]:
    names = {f: f" ({method})" if method not in ("", f) else "" for f, method in only.items()}
    return [
        *layout.marks({f"{label(f)}{names[f]}": looks[f] for f in only}, linestyle="none"),
        layout.entry("frontier", color=INK, linewidth=0.9),
        layout.bar(level, up=True),
        layout.entry("numbers: removed (%)", linestyle="none"),
        layout.entry("steps: best of a family", color=GREY, linewidth=0.6),
    ]
