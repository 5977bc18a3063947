"""Draw predictions next to measurements: times of GEMMs, and speedups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from simulator.arrays import Array, FloatArray
from simulator.figures.layout import (
    entry,
    fixed_ticks,
    in_a_row,
    laid_out,
    legend_below,
    log_ticks,
    panel_list,
)
from simulator.figures.style import (
    BLACK,
    BLUE,
    INK,
    PALE_INK,
    VERMILLION,
    label,
    paper_style,
    style_of,
)
from simulator.hardware.profile import HardwareProfile
from simulator.uncertainty.operators import GemmOptions, gemm_time

MOST_DOTS = 1500  # more points become a density
# largest ratio drawn, and inverse of the smallest; arrows with a count on the edge replace others
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
    return (
        float(size.mean()),
        float(np.median(size)),
        float(np.quantile(size, 0.95)),
        float(np.median(error)),
    )


def scatter_figure(clouds: Sequence[Cloud]) -> Figure:
    with paper_style():
        columns = in_a_row(len(clouds))
        rows = -(-len(clouds) // columns)
        figure, axes, _ = panel_list(
            2 * rows * columns, 1.35, 0.1, columns, height_ratios=[2.4, 1.0] * rows
        )
        for i in range(rows * columns):
            first, second = (axes[(2 * (i // columns) + k) * columns + i % columns] for k in (0, 1))
            if i >= len(clouds):
                first.remove()
                second.remove()
                continue
            _pair(first, second, clouds[i])
            first.set_title(clouds[i].title, pad=5)
            second.set_xlabel("measured time", labelpad=2)
            first.set_ylabel("predicted time" if i % columns == 0 else "")
            second.set_ylabel("predicted /\nmeasured" if i % columns == 0 else "")
        figure.align_ylabels()
        return laid_out(figure)


def _pair(first: Axes, second: Axes, cloud: Cloud) -> None:
    x, y = (1e6 * np.asarray(v, dtype=float) for v in (cloud.measured_s, cloud.predicted_s))
    low = float(min(x.min(), y.min())) / 1.25
    high = float(max(x.max(), y.max())) * 1.25
    for ax in (first, second):
        ax.set(xscale="log", yscale="log", xlim=(low, high))
    first.set_ylim(low, high)
    second.set_ylim(1 / RATIO, RATIO)
    _points(first, x, y, (low, high), (low, high))
    _ratios(second, x, y / x, (low, high))
    first.plot([low, high], [low, high], color="black", linewidth=0.6, zorder=4)
    second.axhline(1.0, color="black", linewidth=0.6, zorder=4)
    for edge in (0.9, 1.1):
        second.axhline(edge, color=PALE_INK, linewidth=0.5, linestyle=(0, (3, 2)), zorder=4)
    for axis in (first.xaxis, first.yaxis, second.xaxis):
        _time_axis(axis, low, high)
    first.tick_params(labelbottom=False)
    second.set_yticks([0.7, 0.9, 1.1, 1.4], ["0.7", "0.9", "1.1", "1.4"])
    second.minorticks_off()
    mean, median, p95, _ = agreement(x, y)
    lines = [
        f"{len(x):,} {cloud.what}{', held out' if cloud.held_out else ''}",
        f"mean error {100 * mean:.1f} %",
    ]
    lines += [f"median {100 * median:.1f} %", f"95th percentile {100 * p95:.0f} %"]
    first.text(
        0.04,
        0.97,
        "\n".join(lines),
        linespacing=1.25,
        zorder=5,
        transform=first.transAxes,
        ha="left",
        va="top",
    )


def _ratios(ax: Axes, x: FloatArray, ratio: FloatArray, across: tuple[float, float]) -> None:
    """Draw ratios within :data:`RATIO`, and arrows with their count and farthest value for ratios
    beyond it."""
    above = ratio > RATIO
    below = ratio < 1 / RATIO
    inside = ~(above | below)
    _points(ax, x[inside], ratio[inside], across, (1 / RATIO, RATIO))
    paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
    for beyond, edge, marker, most in (
        (above, RATIO, "^", np.max),
        (below, 1 / RATIO, "v", np.min),
    ):
        if beyond.any():
            ax.plot(
                x[beyond],
                np.full(beyond.sum(), edge),
                marker=marker,
                clip_on=False,
                zorder=5,
                color=VERMILLION,
                linestyle="none",
                markersize=3.2,
                markeredgewidth=0,
            )
            (y, va, word) = (0.96, "top", "above") if edge > 1.0 else (0.05, "bottom", "below")
            text = f"{beyond.sum()} {word}, to {most(ratio[beyond]):.3g}"
            ax.text(
                0.98,
                y,
                text,
                color=VERMILLION,
                va=va,
                transform=ax.transAxes,
                ha="right",
                zorder=6,
                bbox=paper,
            )


def _time_axis(axis: Any, low: float, high: float) -> None:
    """Put at most four powers of ten of a microsecond on an axis, or other round numbers if it has
    fewer than two."""
    powers = np.arange(np.ceil(np.log10(low)), np.floor(np.log10(high)) + 1)
    ticks = [float(10.0**e) for e in powers[:: -(-len(powers) // 4) or 1]]
    fixed_ticks(
        axis,
        ticks if len(ticks) > 1 else log_ticks(low, high, 4),
        lambda value, _: time_text(value),
    )


def time_text(microseconds: float) -> str:
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if microseconds >= 0.999 * size:
            return f"{microseconds / size:.3g} {unit}"
    return f"{microseconds:.3g} µs"


def _points(
    ax: Axes, x: FloatArray, y: FloatArray, across: tuple[float, float], up: tuple[float, float]
) -> None:
    """Draw dots, or a density as pixels if they are too many: a file of 40,000 dots opens
    slowly."""
    if len(x) <= MOST_DOTS:
        size = 1.8 if len(x) > 100 else 2.8
        ax.plot(
            x,
            y,
            linestyle="none",
            color=BLUE,
            marker="o",
            markersize=size,
            markeredgewidth=0,
            alpha=0.6,
            zorder=3,
        )
        return
    bins = [np.geomspace(*across, 111), np.geomspace(*up, 91 if up == across else 46)]
    count, _, _ = np.histogram2d(x, y, bins=bins)
    shades: Any = LinearSegmentedColormap.from_list("density", ["#BFDDF0", BLUE, "#00263D"])
    filled = np.ma.masked_equal(count.T, 0.0)
    norm = LogNorm(1, max(2.0, float(count.max())))
    ax.pcolormesh(bins[0], bins[1], filled, cmap=shades, norm=norm, rasterized=True, zorder=3)


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
    with paper_style():
        columns = in_a_row(len(panels))
        names = panels[0].family
        height = 0.15 * len(names) * max((name.count("\n") + 1 for name in names), default=1)
        figure, axes, _ = panel_list(len(panels), max(1.15, height), 0.45, columns)
        handles = [
            entry(
                "predicted, with its interval", color=INK, marker="o", markersize=4.5, linewidth=1.6
            ),
            entry(observed, color=BLACK, marker="|", markersize=6, linestyle="none"),
        ]
        for i, (ax, panel) in enumerate(zip(axes, panels)):
            _draw_beside(ax, panel, named=i % columns == 0)
        legend_below(figure, handles, 1, "speedup")
        return laid_out(figure)


def _draw_beside(ax: Axes, panel: Beside, *, named: bool) -> None:
    rows = np.arange(len(panel.family))[::-1]
    ax.axvline(1.0, color=PALE_INK, linewidth=0.6, zorder=0)
    values = (np.asarray(v, dtype=float) for v in (panel.predicted, panel.lower, panel.upper))
    for y, name, predicted, lower, upper in zip(rows, panel.family, *values):
        style = style_of(name)
        ax.plot(
            [lower, upper],
            [y, y],
            color=style.color,
            linewidth=1.6,
            solid_capstyle="butt",
            alpha=0.6,
        )
        ax.plot([predicted], [y], **style.marks(linestyle="none", markersize=4.5))
    observed = np.asarray(panel.published, dtype=float)
    ax.vlines(observed, rows - 0.34, rows + 0.34, color=BLACK, linewidth=1.0, zorder=5)
    ax.set_yticks(rows, [label(name) if named else "" for name in panel.family])
    ax.set(ylim=(-0.7, len(rows) - 0.3), title=panel.title)
