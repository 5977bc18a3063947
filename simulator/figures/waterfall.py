"""Draw the loss waterfall: from the nominal to the predicted speedup, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simulator.arrays import FloatArray
from simulator.figures.layout import (
    in_a_row,
    laid_out,
    log_axis,
    panel_list,
    title_in,
    titled,
    width_of,
    wrapped,
)
from simulator.figures.style import BLUE, GREEN, INK, VERMILLION, Look, paper_style
from simulator.prediction.explain import Explanation

NEGLIGIBLE = 0.0005  # a factor this close to 1 has no effect: its step has a line but no bar
FOLDED = 0.01  # factors this close to 1 are folded into one step


@dataclass(frozen=True)
class Steps:
    title: str
    names: Sequence[str]  # steps after the nominal speedup
    factors: Sequence[float]  # factor of each step, > 0
    nominal: float  # 1 / (1 - sparsity)
    lower: float  # interval of the predicted speedup
    upper: float

    @property
    def reached(self) -> FloatArray:
        return np.asarray(self.nominal * np.cumprod([1.0, *self.factors]))


def folded(panels: Sequence[Steps]) -> list[Steps]:
    """Replace the steps whose factors are within :data:`FOLDED` of 1 in every panel by one step
    with the product of their factors, if there are two or more."""
    factors = np.array([p.factors for p in panels])
    small = np.asarray((np.abs(factors - 1.0) <= FOLDED).all(axis=0))
    if (count := int(small.sum())) < 2:
        return list(panels)
    names = [
        *(name for name, fold in zip(panels[0].names, small) if not fold),
        f"other ({count} steps)",
    ]
    products = np.concatenate(
        [factors[:, ~small], factors[:, small].prod(axis=1, keepdims=True)], axis=1
    )
    return [replace(p, names=names, factors=own) for p, own in zip(panels, products.tolist())]


def steps_of(e: Explanation, title: str) -> Steps:
    (nominal, *steps), r = e.steps, e.result
    names = [s.name for s in steps]
    factors = [s.factor for s in steps]
    return Steps(title, names, factors, nominal.speedup, r.speedup_lower, r.speedup_upper)


def waterfalls_of(found: Sequence[Explanation]) -> Figure:
    titles, columns = titled(found)
    return waterfall_figure(
        [steps_of(e, title) for e, title in zip(found, titles)], columns=columns
    )


def waterfall_figure(panels: Sequence[Steps], *, columns: int | None = None) -> Figure:
    """Draw waterfalls with the same steps in rows of ``columns`` panels, each row
    :func:`folded`."""
    columns = in_a_row(len(panels), columns)
    room_in = (width_of(columns) - 1.3) / columns  # next to the names of the steps
    panels = [replace(p, title=wrapped(p.title, room_in)) for p in panels]
    rows = [folded(panels[i : i + columns]) for i in range(0, len(panels), columns)]
    panels = [p for row in rows for p in row]
    with paper_style():
        lines = [len(row[0].names) + 2 for row in rows]
        panel_in = 0.155 * sum(lines) / len(lines) + 0.24 + title_in(p.title for p in panels)
        figure, axes, _ = panel_list(
            len(panels), panel_in, 0.18, columns, height_ratios=lines, least_in=panel_in
        )
        limits = _limits(panels)
        for i, ax in enumerate(axes):
            _draw(ax, panels[i], *limits)
            ax.tick_params(labelleft=i % columns == 0)
            if i + columns >= len(panels):
                ax.set_xlabel("speedup (log scale)")
        return laid_out(figure)


def _limits(panels: Sequence[Steps]) -> tuple[float, float]:
    """Return the ends of the axis, with room for the factors next to the bars."""
    values = np.concatenate([[1.0], *([p.lower, p.upper, *p.reached] for p in panels)])
    low = float(values.min())
    high = float(values.max())
    span = max(high / low, 1.1)
    return low / span**0.08, high * span**0.34


def _draw(ax: Axes, panel: Steps, low: float, high: float) -> None:
    count = len(panel.names)
    reached = panel.reached
    last = count + 1
    predicted = float(reached[-1])
    ax.set(xscale="log", xlim=(low, high), ylim=(last + 0.6, -0.6))
    ax.set_title(panel.title, pad=4)
    log_axis(ax.xaxis, low, high, 6)
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.axvline(1.0, color=INK, linewidth=0.7, zorder=1.5)
    places = np.arange(count + 1)
    line: Look = {"color": "#777777", "linewidth": 0.5, "zorder": 1.8}
    ax.vlines(reached, places + 0.33, places + 0.67, **line)  # lines that connect the bars
    ax.barh(
        [0, last],
        [panel.nominal - 1.0, predicted - 1.0],
        left=1.0,
        height=0.66,
        color=["#C8C8C8", BLUE],
        zorder=2,
    )
    _write(ax, max(panel.nominal, 1.0), 0, f"{panel.nominal:.2f}×")
    for i, factor in enumerate(panel.factors, start=1):
        before = float(reached[i - 1])
        after = float(reached[i])
        if abs(factor - 1.0) <= NEGLIGIBLE:
            ax.vlines(after, i - 0.33, i + 0.33, **line)
            continue
        # with a hatch, because gains and losses must differ in grey print
        style: Look = {"facecolor": VERMILLION, "edgecolor": VERMILLION}
        if factor > 1.0:
            style = {"facecolor": "white", "edgecolor": GREEN, "hatch": "//////"}
        ax.barh(i, after - before, left=before, height=0.66, linewidth=0.6, zorder=2, **style)
        if abs(factor - 1.0) >= 0.005:
            _write(ax, max(after, before), i, f"×{factor:.2f}")
    half = [[max(predicted - panel.lower, 0.0)], [max(panel.upper - predicted, 0.0)]]
    ax.errorbar(
        predicted, last, xerr=half, color="black", elinewidth=0.9, capsize=2, capthick=0.9, zorder=3
    )
    _write(ax, max(panel.upper, predicted, 1.0), last, f"{predicted:.2f}×")
    ax.set_yticks(range(count + 2), ["nominal", *panel.names, "predicted"])


def _write(ax: Axes, x: float, y: float, text: str) -> None:
    # keeps the number clear of the line at 1
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    ax.annotate(
        text,
        (x, y),
        zorder=5,
        annotation_clip=False,
        bbox=paper,
        xytext=(2.5, 0),
        textcoords="offset points",
        va="center",
        ha="left",
    )
