"""Draw staircases: the time of a GEMM rises in steps of tiles and waves, predicted and measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from simulator.figures.layout import laid_out, legend_below, legend_lines, name_panels, panel_grid
from simulator.figures.style import BLUE, COLUMN_IN, PAGE_IN, PALE_INK, VERMILLION, paper_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Stairs:
    """One panel."""

    row: str  # kind of staircase
    column: str  # the device
    x_label: str
    y_label: str
    x: ArrayLike  # sizes; the next four are as long
    predicted: ArrayLike
    lower: ArrayLike
    upper: ArrayLike
    ideal: ArrayLike  # the datasheet roofline
    measured_x: ArrayLike = ()
    measured: ArrayLike = ()
    highest: ArrayLike = ()  # the roofline at the highest clock, if above the datasheet's
    note: str = ""  # fixed sizes, written into the panel


def staircase_figure(panels: Sequence[Stairs], *, interval: str = "90 % interval") -> Figure:
    """Draw staircases, a column per device and a row per kind, in the order in which their labels first occur."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    rows, columns = [p.row for p in panels], [p.column for p in panels]
    width = COLUMN_IN if len(set(columns)) == 1 else PAGE_IN
    with paper_style():
        handles: list[Any] = [
            Line2D([], [], color=BLUE, linewidth=1.0, label="predicted"),
            Patch(color=BLUE, alpha=0.18, linewidth=0, label=interval),
            Line2D([], [], color=PALE_INK, linestyle=_DASHES, linewidth=0.8, label="datasheet roofline"),
        ]
        if any(np.size(p.highest) for p in panels):
            handles.append(Line2D([], [], color=PALE_INK, linestyle=_DOTS, linewidth=0.8, label="at the highest clock"))
        if any(np.size(p.measured) for p in panels):
            handles.append(Line2D([], [], linestyle="none", **_POINT, label="measured"))
        lines = legend_lines(handles, width)
        figure, axes = panel_grid(rows, columns, 1.6, 0.24 + 0.14 * lines, width)
        for p in panels:
            ax = axes[p.row, p.column]
            _draw(ax, p)
            ax.set_xlabel(p.x_label, labelpad=2)
            ax.set_ylabel(p.y_label if p.column == columns[0] else "")
        name_panels(axes, {r: r for r in rows})
        figure.align_ylabels()
        legend_below(figure, handles, lines)
        return laid_out(figure)


_DASHES, _DOTS = (0, (4, 1.5)), (0, (1, 1))
_POINT: dict[str, Any] = {"color": VERMILLION, "marker": "o", "markersize": 2.4}
_POINT |= {"markerfacecolor": "none", "markeredgewidth": 0.6}


def _draw(ax: Axes, p: Stairs) -> None:
    from matplotlib.ticker import MaxNLocator

    x = np.asarray(p.x, dtype=float)
    predicted, lower, upper, ideal = (np.asarray(v, dtype=float) for v in (p.predicted, p.lower, p.upper, p.ideal))
    seen_x, seen = np.asarray(p.measured_x, dtype=float), np.asarray(p.measured, dtype=float)
    top = max(float(np.max(v)) for v in (upper, ideal, p.highest, seen) if np.size(v)) * 1.05
    ax.fill_between(x, lower, upper, color=BLUE, alpha=0.18, linewidth=0, zorder=2)
    ax.plot(x, ideal, color=PALE_INK, linestyle=_DASHES, linewidth=0.8, zorder=2.5)
    if np.size(p.highest):
        ax.plot(x, np.asarray(p.highest, dtype=float), color=PALE_INK, linestyle=_DOTS, linewidth=0.8, zorder=2.5)
    ax.plot(x, predicted, color=BLUE, linewidth=0.9, zorder=3)
    if len(seen):
        ax.plot(seen_x, seen, linestyle="none", **_POINT, zorder=4)
    ax.set(xlim=(min(0.0, float(x[0])) if x[0] < 0.1 * x[-1] else float(x[0]), float(x[-1]) * 1.02), ylim=(0.0, top))
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 2.5, 4, 5, 10]))
    ax.yaxis.set_major_locator(MaxNLocator(4))
    if p.note:
        where: dict[str, Any] = {"transform": ax.transAxes, "ha": "right", "va": "bottom", "zorder": 5}
        ax.text(0.97, 0.05, p.note, fontsize=6, color=PALE_INK, **where)
