"""Speedup over sparsity: a panel a GPU, a curve a family with its interval, and the bounds of the family in detail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from simulator.explore.chart import (
    SOFT,
    WIDE,
    Chart,
    Frame,
    axes_of,
    axis_names,
    faded,
    legend_px,
    line_of,
    log_axis,
    marker_of,
    message,
)
from simulator.figures.style import BLACK, in_order, label, look
from simulator.units import percent, ratio

if TYPE_CHECKING:
    from simulator.predict.rows import Record

MOST_BANDS = 6
"""Families that are drawn with their interval each; of more, the one in detail alone."""

BOUNDS = (
    ("flop_bound", "FLOP bound", "dot"),
    ("byte_bound", "byte bound", "dashdot"),
    ("roofline_bound", "roofline bound", "dash"),
)


def speedup_chart(records: Sequence[Record], detail: str, at: float, *, most: int = WIDE, refused: str = "") -> Chart:
    """Draw the records of a state.

    Parameters
    ----------
    records : sequence of Record
        One setting; any GPUs, families and sparsities.
    detail : str
        The family with bounds.
    at : float
        The sparsity of the other charts, marked here.
    most : int
        Panels in a row.
    refused : str
        Why there are no records.
    """
    if not records:
        return message(refused or "nothing to draw")
    gpus = list(dict.fromkeys(r.hardware for r in records))
    families = in_order(r.family for r in records)
    keys = [*map(label, families), *(f"{title} ({label(detail)})" for _, title, _ in BOUNDS)]
    frame = Frame.of(gpus, most, 200, bottom=legend_px(keys, len(gpus), most))
    values = [v for r in records for v in (r.speedup, r.speedup_lower, r.speedup_upper)]
    values += [getattr(r, key) for r in records if r.family == detail for key, _, _ in BOUNDS]
    low, high = min([*values, 1.0]) / 1.03, max([*values, 1.0]) * 1.03
    fractions = sorted({r.sparsity for r in records})
    margin = max(0.04 * (fractions[-1] - fractions[0]), 0.02)
    x_axis = {"range": [100 * (fractions[0] - margin), 100 * (fractions[-1] + margin)], "nticks": 9}
    axes = axes_of(frame, x_axis, log_axis(low, high, 6), "removed (%)", "speedup")
    data: list[dict[str, Any]] = []
    shapes: list[dict[str, Any]] = []
    for panel, gpu in enumerate(gpus):
        for family in sorted(families, key=lambda name: name == detail):  # the one in detail on top
            own = sorted((r for r in records if r.hardware == gpu and r.family == family), key=lambda r: r.sparsity)
            if own:
                bands = len(families) <= MOST_BANDS or family == detail
                data += _family(own, panel, bands, family == detail, families.index(family))
        x, y = axis_names(panel)
        one = {"xref": f"{x} domain", "yref": y, "x0": 0, "x1": 1, "y0": 1, "y1": 1}
        shapes.append({"type": "line", "layer": "below", "line": {"color": SOFT, "width": 1}, **one})
        shapes.append(
            {
                "type": "line",
                "xref": x,
                "yref": f"{y} domain",
                "x0": 100 * at,
                "x1": 100 * at,
                "y0": 0,
                "y1": 1,
                "layer": "below",
                "line": {"color": "#c3cad4", "width": 1.5},
            }
        )
    _name_once(data)
    return {"data": data, "layout": frame.layout(axes, shapes=shapes)}


def _family(own: Sequence[Record], panel: int, band: bool, detail: bool, rank: int) -> list[dict[str, Any]]:
    """Band, bounds and curve of one family on one GPU."""
    name = own[0].family
    x, y = axis_names(panel)
    at = [100 * r.sparsity for r in own]
    where = {"xaxis": x, "yaxis": y, "legendgroup": name}
    color = look(name).color
    out: list[dict[str, Any]] = []
    if band and len(own) > 1:
        edge = [r.speedup_upper for r in own] + [r.speedup_lower for r in reversed(own)]
        out.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": at + at[::-1],
                "y": edge,
                "fill": "toself",
                "line": {"width": 0},
                "fillcolor": faded(color, 0.22 if detail else 0.13),
                "hoverinfo": "skip",
                "showlegend": False,
                **where,
            }
        )
    if detail:
        for key, title, dash in BOUNDS:
            mode = "lines" if len(own) > 1 else "markers"
            out.append(
                {
                    "type": "scatter",
                    "mode": mode,
                    "x": at,
                    "y": [getattr(r, key) for r in own],
                    "xaxis": x,
                    "yaxis": y,
                    "line": {"color": BLACK, "dash": dash, "width": 1.2},
                    "marker": {"symbol": "line-ew-open", "color": BLACK, "size": 10},
                    "name": f"{title} ({label(name)})",
                    "legendgroup": key,
                    "legendrank": 2000,
                    "hovertemplate": f"{title} of {label(name)} at %{{x:g}} %: %{{y:.3f}}<extra></extra>",
                }
            )
    whiskers = {
        "type": "data",
        "symmetric": False,
        "array": [r.speedup_upper - r.speedup for r in own],
        "arrayminus": [r.speedup - r.speedup_lower for r in own],
        "color": color,
        "thickness": 1.2,
        "width": 4,
        "visible": len(own) == 1,
    }
    out.append(
        {
            "type": "scatter",
            "mode": "lines+markers" if len(own) > 1 else "markers",
            "x": at,
            "y": [r.speedup for r in own],
            "name": label(name),
            "line": line_of(name, 2.6 if detail else 1.8),
            "marker": marker_of(name, 9 if detail else 7),
            "error_y": whiskers,
            "text": [_told(r) for r in own],
            "hovertemplate": "%{text}<extra></extra>",
            "legendrank": 1000 + rank,
            **where,
        }
    )
    return out


def _told(r: Record) -> str:
    """What a point says when it is pointed at."""
    return (
        f"<b>{label(r.family)}</b> at {percent(r.sparsity)}, {r.hardware}<br>{ratio(r.speedup)} "
        f"({percent(r.level)} interval {ratio(r.speedup_lower)} to {ratio(r.speedup_upper)}), held by {r.limit}<br>"
        f"bounds: FLOP {ratio(r.flop_bound)}, byte {ratio(r.byte_bound)}, roofline {ratio(r.roofline_bound)}"
    )


def _name_once(data: list[dict[str, Any]]) -> None:
    """A legend names each curve once, whatever the number of panels."""
    seen: set[str] = set()
    for trace in data:
        if trace.get("showlegend", True):
            trace["showlegend"] = trace["name"] not in seen
            seen.add(trace["name"])
