"""Predicted against measured speedups of a decoder that was really executed, a panel for each phase."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from calibration.execute.comparison import Row, by_phase
from simulator.errors import InputError
from simulator.figures.layout import in_a_row, log_axis
from simulator.figures.style import COLUMN_IN, PAGE_IN, in_order, label, look, paper_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BAND = 0.08
"""Relative error that the dashed lines mark."""


def compare_figure(rows: Sequence[Row], *, width_in: float | None = None) -> Figure:
    """Draw predicted against measured speedups.

    Parameters
    ----------
    rows : sequence of calibration.execute.comparison.Row
        Of one model on one device.
    width_in : float, optional
        Width of the figure in inches; one column for one phase, the page for more.

    Returns
    -------
    Figure
        Markers by family, large for the largest sparsity; bars are the predicted interval and the range of the measured rounds.

    Raises
    ------
    InputError
        When there is nothing to draw.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    if not rows:
        raise InputError("predicted against measured: expected one comparison or more")
    phases = list(dict.fromkeys(r.phase for r in rows))
    families = in_order(r.family for r in rows)
    with paper_style():
        columns = in_a_row(len(phases))
        width = width_in or (COLUMN_IN if columns == 1 else PAGE_IN)
        left, right, top, across = 0.46, 0.08, 0.24, 0.42
        per_row = 3 if columns == 1 else 6
        legend = 0.16 * -(-len(families) // per_row) + 0.08
        bottom = 0.36 + legend
        side = (width - left - right - (columns - 1) * across) / columns
        panel = min(side, 2.7)
        lines = -(-len(phases) // columns)
        height = top + bottom + lines * panel + (lines - 1) * (bottom - legend + top)
        figure = Figure(figsize=(width, height))
        numbers = by_phase(rows)
        for i, phase in enumerate(phases):
            r, c = divmod(i, columns)
            x0, y0 = left + c * (side + across), height - top - r * (panel + bottom - legend + top) - panel
            ax = figure.add_axes((x0 / width, y0 / height, side / width, panel / height))
            _panel(ax, [row for row in rows if row.phase == phase], families)
            ax.set_title(phase, pad=4)
            ax.set_xlabel("measured speedup", labelpad=2)
            ax.set_ylabel("predicted speedup" if c == 0 else "", labelpad=2)
            a = numbers[phase]
            agree = [f"{a.count} cases", f"median error {100 * a.median:.1f} %"]
            agree += [f"Spearman {a.spearman:.2f}"] if np.isfinite(a.spearman) else []
            ax.text(
                0.04,
                0.97,
                "\n".join(agree),
                transform=ax.transAxes,
                ha="left",
                va="top",
                fontsize=6,
                linespacing=1.25,
                zorder=6,
            )
        marks = [
            Line2D([], [], **{**look(f).marks(), "linestyle": "none"}, markersize=3.5, label=label(f)) for f in families
        ]
        figure.legend(handles=marks, loc="lower center", ncol=min(per_row, len(marks)), borderaxespad=0.3)
    return figure


def _panel(ax: Axes, rows: Sequence[Row], families: Sequence[str]) -> None:
    values = [
        v
        for r in rows
        for v in (r.measured, r.predicted, r.predicted_lower, r.predicted_upper, r.measured_lower, r.measured_upper)
    ]
    usable = [v for v in values if np.isfinite(v) and v > 0]
    low, high = min(0.95, min(usable)) / 1.04, max(1.05, *usable) * 1.04
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(low, high)
    ax.set_ylim(low, high)
    ends = np.array([low, high])
    ax.plot(ends, ends, color="black", linewidth=0.6, zorder=1)
    for edge in (1.0 - BAND, 1.0 + BAND):
        ax.plot(ends, ends * edge, color="#5A5A5A", linewidth=0.5, linestyle=(0, (3, 2)), zorder=1)
    most = max(r.sparsity for r in rows)
    for index, family in enumerate(families):
        marks = {**look(family, index).marks(), "linestyle": "none"}
        for r in (r for r in rows if r.family == family):
            bars = {"color": marks["color"], "linewidth": 0.4, "alpha": 0.55, "zorder": 2}
            ax.plot([r.measured, r.measured], [r.predicted_lower, r.predicted_upper], **bars)
            ax.plot([r.measured_lower, r.measured_upper], [r.predicted, r.predicted], **bars)
            ax.plot([r.measured], [r.predicted], **marks, markersize=3.0 + 2.0 * (r.sparsity == most), zorder=3)
    log_axis(ax.xaxis, low, high, 7)
    log_axis(ax.yaxis, low, high, 7)
