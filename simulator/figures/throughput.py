"""Draw the throughput of a service over its time per token: a curve over concurrency for each model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from simulator.arrays import FloatArray
from simulator.figures.layout import laid_out, log_axis, panel_list, wrapped
from simulator.figures.style import COLUMN_IN, GREY, INK, PAGE_IN, PALE_INK, Style, paper_style

LINE = 0.055  # height of a name, as a share of a panel's height

_ALPHA = 0.12
_RING: dict[str, Any] = {"marker": "o", "markersize": 8, "markerfacecolor": "none", "markeredgewidth": 0.9}
_RING |= {"linestyle": "none"}


@dataclass(frozen=True)
class Curve:
    """One model at rising concurrencies (n): time per output token, ms, and tokens/s per GPU, each as the prediction
    and both ends of its interval (3, n); and its point within limits (2,), or nothing."""

    name: str
    style: Style
    ms: FloatArray
    tokens_per_s: FloatArray
    largest: int  # concurrency at the end
    within: tuple[float, float] | None = None


@dataclass(frozen=True)
class Throughput:
    """One panel: its title, the curves, and the limit of the time per output token, ms, if any."""

    title: str
    curves: Sequence[Curve]
    limit_ms: float | None = None


def throughput_figure(panels: Sequence[Throughput], *, interval: str, columns: int | None = None) -> Figure:
    """Draw throughput over time per token, one panel per service.

    A curve follows the concurrency from a single request (bottom left) to as many as fit, which its name states. A
    slower pass moves a point right and down, so the band of a curve joins the ends of both intervals.
    """
    curves = [curve for panel in panels for curve in panel.curves]
    with paper_style():
        most: dict[str, Any] = {"linestyle": "none", "marker": "o", "color": INK, "markersize": 5.5}
        handles: list[Any] = [Line2D([], [], **most, label="as many as fit (number)")]
        if any(curve.within for curve in curves):
            handles.append(Line2D([], [], **_RING, markeredgecolor=INK, label="most within the limits"))
        handles.append(Patch(color=INK, alpha=_ALPHA, linewidth=0, label=interval))
        width = COLUMN_IN if len(panels) == 1 else PAGE_IN
        figure, axes, across = panel_list(len(panels), 2.3, 0.35, columns, handles=handles, sharex=True, sharey=True)
        ranges = []
        for values in ([curve.ms for curve in curves], [curve.tokens_per_s for curve in curves]):
            low, high = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
            pad = (high / low) ** 0.05
            ranges.append((low / pad, high * pad))
        for i, (ax, panel) in enumerate(zip(axes, panels)):
            ax.set(xscale="log", yscale="log", xlim=ranges[0], ylim=ranges[1])
            ax.set_title(wrapped(panel.title, width / across - 0.4), pad=5)
            ax.set_xlabel("time per output token (ms)", labelpad=2)
            ax.set_ylabel("tokens/s per GPU" if i % across == 0 else "")
            log_axis(ax.xaxis, *ranges[0], 6)
            log_axis(ax.yaxis, *ranges[1], 6)
            _draw(ax, panel)
            _name(ax, panel)
        return laid_out(figure)


def _draw(ax: Axes, panel: Throughput) -> None:
    if panel.limit_ms is not None:
        ax.axvline(panel.limit_ms, color=GREY, linewidth=0.8, linestyle=(0, (1, 1)), zorder=1.5)
        where: dict[str, Any] = {"rotation": 90, "va": "bottom", "ha": "right", "fontsize": 6, "color": PALE_INK}
        ax.text(panel.limit_ms, ax.get_ylim()[0] * 1.1, f"limit {panel.limit_ms:.3g} ms", **where)
    for curve in panel.curves:
        (x, low_x, high_x), (y, low_y, high_y) = curve.ms, curve.tokens_per_s
        edge = np.concatenate([low_x, high_x[::-1]]), np.concatenate([high_y, low_y[::-1]])
        ax.fill(*edge, color=curve.style.color, alpha=_ALPHA, linewidth=0, zorder=2)
        ax.plot(x, y, **curve.style.marks(markersize=2.6, zorder=4))
        ax.plot(x[-1:], y[-1:], **curve.style.marks(markersize=5.5, zorder=4.5))
        if curve.within is not None:
            ax.plot(*curve.within, **_RING, markeredgecolor=curve.style.color, zorder=4.5)


def _name(ax: Axes, panel: Throughput) -> None:
    """Write the names of the curves right of the panel, with lines to their ends."""
    (left, right), (low, high) = np.log(ax.get_xlim()), np.log(ax.get_ylim())
    edge = float(np.exp(left + 1.02 * (right - left)))
    ends = [(float(np.log(c.tokens_per_s[0, -1]) - low) / (high - low), c) for c in panel.curves]
    height = 1.0 + LINE
    for place, c in sorted(ends, key=lambda end: -end[0]):
        height = min(place, height - LINE)
        ax.text(1.03, height, f"{c.name} ({c.largest:,})", transform=ax.transAxes, va="center", fontsize=6)
        to = float(np.exp(low + height * (high - low)))
        line: dict[str, Any] = {"color": GREY, "linewidth": 0.4, "clip_on": False, "zorder": 3}
        ax.plot([c.ms[0, -1], edge], [c.tokens_per_s[0, -1], to], **line)
