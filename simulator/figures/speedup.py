"""Draw speedup against sparsity in small multiples that print on one page.

One or two families are curves with interval bands and bounds: a row of panels per setting, a column per device. More
curves would hide each other: they become dots, with a panel per setting, a line of text per family and sparsity (no
legend to look up), and on it a dot per device with its interval and bounds. Devices, sparsities, families and settings
thus share one axis. A single sparsity makes no curve and becomes dots too.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simulator.figures import layout
from simulator.figures.style import (
    BLACK,
    COLORS,
    COLUMN_IN,
    GREY,
    INK,
    PAGE_IN,
    PALE_INK,
    Style,
    in_order,
    label,
    paper_style,
    style_of,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


MOST_CURVES = 2
"""Maximum number of families drawn as curves with bands; more become dots."""

PAGE_HEIGHT_IN = 9.0
"""Height of a page's text, inches."""

MOST_ACROSS = 4
"""Maximum number of panels of dots per row."""

LEAST_LINE_IN, LEAST_DOT_IN = 0.1, 0.04
"""Minimum height of a line of text and of a dot, inches; on a page with less, dots become curves without bands."""

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
    width_in: float | None = None,
    interval: str = "90 % interval",
) -> Figure:
    """Draw speedup against sparsity.

    One entry per point: labels of the setting, the device and the family (panels come in the order in which labels
    first occur), the removed fraction in [0, 1), the prediction and its interval. ``bounds`` are up to three upper
    bounds of each point by name, ``interval`` is the label of bars and bands. The figure is one column wide for one
    panel, else a page. InputError if there are no points or the arrays differ in length.

    >>> where = ["decode"] * 2, ["h100"] * 2, ["depth"] * 2
    >>> figure = speedup_figure(*where, [0.1, 0.2], [1.1, 1.2], [1.0, 1.1], [1.2, 1.3])
    >>> len(figure.axes)
    1
    """
    numbers = {"sparsity": sparsity, "speedup": speedup, "lower": lower, "upper": upper}
    upper_bounds = {name: np.asarray(values, dtype=float) for name, values in (bounds or {}).items()}
    data = layout.columns_of(
        "points of the figure", {"row": row, "column": column, "family": family}, {**numbers, **upper_bounds}
    )
    families, (settings, devices) = in_order(data["family"]), (list(dict.fromkeys(data[n])) for n in ("row", "column"))
    pairs = [(f, s) for f in families for s in np.unique(data["sparsity"][data["family"] == f]).tolist()]
    down = -(-len(settings) // MOST_ACROSS)  # rows of panels
    line = (PAGE_HEIGHT_IN - 0.8 - 0.4 * down) / (down * len(pairs))
    dots = len(families) > MOST_CURVES and line >= max(LEAST_LINE_IN, LEAST_DOT_IN * len(devices))
    with paper_style():
        if dots or len(pairs) == len(families):
            width = width_in or (COLUMN_IN if len(settings) == 1 else PAGE_IN)
            line = float(np.clip(line, LEAST_LINE_IN, 0.068 * len(devices) + 0.04))
            return _dots(data, list(upper_bounds), pairs, devices, settings, line, width, interval)
        width = width_in or (COLUMN_IN if len(settings) * len(devices) == 1 else PAGE_IN)
        return _curves(data, list(upper_bounds), families, width, interval)


def _panels(data: layout.Columns, panel_in: float, around_in: float, width_in: float) -> tuple[Figure, layout.Panels]:
    """Return panels with ticks on the outer ones; names of rows are wrapped to the height of a panel."""
    figure, panels = layout.panel_grid(
        data["row"], data["column"], panel_in, around_in, width_in, sharex=True, sharey=True
    )
    layout.name_panels(panels, {r: textwrap.fill(r, max(8, int(panel_in / 0.058))) for r in data["row"]})
    return figure, panels


def _own(data: layout.Columns, r: str, c: str, family: str) -> NDArray[np.intp]:
    """Return the points of one family in a panel by rising sparsity."""
    rows = np.flatnonzero((data["row"] == r) & (data["column"] == c) & (data["family"] == family))
    ordered: NDArray[np.intp] = rows[np.argsort(data["sparsity"][rows], kind="stable")]
    return ordered


def _range(data: layout.Columns, names: Sequence[str]) -> tuple[float, float]:
    """Return the range of some columns, widened a little; it always holds 1."""
    values = np.concatenate([*(data[name] for name in names), np.ones(1)])
    values = values[np.isfinite(values) & (values > 0)]
    low, high = float(values.min()), float(values.max())
    pad = max((high / low) ** 0.04, 1.02)
    return low / pad, high * pad


def _dots(
    data: layout.Columns,
    bounds: list[str],
    pairs: Sequence[tuple[str, float]],
    devices: Sequence[str],
    settings: Sequence[str],
    line: float,
    width: float,
    interval: str,
) -> Figure:
    """Draw many families: a line of text per family and sparsity, a dot per device."""
    looks = [Style(*mark, hollow=i % 2 == 1) for i, mark in enumerate(zip(COLORS * 2, "osD^vPXh*<>pd"))]
    handles = _dot_handles(devices, looks, bounds, interval)
    lines = layout.legend_lines(handles, width)
    down = -(-len(settings) // MOST_ACROSS)
    across = -(-len(settings) // down)
    names = [_line(pairs, i) for i in range(len(pairs))]
    room = (width - 0.058 * max(map(len, names))) / across  # per panel, inches
    titles = [textwrap.fill(s, max(8, int(room / 0.075))) for s in settings]
    above = 0.13 * max(t.count("\n") + 1 for t in titles)
    height = max(len(pairs) * line, 0.3) + 0.2 + above
    figure, panels, _ = layout.panel_list(
        len(settings), height, 0.42 + 0.14 * lines, across, width, sharex=True, sharey=True
    )
    low, high = _range(data, ["speedup", "lower", "upper", *bounds])
    slot = 0.8 / len(devices)
    size = float(np.clip(72 * line * slot * 0.75, 2.2, 3.4))
    shaded = list(dict.fromkeys(f for f, _ in pairs))[::2]
    for i, (ax, setting, title) in enumerate(zip(panels, settings, titles)):
        ax.set(xscale="log", xlim=(low, high), ylim=(len(pairs) - 0.5, -0.5))
        ax.set_title(title, pad=4)
        ax.grid(axis="y", visible=False)
        ax.tick_params(axis="y", length=0)
        ax.tick_params(axis="x", labelbottom=i + across >= len(settings))
        ax.spines["left"].set_visible(False)
        ax.axvline(1.0, color=INK, linewidth=0.7, zorder=1.5)
        for place, (family, _) in enumerate(pairs):
            if family in shaded:
                ax.axhspan(place - 0.5, place + 0.5, color="#F0F0F0", linewidth=0, zorder=0)
        for k, (name, style) in enumerate(zip(devices, looks)):
            own = np.flatnonzero((data["row"] == setting) & (data["column"] == name))
            y = np.array([pairs.index(p) for p in zip(data["family"][own], data["sparsity"][own])], dtype=float)
            y += (k - 0.5 * (len(devices) - 1)) * slot
            for bound, color in zip(bounds, _BOUND_COLORS):
                ax.vlines(data[bound][own], y - 0.5 * slot, y + 0.5 * slot, color=color, linewidth=0.9, zorder=2)
            ax.hlines(y, data["lower"][own], data["upper"][own], color=style.color, linewidth=0.8, zorder=3)
            ax.plot(data["speedup"][own], y, **style.marks(linestyle="none", markersize=size, zorder=4))
        ax.set_yticks(range(len(pairs)), names)
        layout.log_axis(ax.xaxis, low, high, int(np.clip(room / 0.25, 2, 12)))
    layout.legend_below(figure, handles, lines, "speedup (log scale)")
    return layout.laid_out(figure)


def _line(pairs: Sequence[tuple[str, float]], i: int) -> str:
    """Return the text of a line: the removed fraction, on the first line of a family after its name."""
    family, sparsity = pairs[i]
    named = "" if i and pairs[i - 1][0] == family else f"{label(family)}  "
    return f"{named}{100 * sparsity:.3g} %"


def _dot_handles(devices: Sequence[str], looks: Sequence[Style], bounds: list[str], interval: str) -> list[Any]:
    from matplotlib.lines import Line2D

    tick: dict[str, Any] = {"marker": "|", "linestyle": "none", "markersize": 6, "markeredgewidth": 1.1}
    dots = [Line2D([], [], **style.marks(linestyle="none"), label=name) for name, style in zip(devices, looks)]
    ticks = [Line2D([], [], color=color, **tick, label=name) for name, color in zip(bounds, _BOUND_COLORS)]
    return [*dots, Line2D([], [], color=INK, linewidth=0.8, label=interval), *ticks]


def _curves(data: layout.Columns, bounds: list[str], families: list[str], width: float, interval: str) -> Figure:
    """Draw few families as curves with bands and bounds, many families as curves only."""
    few = len(families) <= MOST_CURVES
    bounds = bounds if few else []
    handles = _curve_handles(families, bounds, interval if few else "")
    lines = layout.legend_lines(handles, width)
    low, high = _range(data, ["speedup", "lower", "upper", *bounds] if few else ["speedup"])
    around_in = 0.5 + 0.14 * lines
    room = (PAGE_HEIGHT_IN - around_in) / len(set(data["row"]))
    figure, panels = _panels(data, float(np.clip(room, 0.7, 1.6)), around_in, width)
    fractions = np.unique(data["sparsity"])
    start, end = float(fractions[0]), float(fractions[-1])
    margin = 0.06 * (end - start)
    for (r, c), ax in panels.items():
        ax.set(yscale="log", xlim=(100 * (start - margin), 100 * (end + margin)), ylim=(low, high))
        ax.axhline(1.0, color=INK, linewidth=0.7, zorder=1.5)
        for i, name in enumerate(families):
            style, own = style_of(name, i), _own(data, r, c, name)
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
    layout.legend_below(figure, handles, lines, "removed (%)")
    return layout.laid_out(figure, "speedup (log scale)")


def _curve_handles(families: list[str], bounds: list[str], interval: str) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Line2D([], [], **style_of(name, i).marks(), label=label(name)) for i, name in enumerate(families)
    ]
    for name, line in zip(bounds, _BOUND_LINES):
        handles.append(Line2D([], [], color=INK, linestyle=line, linewidth=0.8, label=name))
    return [*handles, Patch(color=INK, alpha=0.16, linewidth=0, label=interval)] if interval else handles
