"""Draw GEMMs: their rates on the roofline of a device, and staircases: their time rises in steps of
tiles and waves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from simulator.arrays import BoolArray, FloatArray
from simulator.figures import layout, style
from simulator.figures.style import Look
from simulator.prediction.explain import Explanation
from simulator.prediction.gemms import GemmRecord, gemm_points

SAME = 1.01  # points closer than this factor in both directions are one point with a joint label

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

_IDEAL: Look = {"color": style.PALE_INK, "linestyle": (0, (4, 1.5)), "linewidth": 0.8}
_HIGHEST: Look = {**_IDEAL, "linestyle": (0, (1, 1))}
_BAND: Look = {"color": style.BLUE, "alpha": 0.18}
_POINT: Look = {
    "color": style.VERMILLION,
    "marker": "o",
    "markersize": 2.4,
    "linestyle": "none",
    "markerfacecolor": "none",
    "markeredgewidth": 0.6,
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

    def columns(self) -> tuple[FloatArray, FloatArray, BoolArray]:
        x, y = (
            np.asarray(values, dtype=float) for values in (self.intensity, self.achieved_flop_per_s)
        )
        return x, y / 1e12, np.asarray(self.pruned, dtype=bool)

    def ranges(self) -> Limits:
        """Return ranges with all points, and with the ridge of the roof unless it is far from the
        points."""
        x, y, _ = self.columns()
        peak, bandwidth = self.peaks
        ridge = peak / bandwidth
        low = float(x.min()) / 2.2
        high = float(x.max()) * 2.2
        if ridge / 15 < high:
            low = min(low, ridge / 2.2)
            high = max(high, ridge * 2.2)
        bottom = min(float(y.min()) / 2, peak, low * bandwidth)
        return low, high, bottom, min(peak * self.headroom, high * bandwidth) * 2.0

    def bend(self, low: float, high: float, headroom: float = 1.0) -> tuple[FloatArray, FloatArray]:
        """Return corners of the roof between two intensities, at the highest clock with the
        headroom: FLOP/byte and TFLOP/s."""
        peak = headroom * self.peaks[0]
        bandwidth = self.peaks[1]
        at = np.array(sorted({low, min(max(peak / bandwidth, low), high), high}))
        return at, np.minimum(peak, at * bandwidth)

    def drawn(self) -> list[tuple[str, int, int | None]]:
        """Return name and index of every drawn point, and for a pruned point the index of the
        nearest dense point. GEMMs whose points coincide have a joint name."""
        x, _, pruned = self.columns()
        out: list[tuple[str, int, int | None]] = []
        for name, points in self.named():
            for i in points:
                dense = [j for j in points if pruned[i] and not pruned[j]]
                origin = min(dense, key=lambda j: abs(float(np.log(x[j] / x[i]))), default=None)
                out.append((name, i, origin))
        return out

    def named(self) -> list[tuple[str, list[int]]]:
        """Return the joint names and the points of GEMMs."""
        x, y, pruned = self.columns()
        logs = np.log(np.stack([x, y], axis=1))
        points: dict[str, list[int]] = {}
        for i, name in enumerate(self.names):
            points.setdefault(name, []).append(i)
        groups: list[list[str]] = []
        for name in points:
            for group in groups:
                these = points[name]
                first = points[group[0]]
                same = pruned[these].tolist() == pruned[first].tolist()
                if same and np.abs(logs[these] - logs[first]).max() < np.log(SAME):
                    group.append(name)
                    break
            else:
                groups.append([name])
        return [(", ".join(group), points[group[0]]) for group in groups]


def roofline_figure(
    roofs: Sequence[Roof], *, columns: int | None = None, names: str = ""
) -> Figure:
    """Draw devices side by side on common axes, ``columns`` per row; ``names`` is the legend's
    title."""
    columns = layout.in_a_row(len(roofs), columns)
    width = layout.width_of(columns)
    with style.paper_style():
        titles = [layout.wrapped(roof.title, (width - 0.4) / columns) for roof in roofs]
        panel_in = 1.9 + layout.title_in(titles)
        figure, axes, _ = layout.panel_list(
            len(roofs), panel_in, 0.3, columns, handles=_roof_handles(roofs), legend=names
        )
        low, high, bottom, top = zip(*(roof.ranges() for roof in roofs))
        limits = min(low), max(high), min(bottom), max(top)
        for i, (ax, roof, title) in enumerate(zip(axes, roofs, titles)):
            _draw_roof(ax, roof, limits)
            ax.set_title(title, pad=5)
            ax.tick_params(labelleft=i % columns == 0, labelbottom=i + columns >= len(roofs))
            ax.set_ylabel("TFLOP/s" if i % columns == 0 else "")
            if i + columns >= len(roofs):
                ax.set_xlabel("arithmetic intensity (FLOP/byte)")
        # places of names, and the slope of a roof on the page, are known only now
        layout.laid_out(figure)
        for ax, roof in zip(axes, roofs):
            _name(ax, roof, limits)
    return figure


def _roof_handles(roofs: Sequence[Roof]) -> list[Line2D]:
    handles = [layout.entry("datasheet", **DATASHEET)]
    if any(np.any(r.pruned) for r in roofs):
        handles.insert(0, layout.entry("pruned", **PRUNED))
        handles.insert(0, layout.entry("dense", **DENSE))
    if any(r.headroom > 1.0 for r in roofs):
        handles.append(layout.entry("highest clock", **HIGHEST))
    return handles


def _draw_roof(ax: Axes, roof: Roof, limits: Limits) -> None:
    (x, y, pruned), (low, high, bottom, top) = roof.columns(), limits
    ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(bottom, top))
    highest = roof.bend(low, high, roof.headroom)
    ax.plot(*roof.bend(low, high), **DATASHEET, zorder=2)
    ax.fill_between(*highest, top, color="#F0F0F0", zorder=0)
    if roof.headroom > 1.0:
        ax.plot(*highest, **HIGHEST, zorder=1.9)
    for _, i, origin in roof.drawn():
        if origin is not None:
            ax.plot([x[origin], x[i]], [y[origin], y[i]], color=style.GREY, linewidth=0.6, zorder=3)
        ax.plot([x[i]], [y[i]], **(PRUNED if pruned[i] else DENSE), zorder=5 if pruned[i] else 4)
    layout.log_axis(ax.xaxis, low, high, 5)
    layout.log_axis(ax.yaxis, bottom, top, 6)


def _name(ax: Axes, roof: Roof, limits: Limits) -> None:
    """Write the rates of a roof above it, where no point can be, and the names of the GEMMs next to
    their points."""
    low, high, _, top = limits
    _name_rates(ax, roof, low, high)
    x, y, pruned = roof.columns()
    named = {i: name for name, i, _ in roof.drawn() if pruned[i] or not pruned.any()}
    points = list(named)
    clear_of = [(x, y), *_roof_lines(roof, np.geomspace(low, high, 100), top)]
    layout.write_labels(ax, x[points], y[points], list(named.values()), clear_of)


def _roof_lines(roof: Roof, x: FloatArray, top: float) -> list[tuple[FloatArray, FloatArray]]:
    """Return the roof at the datasheet's rate, and lines that fill the room above the highest."""
    peak, bandwidth = roof.peaks
    highest = np.minimum(peak * roof.headroom, x * bandwidth)
    rises = np.geomspace(1.0, top / highest.min(), 60)
    above = [(x, np.minimum(highest * rise, top)) for rise in rises]
    return [(x, np.minimum(peak, x * bandwidth)), *above]


def _name_rates(ax: Axes, roof: Roof, low: float, high: float) -> None:
    text: Look = {"textcoords": "offset points", "va": "bottom"}
    peak, bandwidth = roof.peaks
    ridge = peak / bandwidth
    if high > ridge:
        rates = f"{peak:,.4g}" + (f" to {peak * roof.headroom:,.4g}" if roof.headroom > 1 else "")
        end = high, roof.bend(low, high, roof.headroom)[1][-1]
        ax.annotate(f"{rates} TFLOP/s", end, xytext=(-2, 2.5), ha="right", **text)
    if low < ridge:
        middle = float(np.sqrt(low * min(ridge, high)))
        ends = ax.transData.transform([(x, x * bandwidth) for x in (low, middle)])
        across, up = ends[1] - ends[0]
        text |= {"rotation": float(np.degrees(np.arctan2(up, across))), "rotation_mode": "anchor"}
        place = middle, middle * bandwidth
        ax.annotate(f"{bandwidth:.3g} TB/s", place, xytext=(-2.5, 2.5), ha="center", **text)


def rooflines_of(found: Sequence[Explanation]) -> Figure:
    titles, columns = layout.titled(found)
    return roofline_figure([roof_of(e, title) for e, title in zip(found, titles)], columns=columns)


def roof_of(e: Explanation, title: str) -> Roof:
    """Return a panel of the dense and pruned GEMMs of an explanation's layers; the head is far from
    other points."""
    models = [w.take(w.layer >= 0) for w in (e.dense, e.pruned)]
    points = [gemm_points(w, e.hardware) for w in models]
    names = [name.replace("_", " ") for p in points for name in p.role]
    intensity, achieved = (
        [v for p in points for v in getattr(p, c)] for c in ("intensity", "achieved_flop_per_s")
    )
    pruned = [False] * len(points[0].role) + [True] * len(points[1].role)
    peaks = e.hardware.peak_flop_per_s(e.result.dtype), e.hardware.bandwidth_bytes_per_s
    return Roof(title, *peaks, names, intensity, achieved, pruned, e.hardware.clock_headroom)


def gemms_of(rows: Sequence[GemmRecord]) -> Figure:
    roofs = []
    for name in dict.fromkeys(r.hardware for r in rows):
        own = [r for r in rows if r.hardware == name]
        names = [f"{r.m} × {r.n} × {r.k}" for r in own]
        first = own[0]
        points = [r.intensity for r in own], [r.flop_per_s for r in own], [False] * len(own)
        peaks = first.peak_flop_per_s, first.bandwidth_bytes_per_s
        roofs.append(
            Roof(style.device_title(name), *peaks, names, *points, headroom=first.clock_headroom)
        )
    warm = "" if rows[0].cold else " (weights from the L2 cache: the memory slope is not a bound)"
    return roofline_figure(roofs, names=f"M × N × K{warm}")


@dataclass(frozen=True)
class Stairs:
    row: str  # kind of staircase
    column: str  # the device
    x_label: str
    note: str  # fixed sizes, written into the panel
    y_label: str
    x: ArrayLike  # sizes
    # predicted, lower, upper, ideal (datasheet roofline), highest (clock, if above)
    values: Mapping[str, FloatArray]
    measured_x: ArrayLike = ()
    measured: ArrayLike = ()


def staircase_figure(panels: Sequence[Stairs], *, interval: str) -> Figure:
    """Draw staircases, a column per device and a row per kind, in the order in which their labels
    first occur."""
    where = layout.fitted(
        layout.arrays({name: [getattr(p, name) for p in panels] for name in ("row", "column")})
    )
    panels = [replace(p, row=r, column=c) for p, r, c in zip(panels, *where.values())]
    width = layout.width_of(len(set(where["column"])))
    with style.paper_style():
        handles: list[Any] = [
            layout.entry("predicted", color=style.BLUE, linewidth=1.0),
            Patch(**_BAND, label=interval),
            layout.entry("datasheet roofline", **_IDEAL),
        ]
        if any("highest" in p.values for p in panels):
            handles.append(layout.entry("at the highest clock", **_HIGHEST))
        if any(np.size(p.measured) for p in panels):
            handles.append(layout.entry("measured", **_POINT))
        figure, axes = layout.panel_grid(where, 1.6, 0.24, width_in=width, handles=handles)
        for p in panels:
            ax = axes[p.row, p.column]
            _draw_stairs(ax, p)
            ax.set_xlabel(p.x_label, labelpad=2)
            ax.set_ylabel(p.y_label if p.column == panels[0].column else "")
        figure.align_ylabels()
        return layout.laid_out(figure)


def _draw_stairs(ax: Axes, p: Stairs) -> None:
    x = np.asarray(p.x, dtype=float)
    values = p.values
    top = 1.05 * float(max(np.max(v) for v in (*values.values(), p.measured) if np.size(v)))
    ax.fill_between(x, values["lower"], values["upper"], **_BAND, zorder=2)
    ax.plot(x, values["ideal"], **_IDEAL, zorder=2.5)
    if "highest" in values:
        ax.plot(x, values["highest"], **_HIGHEST, zorder=2.5)
    ax.plot(x, values["predicted"], color=style.BLUE, linewidth=0.9, zorder=3)
    if np.size(p.measured):
        ax.plot(p.measured_x, p.measured, **_POINT, zorder=4)
    ax.set(
        xlim=(min(0.0, float(x[0])) if x[0] < 0.1 * x[-1] else float(x[0]), float(x[-1]) * 1.02),
        ylim=(0.0, top),
    )
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 2.5, 4, 5, 10]))
    ax.yaxis.set_major_locator(MaxNLocator(4))
    ax.text(
        0.97,
        0.05,
        p.note,
        color=style.PALE_INK,
        transform=ax.transAxes,
        ha="right",
        va="bottom",
        zorder=5,
    )
