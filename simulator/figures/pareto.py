"""Acceleration against quality: small multiples with the frontier as a staircase and a strip that names the fastest family by budget.

Every point is drawn; those on the frontier are full, those that another point beats are faint. A strip below each panel shows which
family is the fastest within each quality budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simulator.figures.axes import legend_below, log_axis
from simulator.figures.grid import middle, name_panels, panel_grid, same_length
from simulator.figures.style import BLACK, PAGE_IN, in_order, label, look, paper_style
from simulator.predict.pareto import frontier

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

F = NDArray[np.float64]

LINEAR_UP_TO = 0.6
"""Losses up to this are drawn on a linear axis; a perplexity can rise by several times, and is then drawn on a logarithmic one."""

STRIP_IN = 0.075
"""Height of the strip of fastest families, inches."""


def pareto_figure(
    row: Sequence[str],
    column: Sequence[str],
    family: Sequence[str],
    method: Sequence[str],
    loss: ArrayLike,
    speedup: ArrayLike,
    lower: ArrayLike,
    upper: ArrayLike,
    *,
    axis: str,
    protocol: str = "",
    interval: str = "90 % interval",
    width_in: float = PAGE_IN,
) -> Figure:
    """Speedup against quality loss with its frontier.

    Parameters
    ----------
    row, column, family, method : sequence of str, one entry a point
        Labels of the setting and the device (panels, in the order of their first occurrence), family and method.
    loss : array
        Relative loss of quality, a fraction; all on one metric under one protocol.
    speedup, lower, upper : array, > 0
        Speedup and its interval.
    axis, protocol : str
        Metric and protocol of the loss.
    interval : str
        What the bars are.
    width_in : float
        Width of the figure in inches.

    Returns
    -------
    Figure

    Raises
    ------
    InputError
        When there are no points or the arrays differ in length.

    Examples
    --------
    >>> where = ["prefill"] * 2, ["h100"] * 2
    >>> figure = pareto_figure(*where, ["depth", "width"], ["a", "b"], [0.1, 0.2], [1.1, 1.3], [1, 1.2], [1.2, 1.4], axis="ppl")
    >>> len(figure.axes)
    2
    """
    labels = {
        k: np.asarray(v, dtype=object)
        for k, v in (("row", row), ("column", column), ("family", family), ("method", method))
    }
    numbers = {
        k: np.asarray(v, dtype=float)
        for k, v in (("loss", loss), ("speedup", speedup), ("lower", lower), ("upper", upper))
    }
    data: dict[str, NDArray[Any]] = {**labels, **numbers}
    same_length("points of the figure", data)
    with paper_style():
        return _draw(data, axis, protocol, interval, width_in)


def _draw(data: dict[str, NDArray[Any]], axis: str, protocol: str, interval: str, width: float) -> Figure:
    rows = list(dict.fromkeys(data["row"]))
    handles = _handles(in_order(data["family"]), interval)
    across = min(_most_across(handles, width), len(handles))
    lines = -(-len(handles) // across)
    room: dict[str, Any] = {"left_in": 0.46, "right_in": 0.26 if len(rows) > 1 else 0.14, "gap_in": (0.12, 0.3)}
    figure, panels = panel_grid(data["row"], data["column"], width, 1.7, bottom_in=0.7 + 0.14 * lines, **room)
    height = figure.get_figheight()
    low, high = float(min(1.0, data["lower"].min())), float(max(1.05, data["upper"].max()))
    pad = (high / low) ** 0.05
    for (r, c), ax in panels.items():
        box, chosen = ax.get_position(), (data["row"] == r) & (data["column"] == c)
        strip = figure.add_axes((box.x0, box.y0 - STRIP_IN / height, box.width, STRIP_IN / height), sharex=ax)
        ax.set_yscale("log")
        ax.set_ylim(low / pad, high * pad)
        _loss_axis(ax, strip, data["loss"])
        _panel(ax, strip, {k: v[chosen] for k, v in data.items()})
        log_axis(ax.yaxis, low / pad, high * pad, 7)
        ax.tick_params(labelleft=c == data["column"][0])
        strip.tick_params(labelbottom=r == rows[-1])
    name_panels(panels, {r: r for r in rows} if len(rows) > 1 else {}, offset=6)
    x, y = middle(panels)
    figure.supylabel("speedup (log scale)", x=0.06 / width, y=y, fontsize=7, ha="left")
    figure.text(x, (0.32 + 0.14 * lines) / height, f"quality loss (%): {axis}", ha="center", va="bottom", fontsize=7)
    if protocol:
        figure.text(x, (0.19 + 0.14 * lines) / height, protocol, ha="center", va="bottom", fontsize=6, color="#5A5A5A")
    legend_below(figure, handles, across, 0.06)
    return figure


def _loss_axis(ax: Axes, strip: Axes, loss: F) -> None:
    """A linear axis in percent, or a logarithmic one beyond 10 % where losses are large; below the strip, not between it and the panel."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    first, last = 100 * min(0.0, float(loss.min())), 100 * max(0.05, float(loss.max()))
    if last > 100 * LINEAR_UP_TO:
        ax.set_xscale("symlog", linthresh=10.0, linscale=0.5)
        ax.set_xlim(first - 1.0 if first < 0 else 0.0, last * 1.25)
        # none so near the end that its label would run into the next panel
        ticks = [t for t in (0, 10, 30, 100, 300, 1000, 3000, 10_000, 100_000, 1_000_000) if t <= last * 0.75]
        strip.xaxis.set_major_locator(FixedLocator(ticks))
        strip.xaxis.set_minor_locator(NullLocator())
        strip.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    else:
        ax.set_xlim(first - 0.03 * last if first < 0 else 0.0, last * 1.08)
    ax.tick_params(axis="x", labelbottom=False, length=0)
    ax.spines["bottom"].set_visible(False)
    strip.set_ylim(0, 1)
    strip.set_yticks([])
    strip.grid(visible=False)
    strip.spines["left"].set_visible(False)


def _panel(ax: Axes, strip: Axes, data: dict[str, NDArray[Any]]) -> None:
    x, y = 100 * data["loss"].astype(float), data["speedup"].astype(float)
    optimal = frontier([0.0, *x], [1.0, *y])[1:] if len(x) else np.zeros(0, dtype=bool)
    ax.axhline(1.0, color="#444444", linewidth=0.7, zorder=1.5)
    order = [i for i in np.lexsort((-y, x)) if optimal[i]]
    end = ax.get_xlim()[1]
    steps_x, steps_y = [ax.get_xlim()[0], *(max(x[i], 0.0) for i in order), end], [1.0, *(y[i] for i in order)]
    ax.step(steps_x, [*steps_y, steps_y[-1]], where="post", color="#444444", linewidth=0.9, zorder=2)
    for i, name in enumerate(in_order(data["family"])):
        style = look(name, i)
        for point in np.flatnonzero(data["family"] == name):
            alpha, size = (1.0, 4.2) if optimal[point] else (0.35, 3.2)
            ends = [data["lower"][point], data["upper"][point]]
            ax.plot([x[point]] * 2, ends, color=style.color, linewidth=0.9, alpha=0.8 * alpha, zorder=3)
            ax.plot(
                [x[point]], [y[point]], **{**style.marks(), "linestyle": "none"}, alpha=alpha, markersize=size, zorder=4
            )
    for position, (i, stop) in enumerate(zip(order, [*(x[k] for k in order[1:]), end])):
        style = look(data["family"][i], position)
        strip.axvspan(max(x[i], 0.0), stop, color=style.color, alpha=0.7 if style.hollow else 0.9, linewidth=0)
        _name(ax, x[i], y[i], str(data["method"][i]), stop)


def _name(ax: Axes, x: float, y: float, text: str, stop: float) -> None:
    """The method beside its point, on the step that it opens, where that step is long enough; else the point stays without a name."""
    start, end = ax.transData.transform([(x, y), (stop, y)])[:, 0]
    room = abs(end - start) * 72.0 / ax.get_figure().dpi  # type: ignore[union-attr]
    if room > 3.1 * len(text) + 11:  # what stands before the name, and half the marker of the next point
        box = {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.3}
        ax.annotate(
            text,
            (x, y),
            xytext=(4, 2.2),
            textcoords="offset points",
            fontsize=5.5,
            color=BLACK,
            va="bottom",
            zorder=5,
            bbox=box,
        )


def _handles(families: list[str], interval: str) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    marks = [
        Line2D([], [], **{**look(n, i).marks(), "linestyle": "none"}, label=label(n)) for i, n in enumerate(families)
    ]
    return [
        *marks,
        Line2D([], [], color="#444444", linewidth=0.9, label="frontier"),
        Line2D(
            [], [], color="#444444", marker="|", markersize=6, markeredgewidth=0.9, linestyle="none", label=interval
        ),
        Patch(color="#B8B8B8", linewidth=0, label="strip: fastest family"),
    ]


def _most_across(handles: list[Any], width: float) -> int:
    """Columns of the legend: as many as the widest label leaves room for, all of equal width."""
    longest = max(len(str(h.get_label())) for h in handles)
    return max(1, int(width // (0.052 * longest + 0.45)))
