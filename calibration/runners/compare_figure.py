"""Predicted against measured speedups of a decoder that was really executed, a panel for each phase."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.runners.compare import Row, summary
from simulator.errors import InputError
from simulator.figures.layout import in_a_row, log_axis
from simulator.figures.style import COLUMN_IN, PAGE_IN, PALE_INK, in_order, label, paper_style, style_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BAND = 0.08
"""Relative error that the dashed lines mark."""

_EDGE: dict[str, Any] = {"color": PALE_INK, "linewidth": 0.5, "linestyle": (0, (3, 2))}


def compare_figure(rows: Sequence[Row]) -> Figure:
    """Draw predicted against measured speedups of one model on one device; an InputError when there is nothing to draw.

    Markers are by family, large for the largest sparsity; bars are the predicted interval and the range of the measured
    rounds. One phase takes a column's width, more take the page's.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    if not rows:
        raise InputError("predicted against measured: expected one comparison or more")
    phases = list(dict.fromkeys(r.phase for r in rows))
    families = in_order(r.family for r in rows)
    columns = in_a_row(len(phases))
    lines, per_row = -(-len(phases) // columns), 3 if columns == 1 else 6
    legend_rows = -(-(len(families) + 1) // per_row)
    width = COLUMN_IN if columns == 1 else PAGE_IN
    height = lines * (min(width / columns - 0.45, 2.7) + 0.6) + 0.16 * legend_rows + 0.08
    with paper_style():
        figure = Figure(figsize=(width, height), layout="constrained")
        for i, phase in enumerate(phases):
            ax = figure.add_subplot(lines, columns, i + 1, title=phase)
            _panel(ax, [row for row in rows if row.phase == phase], families)
            ax.set_ylabel("predicted speedup" if i % columns == 0 else "")
        dots = [{**style_of(f).marks(), "linestyle": "none", "label": label(f)} for f in families]
        marks = [Line2D([], [], **dot, markersize=3.5) for dot in dots]
        marks.append(Line2D([], [], **_EDGE, label=f"within {100 * BAND:.0f} %"))
        figure.legend(handles=marks, loc="outside lower center", ncol=min(per_row, len(marks)))
    return figure


def _panel(ax: Axes, rows: Sequence[Row], families: Sequence[str]) -> None:
    names = ("measured", "predicted", "predicted_lower", "predicted_upper", "measured_lower", "measured_upper")
    usable = [v for r in rows for name in names if np.isfinite(v := getattr(r, name)) and v > 0]
    low, high = min(0.95, min(usable)) / 1.04, max(1.05, *usable) * 1.04
    ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), xlabel="measured speedup")
    ends = np.array([low, high])
    ax.plot(ends, ends, color="black", linewidth=0.6, zorder=1)
    for edge in (1.0 - BAND, 1.0 + BAND):
        ax.plot(ends, ends * edge, **_EDGE, zorder=1)
    most = max(r.sparsity for r in rows)
    for r in rows:
        marks = {**style_of(r.family, families.index(r.family)).marks(), "linestyle": "none"}
        bars = {"color": marks["color"], "linewidth": 0.4, "alpha": 0.55, "zorder": 2}
        ax.plot([r.measured, r.measured], [r.predicted_lower, r.predicted_upper], **bars)
        ax.plot([r.measured_lower, r.measured_upper], [r.predicted, r.predicted], **bars)
        ax.plot([r.measured], [r.predicted], **marks, markersize=3.0 + 2.0 * (r.sparsity == most), zorder=3)
    for axis in (ax.xaxis, ax.yaxis):
        log_axis(axis, low, high, 7)
    a = summary(rows)
    lines = [f"{a['count']} cases", f"median error {100 * a['median']:.1f} %", f"{100 * a['inside']:.0f} % in interval"]
    lines += [f"Spearman {a['spearman']:.2f}"] if np.isfinite(a["spearman"]) else []
    ax.text(0.04, 0.97, "\n".join(lines), transform=ax.transAxes, va="top", fontsize=6, linespacing=1.25, zorder=6)
