"""Predicted against measured, a panel for each device: times above, their ratio below, and how well they agree in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simulator.errors import InputError
from simulator.figures.axes import in_a_row
from simulator.figures.style import BLUE, COLUMN_IN, PAGE_IN, paper_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

F = NDArray[np.float64]

MOST_DOTS = 1500
"""More points than this become a density."""

RATIO = 1.6
"""Ratios drawn lie between this and its inverse; those beyond sit on the edge."""


@dataclass(frozen=True)
class Cloud:
    """Measured and predicted times of one device, s; ``held_out``: the prediction never saw these measurements."""

    title: str
    measured_s: ArrayLike
    predicted_s: ArrayLike
    held_out: bool = False


@dataclass(frozen=True)
class Agreement:
    """How well predictions agree: relative errors as fractions."""

    count: int
    mean: float
    median: float
    p95: float
    bias: float


def agreement(measured_s: ArrayLike, predicted_s: ArrayLike) -> Agreement:
    """Relative errors of predictions.

    Parameters
    ----------
    measured_s, predicted_s : array, s, > 0

    Returns
    -------
    Agreement
        Mean, median and 95th percentile of \\|predicted / measured - 1\\|, and the median of the signed error.

    Examples
    --------
    >>> a = agreement([1.0, 2.0, 4.0], [1.1, 2.0, 3.8])
    >>> a.count, round(a.mean, 3), round(a.median, 3)
    (3, 0.05, 0.05)
    """
    error = np.asarray(predicted_s, dtype=float) / np.asarray(measured_s, dtype=float) - 1.0
    size = np.abs(error)
    return Agreement(
        len(error), float(size.mean()), float(np.median(size)), float(np.quantile(size, 0.95)), float(np.median(error))
    )


def scatter_figure(clouds: Sequence[Cloud], *, width_in: float | None = None) -> Figure:
    """Draw predicted against measured times.

    Parameters
    ----------
    clouds : sequence of Cloud
    width_in : float, optional
        Width of the figure in inches; one column for one device, the page for more.

    Returns
    -------
    Figure

    Raises
    ------
    InputError
        When there is nothing to draw, columns differ in length, or a time is not above zero.

    Examples
    --------
    >>> figure = scatter_figure([Cloud("h100", [1e-6, 1e-5, 1e-4], [1.1e-6, 1e-5, 0.9e-4])])
    >>> len(figure.axes), figure.axes[1].get_xlabel()
    (2, 'measured time')
    """
    from matplotlib.figure import Figure

    if not clouds:
        raise InputError("predicted against measured: expected one device or more")
    for c in clouds:
        x, y = np.asarray(c.measured_s, dtype=float), np.asarray(c.predicted_s, dtype=float)
        if (
            not x.size
            or x.shape != y.shape
            or x.ndim != 1
            or not (np.all(x > 0) and np.all(y > 0) and np.all(np.isfinite(x * y)))
        ):
            raise InputError(
                f"predicted against measured, {c.title}: expected as many finite times above zero of each, from 1 up"
            )
    with paper_style():
        columns = in_a_row(len(clouds))
        rows = -(-len(clouds) // columns)
        width = width_in or (COLUMN_IN if columns == 1 else PAGE_IN)
        left, right, top, bottom, across, down, upper, lower, split = (
            0.64,
            0.10,
            0.24,
            0.36,
            0.50,
            0.66,
            1.55,
            0.62,
            0.10,
        )
        block = upper + split + lower
        height = top + bottom + rows * block + (rows - 1) * down
        panel_width = (width - left - right - (columns - 1) * across) / columns
        figure = Figure(figsize=(width, height))
        for i, c in enumerate(clouds):
            r, k = divmod(i, columns)
            x0, y0 = left + k * (panel_width + across), height - top - r * (block + down)
            first = figure.add_axes((x0 / width, (y0 - upper) / height, panel_width / width, upper / height))
            second = figure.add_axes((x0 / width, (y0 - block) / height, panel_width / width, lower / height))
            _pair(first, second, c)
            first.set_title(c.title, pad=5)
            second.set_xlabel("measured time", labelpad=2)
            if k == 0:
                first.set_ylabel("predicted time")
                second.set_ylabel("ratio")
    return figure


def _pair(first: Axes, second: Axes, cloud: Cloud) -> None:
    x, y = (1e6 * np.asarray(v, dtype=float) for v in (cloud.measured_s, cloud.predicted_s))
    low, high = float(min(x.min(), y.min())) / 1.25, float(max(x.max(), y.max())) * 1.25
    ratio = np.clip(y / x, 1.001 / RATIO, RATIO / 1.001)
    for ax in (first, second):
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlim(low, high)
    first.set_ylim(low, high)
    second.set_ylim(1 / RATIO, RATIO)
    _points(first, x, y, (low, high), (low, high))
    _points(second, x, ratio, (low, high), (1 / RATIO, RATIO))
    first.plot([low, high], [low, high], color="black", linewidth=0.6, zorder=4)
    second.axhline(1.0, color="black", linewidth=0.6, zorder=4)
    for edge in (0.9, 1.1):
        second.axhline(edge, color="#5A5A5A", linewidth=0.5, linestyle=(0, (3, 2)), zorder=4)
    for axis in (first.xaxis, first.yaxis, second.xaxis):
        _time_axis(axis, low, high)
    first.tick_params(labelbottom=False)
    second.set_yticks([0.7, 0.9, 1.1, 1.4], ["0.7", "0.9", "1.1", "1.4"])
    second.minorticks_off()
    a = agreement(cloud.measured_s, cloud.predicted_s)
    lines = [f"{a.count:,} GEMMs{', held out' if cloud.held_out else ''}", f"mean error {100 * a.mean:.1f} %"]
    lines += [f"median {100 * a.median:.1f} %, 95th {100 * a.p95:.0f} %"]
    first.text(
        0.04,
        0.97,
        "\n".join(lines),
        transform=first.transAxes,
        ha="left",
        va="top",
        fontsize=6,
        linespacing=1.25,
        zorder=5,
    )


def _time_axis(axis: Any, low: float, high: float) -> None:
    """Powers of ten of a microsecond on a logarithmic axis, written with the unit that suits each; at most four."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    powers = np.arange(np.ceil(np.log10(low)), np.floor(np.log10(high)) + 1)
    axis.set_major_locator(FixedLocator([float(10.0**e) for e in powers[:: -(-len(powers) // 4) or 1]]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: time_text(value)))


def time_text(microseconds: float) -> str:
    """A round time in few characters.

    >>> time_text(10.0), time_text(1000.0), time_text(100_000.0), time_text(0.1)
    ('10 µs', '1 ms', '100 ms', '0.1 µs')
    """
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if microseconds >= 0.999 * size:
            return f"{microseconds / size:.3g} {unit}"
    return f"{microseconds:.3g} µs"


def _points(ax: Axes, x: F, y: F, across: tuple[float, float], up: tuple[float, float]) -> None:
    """Dots, or a density where they are too many for a page (drawn as pixels, for a file of 40,000 dots opens slowly)."""
    if len(x) <= MOST_DOTS:
        ax.plot(x, y, linestyle="none", color=BLUE, marker="o", markersize=1.8, markeredgewidth=0, alpha=0.6, zorder=3)
        return
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    bins = [np.geomspace(*across, 111), np.geomspace(*up, 91 if up == across else 46)]
    count, _, _ = np.histogram2d(x, y, bins=bins)
    shades: Any = LinearSegmentedColormap.from_list("density", ["#BFDDF0", BLUE, "#00263D"])
    filled = np.ma.masked_equal(count.T, 0.0)
    ax.pcolormesh(
        bins[0], bins[1], filled, cmap=shades, norm=LogNorm(1, max(2.0, float(count.max()))), rasterized=True, zorder=3
    )
