"""Find the fastest pruning at each batch and length.

Two prunings of one model share most of their errors, which cancel in the ratio of their times. The interval of that
ratio therefore decides whether one is faster, not the intervals of two speedups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from simulator.arrays import BoolArray, FloatArray, IndexArray
from simulator.errors import InputError
from simulator.prediction.batch import Reject, batch_of
from simulator.prediction.compare import against, results_of
from simulator.prediction.prunings import Pruning
from simulator.prediction.result import Results
from simulator.prediction.scenario import Scenario, by_budget

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile
    from simulator.workload import WorkloadBatch

OPERATOR_ROWS = 120_000  # operators computed together, about: 100 MB of memory


@dataclass(frozen=True)
class Winners:
    """The fastest pruning of every cell."""

    best: Results
    gains: BoolArray  # whether it is faster than the dense model
    certain: BoolArray  # whether the intervals of its ratios to the dense model and to the second fastest are above 1


def winners(scenario: Scenario, prunings: Sequence[Pruning], hardware: Sequence[HardwareProfile]) -> Winners:
    """Return the fastest of some prunings on each device at each shape of a scenario. Prunings that a device, the
    engine or a request does not support do not compete; InputError if there are no others."""
    reasons: dict[str, None] = {}

    def skip(_pruning: int | None, reason: str, _device: str) -> None:
        reasons[reason] = None

    operators = len(replace(scenario, shapes=scenario.shapes[:1]).workloads[0])
    together, found = max(1, OPERATOR_ROWS // (operators * len(prunings))), []
    for start in range(0, len(scenario.shapes), together):
        some = replace(scenario, shapes=scenario.shapes[start : start + together])
        for one, devices in by_budget(some, hardware):
            batch = batch_of(one, prunings, skip)
            found += [w for hw in devices if len((w := _of_device(one, prunings, batch, hw, skip)).best)]
    if not found:
        raise InputError("; ".join(reasons) or "nothing to predict")
    parts = (np.concatenate([getattr(w, name) for w in found]) for name in ("gains", "certain"))
    return Winners(Results.join([w.best for w in found]), *parts)


def _of_device(
    scenario: Scenario, prunings: Sequence[Pruning], batch: WorkloadBatch, hw: HardwareProfile, skip: Reject
) -> Winners:
    results = results_of(batch, prunings, [hw], scenario, skip)
    if not len(results):
        return Winners(results, np.zeros(0, bool), np.zeros(0, bool))
    # predictions as a table of requests and prunings; NaN where there is none
    place = {shape: i for i, shape in enumerate(scenario.shapes)}
    shapes = zip(results.columns["batch"].tolist(), results.columns["seq"].tolist())
    cell = np.array([place[shape] for shape in shapes]), results.pruning
    row = np.full((len(place), len(prunings)), -1)
    row[cell] = np.arange(len(results))
    speedup = np.full(row.shape, -np.inf)
    speedup[cell] = results.columns["speedup"]
    fastest = np.argsort(-speedup, axis=1, kind="stable")  # of equal speedups the first
    request = np.flatnonzero(row.max(axis=1) >= 0)
    first, second = fastest[request, 0], fastest[request, min(1, len(prunings) - 1)]
    best = results.take(row[request, first])
    competes = (first != second) & (row[request, second] >= 0)
    ratio = _lower_ratio(batch, hw, request, first, np.where(competes, second, first), scenario.level)
    certain = (best.columns["speedup_lower"] > 1.0) & ((ratio > 1.0) | ~competes)
    return Winners(best, np.asarray(best.columns["speedup"] > 1.0), np.asarray(certain))


def _lower_ratio(
    batch: WorkloadBatch, hw: HardwareProfile, request: IndexArray, first: IndexArray, second: IndexArray, level: float
) -> FloatArray:
    """Return the lower end of the interval of the time of a second pruning over that of a first, at each request."""
    dense, many = np.flatnonzero(batch.pruning < 0), len(request)
    pruned = np.flatnonzero(batch.pruning >= 0)
    index = np.zeros((len(dense), int(batch.pruning.max()) + 1), dtype=np.intp)
    index[batch.dense[pruned], batch.pruning[pruned]] = pruned
    pairs = batch.take(np.concatenate([dense, index[request, first], index[request, second]]))
    other = np.arange(len(pairs))
    other[len(dense) : len(dense) + many] += many
    (middle,), (below,), _ = against(pairs, hw, [other], level)
    return np.asarray(np.exp(middle - below)[len(dense) : len(dense) + many])
