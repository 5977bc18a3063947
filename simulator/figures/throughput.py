"""Draw the throughput of a service over its time per token: a curve over concurrency for each model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from simulator.arrays import FloatArray
from simulator.errors import InputError
from simulator.figures import layout
from simulator.figures.style import COLUMN_IN, GREY, INK, PAGE_IN, PALE_INK, Style, paper_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

END, KEPT = "as many as fit (number)", "most within the limits"
"""Labels of the marks."""

LINE = 0.055
"""Height of a name, as a share of a panel's height."""


@dataclass(frozen=True)
class Curve:
    """One model at rising concurrencies (n): time per output token, s, and tokens/s per GPU, each as the prediction and
    both ends of its interval (3, n); and its point within limits (2,), or nothing."""

    name: str
    style: Style
    tpot_s: FloatArray
    tokens_per_s: FloatArray
    largest: int  # concurrency at the end
    within: tuple[float, float] | None = None

    @property
    def ms(self) -> FloatArray:
        """Time per output token, ms."""
        return 1e3 * self.tpot_s


@dataclass(frozen=True)
class Throughput:
    """One panel: its title, the curves, and the limit of the time per output token, s, if any."""

    title: str
    curves: Sequence[Curve]
    limit_s: float | None = None


def throughput_figure(
    panels: Sequence[Throughput], *, interval: str = "90 % interval", columns: int | None = None
) -> Figure:
    """Draw throughput over time per token, one panel per service.

    A curve follows the concurrency from a single request (bottom left) to as many as fit, which its name states. A
    slower pass moves a point right and down, so the band of a curve joins the ends of both intervals. InputError if
    there is nothing to draw.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    curves = [curve for panel in panels for curve in panel.curves]
    if not curves:
        raise InputError("throughput: expected one curve or more")
    with paper_style():
        handles: list[Any] = [Line2D([], [], linestyle="none", marker="o", color=INK, markersize=5.5, label=END)]
        if any(curve.within for curve in curves):
            handles.append(Line2D([], [], linestyle="none", **_RING, markeredgecolor=INK, label=KEPT))
        handles.append(Patch(color=INK, alpha=_ALPHA, linewidth=0, label=interval))
        width = COLUMN_IN if len(panels) == 1 else PAGE_IN
        lines = layout.legend_lines(handles, width)
        figure, axes, across = layout.panel_list(
            len(panels), 2.3, 0.35 + 0.14 * lines, columns, sharex=True, sharey=True
        )
        ranges = []
        for values in ([curve.ms for curve in curves], [curve.tokens_per_s for curve in curves]):
            low, high = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
            pad = (high / low) ** 0.05
            ranges.append((low / pad, high * pad))
        for i, (ax, panel) in enumerate(zip(axes, panels)):
            ax.set(xscale="log", yscale="log", xlim=ranges[0], ylim=ranges[1])
            ax.set_title(layout.wrapped(panel.title, width / across - 0.4), pad=5)
            ax.set_xlabel("time per output token (ms)", labelpad=2)
            ax.set_ylabel("tokens/s per GPU" if i % across == 0 else "")
            layout.log_axis(ax.xaxis, *ranges[0], 6)
            layout.log_axis(ax.yaxis, *ranges[1], 6)
            _draw(ax, panel)
            _name(ax, panel)
        layout.legend_below(figure, handles, lines)
        return layout.laid_out(figure)


_ALPHA = 0.12
_RING: dict[str, Any] = {"marker": "o", "markersize": 8, "markerfacecolor": "none", "markeredgewidth": 0.9}


def _draw(ax: Axes, panel: Throughput) -> None:
    if panel.limit_s is not None:
        ax.axvline(1e3 * panel.limit_s, color=GREY, linewidth=0.8, linestyle=(0, (1, 1)), zorder=1.5)
        where: dict[str, Any] = {"rotation": 90, "va": "bottom", "ha": "right", "fontsize": 6, "color": PALE_INK}
        ax.text(1e3 * panel.limit_s, ax.get_ylim()[0] * 1.1, f"limit {1e3 * panel.limit_s:.3g} ms", **where)
    for curve in panel.curves:
        (x, low_x, high_x), (y, low_y, high_y) = curve.ms, curve.tokens_per_s
        edge = np.concatenate([low_x, high_x[::-1]]), np.concatenate([high_y, low_y[::-1]])
        ax.fill(*edge, color=curve.style.color, alpha=_ALPHA, linewidth=0, zorder=2)
        ax.plot(x, y, **curve.style.marks(markersize=2.6, zorder=4))
        ax.plot(x[-1:], y[-1:], **curve.style.marks(markersize=5.5, zorder=4.5))
        if curve.within is not None:
            ring = {**_RING, "linestyle": "none", "markeredgecolor": curve.style.color}
            ax.plot(1e3 * curve.within[0], curve.within[1], **ring, zorder=4.5)


def _name(ax: Axes, panel: Throughput) -> None:
    """Write the names of the curves right of the panel, with lines to their ends."""
    (left, right), (low, high) = np.log(ax.get_xlim()), np.log(ax.get_ylim())
    edge = float(np.exp(left + 1.02 * (right - left)))
    ends = [(float(np.log(c.tokens_per_s[0, -1]) - low) / (high - low), c) for c in panel.curves]
    height = 1.0 + LINE
    for place, c in sorted(ends, key=lambda end: -end[0]):
        height = min(place, height - LINE)
        text: dict[str, Any] = {"transform": ax.transAxes, "va": "center", "fontsize": 6}
        ax.text(1.03, height, f"{c.name} ({c.largest:,})", **text)
        to = float(np.exp(low + height * (high - low)))
        line: dict[str, Any] = {"color": GREY, "linewidth": 0.4, "clip_on": False, "zorder": 3}
        ax.plot([c.ms[0, -1], edge], [c.tokens_per_s[0, -1], to], **line)
