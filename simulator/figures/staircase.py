"""Draw staircases: the time of a GEMM rises in steps of tiles and waves, predicted and measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from simulator.figures.layout import laid_out, panel_grid
from simulator.figures.style import BLUE, COLUMN_IN, PAGE_IN, PALE_INK, VERMILLION, paper_style

_IDEAL: dict[str, Any] = {"color": PALE_INK, "linestyle": (0, (4, 1.5)), "linewidth": 0.8}
_HIGHEST: dict[str, Any] = {**_IDEAL, "linestyle": (0, (1, 1))}
_BAND: dict[str, Any] = {"color": BLUE, "alpha": 0.18, "linewidth": 0}
_POINT: dict[str, Any] = {"color": VERMILLION, "marker": "o", "markersize": 2.4, "linestyle": "none"}
_POINT |= {"markerfacecolor": "none", "markeredgewidth": 0.6}


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
    where = {"row": [p.row for p in panels], "column": [p.column for p in panels]}
    width = COLUMN_IN if len(set(where["column"])) == 1 else PAGE_IN
    with paper_style():
        handles: list[Any] = [
            Line2D([], [], color=BLUE, linewidth=1.0, label="predicted"),
            Patch(**_BAND, label=interval),
            Line2D([], [], **_IDEAL, label="datasheet roofline"),
        ]
        if any(np.size(p.highest) for p in panels):
            handles.append(Line2D([], [], **_HIGHEST, label="at the highest clock"))
        if any(np.size(p.measured) for p in panels):
            handles.append(Line2D([], [], **_POINT, label="measured"))
        figure, axes = panel_grid(where, 1.6, 0.24, width_in=width, handles=handles)
        for p in panels:
            ax = axes[p.row, p.column]
            _draw(ax, p)
            ax.set_xlabel(p.x_label, labelpad=2)
            ax.set_ylabel(p.y_label if p.column == panels[0].column else "")
        figure.align_ylabels()
        return laid_out(figure)


def _draw(ax: Axes, p: Stairs) -> None:
    x = np.asarray(p.x, dtype=float)
    predicted, lower, upper, ideal = (np.asarray(v, dtype=float) for v in (p.predicted, p.lower, p.upper, p.ideal))
    seen_x, seen = np.asarray(p.measured_x, dtype=float), np.asarray(p.measured, dtype=float)
    top = max(float(np.max(v)) for v in (upper, ideal, p.highest, seen) if np.size(v)) * 1.05
    ax.fill_between(x, lower, upper, **_BAND, zorder=2)
    ax.plot(x, ideal, **_IDEAL, zorder=2.5)
    if np.size(p.highest):
        ax.plot(x, np.asarray(p.highest, dtype=float), **_HIGHEST, zorder=2.5)
    ax.plot(x, predicted, color=BLUE, linewidth=0.9, zorder=3)
    if len(seen):
        ax.plot(seen_x, seen, **_POINT, zorder=4)
    ax.set(xlim=(min(0.0, float(x[0])) if x[0] < 0.1 * x[-1] else float(x[0]), float(x[-1]) * 1.02), ylim=(0.0, top))
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 2.5, 4, 5, 10]))
    ax.yaxis.set_major_locator(MaxNLocator(4))
    if p.note:
        where: dict[str, Any] = {"transform": ax.transAxes, "ha": "right", "va": "bottom", "zorder": 5}
        ax.text(0.97, 0.05, p.note, fontsize=6, color=PALE_INK, **where)
