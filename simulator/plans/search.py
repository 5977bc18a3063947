"""Search: choose a variant of each layer of a model so that targets are met and scores are lost least.

Use :func:`search`. Scores of single replacements are added over layers, as in Puzzle (arXiv 2411.19146); times are not
added but predicted of the whole plan (:mod:`simulator.plans.solve`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from simulator.arguments import OneOrMore, flag, instance
from simulator.arrays import FloatArray
from simulator.display import Displayed, few, table_html
from simulator.errors import InputError
from simulator.models.config import ModelConfig
from simulator.models.library import load_model
from simulator.models.parallel import indivisible
from simulator.plans.compared import AlternativePlan, PlanPoint, alternatives, frontier
from simulator.plans.importance import importance
from simulator.plans.library import Library, check_values, combined, groups_of, read_library
from simulator.plans.prices import PricedRequest, planned
from simulator.plans.solve import Found, Solver, Variants
from simulator.plans.targets import Limit, Targets
from simulator.plans.variants import text_of
from simulator.prediction.compare import scenario_results
from simulator.prediction.operating import probability_of
from simulator.prediction.prunings import Pruning
from simulator.prediction.result import Result
from simulator.prediction.scenario import Scenario, check_measured, profiles, scenarios
from simulator.units import ratio

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile

TIMES: tuple[str, ...] = ("runtime", "latency", "time_ms", "_us")
"""Parts of names of columns that hold measured times, not scores."""


@dataclass(frozen=True)
class LayerPlan:
    """The variant of a layer."""

    layer: int
    attention: str
    mlp: str
    score: float  # rise of the score by this layer


@dataclass(frozen=True)
class Reached:
    """A target in a setting, and what the plan reaches."""

    hardware: str
    engine: str
    phase: str
    batch: int
    seq: int
    target: str  # name of the target
    wanted: float
    reached: float
    probability: float  # of reaching it, from the prediction interval


@dataclass(frozen=True, repr=False)
class Plan(Displayed):
    """The chosen variant of each layer, what it reaches, and what other rules would have chosen.

    Parameters
    ----------
    model : str
        Name of the dense model.
    metric : str
        Column of the scores; lower is better.
    score : float
        Sum of the rises of the score over the layers; 0 is the dense model.
    gap : float
        Share of the score that a better plan could save at most, by added costs; 0: none is better.
    confidence : float
        Probability with which times had to be reached.
    layers : tuple of LayerPlan
        The variant of each layer.
    targets : tuple of Reached
        Targets by setting.
    results : tuple of Result
        Prediction of the plan in each setting.
    sum_error : float
        Predicted time of the first plan over its added costs, less 1.
    steps : int
        Plans that were predicted whole.
    alternatives : tuple of AlternativePlan
        Plans by parameters, FLOPs and the library's own times.
    frontier : tuple of PlanPoint
        Score against time in the first setting.
    notes : tuple of str
        Exclusions and assumptions.
    dense_parameters : int
        Parameters of the dense model.
    settings : tuple of PricedRequest
        Devices and requests, in the order of the results.
    dense : ModelConfig
        The dense model.
    pruned : ModelConfig
        Shapes of the plan.

    Examples
    --------
    >>> plan = search("llama-2-7b", "h100", 1.3, batch=8)
    >>> plan.results[0].speedup >= 1.3, plan.pruned.parameters < plan.dense_parameters
    (True, True)
    >>> sorted(plan.to_dict())[:4]
    ['alternatives', 'confidence', 'dense_parameters', 'frontier']
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
    alternatives: tuple[AlternativePlan, ...]
    frontier: tuple[PlanPoint, ...]
    notes: tuple[str, ...]
    dense_parameters: int
    settings: tuple[PricedRequest, ...] = field(repr=False)
    dense: ModelConfig = field(repr=False)
    pruned: ModelConfig = field(repr=False)

    def _title(self) -> str:
        first, changed = self.results[0], sum((row.attention, row.mlp) != ("dense", "dense") for row in self.layers)
        reached = f"{ratio(first.speedup)}x ({ratio(first.lower)}-{ratio(first.upper)}) on {first.request}"
        title = f"plan of {self.model}: {changed} of {len(self.layers)} layers changed"
        return f"{title}, {reached}, {self.metric} {self.score:.4g}"

    def _columns(self) -> Mapping[str, list[object]]:
        """Return one row per layer."""
        return {name: [getattr(row, name) for row in self.layers] for name in ("layer", "attention", "mlp", "score")}

    def _html(self) -> str:
        return table_html(self._columns(), most=len(self.layers))


def search(
    model: str | ModelConfig,
    hardware: OneOrMore[str | HardwareProfile],
    targets: Targets | float,
    scores: str | Path | Library | None = None,
    *,
    metric: str = "",
    maximise: bool = False,
    engine: OneOrMore[str] = (),
    phase: OneOrMore[str] = "decode",
    batch: OneOrMore[int] = 1,
    seq: OneOrMore[int] = 2048,
    scenario: Scenario | None = None,
    uniform: bool = False,
    groups: int | str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Plan:
    """Choose a variant of each layer so that the targets are met and the score rises least.

    Parameters
    ----------
    model : str or ModelConfig
        The dense model.
    hardware : one or more
        Devices, as in :func:`simulator.table`.
    targets : Targets or float
        What to reach, or a speedup.
    scores : str, Path or Library, optional
        Variants of each layer with their scores (:func:`simulator.plans.library.read_library`). Default: whole layers,
        with the published quality losses of depth pruning of this model.
    metric : str
        Column of the scores; "": the first that is not a time.
    maximise : bool
        Whether a higher value is better.
    engine, phase, batch, seq : one or more
        As in :func:`simulator.table`; the targets hold in every combination.
    scenario : Scenario, optional
        Common inputs, as in :func:`simulator.table`.
    uniform : bool
        Give all remaining layers one shape, which stock engines load; whole layers may be removed.
    groups : int or str, optional
        Layers that share one variant: a number of consecutive layers, or ranges such as ``"0-3,4-7"``.
    progress : callable
        Called with steps done and their number.

    Returns
    -------
    Plan
        The plan, its predictions and alternatives.

    Raises
    ------
    InputError
        If no plan meets the targets (the message has the nearest one), a score is missing, or an argument is out of
        range.

    Examples
    --------
    >>> plan = search("smollm2-135m", "rtx_4090", 1.3, "smollm2-135m", phase="prefill", batch=8, seq=1024)
    >>> plan.results[0].speedup >= 1.3, len(plan.layers)
    (True, 30)
    """
    dense, devices = load_model(model), profiles(hardware)
    if not isinstance(targets, Targets):
        targets = Targets(speedup=targets)
    flag("maximise", maximise)
    flag("uniform", uniform)
    requested = scenarios(scenario, [dense], engine, phase, batch, seq)
    check_measured(requested, devices)
    settings = tuple(PricedRequest(one.on(hw), hw) for one in requested for hw in devices)
    library, notes = _library(scores, dense, settings[0])
    name, column = _scores(library, metric, maximise)
    variants = Variants.of(library, groups_of(groups, dense.layers))
    rises = variants.sums([own - own[0] for own in column])
    families = variants.uniform() if uniform else []
    if uniform and not families:
        raise InputError("uniform: no variant is available in all layers; expected one row per layer with equal shapes")
    if (rises < -1e-12).sum() > 0.5 * max(1, len(rises) - len(variants.groups)):
        notes += (f"most variants have a better {name} than the dense model; use --maximise if higher is better",)
    solver = Solver(variants, rises, settings, targets, families)
    progress(0, 3)
    found = solver.solve()
    progress(1, 3)
    results = tuple(_result(dense, found, at) for at in settings)
    others = alternatives(solver, found, _times(library))
    progress(2, 3)
    points = frontier(solver, found)
    progress(3, 3)
    layers = tuple(
        LayerPlan(
            layer=i,
            attention=text_of("attention", block, dense.layout[i]),
            mlp=text_of("mlp", block, dense.layout[i]),
            score=float(column[i][library.layers[i].index(block)] - column[i][0]),
        )
        for i, block in enumerate(found.blocks)
    )
    return Plan(
        model=dense.name,
        metric=name,
        score=found.score,
        gap=solver.gap,
        confidence=targets.confidence,
        layers=layers,
        targets=tuple(_reached(limit, found, solver) for limit in solver.limits),
        results=results,
        sum_error=solver.sum_error,
        steps=solver.steps,
        alternatives=others,
        frontier=points,
        notes=notes,
        dense_parameters=dense.parameters,
        settings=settings,
        dense=dense,
        pruned=planned(dense, found.blocks),
    )


def _library(
    scores: str | Path | Library | None, model: ModelConfig, at: PricedRequest
) -> tuple[Library, tuple[str, ...]]:
    """Return the library with the variants that the devices can share, and notes."""
    if scores is None:
        library = importance(model)
    elif isinstance(scores, Library):
        library = instance("scores", scores, Library, "read_library")
    else:
        library = read_library(scores, model)
    notes, library = library.notes, combined(library)
    many, parallel = at.scenario.devices, at.scenario.parallel
    if many > 1 and parallel != "pipeline":
        keep = [[i for i, b in enumerate(own) if not indivisible(b, many, parallel)] for own in library.layers]
        if lost := len(library) - sum(map(len, keep)):
            reason = next(filter(None, (indivisible(b, many, parallel) for own in library.layers for b in own)))
            notes += (f"{lost} variants are excluded: {many} devices cannot share them ({reason})",)
        if not all(own and own[0] == 0 for own in keep):
            raise InputError(f"devices {many}: cannot share the dense model; expected fewer devices")
        library = library.take(keep)
    return library, notes


def _is_time(name: str) -> bool:
    return any(part in name.lower() for part in TIMES)


def _scores(library: Library, metric: str, maximise: bool) -> tuple[str, tuple[FloatArray, ...]]:
    """Return the name of the scores and their values, of which lower ones are better."""
    known = [name for name in library.values if not _is_time(name)]
    if library.values and not metric and not known:
        where = library.source or "scores"
        raise InputError(f"{where}: expected a column of scores, got only times: {few(library.values)}")
    name = metric or (known[0] if known else "")
    column = check_values(library, name)
    return name, tuple(-own for own in column) if maximise else column


def _times(library: Library) -> tuple[FloatArray, ...] | None:
    """Return the sum of the library's own times by layer and variant, if it has times."""
    columns = [column for name, column in library.values.items() if _is_time(name)]
    if not columns or not all(np.isfinite(own).all() for column in columns for own in column):
        return None
    return tuple(np.sum(own, axis=0) for own in zip(*columns))


def _result(dense: ModelConfig, found: Found, at: PricedRequest) -> Result:
    """Return the prediction of a plan in a setting."""
    pruning = Pruning.of_model(dense, planned(dense, found.blocks))
    return scenario_results(replace(at.scenario, model=dense), [pruning], [at.hw])[0]


def _reached(limit: Limit, found: Found, solver: Solver) -> Reached:
    """Return a target with what the plan reaches, and the probability of reaching it."""
    at, own = limit.at, next(q for s, q in zip(solver.settings, found.predicted) if s is limit.at)
    value = float(own[limit.quantity][1])
    reached = limit.as_target(value)
    if limit.target == "speedup":
        ends = float(own["speedup_lower"][1]), float(own["speedup_upper"][1])
        chance = probability_of(limit.value, reached, *ends, at.scenario.level)
    elif limit.ends is not None:
        lower, upper = (float(own[name][1]) for name in limit.ends)
        chance = probability_of(1.0 / limit.most, 1.0 / value, 1.0 / upper, 1.0 / lower, at.scenario.level)
    else:
        chance = float(value <= limit.most * (1.0 + 1e-9))
    return Reached(at.hardware, at.engine, at.phase, at.batch, at.seq, limit.target, limit.value, reached, chance)
