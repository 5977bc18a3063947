"""GEMMs on the roofline: what the device could do at their arithmetic intensity, and what is predicted, dense and pruned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simulator.errors import InputError
from simulator.figures.axes import in_a_row, legend_below, log_axis
from simulator.figures.style import (
    BLACK,
    BLUE,
    COLUMN_IN,
    GREEN,
    GREY,
    ORANGE,
    PAGE_IN,
    PURPLE,
    SKY,
    VERMILLION,
    paper_style,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

F = NDArray[np.float64]

SAME = 1.01
"""Points closer than this factor in both directions are one point with a joint label."""

CYCLE = tuple(zip((BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK, GREY, BLUE, VERMILLION, GREEN), "osD^vPXhd<>"))
"""Colour and marker of each GEMM, in the order of their first occurrence."""


@dataclass(frozen=True)
class Roof:
    """One device with the GEMMs on it.

    Attributes
    ----------
    title : str
        Of the panel.
    peak_flop_per_s, bandwidth_bytes_per_s : float
        Datasheet peaks.
    names : sequence of str
        What each GEMM is.
    intensity : array, FLOP/byte
    achieved_flop_per_s : array, FLOP/s
    pruned : array of bool
        Whether a point belongs to the pruned model.
    """

    title: str
    peak_flop_per_s: float
    bandwidth_bytes_per_s: float
    names: Sequence[str]
    intensity: ArrayLike
    achieved_flop_per_s: ArrayLike
    pruned: ArrayLike


def roofline_figure(roofs: Sequence[Roof], *, columns: int | None = None, width_in: float | None = None) -> Figure:
    """Draw devices side by side, hollow points for the dense model and filled ones for the pruned.

    Parameters
    ----------
    roofs : sequence of Roof
    columns : int, optional
        Panels in a row; at most three if left out.
    width_in : float, optional
        Width of the figure in inches; one column for one device, the page for more.

    Returns
    -------
    Figure

    Raises
    ------
    InputError
        When there is nothing to draw or the columns of a panel differ in length.

    Examples
    --------
    >>> figure = roofline_figure([Roof("h100", 1e15, 3e12, ["q", "q"], [100.0, 90.0], [2e14, 1.8e14], [False, True])])
    >>> figure.axes[0].get_xlabel()
    'arithmetic intensity (FLOP/byte)'
    """
    from matplotlib.figure import Figure

    if not roofs:
        raise InputError("roofline: expected one device or more")
    groups = merged(roofs)
    looks = {name: CYCLE[i % len(CYCLE)] for i, name in enumerate(groups)}
    with paper_style():
        columns = columns or in_a_row(len(roofs))
        rows = -(-len(roofs) // columns)
        width = width_in or (COLUMN_IN if columns == 1 else PAGE_IN)
        handles = _handles(looks, any(np.any(r.pruned) for r in roofs), any(not np.all(r.pruned) for r in roofs))
        per_line = max(2, int(width / (0.45 + 0.055 * max(len(h.get_label()) for h in handles))))
        lines = -(-len(handles) // per_line)
        per_line = -(-len(handles) // lines)
        titles = max(roof.title.count("\n") + 1 for roof in roofs)
        left, right, top, bottom, across, down = (
            0.50,
            0.08,
            0.12 + 0.13 * titles,
            0.44 + 0.14 * lines,
            0.40,
            0.40 + 0.13 * titles,
        )
        panel_height = 1.75
        height = top + bottom + rows * panel_height + (rows - 1) * down
        panel_width = (width - left - right - (columns - 1) * across) / columns
        figure = Figure(figsize=(width, height))
        for i, roof in enumerate(roofs):
            r, c = divmod(i, columns)
            x, y = left + c * (panel_width + across), height - top - (r + 1) * panel_height - r * down
            ax = figure.add_axes((x / width, y / height, panel_width / width, panel_height / height))
            _draw(ax, roof, groups, looks, panel_height / panel_width)
            if c == 0:
                ax.set_ylabel("TFLOP/s")
            if i + columns >= len(roofs):
                ax.set_xlabel("arithmetic intensity (FLOP/byte)")
        legend_below(figure, handles, per_line, 0.06)
    return figure


def _columns(roof: Roof) -> tuple[F, F, NDArray[np.bool_]]:
    x, y = np.asarray(roof.intensity, dtype=float), np.asarray(roof.achieved_flop_per_s, dtype=float)
    pruned = np.asarray(roof.pruned, dtype=bool)
    if not len(x) or len({len(x), len(y), len(pruned), len(roof.names)}) > 1:
        raise InputError(f"roofline of {roof.title}: expected columns of one length from 1 up")
    return x, y, pruned


def merged(roofs: Sequence[Roof]) -> dict[str, tuple[str, ...]]:
    """Joint labels of GEMMs whose points coincide in every panel, dense and pruned alike, and the names each stands for."""
    where: dict[str, list[tuple[int, bool, float, float]]] = {}
    for r, roof in enumerate(roofs):
        for name, x, y, pruned in zip(roof.names, *_columns(roof)):
            where.setdefault(name, []).append((r, bool(pruned), float(np.log(x)), float(np.log(y))))
    groups: list[list[str]] = []
    for name, points in where.items():
        for group in groups:
            other = where[group[0]]
            if [p[:2] for p in points] == [p[:2] for p in other] and np.abs(
                np.array(points) - np.array(other)
            ).max() < np.log(SAME):
                group.append(name)
                break
        else:
            groups.append([name])
    return {", ".join(group): tuple(group) for group in groups}


def origin_of(intensity: F, dense: Sequence[int], point: int) -> int:
    """Which of a GEMM's dense points a pruned point came from: the nearest in intensity (a generate has one of the prefill, one of decode).

    >>> origin_of(np.array([500.0, 1.0, 400.0, 0.9]), [0, 1], 3)
    1
    """
    return min(dense, key=lambda j: abs(float(np.log(intensity[j] / intensity[point]))))


def _draw(
    ax: Axes, roof: Roof, groups: dict[str, tuple[str, ...]], looks: dict[str, tuple[str, str]], aspect: float
) -> None:
    x, y, pruned = _columns(roof)
    y = y / 1e12
    peak, bandwidth = roof.peak_flop_per_s / 1e12, roof.bandwidth_bytes_per_s / 1e12
    ridge = peak / bandwidth
    low, high = float(x.min()) / 2.2, float(x.max()) * 2.2
    if ridge / 15 < high:  # show where the roof bends, unless that is far off and would squeeze the points
        low, high = min(low, ridge / 2.2), max(high, ridge * 2.2)
    roof_low, roof_high = min(peak, low * bandwidth), min(peak, high * bandwidth)
    bottom, top = min(float(y.min()) / 2, roof_low), roof_high * 2.0
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set(xlim=(low, high), ylim=(bottom, top))
    ax.set_title(roof.title, pad=5)
    bend = np.array(sorted({low, min(max(ridge, low), high), high}))
    ax.plot(bend, np.minimum(peak, bend * bandwidth), color=BLACK, linewidth=1.1, zorder=2)
    ax.fill_between(bend, np.minimum(peak, bend * bandwidth), top, color="#F0F0F0", linewidth=0, zorder=0)
    if high > ridge:
        ax.annotate(
            f"{peak:,.4g} TFLOP/s",
            (high, peak),
            xytext=(-2, 2.5),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=6,
        )
    if low < ridge:
        # along the slope and above it, where no point can be
        angle = float(np.degrees(np.arctan(aspect * np.log(high / low) / np.log(top / bottom))))
        middle = float(np.sqrt(low * min(ridge, high)))
        ax.annotate(
            f"{bandwidth:.3g} TB/s",
            (middle, middle * bandwidth),
            xytext=(-2.5, 2.5),
            textcoords="offset points",
            rotation=angle,
            rotation_mode="anchor",
            ha="center",
            va="bottom",
            fontsize=6,
        )
    for label, names in groups.items():
        color, marker = looks[label]
        points = [i for i, name in enumerate(roof.names) if name == names[0]]
        first = [i for i in points if not pruned[i]]
        for i in points:
            if pruned[i] and first:
                origin = origin_of(x, first, i)
                ax.plot([x[origin], x[i]], [y[origin], y[i]], color=color, linewidth=0.6, zorder=3)
            face = color if pruned[i] else "none"
            ax.plot(
                [x[i]],
                [y[i]],
                marker=marker,
                linestyle="none",
                color=color,
                markerfacecolor=face,
                markersize=3.6,
                zorder=4 if pruned[i] else 5,
            )
    log_axis(ax.xaxis, low, high, 5)
    log_axis(ax.yaxis, bottom, top, 6)


def _handles(looks: dict[str, tuple[str, str]], pruned: bool, dense: bool) -> list[Any]:
    from matplotlib.lines import Line2D

    out = [Line2D([], [], color=c, marker=m, linestyle="none", label=name) for name, (c, m) in looks.items()]
    if pruned and dense:
        out.append(
            Line2D([], [], color="#444444", marker="o", markerfacecolor="white", linestyle="none", label="dense")
        )
        out.append(Line2D([], [], color="#444444", marker="o", linestyle="none", label="pruned"))
    return out
