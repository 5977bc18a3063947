"""From predictions to the figures that show them; the paper's figures, the command line and the page draw these.

:func:`steps_of` and :func:`roof_of` are panels of an :class:`simulator.predict.table.Explanation`; :func:`speedups_of`
is the figure of a table of records, :func:`fronts_of` that of frontiers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from simulator.figures.roofline import Roof
from simulator.figures.waterfall import Steps
from simulator.predict.gemms import gemm_points

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from simulator.predict.pareto import Front
    from simulator.predict.rows import Record
    from simulator.predict.table import Explanation

SPEEDUP = {"speedup": "speedup", "lower": "speedup_lower", "upper": "speedup_upper"}
"""Columns of figures that show speedups, and the attributes they come from."""


def columns(rows: Iterable[Any], **names: str) -> dict[str, Any]:
    """Attributes of some rows, a list each, under the names that a figure has for them."""
    found = list(rows)
    return {column: [getattr(row, name) for row in found] for column, name in names.items()}


def interval(level: float) -> str:
    """What bars and bands are."""
    return f"{100 * level:.4g} % interval"


def across(devices: int) -> int | None:
    """Panels in a row: the devices, where there are two or three of them."""
    return devices if devices in (2, 3) else None


def speedups_of(records: Sequence[Record], rows: Sequence[str]) -> Figure:
    """Speedup against sparsity with the FLOP and the roofline bound; a label of its row for each record."""
    from simulator.figures.speedup import speedup_figure

    found = columns(records, column="hardware", family="family", sparsity="sparsity", **SPEEDUP)
    bounds = {"FLOP bound": [r.flop_bound for r in records], "roofline bound": [r.roofline_bound for r in records]}
    return speedup_figure(row=rows, bounds=bounds, interval=interval(records[0].level), **found)


def fronts_of(fronts: Sequence[Front], rows: Sequence[str]) -> Figure:
    """Speedup against quality loss; a label of its row for each frontier."""
    from simulator.figures.pareto import pareto_figure

    points = [(label, front.hardware, point) for front, label in zip(fronts, rows) for point in front.points]
    found = columns((p for _, _, p in points), family="family", method="method", loss="loss", **SPEEDUP)
    found |= {"row": [label for label, _, _ in points], "column": [device for _, device, _ in points]}
    axis, level = fronts[0].axis, fronts[0].level
    return pareto_figure(**found, axis=axis.metric, protocol=axis.protocol, interval=interval(level))


def steps_of(e: Explanation, title: str) -> Steps:
    """The loss waterfall of an explanation as a panel.

    >>> from simulator.predict.table import explanations
    >>> (e,) = explanations("llama-3.1-8b", ["h100"], "width", 0.25)
    >>> steps_of(e, "h100").names[-1], bool(steps_of(e, "h100").lower == e.record.speedup_lower)
    ('launch or host time', True)
    """
    (nominal, *steps), r = e.steps, e.record
    names, factors = [s.name for s in steps], [s.factor for s in steps]
    return Steps(title, names, factors, nominal.speedup, r.speedup_lower, r.speedup_upper)


def roof_of(e: Explanation, title: str, *, layers_only: bool = False) -> Roof:
    """Dense and pruned GEMMs of an explanation on its device's datasheet roofline, as a panel; ``layers_only`` leaves
    out the head, which computes one position of a prompt and lies far off the others.
    """
    models = [w.take(w.layer >= 0) if layers_only else w for w in (e.dense, e.pruned)]
    points = [gemm_points(w, e.hardware, e.record.runtime) for w in models]
    names = [name for p in points for name in p.role]
    intensity, achieved = ([v for p in points for v in getattr(p, c)] for c in ("intensity", "achieved_flop_per_s"))
    pruned = [False] * len(points[0].role) + [True] * len(points[1].role)
    peaks = e.hardware.peak_flop_per_s(e.record.dtype), e.hardware.bandwidth_bytes_per_s
    return Roof(title, *peaks, names, intensity, achieved, pruned)
