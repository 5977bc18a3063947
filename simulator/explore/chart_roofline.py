"""The roofline: a panel a GPU, the dense model's GEMMs hollow, the pruned one's filled, a line from where each was to where it went."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from simulator.explore.chart import (
    INK,
    MARKERS,
    PAPER,
    SMALL,
    SOFT,
    WIDE,
    Chart,
    Frame,
    axis_names,
    key,
    legend_px,
    log_axis,
    message,
    one_axes,
)
from simulator.figures.panels import roof_of
from simulator.figures.roofline import CYCLE, Roof, merged, origin_of
from simulator.units import rate

if TYPE_CHECKING:
    from simulator.predict.table import Explanation

_KINDS = ("dense (hollow)", "pruned (filled)", "datasheet roofline")


def roofline_chart(details: Sequence[Explanation], *, most: int = WIDE, refused: str = "") -> Chart:
    """Draw the GEMMs of explanations; those that coincide in every panel share a marker and a name."""
    if not details:
        return message(refused or "nothing to draw")
    roofs = [roof_of(e, e.record.hardware, layers_only=True) for e in details]
    groups = merged(roofs)
    room = legend_px([*groups, *_KINDS], len(roofs), most)
    frame = Frame.of([r.title for r in roofs], most, 200, bottom=room, across=60, left=58)
    axes: dict[str, Any] = {}
    data: list[dict[str, Any]] = []
    for panel, roof in enumerate(roofs):
        (low, high), (bottom, top) = _ranges(roof)
        axes |= one_axes(
            panel,
            frame,
            log_axis(low, high, 5),
            log_axis(bottom, top, 6),
            "arithmetic intensity (FLOP/byte)",
            "TFLOP/s",
        )
        data += [*_roof(roof, panel, low, high, top / (top / bottom) ** 0.03), *_points(roof, panel, groups)]
    data += _keys(groups)
    return {"data": data, "layout": frame.layout(axes)}


def _ranges(roof: Roof) -> tuple[tuple[float, float], tuple[float, float]]:
    """Axes that hold the points, and the bend of the roof unless it is far off."""
    x, y = np.asarray(roof.intensity, dtype=float), np.asarray(roof.achieved_flop_per_s, dtype=float) / 1e12
    peak, bandwidth = roof.peak_flop_per_s / 1e12, roof.bandwidth_bytes_per_s / 1e12
    ridge = peak / bandwidth
    low, high = float(x.min()) / 2.2, float(x.max()) * 2.2
    if ridge / 15 < high:
        low, high = min(low, ridge / 2.2), max(high, ridge * 2.2)
    return (low, high), (min(float(y.min()) / 2, peak, low * bandwidth), min(peak, high * bandwidth) * 2.2)


def _roof(roof: Roof, panel: int, low: float, high: float, top: float) -> list[dict[str, Any]]:
    """The roof, with its peaks written in the corner above it, where no GEMM can be."""
    x, y = axis_names(panel)
    peak, bandwidth = roof.peak_flop_per_s / 1e12, roof.bandwidth_bytes_per_s / 1e12
    at = sorted({low, min(max(peak / bandwidth, low), high), high})
    words = f"{rate(roof.peak_flop_per_s, 'FLOP/s')}, {rate(roof.bandwidth_bytes_per_s, 'B/s')}"
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "x": at,
            "y": [min(peak, v * bandwidth) for v in at],
            "xaxis": x,
            "yaxis": y,
            "line": {"color": INK, "width": 1.6},
            "name": _KINDS[2],
            "legendgroup": "roof",
            "showlegend": panel == 0,
            "legendrank": 3000,
            "hovertemplate": f"datasheet: {words}<extra></extra>",
        },
        {
            "type": "scatter",
            "mode": "text",
            "x": [low],
            "y": [top],
            "text": [f" {words}"],
            "xaxis": x,
            "yaxis": y,
            "textposition": "bottom right",
            "textfont": {"size": SMALL, "color": SOFT},
            "hoverinfo": "skip",
            "showlegend": False,
        },
    ]


def _points(roof: Roof, panel: int, groups: dict[str, tuple[str, ...]]) -> list[dict[str, Any]]:
    """All GEMMs of a panel as three traces: lines, hollow markers, filled ones."""
    x, y = axis_names(panel)
    rate_t = np.asarray(roof.achieved_flop_per_s, dtype=float) / 1e12
    at = np.asarray(roof.intensity, dtype=float)
    lines: tuple[list[float | None], list[float | None]] = ([], [])
    points: dict[bool, list[tuple[float, float, str, str, str]]] = {False: [], True: []}
    for i, (title, names) in enumerate(groups.items()):
        color, marker = CYCLE[i % len(CYCLE)]
        rows = [j for j, name in enumerate(roof.names) if name == names[0]]
        dense = [j for j in rows if not np.asarray(roof.pruned)[j]]
        for j in rows:
            pruned = bool(np.asarray(roof.pruned)[j])
            what = "pruned" if pruned else "dense"
            said = f"<b>{title}</b>, {what}<br>{at[j]:.4g} FLOP/byte, {rate_t[j]:.4g} TFLOP/s"
            points[pruned].append((float(at[j]), float(rate_t[j]), color, MARKERS[marker], said))
            if pruned and dense:
                origin = origin_of(at, dense, j)
                lines[0].extend([float(at[origin]), float(at[j]), None])
                lines[1].extend([float(rate_t[origin]), float(rate_t[j]), None])
    where = {"xaxis": x, "yaxis": y, "showlegend": False}
    thin = {"line": {"color": SOFT, "width": 1}, "hoverinfo": "skip"}
    out: list[dict[str, Any]] = [{"type": "scatter", "mode": "lines", "x": lines[0], "y": lines[1], **thin, **where}]
    for pruned, found in points.items():
        colors = [p[2] for p in found]
        out.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [p[0] for p in found],
                "y": [p[1] for p in found],
                "marker": {
                    "symbol": [p[3] for p in found],
                    "size": 9,
                    "color": colors if pruned else PAPER,
                    "line": {"color": colors, "width": 1.6},
                },
                "text": [p[4] for p in found],
                "hovertemplate": "%{text}<extra></extra>",
                "name": "pruned" if pruned else "dense",
                **where,
            }
        )
    return out


def _keys(groups: dict[str, tuple[str, ...]]) -> list[dict[str, Any]]:
    """Entries of the legend, drawn nowhere."""
    out = []
    for i, title in enumerate(groups):
        color, marker = CYCLE[i % len(CYCLE)]
        out.append(key(title, {"symbol": MARKERS[marker], "color": color, "size": 8}, 1000 + i))
    out.append(
        key(_KINDS[0], {"symbol": "circle", "color": PAPER, "size": 8, "line": {"color": SOFT, "width": 1.6}}, 2000)
    )
    out.append(key(_KINDS[1], {"symbol": "circle", "color": SOFT, "size": 8}, 2001))
    return out
