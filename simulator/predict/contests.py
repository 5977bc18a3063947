"""By how much one pruned model is ahead of others, and how sure that is: the arithmetic of
:mod:`simulator.predict.claims`.

Use :func:`contests_of` to set one family against all others at equal sparsity, :func:`in_order` to ask whether groups
of points come one after the other along a frontier.

A *margin* is a difference in units of how far its interval reaches towards 0: from 1 up it is positive for sure, from
-1 down negative. The interval is of the difference itself, so what two models have in common cancels. Where all of
several differences must be positive the least margin counts, where one is enough the largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simulator.arrays import FloatArray
from simulator.predict.compare import against, results_of
from simulator.predict.pareto import margins
from simulator.predict.result import Result

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile
    from simulator.predict.batch import Reject
    from simulator.predict.prunings import Pruning
    from simulator.predict.scenario import Scenario
    from simulator.workload_batch import WorkloadBatch


LEAST_GAIN = 0.05
"""A family whose bound promises less than this has nothing to come close to, and takes no part."""

CLOSE = 0.005
"""Speedups and shares of bounds that differ by less than this count as equal: papers print two digits."""

MEASURES: tuple[str, ...] = ("speedup", "share of its bound")
"""What is compared; the index is the row in :class:`Contests`. The share is (speedup - 1) / (roofline bound - 1), and
counts up to 1."""


@dataclass(frozen=True)
class Contests:
    """Rows of one request on one device, and by how much the row of one family at the same sparsity is ahead of each,
    (2, n) of :data:`MEASURES`: the log of its speedup over it, the difference of shares."""

    records: tuple[Result, ...]
    own: NDArray[np.intp]  # (n,) that row of each
    rival: NDArray[np.bool_]  # (n,) whether a row takes part
    ahead: FloatArray
    reach: FloatArray  # how far the interval of that reaches towards 0, :data:`CLOSE` added

    @property
    def margin(self) -> FloatArray:
        """(2, n); infinite for what takes no part."""
        return np.asarray(np.where(self.rival, _in_reach(self.ahead, self.reach), np.inf))


def contests_of(
    batch: WorkloadBatch,
    prunings: Sequence[Pruning],
    hw: HardwareProfile,
    family: str,
    scenario: Scenario,
    reject: Reject,
) -> list[Contests]:
    """A family against every other at the same sparsity, by request.

    >>> from simulator import load_hardware, load_model
    >>> from simulator.predict.batch import batch_of
    >>> from simulator.predict.prunings import prunings_of
    >>> from simulator.predict.scenario import Scenario
    >>> prunings = prunings_of([load_model("llama-3.1-8b")], ["depth", "width"], sparsity=[0.25])
    >>> one = Scenario(model="llama-3.1-8b", phase="decode")
    >>> batch = batch_of(one, prunings, print)
    >>> (found,) = contests_of(batch, prunings, load_hardware("h100"), "depth", one, print)
    >>> found.rival.tolist(), bool(found.ahead[0, 1] > 0)
    ([False, True], True)
    """
    results = results_of(batch, prunings, [hw], scenario, reject)
    columns, requests = results.columns, len(scenario.shapes)
    ran = np.flatnonzero(np.isin(batch.pruning, results.pruning))
    ran = ran[np.lexsort((batch.pruning[ran], batch.dense[ran]))]  # in the order of the results
    request, pruning, every = batch.dense[ran], batch.pruning[ran], np.arange(len(ran))
    at = np.full((requests, len(prunings)), -1)
    at[request, pruning] = every
    of_sparsity = {p.sparsity: i for i, p in enumerate(prunings) if p.family == family}
    own = at[request, np.array([of_sparsity[p.sparsity] for p in prunings])[pruning]]
    known, own = own >= 0, np.where(own < 0, every, own)

    over = np.r_[np.arange(requests), requests + own]  # what each workload is set against
    found = against(batch.take(np.r_[np.arange(requests), ran]), hw, [over], scenario.level)
    behind, high, low = (values[0, requests:] for values in found)  # turned round: its low end is our high one
    s, gain = columns["speedup"], np.maximum(columns["roofline_bound"] - 1.0, 1e-9)
    down, up = np.log(s / columns["speedup_lower"]), np.log(columns["speedup_upper"] / s)
    share, slope = (s - 1.0) / gain, s / gain  # and by how much it changes with the log of the speedup

    def of_shares(of_own: FloatArray, of_rival: FloatArray, of_ratio: FloatArray) -> FloatArray:
        """Reach of the difference of two shares; the covariance of two logs follows from the reach of their ratio."""
        covariance = 0.5 * (of_own**2 + of_rival**2 - of_ratio**2)
        a, b = slope[own], slope
        square = (a * of_own) ** 2 + (b * of_rival) ** 2 - 2.0 * a * b * covariance
        return np.asarray(np.sqrt(np.maximum(square, 0.0)))

    difference, left = share[own] - share, share[own] - 1.0
    reach = _towards(difference, of_shares(down[own], up, low), of_shares(up[own], down, high))
    to_bound = _towards(left, slope[own] * down[own], slope[own] * up[own])
    reached = _in_reach(left, to_bound) > _in_reach(difference, reach)
    ahead = np.stack([-behind, np.where(reached, left, difference)])  # at its bound it is as close as any
    reaches = np.stack([_towards(-behind, low, high), np.where(reached, to_bound, reach)])
    rival = known & (own != every) & (np.minimum(gain, gain[own]) >= LEAST_GAIN)
    rows = results.rows
    return [
        Contests(tuple(rows[i] for i in some), own[some] - some[0], rival[some], ahead[:, some], reaches[:, some])
        for some in (np.flatnonzero(request == r) for r in range(requests))
    ]


def _in_reach(ahead: FloatArray, reach: FloatArray) -> FloatArray:
    return np.asarray((ahead + CLOSE) / np.maximum(reach, 1e-12))


def _towards(ahead: FloatArray, low: FloatArray, high: FloatArray) -> FloatArray:
    """The reach on the side of 0."""
    return np.asarray(np.where(ahead + CLOSE >= 0.0, low, high))


@dataclass(frozen=True)
class Step:
    """A margin and the two points of a frontier that it is of."""

    margin: float
    point: int
    rival: int
    ahead: float  # log speedup of the point over its rival
    reach: float  # how far the interval of that reaches towards 0


def in_order(loss: ArrayLike, group: Sequence[int], speedup: ArrayLike, below: ArrayLike) -> Step:
    """Margin of: on the frontier among some points every group has a point, and by rising loss groups never fall.

    ``loss`` (n,) of quality; ``group`` (n,) place in the order claimed, -1 for a point that only stands in the way of
    others; ``speedup`` (n,) and ``below`` (n, n) as of :func:`simulator.predict.pareto.margins`. A point is on the
    frontier where it is faster than all others at no more loss; of two whose groups come the wrong way round, one must
    not be.

    >>> loss, speedup, below = [0.02, 0.1, 0.2], [1.1, 1.3, 1.6], np.full((3, 3), 0.05)
    >>> in_order(loss, [0, 1, 2], speedup, below).margin > 1, in_order(loss, [2, 1, 0], speedup, below).margin < -1
    (True, True)
    """
    x, g, log = np.asarray(loss, dtype=float), np.asarray(group), np.log(np.asarray(speedup, dtype=float))
    no_more = (x <= x[:, None]) & ~np.eye(len(x), dtype=bool)
    over_each = np.where(no_more, margins(speedup, below), np.inf)
    rival = over_each.argmin(axis=1)
    on = over_each.min(axis=1)
    best = [max(np.flatnonzero(g == one), key=lambda i: on[i]) for one in np.unique(g[g >= 0])]
    wrong = np.argwhere((g[:, None] > g) & (g >= 0) & (x[:, None] < x))
    found = [(on[i], i) for i in best] + [(-min(on[i], on[j]), i if on[i] <= on[j] else j) for i, j in wrong]
    margin, i = min(found)
    j, reach = rival[i], np.asarray(below, dtype=float)
    ahead = float(log[i] - log[j])
    return Step(float(margin), int(i), int(j), ahead, float(reach[i, j] if ahead >= 0.0 else reach[j, i]))
