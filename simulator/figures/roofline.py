"""Draw GEMMs on the roofline: the device's limit at their arithmetic intensity, and the predicted rate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simulator.arrays import FloatArray
from simulator.figures.labels import write_labels
from simulator.figures.layout import in_a_row, laid_out, legend_below, legend_lines, log_axis, panel_list, wrapped
from simulator.figures.style import BLACK, BLUE, COLUMN_IN, GREY, PAGE_IN, VERMILLION, paper_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


DATASHEET: dict[str, Any] = {"color": BLACK, "linewidth": 1.1}
HIGHEST: dict[str, Any] = {"color": BLACK, "linewidth": 0.8, "linestyle": (0, (4, 1.5))}
"""Lines of the roof at the datasheet's rate, and at the highest clock, which devices with a boost reach."""

SAME = 1.01
"""Points closer than this factor in both directions are one point with a joint label."""

DENSE: dict[str, Any] = {"marker": "o", "color": BLUE, "markerfacecolor": "none", "markersize": 5, "linestyle": "none"}
PRUNED: dict[str, Any] = {"marker": "s", "color": VERMILLION, "markersize": 2.6, "linestyle": "none"}
"""Markers of the GEMMs of the two models; where they coincide, the square is in the circle."""


@dataclass(frozen=True)
class Roof:
    """One device with its GEMMs: a panel."""

    title: str
    peak_flop_per_s: float  # datasheet peaks
    bandwidth_bytes_per_s: float
    names: Sequence[str]  # one per GEMM
    intensity: ArrayLike  # FLOP/byte
    achieved_flop_per_s: ArrayLike
    pruned: ArrayLike  # whether a point belongs to the pruned model
    headroom: float = 1.0  # highest clock over the datasheet's: largest rate over the peak

    def columns(self) -> tuple[FloatArray, FloatArray, NDArray[np.bool_]]:
        """Return intensity (FLOP/byte), achieved FLOP/s, and whether a point is pruned."""
        x, y = (np.asarray(values, dtype=float) for values in (self.intensity, self.achieved_flop_per_s))
        return x, y, np.asarray(self.pruned, dtype=bool)

    def ranges(self, above: float) -> tuple[float, float, float, float]:
        """Return ranges of intensity (FLOP/byte) and rate (TFLOP/s) that hold all points, and the ridge of the roof
        unless it is so far that it would squeeze the points; ``above`` is the factor above the highest roof."""
        x, y, _ = self.columns()
        peak, bandwidth = self.peak_flop_per_s / 1e12, self.bandwidth_bytes_per_s / 1e12
        ridge = peak / bandwidth
        low, high = float(x.min()) / 2.2, float(x.max()) * 2.2
        if ridge / 15 < high:
            low, high = min(low, ridge / 2.2), max(high, ridge * 2.2)
        bottom = min(float((y / 1e12).min()) / 2, peak, low * bandwidth)
        return low, high, bottom, min(peak * self.headroom, high * bandwidth) * above

    def bend(self, low: float, high: float, headroom: float = 1.0) -> tuple[FloatArray, FloatArray]:
        """Return corners of the roof between two intensities: intensity and TFLOP/s. With the headroom, this is the
        roof of the highest clock, which no time that streams its operands from memory can exceed."""
        peak, bandwidth = headroom * self.peak_flop_per_s / 1e12, self.bandwidth_bytes_per_s / 1e12
        at = np.array(sorted({low, min(max(peak / bandwidth, low), high), high}))
        return at, np.minimum(peak, at * bandwidth)


def roofline_figure(roofs: Sequence[Roof], *, columns: int | None = None, names: str = "") -> Figure:
    """Draw devices side by side on common axes: circles for the dense model, squares for the pruned model, names next
    to the points; ``names`` is the legend's title.

    ``columns`` is the number of panels per row, by default at most three; the figure is one column wide for one device,
    else a page. Names for which there is no room are omitted.
    """
    columns = columns or in_a_row(len(roofs))
    width = COLUMN_IN if columns == 1 else PAGE_IN
    with paper_style():
        handles = _handles(roofs)
        lines = legend_lines(handles, width)
        titles = [wrapped(roof.title, (width - 0.4) / columns) for roof in roofs]
        title_in = 0.13 * max(title.count("\n") + 1 for title in titles)
        figure, axes, _ = panel_list(len(roofs), 1.9 + title_in, 0.3 + 0.14 * lines, columns)
        limits = common_ranges(roofs, 2.0)
        for i, (ax, roof, title) in enumerate(zip(axes, roofs, titles)):
            _draw(ax, roof, limits)
            ax.set_title(title, pad=5)
            ax.tick_params(labelleft=i % columns == 0, labelbottom=i + columns >= len(roofs))
            ax.set_ylabel("TFLOP/s" if i % columns == 0 else "")
            if i + columns >= len(roofs):
                ax.set_xlabel("arithmetic intensity (FLOP/byte)")
        legend_below(figure, handles, lines, names)
        laid_out(figure)  # places of names, and the slope of a roof on the page, are known only now
        for ax, roof in zip(axes, roofs):
            _name(ax, roof, limits)
    return figure


def common_ranges(roofs: Sequence[Roof], above: float) -> tuple[float, float, float, float]:
    """Return the ranges of several panels on common axes, as :meth:`Roof.ranges`."""
    low, high, bottom, top = zip(*(roof.ranges(above) for roof in roofs))
    return min(low), max(high), min(bottom), max(top)


def merged(roofs: Sequence[Roof]) -> dict[str, tuple[str, ...]]:
    """Return joint labels of GEMMs whose points coincide in every panel, dense and pruned, with the names of each
    group."""
    where: dict[str, list[tuple[int, bool, float, float]]] = {}
    for r, roof in enumerate(roofs):
        for name, x, y, pruned in zip(roof.names, *roof.columns()):
            where.setdefault(name, []).append((r, bool(pruned), float(np.log(x)), float(np.log(y))))
    groups: list[list[str]] = []
    for name, points in where.items():
        for group in groups:
            other = where[group[0]]
            same = [p[:2] for p in points] == [p[:2] for p in other]
            if same and np.abs(np.array(points) - np.array(other)).max() < np.log(SAME):
                group.append(name)
                break
        else:
            groups.append([name])
    return {", ".join(group): tuple(group) for group in groups}


def origin_of(intensity: FloatArray, dense: Sequence[int], point: int) -> int:
    """Return the dense point that a pruned point came from: the nearest in intensity (a generate has one point of the
    prefill, one of decode).
    """
    return min(dense, key=lambda j: abs(float(np.log(intensity[j] / intensity[point]))))


def drawn(roof: Roof, groups: dict[str, tuple[str, ...]]) -> Iterator[tuple[str, int, int | None]]:
    """Yield, for every drawn point, the label of its group, its index in the columns, and the index of its dense
    point."""
    x, _, pruned = roof.columns()
    for title, members in groups.items():
        points = [i for i, own in enumerate(roof.names) if own == members[0]]
        dense = [i for i in points if not pruned[i]]
        for i in points:
            yield title, i, origin_of(x, dense, i) if pruned[i] and dense else None


def _draw(ax: Axes, roof: Roof, limits: tuple[float, float, float, float]) -> None:
    x, y, pruned = roof.columns()
    y, (low, high, bottom, top) = y / 1e12, limits
    ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(bottom, top))
    highest = roof.bend(low, high, roof.headroom)
    ax.plot(*roof.bend(low, high), **DATASHEET, zorder=2)
    ax.fill_between(*highest, top, color="#F0F0F0", linewidth=0, zorder=0)
    if roof.headroom > 1.0:
        ax.plot(*highest, **HIGHEST, zorder=1.9)
    for _, i, origin in drawn(roof, merged([roof])):
        if origin is not None:
            ax.plot([x[origin], x[i]], [y[origin], y[i]], color=GREY, linewidth=0.6, zorder=3)
        ax.plot([x[i]], [y[i]], **(PRUNED if pruned[i] else DENSE), zorder=5 if pruned[i] else 4)
    log_axis(ax.xaxis, low, high, 5)
    log_axis(ax.yaxis, bottom, top, 6)


_LABEL: dict[str, Any] = {"textcoords": "offset points", "va": "bottom", "fontsize": 6}


def _name(ax: Axes, roof: Roof, limits: tuple[float, float, float, float]) -> None:
    """Write the rates of a roof above it, where no point can be, and the names of the GEMMs next to their points."""
    low, high, _, top = limits
    peak, bandwidth = roof.peak_flop_per_s / 1e12, roof.bandwidth_bytes_per_s / 1e12
    ridge, highest = peak / bandwidth, roof.bend(low, high, roof.headroom)
    rates = f"{peak:,.4g}" + (f" to {peak * roof.headroom:,.4g}" if roof.headroom > 1.0 else "")
    if high > ridge:
        ax.annotate(f"{rates} TFLOP/s", (high, highest[1][-1]), xytext=(-2, 2.5), ha="right", **_LABEL)
    if low < ridge:
        middle = float(np.sqrt(low * min(ridge, high)))
        (x0, y0), (x1, y1) = ax.transData.transform([(low, low * bandwidth), (middle, middle * bandwidth)])
        where: dict[str, Any] = {"xytext": (-2.5, 2.5), "ha": "center", "rotation_mode": "anchor", **_LABEL}
        where["rotation"] = float(np.degrees(np.arctan2(y1 - y0, x1 - x0)))
        ax.annotate(f"{bandwidth:.3g} TB/s", (middle, middle * bandwidth), **where)
    x, y, pruned = roof.columns()
    named = [(title, i) for title, i, _ in drawn(roof, merged([roof])) if pruned[i] or not pruned.any()]
    at = [i for _, i in named]
    along = np.geomspace(low, high, 100)
    roofs = [np.minimum(peak * factor, along * bandwidth) for factor in (1.0, roof.headroom)]
    above = [(along, np.minimum(roofs[-1] * factor, top)) for factor in np.geomspace(1.0, top / roofs[-1].min(), 60)]
    clear_of = [(x, y / 1e12), (along, roofs[0]), *above]
    write_labels(ax, x[at], y[at] / 1e12, [title for title, _ in named], clear_of)


def _handles(roofs: Sequence[Roof]) -> list[Any]:
    from matplotlib.lines import Line2D

    out = list[Any]()
    if any(np.any(r.pruned) for r in roofs):
        out += [Line2D([], [], **DENSE, label="dense"), Line2D([], [], **PRUNED, label="pruned")]
    out.append(Line2D([], [], **DATASHEET, label="datasheet"))
    if any(r.headroom > 1.0 for r in roofs):
        out.append(Line2D([], [], **HIGHEST, label="highest clock"))
    return out
