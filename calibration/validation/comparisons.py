"""Comparisons of two pruned models, each with a margin: the arithmetic of :mod:`calibration.validation.claims`.

Use :func:`compare_family` for one family against all others at equal sparsity, :func:`in_order` for groups of points
that should follow each other along a frontier.

A *margin* is a difference divided by the half-width of its interval on the side towards 0. From 1 up the difference is
positive with the whole interval, from -1 down negative. The interval is that of the difference: what two models have in
common cancels. Where all of several differences must be positive, the smallest margin counts; where one is enough, the
largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

import simulator
from simulator.arrays import FloatArray
from simulator.errors import InputError
from simulator.hardware.profile import HardwareProfile
from simulator.prediction.compare import against
from simulator.prediction.pareto import margins
from simulator.workload import Workload
from simulator.workload_batch import WorkloadBatch

LEAST_GAIN = 0.05
"""A family whose roofline bound promises a smaller gain is not compared: a share of it would mean little."""

TOLERANCE = 0.005
"""Speedups and shares that differ by less count as equal: papers print two digits."""


@dataclass(frozen=True)
class PrunedModel:
    """A pruned model and its predicted speedup."""

    family: str
    sparsity: float
    speedup: simulator.Result

    @property
    def share(self) -> float:
        """Share of the roofline bound's gain that is achieved."""
        return float((self.speedup.speedup - 1.0) / (self.speedup.roofline_bound - 1.0))


@dataclass(frozen=True)
class Comparisons:
    """One family against pruned models (n,) of one device and request; arrays (2, n) have a row per measure.

    Measures are the log ratio of speedups, and the difference of the shares (speedup - 1) / (roofline bound - 1), which
    count up to 1.
    """

    models: tuple[PrunedModel, ...]
    own: NDArray[np.intp]  # (n,) the family's model at the same sparsity
    competes: NDArray[np.bool_]  # (n,) whether a model is compared with it
    difference: FloatArray
    half_width: FloatArray  # towards 0

    @property
    def margin(self) -> FloatArray:
        """(2, n); infinite for models that do not compete."""
        return np.asarray(np.where(self.competes, _margin(self.difference, self.half_width), np.inf))


def compare_family(
    family: str, dense: Workload, pruned: Sequence[tuple[str, float, Workload]], hw: HardwareProfile, level: float = 0.9
) -> Comparisons:
    """Compare a family with every other at the same sparsity.

    ``pruned`` are workloads with their family and sparsity. A workload that the device cannot run is left out.

    >>> dense = simulator.lower(simulator.load_model("llama-3.1-8b"), phase="decode")
    >>> pruned = [(name, 0.25, simulator.prune(dense, name, 0.25)) for name in ("depth", "width")]
    >>> found = compare_family("depth", dense, pruned, simulator.load_hardware("h100"))
    >>> found.competes.tolist(), bool(found.difference[0, 1] > 0)
    ([False, True], True)
    """
    try:
        found = simulator.speedups(dense, [w for _, _, w in pruned], hw, level)
    except InputError:
        pruned = [one for one in pruned if _runs(dense, one[2], hw)]
        found = simulator.speedups(dense, [w for _, _, w in pruned], hw, level)
    workloads, every = [w for _, _, w in pruned], np.arange(len(pruned))
    at = {sparsity: i for i, (name, sparsity, _) in enumerate(pruned) if name == family}
    own = np.array([at.get(sparsity, i) for i, (_, sparsity, _) in enumerate(pruned)])

    stacked = WorkloadBatch.of([dense, *workloads])
    # log of the speedup of each over the family's: its interval reaches as far above as that of the inverse below
    behind, high, low = (part[0, 1:] for part in against(stacked, hw, [np.r_[0, 1 + own]], level))
    s, lower, upper, bound = np.array([(f.speedup, f.lower, f.upper, f.roofline_bound) for f in found]).T
    gain = np.maximum(bound - 1.0, 1e-9)
    down, up, share, slope = np.log(s / lower), np.log(upper / s), (s - 1.0) / gain, s / gain

    def of_shares(of_own: FloatArray, of_other: FloatArray, of_ratio: FloatArray) -> FloatArray:
        """Half-width of a difference of shares; those of two logs and of their ratio give the covariance."""
        covariance = 0.5 * (of_own**2 + of_other**2 - of_ratio**2)
        a, b = slope[own], slope
        square = (a * of_own) ** 2 + (b * of_other) ** 2 - 2.0 * a * b * covariance
        return np.asarray(np.sqrt(np.maximum(square, 0.0)))

    difference, to_bound = share[own] - share, share[own] - 1.0
    width = _towards(difference, of_shares(down[own], up, low), of_shares(up[own], down, high))
    width_to_bound = _towards(to_bound, slope[own] * down[own], slope[own] * up[own])
    at_bound = _margin(to_bound, width_to_bound) > _margin(difference, width)  # no other model can be closer to it
    return Comparisons(
        models=tuple(PrunedModel(name, sparsity, one) for (name, sparsity, _), one in zip(pruned, found)),
        own=own,
        competes=(own != every) & (np.minimum(gain, gain[own]) >= LEAST_GAIN),
        difference=np.stack([-behind, np.where(at_bound, to_bound, difference)]),
        half_width=np.stack([_towards(-behind, low, high), np.where(at_bound, width_to_bound, width)]),
    )


def _runs(dense: Workload, pruned: Workload, hw: HardwareProfile) -> bool:
    try:
        simulator.speedup(dense, pruned, hw)
    except InputError:
        return False
    return True


def _margin(difference: FloatArray, half_width: FloatArray) -> FloatArray:
    return np.asarray((difference + TOLERANCE) / np.maximum(half_width, 1e-12))


def _towards(difference: FloatArray, low: FloatArray, high: FloatArray) -> FloatArray:
    """The half-width on the side of 0."""
    return np.asarray(np.where(difference + TOLERANCE >= 0.0, low, high))


@dataclass(frozen=True)
class FrontierComparison:
    """The comparison of two points that decides whether groups follow each other along a frontier."""

    margin: float
    point: int
    competitor: int
    difference: float  # log ratio of the two speedups
    half_width: float  # towards 0


def in_order(loss: ArrayLike, group: Sequence[int], speedup: ArrayLike, below: ArrayLike) -> FrontierComparison:
    """Compare the points that decide whether every group has a point on the frontier, and groups come in their order.

    ``loss`` (n,) of quality; ``group`` (n,) place in the claimed order, -1 for a point that only competes; ``speedup``
    (n,) and ``below`` (n, n) as of :func:`simulator.prediction.pareto.margins`. A point is on the frontier where it is
    faster than all others at no more loss; of two points whose groups come in the wrong order, one must not be on it.

    >>> loss, speedup, below = [0.02, 0.1, 0.2], [1.1, 1.3, 1.6], np.full((3, 3), 0.05)
    >>> in_order(loss, [0, 1, 2], speedup, below).margin > 1, in_order(loss, [2, 1, 0], speedup, below).margin < -1
    (True, True)
    """
    x, g, log = np.asarray(loss, dtype=float), np.asarray(group), np.log(np.asarray(speedup, dtype=float))
    no_more = (x <= x[:, None]) & ~np.eye(len(x), dtype=bool)
    over_each = np.where(no_more, margins(speedup, below), np.inf)
    competitor, on = over_each.argmin(axis=1), over_each.min(axis=1)
    best = [max(np.flatnonzero(g == one), key=lambda i: on[i]) for one in np.unique(g[g >= 0])]
    wrong = np.argwhere((g[:, None] > g) & (g >= 0) & (x[:, None] < x))
    found = [(on[i], i) for i in best] + [(-min(on[i], on[j]), i if on[i] <= on[j] else j) for i, j in wrong]
    margin, i = min(found)
    j, width = competitor[i], np.asarray(below, dtype=float)
    difference = float(log[i] - log[j])
    towards = width[i, j] if difference >= 0.0 else width[j, i]
    return FrontierComparison(float(margin), int(i), int(j), difference, float(towards))
