"""Draw speedup over batch, length or sparsity in small multiples that print on one page.

A few candidates are curves with interval bands, and with bounds if they are one or two: a row of panels per setting, a
column per device and engine. A ring is at the first value from which a candidate pays. More curves would hide each
other: they become dots, with a panel per setting, a line of text per candidate and value (no legend to look up), and on
it a dot per device with its interval and bounds. A single value makes no curve and becomes dots too.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from types import MappingProxyType
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
from simulator.prediction.sentences import GAIN

if TYPE_CHECKING:
    from matplotlib.figure import Figure


MOST_CURVES, MOST_BOUNDED = 4, 2
"""Maximum numbers of candidates drawn as curves with bands (more become dots), and as curves with bounds."""

AXES: Mapping[str, str] = MappingProxyType({"batch": "batch", "seq": "sequence (tokens)", "sparsity": "removed (%)"})
"""Fields that speedup is drawn over, and labels of their axes."""

PAYS = "pays from here (interval above 1)"
"""Label of the rings."""

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
    candidate: Sequence[str],
    at: ArrayLike,
    speedup: ArrayLike,
    lower: ArrayLike,
    upper: ArrayLike,
    bounds: Mapping[str, ArrayLike] | None = None,
    *,
    axis: str = "sparsity",
    looks: Mapping[str, Style] | None = None,
    interval: str = "90 % interval",
    x_label: str = "",
    note: str = "",
) -> Figure:
    """Draw speedup over a field: the key ``axis`` of :data:`AXES`.

    One entry per point: labels of the setting, the device and the candidate (a family, or another name), the value of
    the field (the removed fraction in [0, 1) for ``sparsity``), the prediction and its interval. Panels come in the
    order in which labels first occur. ``bounds`` are up to three upper bounds of each point by name, ``looks`` the
    styles of candidates (default: those of families). ``interval`` is the label of bars and bands, ``x_label`` that of
    the axis (default: in :data:`AXES`), and ``note`` is written next to it. The figure is one column wide for one
    panel, else a page. InputError if there are no points or the arrays differ in length.
    """
    numbers = {"at": at, "speedup": speedup, "lower": lower, "upper": upper}
    upper_bounds = {name: np.asarray(values, dtype=float) for name, values in (bounds or {}).items()}
    data = layout.columns_of(
        "points of the figure", {"row": row, "column": column, "candidate": candidate}, {**numbers, **upper_bounds}
    )
    names, (settings, devices) = in_order(data["candidate"]), (list(dict.fromkeys(data[n])) for n in ("row", "column"))
    styles = {name: (looks or {}).get(name) or style_of(name, i) for i, name in enumerate(names)}
    pairs = [(n, v) for n in names for v in np.unique(data["at"][data["candidate"] == n]).tolist()]
    down = -(-len(settings) // MOST_ACROSS)  # rows of panels
    line = (PAGE_HEIGHT_IN - 0.8 - 0.4 * down) / (down * len(pairs))
    dots = len(names) > MOST_CURVES and line >= max(LEAST_LINE_IN, LEAST_DOT_IN * len(devices))
    with paper_style():
        if dots or len(pairs) == len(names):
            width = COLUMN_IN if len(settings) == 1 else PAGE_IN
            line = float(np.clip(line, LEAST_LINE_IN, 0.068 * len(devices) + 0.04))
            texts = [_line(pairs, i, axis) for i in range(len(pairs))]
            return _dots(data, list(upper_bounds), pairs, texts, devices, settings, line, width, interval, note)
        width = COLUMN_IN if len(settings) * len(devices) == 1 else PAGE_IN
        x_label = f"{x_label or AXES[axis]}{note and f'; {note}'}"
        return _curves(data, list(upper_bounds), styles, axis, width, interval, x_label)


def pays_from(at: ArrayLike, lower: ArrayLike) -> int | None:
    """Return the index of the first value from which a candidate pays, as in :mod:`simulator.prediction.sentences`.

    There and at every larger value the whole interval is above 1; None if it does not pay at the largest value.
    """
    x, low = np.asarray(at, dtype=float), np.asarray(lower, dtype=float)
    order = np.argsort(x, kind="stable")
    pays = np.logical_and.accumulate(low[order][::-1] >= GAIN)[::-1]
    return int(order[np.argmax(pays)]) if pays.any() else None


def value_text(axis: str, value: float) -> str:
    """Format a value of a field."""
    return {
        "batch": f"batch {value:.0f}",
        "seq": f"{layout.short(int(value))} tokens",
        "sparsity": f"{100 * value:.3g} %",
    }[axis]


def _panels(
    data: layout.FigurePoints, panel_in: float, around_in: float, width_in: float
) -> tuple[Figure, layout.Panels]:
    """Return panels with ticks on the outer ones; names of rows are wrapped to the height of a panel."""
    figure, panels = layout.panel_grid(
        data["row"], data["column"], panel_in, around_in, width_in, sharex=True, sharey=True
    )
    layout.name_panels(panels, {r: textwrap.fill(r, max(8, int(panel_in / 0.058))) for r in data["row"]})
    return figure, panels


def _own(data: layout.FigurePoints, r: str, c: str, name: str) -> NDArray[np.intp]:
    """Return the points of one candidate in a panel by rising value."""
    rows = np.flatnonzero((data["row"] == r) & (data["column"] == c) & (data["candidate"] == name))
    ordered: NDArray[np.intp] = rows[np.argsort(data["at"][rows], kind="stable")]
    return ordered


def _range(data: layout.FigurePoints, names: Sequence[str]) -> tuple[float, float]:
    """Return the range of some columns, widened a little; it always holds 1."""
    values = np.concatenate([*(data[name] for name in names), np.ones(1)])
    values = values[np.isfinite(values) & (values > 0)]
    low, high = float(values.min()), float(values.max())
    pad = max((high / low) ** 0.04, 1.02)
    return low / pad, high * pad


def _dots(
    data: layout.FigurePoints,
    bounds: list[str],
    pairs: Sequence[tuple[str, float]],
    names: Sequence[str],
    devices: Sequence[str],
    settings: Sequence[str],
    line: float,
    width: float,
    interval: str,
    note: str,
) -> Figure:
    """Draw many candidates: a line of text per candidate and value, a dot per device."""
    looks = [Style(*mark, hollow=i % 2 == 1) for i, mark in enumerate(zip(COLORS * 2, "osD^vPXh*<>pd"))]
    handles = _dot_handles(devices, looks, bounds, interval)
    lines = layout.legend_lines(handles, width)
    down = -(-len(settings) // MOST_ACROSS)
    across = -(-len(settings) // down)
    room = (width - 0.058 * max(map(len, names))) / across  # per panel, inches
    titles = [layout.wrapped(s, room) for s in settings]
    above = 0.13 * max(t.count("\n") + 1 for t in titles)
    height = max(len(pairs) * line, 0.3) + 0.2 + above
    figure, panels, _ = layout.panel_list(len(settings), height, 0.42 + 0.14 * lines, across, sharex=True, sharey=True)
    low, high = _range(data, ["speedup", "lower", "upper", *bounds])
    slot = 0.8 / len(devices)
    size = float(np.clip(72 * line * slot * 0.75, 2.2, 3.4))
    shaded = list(dict.fromkeys(name for name, _ in pairs))[::2]
    for i, (ax, setting, title) in enumerate(zip(panels, settings, titles)):
        ax.set(xscale="log", xlim=(low, high), ylim=(len(pairs) - 0.5, -0.5))
        ax.set_title(title, pad=4)
        ax.grid(axis="y", visible=False)
        ax.tick_params(axis="y", length=0)
        ax.tick_params(axis="x", labelbottom=i + across >= len(settings))
        ax.spines["left"].set_visible(False)
        ax.axvline(1.0, color=INK, linewidth=0.7, zorder=1.5)
        for place, (name, _) in enumerate(pairs):
            if name in shaded:
                ax.axhspan(place - 0.5, place + 0.5, color="#F0F0F0", linewidth=0, zorder=0)
        for k, (name, style) in enumerate(zip(devices, looks)):
            own = np.flatnonzero((data["row"] == setting) & (data["column"] == name))
            y = np.array([pairs.index(p) for p in zip(data["candidate"][own], data["at"][own])], dtype=float)
            y += (k - 0.5 * (len(devices) - 1)) * slot
            for bound, color in zip(bounds, _BOUND_COLORS):
                ax.vlines(data[bound][own], y - 0.5 * slot, y + 0.5 * slot, color=color, linewidth=0.9, zorder=2)
            ax.hlines(y, data["lower"][own], data["upper"][own], color=style.color, linewidth=0.8, zorder=3)
            ax.plot(data["speedup"][own], y, **style.marks(linestyle="none", markersize=size, zorder=4))
        ax.set_yticks(range(len(pairs)), names)
        layout.log_axis(ax.xaxis, low, high, int(np.clip(room / 0.25, 2, 12)))
    layout.legend_below(figure, handles, lines, f"speedup (log scale){note and f'; {note}'}")
    return layout.laid_out(figure)


def _line(pairs: Sequence[tuple[str, float]], i: int, axis: str) -> str:
    """Return the text of a line: the value, on the first line of a candidate after its name."""
    name, value = pairs[i]
    named = "" if i and pairs[i - 1][0] == name else f"{label(name)}  "
    return f"{named}{value_text(axis, value)}"


def _dot_handles(devices: Sequence[str], looks: Sequence[Style], bounds: list[str], interval: str) -> list[Any]:
    from matplotlib.lines import Line2D

    tick: dict[str, Any] = {"marker": "|", "linestyle": "none", "markersize": 6, "markeredgewidth": 1.1}
    dots = [Line2D([], [], **style.marks(linestyle="none"), label=name) for name, style in zip(devices, looks)]
    ticks = [Line2D([], [], color=color, **tick, label=name) for name, color in zip(bounds, _BOUND_COLORS)]
    return [*dots, Line2D([], [], color=INK, linewidth=0.8, label=interval), *ticks]


def _curves(
    data: layout.FigurePoints,
    bounds: list[str],
    styles: Mapping[str, Style],
    axis: str,
    width: float,
    interval: str,
    x_label: str,
) -> Figure:
    """Draw few candidates as curves with bands and rings, very few with bounds, many as curves only."""
    few = len(styles) <= MOST_CURVES
    bounds = bounds if len(styles) <= MOST_BOUNDED else []
    rings = few and any(
        pays_from(data["at"][own], data["lower"][own]) is not None
        for r, c, name in set(zip(data["row"], data["column"], data["candidate"]))
        if len(own := _own(data, r, c, name)) > 1
    )
    handles = _curve_handles(styles, bounds, interval if few else "", rings)
    lines = layout.legend_lines(handles, width)
    low, high = _range(data, ["speedup", "lower", "upper", *bounds] if few else ["speedup"])
    around_in = 0.5 + 0.14 * lines
    room = (PAGE_HEIGHT_IN - around_in) / len(set(data["row"]))
    figure, panels = _panels(data, float(np.clip(room, 0.7, 1.6)), around_in, width)
    for (r, c), ax in panels.items():
        ax.set(yscale="log", ylim=(low, high))
        ax.axhline(1.0, color=INK, linewidth=0.7, zorder=1.5)
        for name, style in styles.items():
            own = _own(data, r, c, name)
            x, speedup, lower, upper = (data[column][own] for column in ("at", "speedup", "lower", "upper"))
            if few:
                band: dict[str, Any] = {"color": style.color, "alpha": 0.16, "linewidth": 0, "zorder": 2}
                ax.fill_between(x, lower, upper, **band)
                for bound, line in zip(bounds, _BOUND_LINES):
                    ax.plot(x, data[bound][own], color=style.color, linestyle=line, linewidth=0.8, zorder=2.5)
                if len(own) == 1:  # neither a band nor a line
                    ax.vlines(x, lower, upper, color=style.color, alpha=0.5, linewidth=1.5)
                    for bound in bounds:
                        ax.scatter(x, data[bound][own], color=style.color, marker="_", s=36, zorder=2.5)
                elif (first := pays_from(x, lower)) is not None:
                    ax.plot(x[[first]], speedup[[first]], **_RING, markeredgecolor=style.color, zorder=4.5)
            ax.plot(x, speedup, **style.marks(), zorder=4)
        layout.log_axis(ax.yaxis, low, high, 7)
    across = len({c for _, c in panels})
    _value_axes(panels, np.unique(data["at"]).astype(float), axis, (width - 0.6) / across)
    layout.legend_below(figure, handles, lines, x_label)
    return layout.laid_out(figure, "speedup (log scale)")


_RING: dict[str, Any] = {"marker": "o", "markersize": 7.5, "markerfacecolor": "none", "linestyle": "none"}


def _value_axes(panels: layout.Panels, values: NDArray[np.float64], axis: str, room_in: float) -> None:
    """Put ticks at the values of the x axes, as many as there is room for: in per cent, or on a logarithmic axis."""
    low, high = float(values[0]), float(values[-1])
    most = max(2, int(room_in / 0.26))
    ticks = values[:: -(-len(values) // most)]
    for ax in panels.values():
        if axis == "sparsity":
            margin = max(0.06 * (high - low), 0.01)
            ax.set_xlim(low - margin, high + margin)
        else:
            ax.set_xscale("log", base=2)
            margin = max(high / low, 2.0) ** 0.05
            ax.set_xlim(low / margin, high * margin)
        layout.fixed_ticks(ax.xaxis, ticks.tolist(), lambda value, _: _tick(axis, value))


def _tick(axis: str, value: float) -> str:
    return f"{100 * value:.4g}" if axis == "sparsity" else layout.short(int(value)) if axis == "seq" else f"{value:.0f}"


def _curve_handles(styles: Mapping[str, Style], bounds: list[str], interval: str, rings: bool) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Line2D([], [], **style.marks(), label=label(name)) for name, style in styles.items()]
    for name, line in zip(bounds, _BOUND_LINES):
        handles.append(Line2D([], [], color=INK, linestyle=line, linewidth=0.8, label=name))
    if interval:
        handles.append(Patch(color=INK, alpha=0.16, linewidth=0, label=interval))
    return [*handles, Line2D([], [], **_RING, markeredgecolor=INK, label=PAYS)] if rings else handles
