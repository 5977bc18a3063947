"""The figures of a paper about a model: what each needs as arrays, its name and its caption.

Use :func:`draw` for one figure of :data:`FIGURES`; each states in its caption what it shows and with which settings. Figures see arrays
(modules ``figure_*``); this module asks the simulator for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from simulator.errors import InputError, unknown
from simulator.figures.paper_gemms import scatter, staircase
from simulator.figures.paper_parts import (
    Made,
    NothingToDraw,
    Paper,
    columns_of,
    interval_text,
    paper,
    percents,
    setting_text,
    where_text,
)
from simulator.figures.paper_taxonomy import taxonomy
from simulator.figures.style import label
from simulator.models.library import load_model
from simulator.predict.table import explanations, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FIGURES", "MEASURED", "Drawn", "NothingToDraw", "Paper", "draw", "paper"]

SPARSITIES = (0.1, 0.25, 0.5)
MAP_SPARSITY = 0.5
"""Sparsity at which families are compared: one that all of them can take (2:4 takes no other)."""

ROOFLINE_FAMILY, ROOFLINE_SPARSITY = "width", 0.3
ROOFLINE_CASES = (("prefill", 1), ("decode", 64))
WATERFALL_CASES = (
    ("width", 0.3, "prefill", 1),
    ("semi_structured", 0.5, "decode", 1),
    ("dynamic_depth", 0.5, "decode", 8),
)
"""Family, sparsity, phase and batch of each row of waterfalls: what rounding, kernels and routers cost."""

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
LEAST_BOUND = 1.05
"""A roofline bound below this promises nothing that an efficiency could be measured by."""

QUALITY_MODEL = "llama-2-7b"
"""Model of the frontier where the paper's own has quality of fewer than two families."""


@dataclass(frozen=True)
class Drawn:
    """A figure with its name, its caption, and what a person should know (one line each)."""

    name: str
    figure: Figure
    caption: str
    notes: tuple[str, ...] = ()


def draw(name: str, about: Paper) -> Drawn:
    """Draw one figure.

    Parameters
    ----------
    name : str
        A key of :data:`FIGURES`.
    about : Paper

    Returns
    -------
    Drawn

    Raises
    ------
    NothingToDraw
        When the figure's data are not at hand.
    InputError
        For an unknown name.
    """
    if name not in FIGURES:
        raise unknown("figure", name, FIGURES)
    figure, caption, notes = FIGURES[name](about)
    return Drawn(name, figure, caption, notes)


# -- figures of predictions ---------------------------------------------------------------------------------------------------------


def _roofline(p: Paper) -> Made:
    from simulator.figures.panels import roof_of
    from simulator.figures.roofline import roofline_figure

    roofs = [
        roof_of(e, f"{e.record.hardware}\n{where_text(e.record)}", layers_only=True)
        for phase, batch in ROOFLINE_CASES
        for e in explanations(
            p.model, p.devices, ROOFLINE_FAMILY, ROOFLINE_SPARSITY, [phase], [batch], [p.seq], setting=p.setting
        )
    ]
    caption = (
        f"GEMMs of the layers on the datasheet roofline, dense (hollow) and with {100 * ROOFLINE_SPARSITY:.0f} % of the width "
        f"pruned (filled), at their predicted rates: {setting_text(p)}, {p.seq} tokens. Pruning the width moves every point to less work "
        f"per byte."
    )
    return roofline_figure(roofs, columns=columns_of(p)), caption, ()


def _speedup(p: Paper) -> Made:
    from simulator.figures.speedup import speedup_figure

    found = table([p.model], p.devices, ["all"], SPARSITIES, ["prefill", "decode"], [1, 64], [p.seq], setting=p.setting)
    records = found.records
    figure = speedup_figure(
        [where_text(r) for r in records],
        [r.hardware for r in records],
        [r.family for r in records],
        [r.sparsity for r in records],
        [r.speedup for r in records],
        [r.speedup_lower for r in records],
        [r.speedup_upper for r in records],
        {"FLOP bound": [r.flop_bound for r in records], "roofline bound": [r.roofline_bound for r in records]},
        interval=interval_text(p),
    )
    caption = (
        f"Predicted speedup of every family at {percents(SPARSITIES)} sparsity with its {interval_text(p)} and its bounds: "
        f"{setting_text(p)}, prompt or cache of {p.seq} tokens. A dot left of 1 is slower than the dense model."
    )
    return figure, caption, found.notes


def _efficiency(p: Paper) -> Made:
    from simulator.figures.efficiency import efficiency_figure

    found = table(
        [p.model], p.devices, ["all"], [MAP_SPARSITY], ["prefill", "decode"], BATCHES, [p.seq], setting=p.setting
    )
    records = [r for r in found if r.family != "unstructured"]
    shares = [r.efficiency if r.roofline_bound >= LEAST_BOUND else float("nan") for r in records]
    figure = efficiency_figure(
        [r.phase for r in records],
        [r.hardware for r in records],
        [r.family for r in records],
        [r.batch for r in records],
        shares,
    )
    caption = (
        f"Efficiency to the bound, (speedup - 1) / (roofline bound - 1), by family and batch at {100 * MAP_SPARSITY:.0f} % sparsity: "
        f"{setting_text(p)}, {p.seq} tokens a sequence. 1: all that the datasheet roofline grants; 0: no faster than dense; negative: "
        f"slower; above 1: what remains runs at a better rate than what was removed; a dash: the bound promises less than "
        f"{100 * (LEAST_BOUND - 1):.0f} %."
    )
    return figure, caption, ()


def _waterfall(p: Paper) -> Made:
    from simulator.figures.panels import steps_of
    from simulator.figures.waterfall import waterfall_figure

    panels, notes = [], []
    for family, sparsity, phase, batch in WATERFALL_CASES:
        try:
            found = explanations(p.model, p.devices, family, sparsity, [phase], [batch], [p.seq], setting=p.setting)
        except InputError as error:  # no sparse tensor cores
            notes.append(f"waterfall of {family}: {error}")
            continue
        panels += [
            steps_of(e, f"{e.record.hardware}\n{label(family)}, {100 * sparsity:.0f} %\n{where_text(e.record)}")
            for e in found
        ]
    caption = (
        f"Where the promise of 1/(1 - s) goes: {setting_text(p)}, {p.seq} tokens. Each step multiplies the speedup before it, orange for "
        f"a loss, hatched green for a gain; the last bar is the prediction with its {interval_text(p)}."
    )
    return waterfall_figure(panels, columns=columns_of(p)), caption, tuple(notes)


def _crossover(p: Paper) -> Made:
    from simulator.figures.crossover import crossover_figure
    from simulator.predict.crossover import fastest

    found = table(
        [p.model], p.devices, ["all"], [MAP_SPARSITY], ["prefill", "decode"], BATCHES, LENGTHS, setting=p.setting
    )
    records = found.records
    cells: dict[tuple[str, str, int, int], int] = {}
    where = [cells.setdefault((r.phase, r.hardware, r.batch, r.seq), len(cells)) for r in records]
    won = fastest(
        where,
        [r.family for r in records],
        [r.speedup for r in records],
        [r.speedup_lower for r in records],
        [r.speedup_upper for r in records],
    )
    best = [records[i] for i in won.row]
    figure = crossover_figure(
        [r.phase for r in best],
        [r.hardware for r in best],
        [r.batch for r in best],
        [r.seq for r in best],
        [r.family if gains else "" for r, gains in zip(best, won.gains)],
        [r.speedup for r in best],
        won.sure,
        [r.dense_fits for r in best],
    )
    caption = (
        f"Which family is fastest at {100 * MAP_SPARSITY:.0f} % sparsity, by batch and sequence, and its speedup: {setting_text(p)}. Equal "
        f"sparsity is not equal quality. Pale: another family's {interval_text(p)} reaches the winner's. A dark corner: the "
        f"dense model does not fit the device's memory."
    )
    return figure, caption, ()


# -- quality -----------------------------------------------------------------------------------------------------------------------


def _pareto(p: Paper) -> Made:
    from simulator.figures.pareto import pareto_figure
    from simulator.predict.pareto import fronts
    from simulator.predict.quality import choose_axis, shipped_quality

    model, notes = p.model, []
    try:
        table = shipped_quality(model.name)
        few = len({r.family for r in table.on_axis(choose_axis(table)).rows}) < 2
    except InputError:
        few = True
    if few:
        notes.append(
            f"pareto: fewer than two families of {model.name} have quality on one axis; drawn for {QUALITY_MODEL}"
        )
        model, table = load_model(QUALITY_MODEL), shipped_quality(QUALITY_MODEL)
    axis = choose_axis(table)
    found, more = fronts(model, p.devices, table, axis, ["prefill", "decode"], [1], [p.seq], setting=p.setting)
    points = [(f, q) for f in found for q in f.points]
    figure = pareto_figure(
        [f"{f.phase}, batch {f.batch}" for f, _ in points],
        [f.hardware for f, _ in points],
        [q.family for _, q in points],
        [q.method for _, q in points],
        [q.loss for _, q in points],
        [q.speedup for _, q in points],
        [q.speedup_lower for _, q in points],
        [q.speedup_upper for _, q in points],
        axis=axis.metric,
        protocol=axis.protocol,
        interval=interval_text(p),
    )
    sources = "; ".join(dict.fromkeys(q.source for _, q in points))
    caption = (
        f"Predicted speedup against measured quality loss with its frontier: {setting_text(replace(p, model=model))}, {p.seq} tokens. "
        f"Quality: {axis.metric}, {axis.protocol} ({sources}). Faint points are beaten by another; the strip names the fastest family "
        f"within each quality budget."
    )
    return figure, caption, (*notes, *more)


FIGURES: Mapping[str, Callable[[Paper], Made]] = MappingProxyType(
    {
        "taxonomy": taxonomy,
        "roofline": _roofline,
        "speedup": _speedup,
        "efficiency": _efficiency,
        "waterfall": _waterfall,
        "staircase": staircase,
        "scatter": scatter,
        "pareto": _pareto,
        "crossover": _crossover,
    }
)
"""Figures by name, in the order of a paper."""

MEASURED: tuple[str, ...] = ("staircase", "scatter")
"""Figures that show measured GEMMs."""
