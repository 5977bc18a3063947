"""Draw predicted against measured times, two panels per device: times above, their ratio below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from simulator.arrays import FloatArray
from simulator.errors import InputError
from simulator.figures.layout import fixed_ticks, in_a_row, laid_out, log_ticks, panel_list
from simulator.figures.style import BLUE, PALE_INK, VERMILLION, paper_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


MOST_DOTS = 1500
"""Maximum number of dots; more points become a density."""

RATIO = 1.6
"""Largest ratio drawn, and inverse of the smallest; arrows with a count on the edge stand for other ratios."""


@dataclass(frozen=True)
class Cloud:
    """Measured and predicted times of one device or engine, s."""

    title: str
    measured_s: ArrayLike
    predicted_s: ArrayLike
    held_out: bool = False  # the fit did not use these measurements
    what: str = "GEMMs"  # kind of times


@dataclass(frozen=True)
class Agreement:
    """Agreement of predictions with measurements: relative errors as fractions."""

    count: int
    mean: float
    median: float
    p95: float
    bias: float


def agreement(measured_s: ArrayLike, predicted_s: ArrayLike) -> Agreement:
    """Return relative errors of predictions: mean, median and 95th percentile of abs(predicted / measured - 1), and the
    median of the signed error as bias.
    """
    error = np.asarray(predicted_s, dtype=float) / np.asarray(measured_s, dtype=float) - 1.0
    size = np.abs(error)
    mean, median, p95 = float(size.mean()), float(np.median(size)), float(np.quantile(size, 0.95))
    return Agreement(len(error), mean, median, p95, float(np.median(error)))


def scatter_figure(clouds: Sequence[Cloud]) -> Figure:
    """Draw predicted against measured times; InputError if there are none, they differ in number, or one is not above
    zero.
    """
    if not clouds:
        raise InputError("predicted against measured: expected one device or more")
    for c in clouds:
        times = [np.asarray(v, dtype=float) for v in (c.measured_s, c.predicted_s)]
        good = all(np.all((t > 0) & np.isfinite(t)) for t in times)
        if not times[0].size or times[0].shape != times[1].shape or times[0].ndim != 1 or not good:
            expected = "expected equally many finite times above zero, at least one of each"
            raise InputError(f"predicted against measured, {c.title}: {expected}")
    with paper_style():
        columns = in_a_row(len(clouds))
        rows = -(-len(clouds) // columns)
        # two panels per device, one above the other
        figure, axes, _ = panel_list(2 * rows * columns, 1.35, 0.1, columns, height_ratios=[2.4, 1.0] * rows)
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
    low, high = float(min(x.min(), y.min())) / 1.25, float(max(x.max(), y.max())) * 1.25
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
    a = agreement(cloud.measured_s, cloud.predicted_s)
    lines = [f"{a.count:,} {cloud.what}{', held out' if cloud.held_out else ''}", f"mean error {100 * a.mean:.1f} %"]
    lines += [f"median {100 * a.median:.1f} %", f"95th percentile {100 * a.p95:.0f} %"]
    where: dict[str, Any] = {"transform": first.transAxes, "ha": "left", "va": "top"}
    first.text(0.04, 0.97, "\n".join(lines), fontsize=6, linespacing=1.25, zorder=5, **where)


def _ratios(ax: Axes, x: FloatArray, ratio: FloatArray, across: tuple[float, float]) -> None:
    """Draw ratios within :data:`RATIO`; above and below, draw arrows with their number and the farthest value."""
    above, below = ratio > RATIO, ratio < 1 / RATIO
    inside = ~(above | below)
    _points(ax, x[inside], ratio[inside], across, (1 / RATIO, RATIO))
    style: dict[str, Any] = {"color": VERMILLION, "linestyle": "none", "markersize": 3.2, "markeredgewidth": 0}
    paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
    where: dict[str, Any] = {"transform": ax.transAxes, "ha": "right", "fontsize": 6, "zorder": 6, "bbox": paper}
    for beyond, edge, marker, most in ((above, RATIO, "^", np.max), (below, 1 / RATIO, "v", np.min)):
        if beyond.any():
            ax.plot(x[beyond], np.full(beyond.sum(), edge), marker=marker, clip_on=False, zorder=5, **style)
            (y, va, word) = (0.96, "top", "above") if edge > 1.0 else (0.05, "bottom", "below")
            text = f"{beyond.sum()} {word}, to {most(ratio[beyond]):.3g}"
            ax.text(0.98, y, text, color=VERMILLION, va=va, **where)


def _time_axis(axis: Any, low: float, high: float) -> None:
    """Put powers of ten of a microsecond on a logarithmic axis, or other round numbers if there are fewer than two
    powers; at most four, each with a suitable unit."""
    powers = np.arange(np.ceil(np.log10(low)), np.floor(np.log10(high)) + 1)
    ticks = [float(10.0**e) for e in powers[:: -(-len(powers) // 4) or 1]]
    fixed_ticks(axis, ticks if len(ticks) > 1 else log_ticks(low, high, 4), lambda value, _: time_text(value))


def time_text(microseconds: float) -> str:
    """Format a round time in few characters."""
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if microseconds >= 0.999 * size:
            return f"{microseconds / size:.3g} {unit}"
    return f"{microseconds:.3g} µs"


def _points(ax: Axes, x: FloatArray, y: FloatArray, across: tuple[float, float], up: tuple[float, float]) -> None:
    """Draw dots, or a density if they are too many (as pixels, because a file of 40,000 dots opens slowly)."""
    if len(x) <= MOST_DOTS:
        size = 1.8 if len(x) > 100 else 2.8
        ax.plot(x, y, linestyle="none", color=BLUE, marker="o", markersize=size, markeredgewidth=0, alpha=0.6, zorder=3)
        return
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    bins = [np.geomspace(*across, 111), np.geomspace(*up, 91 if up == across else 46)]
    count, _, _ = np.histogram2d(x, y, bins=bins)
    shades: Any = LinearSegmentedColormap.from_list("density", ["#BFDDF0", BLUE, "#00263D"])
    filled = np.ma.masked_equal(count.T, 0.0)
    norm = LogNorm(1, max(2.0, float(count.max())))
    ax.pcolormesh(bins[0], bins[1], filled, cmap=shades, norm=norm, rasterized=True, zorder=3)
