"""Search: choose a variant of each layer of a model so that targets are met and scores rise least:
:func:`search`.

Scores of single replacements are added over layers, as in Puzzle (arXiv 2411.19146). Times are not
added: the whole plan is predicted (:mod:`simulator.plans.solve`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from simulator.arguments import OneOrMore, flag
from simulator.arrays import FloatArray, IndexArray
from simulator.display import Displayed
from simulator.errors import InputError
from simulator.hardware.profile import HardwareProfile
from simulator.models.library import load_model
from simulator.models.model import Model, undivided
from simulator.plans.costs import PricedRequest, planned, priced, quantities
from simulator.plans.library import Library, combined, metric_of, read_library
from simulator.plans.solve import Found, Limit, Solver, Targets, uniform_families
from simulator.plans.variants import SUBLAYERS, text_of
from simulator.prediction.compare import request_results
from simulator.prediction.prunings import Pruning
from simulator.prediction.requests import profiles
from simulator.prediction.result import Result
from simulator.prediction.service import probability_of, probability_within
from simulator.units import ratio

MOST_POINTS = 24  # plans of a frontier


@dataclass(frozen=True)
class LayerPlan:
    layer: int
    attention: str
    mlp: str
    score: float  # rise of the score by this layer


@dataclass(frozen=True)
class Reached:
    hardware: str
    engine: str
    phase: str
    batch: int
    seq: int
    target: str  # name of the target
    wanted: float
    reached: float
    probability: float  # probability of reaching the target, from the prediction interval


@dataclass(frozen=True, kw_only=True)
class PlanPoint:
    score: float
    speedup: float
    speedup_lower: float
    speedup_upper: float
    pruned_s: float
    parameters: int
    chosen: bool = False  # whether it is the plan of the search

    @classmethod
    def of(cls, score: float, own: Mapping[str, FloatArray], i: int, chosen: bool) -> PlanPoint:
        times = {
            name: float(own[name][i])
            for name in ("speedup", "speedup_lower", "speedup_upper", "pruned_s")
        }
        return cls(score=score, **times, parameters=int(own["parameters"][i]), chosen=chosen)


@dataclass(frozen=True, repr=False)
class Plan(Displayed):
    """The chosen variant of each layer, and what it reaches.

    Parameters
    ----------
    model, metric : str
        Names of the dense model, and of the column of the scores; lower scores are better.
    score, gap : float
        Sum of the rises of the score over the layers (0 is the dense model), and the share of it
        that a better plan could save at most, by added costs.
    confidence : float
        Probability with which times had to be reached.
    layers : tuple of LayerPlan
        The variant of each layer.
    targets : tuple of Reached
        Targets by setting.
    results : tuple of Result
        Prediction of the plan in each setting.
    sum_error, steps : float, int
        Predicted time of the first plan over its added costs, less 1; number of plans that were
        predicted whole.
    frontier : tuple of PlanPoint
        Score against time in the first setting.
    notes : tuple of str
        Exclusions and assumptions.
    dense_parameters : int
        Parameters of the dense model.
    settings : tuple of PricedRequest
        Devices and requests, in the order of the results.
    dense, pruned : Model
        Shapes of the dense model and of the plan.

    Examples
    --------
    >>> plan = search("smollm2-135m", "h100", 1.3, "smollm2-135m", metric="kl_div", phase="prefill")
    >>> plan.results[0].speedup >= 1.3, plan.pruned.parameters < plan.dense_parameters
    (True, True)
    >>> sorted(plan.to_dict())[:4]
    ['confidence', 'dense_parameters', 'frontier', 'gap']
    """

    model: str
    metric: str
    score: float
    gap: float
    confidence: float
    layers: tuple[LayerPlan, ...]
    targets: tuple[Reached, ...]
    results: tuple[Result, ...]
    sum_error: float
    steps: int
    frontier: tuple[PlanPoint, ...]
    notes: tuple[str, ...]
    dense_parameters: int
    settings: tuple[PricedRequest, ...] = field(repr=False)
    dense: Model = field(repr=False)
    pruned: Model = field(repr=False)

    def _title(self) -> str:
        first, changed = (
            self.results[0],
            sum((row.attention, row.mlp) != ("dense", "dense") for row in self.layers),
        )
        reached = (
            f"{ratio(first.speedup)}x ({ratio(first.lower)}-{ratio(first.upper)}) on"
            f" {first.request}"
        )
        title = f"plan of {self.model}: {changed} of {len(self.layers)} layers changed"
        return f"{title}, {reached}, {self.metric} {self.score:.4g}"

    def _columns(self) -> Mapping[str, list[object]]:
        """Return one row per layer."""
        return {
            name: [getattr(row, name) for row in self.layers]
            for name in ("layer", "attention", "mlp", "score")
        }


def search(
    model: str | Model,
    hardware: OneOrMore[str | HardwareProfile],
    targets: Targets | float,
    scores: str | Path | Library,
    *,
    metric: str = "",
    maximise: bool = False,
    uniform: bool = False,
    **settings: Any,
) -> Plan:
    """Choose a variant of each layer so that the targets are met and the score rises least.

    Parameters
    ----------
    model : str or Model
        The dense model.
    hardware : one or more
        Devices, as in :func:`simulator.table`.
    targets : Targets or float
        What to reach, or a speedup.
    scores : str, Path or Library
        Variants of each layer with their scores (:func:`simulator.plans.library.read_library`).
    metric : str
        Column of the scores; "": the only column that is no time, size, memory or count.
    maximise : bool
        Whether a higher value is better.
    uniform : bool
        Give all remaining layers one shape, which stock engines load; whole layers may be removed.
    **settings
        Fields of :class:`simulator.Request`, each one value or a list; the targets hold in every
        combination.

    Returns
    -------
    Plan
        The plan, its predictions and the frontier.

    Raises
    ------
    InputError
        If no plan meets the targets (the message has the nearest plan), or for wrong arguments.

    Examples
    --------
    >>> scores = "smollm2-135m"
    >>> plan = search(
    ...     "smollm2-135m", "rtx_4090", 1.3, scores, metric="kl_div", phase="prefill", batch=8
    ... )
    >>> plan.results[0].speedup >= 1.3, len(plan.layers)
    (True, 30)
    """
    dense, devices = load_model(model), profiles(hardware)
    if not isinstance(targets, Targets):
        targets = Targets(speedup=targets)
    flag("maximise", maximise)
    flag("uniform", uniform)
    at = tuple(priced(dense, devices, settings))
    library, notes = _library(scores, dense, at[0])
    name, column = metric_of(library, metric)
    column = tuple(-own for own in column) if maximise else column
    rises = np.concatenate([own - own[0] for own in column])
    if (rises < -1e-12).sum() > 0.5 * max(1, len(rises) - len(column)):
        notes += (_direction_note(name, maximise),)
    solver = Solver(library, rises, at, targets, _one_shape(library) if uniform else [])
    found = solver.solve()
    pruned = planned(dense, found.layers)
    pruning = [Pruning.of_model(dense, pruned)]
    return Plan(
        model=dense.name,
        metric=name,
        score=found.score,
        gap=solver.gap,
        confidence=targets.confidence,
        layers=_layer_plans(found, solver),
        targets=tuple(_reached(limit, found, solver) for limit in solver.limits),
        results=tuple(request_results([one.request], pruning, [one.hw])[0] for one in at),
        sum_error=solver.sum_error,
        steps=solver.steps,
        frontier=frontier(solver, found),
        notes=notes,
        dense_parameters=dense.parameters,
        settings=at,
        dense=dense,
        pruned=pruned,
    )


def _direction_note(metric: str, maximise: bool) -> str:
    way = "omit --maximise if lower is better" if maximise else "use --maximise if higher is better"
    return f"most variants have a better {metric} than the dense model; {way}"


def _one_shape(library: Library) -> list[IndexArray]:
    families = uniform_families(library)
    if not families:
        raise InputError(
            "uniform: no variant is available in all layers; expected one row per layer with equal"
            " shapes"
        )
    return families


def _layer_plans(found: Found, solver: Solver) -> tuple[LayerPlan, ...]:
    """Return the variant of each layer of a plan, with the rise of its score."""
    rises = solver.score[found.choice].tolist()
    plans = []
    for i, (layer, dense) in enumerate(zip(found.layers, solver.model.layers)):
        attention, mlp = (text_of(name, layer, dense) for name in SUBLAYERS)
        plans.append(LayerPlan(i, attention, mlp, rises[i]))
    return tuple(plans)


def _library(scores: Any, model: Model, at: PricedRequest) -> tuple[Library, tuple[str, ...]]:
    """Return the library with the variants that the devices can share, and notes."""
    library = scores if isinstance(scores, Library) else read_library(scores, model)
    notes, library = library.notes, combined(library)
    many, parallel = at.request.devices, at.request.parallel
    if many > 1 and parallel != "pipeline":
        keep = [
            [i for i, one in enumerate(variants) if not undivided([one], many, parallel)]
            for variants in library.layers
        ]
        if lost := len(library) - sum(map(len, keep)):
            size = undivided(itertools.chain(*library.layers), many, parallel)
            reason = size.reason(many, parallel) if size else ""
            notes += (f"{lost} variants are excluded: {many} devices cannot share them ({reason})",)
        if not all(own and own[0] == 0 for own in keep):
            raise InputError(
                f"devices {many}: cannot share the dense model; expected fewer devices"
            )
        library = library.take(keep)
    return library, notes


def _reached(limit: Limit, found: Found, solver: Solver) -> Reached:
    at, own = limit.at, next(q for s, q in zip(solver.settings, found.predicted) if s is limit.at)
    value = float(own[limit.quantity][1])
    reached = limit.as_target(value)
    if limit.target == "speedup":
        ends = float(own["speedup_lower"][1]), float(own["speedup_upper"][1])
        chance = probability_of(limit.value, reached, *ends, at.request.level)
    elif limit.ends is not None:
        ends = float(own[limit.ends[0]][1]), float(own[limit.ends[1]][1])
        chance = probability_within(limit.most, value, *ends, at.request.level)
    else:
        chance = float(value <= limit.most * (1.0 + 1e-9))
    return Reached(
        at.hardware,
        at.engine,
        at.phase,
        at.batch,
        at.seq,
        limit.target,
        limit.value,
        reached,
        chance,
    )


def _hulls(solver: Solver, cost: FloatArray) -> list[list[IndexArray]]:
    """Return the plans from least score to least cost, for each set of variants that a plan is
    chosen from."""
    return [[some[choice] for choice in program.hull()] for some, program in solver.programs(cost)]


def frontier(solver: Solver, found: Found) -> tuple[PlanPoint, ...]:
    """Return plans of rising score and speed that no other plan of the series beats, the found plan
    among them."""
    cost = solver.costs(found.choice)[0][:1]
    series = _hulls(solver, cost)
    each = max(2, MOST_POINTS // len(series))
    plans = {tuple(found.choice.tolist()): found.choice}
    for hull in series:
        for i in np.unique(
            np.linspace(0, len(hull) - 1, min(each, len(hull))).round().astype(int)
        ).tolist():
            plans.setdefault(tuple(hull[i].tolist()), hull[i])
    models = [planned(solver.model, solver.library.chosen(choice)) for choice in plans.values()]
    own = quantities([solver.model, *models], solver.settings[0])
    scores = [float(solver.score[choice].sum()) for choice in plans.values()]
    # the found plan is first
    points = [PlanPoint.of(score, own, i, i == 1) for i, score in enumerate(scores, start=1)]
    kept: list[PlanPoint] = []
    for point in sorted(points, key=lambda point: (point.score, point.pruned_s)):
        if point.chosen or not kept or point.pruned_s < min(other.pruned_s for other in kept):
            kept.append(point)
    return tuple(kept)
