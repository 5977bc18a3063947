"""Turn predictions into figures and panels, for the paper's figures, the command line and the page.

:func:`steps_of` and :func:`roof_of` return panels of an :class:`~simulator.prediction.explain.Explanation`,
:func:`speedups_of` draws results, :func:`fronts_of` frontiers, :func:`services_of` services. :func:`placed` returns the
panel of each result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from simulator.figures.roofline import Roof
from simulator.figures.style import COLORS, DENSE, STYLES, Style, label, style_of
from simulator.figures.throughput import Curve, Throughput
from simulator.figures.titles import device_title, engine_title, model_title
from simulator.figures.waterfall import Steps
from simulator.prediction.gemms import gemm_points
from simulator.prediction.scenario import batch_name
from simulator.prediction.sentences import LIMITS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from simulator.prediction.explain import Explanation
    from simulator.prediction.pareto import Front
    from simulator.prediction.result import Result
    from simulator.prediction.service import OperatingPoint, Service

SPEEDUP = {"speedup": "speedup", "lower": "speedup_lower", "upper": "speedup_upper"}
"""Columns of figures that show speedups, and the attributes of a result."""

MOST_VALUES = 5
"""Maximum number of values of a field other than the axis: each has a row of panels."""

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


def setting_label(r: Any) -> str:
    """Return a short label of phase (with the new tokens of generate or serve) and batch."""
    return f"{r.phase}{f' {r.new_tokens}' if r.new_tokens else ''}, {batch_name(r.phase)} {r.batch}"


def across(devices: int, engines: int = 1) -> int | None:
    """Return the number of panels per row: the devices, or the engines of one device, if they are two or three."""
    panels = devices if devices > 1 else engines
    return panels if panels in (2, 3) else None


def placed(found: Sequence[Any], rows: Sequence[str]) -> dict[str, list[str]]:
    """Return labels of the row and the column of each result: devices with their engines are columns if they are few;
    else the more numerous of devices and engines are columns, the others rows.
    """
    if len({device(r) for r in found}) <= MOST_ACROSS:
        return {"row": list(rows), "column": [device(r) for r in found]}
    devices, engines = [device_title(r.hardware) for r in found], [engine_title(r.engine) for r in found]
    column, other = (devices, engines) if len(set(devices)) >= len(set(engines)) else (engines, devices)
    return {"row": [f"{row}, {more}" for row, more in zip(rows, other, strict=True)], "column": column}


def speedups_of(results: Sequence[Result]) -> Figure:
    """Draw speedups over the field that varies: batch, length or sparsity, the one with the most values if several vary
    (each setting of the others has panels of its own)."""
    from simulator.figures.speedup import speedup_figure

    axis = varying(results)
    panels = ["batch", "seq", *(["sparsity"] if _several_sparsities(results) else [])]
    results, omitted = _of_few_settings(results, [field for field in panels if field != axis])
    models = [model_title(name) for name in dict.fromkeys(r.model for r in results)]
    note = ", ".join(filter(None, [*(models if len(models) == 1 else ()), omitted]))
    found = columns(results, at=axis, **SPEEDUP) | placed(
        results, [_setting(r, results, axis, panels) for r in results]
    )
    found["candidate"] = names = _candidates(results, axis, panels)
    bounds = {"FLOP bound": [r.flop_bound for r in results], "roofline bound": [r.roofline_bound for r in results]}
    serves = axis == "batch" and all(r.phase == "serve" for r in results)
    return speedup_figure(
        bounds=bounds,
        axis=axis,
        looks=styles_of(dict(zip(names, (r.family for r in results)))),
        interval=interval(results[0].level),
        x_label=batch_name("serve") if serves else "",
        note=note,
        **found,
    )


def varying(results: Sequence[Result]) -> str:
    """Return the field over which speedups are drawn: that of batch, seq and sparsity in which the results of one
    pruning differ most; sparsity if they differ in none.
    """
    counts = {axis: len(_values(results, axis)) for axis in ("batch", "seq", "sparsity")}
    most = max(counts.values())
    return "sparsity" if most == 1 else next(axis for axis, count in counts.items() if count == most)


def _values(results: Sequence[Result], axis: str) -> list[float]:
    """Return the values of a field over which a pruning varies, if any does; else one value."""
    of_name: dict[str, dict[float, None]] = {}
    for r in results:
        of_name.setdefault(_name(r), {})[getattr(r, axis)] = None
    several = [values for values in of_name.values() if len(values) > 1] or list(of_name.values())[:1]
    return sorted({value for values in several for value in values})


def _name(r: Result) -> str:
    """Return the title of a pruning without its sparsity."""
    return r.pruned or r.method or f"{label(r.family)}{r.options and f' ({r.options})'}"


def _several_sparsities(results: Sequence[Result]) -> bool:
    """Return whether a pruning has several sparsities in one scenario, each of which is another candidate: that of a
    budget follows from the length, and prunings as texts have one each."""
    found: dict[tuple[object, ...], set[float]] = {}
    for r in results:
        place = (r.model, r.hardware, r.engine, r.phase, r.batch, r.seq, r.new_tokens)
        found.setdefault((_name(r), *place), set()).add(r.sparsity)
    return any(len(sparsities) > 1 for sparsities in found.values())


def _candidates(results: Sequence[Result], axis: str, panels: Sequence[str]) -> list[str]:
    """Return the titles of curves, with the sparsity unless that is the axis, names the panel, or varies."""
    names = [_name(r) for r in results]
    if axis == "sparsity" or ("sparsity" in panels and len(_values(results, "sparsity")) > 1):
        return names
    found: dict[str, set[float]] = {}
    for name, r in zip(names, results):
        found.setdefault(name, set()).add(r.sparsity)
    return [f"{n}, {100 * r.sparsity:.3g} %" if len(found[n]) == 1 else n for n, r in zip(names, results)]


def _setting(r: Result, results: Sequence[Result], axis: str, panels: Sequence[str]) -> str:
    """Return the label of a row of panels: the phase, and fields other than the axis that vary."""
    parts = [model_title(r.model)] if len({one.model for one in results}) > 1 else []
    parts.append(f"{r.phase} {r.new_tokens}" if r.new_tokens else r.phase)
    if axis != "batch":
        parts.append(f"{batch_name(r.phase)} {r.batch}")
    if axis != "seq" and len({one.seq for one in results}) > 1:
        parts.append(f"seq {r.seq}")
    if axis != "sparsity" and "sparsity" in panels and len(_values(results, "sparsity")) > 1:
        parts.append(f"{100 * r.sparsity:.3g} % removed")
    return ", ".join(parts)


def _of_few_settings(results: Sequence[Result], others: Sequence[str]) -> tuple[Sequence[Result], str]:
    """Return the results of at most :data:`MOST_VALUES` values of each of some fields, the first, the last and some
    between, and a note on omitted values."""
    notes = []
    for other in others:
        values = _values(results, other)
        if len(values) <= MOST_VALUES:
            continue
        few = {values[round(i * (len(values) - 1) / (MOST_VALUES - 1))] for i in range(MOST_VALUES)}
        results = [r for r in results if getattr(r, other) in few]
        notes.append(f"{MOST_VALUES} of {len(values)} values of {other} drawn")
    return results, ", ".join(notes)


def styles_of(families: Mapping[str, str]) -> dict[str, Style]:
    """Return styles of candidates, given their families: the first of a family has the family's style, others have
    colours and markers that no candidate has.
    """
    first = {family: name for name, family in reversed(list(families.items())) if family in STYLES}
    styles = {name: STYLES[family] for family, name in first.items()}
    used = {(style.color, style.marker) for style in styles.values()}
    colors = {color for color, _ in used}
    free = [Style(c, m) for c, m in zip(COLORS * 3, "osD^vPXdh*<>p" * 2) if (c, m) not in used]
    free.sort(key=lambda style: style.color in colors)
    return {name: styles.get(name) or free.pop(0) if free else style_of(name) for name in families}


def services_of(services: Sequence[Service]) -> Figure:
    """Draw the throughput of services over their time per token, one panel each."""
    from simulator.figures.throughput import throughput_figure

    engines, devices = (len({getattr(s.points[0], name) for s in services}) for name in ("engine", "hardware"))
    first = services[0].points[0]
    model = "" if len(services) > 1 else f"{model_title(first.model)}, "
    many = f"{first.devices} × " if first.devices > 1 else ""
    panels = [throughput_of(s, f"{model}{many}{device(s.points[0])}") for s in services]
    return throughput_figure(panels, interval=interval(first.level), columns=across(devices, engines))


def throughput_of(service: Service, title: str) -> Throughput:
    """Return the curves of a service as a panel; a model that does not fit has none."""
    groups: dict[str, list[OperatingPoint]] = {}
    for point in service.curve:
        groups.setdefault(point.name, []).append(point)
    styles = {DENSE.label: DENSE, **styles_of({p.name: p.family for (p, *_) in groups.values() if p.pruning})}
    within = {p.name: (p.tpot_s, p.tokens_per_s) for p in service.kinds.get(LIMITS, ()) if p.concurrency}
    curves = []
    for name, points in groups.items():
        tpot, rate = (
            np.array([[getattr(p, key) for p in points] for key in keys], dtype=float)
            for keys in (
                ("tpot_s", "tpot_lower", "tpot_upper"),
                ("tokens_per_s", "tokens_per_s_lower", "tokens_per_s_upper"),
            )
        )
        curves.append(Curve(name, styles[name], tpot, rate, points[-1].concurrency, within.get(name)))
    return Throughput(title, curves, service.limits.tpot_s)


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
    """Return the loss waterfall of an explanation as a panel."""
    (nominal, *steps), r = e.steps, e.result
    names, factors = [s.name for s in steps], [s.factor for s in steps]
    notes = [s.note for s in steps]
    return Steps(title, names, factors, nominal.speedup, r.speedup_lower, r.speedup_upper, notes)


def waterfalls_of(found: Sequence[Explanation]) -> Figure:
    """Draw the waterfalls of explanations, one panel each."""
    from simulator.figures.waterfall import waterfall_figure

    lengths = len({e.result.seq for e in found}) > 1
    panels = [steps_of(e, f"{title}{f', seq {e.result.seq}' if lengths else ''}") for e, title in _titled(found)]
    return waterfall_figure(panels, columns=_side_by_side(found))


def rooflines_of(found: Sequence[Explanation]) -> Figure:
    """Draw dense and pruned GEMMs of explanations on the roofline, one panel each."""
    from simulator.figures.roofline import roofline_figure

    return roofline_figure([roof_of(e, title) for e, title in _titled(found)], columns=_side_by_side(found))


def _titled(found: Sequence[Explanation]) -> list[tuple[Explanation, str]]:
    """Return explanations with the titles of their panels: device and engine, and what varies of the request."""
    several = len({(e.result.phase, e.result.batch, e.result.seq) for e in found}) > 1
    return [(e, device(e.result) + (f"\n{setting_label(e.result)}" if several else "")) for e in found]


def _side_by_side(found: Sequence[Explanation]) -> int | None:
    devices, engines = (len({getattr(e.result, name) for e in found}) for name in ("hardware", "engine"))
    return across(devices, engines)


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
