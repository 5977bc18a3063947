"""Turn predictions into figures and panels, for the paper's figures, the command line and the page.

:func:`steps_of` and :func:`roof_of` return panels of an :class:`~simulator.predict.explain.Explanation`,
:func:`speedups_of` draws results, :func:`fronts_of` frontiers. :func:`placed` returns the panel of each result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from simulator.figures.roofline import Roof
from simulator.figures.titles import device_title, engine_title
from simulator.figures.waterfall import Steps
from simulator.predict.gemms import gemm_points

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from simulator.predict.explain import Explanation
    from simulator.predict.pareto import Front
    from simulator.predict.result import Result

SPEEDUP = {"speedup": "speedup", "lower": "speedup_lower", "upper": "speedup_upper"}
"""Columns of figures that show speedups, and the attributes of a result."""

MOST_ACROSS = 3
"""Maximum number of columns that are named by device and engine; more names would overlap."""


def columns(rows: Iterable[Any], **names: str) -> dict[str, Any]:
    """Return attributes of some rows, one list each, under the figure's names for them."""
    found = list(rows)
    return {column: [getattr(row, name) for row in found] for column, name in names.items()}


def interval(level: float) -> str:
    """Return the label of bars and bands."""
    return f"{100 * level:.4g} % interval"


def device(r: Any) -> str:
    """Return the titles of the device and engine of a result or a frontier."""
    return f"{device_title(r.hardware)}, {engine_title(r.engine)}"


def across(devices: int, engines: int = 1) -> int | None:
    """Return the number of panels per row: the devices, or the engines of one device, if they are two or three."""
    panels = devices if devices > 1 else engines
    return panels if panels in (2, 3) else None


def placed(found: Sequence[Any], rows: Sequence[str]) -> dict[str, list[str]]:
    """Return labels of the row and the column of each result: devices with their engines are columns if they are few;
    else the more numerous of devices and engines are columns, the others rows.

    >>> from simulator.predict.table import table
    >>> few = table(["llama-3.1-8b"], ["h100"], ["depth"], [0.25], engine=["vllm", "hf"])
    >>> placed(few.rows, ["prefill"] * 2)
    {'row': ['prefill', 'prefill'], 'column': ['H100 SXM, vLLM', 'H100 SXM, Transformers (eager)']}
    """
    if len({device(r) for r in found}) <= MOST_ACROSS:
        return {"row": list(rows), "column": [device(r) for r in found]}
    devices, engines = [device_title(r.hardware) for r in found], [engine_title(r.engine) for r in found]
    column, other = (devices, engines) if len(set(devices)) >= len(set(engines)) else (engines, devices)
    return {"row": [f"{row}, {more}" for row, more in zip(rows, other, strict=True)], "column": column}


def speedups_of(results: Sequence[Result], rows: Sequence[str]) -> Figure:
    """Draw speedup against sparsity with the FLOP and the roofline bound; ``rows`` has one label per result."""
    from simulator.figures.speedup import speedup_figure

    found = columns(results, family="family", sparsity="sparsity", **SPEEDUP) | placed(results, rows)
    bounds = {"FLOP bound": [r.flop_bound for r in results], "roofline bound": [r.roofline_bound for r in results]}
    return speedup_figure(bounds=bounds, interval=interval(results[0].level), **found)


def fronts_of(fronts: Sequence[Front], rows: Sequence[str]) -> Figure:
    """Draw speedup against quality loss; ``rows`` has one label per frontier."""
    from simulator.figures.pareto import pareto_figure

    points = [p for f in fronts for p in f.points]
    found = columns(points, family="family", method="method", sparsity="sparsity", loss="loss", **SPEEDUP)
    for name, labels in placed(fronts, rows).items():
        found[name] = [label for front, label in zip(fronts, labels, strict=True) for _ in front.points]
    axis, level = fronts[0].axis, fronts[0].level
    return pareto_figure(**found, axis=axis.metric, protocol=axis.protocol, interval=interval(level))


def steps_of(e: Explanation, title: str) -> Steps:
    """Return the loss waterfall of an explanation as a panel.

    >>> from simulator.predict.explain import explanations
    >>> (e,) = explanations("llama-3.1-8b", ["h100"], "width", 0.25)
    >>> steps_of(e, "h100").names[-1], bool(steps_of(e, "h100").lower == e.result.speedup_lower)
    ('host time', True)
    """
    (nominal, *steps), r = e.steps, e.result
    names, factors = [s.name for s in steps], [s.factor for s in steps]
    notes = [s.note for s in steps]
    return Steps(title, names, factors, nominal.speedup, r.speedup_lower, r.speedup_upper, notes)


def roof_of(e: Explanation, title: str) -> Roof:
    """Return the dense and pruned GEMMs of an explanation's layers on its device's roofline, as a panel. The head is
    omitted: it computes one position of a prompt, far from the other points."""
    models = [w.take(w.layer >= 0) for w in (e.dense, e.pruned)]
    points = [gemm_points(w, e.hardware) for w in models]
    names = [name.replace("_", " ") for p in points for name in p.role]
    intensity, achieved = ([v for p in points for v in getattr(p, c)] for c in ("intensity", "achieved_flop_per_s"))
    pruned = [False] * len(points[0].role) + [True] * len(points[1].role)
    peaks = e.hardware.peak_flop_per_s(e.result.dtype), e.hardware.bandwidth_bytes_per_s
    return Roof(title, *peaks, names, intensity, achieved, pruned, e.hardware.clock_headroom)
