"""Speedup against sparsity: small multiples, a row for each setting, a column for each device.

A few families are drawn as curves with interval bands and bounds. Eleven curves with their bands would hide each other, so many
families become a dot plot: a line of text for each family (no legend to look up), within it one dot for each sparsity from top to
bottom, with its interval and bounds. A single sparsity makes no curve and becomes dots too.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simulator.figures.axes import legend_below, log_axis
from simulator.figures.grid import Panels, middle, name_panels, panel_grid, same_length
from simulator.figures.style import BLACK, GREY, PAGE_IN, in_order, label, look, paper_style

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
_BOUND_COLORS = (GREY, BLACK, "#5A5A5A")


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

    Parameters
    ----------
    row, column, family : sequence of str, one entry a point
        Labels of the setting, the device and the family; panels and rows come in the order in which labels first occur.
    sparsity : array, in [0, 1)
    speedup, lower, upper : array, > 0
        Prediction and its interval.
    bounds : mapping from name to array, optional
        Upper bounds of each point, such as ``{"roofline bound": ...}``; at most three.
    width_in : float
        Width of the figure in inches.
    interval : str
        What the bars or bands are.

    Returns
    -------
    Figure

    Raises
    ------
    InputError
        When there are no points or the arrays differ in length.

    Examples
    --------
    >>> figure = speedup_figure(["decode"] * 2, ["h100"] * 2, ["depth"] * 2, [0.1, 0.2], [1.1, 1.2], [1.0, 1.1], [1.2, 1.3])
    >>> len(figure.axes)
    1
    """
    limits = {name: np.asarray(values, dtype=float) for name, values in (bounds or {}).items()}
    data = {
        "row": np.asarray(row, dtype=object),
        "column": np.asarray(column, dtype=object),
        "family": np.asarray(family, dtype=object),
        **{
            k: np.asarray(v, dtype=float)
            for k, v in (("sparsity", sparsity), ("speedup", speedup), ("lower", lower), ("upper", upper))
        },
    }
    same_length("points of the figure", {**data, **limits})
    families = in_order(data["family"])
    with paper_style():
        fractions = len(np.unique(data["sparsity"]))
        if fractions == 1 or (len(families) > MOST_CURVES and fractions <= MOST_DOTS):
            return _dots(data, limits, families, width_in, interval)
        return _curves(data, limits, families, width_in, interval)


# -- frame ------------------------------------------------------------------------------------------------------------------------


def _frame(
    data: Mapping[str, NDArray[Any]], width: float, panel_height: float, left: float, bottom: float
) -> tuple[Figure, Panels]:
    """Panels with ticks on the outer ones, titles of columns above, titles of rows, wrapped to their height, on the right."""
    wrapped = {r: textwrap.fill(r, max(8, int(panel_height / 0.058))) for r in dict.fromkeys(data["row"])}
    right = 0.14 + 0.12 * max(r.count("\n") + 1 for r in wrapped.values())
    room: dict[str, Any] = {"left_in": left, "right_in": right, "bottom_in": bottom, "gap_in": (0.12, 0.16)}
    figure, panels = panel_grid(data["row"], data["column"], width, panel_height, **room)
    for (r, c), ax in panels.items():
        ax.tick_params(labelbottom=r == list(wrapped)[-1], labelleft=c == data["column"][0])
    name_panels(panels, wrapped, offset=6)
    return figure, panels


def _panel(data: Mapping[str, NDArray[Any]], r: str, c: str) -> NDArray[np.intp]:
    return np.flatnonzero((data["row"] == r) & (data["column"] == c))


def _of_family(data: Mapping[str, NDArray[Any]], rows: NDArray[np.intp], family: str) -> NDArray[np.intp]:
    """Points of one family in a panel by rising sparsity."""
    chosen = rows[data["family"][rows] == family]
    ordered: NDArray[np.intp] = chosen[np.argsort(data["sparsity"][chosen], kind="stable")]
    return ordered


def _range(data: Mapping[str, NDArray[Any]], limits: Mapping[str, F]) -> tuple[float, float]:
    """Range of all points, their intervals and bounds, widened a little; always holds 1."""
    values = np.concatenate([data[k] for k in ("speedup", "lower", "upper")] + list(limits.values()) + [np.ones(1)])
    values = values[np.isfinite(values) & (values > 0)]
    low, high = float(values.min()), float(values.max())
    pad = max((high / low) ** 0.04, 1.02)
    return low / pad, high * pad


# -- many families: dots ------------------------------------------------------------------------------------------------------------


def _dots(
    data: Mapping[str, NDArray[Any]], limits: Mapping[str, F], families: list[str], width: float, interval: str
) -> Figure:
    fractions = np.unique(data["sparsity"])
    spread = np.linspace(-0.29, 0.29, len(fractions)) if len(fractions) > 1 else np.zeros(1)
    sizes = np.linspace(2.2, 4.2, len(fractions)) if len(fractions) > 1 else np.array([3.4])
    low, high = _range(data, limits)
    settings = len(set(data["row"]))
    # a line of text and a row of dots for each sparsity; tighter where the figure would outgrow a page
    line = float(
        np.clip(
            (PAGE_HEIGHT_IN - 1.1 - 0.16 * settings) / (settings * len(families)),
            0.15,
            0.075 * max(len(fractions), 2) + 0.02,
        )
    )
    sizes = np.minimum(sizes, 72 * line * 0.8 / max(len(fractions), 2))
    figure, axes = _frame(data, width, max(len(families) * line, 0.75), left=1.16, bottom=0.72)
    for (r, c), ax in axes.items():
        rows = _panel(data, r, c)
        ax.set_xscale("log")
        ax.set(xlim=(low, high), ylim=(len(families) - 0.5, -0.5))
        ax.grid(axis="y", visible=False)
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        for i in range(0, len(families), 2):
            ax.axhspan(i - 0.5, i + 0.5, color="#F5F5F5", linewidth=0, zorder=0)
        ax.axvline(1.0, color="#444444", linewidth=0.7, zorder=1.5)
        for i, name in enumerate(families):
            style = look(name, i)
            for point in _of_family(data, rows, name):
                j = int(np.searchsorted(fractions, data["sparsity"][point]))
                y = i + spread[j]
                for b, values in enumerate(limits.values()):
                    half = 0.42 * (spread[1] - spread[0]) if len(spread) > 1 else 0.25
                    ax.plot(
                        [values[point]] * 2,
                        [y - half, y + half],
                        color=_BOUND_COLORS[b],
                        linewidth=0.9,
                        zorder=5,
                        solid_capstyle="butt",
                    )
                ax.plot(
                    [data["lower"][point], data["upper"][point]],
                    [y, y],
                    color=style.color,
                    linewidth=1.0,
                    zorder=3,
                    solid_capstyle="butt",
                )
                ax.plot(
                    [data["speedup"][point]],
                    [y],
                    **{**style.marks(), "linestyle": "none"},
                    markersize=sizes[j],
                    zorder=4,
                )
        ax.set_yticks(range(len(families)), [label(name) for name in families])
        log_axis(ax.xaxis, low, high, int(np.clip(ax.get_position().width * width / 0.29, 2, 12)))
    figure.supxlabel("speedup (log scale)", y=0.33 / figure.get_figheight(), x=middle(axes)[0], fontsize=7, va="bottom")
    legend_below(figure, _dot_handles(fractions, sizes, limits, interval), len(fractions) + 1 + len(limits), 0.08)
    return figure


def _dot_handles(fractions: F, sizes: F, limits: Mapping[str, F], interval: str) -> list[Any]:
    from matplotlib.lines import Line2D

    dots = [
        Line2D(
            [],
            [],
            color="#444444",
            marker="o",
            linestyle="none",
            markersize=s,
            label=f"{100 * f:.4g} % removed" if i == 0 else f"{100 * f:.4g} %",
        )
        for i, (f, s) in enumerate(zip(fractions, sizes))
    ]
    ticks = [
        Line2D(
            [], [], color=_BOUND_COLORS[b], marker="|", linestyle="none", markersize=6, markeredgewidth=1.1, label=name
        )
        for b, name in enumerate(limits)
    ]
    return [*dots, Line2D([], [], color="#444444", linewidth=1.0, label=interval), *ticks]


# -- few families: curves -----------------------------------------------------------------------------------------------------------


def _curves(
    data: Mapping[str, NDArray[Any]], limits: Mapping[str, F], families: list[str], width: float, interval: str
) -> Figure:
    few = len(families) <= MOST_CURVES
    shown = limits if few else {}
    legend_columns = min(4 if width > 5 else 2, len(families) + len(shown) + few)
    lines = -(-(len(families) + len(shown) + few) // legend_columns)
    low, high = _range(data, shown) if few else _range({k: data["speedup"] for k in ("speedup", "lower", "upper")}, {})
    figure, axes = _frame(data, width, 1.45, left=0.46, bottom=0.48 + 0.14 * lines)
    fractions = np.unique(data["sparsity"])
    start, end = float(fractions[0]), float(fractions[-1])
    margin = 0.06 * (end - start)
    for (r, c), ax in axes.items():
        rows = _panel(data, r, c)
        ax.set_yscale("log")
        ax.set(xlim=(100 * (start - margin), 100 * (end + margin)), ylim=(low, high))
        ax.axhline(1.0, color="#444444", linewidth=0.7, zorder=1.5)
        for i, name in enumerate(families):
            chosen, style = _of_family(data, rows, name), look(name, i)
            x = 100 * data["sparsity"][chosen]
            if few:
                if len(chosen) == 1:
                    ax.plot(
                        [x[0]] * 2,
                        [data["lower"][chosen[0]], data["upper"][chosen[0]]],
                        color=style.color,
                        alpha=0.5,
                        linewidth=1.5,
                    )
                ax.fill_between(
                    x,
                    data["lower"][chosen],
                    data["upper"][chosen],
                    color=style.color,
                    alpha=0.16,
                    linewidth=0,
                    zorder=2,
                )
                for b, values in enumerate(shown.values()):
                    if len(chosen) == 1:
                        ax.plot(
                            x, values[chosen], color=style.color, marker="_", markersize=6, linestyle="none", zorder=2.5
                        )
                    ax.plot(x, values[chosen], color=style.color, linestyle=_BOUND_LINES[b], linewidth=0.8, zorder=2.5)
            ax.plot(x, data["speedup"][chosen], **style.marks(), zorder=4)
        log_axis(ax.yaxis, low, high, 7)
        if len(fractions) <= 5:
            ax.set_xticks(100 * fractions, [f"{100 * f:.4g}" for f in fractions])
    across, up = middle(axes)
    figure.supylabel("speedup (log scale)", x=0.06 / width, y=up, fontsize=7, ha="left")
    figure.supxlabel("removed (%)", x=across, y=(0.16 + 0.14 * lines) / figure.get_figheight(), fontsize=7, va="bottom")
    legend_below(figure, _curve_handles(families, shown, interval if few else ""), legend_columns, 0.06)
    return figure


def _curve_handles(families: list[str], limits: Mapping[str, F], interval: str) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Line2D([], [], **look(name, i).marks(), label=label(name)) for i, name in enumerate(families)]
    handles += [
        Line2D([], [], color="#444444", linestyle=_BOUND_LINES[b], linewidth=0.8, label=name)
        for b, name in enumerate(limits)
    ]
    return [*handles, Patch(color="#444444", alpha=0.16, linewidth=0, label=interval)] if interval else handles
