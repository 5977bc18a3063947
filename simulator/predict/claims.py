"""The two claims of "Beyond FLOPs" (arXiv 2606.09080), tested on any model and device: a verdict with its numbers.

Use :func:`verdicts`. (a) *bound*: in memory-bound inference static depth pruning is the strongest baseline and stays
closest to its theoretical bound; (b) *order*: along the prefill frontier of speed and quality come static depth, then
dynamic depth, then static width. A claim *holds* or *does not hold* where all ends of the intervals say so, is
*undecided* where they differ or where a family it speaks of has no quality data, and *does not apply* where its
condition is not met.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simulator.errors import InputError
from simulator.models.library import load_model
from simulator.predict.pareto import Front, Point, bands, fronts, judge
from simulator.predict.quality import QualityTable, load_quality
from simulator.predict.settings import profiles
from simulator.predict.table import table

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile
    from simulator.models.config import ModelConfig
    from simulator.predict.rows import Record
    from simulator.predict.settings import Setting

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

LEAST_GAIN = 0.05
"""A family whose bound promises less than this has nothing to come close to, and takes no part in (a)."""

CLOSE = 0.005
"""Efficiencies and speedups that differ by less than this, relatively, count as equal."""

GROUPS: Mapping[str, str] = {
    "depth": "static depth",
    "dynamic_depth": "dynamic depth",
    "width": "static width",
    "width_cross": "static width",
}
"""Families that (b) speaks of and what it calls them, in the order claimed."""

Ends = tuple[float, float, float]
"""A value at the low end of its interval, as predicted, at the high end."""


@dataclass(frozen=True)
class Verdict:
    """A claim tested once."""

    claim: str  # bound or order
    model: str
    hardware: str
    phase: str
    batch: int
    seq: int
    verdict: str  # holds, does not hold, undecided, does not apply, no data
    predicted: str  # holds or does not hold, by the predicted values alone, among the families that have data
    numbers: str  # that decide it
    missing: tuple[str, ...] = ()  # what the claim speaks of that has no data
    axis: str = ""  # metric and protocol, for (b)
    source: str = ""  # where its quality rows are from
    calibrated: bool = False  # whether the profile was fitted on the device's own measurements

    @classmethod
    def on(cls, claim: str, where: Record | Front, verdict: str, predicted: str, numbers: str, **more: Any) -> Verdict:
        """A verdict where a record or a frontier is from."""
        place = (where.model, where.hardware, where.phase, where.batch, where.seq)
        return cls(claim, *place, verdict, predicted, numbers, calibrated=where.calibrated, **more)


def verdicts(
    model: str | ModelConfig,
    hardware: Sequence[str | HardwareProfile],
    quality: str | Path | None = None,
    batch: Sequence[int] = (1,),
    seq: Sequence[int] = (2048,),
    *,
    engine: Sequence[str] = (),
    setting: Setting | None = None,
) -> tuple[Verdict, ...]:
    """Both claims for every device, batch and length: (a) in prefill and decode, (b) on every axis of quality on which
    two of its families have data.

    Requests and setting are those of :func:`simulator.table`, ``quality`` a table by name or path, else the shipped
    ones.

    >>> [(v.claim, v.phase, v.verdict) for v in verdicts("llama-3.2-1b", ["h100"], engine=["reference"])]
    [('bound', 'prefill', 'does not apply'), ('bound', 'decode', 'holds'), ('order', 'prefill', 'no data')]
    """
    config = load_model(model)
    asked: dict[str, Any] = {"batch": batch, "seq": seq, "engine": engine, "setting": setting}
    out = bound_verdicts(config, hardware, **asked)
    try:
        rows = load_quality(quality).of_model(config.name)
    except InputError:
        if quality:
            raise
        rows = QualityTable(())  # none has been measured
    axes = [axis for axis in rows.axes() if len(_present(r.family for r in rows.on_axis(axis).rows)) >= 2]
    for axis in axes:
        out += [order_verdict(front) for front in fronts(config, hardware, rows, axis, **asked)[0]]
    if not axes:
        has = _present(r.family for r in rows.rows)
        there = f"there is quality of: {', '.join(sorted(has)) or 'none of them'}"
        numbers, missing = f"no metric and protocol with two of the families; {there}", _missing(has)
        for hw, b, s in itertools.product(profiles(hardware), batch, seq):
            where = (config.name, hw.label, "prefill", b, s)
            out.append(Verdict("order", *where, NO_DATA, "", numbers, missing, calibrated=True))
    return tuple(out)


def bound_verdicts(model: ModelConfig, hardware: Sequence[str | HardwareProfile], **asked: Any) -> list[Verdict]:
    """Claim (a): it holds when it holds at each sparsity.

    Where memory does not hold most of the time the verdict is ``does not apply``, with the numbers all the same.
    """
    groups: dict[tuple[str, str, int, int], list[Record]] = {}
    for r in table([model], hardware, ["all"], SPARSITIES, ["prefill", "decode"], **asked):
        groups.setdefault((r.hardware, r.phase, r.batch, r.seq), []).append(r)
    return [_bound_verdict(records) for records in groups.values()]


def _bound_verdict(records: Sequence[Record]) -> Verdict:
    depth = [r for r in records if r.family == "depth"]
    others = [r for r in records if r.family != "depth" and r.roofline_bound - 1 >= LEAST_GAIN]
    found, predicted, sentences = [], [], []
    for own in depth:
        rivals = [r for r in others if r.sparsity == own.sparsity]
        if own.roofline_bound - 1 < LEAST_GAIN or not rivals:
            continue
        for measure in (efficiency, _speedup):
            values = [measure(r) for r in (own, *rivals)]
            found.append(compare(values[0], values[1:]))
            middle = [(value,) * 3 for _, value, _ in values]
            predicted.append(compare(middle[0], middle[1:]))
        sentences.append(_at(own, rivals))
    bound = dict.fromkeys(r.limit for r in depth)
    verdict, numbers = UNDECIDED, "; ".join(sentences)
    if set(bound) != {"memory"}:
        verdict, numbers = NOT_APPLICABLE, f"bound by {'/'.join(bound)}; {numbers}"
    elif FAILS in found:
        verdict = FAILS
    elif set(found) == {HOLDS}:
        verdict = HOLDS
    return Verdict.on("bound", records[0], verdict, FAILS if FAILS in predicted else HOLDS, numbers)


def efficiency(r: Record) -> Ends:
    """Share of the roofline bound's gain that is granted, at most 1."""
    gain = r.roofline_bound - 1.0
    low, value, high = (min((s - 1.0) / gain, 1.0) for s in _speedup(r))
    return low, value, high


def _speedup(r: Record) -> Ends:
    return r.speedup_lower, r.speedup, r.speedup_upper


def compare(own: Ends, rivals: Sequence[Ends]) -> str:
    """Whether a value is at least as good as every rival, at all ends of the intervals.

    >>> compare((1, 1, 1), [(0.5, 0.7, 0.9)]), compare((1, 1, 1), [(0.9, 1.1, 1.3)])
    ('holds', 'undecided')
    """
    low, _, high = own
    slack = CLOSE * max(abs(high), 1.0)
    if all(low >= rival[2] - slack for rival in rivals):
        return HOLDS
    return FAILS if any(rival[0] > high + slack for rival in rivals) else UNDECIDED


def _at(own: Record, rivals: Sequence[Record]) -> str:
    """The numbers at one sparsity: depth, the family closest to its bound after it, and the fastest one."""
    near, fast = max(rivals, key=lambda r: efficiency(r)[1]), max(rivals, key=lambda r: r.speedup)

    def share(r: Record) -> str:
        low, value, high = (100 * e for e in efficiency(r))
        return f"{value:.0f} %" if high - low < 1 else f"{value:.0f} % ({low:.0f} to {high:.0f})"

    def speed(r: Record) -> str:
        narrow = r.speedup_upper - r.speedup_lower < 0.01
        return f"{r.speedup:.2f}x" + ("" if narrow else f" ({r.speedup_lower:.2f}-{r.speedup_upper:.2f})")

    depth = f"{100 * own.sparsity:g} %: depth {speed(own)}, {share(own)} of its bound"
    return f"{depth}; next closest {near.family} {share(near)}; next fastest {fast.family} {speed(fast)}"


def order_verdict(front: Front) -> Verdict:
    """Claim (b) on one frontier.

    The frontier is taken among the families that the claim speaks of; others on the whole frontier are named. It is
    judged with the predicted speedups and with every group's at either end of its interval.
    """
    own = [p for p in front.points if p.family in GROUPS]
    present = _present(p.family for p in own)
    missing = _missing(present)
    sources = "; ".join(dict.fromkeys(p.source for p in front.points))
    result = Verdict.on("order", front, NO_DATA, "", "", missing=missing, axis=str(front.axis), source=sources)
    if len(present) < 2:
        return replace(result, numbers=f"only {present[0]}" if present else "none of the families")
    predicted = sequence(own) == present
    ends = itertools.product(("speedup_lower", "speedup_upper"), repeat=len(present))
    outcomes = {predicted, *(sequence(_moved(own, dict(zip(present, end)))) == present for end in ends)}
    parts = [_band(b.family, b.low, b.high) for b in bands(judge(own)) if b.family in GROUPS]
    parts = parts or ["nothing beats the dense model"]
    verdict = UNDECIDED
    if outcomes == {False}:
        verdict = FAILS
    elif outcomes == {True} and not missing:
        verdict = HOLDS
    elif outcomes == {True}:
        parts.append("the order of those with data is the one claimed")
    others = sorted({p.family for p in front.points if p.optimal and p.family not in GROUPS})
    if others:
        parts.append(f"also on the frontier: {', '.join(others)}")
    return replace(result, verdict=verdict, predicted=HOLDS if predicted else FAILS, numbers="; ".join(parts))


def sequence(points: Sequence[Point]) -> list[str]:
    """Groups of (b) along a frontier by rising loss; one that comes back is listed again."""
    names = [GROUPS[b.family] for b in bands(judge(points)) if b.family in GROUPS]
    return [name for name, _ in itertools.groupby(names)]


def _moved(points: Sequence[Point], end: Mapping[str, str]) -> list[Point]:
    """Points with every group's speedups at one end of their intervals."""
    return [replace(p, speedup=getattr(p, end[GROUPS[p.family]])) for p in points]


def _band(family: str, low: float, high: float) -> str:
    return f"{family} from {100 * low:.3g} %" + ("" if math.isinf(high) else f" to {100 * high:.3g} %")


def _present(families: Iterable[str]) -> list[str]:
    """Groups of (b) among some families, in the order claimed."""
    found = {GROUPS[family] for family in families if family in GROUPS}
    return [name for name in dict.fromkeys(GROUPS.values()) if name in found]


def _missing(present: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in dict.fromkeys(GROUPS.values()) if name not in present)
