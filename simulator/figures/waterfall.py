"""Draw the loss waterfall: from the nominal to the predicted speedup, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError
from simulator.figures.layout import laid_out, log_axis, panel_list
from simulator.figures.style import BLUE, GREEN, INK, VERMILLION, paper_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NEGLIGIBLE = 0.0005
"""A factor this close to 1 has no effect: its step has a line but no bar."""


@dataclass(frozen=True)
class Steps:
    """One waterfall: a panel."""

    title: str
    names: Sequence[str]  # steps after the nominal speedup
    factors: Sequence[float]  # factor of each step, > 0
    nominal: float  # 1 / (1 - sparsity)
    lower: float  # interval of the predicted speedup
    upper: float

    @property
    def reached(self) -> NDArray[np.float64]:
        """Speedup before the first step and after each."""
        return np.asarray(self.nominal * np.cumprod([1.0, *self.factors]))


def waterfall_figure(panels: Sequence[Steps], *, columns: int | None = None, width_in: float | None = None) -> Figure:
    """Draw waterfalls side by side, steps on common lines.

    ``columns`` is the number of panels per row, by default at most three; the figure is one column wide for one panel,
    else a page. InputError if there are no panels or their names of steps differ.

    >>> figure = waterfall_figure([Steps("h100", ["parts not pruned", "alignment"], [0.9, 0.95], 1.333, 1.1, 1.2)])
    >>> [t.get_text() for t in figure.axes[0].get_yticklabels()]
    ['nominal', 'parts not pruned', 'alignment', 'predicted']
    """
    if not panels or any(list(p.names) != list(panels[0].names) for p in panels):
        raise InputError("waterfalls: expected one panel or more, all with the same steps")
    with paper_style():
        titles = max(p.title.count("\n") + 1 for p in panels)
        panel_in = 0.155 * (len(panels[0].names) + 2) + 0.24 + 0.13 * titles
        figure, axes, columns = panel_list(len(panels), panel_in, 0.18, columns, width_in)
        low, high = common_range(panels, 0.34)
        for i, (ax, panel) in enumerate(zip(axes, panels)):
            _draw(ax, panel, low, high)
            ax.tick_params(labelleft=i % columns == 0)
            if i + columns >= len(panels):
                ax.set_xlabel("speedup (log scale)")
        return laid_out(figure)


def common_range(panels: Sequence[Steps], room: float) -> tuple[float, float]:
    """Return the range of all bars and intervals, with ``room`` (a share of it) for the factor next to each bar."""
    values = np.concatenate([[1.0], *([p.lower, p.upper, *p.reached] for p in panels)])
    low, high = float(values.min()), float(values.max())
    span = max(high / low, 1.1)
    return low / span**0.08, high * span**room


def _draw(ax: Axes, panel: Steps, low: float, high: float) -> None:
    count, reached = len(panel.names), panel.reached
    last, predicted = count + 1, float(reached[-1])
    ax.set(xscale="log", xlim=(low, high), ylim=(last + 0.6, -0.6))
    ax.set_title(panel.title, pad=4)
    log_axis(ax.xaxis, low, high, 6)
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.axvline(1.0, color=INK, linewidth=0.7, zorder=1.5)
    places = np.arange(count + 1)
    ax.vlines(reached, places + 0.33, places + 0.67, color="#777777", linewidth=0.5, zorder=1.8)  # from bar to bar
    ax.barh([0, last], [panel.nominal - 1.0, predicted - 1.0], left=1.0, height=0.66, color=["#C8C8C8", BLUE], zorder=2)
    _write(ax, max(panel.nominal, 1.0), 0, f"{panel.nominal:.2f}×")
    for i, factor in enumerate(panel.factors, start=1):
        before, after = float(reached[i - 1]), float(reached[i])
        if abs(factor - 1.0) <= NEGLIGIBLE:
            ax.vlines(after, i - 0.33, i + 0.33, color="#777777", linewidth=0.5, zorder=1.8)
            continue
        # with a hatch, because gains and losses must differ in grey print
        style: dict[str, Any] = {"facecolor": VERMILLION, "edgecolor": VERMILLION}
        if factor > 1.0:
            style = {"facecolor": "white", "edgecolor": GREEN, "hatch": "//////"}
        ax.barh(i, after - before, left=before, height=0.66, linewidth=0.6, zorder=2, **style)
        if abs(factor - 1.0) >= 0.005:
            _write(ax, max(after, before), i, f"×{factor:.2f}")
    half = [[max(predicted - panel.lower, 0.0)], [max(panel.upper - predicted, 0.0)]]
    ax.errorbar(predicted, last, xerr=half, color="black", elinewidth=0.9, capsize=2, capthick=0.9, zorder=3)
    _write(ax, max(panel.upper, predicted, 1.0), last, f"{predicted:.2f}×")
    ax.set_yticks(range(count + 2), ["nominal", *panel.names, "predicted"])


def _write(ax: Axes, x: float, y: float, text: str) -> None:
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # keeps the number clear of the line at 1
    where: dict[str, Any] = {"xytext": (2.5, 0), "textcoords": "offset points", "va": "center", "ha": "left"}
    ax.annotate(text, (x, y), fontsize=6, zorder=5, annotation_clip=False, bbox=paper, **where)
