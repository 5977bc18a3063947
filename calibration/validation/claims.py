"""The two claims of "Beyond FLOPs" (arXiv 2606.09080), tested with its model and its quality on any device and engine.

Use :func:`bound_outcome` and :func:`order_outcome`, or :func:`claim_outcomes` for both everywhere. (a) *bound*: in
memory-bound inference static depth is the strongest baseline and stays closest to its theoretical bound; (b) *order*:
along the prefill frontier of speed and quality come static depth, then dynamic depth, then static width.

A claim consists of comparisons of two pruned models (:mod:`calibration.validation.comparisons`), and has the margin of
the comparison that decides it. From 1 up it *holds*, from -1 down it *does not hold*, else it is *undecided*. Claim (a)
*does not apply* where memory is not the bottleneck.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import simulator
from calibration.validation.comparisons import TOLERANCE, Comparisons, PrunedModel, compare_family, in_order
from calibration.validation.paper import MODEL
from simulator.errors import InputError
from simulator.hardware.profile import HardwareProfile
from simulator.prediction.compare import SMALL_SHARE
from simulator.prediction.pareto import Front, Point, fronts, independent
from simulator.prediction.quality import choose_axis, load_quality
from simulator.prediction.scenario import profiles
from simulator.prediction.sentences import uncalibrated_of
from simulator.pruning import general_families
from simulator.units import percent
from simulator.workload import Workload

HOLDS, FAILS, UNDECIDED, NOT_APPLICABLE = "holds", "does not hold", "undecided", "does not apply"

CLAIMS: Mapping[str, str] = {
    "bound": "in memory-bound inference static depth is the strongest baseline and stays closest to its theoretical "
    "bound",
    "order": "along the prefill frontier come static depth (0-4 % quality loss), dynamic depth (5-16 %), static width "
    "(17-26 %)",
}
"""What is claimed, by name of the claim."""

QUALITY = "taxonomy-paper"
"""The quality table of the paper's own models."""

BATCH, SEQ = 1, 2048
SPARSITIES: tuple[float, ...] = (0.125, 0.25, 0.5)
"""Fractions removed at which (a) is tested: whole layers of models with a multiple of eight of them."""

GROUPS: Mapping[str, int] = {"depth": 0, "dynamic_depth": 1, "width": 2, "width_cross": 2}
"""Families that (b) orders, and their place in the claimed order."""

LAST_LOSS: tuple[int, ...] = (4, 16, 26)
"""Largest loss of accuracy, whole per cent, at which (b) places each group on the frontier."""


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


def decided(margin: float) -> str:
    """The verdict on a claim of a margin.

    >>> decided(1.2), decided(0.4), decided(-3.0)
    ('holds', 'undecided', 'does not hold')
    """
    return HOLDS if margin >= 1.0 else FAILS if margin <= -1.0 else UNDECIDED


def claim_outcomes(
    hardware: Sequence[str | HardwareProfile],
    engine: Sequence[str],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[ClaimOutcome]:
    """Test both claims on every device in every engine: (a) in prefill and decode, then (b).

    >>> [(o.claim, o.phase, o.verdict) for o in claim_outcomes(["h100"], ["reference"])][:2]
    [('bound', 'prefill', 'does not apply'), ('bound', 'decode', 'undecided')]
    """
    devices, table = profiles(hardware), load_quality(QUALITY).of_model(MODEL)
    axis, places = choose_axis(table), list(itertools.product(engine, ("prefill", "decode")))
    out = []
    for done, (name, phase) in enumerate(places, start=1):
        dense = simulator.lower(simulator.load_model(MODEL), phase=phase, batch=BATCH, seq=SEQ, engine=name)
        pruned = _pruned(dense)
        out += [bound_outcome(dense, pruned, hw) for hw in devices]
        progress(done, len(places) + 1)
    shape: dict[str, Any] = {"phase": ["prefill"], "batch": [BATCH], "seq": [SEQ], "engine": engine}
    out += [order_outcome(front) for front in fronts(MODEL, devices, table, axis, **shape)[0]]
    progress(len(places) + 1, len(places) + 1)
    return out


def _pruned(dense: Workload) -> list[tuple[str, float, Workload]]:
    """Every family at every sparsity that it can take."""
    out = []
    for family, sparsity in itertools.product(general_families(), SPARSITIES):
        try:
            out.append((family, sparsity, simulator.prune(dense, family, sparsity)))
        except InputError:  # 2:4 removes a half
            continue
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
    values = " and ".join(map(_share if measure else _speed, (c.models[c.own[at]], other)))
    unit = " of the bound's gain" if measure else ""
    difference, width = float(c.difference[measure, at]) + TOLERANCE, float(c.half_width[measure, at])
    meta = dense.meta
    lacking, share = uncalibrated_of(depth)
    return ClaimOutcome(
        *("bound", hw.label, meta.engine, meta.phase, BATCH, SEQ),
        verdict=verdict,
        margin=float(margin[measure, at]),
        calibrated=share < SMALL_SHARE,
        uncalibrated=lacking,
        uncalibrated_share=share,
        margins=tuple(part for part in parts if math.isfinite(part[1])),
        bottleneck=bottleneck,
        decided_by=f"depth against {other.family} at {percent(other.sparsity)}: {values}{unit}",
        needed=_needed(difference, width, shares=measure == 1) if verdict == UNDECIDED else "",
        details=_details(c),
    )


def _needed(difference: float, half_width: float, shares: bool = False) -> str:
    """The end of the interval of a difference beyond 0, and how well the difference must be known to decide."""
    unit, end = "points" if shares else "%", difference - math.copysign(half_width, difference)
    end, enough = (100.0 * (v if shares else math.expm1(v)) for v in (end, abs(difference)))
    reach = f"the interval of the difference reaches {end:+.2g} {unit}"
    return f"{reach}; measure both models within {enough:.2g} {unit} to decide"


def _details(c: Comparisons) -> str:
    """How many comparisons are decided, and which are not."""
    margin = c.margin[np.isfinite(c.margin)]
    counts = {"ahead": margin >= 1.0, "behind": margin <= -1.0, "undecided": np.abs(margin) < 1.0}
    told = ", ".join(f"{int(side.sum())} {word}" for word, side in counts.items() if side.any())
    between: dict[str, list[str]] = {}
    for i in np.flatnonzero((np.abs(c.margin) < 1.0).any(axis=0)):
        between.setdefault(c.models[i].family, []).append(f"{100 * c.models[i].sparsity:g}")
    undecided = "; ".join(f"{family} at {', '.join(at)} %" for family, at in between.items())
    return f"depth in {len(margin)} comparisons: {told}" + (f" ({undecided})" if undecided else "")


def _speed(model: PrunedModel) -> str:
    s = model.speedup
    return f"{s.speedup:.2f}x ({s.lower:.2f}-{s.upper:.2f})"


def _share(model: PrunedModel) -> str:
    return f"{100 * min(model.share, 1.0):.0f} %"


def order_outcome(front: Front) -> ClaimOutcome:
    """Claim (b) on one frontier, among the dense model and the families that it orders, up to its largest loss."""
    reached = [i for i, p in enumerate(front.points) if round(100.0 * p.loss) <= LAST_LOSS[-1]]
    own = [i for i in reached if front.points[i].family in GROUPS]
    points = [front.points[i] for i in own]
    below = np.array(front.below or independent(front.points))[np.ix_(own, own)]
    up, down = np.log([(p.speedup_upper / p.speedup, p.speedup / p.speedup_lower) for p in points]).T
    found = in_order(
        [0.0, *(p.loss for p in points)],  # the dense model first
        [-1, *(GROUPS[p.family] for p in points)],
        [1.0, *(p.speedup for p in points)],
        np.block([[np.zeros((1, 1)), up[None]], [down[:, None], below]]),
    )
    names = ["the dense model", *map(_named, points)]
    verdict, ratio = decided(found.margin), math.exp(found.difference)
    between = (front.points[i] for i in reached if front.points[i].optimal)
    return ClaimOutcome(
        *("order", front.hardware, front.engine, front.phase, front.batch, front.seq),
        verdict=verdict,
        margin=found.margin,
        calibrated=front.calibrated,
        uncalibrated=front.uncalibrated,
        uncalibrated_share=front.uncalibrated_share,
        decided_by=f"{names[found.point]} against {names[found.competitor]}: {ratio:.3f} times as fast",
        needed=_needed(found.difference, found.half_width) if verdict == UNDECIDED else "",
        elsewhere=tuple(
            f"{_named(p)} ({percent(p.loss)} loss)" for p in between if GROUPS.get(p.family) != _claimed(p.loss)
        ),
    )


def _claimed(loss: float) -> int:
    """The group that (b) places at a loss."""
    return next(place for place, last in enumerate(LAST_LOSS) if round(100.0 * loss) <= last)


def _named(p: Point) -> str:
    return f"{p.family} {percent(p.sparsity)}"
