"""Draw predictions next to measurements: times of GEMMs, and speedups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from simulator.arrays import Array, FloatArray
from simulator.figures import layout
from simulator.figures.style import (
    BLACK,
    BLUE,
    INK,
    PALE_INK,
    VERMILLION,
    Look,
    label,
    paper_style,
    style_of,
)
from simulator.hardware.profile import HardwareProfile
from simulator.uncertainty.operators import GemmOptions, gemm_time

MOST_DOTS = 1500  # more points are pixels
# largest ratio drawn, and inverse of the smallest; others are dots on the edge
RATIO = 1.6


@dataclass(frozen=True)
class MeasuredGemms:
    source: str  # origin, for captions
    m: Array
    n: Array
    k: Array
    seconds: FloatArray
    copies: Array | None = None  # number of rotated weights, inf if cold; None: all cold
    stack: str = ""  # software stack that was measured; "": that of the device's profile

    def predict(self, hw: HardwareProfile, dtype: str = "bf16") -> FloatArray:
        """Return predicted times of all rows, s, for the stack and the rotation of weights that
        were measured."""
        hw = hw.on(self.stack) if self.stack else hw
        return gemm_time(
            self.m, self.n, self.k, hw, dtype=dtype, options=GemmOptions(copies=self.copies)
        ).seconds


@dataclass(frozen=True)
class Cloud:
    title: str
    measured_s: ArrayLike
    predicted_s: ArrayLike
    held_out: bool = False  # the fit did not use these measurements
    what: str = "GEMMs"  # kind of times


def agreement(measured_s: ArrayLike, predicted_s: ArrayLike) -> tuple[float, float, float, float]:
    """Return mean, median and 95th percentile of abs(predicted / measured - 1), and the median of
    the signed error."""
    error = np.asarray(predicted_s, dtype=float) / np.asarray(measured_s, dtype=float) - 1.0
    size = np.abs(error)
    scores = size.mean(), np.median(size), np.quantile(size, 0.95), np.median(error)
    mean, median, p95, bias = map(float, scores)
    return mean, median, p95, bias


def scatter_figure(clouds: Sequence[Cloud]) -> Figure:
    """Draw each cloud above its ratios."""
    with paper_style():
        columns = layout.in_a_row(len(clouds))
        rows = -(-len(clouds) // columns)
        figure, panels = layout.panel_list(
            2 * rows * columns, 1.35, 0.1, columns, height_ratios=[2.4, 1.0] * rows
        )
        axes = np.array(panels).reshape(rows, 2, columns)
        for i, (row, column) in enumerate(np.ndindex(rows, columns)):
            first, second = axes[row, :, column]
            if i >= len(clouds):
                first.remove()
                second.remove()
                continue
            _pair(first, second, clouds[i])
            second.set_xlabel("measured time", labelpad=2)
            if column == 0:
                first.set_ylabel("predicted time")
                second.set_ylabel("predicted /\nmeasured")
        figure.align_ylabels()
        return layout.laid_out(figure)


def _pair(first: Axes, second: Axes, cloud: Cloud) -> None:
    x, y = (1e6 * np.asarray(v, dtype=float) for v in (cloud.measured_s, cloud.predicted_s))
    limits = layout.padded(x, y)
    for ax, ends in ((first, limits), (second, (1 / RATIO, RATIO))):
        ax.set(xscale="log", yscale="log", xlim=limits, ylim=ends)
    _points(first, x, y)
    _ratios(second, x, y / x)
    first.plot(limits, limits, color="black", linewidth=0.6, zorder=4)
    second.axhline(1.0, color="black", linewidth=0.6, zorder=4)
    for edge in (0.9, 1.1):
        second.axhline(edge, color=PALE_INK, linewidth=0.5, linestyle=(0, (3, 2)), zorder=4)
    ticks = layout.log_ticks(*limits, 4)
    for axis in (first.xaxis, first.yaxis, second.xaxis):
        layout.fixed_ticks(axis, ticks, lambda value, _: time_text(value))
    first.tick_params(labelbottom=False)
    layout.fixed_ticks(second.yaxis, [0.7, 0.9, 1.1, 1.4])
    mean, median, p95, _ = agreement(x, y)
    lines = [
        f"{len(x):,} {cloud.what}{', held out' if cloud.held_out else ''}",
        f"mean error {100 * mean:.1f} %",
        f"median {100 * median:.1f} %",
        f"95th percentile {100 * p95:.0f} %",
    ]
    text: Look = {"s": "\n".join(lines), "linespacing": 1.25, "va": "top", "zorder": 5}
    first.text(0.04, 0.97, transform=first.transAxes, **text)
    first.set_title(cloud.title, pad=5)


def _ratios(ax: Axes, x: FloatArray, ratio: FloatArray) -> None:
    """Draw ratios within :data:`RATIO`, and on its edges those beyond it with their range."""
    clipped = np.clip(ratio, 1 / RATIO, RATIO)
    beyond = clipped != ratio
    _points(ax, x[~beyond], ratio[~beyond])
    if beyond.any():
        look: Look = {"color": VERMILLION, "zorder": 5}
        ax.plot(x[beyond], clipped[beyond], "o", clip_on=False, markersize=2.4, **look)
        text = f"{beyond.sum()} beyond: {ratio.min():.3g} to {ratio.max():.3g}"
        paper: Look = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
        ax.text(0.98, 0.05, text, ha="right", transform=ax.transAxes, bbox=paper, **look)


def time_text(microseconds: float) -> str:
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if microseconds >= 0.999 * size:
            return f"{microseconds / size:.3g} {unit}"
    return f"{microseconds:.3g} µs"


def _points(ax: Axes, x: FloatArray, y: FloatArray) -> None:
    """Draw dots; as pixels, darker where they are dense, if they are many: a file of 40,000 dots
    opens slowly."""
    many = len(x) > MOST_DOTS
    size = 1.8 if len(x) > 100 else 2.8
    look: Look = {"alpha": 0.08 if many else 0.6, "rasterized": many, "color": BLUE}
    ax.plot(x, y, "o", markersize=size, markeredgewidth=0, zorder=3, **look)


@dataclass(frozen=True)
class Beside:
    title: str
    family: Sequence[str]
    published: ArrayLike
    predicted: ArrayLike
    lower: ArrayLike
    upper: ArrayLike


def published_figure(panels: Sequence[Beside], *, observed: str = "published") -> Figure:
    """Draw predicted speedups with intervals, and published or measured ones (``observed``) as
    bars; NaN: no bar."""
    names = panels[0].family
    height = 0.15 * len(names) * layout.lines_of([*names, ""])
    handles = [
        layout.entry("predicted, with its interval", color=INK, marker="o", markersize=4.5),
        layout.entry(observed, color=BLACK, marker="|", markersize=6, linestyle="none"),
    ]
    with paper_style():
        figure, axes = layout.panel_list(
            len(panels),
            max(1.05, height),
            0.2,
            titles=[panel.title for panel in panels],
            handles=handles,
            legend="speedup",
            sharey=True,
        )
        for ax, panel in zip(axes, panels):
            _draw_beside(ax, panel)
        return layout.laid_out(figure)


def _draw_beside(ax: Axes, panel: Beside) -> None:
    rows = np.arange(len(panel.family))[::-1]
    ax.axvline(1.0, color=PALE_INK, linewidth=0.6, zorder=0)
    values = np.array([panel.predicted, panel.lower, panel.upper], dtype=float).T
    for y, name, (predicted, *ends) in zip(rows, panel.family, values):
        layout.with_intervals(ax, predicted, y, ends, across=True, **style_of(name).marks())
    observed = np.asarray(panel.published, dtype=float)
    ax.vlines(observed, rows - 0.34, rows + 0.34, color=BLACK, linewidth=1.0, zorder=5)
    ax.set_yticks(rows, list(map(label, panel.family)))
    ax.set_ylim(-0.7, len(rows) - 0.3)
