"""Find the plan of least score that meets all targets, as the model is predicted, not as its costs
are added.

:class:`Targets` are limits on quantities of the pruned model.

:class:`Program` is the choice of one variant per layer, a multiple-choice knapsack, solved by
HiGHS: minimise the sum of scores so that each sum of costs is at most its limit. HiGHS proves a
gap: the share of the score that another choice could save at most.

:class:`Solver` repeats it. Costs of variants are exact next to one plan only: where the host or a
shared limit hides time, they change with the rest of the model. So the program is solved with costs
next to the dense model, its plan is predicted whole, and costs and limits are set again next to
that plan, until the plan stays and meets the targets.

Shapes of arrays: G groups, which are the layers; V variants over all groups, those of a group next
to each other; R limited costs.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property, partial
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from simulator.arrays import FloatArray, IndexArray
from simulator.errors import InputError
from simulator.models.model import Layer, Model
from simulator.plans.costs import PricedRequest, Probes, planned, quantities
from simulator.plans.library import Library
from simulator.prediction.requests import dense_seconds
from simulator.units import parameters, ratio, seconds, size

# nodes of the search tree of one program; beyond them the best choice so far is used
MOST_NODES = 5000
LARGE = 1e3  # a program is solved again without scores above LARGE times that of a whole choice
TIGHT = 1e-9  # largest relative excess of a limit
# largest score and limits of a program: the absolute tolerances of HiGHS, 1e-6, are TIGHT of them
FINE = 1e3
COARSE = 3e-3  # relative gap of programs whose plan is only the next base of costs
MOST_STEPS = 16  # plans that are predicted before the best one that meets the targets is returned
TIGHTER = 0.999  # further factor on a limit that a plan misses again


@dataclass(frozen=True)
class Targets:
    """What a pruned model must reach, in every setting.

    Parameters
    ----------
    speedup : float, optional
        Least speedup over the dense model, above 1.
    latency_s : float, optional
        Longest time of a pass (of a request in serve), s.
    tokens_per_s : float, optional
        Fewest new tokens/s of all sequences; in prefill prompt tokens.
    ttft_s, tpot_s : float, optional
        Longest time to first token, and per further token, s.
    memory_bytes : float, optional
        Most memory on the fullest device, bytes.
    parameters : float, optional
        Most parameters.
    confidence : float
        Least probability of reaching each target on time, in [0.5, 1), from the prediction
        interval.

    Examples
    --------
    >>> Targets(speedup=1.5, memory_bytes=40 * 2**30).given
    {'speedup': 1.5, 'memory_bytes': 42949672960}
    """

    speedup: float | None = None
    latency_s: float | None = None
    tokens_per_s: float | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    memory_bytes: float | None = None
    parameters: float | None = None
    confidence: float = 0.5

    def __post_init__(self) -> None:
        if not self.given:
            raise InputError(
                "targets: expected at least one, such as speedup=1.3, of"
                f" {', '.join(NAMES.values())}"
            )
        for name, value in self.given.items():
            if not 0.0 < value < 1e18:
                raise InputError(f"target {NAMES[name]}: expected a positive number, got {value:g}")
        if self.speedup is not None and not 1.0 < self.speedup <= 1000.0:
            raise InputError(
                f"target speedup: expected a number above 1, such as 1.5, got {self.speedup:g}"
            )
        if not 0.5 <= self.confidence < 1.0:
            raise InputError(
                f"confidence {self.confidence:g}: expected a probability from 0.5 to below 1, such"
                " as 0.9"
            )

    @property
    def given(self) -> dict[str, float]:
        """Targets that are set, by name."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "confidence"}
        return {name: value for name, value in found.items() if value is not None}

    def limits(self, at: PricedRequest, dense: Mapping[str, FloatArray]) -> list[Limit]:
        """Return the limits of a setting ``at``; ``dense`` are quantities whose first model is the
        dense one."""
        found = []
        for name, value in self.given.items():
            quantity, most = _QUANTITIES.get(name, name), value
            if name == "speedup":
                most = float(dense["pruned_s"][0]) / value
            elif name == "tokens_per_s":
                most = dense_seconds(value, at.request)
            elif not np.isfinite(dense[quantity][0]):
                raise InputError(
                    f"target {NAMES[name]}: {at.phase} has none; expected another --phase or target"
                )
            found.append(Limit(name, value, at, quantity, most))
        return found


_QUANTITIES: Mapping[str, str] = {
    **dict.fromkeys(("speedup", "latency_s", "tokens_per_s"), "pruned_s"),
    "memory_bytes": "pruned_memory_bytes",
}  # target -> the quantity that it limits, where the names differ

NAMES: Mapping[str, str] = {
    "speedup": "speedup",
    "latency_s": "latency",
    "tokens_per_s": "tokens/s",
    "ttft_s": "TTFT",
    "tpot_s": "TPOT",
    "memory_bytes": "memory",
    "parameters": "parameters",
}  # target -> its name in messages

_ENDS = {f"{name}_s": (f"{name}_lower", f"{name}_upper") for name in ("pruned", "ttft", "tpot")}


@dataclass(frozen=True)
class Limit:
    target: str
    value: float  # requested value of the target
    at: PricedRequest
    quantity: str
    most: float  # largest value of the quantity

    def reached(self, found: Mapping[str, FloatArray], confidence: float) -> FloatArray:
        """Return the quantity (W,) of models at the end of their interval that has the requested
        probability."""
        value = np.asarray(found[self.quantity], dtype=np.float64)
        if confidence <= 0.5 or self.ends is None:
            return value
        sigmas = NormalDist().inv_cdf(confidence) / NormalDist().inv_cdf(
            0.5 + 0.5 * self.at.request.level
        )
        if self.target == "speedup":  # errors that dense and pruned models share cancel
            return np.asarray(value * (found["speedup"] / found["speedup_lower"]) ** sigmas)
        return np.asarray(value * (found[self.ends[1]] / value) ** sigmas)

    @property
    def ends(self) -> tuple[str, str] | None:
        return _ENDS.get(self.quantity)

    def as_target(self, value: float) -> float:
        """Return the target that a value of the quantity reaches."""
        if self.target in ("speedup", "tokens_per_s"):
            return self.value * self.most / value
        return value


def target_text(name: str, value: float) -> str:
    texts: dict[str, Any] = {
        "speedup": lambda v: f"{ratio(v)}x",
        "tokens_per_s": lambda v: f"{v:,.4g} tokens/s",
        "memory_bytes": size,
        "parameters": parameters,
    }
    return str(texts.get(name, seconds)(value))


@dataclass(frozen=True)
class Solution:
    choice: IndexArray  # (G,) index into V
    score: float
    excess: float  # largest excess over a limit, as a share of it; 0 if the choice keeps all limits
    gap: float = 0.0  # share of the score that another choice could save at most


@dataclass(frozen=True)
class Program:
    group: IndexArray  # (V,) rising
    score: FloatArray  # (V,)
    cost: FloatArray  # (R, V)

    def solve(self, limit: FloatArray, gap: float = 0.0) -> Solution:
        """Return the choice of least score, up to a relative ``gap``, whose costs are at most
        ``limit`` (R,). If no choice keeps all limits, return the choice that exceeds them least."""
        scale = np.maximum(np.abs(limit), 1e-6 * np.abs(self.cost).max(axis=1, initial=1e-300))
        cost, bound = self.cost / scale[:, None], limit / scale
        rise, some = self._rises(), np.arange(len(self.score))
        while True:
            solution = self._integer(some, cost, bound, gap)
            if solution is None:
                return self._least_excess(cost, bound)
            # a better choice has no variant with a larger rise
            most = float(rise[solution.choice].sum())
            if rise[some].max(initial=0.0) <= LARGE * most:
                return solution
            # HiGHS does not see small differences next to far larger scores
            some = some[rise[some] <= most]

    def _rises(self) -> FloatArray:
        """Return by how much the score of each variant exceeds the least one of its group."""
        least = np.full(len(_firsts(self.group)), np.inf)
        np.minimum.at(least, self.group, self.score)
        return np.asarray(self.score - least[self.group])

    def hull(self) -> list[IndexArray]:
        """Return choices from the least score to the least first cost, each the best at some price
        of that cost."""
        cost, steps, begin = self.cost[0], list[tuple[float, int, int]](), []
        for g, members in enumerate(self._members()):
            chosen = int(members[np.lexsort((cost[members], self.score[members]))[0]])
            begin.append(chosen)
            while len(less := members[cost[members] < cost[chosen]]):
                with np.errstate(over="ignore"):  # huge scores come last
                    slope = (self.score[less] - self.score[chosen]) / (cost[chosen] - cost[less])
                first = np.lexsort((cost[less], slope))[0]
                chosen = int(less[first])
                steps.append((float(slope[first]), g, chosen))
        choice = np.array(begin)
        out = [choice.copy()]
        for _, g, at in sorted(steps, key=lambda step: step[0]):
            choice[g] = at
            out.append(choice.copy())
        return out

    def _members(self) -> list[IndexArray]:
        return np.split(np.arange(len(self.group)), _firsts(self.group)[1:])

    def _integer(
        self, some: IndexArray, cost: FloatArray, bound: FloatArray, gap: float
    ) -> Solution | None:
        """Return the best choice of some variants; None if no choice keeps the limits. Costs and
        limits are in units of the limits."""
        rise = self._rises()[some]
        # HiGHS takes costs above 1e20 as infinite
        unit = max(float(rise.max(initial=0.0)), 1e-300) / FINE
        result = _milp(
            rise / unit,
            self._one_each(some),
            (FINE * cost[:, some], FINE * bound),
            most=np.ones(len(some)),
            options={"mip_rel_gap": gap, "node_limit": MOST_NODES},
        )
        if result.x is None:
            return None
        choice = some[np.flatnonzero(result.x > 0.5)]
        score = float(self.score[choice].sum())
        left = (result.fun - result.mip_dual_bound) * unit / max(abs(score), 1e-300)
        return Solution(choice, score, 0.0, left if left > TIGHT else 0.0)

    def _least_excess(self, cost: FloatArray, bound: FloatArray) -> Solution:
        every = np.arange(len(self.score))
        last = np.append(np.zeros(len(every)), 1.0)  # the last variable is the excess
        each = np.hstack([self._one_each(every), np.zeros((len(_firsts(self.group)), 1))])
        within = np.hstack([cost, -np.ones((len(cost), 1))])
        result = _milp(last, each, (within, bound), most=np.where(last, np.inf, 1.0))
        choice = np.flatnonzero(result.x[:-1] > 0.5)
        excess = float((cost[:, choice].sum(axis=1) - bound).max())
        return Solution(choice, float(self.score[choice].sum()), max(excess, TIGHT))

    def _one_each(self, some: IndexArray) -> FloatArray:
        """Return a matrix (G, n) of ones where a variant belongs to a group."""
        return np.equal.outer(np.unique(self.group), self.group[some]).astype(float)


def _milp(
    objective: FloatArray,
    one_each: FloatArray,
    within: tuple[FloatArray, FloatArray],
    most: FloatArray,
    options: Mapping[str, float] | None = None,
) -> Any:
    """Minimise an objective of numbers from 0 to ``most``, whole where this is finite, with one per
    group and costs ``within`` limits. HiGHS 1.12 prints lines that ``scipy.optimize.milp`` cannot
    silence: they would stand in the JSON of ``prunesim search``."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    cost, limit = within
    solve = partial(
        milp,
        objective,
        constraints=[LinearConstraint(one_each, 1.0, 1.0), LinearConstraint(cost, -np.inf, limit)],
        integrality=np.isfinite(most),
        bounds=Bounds(0.0, most),
        options=options,
    )
    try:
        output = os.dup(1)
    except OSError:  # there is no standard output
        return solve()
    sys.stdout.flush()
    try:
        with Path(os.devnull).open("w") as nothing:
            os.dup2(nothing.fileno(), 1)
            try:
                return solve()
            finally:
                if os.name == "posix":
                    ctypes.CDLL(None).fflush(None)  # HiGHS leaves its lines in the buffer of C
                os.dup2(output, 1)
    finally:
        os.close(output)


def _firsts(group: IndexArray) -> IndexArray:
    """Return the first variant (G,) of each group."""
    return np.asarray(np.unique(group, return_index=True)[1])


def uniform_families(library: Library) -> list[IndexArray]:
    """Return the variants (indices into V) of each plan family in which all remaining layers have
    one shape; whole layers may be removed."""
    texts = [text for layer in range(len(library.layers)) for text in library.texts(layer)]
    found = []
    for shape in dict.fromkeys(text for text in texts if text != ("none", "none")):
        some = np.array([i for i, text in enumerate(texts) if text in (shape, ("none", "none"))])
        if len(np.unique(library.owner[some])) == len(library.layers):
            found.append(some)
    return found


@dataclass(frozen=True)
class Found:
    choice: IndexArray
    layers: tuple[Layer, ...]
    score: float
    # quantities by setting: the dense model, the plan
    predicted: tuple[Mapping[str, FloatArray], ...]
    reached: FloatArray  # (R,) the limited quantities, at the end of their intervals that counts
    meets: bool


@dataclass
class Solver:
    library: Library
    score: FloatArray  # (V,)
    settings: tuple[PricedRequest, ...]
    targets: Targets
    # sets of variants that a plan is chosen from; none: all
    families: list[IndexArray] = field(default_factory=list)
    steps: int = 0
    gap: float = 0.0  # share of the score that a better plan could save at most, by added costs
    # first plan: predicted cost of the first limit over its added cost, less 1
    sum_error: float = 0.0
    _known: dict[tuple[int, ...], Found] = field(default_factory=dict)

    @property
    def model(self) -> Model:
        return self.library.model

    @cached_property
    def limits(self) -> list[Limit]:
        dense = [quantities([self.model], at) for at in self.settings]
        return [
            limit for at, own in zip(self.settings, dense) for limit in self.targets.limits(at, own)
        ]

    def costs(self, choice: IndexArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return the costs (R, V) of the variants next to a plan, the part of each limited quantity
        outside the variants (R,), and the factor (R,) from the quantity to the end of its interval
        that counts."""
        probes = Probes.of(self.library, self.library.chosen(choice))
        found = {id(at): quantities(probes.models, at) for at in self.settings}
        rows, offset, factor = [], [], []
        for limit in self.limits:
            values = found[id(limit.at)]
            prices = np.concatenate(probes.prices(values[limit.quantity]))
            rows.append(prices)
            value = float(values[limit.quantity][1])
            offset.append(value - float(prices[choice].sum()))
            factor.append(float(limit.reached(values, self.targets.confidence)[1]) / value)
        return np.array(rows), np.array(offset), np.array(factor)

    def predict(self, choice: IndexArray) -> Found:
        key = tuple(choice.tolist())
        if key not in self._known:
            blocks = self.library.chosen(choice)
            model = planned(self.model, blocks)
            predicted = {id(at): quantities([self.model, model], at) for at in self.settings}
            least, score = self.targets.confidence, float(self.score[choice].sum())
            reached = np.array(
                [limit.reached(predicted[id(limit.at)], least)[1] for limit in self.limits]
            )
            meets = bool((reached <= self.most * (1.0 + 1e-9)).all())
            self._known[key] = Found(
                choice, blocks, score, tuple(predicted.values()), reached, meets
            )
        return self._known[key]

    @property
    def most(self) -> FloatArray:
        """The largest value of each limited quantity (R,)."""
        return np.array([limit.most for limit in self.limits])

    def programs(self, cost: FloatArray) -> Iterator[tuple[IndexArray, Program]]:
        """Yield each set of variants that a plan is chosen from, and its program."""
        for some in self.families or [np.arange(len(self.score))]:
            yield some, Program(self.library.owner[some], self.score[some], cost[:, some])

    def choose(
        self, cost: FloatArray, limit: FloatArray, gap: float = 0.0
    ) -> tuple[IndexArray, float, float]:
        """Return the choice of least score within limits of added costs, the share by which it
        exceeds them, and the share of its score that a better choice could save at most."""
        solved = [(some, program.solve(limit, gap)) for some, program in self.programs(cost)]
        some, best = min(solved, key=lambda one: (one[1].excess, one[1].score))
        return some[best.choice], best.excess, best.gap

    def solve(self) -> Found:
        """Return the plan of least score that meets the targets; InputError with the nearest plan
        if none does."""
        base = self.predict(_firsts(self.library.owner))  # the dense variants
        if base.meets:
            return base
        best: Found | None = None
        nearest, gap, margin, seen = base, COARSE, np.ones(len(self.limits)), set[tuple[int, ...]]()
        for self.steps in range(1, MOST_STEPS + 1):
            cost, offset, factor = self.costs(base.choice)
            choice, excess, left = self.choose(cost, margin * self.most / factor - offset, gap)
            found = self.predict(choice)
            if self.steps == 1:
                added = cost[:, choice].sum(axis=1) + offset
                self.sum_error = (
                    float(found.predicted[0][self.limits[0].quantity][1] / added[0]) - 1.0
                )
            nearest = min(nearest, found, key=lambda plan: (plan.reached / self.most).max())
            if found.meets and (best is None or found.score <= best.score):
                best, self.gap = found, left
            key = tuple(choice.tolist())
            again = key in seen or key == tuple(base.choice.tolist())
            if (again or found.meets) and gap > 0.0:
                gap = 0.0
            elif again and (best is not None or excess > 0.0):
                break
            elif again:
                margin = margin * np.minimum(self.most / found.reached, 1.0) * TIGHTER
            elif gap == 0.0 and found is best:
                break
            seen.add(key)
            base = found
        if best is None:
            raise InputError(self._unreachable(nearest))
        return best

    def _unreachable(self, nearest: Found) -> str:
        missed, kept = [], dict[str, None]()
        for limit, value in zip(self.limits, nearest.reached.tolist()):
            texts = [target_text(limit.target, v) for v in (limit.as_target(value), limit.value)]
            if value > limit.most * (1.0 + 1e-9):
                missed.append(f"{NAMES[limit.target]} {' of '.join(texts)} on {limit.at}")
            else:
                kept[NAMES[limit.target]] = None
        also = f", keeping {' and '.join(kept)}" if kept else ""
        return (
            "target: no plan of these variants meets it; the nearest reaches"
            f" {'; '.join(missed)}{also}"
        )
