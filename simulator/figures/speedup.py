"""Speedup against sparsity: small multiples, a row for each setting, a column for each device.

A few families are drawn as curves with interval bands and bounds. Eleven curves with their bands would hide each other,
so many families become a dot plot: a line of text for each family (no legend to look up), within it one dot for each
sparsity from top to bottom, with its interval and bounds. A single sparsity makes no curve and becomes dots too.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simulator.figures import layout
from simulator.figures.style import BLACK, GREY, INK, PAGE_IN, PALE_INK, in_order, label, look, paper_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

F = NDArray[np.float64]

MOST_CURVES = 4
"""Families drawn as curves with bands; more become dots."""

PAGE_HEIGHT_IN = 9.0
"""Height of a page's text, inches."""

MOST_DOTS = 5
"""Sparsities a family has dots for; more become curves without bands."""

_BOUND_LINES = ((0, (1, 1)), (0, (5, 1.5)), (0, (3, 1, 1, 1)))
_BOUND_COLORS = (GREY, BLACK, PALE_INK)


def speedup_figure(
    row: Sequence[str],
    column: Sequence[str],
    family: Sequence[str],
    sparsity: ArrayLike,
    speedup: ArrayLike,
    lower: ArrayLike,
    upper: ArrayLike,
    bounds: Mapping[str, ArrayLike] | None = None,
    *,
    width_in: float = PAGE_IN,
    interval: str = "90 % interval",
) -> Figure:
    """Speedup against sparsity.

    One entry a point: labels of the setting, the device and the family (panels come in the order in which labels first
    occur), the fraction removed in [0, 1), the prediction and its interval. ``bounds`` are up to three upper bounds of
    each point by name, ``interval`` says what bars and bands are. InputError when there are no points or the arrays
    differ in length.

    >>> where = ["decode"] * 2, ["h100"] * 2, ["depth"] * 2
    >>> figure = speedup_figure(*where, [0.1, 0.2], [1.1, 1.2], [1.0, 1.1], [1.2, 1.3])
    >>> len(figure.axes)
    1
    """
    numbers = {"sparsity": sparsity, "speedup": speedup, "lower": lower, "upper": upper}
    limits = {name: np.asarray(values, dtype=float) for name, values in (bounds or {}).items()}
    data = layout.columns_of(
        "points of the figure", {"row": row, "column": column, "family": family}, {**numbers, **limits}
    )
    families, fractions = in_order(data["family"]), np.unique(data["sparsity"])
    dots = len(fractions) == 1 or (len(families) > MOST_CURVES and len(fractions) <= MOST_DOTS)
    with paper_style():
        return (_dots if dots else _curves)(data, list(limits), families, width_in, interval)


def _panels(data: layout.Columns, panel_in: float, around_in: float, width_in: float) -> tuple[Figure, layout.Panels]:
    """layout.Panels with ticks on the outer ones; names of rows are wrapped to the height of a panel."""
    figure, panels = layout.panel_grid(
        data["row"], data["column"], panel_in, around_in, width_in, sharex=True, sharey=True
    )
    layout.name_panels(panels, {r: textwrap.fill(r, max(8, int(panel_in / 0.058))) for r in data["row"]})
    return figure, panels


def _own(data: layout.Columns, r: str, c: str, family: str) -> NDArray[np.intp]:
    """Points of one family in a panel by rising sparsity."""
    rows = np.flatnonzero((data["row"] == r) & (data["column"] == c) & (data["family"] == family))
    ordered: NDArray[np.intp] = rows[np.argsort(data["sparsity"][rows], kind="stable")]
    return ordered


def _range(data: layout.Columns, names: Sequence[str]) -> tuple[float, float]:
    """Range of some columns, widened a little; always holds 1."""
    values = np.concatenate([*(data[name] for name in names), np.ones(1)])
    values = values[np.isfinite(values) & (values > 0)]
    low, high = float(values.min()), float(values.max())
    pad = max((high / low) ** 0.04, 1.02)
    return low / pad, high * pad


def _dots(data: layout.Columns, bounds: list[str], families: list[str], width: float, interval: str) -> Figure:
    """Many families: a line of text for each, a dot for each sparsity."""
    fractions = np.unique(data["sparsity"])
    several = len(fractions) > 1
    spread = np.linspace(-0.29, 0.29, len(fractions)) if several else np.zeros(1)
    half = 0.42 * (spread[1] - spread[0]) if several else 0.25
    settings, devices = (len(set(data[name])) for name in ("row", "column"))
    # a line of text and a row of dots for each sparsity; tighter where the figure would outgrow a page
    room = (PAGE_HEIGHT_IN - 1.1 - 0.16 * settings) / (settings * len(families))
    line = float(np.clip(room, 0.15, 0.075 * max(len(fractions), 2) + 0.02))
    sizes = np.linspace(2.2, 4.2, len(fractions)) if several else np.array([3.4])
    sizes = np.minimum(sizes, 72 * line * 0.8 / max(len(fractions), 2))
    low, high = _range(data, ["speedup", "lower", "upper", *bounds])
    handles = _dot_handles(fractions, sizes, bounds, interval)
    lines = layout.legend_lines(handles, width)
    figure, panels = _panels(data, max(len(families) * line, 0.75) + 0.08, 0.62 + 0.14 * lines, width)
    for (r, c), ax in panels.items():
        ax.set(xscale="log", xlim=(low, high), ylim=(len(families) - 0.5, -0.5))
        ax.grid(axis="y", visible=False)
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        for i in range(0, len(families), 2):
            ax.axhspan(i - 0.5, i + 0.5, color="#F5F5F5", linewidth=0, zorder=0)
        ax.axvline(1.0, color=INK, linewidth=0.7, zorder=1.5)
        for i, name in enumerate(families):
            style, own = look(name, i), _own(data, r, c, name)
            place = np.searchsorted(fractions, data["sparsity"][own])
            y = i + spread[place]
            for bound, color in zip(bounds, _BOUND_COLORS):
                ax.vlines(data[bound][own], y - half, y + half, color=color, linewidth=0.9, zorder=5)
            ax.hlines(y, data["lower"][own], data["upper"][own], color=style.color, linewidth=1.0, zorder=3)
            marks: dict[str, Any] = {"marker": style.marker, "edgecolor": style.color, "linewidth": 0.7, "zorder": 4}
            face = "white" if style.hollow else style.color
            ax.scatter(data["speedup"][own], y, s=sizes[place] ** 2, facecolor=face, **marks)
        ax.set_yticks(range(len(families)), [label(name) for name in families])
        layout.log_axis(ax.xaxis, low, high, int(np.clip((width - 1.5) / devices / 0.29, 2, 12)))
    layout.legend_below(figure, handles, lines, "speedup (log scale)")
    return layout.settled(figure)


def _dot_handles(fractions: F, sizes: F, bounds: list[str], interval: str) -> list[Any]:
    from matplotlib.lines import Line2D

    names = [f"{100 * f:.4g} %" for f in fractions]
    dot: dict[str, Any] = {"color": INK, "marker": "o", "linestyle": "none"}
    tick: dict[str, Any] = {"marker": "|", "linestyle": "none", "markersize": 6, "markeredgewidth": 1.1}
    dots = [Line2D([], [], **dot, markersize=s, label=name) for s, name in zip(sizes, names)]
    dots[0].set_label(f"{names[0]} removed")
    ticks = [Line2D([], [], color=color, **tick, label=name) for name, color in zip(bounds, _BOUND_COLORS)]
    return [*dots, Line2D([], [], color=INK, linewidth=1.0, label=interval), *ticks]


def _curves(data: layout.Columns, bounds: list[str], families: list[str], width: float, interval: str) -> Figure:
    """Few families: a curve for each, with its band and its bounds; of many the curves alone."""
    few = len(families) <= MOST_CURVES
    bounds = bounds if few else []
    handles = _curve_handles(families, bounds, interval if few else "")
    lines = layout.legend_lines(handles, width)
    low, high = _range(data, ["speedup", "lower", "upper", *bounds] if few else ["speedup"])
    figure, panels = _panels(data, 1.6, 0.5 + 0.14 * lines, width)
    fractions = np.unique(data["sparsity"])
    start, end = float(fractions[0]), float(fractions[-1])
    margin = 0.06 * (end - start)
    for (r, c), ax in panels.items():
        ax.set(yscale="log", xlim=(100 * (start - margin), 100 * (end + margin)), ylim=(low, high))
        ax.axhline(1.0, color=INK, linewidth=0.7, zorder=1.5)
        for i, name in enumerate(families):
            style, own = look(name, i), _own(data, r, c, name)
            x, lower, upper = 100 * data["sparsity"][own], data["lower"][own], data["upper"][own]
            if few:
                band: dict[str, Any] = {"color": style.color, "alpha": 0.16, "linewidth": 0, "zorder": 2}
                ax.fill_between(x, lower, upper, **band)
                for bound, line in zip(bounds, _BOUND_LINES):
                    ax.plot(x, data[bound][own], color=style.color, linestyle=line, linewidth=0.8, zorder=2.5)
                if len(own) == 1:  # neither a band nor a line
                    ax.vlines(x, lower, upper, color=style.color, alpha=0.5, linewidth=1.5)
                    for bound in bounds:
                        ax.scatter(x, data[bound][own], color=style.color, marker="_", s=36, zorder=2.5)
            ax.plot(x, data["speedup"][own], **style.marks(), zorder=4)
        layout.log_axis(ax.yaxis, low, high, 7)
        if len(fractions) <= 5:
            ax.set_xticks(100 * fractions, [f"{100 * f:.4g}" for f in fractions])
    figure.supylabel("speedup (log scale)", fontsize=7)
    layout.legend_below(figure, handles, lines, "removed (%)")
    return layout.settled(figure)


def _curve_handles(families: list[str], bounds: list[str], interval: str) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Line2D([], [], **look(name, i).marks(), label=label(name)) for i, name in enumerate(families)]
    for name, line in zip(bounds, _BOUND_LINES):
        handles.append(Line2D([], [], color=INK, linestyle=line, linewidth=0.8, label=name))
    return [*handles, Patch(color=INK, alpha=0.16, linewidth=0, label=interval)] if interval else handles
