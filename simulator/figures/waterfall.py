"""Draw the loss waterfall: from the nominal to the predicted speedup, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simulator.arrays import FloatArray
from simulator.figures import layout
from simulator.figures.style import BLUE, GREEN, INK, VERMILLION, Look, paper_style
from simulator.prediction.explain import Explanation

NEGLIGIBLE = 0.0005  # a factor this close to 1 has no effect: its step has a line but no bar
FOLDED = 0.01  # factors this close to 1 are folded into one step

# with a hatch, because gains and losses must differ in grey print
GAIN: Look = {
    "facecolor": "white",
    "edgecolor": GREEN,
    "hatch": "//////",
    "linewidth": 0.6,
    "zorder": 2,
}
LOSS: Look = {"color": VERMILLION, "linewidth": 0.6, "zorder": 2}


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
    titles, columns = layout.titled(found)
    return waterfall_figure(
        [steps_of(e, title) for e, title in zip(found, titles)], columns=columns
    )


def waterfall_figure(panels: Sequence[Steps], *, columns: int | None = None) -> Figure:
    """Draw waterfalls with the same steps in rows of ``columns`` panels, each row
    :func:`folded`."""
    columns = layout.in_a_row(len(panels), columns)
    rows = [folded(panels[i : i + columns]) for i in range(0, len(panels), columns)]
    panels = [p for row in rows for p in row]
    values = [[1.0], *([p.lower, p.upper, *p.reached] for p in panels)]
    limits = layout.padded(*values, after=0.34)  # room for the factors next to the bars
    lines = [len(row[0].names) + 2 for row in rows]
    with paper_style():
        figure, axes = layout.panel_list(
            len(panels),
            0.155 * sum(lines) / len(lines) + 0.24,
            0.18,
            columns,
            titles=[p.title for p in panels],
            beside_in=1.3,
            x_label="speedup (log scale)",
            fixed=True,
            height_ratios=lines,
        )
        for i, (ax, panel) in enumerate(zip(axes, panels)):
            layout.log_axis(ax, "x", 6, limits)
            _draw(ax, panel)
            ax.tick_params(labelleft=i % columns == 0)
        return layout.laid_out(figure)


def _draw(ax: Axes, panel: Steps) -> None:
    reached, last = panel.reached, len(panel.names) + 1
    predicted = float(reached[-1])
    ax.set(ylim=(last + 0.6, -0.6))
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.axvline(1.0, color=INK, linewidth=0.7, zorder=1.5)
    line: Look = {"color": "#777777", "linewidth": 0.5, "zorder": 1.8}
    ax.vlines(reached, np.arange(last) + 0.33, np.arange(last) + 0.67, **line)  # connect the bars
    ends = np.array([panel.nominal, predicted])
    ax.barh([0, last], ends - 1.0, left=1.0, height=0.66, color=["#C8C8C8", BLUE], zorder=2)
    _write(ax, max(panel.nominal, 1.0), 0, f"{panel.nominal:.2f}×")
    for i, factor in enumerate(panel.factors, start=1):
        before, after = reached[i - 1], reached[i]
        if abs(factor - 1.0) <= NEGLIGIBLE:
            ax.vlines(after, i - 0.33, i + 0.33, **line)
            continue
        ax.barh(i, after - before, left=before, height=0.66, **(GAIN if factor > 1.0 else LOSS))
        if abs(factor - 1.0) >= 0.005:
            _write(ax, max(after, before), i, f"×{factor:.2f}")
    interval = [panel.lower], [panel.upper]
    layout.with_intervals(ax, [predicted], [last], interval, across=True, color="black", marker="|")
    _write(ax, max(panel.upper, predicted, 1.0), last, f"{predicted:.2f}×")
    ax.set_yticks(range(last + 1), ["nominal", *panel.names, "predicted"])


def _write(ax: Axes, x: float, y: float, text: str) -> None:
    # keeps the number clear of the line at 1
    paper: Look = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    place: Look = {"xytext": (2.5, 0), "textcoords": "offset points", "va": "center"}
    ax.annotate(text, (x, y), annotation_clip=False, bbox=paper, zorder=5, **place)
