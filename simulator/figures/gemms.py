"""Draw the rates of GEMMs on the roofline of a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike

from simulator.arrays import BoolArray, FloatArray
from simulator.figures import layout, style
from simulator.figures.style import Look
from simulator.prediction.explain import Explanation
from simulator.prediction.gemms import GemmRecord, gemm_points
from simulator.prediction.requests import by_key

# the roof at the datasheet's rate, and at the highest clock, which devices with a boost reach
DATASHEET: Look = {"color": style.BLACK, "linewidth": 1.1}
HIGHEST: Look = {"color": style.BLACK, "linewidth": 0.8, "linestyle": (0, (4, 1.5))}

# markers of the GEMMs of the two models; where they coincide, the square is in the circle
DENSE: Look = {
    "marker": "o",
    "color": style.BLUE,
    "markersize": 5,
    "linestyle": "none",
    "markerfacecolor": "none",
}
PRUNED: Look = {
    "marker": "s",
    "color": style.VERMILLION,
    "markersize": 2.6,
    "linestyle": "none",
}

Limits = tuple[float, float, float, float]  # ranges of intensity (FLOP/byte) and rate (TFLOP/s)


@dataclass(frozen=True)
class Roof:
    title: str
    peak_flop_per_s: float  # datasheet peaks
    bandwidth_bytes_per_s: float
    names: Sequence[str]  # one per GEMM
    intensity: ArrayLike  # FLOP/byte
    achieved_flop_per_s: ArrayLike
    pruned: ArrayLike  # whether a point belongs to the pruned model
    headroom: float = 1.0  # highest clock over the datasheet's: largest rate over the peak

    @property
    def peaks(self) -> tuple[float, float]:
        """Datasheet peaks, TFLOP/s and TB/s."""
        return self.peak_flop_per_s / 1e12, self.bandwidth_bytes_per_s / 1e12

    @property
    def rates(self) -> str:
        peak, bandwidth = self.peaks
        highest = f" to {peak * self.headroom:,.4g}" if self.headroom > 1.0 else ""
        return f"{peak:,.4g}{highest} TFLOP/s, {bandwidth:.3g} TB/s"

    def columns(self) -> tuple[FloatArray, FloatArray, BoolArray]:
        x, y = (np.asarray(v, dtype=float) for v in (self.intensity, self.achieved_flop_per_s))
        return x, y / 1e12, np.asarray(self.pruned, dtype=bool)

    def ranges(self) -> Limits:
        """Return ranges with all points, and with the ridge of the roof unless it is far from the
        points."""
        x, y, _ = self.columns()
        peak, bandwidth = self.peaks
        ridge = peak / bandwidth
        shown = [*x, ridge] if ridge < 33.0 * x.max() else x
        low, high = float(min(shown)) / 2.2, float(max(shown)) * 2.2
        bottom = min(float(y.min()) / 2, peak, low * bandwidth)
        return low, high, bottom, min(peak * self.headroom, high * bandwidth) * 2.0

    def bend(self, low: float, high: float, headroom: float = 1.0) -> tuple[FloatArray, FloatArray]:
        """Return corners of the roof between two intensities, at the highest clock with the
        headroom: FLOP/byte and TFLOP/s."""
        peak = headroom * self.peaks[0]
        bandwidth = self.peaks[1]
        at = np.array(sorted({low, min(max(peak / bandwidth, low), high), high}))
        return at, np.minimum(peak, at * bandwidth)

    def origins(self) -> dict[int, int]:
        """Return the nearest dense point of the same GEMM by pruned point."""
        x, _, pruned = self.columns()
        dense = np.flatnonzero(~pruned)
        out = {}
        for i in np.flatnonzero(pruned).tolist():
            if same := [j for j in dense.tolist() if self.names[j] == self.names[i]]:
                out[i] = min(same, key=lambda j: abs(float(np.log(x[j] / x[i]))))
        return out


def roofline_figure(
    roofs: Sequence[Roof], *, columns: int | None = None, names: str = ""
) -> Figure:
    """Draw devices side by side on common axes, ``columns`` per row; ``names`` is the legend's
    title."""
    with style.paper_style():
        figure, axes = layout.panel_list(
            len(roofs),
            1.9,
            0.3,
            columns,
            titles=[f"{roof.title}\n{roof.rates}" for roof in roofs],
            x_label="arithmetic intensity (FLOP/byte)",
            y_label="TFLOP/s",
            handles=_roof_handles(roofs),
            legend=names,
            sharex=True,
            sharey=True,
        )
        low, high, bottom, top = zip(*(roof.ranges() for roof in roofs))
        limits = min(low), max(high), min(bottom), max(top)
        for ax, roof in zip(axes, roofs):
            _draw_roof(ax, roof, limits)
        layout.laid_out(figure)  # places of names are known only now
        for ax, roof in zip(axes, roofs):
            _name(ax, roof, limits)
    return figure


def _roof_handles(roofs: Sequence[Roof]) -> list[Line2D]:
    handles = [layout.entry("datasheet", **DATASHEET)]
    if any(np.any(r.pruned) for r in roofs):
        handles = [layout.entry("dense", **DENSE), layout.entry("pruned", **PRUNED), *handles]
    if any(r.headroom > 1.0 for r in roofs):
        handles.append(layout.entry("highest clock", **HIGHEST))
    return handles


def _draw_roof(ax: Axes, roof: Roof, limits: Limits) -> None:
    (x, y, pruned), (low, high, bottom, top) = roof.columns(), limits
    layout.log_axis(ax, "x", 5, (low, high))
    layout.log_axis(ax, "y", 6, (bottom, top))
    highest = roof.bend(low, high, roof.headroom)
    ax.plot(*roof.bend(low, high), **DATASHEET, zorder=2)
    ax.fill_between(*highest, top, color="#F0F0F0", zorder=0)
    if roof.headroom > 1.0:
        ax.plot(*highest, **HIGHEST, zorder=1.9)
    for i, j in roof.origins().items():
        ax.plot(x[[i, j]], y[[i, j]], color=style.GREY, linewidth=0.6, zorder=3)
    ax.plot(x[~pruned], y[~pruned], **DENSE, zorder=4)
    ax.plot(x[pruned], y[pruned], **PRUNED, zorder=5)


def _name(ax: Axes, roof: Roof, limits: Limits) -> None:
    """Write the names of the GEMMs next to their points, clear of the roof."""
    low, high, _, _ = limits
    x, y, pruned = roof.columns()
    named = np.flatnonzero(pruned | (not pruned.any())).tolist()
    names = [roof.names[i] for i in named]
    along = np.geomspace(low, high, 100)
    peak, bandwidth = roof.peaks
    lines = [(along, np.minimum(p, along * bandwidth)) for p in (peak, peak * roof.headroom)]
    layout.write_labels(ax, x[named], y[named], names, [(x, y), *lines])


def rooflines_of(found: Sequence[Explanation]) -> Figure:
    titles, columns = layout.titled(found)
    return roofline_figure([roof_of(e, title) for e, title in zip(found, titles)], columns=columns)


def roof_of(e: Explanation, title: str) -> Roof:
    """Return a panel of the dense and pruned GEMMs of an explanation's layers; the head is far from
    other points."""
    dense, pruned = (gemm_points(w.take(w.layer >= 0), e.hardware) for w in (e.dense, e.pruned))
    return Roof(
        title,
        e.hardware.peak_flop_per_s(e.result.dtype),
        e.hardware.bandwidth_bytes_per_s,
        [name.replace("_", " ") for name in (*dense.role, *pruned.role)],
        [*dense.intensity, *pruned.intensity],
        [*dense.achieved_flop_per_s, *pruned.achieved_flop_per_s],
        [False] * len(dense.role) + [True] * len(pruned.role),
        e.hardware.clock_headroom,
    )


def gemms_of(rows: Sequence[GemmRecord]) -> Figure:
    roofs = []
    for name, own in by_key(rows, lambda r: r.hardware).items():
        first = own[0]
        roofs.append(
            Roof(
                style.device_title(name),
                first.peak_flop_per_s,
                first.bandwidth_bytes_per_s,
                [f"{r.m} × {r.n} × {r.k}" for r in own],
                [r.intensity for r in own],
                [r.flop_per_s for r in own],
                [False] * len(own),
                first.clock_headroom,
            )
        )
    warm = "" if rows[0].cold else " (weights from the L2 cache: the memory slope is not a bound)"
    return roofline_figure(roofs, names=f"M × N × K{warm}")
