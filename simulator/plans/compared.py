"""What other rules choose: plans by parameters, by FLOPs and by a library's own times, and the frontier of a search.

Use :func:`alternatives` and :func:`frontier`. Every plan is predicted whole, in the setting of the search that comes
first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from simulator.arrays import FloatArray, IndexArray
from simulator.plans.prices import Probes, planned, quantities
from simulator.plans.program import Program
from simulator.plans.solve import COARSE, Found, Solver

MOST_POINTS = 24
"""Most plans of a frontier."""


@dataclass(frozen=True, kw_only=True)
class PlanPoint:
    """A plan and what is predicted of it in the first setting."""

    score: float
    speedup: float
    speedup_lower: float
    speedup_upper: float
    pruned_s: float
    parameters: int
    chosen: bool = False  # whether it is the plan of the search

    @classmethod
    def of(cls, score: float, own: Mapping[str, FloatArray], i: int, chosen: bool) -> PlanPoint:
        """Return model ``i`` of some quantities."""
        return cls(
            score=score,
            speedup=float(own["speedup"][i]),
            speedup_lower=float(own["speedup_lower"][i]),
            speedup_upper=float(own["speedup_upper"][i]),
            pruned_s=float(own["pruned_s"][i]),
            parameters=int(own["parameters"][i]),
            chosen=chosen,
        )


@dataclass(frozen=True)
class AlternativePlan:
    """A plan that another rule chooses."""

    chosen_by: str  # parameters, FLOPs or library times
    budget: str  # "same": as much as the plan of the search; "targets": as much as meets the targets
    meets: bool  # all targets
    point: PlanPoint

    @property
    def rule(self) -> str:
        """What it was chosen by, and up to which budget."""
        return f"{self.chosen_by}, {'as many' if self.budget == 'same' else 'until the targets are met'}"


def alternatives(solver: Solver, found: Found, times: Sequence[FloatArray] | None) -> tuple[AlternativePlan, ...]:
    """Return the plans of least score by other measures of cost: at the same cost as the found plan, and at the largest
    cost that meets the targets."""
    variants, model = solver.variants, solver.model
    library = variants.library
    probes = Probes.of(library, model.layout)
    flops = probes.prices(quantities(probes.models, solver.settings[0])["flops"])
    weights = [np.array([float(model.block_parameters(b)) for b in own]) for own in library.layers]
    measures = {"parameters": weights, "FLOPs": flops} | ({"library times": times} if times is not None else {})
    out = []
    for name, column in measures.items():
        cost = variants.sums(column)[None]
        choice, excess, _ = solver.choose(cost, cost[:, found.choice].sum(axis=1), COARSE)
        if excess == 0.0:
            out.append(_alternative(name, "same", solver.predict(choice)))
        if (meeting := _until(solver, cost)) is not None:
            out.append(_alternative(name, "targets", meeting))
    return tuple(out)


def _alternative(name: str, budget: str, found: Found) -> AlternativePlan:
    return AlternativePlan(name, budget, found.meets, PlanPoint.of(found.score, found.predicted[0], 1, False))


def _until(solver: Solver, cost: FloatArray) -> Found | None:
    """Return the first plan that meets the targets if a cost is lowered step by step."""
    best: Found | None = None
    for plans in _hulls(solver, cost):
        low, high = 0, len(plans) - 1
        if not solver.predict(plans[high]).meets:
            continue
        while high - low > 1:  # more cost removed is faster, except for steps of kernels
            middle = (low + high) // 2
            low, high = (low, middle) if solver.predict(plans[middle]).meets else (middle, high)
        found = solver.predict(plans[high])
        budget = cost[:, found.choice].sum(axis=1)
        exact = solver.predict(solver.choose(cost, budget, COARSE)[0])
        found = exact if exact.meets and exact.score < found.score else found
        if best is None or found.score < best.score:
            best = found
    return best


def _hulls(solver: Solver, cost: FloatArray) -> list[list[IndexArray]]:
    """Return the plans from least score to least cost, for each set of variants that a plan is chosen from."""
    out = []
    for some in solver.families or [np.arange(len(solver.score))]:
        program = Program(solver.variants.group[some], solver.score[some], cost[:, some])
        out.append([some[choice] for choice in program.hull()])
    return out


def frontier(solver: Solver, found: Found) -> tuple[PlanPoint, ...]:
    """Return plans of rising score and speed that no other plan of the series beats, the found plan among them."""
    cost = solver.costs(found.choice).cost[:1]
    series = _hulls(solver, cost)
    each = max(2, MOST_POINTS // len(series))
    plans = {tuple(found.choice.tolist()): found.choice}
    for hull in series:
        for i in np.unique(np.linspace(0, len(hull) - 1, min(each, len(hull))).round().astype(int)).tolist():
            plans.setdefault(tuple(hull[i].tolist()), hull[i])
    models = [planned(solver.model, solver.variants.blocks(choice)) for choice in plans.values()]
    own = quantities([solver.model, *models], solver.settings[0])
    points = [
        PlanPoint.of(float(solver.score[choice].sum()), own, i, i == 1)  # the found plan is the first
        for i, choice in enumerate(plans.values(), start=1)
    ]
    points.sort(key=lambda point: (point.score, point.pruned_s))
    kept: list[PlanPoint] = []
    for point in points:
        if point.chosen or not kept or point.pruned_s < min(other.pruned_s for other in kept):
            kept.append(point)
    return tuple(kept)
