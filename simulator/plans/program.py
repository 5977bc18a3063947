"""Choose one variant per group of layers: the multiple-choice knapsack, solved exactly by HiGHS.

Minimise the sum of scores, with one variant per group, so that each sum of costs is at most its limit. The linear
relaxation gives a lower bound and a price per unit of each cost. A variant whose score, costs at these prices included,
exceeds the best one of its group by more than the gap between a known solution and the bound is in no better solution
(reduced-cost fixing), so the integer program is solved with few variants: a hundred instead of thousands.

Symbols
-------
G : groups of layers
V : variants over all groups, in one array; those of a group follow each other
R : costs with a limit
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from simulator.arrays import FloatArray, IndexArray

MOST_NODES = 5000
"""Most nodes of the search tree of one program; beyond, the best choice so far and its gap count."""

FEW = 64
"""Number of variants beyond the best of each group that are tried first."""

LARGE = 1e3
"""Ratio of a score to that of a whole choice beyond which the program is solved again without such variants."""

_TIGHT = 1e-9
"""Largest relative excess of a limit."""


@dataclass(frozen=True)
class Solution:
    """The chosen variant of each group."""

    choice: IndexArray  # (G,) index into V
    score: float
    excess: float  # of the limits, a share of each; 0 unless no choice keeps all limits
    gap: float = 0.0  # share of the score that another choice could save at most


@dataclass(frozen=True)
class Program:
    """Scores and costs of the variants of groups of layers.

    >>> program = Program(np.array([0, 0, 1, 1]), np.array([0.0, 1.0, 0.0, 3.0]), np.array([[2.0, 1.0, 2.0, 0.5]]))
    >>> program.solve(np.array([3.0])).choice.tolist()
    [1, 2]
    """

    group: IndexArray  # (V,) rising
    score: FloatArray  # (V,)
    cost: FloatArray  # (R, V)

    def solve(self, limit: FloatArray, gap: float = 0.0) -> Solution:
        """Return the choice of least score whose costs are at most ``limit`` (R,); of none, that of least excess.

        ``gap`` is the relative gap up to which a solution counts as the best one; 0 is exact, up to
        :data:`MOST_NODES` of the search tree.
        """
        every = self._undominated()
        scale = np.maximum(np.abs(limit), 1e-6 * np.abs(self.cost).max(axis=1, initial=1e-300))
        cost, bound = self.cost / scale[:, None], limit / scale
        while True:
            found = self._solved(every, cost, bound, gap)
            rise = self._rises(every)
            most = float(rise[np.isin(every, found.choice)].sum())  # of any variant in a better choice
            if found.excess or rise.max(initial=0.0) <= LARGE * most:
                return found
            every = every[rise <= most]  # far larger ones hide the differences between the others from HiGHS

    def _rises(self, some: IndexArray) -> FloatArray:
        """Return by how much the scores of some variants exceed the least one of their group."""
        least = np.full(len(self.first()), np.inf)
        np.minimum.at(least, self.group[some], self.score[some])
        return np.asarray(self.score[some] - least[self.group[some]])

    def _solved(self, every: IndexArray, cost: FloatArray, bound: FloatArray, gap: float) -> Solution:
        """Return the solution with some variants, whose costs and limits are in units of the limits."""
        found = self._relaxed(every, cost, bound)
        if found is None:
            return self._least_excess(every, cost, bound)
        least, extra = found
        delta = float(np.sort(extra[extra > 0.0])[:FEW].max(initial=0.0))
        while True:
            some = every[extra <= delta]
            choice, proved = self._integer(some, cost, bound, gap)
            if choice is None and len(some) == len(every):
                return self._least_excess(every, cost, bound)
            if choice is not None:
                score = float(self.score[choice].sum())
                missing = score - least
                if missing * (1.0 - 1e-9) <= delta + gap * abs(score) or len(some) == len(every) or not proved:
                    left = 0.0 if proved and not gap else max(missing, 0.0) / max(abs(score), 1e-300)
                    return Solution(choice, score, 0.0, left)
                delta = missing
            else:
                delta = max(4.0 * delta, float(np.sort(extra)[min(len(extra) - 1, 2 * len(some))]))

    def sums(self, choice: IndexArray) -> FloatArray:
        """Return the costs (R,) of a choice."""
        return np.asarray(self.cost[:, choice].sum(axis=1))

    def first(self) -> IndexArray:
        """Return the first variant (G,) of each group."""
        return np.asarray(np.unique(self.group, return_index=True)[1])

    def hull(self, row: int = 0) -> list[IndexArray]:
        """Return choices from the least score down to the least of one cost, each the best at some price of the cost.

        These are the solutions of the linear relaxation at which no group is divided between variants.
        """
        cost, steps, begin = self.cost[row], list[tuple[float, int, int]](), []
        for g, own in enumerate(self._members()):
            at = int(own[np.lexsort((cost[own], self.score[own]))[0]])
            begin.append(at)
            while len(less := own[cost[own] < cost[at]]):
                with np.errstate(over="ignore"):  # huge scores: last
                    slope = (self.score[less] - self.score[at]) / (cost[at] - cost[less])
                first = np.lexsort((cost[less], slope))[0]
                at = int(less[first])
                steps.append((float(slope[first]), g, at))
        choice = np.array(begin)
        out = [choice.copy()]
        for _, g, at in sorted(steps, key=lambda step: step[0]):
            choice[g] = at
            out.append(choice.copy())
        return out

    def _members(self) -> list[IndexArray]:
        return np.split(np.arange(len(self.group)), self.first()[1:])

    def _undominated(self) -> IndexArray:
        """Return the variants to which no other of their group is equal or better in score and every cost."""
        keep = []
        for own in self._members():
            values = np.vstack([self.score[own], self.cost[:, own]])
            order = np.lexsort(values[::-1])
            values, kept = values[:, order], list[int]()
            for i in range(len(order)):  # in this order, only earlier ones can be better
                if not kept or not (values[:, kept] <= values[:, [i]]).all(axis=0).any():
                    kept.append(i)
            keep.append(own[order[kept]])
        return np.sort(np.concatenate(keep))

    def _relaxed(self, some: IndexArray, cost: FloatArray, bound: FloatArray) -> tuple[float, FloatArray] | None:
        """Return the bound of the linear relaxation, and by how much each variant exceeds the best of its group at its
        prices; None if no mixture keeps the limits."""
        from scipy.optimize import linprog

        rise = self._rises(some)
        unit = max(float(rise.max(initial=0.0)), 1e-300)  # HiGHS takes costs above 1e20 as infinite
        found = linprog(
            rise / unit,
            A_ub=cost[:, some],
            b_ub=bound,
            A_eq=self._one_each(some),
            b_eq=np.ones(len(self.first())),
            bounds=(0.0, 1.0),
            method="highs",
        )
        if found.x is None:
            return None
        prices = np.maximum(-found.ineqlin.marginals, 0.0) * unit
        whole = self.score[some] + prices @ cost[:, some]
        best = np.full(len(self.first()), np.inf)
        np.minimum.at(best, self.group[some], whole)
        return float(best.sum() - prices @ bound), whole - best[self.group[some]]

    def _integer(
        self, some: IndexArray, cost: FloatArray, bound: FloatArray, gap: float
    ) -> tuple[IndexArray | None, bool]:
        """Return the best choice of some variants, if any keeps the limits, and whether it is proved up to the gap."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        rise = self._rises(some)
        unit = max(float(rise.max(initial=0.0)), 1e-300)
        inner = bound
        for _ in range(3):
            limits = [LinearConstraint(self._one_each(some), 1.0, 1.0)]
            limits += [LinearConstraint(cost[:, some], -np.inf, inner)] if len(cost) else []
            with _quiet():
                found = milp(
                    rise / unit,
                    constraints=limits,
                    integrality=np.ones(len(some)),
                    bounds=Bounds(0.0, 1.0),
                    options={"mip_rel_gap": gap, "node_limit": MOST_NODES},
                )
            if found.x is None:
                break
            choice = some[np.flatnonzero(found.x > 0.5)]
            excess = cost[:, choice].sum(axis=1) - bound
            if (excess <= _TIGHT).all():
                return np.asarray(choice), found.status == 0
            inner = np.minimum(inner, bound - 2.0 * np.maximum(excess, 0.0))  # HiGHS allows 1e-6
        return None, True

    def _least_excess(self, some: IndexArray, cost: FloatArray, bound: FloatArray) -> Solution:
        """Return the choice that exceeds its limits by the least share."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        many = len(some)
        one = np.hstack([self._one_each(some).toarray(), np.zeros((len(self.first()), 1))])
        limits = [
            LinearConstraint(one, 1.0, 1.0),
            LinearConstraint(np.hstack([cost[:, some], -np.ones((len(cost), 1))]), -np.inf, bound),
        ]
        with _quiet():
            found = milp(
                np.append(np.zeros(many), 1.0),
                constraints=limits,
                integrality=np.append(np.ones(many), 0.0),
                bounds=Bounds(np.zeros(many + 1), np.append(np.ones(many), np.inf)),
            )
        choice = some[np.flatnonzero(found.x[:-1] > 0.5)]
        excess = float((cost[:, choice].sum(axis=1) - bound).max())
        return Solution(np.asarray(choice), float(self.score[choice].sum()), max(excess, _TIGHT))

    def _one_each(self, some: IndexArray) -> Any:
        """Return a sparse matrix (G, n) of ones where a variant belongs to a group."""
        from scipy.sparse import csr_array

        places = self.group[some], np.arange(len(some))
        return csr_array((np.ones(len(some)), places), shape=(len(self.first()), len(some)))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Discard what HiGHS 1.12 prints to standard output whatever its options, with file descriptor 1."""
    try:
        kept = os.dup(1)
    except OSError:  # no standard output
        yield
        return
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
