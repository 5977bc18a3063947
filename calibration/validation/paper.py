"""The taxonomy paper "Beyond FLOPs" (arXiv 2606.09080): its benchmark, predicted, and its two
claims, tested.

The published numbers (``calibration/measurements/published_paper.csv``) are quoted from a reading
note of the paper. The conditions are those of its code (github.com/EIT-NLP/LLM-Pruning,
PruningInferSim): batch 1, 8, 16, 32 at 1024 tokens, logits of all positions, a CUDA graph. No
constant is fitted to the table. Functions that return rows return what ``prunesim paper --json``
prints.

A claim consists of comparisons of two pruned models. Each comparison has a *margin*: a difference
divided by the half-width of its interval on the side towards 0. Errors that two models share cancel
in the interval. Where all of several differences must be positive, the smallest margin decides;
where one is enough, the largest. A claim *holds* if the margin that decides is at least 1, it *does
not hold* if the margin is at most -1, else it is *undecided*. Claim (a) *does not apply* where
memory is not the bottleneck.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

import simulator
from calibration.measurements import published
from simulator.arrays import BoolArray, FloatArray, IndexArray
from simulator.codes import ROLES, Kind
from simulator.errors import InputError
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import HardwareProfile
from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.prediction.compare import SMALL_SHARE, against
from simulator.prediction.notes import uncalibrated_of
from simulator.prediction.pareto import Front, Point, fronts, independent
from simulator.prediction.quality import choose_axis, load_quality
from simulator.prediction.requests import by_key, profiles
from simulator.prediction.result import Result
from simulator.prediction.table import table
from simulator.pruning import general_families
from simulator.uncertainty.forward import forward_passes
from simulator.units import percent
from simulator.workload import Workload, WorkloadBatch

Row = dict[str, Any]

MODEL, HARDWARE, ENGINE = "llama-3.1-8b", "rtx_pro_6000", "reference"
BATCHES, SEQ, PHASES = (1, 8, 16, 32), 1024, ("prefill", "decode")
PRINTED = 0.005  # half a unit of the last printed digit of a published speedup

# Part of Figure 2 -> roles; "elementwise" are all other kernels, "graph execution" the gaps between
# kernels
PARTS: Mapping[str, tuple[str, ...]] = {
    "gate/up/down": ("gate", "up", "down"),
    "attention": ("attention",),
    "q/k/v/o": ("q", "k", "v", "o"),
    "lm_head": ("lm_head",),
}


@dataclass(frozen=True)
class Cell:
    """A speedup of the table: means over the batches."""

    hardware: str
    engine: str
    family: str
    sparsity: float
    phase: str
    published: float  # or NaN
    predicted: float
    lower: float
    upper: float
    by_batch: tuple[float, ...]

    @property
    def error(self) -> float:
        return self.predicted / self.published - 1.0

    @property
    def inside(self) -> bool:
        """Whether the published value lies in the interval, within its rounding."""
        return self.lower - PRINTED <= self.published <= self.upper + PRINTED


def table_2(hardware: Sequence[str] = (HARDWARE,), engine: Sequence[str] = (ENGINE,)) -> list[Cell]:
    """Return the paper's Table 2 on devices in engines; published values are those of the paper's
    device and engine."""
    known = _known()
    families = list(dict.fromkeys(family for family, _, _ in known))
    sparsities = sorted({s for _, s, _ in known})
    asked: Row = {"phase": PHASES, "batch": BATCHES, "seq": [SEQ], "engine": engine}
    results_of = by_key(
        table([MODEL], hardware, families, sparsities, **asked),
        lambda r: (r.hardware, r.engine, r.family, r.sparsity, r.phase),
    )
    there, out = (load_hardware(HARDWARE).label, ENGINE), []
    for key, results in results_of.items():
        printed = known[key[2:]] if key[:2] == there else float("nan")
        out.append(Cell(*key, printed, *_means(results)))
    return out


def _means(results: Sequence[Result]) -> tuple[float, float, float, tuple[float, ...]]:
    """Return the mean speedup, the means of its ends, and the speedup at each batch."""
    in_order = sorted(results, key=lambda r: r.batch)
    values = np.array([(r.speedup, r.speedup_lower, r.speedup_upper) for r in in_order])
    predicted, low, high = values.mean(axis=0).tolist()
    return predicted, low, high, tuple(values[:, 0].tolist())


def _known() -> dict[tuple[str, float, str], float]:
    rows = _published("table 2")
    return {(r["family"], float(r["sparsity"]), r["phase"]): float(r["value"]) for r in rows}


def _published(what: str) -> list[Mapping[str, str]]:
    return [r for r in published("paper") if r["what"] == what]


def figure_2() -> list[Row]:
    """Return the times of prefill and decode by part, and their sums.

    In prefill the paper attributes 4.5 % to the graph and under 0.1 % to the head. Its code
    computes logits of all positions, which take as long as the graph's part, so graph and head are
    compared together.
    """
    rows, out = _published("figure 2"), list[Row]()
    for phase in dict.fromkeys(r["phase"] for r in rows):
        parts = [r for r in rows if r["phase"] == phase]
        (total,) = (float(r["value"]) for r in parts if r["metric"] == "seconds")
        shares = {r["part"]: float(r["value"]) for r in parts if r["metric"] == "share"}
        first = parts[0]
        batch, seq = int(first["batch"]), int(first["seq"])
        w = lower(load_model(first["model"]), phase=phase, batch=batch, seq=seq, engine="reference")
        p = forward_passes(WorkloadBatch.of([w]), load_hardware(first["hardware"]))
        role = np.array(ROLES)[w.role]
        predicted = {
            name: float(p.row_s[np.isin(role, roles)].sum()) for name, roles in PARTS.items()
        }
        predicted["elementwise"] = float(p.row_s[w.kind == Kind.ELEMENTWISE].sum())
        predicted["graph execution"] = float(p.gap_s[0])
        for times in (shares, predicted) if phase == "prefill" else ():
            both_s = times.pop("graph execution") + times.pop("lm_head")
            times["graph execution and lm_head"] = both_s
        both = {name: (share * total, predicted[name]) for name, share in shares.items()}
        both["all"] = total, float(p.total_s[0])
        out += [
            {"phase": phase, "part": name, "measured_s": m, "predicted_s": t}
            for name, (m, t) in both.items()
        ]
    return out


HOLDS, FAILS, UNDECIDED, NOT_APPLICABLE = "holds", "does not hold", "undecided", "does not apply"
CLAIMS: Mapping[str, str] = {
    "bound": (
        "in memory-bound inference static depth is the strongest baseline and stays closest to its"
        " theoretical bound"
    ),
    "order": (
        "along the prefill frontier come static depth (0-4 % quality loss), dynamic depth (5-16 %),"
        " static width (17-26 %)"
    ),
}
QUALITY = "taxonomy-paper"  # the quality table of the paper's own models
BATCH, CLAIM_SEQ, LEVEL = 1, 2048, 0.9
# tested for (a): whole layers of models with a multiple of eight of them
SPARSITIES = (0.125, 0.25, 0.5)
# place in the order of (b)
GROUPS: Mapping[str, int] = {"depth": 0, "dynamic_depth": 1, "width": 2, "width_cross": 2}
# largest loss of accuracy, whole per cent, of each place in the order of (b)
LAST_LOSS = (4, 16, 26)
# a family with a smaller gain as roofline bound is not compared: a share of it would mean little
LEAST_GAIN = 0.05
TOLERANCE = 0.005  # speedups and shares that differ by less count as equal: papers print two digits


@dataclass(frozen=True)
class ClaimOutcome:
    claim: str  # bound or order
    hardware: str
    engine: str
    phase: str
    batch: int
    seq: int
    verdict: str  # holds, does not hold, undecided, does not apply
    margin: float | None  # margin of the comparison that decides
    calibrated: bool  # this and the next two as in a result
    uncalibrated: str
    uncalibrated_share: float
    # (a): (sparsity, margin of the claim at this sparsity)
    margins: tuple[tuple[float, float], ...] = ()
    bottleneck: str = ""  # (a): bottleneck of depth
    decided_by: str = ""  # the comparison
    needed: str = ""  # undecided: the interval of the comparison, and how narrow it must be
    elsewhere: tuple[str, ...] = ()  # (b): points of the frontier where another family is claimed


@dataclass(frozen=True)
class Comparisons:
    """One family against n pruned models of one device and request. Arrays (2, n) have two
    measures: the log ratio of speedups, and the difference of shares (speedup - 1) / (roofline
    bound - 1), each at most 1."""

    models: tuple[tuple[str, float], ...]  # family and sparsity
    speedups: tuple[simulator.Result, ...]
    share: FloatArray  # (n,)
    own: IndexArray  # (n,) index of the family's model at the same sparsity
    competes: BoolArray  # (n,) whether the model is compared with the family's
    difference: FloatArray  # (2, n)
    half_width: FloatArray  # (2, n), on the side of 0
    margin: FloatArray  # (2, n), infinite for models that do not compete

    def margins(self) -> tuple[tuple[float, float], ...]:
        """Return the smallest margin at each sparsity at which models compete."""
        of = np.array([sparsity for _, sparsity in self.models])
        least = ((s, float(self.margin[:, of == s].min())) for s in SPARSITIES)
        return tuple(part for part in least if math.isfinite(part[1]))

    def shown(self, model: int, measure: int) -> str:
        if measure:
            return f"{100 * min(self.share[model], 1.0):.0f} % of the bound's gain"
        s = self.speedups[model]
        return f"{s.speedup:.2f}x ({s.lower:.2f}-{s.upper:.2f})"


def decided(margin: float) -> str:
    return HOLDS if margin >= 1.0 else FAILS if margin <= -1.0 else UNDECIDED


def claim_outcomes(
    hardware: Sequence[str | HardwareProfile],
    engine: Sequence[str],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[ClaimOutcome]:
    """Test both claims on every device in every engine: (a) in prefill and decode, then (b)."""
    devices, quality = profiles(hardware), load_quality(QUALITY).of_model(MODEL)
    axis, out = choose_axis(quality), list[ClaimOutcome]()
    places = list(itertools.product(engine, PHASES))
    for done, (name, phase) in enumerate(places, start=1):
        dense = lower(load_model(MODEL), phase=phase, batch=BATCH, seq=CLAIM_SEQ, engine=name)
        pruned = []
        for family, sparsity in itertools.product(general_families(), SPARSITIES):
            try:
                pruned.append((family, sparsity, simulator.prune(dense, family, sparsity)))
            except InputError:  # 2:4 removes a half
                continue
        out += [bound_outcome(dense, pruned, hw) for hw in devices]
        progress(done, len(places) + 1)
    shape: Row = {"phase": ["prefill"], "batch": [BATCH], "seq": [CLAIM_SEQ], "engine": engine}
    out += [order_outcome(front) for front in fronts(MODEL, devices, quality, axis, **shape)[0]]
    progress(len(places) + 1, len(places) + 1)
    return out


def bound_outcome(
    dense: Workload, pruned: Sequence[tuple[str, float, Workload]], hw: HardwareProfile
) -> ClaimOutcome:
    """Test claim (a): at each sparsity depth is as fast as every other family and as close to its
    bound."""
    c = compare_family("depth", dense, pruned, hw)
    depth = [s for (family, _), s in zip(c.models, c.speedups) if family == "depth"]
    measure, model = (int(i) for i in np.unravel_index(c.margin.argmin(), c.margin.shape))
    other, sparsity = c.models[model]
    margin = float(c.margin[measure, model])
    bottleneck = "/".join(dict.fromkeys(s.bottleneck for s in depth))
    verdict = decided(margin) if bottleneck == "memory" else NOT_APPLICABLE
    values = " and ".join(c.shown(i, measure) for i in (int(c.own[model]), model))
    difference = float(c.difference[measure, model]) + TOLERANCE
    width = float(c.half_width[measure, model])
    lacking, share = uncalibrated_of(depth)
    return ClaimOutcome(
        *("bound", hw.label, dense.meta.engine, dense.meta.phase, BATCH, CLAIM_SEQ),
        verdict=verdict,
        margin=margin,
        calibrated=share < SMALL_SHARE,
        uncalibrated=lacking,
        uncalibrated_share=share,
        margins=c.margins(),
        bottleneck=bottleneck,
        decided_by=f"depth against {other} at {percent(sparsity)}: {values}",
        needed=_needed(difference, width, shares=measure == 1) if verdict == UNDECIDED else "",
    )


def _needed(difference: float, half_width: float, shares: bool = False) -> str:
    """Return how far the interval of a difference reaches beyond 0, and how narrow it must be to
    decide."""
    unit, reach = "points" if shares else "%", difference - math.copysign(half_width, difference)
    end, enough = (100.0 * (v if shares else math.expm1(v)) for v in (reach, abs(difference)))
    within = f"measure both models within {enough:.2g} {unit} to decide"
    return f"the interval of the difference reaches {end:+.2g} {unit}; {within}"


def order_outcome(front: Front) -> ClaimOutcome:
    """Test claim (b) on the dense model and the families that it orders, up to the largest claimed
    loss."""
    reached = [i for i, p in enumerate(front.points) if round(100.0 * p.loss) <= LAST_LOSS[-1]]
    ordered = [i for i in reached if front.points[i].family in GROUPS]
    points = [front.points[i] for i in ordered]
    margin, point, competitor, difference, half_width = in_order(
        [0.0, *(p.loss for p in points)],  # the dense model first
        [-1, *(GROUPS[p.family] for p in points)],
        [1.0, *(p.speedup for p in points)],
        _below(front, ordered),
    )
    names, verdict = ["the dense model", *map(_named, points)], decided(margin)
    optimal = [front.points[i] for i in reached if front.points[i].optimal]
    others = [p for p in optimal if GROUPS.get(p.family) != _claimed(p.loss)]
    return ClaimOutcome(
        *("order", front.hardware, front.engine, front.phase, front.batch, front.seq),
        verdict=verdict,
        margin=margin,
        calibrated=front.calibrated,
        uncalibrated=front.uncalibrated,
        uncalibrated_share=front.uncalibrated_share,
        decided_by=(
            f"{names[point]} against {names[competitor]}: {math.exp(difference):.3f} times as fast"
        ),
        needed=_needed(difference, half_width) if verdict == UNDECIDED else "",
        elsewhere=tuple(f"{_named(p)} ({percent(p.loss)} loss)" for p in others),
    )


def _claimed(loss: float) -> int:
    return next(place for place, last in enumerate(LAST_LOSS) if round(100.0 * loss) <= last)


def _named(p: Point) -> str:
    return f"{p.family} {percent(p.sparsity)}"


def _below(front: Front, chosen: Sequence[int]) -> FloatArray:
    """Return half-widths of the log ratios of the dense model and of chosen points."""
    points = [front.points[i] for i in chosen]
    widths = front.below or independent(front.points)
    below = widths(np.array(chosen), slice(None))[:, chosen]
    up, down = np.log(
        [(p.speedup_upper / p.speedup, p.speedup / p.speedup_lower) for p in points]
    ).T
    return np.block([[np.zeros((1, 1)), up[None]], [down[:, None], below]])


def compare_family(
    family: str, dense: Workload, pruned: Sequence[tuple[str, float, Workload]], hw: HardwareProfile
) -> Comparisons:
    """Compare a family with every other at the same sparsity. ``pruned`` are families, sparsities
    and workloads; those that the device cannot run are excluded."""

    pruned, speedups = _runnable(dense, pruned, hw)
    numbers = {sparsity: i for i, (name, sparsity, _) in enumerate(pruned) if name == family}
    own = np.array([numbers.get(sparsity, i) for i, (_, sparsity, _) in enumerate(pruned)])
    # log ratio of each speedup to the family's; the interval of the inverse has the same widths,
    # exchanged
    stacked = WorkloadBatch.of([dense, *(w for _, _, w in pruned)])
    behind, high, low = (part[0, 1:] for part in against(stacked, hw, [np.r_[0, 1 + own]], LEVEL))
    shares = _Shares.of(speedups, own)
    difference, width = shares.behind(low, high)
    differences = np.stack([-behind, difference])
    widths = np.stack([_towards(-behind, low, high), width])
    competes = (own != np.arange(len(own))) & (
        np.minimum(shares.gain, shares.gain[own]) >= LEAST_GAIN
    )
    margin = np.where(competes, _margin(differences, widths), np.inf)
    models = tuple((name, sparsity) for name, sparsity, _ in pruned)
    return Comparisons(
        models, tuple(speedups), shares.share, own, competes, differences, widths, margin
    )


def _runnable(
    dense: Workload, pruned: Sequence[tuple[str, float, Workload]], hw: HardwareProfile
) -> tuple[Sequence[tuple[str, float, Workload]], Sequence[simulator.Result]]:
    """Return the pruned models that the device can run, and their speedups."""

    def runs(w: Workload) -> bool:
        try:
            simulator.speedup(dense, w, hw)
        except InputError:
            return False
        return True

    try:
        return pruned, tuple(simulator.speedups(dense, [w for _, _, w in pruned], hw))
    except InputError:
        pruned = [one for one in pruned if runs(one[2])]
        return pruned, tuple(simulator.speedups(dense, [w for _, _, w in pruned], hw))


@dataclass(frozen=True)
class _Shares:
    """Shares of the bound's gain, (n,), with log half-widths of their speedups below and above."""

    share: FloatArray
    slope: FloatArray  # derivative of a share by the log of its speedup
    gain: FloatArray  # gain that the bound allows
    down: FloatArray
    up: FloatArray
    own: IndexArray  # index of the family's model at the same sparsity

    @classmethod
    def of(cls, speedups: Sequence[simulator.Result], own: IndexArray) -> _Shares:
        s, lower, upper, bound = np.array(
            [(f.speedup, f.lower, f.upper, f.roofline_bound) for f in speedups]
        ).T
        gain = np.maximum(bound - 1.0, 1e-9)
        return cls((s - 1.0) / gain, s / gain, gain, np.log(s / lower), np.log(upper / s), own)

    def behind(self, low: FloatArray, high: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return how much larger the family's share is than another's, or than the whole gain: no
        model is closer to its bound. ``low`` and ``high`` are half-widths of the log ratios of
        speedups."""
        share, own = self.share, self.own
        difference, to_bound = share[own] - share, share[own] - 1.0
        width = _towards(
            difference,
            self._half_width(self.down[own], self.up, low),
            self._half_width(self.up[own], self.down, high),
        )
        slope = self.slope[own]
        to_bound_width = _towards(to_bound, slope * self.down[own], slope * self.up[own])
        at_bound = _margin(to_bound, to_bound_width) > _margin(difference, width)
        return np.where(at_bound, to_bound, difference), np.where(at_bound, to_bound_width, width)

    def _half_width(
        self, of_own: FloatArray, of_other: FloatArray, of_ratio: FloatArray
    ) -> FloatArray:
        # the half-widths of two logs and of their ratio give the covariance
        covariance = 0.5 * (of_own**2 + of_other**2 - of_ratio**2)
        a, b = self.slope[self.own], self.slope
        square = (a * of_own) ** 2 + (b * of_other) ** 2 - 2.0 * a * b * covariance
        return np.asarray(np.sqrt(np.maximum(square, 0.0)))


def _margin(difference: FloatArray, half_width: FloatArray) -> FloatArray:
    return np.asarray((difference + TOLERANCE) / np.maximum(half_width, 1e-12))


def _towards(difference: FloatArray, low: FloatArray, high: FloatArray) -> FloatArray:
    return np.asarray(np.where(difference + TOLERANCE >= 0.0, low, high))


def margins(speedup: ArrayLike, below: ArrayLike) -> FloatArray:
    """Return the margin (n, n) of point i over point j: the log of the ratio of their speedups,
    divided by its half-width towards 0. ``speedup`` (n,); ``below`` (n, n) the half-width of
    log(speedup i / speedup j) below it."""
    log, half = np.log(np.asarray(speedup, dtype=float)), np.asarray(below, dtype=float)
    gap = log[:, None] - log
    return np.asarray(gap / np.maximum(np.where(gap >= 0.0, half, half.T), 1e-12))


def in_order(
    loss: ArrayLike, group: Sequence[int], speedup: ArrayLike, below: ArrayLike
) -> tuple[float, int, int, float, float]:
    """Decide whether every group has a point on the frontier, and the groups come in their order.
    Return the margin, the two points that decide, the log ratio of their speedups, and its
    half-width towards 0.

    ``loss`` (n,) is the loss of quality; ``group`` (n,) the place in the claimed order, -1 for a
    point that only competes; ``speedup`` (n,) and ``below`` (n, n) are arguments of
    :func:`margins`. A point is on the frontier if it is faster than all
    points with no more loss. If two points are in the wrong order, one of them must not be on it.
    """
    x, g, log = np.asarray(loss), np.asarray(group), np.log(np.asarray(speedup))
    no_more = (x <= x[:, None]) & ~np.eye(len(x), dtype=bool)
    over_each = np.where(no_more, margins(speedup, below), np.inf)
    competitor, on = over_each.argmin(axis=1), over_each.min(axis=1)
    best = [max(np.flatnonzero(g == one), key=lambda i: on[i]) for one in np.unique(g[g >= 0])]
    wrong = np.argwhere((g[:, None] > g) & (g >= 0) & (x[:, None] < x))
    margin, i = min(
        [(on[i], i) for i in best]
        + [(-min(on[i], on[j]), i if on[i] <= on[j] else j) for i, j in wrong]
    )
    j, width = competitor[i], np.asarray(below)
    difference = float(log[i] - log[j])
    return (
        float(margin),
        int(i),
        int(j),
        difference,
        float(width[(i, j) if difference >= 0 else (j, i)]),
    )
