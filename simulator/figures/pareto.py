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

from simulator.arrays import FloatArray
from simulator.figures import layout
from simulator.figures.style import (
    BLACK,
    GREY,
    INK,
    PAGE_IN,
    PALE_INK,
    in_order,
    label,
    paper_style,
    style_of,
)
from simulator.prediction.pareto import Front, frontier
from simulator.prediction.requests import batch_name

# losses up to this value have a linear axis; a perplexity can rise by several times
LINEAR_UP_TO = 0.6
BEND = 0.1  # loss at which an axis with larger losses changes from linear to logarithmic
STRIP = 0.045  # height of the strip of fastest families, as a share of a panel's height


def fronts_of(fronts: Sequence[Front], rows: Sequence[str] = ()) -> Figure:
    """Draw frontiers on one metric under one protocol; ``rows`` are labels, by default phase, batch
    and length."""
    length = ", seq {}" if len({f.seq for f in fronts}) > 1 else ""
    rows = rows or [
        f"{f.phase}, {batch_name(f.phase)} {f.batch}{length.format(f.seq)}" for f in fronts
    ]
    points = [p for f in fronts for p in f.points]
    found = layout.columns(
        points, family="family", method="method", sparsity="sparsity", loss="loss", **layout.SPEEDUP
    )
    for name, labels in layout.placed(fronts, rows).items():
        found[name] = [
            label for front, label in zip(fronts, labels, strict=True) for _ in front.points
        ]
    data, axis = layout.arrays(found), fronts[0].axis
    # a family's only method is named in the legend, one of several next to its points
    methods = {f: set(data["method"][data["family"] == f]) for f in in_order(data["family"])}
    only = {f: next(iter(m)) if len(m) == 1 else "" for f, m in methods.items()}
    data = {**data, "method": np.where([bool(only[f]) for f in data["family"]], "", data["method"])}
    with paper_style():
        handles = _handles(only, layout.interval(fronts[0].level))
        bends = float(data["loss"].max()) > LINEAR_UP_TO
        scale = f" (linear to {100 * BEND:.0f} %, then logarithmic)" if bends else ""
        title = (
            "quality loss (%):"
            f" {axis.metric}{scale}\n{textwrap.fill(axis.protocol, int(PAGE_IN / 0.058))}".rstrip()
        )
        look: dict[str, Any] = {"handles": handles, "legend": title, "sharex": True, "sharey": True}
        figure, panels = layout.panel_grid(data, 1.9, 0.66, **look)
        low, high = float(min(1.0, data["lower"].min())), float(max(1.05, data["upper"].max()))
        pad = (high / low) ** 0.05
        for ax in panels.values():
            ax.set(yscale="log", ylim=(low / pad, high * pad))
            layout.log_axis(ax.yaxis, low / pad, high * pad, 7)
            _loss_axis(ax, 100 * data["loss"])
        # before the names of points, which depend on the layout
        layout.laid_out(figure, "speedup (log scale)")
        for place, ax in panels.items():
            _panel(ax, layout.of_panel(data, *place))
    return figure


def _loss_axis(ax: Axes, loss: FloatArray) -> None:
    """Set an axis in per cent, which is logarithmic from a dotted line on if losses are large."""
    first, last = min(0.0, float(loss.min())), max(5.0, float(loss.max()))
    if last > 100 * LINEAR_UP_TO:
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
        ax.set_xlim(first - 0.03 * last if first < 0 else 0.0, last * 1.08)
    ax.tick_params(axis="x", length=0, pad=7)  # below the strip
    ax.spines["bottom"].set_visible(False)


def _panel(ax: Axes, data: layout.FigurePoints) -> None:
    x, y = 100 * data["loss"].astype(float), data["speedup"].astype(float)
    optimal = frontier([0.0, *x], [1.0, *y])[1:] if len(x) else np.zeros(0, dtype=bool)
    ax.axhline(1.0, color=INK, linewidth=0.7, zorder=1.5)
    order = [i for i in np.lexsort((-y, x)) if optimal[i]]
    start, end = ax.get_xlim()
    steps_x, steps_y = [start, *(max(x[i], 0.0) for i in order), end], [1.0, *(y[i] for i in order)]
    ax.step(steps_x, [*steps_y, steps_y[-1]], where="post", color=INK, linewidth=0.9, zorder=2)
    for i, name in enumerate(in_order(data["family"])):
        style = style_of(name, i)
        for best, alpha, size in ((True, 1.0, 4.2), (False, 0.35, 3.2)):
            own = (data["family"] == name) & (optimal == best)
            ends = data["lower"][own], data["upper"][own]
            ax.vlines(x[own], *ends, color=style.color, linewidth=0.9, alpha=0.8 * alpha, zorder=3)
            ax.plot(
                x[own],
                y[own],
                **style.marks(linestyle="none", alpha=alpha, markersize=size, zorder=4),
            )
    names = [
        f"{method} {100 * s:.3g}".strip()
        for method, s in zip(data["method"], data["sparsity"].tolist())
    ]
    along = np.linspace(0.0, 1.0, 12)[:, None]
    bars = data["lower"] * (1.0 - along) + data["upper"] * along
    # corners of the frontier
    ends = np.repeat(steps_x, 2)[1:], np.repeat([*steps_y, steps_y[-1]], 2)[:-1]
    corners = np.linspace(0, len(ends[0]) - 1, 20 * len(ends[0]))
    line_x, line_y = (np.interp(corners, np.arange(len(e)), e) for e in ends)
    dense = np.linspace(start, end, 60)
    clear_of = [
        (np.broadcast_to(x, bars.shape).ravel(), bars.ravel()),
        (line_x, line_y),
        (dense, np.ones_like(dense)),
    ]
    for position, (i, stop) in enumerate(zip(order, [*(x[k] for k in order[1:]), end])):
        style = style_of(data["family"][i], position)
        strip: dict[str, Any] = {
            "hatch": "/////" if style.hollow else None,
            "linewidth": 0,
            "clip_on": False,
        }
        ax.axvspan(
            max(x[i], 0.0),
            stop,
            -STRIP,
            0,
            facecolor=style.color,
            edgecolor="white",
            alpha=0.9,
            **strip,
        )
    for best, reach_pt, color in ((True, 30.0, BLACK), (False, 10.0, PALE_INK)):
        own = np.flatnonzero(optimal == best)
        layout.write_labels(
            ax,
            x[own],
            y[own],
            [names[i] for i in own],
            [(x, y), *clear_of],
            reach_pt=reach_pt,
            color=color,
        )


def _handles(only: Mapping[str, str], interval: str) -> list[Any]:
    names = [f"{label(f)} ({method})" if method else label(f) for f, method in only.items()]
    marks = [
        Line2D([], [], **style_of(f, i).marks(linestyle="none"), label=name)
        for i, (f, name) in enumerate(zip(only, names))
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
        Patch(color="#B8B8B8", linewidth=0, label="strip: fastest family"),
    ]
