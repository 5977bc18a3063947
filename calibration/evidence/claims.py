"""The two claims of "Beyond FLOPs" (arXiv 2606.09080), tested with its model and its quality on any device and engine.

A claim consists of comparisons of two pruned models. Each has a *margin*: a difference divided by the half-width of its
interval on the side towards 0. From 1 up the difference is positive with the whole interval, from -1 down negative.
The interval is that of the difference: what two models have in common cancels. Where all of several differences must be
positive, the smallest margin counts; where one is enough, the largest. A claim has the margin of the comparison that
decides it: from 1 up it *holds*, from -1 down it *does not hold*, else it is *undecided*. Claim (a) *does not apply*
where memory is not the bottleneck.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

import simulator
from calibration.evidence.paper import MODEL
from simulator.arrays import FloatArray
from simulator.errors import InputError
from simulator.hardware.profile import HardwareProfile
from simulator.prediction.compare import SMALL_SHARE, against
from simulator.prediction.pareto import Front, Point, fronts, independent, margins
from simulator.prediction.quality import choose_axis, load_quality
from simulator.prediction.scenario import profiles
from simulator.prediction.sentences import uncalibrated_of
from simulator.pruning import general_families
from simulator.units import percent
from simulator.workload import Workload, WorkloadBatch

HOLDS, FAILS, UNDECIDED, NOT_APPLICABLE = "holds", "does not hold", "undecided", "does not apply"
CLAIMS: Mapping[str, str] = {
    "bound": "in memory-bound inference static depth is the strongest baseline and stays closest to its theoretical "
    "bound",
    "order": "along the prefill frontier come static depth (0-4 % quality loss), dynamic depth (5-16 %), static width "
    "(17-26 %)",
}
QUALITY = "taxonomy-paper"  # the quality table of the paper's own models
BATCH, SEQ = 1, 2048
SPARSITIES = (0.125, 0.25, 0.5)  # tested for (a): whole layers of models with a multiple of eight of them
GROUPS: Mapping[str, int] = {"depth": 0, "dynamic_depth": 1, "width": 2, "width_cross": 2}  # places in the order of (b)
LAST_LOSS = (4, 16, 26)  # largest loss of accuracy, whole per cent, at which (b) places each group on the frontier
LEAST_GAIN = 0.05  # a family whose roofline bound is a smaller gain is not compared: a share of it would mean little
TOLERANCE = 0.005  # speedups and shares that differ by less count as equal: papers print two digits


@dataclass(frozen=True)
class ClaimOutcome:
    """The outcome of one test of a claim."""

    claim: str  # bound or order
    hardware: str
    engine: str
    phase: str
    batch: int
    seq: int
    verdict: str  # holds, does not hold, undecided, does not apply
    margin: float | None  # of the deciding comparison: from 1 up the claim holds, from -1 down it does not
    calibrated: bool  # this and the next two as in a result
    uncalibrated: str
    uncalibrated_share: float
    margins: tuple[tuple[float, float], ...] = ()  # (a): (sparsity, margin), the claim at that sparsity alone
    bottleneck: str = ""  # (a): of depth at these sparsities
    decided_by: str = ""  # the comparison
    needed: str = ""  # undecided: how well the comparison is known, and how well it must be
    details: str = ""  # (a): how many comparisons are decided
    elsewhere: tuple[str, ...] = ()  # (b): points of the frontier where another family is claimed


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
    """One family against pruned models (n,) of one device and request; arrays (2, n) have a row per measure: the log
    ratio of speedups, and the difference of the shares (speedup - 1) / (roofline bound - 1), which count up to 1."""

    models: tuple[PrunedModel, ...]
    own: NDArray[np.intp]  # (n,) the family's model at the same sparsity
    competes: NDArray[np.bool_]  # (n,) whether a model is compared with it
    difference: FloatArray
    half_width: FloatArray  # towards 0

    @property
    def margin(self) -> FloatArray:
        """(2, n); infinite for models that do not compete."""
        return np.asarray(np.where(self.competes, _margin(self.difference, self.half_width), np.inf))


def decided(margin: float) -> str:
    """Return the verdict on a claim of a margin."""
    return HOLDS if margin >= 1.0 else FAILS if margin <= -1.0 else UNDECIDED


def claim_outcomes(
    hardware: Sequence[str | HardwareProfile],
    engine: Sequence[str],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[ClaimOutcome]:
    """Test both claims on every device in every engine: (a) in prefill and decode, then (b)."""
    devices, quality = profiles(hardware), load_quality(QUALITY).of_model(MODEL)
    axis, places, out = choose_axis(quality), list(itertools.product(engine, ("prefill", "decode"))), []
    for done, (name, phase) in enumerate(places, start=1):
        dense = simulator.lower(simulator.load_model(MODEL), phase=phase, batch=BATCH, seq=SEQ, engine=name)
        pruned = []
        for family, sparsity in itertools.product(general_families(), SPARSITIES):
            try:
                pruned.append((family, sparsity, simulator.prune(dense, family, sparsity)))
            except InputError:  # 2:4 removes a half
                continue
        out += [bound_outcome(dense, pruned, hw) for hw in devices]
        progress(done, len(places) + 1)
    shape: dict[str, Any] = {"phase": ["prefill"], "batch": [BATCH], "seq": [SEQ], "engine": engine}
    out += [order_outcome(front) for front in fronts(MODEL, devices, quality, axis, **shape)[0]]
    progress(len(places) + 1, len(places) + 1)
    return out


def bound_outcome(
    dense: Workload, pruned: Sequence[tuple[str, float, Workload]], hw: HardwareProfile, level: float = 0.9
) -> ClaimOutcome:
    """Claim (a): at each sparsity depth is as fast as every other family and as close to its bound."""
    c = compare_family("depth", dense, pruned, hw, level)
    depth, margin = [m.speedup for m in c.models if m.family == "depth"], c.margin
    of = np.array([m.sparsity for m in c.models])
    parts = [(s, float(margin[:, of == s].min())) for s in SPARSITIES]
    measure, at = (int(i) for i in np.unravel_index(margin.argmin(), margin.shape))
    other, bottleneck = c.models[at], "/".join(dict.fromkeys(s.bottleneck for s in depth))
    verdict = decided(float(margin[measure, at])) if bottleneck == "memory" else NOT_APPLICABLE
    both = (c.models[c.own[at]], other)
    values = " and ".join(f"{m.speedup.speedup:.2f}x ({m.speedup.lower:.2f}-{m.speedup.upper:.2f})" for m in both)
    if measure:
        values = " and ".join(f"{100 * min(m.share, 1.0):.0f} %" for m in both) + " of the bound's gain"
    difference, width = float(c.difference[measure, at]) + TOLERANCE, float(c.half_width[measure, at])
    lacking, share = uncalibrated_of(depth)
    return ClaimOutcome(
        *("bound", hw.label, dense.meta.engine, dense.meta.phase, BATCH, SEQ),
        verdict=verdict,
        margin=float(margin[measure, at]),
        calibrated=share < SMALL_SHARE,
        uncalibrated=lacking,
        uncalibrated_share=share,
        margins=tuple(part for part in parts if math.isfinite(part[1])),
        bottleneck=bottleneck,
        decided_by=f"depth against {other.family} at {percent(other.sparsity)}: {values}",
        needed=_needed(difference, width, shares=measure == 1) if verdict == UNDECIDED else "",
        details=_details(c),
    )


def _needed(difference: float, half_width: float, shares: bool = False) -> str:
    """Return the end of the interval of a difference beyond 0, and how well the difference must be known to decide."""
    unit, reach = "points" if shares else "%", difference - math.copysign(half_width, difference)
    end, enough = (100.0 * (v if shares else math.expm1(v)) for v in (reach, abs(difference)))
    within = f"measure both models within {enough:.2g} {unit} to decide"
    return f"the interval of the difference reaches {end:+.2g} {unit}; {within}"


def _details(c: Comparisons) -> str:
    """Return how many comparisons are decided, and which are not."""
    margin, between = c.margin[np.isfinite(c.margin)], dict[str, list[str]]()
    counts = {"ahead": margin >= 1.0, "behind": margin <= -1.0, "undecided": np.abs(margin) < 1.0}
    told = ", ".join(f"{int(side.sum())} {word}" for word, side in counts.items() if side.any())
    for i in np.flatnonzero((np.abs(c.margin) < 1.0).any(axis=0)):
        between.setdefault(c.models[i].family, []).append(f"{100 * c.models[i].sparsity:g}")
    undecided = "; ".join(f"{family} at {', '.join(at)} %" for family, at in between.items())
    return f"depth in {len(margin)} comparisons: {told}" + (f" ({undecided})" if undecided else "")


def order_outcome(front: Front) -> ClaimOutcome:
    """Claim (b) on one frontier, among the dense model and the families that it orders, up to its largest loss."""
    reached = [i for i, p in enumerate(front.points) if round(100.0 * p.loss) <= LAST_LOSS[-1]]
    own = [i for i in reached if front.points[i].family in GROUPS]
    points = [front.points[i] for i in own]
    below = np.array(front.below or independent(front.points))[np.ix_(own, own)]
    up, down = np.log([(p.speedup_upper / p.speedup, p.speedup / p.speedup_lower) for p in points]).T
    margin, at, competitor, difference, half_width = in_order(
        [0.0, *(p.loss for p in points)],  # the dense model first
        [-1, *(GROUPS[p.family] for p in points)],
        [1.0, *(p.speedup for p in points)],
        np.block([[np.zeros((1, 1)), up[None]], [down[:, None], below]]),
    )

    def claimed(loss: float) -> int:
        return next(place for place, last in enumerate(LAST_LOSS) if round(100.0 * loss) <= last)

    def named(p: Point) -> str:
        return f"{p.family} {percent(p.sparsity)}"

    names, verdict = ["the dense model", *map(named, points)], decided(margin)
    others = [p for p in (front.points[i] for i in reached) if p.optimal and GROUPS.get(p.family) != claimed(p.loss)]
    return ClaimOutcome(
        *("order", front.hardware, front.engine, front.phase, front.batch, front.seq),
        verdict=verdict,
        margin=margin,
        calibrated=front.calibrated,
        uncalibrated=front.uncalibrated,
        uncalibrated_share=front.uncalibrated_share,
        decided_by=f"{names[at]} against {names[competitor]}: {math.exp(difference):.3f} times as fast",
        needed=_needed(difference, half_width) if verdict == UNDECIDED else "",
        elsewhere=tuple(f"{named(p)} ({percent(p.loss)} loss)" for p in others),
    )


def compare_family(
    family: str, dense: Workload, pruned: Sequence[tuple[str, float, Workload]], hw: HardwareProfile, level: float = 0.9
) -> Comparisons:
    """Compare a family with every other at the same sparsity: ``pruned`` are workloads with their family and sparsity,
    of which those that the device cannot run are excluded."""
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
    """Return the half-width on the side of 0."""
    return np.asarray(np.where(difference + TOLERANCE >= 0.0, low, high))


def in_order(
    loss: ArrayLike, group: Sequence[int], speedup: ArrayLike, below: ArrayLike
) -> tuple[float, int, int, float, float]:
    """Compare the points that decide whether every group has a point on the frontier, and groups come in their order.
    Return the margin, the two points, the log ratio of their speedups, and its half-width towards 0.

    ``loss`` (n,) of quality; ``group`` (n,) place in the claimed order, -1 for a point that only competes; ``speedup``
    (n,) and ``below`` (n, n) as of :func:`simulator.prediction.pareto.margins`. A point is on the frontier where it is
    faster than all others at no more loss; of two points whose groups come in the wrong order, one must not be on it.
    """
    x, g, log = np.asarray(loss, dtype=float), np.asarray(group), np.log(np.asarray(speedup, dtype=float))
    no_more = (x <= x[:, None]) & ~np.eye(len(x), dtype=bool)
    over_each = np.where(no_more, margins(speedup, below), np.inf)
    competitor, on = over_each.argmin(axis=1), over_each.min(axis=1)
    best = [max(np.flatnonzero(g == one), key=lambda i: on[i]) for one in np.unique(g[g >= 0])]
    wrong = np.argwhere((g[:, None] > g) & (g >= 0) & (x[:, None] < x))
    margin, i = min([(on[i], i) for i in best] + [(-min(on[i], on[j]), i if on[i] <= on[j] else j) for i, j in wrong])
    j, width, difference = competitor[i], np.asarray(below, dtype=float), float(log[i] - log[competitor[i]])
    return float(margin), int(i), int(j), difference, float(width[i, j] if difference >= 0.0 else width[j, i])
