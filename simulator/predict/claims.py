"""The two claims of "Beyond FLOPs" (arXiv 2606.09080), tested on any model, device and engine: a verdict with its
margin.

Use :func:`verdicts`. (a) *bound*: in memory-bound inference static depth is the strongest baseline and stays closest to
its theoretical bound; (b) *order*: along the prefill frontier of speed and quality come static depth, then dynamic
depth, then static width.

Both are made of comparisons of two pruned models, and one rule decides (:func:`decided`): a comparison's margin is its
difference in units of how far the interval of that difference, 90 % by default, reaches towards 0
(:mod:`simulator.predict.contests`). A claim has the margin of the comparison that it hangs on. From 1 up it *holds*,
from -1 down it *does not hold*, else it is *undecided*, and that comparison says what would decide it. It is undecided,
too, where a family it speaks of has no quality data, and *does not apply* where its condition is not met.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simulator.errors import InputError
from simulator.models.library import load_model
from simulator.predict.batch import batch_of
from simulator.predict.contests import CLOSE, Contests, contests_of, in_order
from simulator.predict.pareto import Front, Point, fronts, independent
from simulator.predict.prunings import prunings_of
from simulator.predict.quality import QualityTable, load_quality
from simulator.predict.result import Result
from simulator.predict.scenario import profiles, scenarios
from simulator.pruning import FAMILIES
from simulator.units import percent

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile
    from simulator.models.config import ModelConfig
    from simulator.predict.scenario import Scenario

HOLDS, FAILS, UNDECIDED, NOT_APPLICABLE, NO_DATA = "holds", "does not hold", "undecided", "does not apply", "no data"

CLAIMS: Mapping[str, str] = {
    "bound": "in memory-bound inference static depth is the strongest baseline and stays closest to its theoretical "
    "bound",
    "order": "along the prefill frontier come static depth (0-4 % quality loss), dynamic depth (5-16 %), static width "
    "(17-26 %)",
}
"""What is claimed, by name of the claim."""

SPARSITIES: tuple[float, ...] = (0.125, 0.25, 0.5)
"""Fractions removed at which (a) is tested: whole layers of models with a multiple of eight of them."""

GROUPS: Mapping[str, str] = {
    "depth": "static depth",
    "dynamic_depth": "dynamic depth",
    "width": "static width",
    "width_cross": "static width",
}
"""Families that (b) speaks of and what it calls them, in the order claimed."""

RANGES: Mapping[str, tuple[int, int]] = {"static depth": (0, 4), "dynamic depth": (5, 16), "static width": (17, 26)}
"""Losses of accuracy, whole per cent, in which (b) has them on the frontier; it says nothing of what lies beyond. On an
axis of perplexities, whose losses are of another size, the order alone is tested."""


@dataclass(frozen=True)
class Verdict:
    """A claim tested once."""

    claim: str  # bound or order
    model: str
    hardware: str
    engine: str
    phase: str
    batch: int
    seq: int
    verdict: str  # holds, does not hold, undecided, does not apply, no data
    predicted: str = ""  # holds or does not hold, by the predicted values alone, among the families that have data
    margin: float | None = None  # of the comparison that it hangs on: from 1 up it holds, from -1 down it does not
    margins: tuple[tuple[float, float], ...] = ()  # (a): (sparsity, margin), the claim at that sparsity alone
    bottleneck: str = ""  # (a): what holds most of the time of depth at those sparsities
    hangs_on: str = ""  # that comparison
    needed: str = ""  # what would decide it, where it is undecided or has no data
    numbers: str = ""  # beside it
    between: tuple[str, ...] = ()  # (b): what stands on the frontier where another family is claimed
    missing: tuple[str, ...] = ()  # what the claim speaks of that has no data
    axis: str = ""  # (b): metric and protocol
    source: str = ""  # and where its quality rows are from
    calibrated: bool = False  # whether the profile was fitted on the device's own measurements

    @classmethod
    def on(cls, claim: str, where: Result | Front, verdict: str, margin: float | None, **more: Any) -> Verdict:
        """A verdict where a record or a frontier is from."""
        place = (where.model, where.hardware, where.engine, where.phase, where.batch, where.seq)
        predicted = "" if margin is None else HOLDS if margin >= 0.0 else FAILS
        return cls(claim, *place, verdict, predicted, margin, calibrated=where.calibrated, **more)


def decided(margin: float) -> str:
    """The verdict on a claim of a margin.

    >>> decided(1.2), decided(0.4), decided(-3.0)
    ('holds', 'undecided', 'does not hold')
    """
    return HOLDS if margin >= 1.0 else FAILS if margin <= -1.0 else UNDECIDED


def verdicts(
    model: str | ModelConfig,
    hardware: Sequence[str | HardwareProfile],
    quality: str | Path | None = None,
    batch: Sequence[int] = (1,),
    seq: Sequence[int] = (2048,),
    *,
    engine: Sequence[str] = (),
    scenario: Scenario | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Verdict, ...]:
    """Both claims for every device, engine, batch and length: (a) in prefill and decode, (b) on every axis of quality
    on which two of its families have data.

    Requests and scenario are those of :func:`simulator.table`, ``quality`` a table by name or path, else the shipped
    ones. A measured time of the dense model in the scenario moves the speedups; the ratios of two do not use it.
    ``progress`` is called with steps done and in all: the first claim, then the second on each axis.

    >>> [(v.claim, v.phase, v.verdict) for v in verdicts("llama-3.2-1b", ["h100"], engine=["reference"])]
    [('bound', 'prefill', 'does not apply'), ('bound', 'decode', 'holds'), ('order', 'prefill', 'no data')]
    """
    config, devices = load_model(model), profiles(hardware)
    asked: dict[str, Any] = {"batch": batch, "seq": seq, "engine": engine, "scenario": scenario}
    out = bound_verdicts(config, devices, **asked)
    try:
        rows = load_quality(quality).of_model(config.name)
    except InputError:
        if quality:
            raise
        rows = QualityTable(())  # none has been measured
    reached = tuple(r for r in rows.rows if _reached(r.relative_loss, r.higher_is_better))
    axes = [axis for axis in rows.axes() if len(_present(r.family for r in reached if r.axis == axis)) >= 2]
    progress(1, 1 + len(axes))
    for done, axis in enumerate(axes, start=2):
        accuracy = rows.on_axis(axis).rows[0].higher_is_better
        out += [order_verdict(front, accuracy=accuracy) for front in fronts(config, devices, rows, axis, **asked)[0]]
        progress(done, 1 + len(axes))
    if not axes:
        has = _present(r.family for r in reached)
        there = f"there is quality of: {', '.join(has) or 'none of them'}"
        told: dict[str, Any] = {"numbers": f"no metric and protocol with two of the families; {there}"}
        told |= {"missing": _missing(has), "needed": _wanted(_missing(has)), "calibrated": True}
        for one, hw in itertools.product(scenarios(scenario, [config], engine, ["prefill"], batch, seq), devices):
            request = (one.phase, *one.shapes[0])
            out.append(Verdict("order", config.name, hw.label, one.engine_name, *request, NO_DATA, **told))
    return tuple(out)


def bound_verdicts(
    model: ModelConfig,
    hardware: Sequence[HardwareProfile],
    batch: Sequence[int] = (1,),
    seq: Sequence[int] = (2048,),
    *,
    engine: Sequence[str] = (),
    scenario: Scenario | None = None,
) -> list[Verdict]:
    """Claim (a): at each of :data:`SPARSITIES` depth is as fast as every other family and as close to its bound.

    Where memory does not hold most of the time the verdict is ``does not apply``, with the numbers all the same.
    """
    prunings, out = prunings_of([model], sparsity=SPARSITIES), []

    def reject(pruning: int | None, reason: str, _device: str) -> None:
        if pruning is None:
            raise InputError(reason)

    asked = scenarios(scenario, [model], engine, ("prefill", "decode"), batch, seq)
    for one in dict.fromkeys(replace(s, shapes=((1, 1),)) for s in asked):
        alike = [s.shapes[0] for s in asked if (s.engine, s.phase) == (one.engine, one.phase)]
        one = replace(one, shapes=tuple(alike))
        workloads = batch_of(one, prunings, reject)
        by_device = [contests_of(workloads, prunings, hw, "depth", one, reject) for hw in hardware]
        out += [_bound_verdict(contests) for of_request in zip(*by_device) for contests in of_request]
    return out


def _bound_verdict(c: Contests) -> Verdict:
    depth, margin = [r for r in c.records if r.family == "depth"], c.margin
    of = np.array([r.sparsity for r in c.records])
    parts = [(s, float(margin[:, of == s].min())) for s in dict.fromkeys(r.sparsity for r in depth)]
    parts = [part for part in parts if math.isfinite(part[1])]
    if not parts:
        numbers = "no family's bound promises enough to be compared"
        return Verdict.on("bound", c.records[0], NOT_APPLICABLE, None, numbers=numbers)
    measure, at = (int(i) for i in np.unravel_index(margin.argmin(), margin.shape))
    least, rival = float(margin[measure, at]), c.records[at]
    own, ratio = c.records[c.own[at]], "{} and {} of the bound's gain" if measure else "{} and {}"
    hangs_on = ratio.format(*map(_share if measure else _speed, (own, rival)))
    hangs_on = f"depth against {rival.family} at {percent(rival.sparsity)}: {hangs_on}"
    told: dict[str, Any] = {"margins": tuple(parts), "hangs_on": hangs_on, "numbers": _numbers(c)}
    told["bottleneck"] = "/".join(dict.fromkeys(r.bottleneck for r in depth))
    verdict = decided(least)
    if told["bottleneck"] != "memory":
        verdict = NOT_APPLICABLE
    elif verdict == UNDECIDED:
        ahead, reach = float(c.ahead[measure, at]) + CLOSE, float(c.reach[measure, at])
        models = f"depth and {rival.family} at {percent(rival.sparsity)}"
        told["needed"] = _known(_SHARES if measure else _RATIO, ahead, reach, models)
    return Verdict.on("bound", c.records[0], verdict, least, **told)


_RATIO, _SHARES = "ratio", "difference of shares"


def _known(what: str, ahead: float, reach: float, models: str) -> str:
    """What would decide a comparison: how well it must be known, and how well it is."""
    values = (100.0 * (abs(v) if what == _SHARES else math.expm1(abs(v))) for v in (ahead, reach))
    wanted, now = (f"{v:.2g} {'points' if what == _SHARES else '%'}" for v in values)
    return f"this {what} to +-{wanted} (now +-{now}): measured times of {models}"


def _share(r: Result) -> str:
    return f"{100 * min(r.efficiency, 1.0):.0f} %"


def _numbers(c: Contests) -> str:
    """How many comparisons are decided, which are open, and depth with its nearest rivals at each sparsity."""
    margin, has = c.margin, np.isfinite(c.margin)
    sides = {"ahead": margin >= 1.0, "behind": margin <= -1.0, "open": np.abs(margin) < 1.0}
    told = ", ".join(f"{int((has & side).sum())} {word}" for word, side in sides.items() if (has & side).any())
    unsure: dict[str, list[str]] = {}
    for i in np.flatnonzero(sides["open"].any(axis=0)):
        unsure.setdefault(c.records[i].family, []).append(f"{100 * c.records[i].sparsity:g}")
    against = "; ".join(f"{family} at {', '.join(at)} %" for family, at in unsure.items())
    out = [f"depth in {int(has.sum())} comparisons: {told}{f' ({against})' if against else ''}"]
    for own in (r for r in c.records if r.family == "depth"):
        rivals = [r for r, takes_part in zip(c.records, c.rival) if takes_part and r.sparsity == own.sparsity]
        if rivals:
            fast, near = max(rivals, key=lambda r: r.speedup), max(rivals, key=lambda r: r.efficiency)
            depth = f"{percent(own.sparsity)}: depth {_speed(own)}, {_share(own)} of its bound's gain"
            out.append(f"{depth}; fastest rival {fast.family} {_speed(fast)}, closest {near.family} {_share(near)}")
    return "; ".join(out)


def _speed(r: Result | Point) -> str:
    return f"{r.speedup:.2f}x ({r.speedup_lower:.2f}-{r.speedup_upper:.2f})"


def order_verdict(front: Front, *, accuracy: bool = False) -> Verdict:
    """Claim (b) on one frontier.

    The frontier is taken among the dense model and the families that the claim speaks of; of ``accuracy``, up to the
    largest loss that it speaks of.
    """
    reached = [i for i, p in enumerate(front.points) if _reached(p.loss, accuracy)]
    own = [i for i in reached if front.points[i].family in GROUPS]
    points = [front.points[i] for i in own]
    present = _present(p.family for p in points)
    told: dict[str, Any] = {"missing": _missing(present), "axis": str(front.axis)}
    told["source"] = "; ".join(dict.fromkeys(p.source for p in front.points))
    wanted = _wanted(told["missing"])
    if len(present) < 2:
        numbers = f"only {present[0]}" if present else "none of the families"
        return Verdict.on("order", front, NO_DATA, None, needed=wanted, numbers=numbers, **told)
    below = np.array(front.below or independent(front.points))[np.ix_(own, own)]
    up, down = np.log([(p.speedup_upper / p.speedup, p.speedup / p.speedup_lower) for p in points]).T
    step = in_order(
        [0.0, *(p.loss for p in points)],  # the dense model first
        [-1, *(list(RANGES).index(GROUPS[p.family]) for p in points)],
        [1.0, *(p.speedup for p in points)],
        np.block([[np.zeros((1, 1)), up[None]], [down[:, None], below]]),
    )
    names = ["the dense model", *map(_named, points)]
    one, other = names[step.point], names[step.rival]
    verdict, needed = decided(step.margin), ""
    if verdict == UNDECIDED:
        needed = _known(_RATIO, step.ahead, step.reach, f"{one} and {other}")
    if told["missing"] and verdict != FAILS:
        verdict, needed = UNDECIDED, "; ".join(filter(None, (needed, wanted)))
    told |= {"hangs_on": f"{one} against {other}: {math.exp(step.ahead):.3f} times as fast", "needed": needed}
    elsewhere = (front.points[i] for i in reached if front.points[i].optimal)
    elsewhere = (p for p in elsewhere if _claimed(p, accuracy) != GROUPS.get(p.family))
    told["between"] = tuple(f"{_named(p)} ({percent(p.loss)} loss)" for p in elsewhere)
    bands = "; ".join(_band(b.family, b.low, b.high) for b in front.bands if b.family in FAMILIES)
    return Verdict.on("order", front, verdict, step.margin, numbers=bands or "nothing beats the dense model", **told)


def _reached(loss: float, accuracy: bool) -> bool:
    """Whether (b) speaks of a loss."""
    return not accuracy or round(100.0 * loss) <= max(last for _, last in RANGES.values())


def _claimed(p: Point, accuracy: bool) -> str | None:
    """What (b) has at the loss of a point; without ranges any of its families."""
    if not accuracy:
        return GROUPS.get(p.family, "one of its families")
    return next((name for name, (_, last) in RANGES.items() if round(100.0 * p.loss) <= last), None)


def _named(p: Point) -> str:
    return f"{p.family} {percent(p.sparsity)}"


def _band(family: str, low: float, high: float) -> str:
    return f"{family} from {100 * low:.3g} %" + ("" if math.isinf(high) else f" to {100 * high:.3g} %")


def _present(families: Iterable[str]) -> list[str]:
    """Groups of (b) among some families, in the order claimed."""
    found = {GROUPS[family] for family in families if family in GROUPS}
    return [name for name in RANGES if name in found]


def _missing(present: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in RANGES if name not in present)


def _wanted(missing: Sequence[str]) -> str:
    return f"quality of {' and '.join(missing)} on one axis with the others" if missing else ""
