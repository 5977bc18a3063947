"""All sentences about predictions: conclusions of commands, answers to "will it run?", and notes on
limits.

Each function returns the sentence about a fact, or "" (or none) without the fact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from simulator.capacity import MOST_DEVICES, memory
from simulator.codes import DTYPES, ROLES, Kind, label_of
from simulator.display import few, with_and
from simulator.engines.engine import load_engine
from simulator.hardware.profile import SECTION_OF, link_choices
from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.operators import BY_CODE, MOST_CODES, TITLES
from simulator.operators.base import octaves_outside, unfitted
from simulator.operators.gemm import GEMM_CONSTANTS
from simulator.passes import by_formats, section_of
from simulator.prediction.batch import batch_with
from simulator.prediction.compare import SMALL_SHARE, compare
from simulator.prediction.prunings import Pruning, difference_of
from simulator.prediction.requests import batch_name, by_key, device_text, on, setting
from simulator.prediction.result import plain
from simulator.pruning import FAMILIES
from simulator.request import Request
from simulator.uncertainty.forward import operator_times
from simulator.uncertainty.operators import OperatorTimes
from simulator.units import percent, ratio, seconds, size
from simulator.workload import Workload

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile
    from simulator.models.config import ModelConfig
    from simulator.prediction.result import HasResult, Result, Results
    from simulator.uncertainty.intervals import Inferred

# classes of modules that import this module: importing their types would be a cycle
Advice: TypeAlias = Any
Advised: TypeAlias = Any
Explanation: TypeAlias = Any
Front: TypeAlias = Any
OperatingPoint: TypeAlias = Any
Point: TypeAlias = Any
Runnable: TypeAlias = Any
Service: TypeAlias = Any
Target: TypeAlias = Any
T = TypeVar("T", bound="HasResult")
NAMED = 4  # most settings or models that a sentence names; for more it states their number
MOST_SENTENCES = 3  # predictions, settings, frontiers or explanations with a sentence of their own
GAIN = 1.005  # speedup that is shown as more than 1.00
# a conclusion names the steps of a waterfall with factors below this value or above its inverse
NOTABLE = 0.985
EQUAL, MEMORY, LIMITS, CURVE = "equal concurrency", "equal memory", "within limits", "curve"
"""Kinds of operating points: three comparisons of models, and the concurrencies of a curve."""


def interval_text(value: float, low: float, high: float) -> str:
    return f"{ratio(value)}x ({ratio(low)}-{ratio(high)})"


def speedup_text(r: Result | Point) -> str:
    return interval_text(r.speedup, r.speedup_lower, r.speedup_upper)


def shares(r: Result) -> str:
    """Return the share of all parts that is removed, requested and realised; "" if the pruning's
    name has it."""
    requested, realised = percent(r.sparsity), percent(r.realised_sparsity)
    if r.pruned:
        return f"{requested} of all parameters removed"
    if requested in r.pruning:
        return "" if realised == requested else f"{realised} realised"
    if not r.parts and realised == requested:
        return f"{requested} removed"
    both = requested if realised == requested else f"{requested} requested, {realised} realised"
    return f"{both} over all parts" if r.parts else both


def pruning_text(r: Result) -> str:
    text = shares(r)
    return f"{r.pruning} ({text})" if text else r.pruning


def parts_line(r: Result) -> str:
    """Return the removed share of each part, and of all parts together if this differs."""
    text, one = shares(r), "; " not in r.parts and percent(r.sparsity) in r.parts
    return (
        r.parts
        if one or not text
        else f"{r.parts}; {text.removesuffix(' over all parts')} over all parts"
    )


def probability_text(probability: float) -> str:
    return (
        "> 99 %"
        if probability > 0.99
        else "< 1 %"
        if probability < 0.01
        else f"{100.0 * probability:.0f} %"
    )


def gain_text(model: str, value: float, low: float, high: float) -> str:
    """Return whether a pruning makes a model faster, as the predicate of a sentence."""
    text = interval_text(value, low, high)
    if high < 1.0:
        return f"makes {model} slower: {text}"
    if ratio(low) == ratio(high) == "1.00":
        return f"gives {model} no gain: {text}"
    return (
        f"gives {model} no certain gain: {text}"
        if low <= 1.0
        else f"makes {model} {text.replace(' ', ' faster ')}"
    )


# -- speedup ---------------------------------------------------------------------------------------


def of_speedups(results: Sequence[Result], clauses: Sequence[str] = ()) -> list[str]:
    """Return how much faster each pruning is. Few results get a sentence each. For many, sentences
    name the fastest of each setting, or of all settings, and the number of gains and losses. Each
    result's clause ends its sentence."""
    ends = dict(zip(results, clauses))
    if len(results) <= MOST_SENTENCES:
        gains = [gain_text(r.model, r.speedup, r.speedup_lower, r.speedup_upper) for r in results]
        places = [f"{setting(r)}, {r.bottleneck}-bound{ends.get(r, '')}" for r in results]
        return [f"{r.pruning} {gain} on {place}." for r, gain, place in zip(results, gains, places)]
    several = len({r.model for r in results}) > 1
    groups = by_key(results, lambda r: f"{setting(r)} of {r.model}" if several else setting(r))
    if len(groups) <= MOST_SENTENCES:
        return [_fastest(some, ends, f"On {where}") for where, some in groups.items()]
    best = max(results, key=lambda r: r.speedup)
    return [_fastest(results, ends, f"Of {len(groups)} settings", f" on {setting(best)}")]


def _fastest(
    some: Sequence[Result], ends: Mapping[Result, str], start: str, where: str = ""
) -> str:
    best = max(some, key=lambda r: r.speedup)
    gains, losses = sum(r.speedup_lower > 1 for r in some), sum(r.speedup_upper < 1 for r in some)
    counts = f"{gains} of {len(some)} are faster with their whole interval" + (
        f", {losses} slower" if losses else ""
    )
    return (
        f"{start}, the fastest is {best.pruning}{where}: {speedup_text(best)}{ends.get(best, '')};"
        f" {counts}."
    )


@dataclass(frozen=True)
class BreakEven:
    """The batches or lengths at which a pruning pays: the whole interval of its speedup is above
    :data:`GAIN`."""

    axis: str  # "batch" or "seq"
    results: tuple[Result, ...]  # ascending; only those that fit into the memory, unless none does
    too_large: tuple[int, ...] = ()  # values of the excluded results

    @property
    def values(self) -> tuple[int, ...]:
        return tuple(getattr(r, self.axis) for r in self.results)

    @property
    def pays(self) -> tuple[bool, ...]:
        return tuple(r.speedup_lower >= GAIN for r in self.results)

    @property
    def where(self) -> str:
        r = self.results[0]
        other = f"seq {r.seq}" if self.axis == "batch" else f"{batch_name(r.phase)} {r.batch}"
        return f"{device_text(r)} in {r.engine} ({r.phase}, {other})"

    @property
    def verdict(self) -> str:
        values, pays, found = self.values, self.pays, self.results
        ends = f"{values[0]:,} to {values[-1]:,}"
        best = max(
            (r for r in found if r.speedup_lower >= GAIN), key=lambda r: r.speedup, default=None
        )
        if best is None:
            best = max(found, key=lambda r: r.speedup)
            sure = (
                "is slower" if all(r.speedup_upper < 1.0 for r in found) else "has no certain gain"
            )
            where = (
                f"any {self._name} from {ends}"
                if len(values) > 1
                else f"{self._name} {values[0]:,}"
            )
            return f"{sure} at {where}; best {self._at(best)}"
        start, stop = pays.index(True), len(pays) - 1 - pays[::-1].index(True)
        if all(pays):
            if len(values) == 1:
                return f"pays at {self._name} {values[0]:,} ({_bare(found[0])})"
            return (
                f"pays at every {self._name} from {ends} ({self._at(found[0], ', at')};"
                f" {self._at(found[-1], ', at')})"
            )
        if all(pays[start:]):
            return (
                f"pays from {self._name} {values[start]:,} ({_bare(found[start])}); not at"
                f" {values[start - 1]:,}"
            )
        if all(pays[: stop + 1]):
            return (
                f"pays up to {self._name} {values[stop]:,} ({_bare(found[stop])}); not at"
                f" {values[stop + 1]:,}"
            )
        at = [f"{v:,}" for v, paid in zip(values, pays) if paid]
        shown = (
            with_and(at) if len(at) <= NAMED else f"{len(at)} of {len(values)} values from {ends}"
        )
        return f"pays at {self._name} {shown} (best {self._at(best)}); not at the others"

    @property
    def sentence(self) -> str:
        beyond = ""
        if self.too_large:
            many = len(self.too_large) > 1
            values = f"{self.too_large[0]:,} and more do" if many else f"{self.too_large[0]:,} does"
            beyond = f"; {self._name} {values} not fit into the memory"
        return f"{self.results[0].pruning} on {self.where} {self.verdict}{beyond}."

    @property
    def _name(self) -> str:
        return batch_name(self.results[0].phase) if self.axis == "batch" else "seq"

    def _at(self, r: Result, at: str = " at") -> str:
        return f"{_bare(r)}{at} {getattr(r, self.axis):,}"


def _bare(r: Result) -> str:
    return f"{ratio(r.speedup)}x, {ratio(r.speedup_lower)}-{ratio(r.speedup_upper)}"


def break_even(results: Sequence[Result]) -> list[BreakEven]:
    """Return the break-even of each pruning, model, device, engine and phase over the batches, or
    over the lengths; none if neither varies."""
    axis = next(
        (axis for axis in ("batch", "seq") if len({getattr(r, axis) for r in results}) > 1), ""
    )
    names = (
        "model",
        "pruning",
        "engine",
        "phase",
        "hardware",
        "seq" if axis == "batch" else "batch",
    )
    out = []
    for some in by_key(results if axis else (), attrgetter(*names)).values():
        ascending = sorted(some, key=lambda r: getattr(r, axis))
        fit = [r for r in ascending if r.pruned_fits] or ascending
        out.append(
            BreakEven(axis, tuple(fit), tuple(getattr(r, axis) for r in ascending if r not in fit))
        )
    return out


# -- will it run? ----------------------------------------------------------------------------------

ZEROS = "dense kernels compute its scattered zeros, so they save no time"
"""Why kernels do not use a pruning although they run it."""


def will_it_run(r: Runnable) -> str:
    """Return the answer for a stock engine: yes or no, then why."""
    stops = [f"stock {r.engine} does not load {r.load_reason}"] if r.loadable is False else []
    stops += [f"it has {r.divisible_reason}"] if not r.divisible else []
    slow = [] if r.aligned else [unaligned(r)]
    if not r.kernels:
        (slow if r.kernels_reason == ZEROS else stops).append(r.kernels_reason)
    if stops:
        return (
            ". ".join([f"No: {'; '.join(stops)}", *(text[0].upper() + text[1:] for text in slow)])
            + "."
        )
    if r.loadable is None:
        return f"Not known: {r.load_reason}."
    return (
        f"Yes, but {'; '.join(slow)}."
        if slow
        else f"Yes: stock {r.engine} loads it {r.load_reason}."
    )


def runs_clause(r: Runnable) -> str:
    """Return the answer as the last clause of a sentence about the model; "" if it is not known."""
    return _runs(r.engine, r.works)


def _runs(engine: str, works: bool | None) -> str:
    return "" if works is None else f"; stock {engine} {'runs' if works else 'does not run'} it"


def unaligned(r: Runnable) -> str:
    """Return which width is not aligned, and the gain of the nearest aligned width."""
    over = f" over {r.devices} devices" if r.devices > 1 else ""
    text = f"{r.unaligned_dimension} {r.unaligned_width:,}{over} is not aligned"
    if r.aligned_gain is None:
        return f"{text}; the nearest aligned width is {r.aligned_width:,}"
    ends = f"({ratio(r.aligned_gain_lower or 0.0)}-{ratio(r.aligned_gain_upper or 0.0)})"
    faster = f"{ratio(r.aligned_gain)}x faster {ends}" if r.aligned_gain >= GAIN else "no faster"
    return f"{text}; {r.aligned_width:,} is {faster}"


# -- advise ----------------------------------------------------------------------------------------


def settings_of(held: Sequence[T]) -> Mapping[str, list[T]]:
    return by_key(held, lambda one: setting(one.result))


def of_advice(found: Advised, target: Target) -> list[str]:
    """Return the least pruning that reaches a target with its probability, or the closest pruning,
    and the settings in which the dense model reaches it. For several settings, the least and the
    most pruning are named."""
    best = {where: group[0] for where, group in settings_of(found.advice).items()}
    reached = {where: a.result for where, a in best.items() if a.reached}
    missed = {where: a for where, a in best.items() if not a.reached}
    out = []
    if reached and len(best) == 1:
        ((where, a),) = best.items()
        start = f"The least pruning of {a.result.model} that reaches {target.text} on {where} is"
        out.append(
            f"{start} {pruning_text(a.result)}; predicted"
            f" {_predicted(a)}{_runs(a.result.engine, a.runs)}."
        )
        stock = next((b for b in settings_of(found.advice)[where] if b.reached and b.runs), a)
        if stock is not a:
            name = pruning_text(stock.result)
            out.append(
                f"The least that stock {a.result.engine} runs is {name}; predicted"
                f" {_predicted(stock)}."
            )
    elif reached:
        low, high = (
            pick(reached, key=lambda where: reached[where].realised_sparsity) for pick in (min, max)
        )
        ends = [
            f"{pruning_text(reached[where])} on {where}" for where in dict.fromkeys((low, high))
        ]
        out.append(f"The least pruning that reaches {target.text} is {' to '.join(ends)}.")
    if missed:
        where = max(missed, key=lambda where: missed[where].result.speedup)
        a = missed[where]
        start, place = f"No pruning of {a.result.model} reaches {target.text} on {where}", ""
        if len(best) > 1:
            start, place = (
                f"No family reaches {target.text} on {len(missed)} of {len(best)} settings",
                f" on {where}",
            )
        out.append(f"{start}; the closest is {pruning_text(a.result)}{place}: {_predicted(a)}.")
    dense = (
        f"The dense model reaches {target.text} on {few(found.dense, NAMED)}."
        if found.dense
        else ""
    )
    return [*out, dense]


def _predicted(a: Advice) -> str:
    return (
        f"{speedup_text(a.result)}, {seconds(a.result.pruned_s)}, probability"
        f" {probability_text(a.probability)}"
    )


# -- pareto ----------------------------------------------------------------------------------------


def of_fronts(fronts: Sequence[Front], max_loss: float | None = None) -> list[str]:
    """Return the models on each frontier and the best trade, which has the largest log speedup per
    loss; with ``max_loss``, the fastest model with at most this loss."""
    if len(fronts) <= MOST_SENTENCES:
        return [_front(front) if max_loss is None else _within(front, max_loss) for front in fronts]
    trades = (
        best_trade(front) if max_loss is None else fastest_within(front, max_loss)
        for front in fronts
    )
    best = by_key(filter(None, trades), lambda trade: trade.name)
    named = []
    for some in sorted(best.values(), key=len, reverse=True)[:NAMED]:
        ends = dict.fromkeys(ratio(pick(p.speedup for p in some)) for pick in (min, max))
        named.append(f"{some[0].name} on {len(some)} of {len(fronts)} settings ({'-'.join(ends)}x)")
    if max_loss is not None:
        start = f"The fastest with at most {percent(max_loss)} loss of {fronts[0].axis.metric}"
        return [f"{start}: {', '.join(named) or 'none is faster than the dense model'}."]
    often = _by_method([p for front in fronts for p in front.points if p.optimal])
    return [
        (
            f"The best trade, most speedup per loss of {fronts[0].axis.metric}:"
            f" {', '.join(named) or 'none'}."
        ),
        f"On at least one frontier: {often or 'only the dense model'}.",
    ]


def _front(front: Front) -> str:
    own = [p for p in front.points if p.optimal]
    where = f"On {setting(front)}"
    if not own:
        return (
            f"{where}, no pruned {front.model} is on the frontier: none is faster at its loss than"
            " the dense model."
        )
    text = (
        f"{where}, {len(own)} of {len(front.points)} pruned {front.model} are on the frontier:"
        f" {_by_method(own)}"
    )
    trade = best_trade(front)
    if trade is None:
        return f"{text}; none is faster than the dense model."
    at = f"{speedup_text(trade)} at {percent(trade.loss)} loss of {front.axis.metric}"
    return f"{text}; best trade: {trade.name}, {at}."


def _within(front: Front, max_loss: float) -> str:
    best = fastest_within(front, max_loss)
    kept = f"{front.model} with at most {percent(max_loss)} loss of {front.axis.metric}"
    if best is None:
        return f"On {setting(front)}, no pruned {kept} is faster than the dense model."
    return (
        f"On {setting(front)}, the fastest {kept} is {best.name}: {speedup_text(best)} at"
        f" {percent(best.loss)} loss."
    )


def _by_method(points: Sequence[Point]) -> str:
    methods: dict[str, dict[float, None]] = {}
    for p in sorted(points, key=lambda p: p.loss):
        methods.setdefault(p.method, {})[100.0 * p.sparsity] = None
    return few(
        (f"{name} {with_and([f'{s:.3g}' for s in sorted(of)])} %" for name, of in methods.items()),
        2 * NAMED,
    )


def best_trade(front: Front) -> Point | None:
    """Return the point of a frontier with the largest log speedup per loss, preferably one whose
    whole interval is a gain; None if no point is faster than the dense model."""
    faster = [p for p in front.points if p.optimal and p.speedup > 1.0]
    certain = [p for p in faster if p.speedup_lower > 1.0]
    return max(
        certain or faster, key=lambda p: math.log(p.speedup) / max(p.loss, 1e-3), default=None
    )


def fastest_within(front: Front, max_loss: float) -> Point | None:
    """Return the fastest point of a frontier with at most this loss; None if none is faster than
    the dense model."""
    faster = [p for p in front.points if p.optimal and p.speedup > 1.0 and p.loss <= max_loss]
    return max(faster, key=lambda p: p.speedup, default=None)


# -- explain ---------------------------------------------------------------------------------------


def conclusion(e: Explanation) -> str:
    """Return a sentence on nominal and predicted speedup, bottleneck and largest losses, and advice
    for a host-bound model."""
    r, losses = (
        e.result,
        sorted((s for s in e.steps[1:] if s.factor < NOTABLE), key=lambda s: s.factor),
    )
    gains = [s for s in e.steps[1:] if s.factor > 1 / NOTABLE and s.name != "rounding"]
    nominal = f"{pruning_text(r)} of {r.model}: nominal {e.steps[0].speedup:.2f}x"
    parts = [f"{nominal}, predicted {speedup_text(r)} on {setting(r)}, {r.bottleneck}-bound"]
    if losses:
        parts.append("losses: " + with_and([f"{s.name} (x{s.factor:.2f})" for s in losses[:3]]))
    elif r.speedup > 1:
        parts.append(f"no single step loses more than {100 * (1 - NOTABLE):.1f} %")
    if gains:
        parts.append("gains: " + with_and([f"{s.name} (x{s.factor:.2f})" for s in gains[:2]]))
    if e.reason:
        parts.append(e.reason)
    if r.speedup_upper < 1:
        parts.append("the pruned model is slower")
    elif ratio(r.speedup_lower) == ratio(r.speedup_upper) == "1.00":
        parts.append("the pruned model is as fast as the dense one")
    elif r.speedup_lower <= 1 and r.sparsity > 0:
        parts.append("the interval includes 1.00x, so a gain is uncertain")
    return f"{'; '.join(parts)}.{_host_bound(e)}"


def conclusions(found: Sequence[Explanation]) -> list[str]:
    """Return the :func:`conclusion` of each explanation; for many explanations, the range of
    speedups."""
    if len(found) <= MOST_SENTENCES:
        return [conclusion(e) for e in found]
    ends = [pick(found, key=lambda e: e.result.speedup).result for pick in (min, max)]
    first, settings = found[0].result, len({setting(e.result) for e in found})
    several = f" and {len(found) // settings - 1} more" if len(found) > settings else ""
    both = " to ".join(f"{speedup_text(r)} on {setting(r)}" for r in ends)
    return [f"{first.pruning}{several} of {first.model}, {settings} settings: predicted {both}."]


def _host_bound(e: Explanation) -> str:
    if not e.layer_s:
        return ""
    engine = load_engine(e.dense.meta.engine)
    text = (
        f"{engine.title}: the host needs {seconds(e.layer_s)} per layer; while the device needs"
        " less, narrower "
    )
    text += "layers give no speedup: use fewer layers or a CUDA graph"
    narrower = any(
        name in FAMILIES and FAMILIES[name].narrows for name in e.result.family.split("+")
    )
    if narrower and engine.own_code.source:
        text += (
            f" (custom modelling code has cost up to another x{engine.own_code.value:g} in"
            " published results)"
        )
    return f" {text}."


# -- serve -----------------------------------------------------------------------------------------

_LIMITED = {"ttft": "time to the first token", "tpot": "time per output token"}
LEAST = 0.001  # relative change of a number of bytes from which it is stated


def of_service(service: Service) -> list[str]:
    """Return the conclusions at equal concurrency and at equal memory, on the pruning with the most
    tokens/s at equal memory; if there are limits, also on the pruning with the most tokens/s within
    them."""
    kinds, best = service.kinds, ranked(service)[0]
    last = kinds[MEMORY][0], kinds[MEMORY][best]
    ends = service.equal[:: max(1, len(service.equal) - 1)] if kinds[MEMORY][0].fits else []
    out = [_equal_concurrency(service, points, best) for points in ends]
    out.append(equal_memory(*last))
    if LIMITS in kinds:
        last = kinds[LIMITS][0], kinds[LIMITS][ranked(service, LIMITS)[0]]
        out.append(within_limits(service, *last))
    dense, pruned = (point.cost_output for point in last)
    if not math.isnan(pruned):
        instead = "" if math.isnan(dense) else f" instead of {money(dense)}"
        out[-1] = f"{out[-1][:-1]}; a million output tokens cost {money(pruned)}{instead}."
    return out


def ranked(service: Service, kind: str = MEMORY) -> list[int]:
    """Return the indices (from 1) of the pruned models by falling tokens/s at the points of a
    kind."""
    rates = [point.tokens_per_s if point.concurrency else 0.0 for point in service.kinds[kind]]
    return sorted(range(1, len(rates)), key=lambda i: -rates[i])


def best_point(service: Service) -> OperatingPoint:
    """Return the point of the pruned model with the most tokens/s at equal memory."""
    return service.kinds[MEMORY][ranked(service)[0]]


def _equal_concurrency(service: Service, points: Sequence[OperatingPoint], best: int) -> str:
    """Return how much faster the best pruned model is with equally many requests in flight, and the
    others."""
    dense, pruned = points[0], points[best]
    gain = gain_text(pruned.model, pruned.ratio, pruned.ratio_lower, pruned.ratio_upper)
    gain += (
        f", with {pruned.tokens_per_s:,.0f} tokens/s per GPU{runs_clause(service.runs[best - 1])}"
    )
    text = f"With {_requests(dense)} on {dense.setting}, {pruned.name} {gain}"
    if full := [point.pruning or "the dense model" for point in (dense, pruned) if not point.fits]:
        text += f"; so many do not fit with {' or '.join(full)}"
    others = [
        f"{p.name} {_times(p)}"
        + f", which stock {p.engine} does not run" * (service.runs[i - 1].works is False)
        for i, p in enumerate(points)
        if i not in (0, best)
    ]
    return f"{text}; others: {few(others, 3)}." if others else f"{text}."


def equal_memory(dense: OperatingPoint, pruned: OperatingPoint) -> str:
    """Return how many more sequences of a pruned model fit at equal memory, and how long each
    request takes."""
    name = pruned.name
    if not pruned.concurrency:
        return f"{name} does not fit on {pruned.setting}: {_weights(pruned)}."
    if not dense.concurrency:
        here = f"{_count(pruned)} sequences fit: {pruned.tokens_per_s:,.0f} tokens/s per GPU"
        return (
            f"{dense.model} does not fit on {dense.setting}: {_weights(dense)}; with {name},"
            f" {here}."
        )
    if pruned.concurrency == dense.concurrency:
        fit = (
            f"as many sequences {'run' if pruned.limited_by == 'engine' else 'fit'}"
            f" ({_count(pruned)})"
        )
    else:
        comma, times = (
            "," if pruned.limited_by == "engine" else "",
            ratio(pruned.concurrency / dense.concurrency),
        )
        instead = f"{_count(pruned)}{comma} instead of {_count(dense)}"
        fit = f"{times}x as many sequences fit ({instead}{_smaller(dense, pruned)})"
    longer = pruned.request_s / dense.request_s
    start = f"{name} serves {_times(pruned)} as many tokens/s at equal memory"
    return f"{start}: {fit}, and each request takes {ratio(longer)}x as long."


def within_limits(service: Service, dense: OperatingPoint, pruned: OperatingPoint) -> str:
    """Return how much more a pruned model serves within limits, or which limit a model exceeds."""
    start = (
        f"Within {service.limits.text} (with a probability of"
        f" {percent(service.limits.probability)})"
    )
    names = {
        point.pruning or "the dense model": point
        for point in (dense, pruned)
        if not point.concurrency
    }
    why = {name: failing_text(service, point) for name, point in names.items()}
    failing = "; ".join(
        f"{name} {f'fails ({text})' if text else 'does not fit'}" for name, text in why.items()
    )
    if dense.concurrency and pruned.concurrency:
        more = f"{_requests(pruned)} instead of {dense.concurrency:,}"
        return f"{start}, {pruned.name} serves {_times(pruned)} as many tokens/s: {more}."
    if pruned.concurrency:
        rate = f"{pruned.tokens_per_s:,.0f} tokens/s per GPU with {_requests(pruned)}"
        return f"{start}, {pruned.name} serves {rate}; {failing}."
    if dense.concurrency:
        return f"{start}, the dense model serves {_requests(dense)}; {failing}."
    return f"{start}, no request can be served: {failing}."


def failing_text(service: Service, point: OperatingPoint) -> str:
    """Return the limit that a model exceeds even for one request, and by how much; "" without such
    a limit."""
    if not point.unmet:
        return ""
    time = seconds(service.limits.named[point.unmet] * point.excess)
    start = f"{_LIMITED[point.unmet]} {time} for one request"
    if point.excess > 1.0:
        return f"{start}, {ratio(point.excess)}x the limit"
    return (
        f"{start}, below the limit with a probability of only {probability_text(point.probability)}"
    )


def _times(point: OperatingPoint) -> str:
    return interval_text(point.ratio, point.ratio_lower, point.ratio_upper)


def _requests(point: OperatingPoint) -> str:
    return f"{point.concurrency:,} request{'s' if point.concurrency > 1 else ''} in flight"


def _count(point: OperatingPoint) -> str:
    limit = point.limited_by == "engine" and point.concurrency == point.largest_concurrency
    return f"{point.concurrency:,}{', the limit of the engine' if limit else ''}"


def _smaller(dense: OperatingPoint, pruned: OperatingPoint) -> str:
    weights, caches = (
        (pruned.weights_bytes, dense.weights_bytes),
        (pruned.cache_bytes, dense.cache_bytes),
    )
    text = before = ""
    for name, (ours, theirs) in {"weights": weights, "the cache of each": caches}.items():
        change = 1.0 - ours / max(theirs, 1.0)
        if abs(change) < LEAST:
            continue
        verb = "shrink" if change > 0.0 else "grow"
        shown = "" if verb == before else f" {verb}{'' if name == 'weights' else 's'}"
        text += f"{' and' if before else ', as'} {name}{shown} by {percent(abs(change))}"
        before = verb
    return text


def _weights(point: OperatingPoint) -> str:
    return (
        "its weights take"
        f" {size(point.weights_bytes)}{' of each device' if point.devices > 1 else ''}"
    )


def money(value: float) -> str:
    """Return an amount of money without its currency.

    >>> money(1.216), money(123.4), money(0.9), money(0.0123)
    ('1.22', '123', '0.900', '0.0123')
    """
    digits = 0 if value >= 99.5 else 2 if value >= 1.0 else 3
    return f"{value:,.{digits}f}" if value >= 0.1 else f"{value:.3g}"


# -- notes on existing models and on measured times ------------------------------------------------


def difference_lines(dense: ModelConfig, pruned: ModelConfig) -> tuple[str, ...]:
    own = (dense.found,) if dense.found else ()
    if pruned == dense:
        return own
    lines, _, share = difference_of(dense, pruned)
    whole = (f"{100.0 * share:.1f} % of all parameters removed",) if len(lines) > 1 else ()
    return (
        *own,
        f"{pruned.name}: {'; '.join((*(lines or ('has the shapes of the dense model',)), *whole))}",
    )


def inferred_by(dense: Workload, hw: HardwareProfile, request: Request) -> Inferred | None:
    """Infer device and host speed from the measured time of a request; None without a measured
    time."""
    if request.dense_s is None:
        return None
    return compare(batch_with(dense, [dense]), hw, request.level, request.dense_s)[1]


def inferred_line(inferred: Inferred, hardware: str, dense_s: float) -> str:
    predicted = (
        f"{hardware}: {seconds(dense_s)} measured, {seconds(inferred.predicted_s)} predicted"
    )
    if not inferred.consistent:
        apart = f"{inferred.deviation:.1f} standard deviations apart, so it is ignored"
        return (
            f"{predicted}: {apart}; check that it is for this model, GPU, engine, phase, batch and"
            " length"
        )
    host = f"x{inferred.host:.2f} of a typical host"
    if inferred.layer_s:
        host = f"{seconds(inferred.layer_s)} per layer, {host}"
    if inferred.host_bound:
        low, high = inferred.pass_share
        if high - low > SPLIT:
            per_pass = f"{100 * low:.0f} to {100 * high:.0f} % of the host time is per pass"
            host += f"; {per_pass}, which fewer layers do not reduce"
        return f"{predicted}: host-bound ({host})"
    also = f", the host {host}" if inferred.host_s else ""
    return f"{predicted}: kernels take x{inferred.device:.2f} of the prediction{also}"


# -- notes on limits of the prediction -------------------------------------------------------------

BETTER, SHARE, OCTAVES = 1.03, 0.1, 1.0
"""Speedup over roofline bound, share of the time, and octaves outside the measured sizes from which
a note is given."""

# share of the time in collectives from which a note states the assumed connection
LINK_SHARE = 0.05
SPLIT = 0.05  # width of the interval of the share of host time per pass from which a note states it

_EXPERTS = {
    "grouped": "runs routed experts together",
    "touched": "loops over the routed experts that tokens use",
    "all": "loops over all routed experts",
}


def dense_notes(
    results: Results, request: Request, devices: Sequence[HardwareProfile]
) -> Iterator[str]:
    """Yield notes on the length, memory, shapes, profiles and measured time of a dense workload."""
    about, config = lower(request).meta, load_model(request.model)
    if (reached := about.seq + about.new_tokens) > config.max_positions:
        supported = f"{config.name} supports {config.max_positions} positions"
        yield f"{supported}, but {reached} were requested; timed as if supported"
    too_large = set(plain(results.columns["hardware"])[~results.columns["dense_fits"]])
    for hw in devices:
        dense = lower(*on([request], hw))
        if hw.label in too_large:
            where = (
                f"{config.name} at {about.phase}, {batch_name(about.phase)} {about.batch}, seq"
                f" {about.seq}"
            )
            yield f"{where} on {hw.label} {_too_large(dense, hw)}; its times are hypothetical"
        if joined := assumed_link(hw, dense):
            yield joined
        if far := beyond_measured(dense, hw):
            yield far
        if request.dense_s is not None and (inferred := inferred_by(dense, hw, request)):
            yield inferred_line(inferred, hw.label, request.dense_s)
        if other := fallback(hw, dense):
            yield other


def _too_large(dense: Workload, hw: HardwareProfile) -> str:
    m, name = memory(dense, hw), batch_name(dense.meta.phase)
    way = (
        f"fits on {m.devices_needed} devices"
        if m.devices_needed
        else f"does not fit on {MOST_DEVICES} devices"
    )
    left = m.capacity_bytes - (m.total_bytes - m.cache_bytes)
    largest = int(max(left, 0.0) / max(m.cache_bytes / dense.meta.batch, 1.0))
    way += f"; the largest {name} that fits is {largest}" if largest else ""
    return (
        f"needs {m.total_bytes / 2**30:.1f} GiB, {m.capacity_bytes / 2**30:.1f} GiB available"
        f" ({way})"
    )


def above_bound(
    results: Results,
    prunings: Sequence[Pruning],
    request: Request,
    devices: Sequence[HardwareProfile],
) -> Iterator[str]:
    """Yield one note per device on the speedup that is farthest above its roofline bound."""
    above, label = (
        results.columns["speedup"] / results.columns["roofline_bound"],
        plain(results.columns["hardware"]),
    )
    for hw in devices:
        mine = np.flatnonzero((label == hw.label) & (above > BETTER))
        if len(mine):
            most = int(mine[above[mine].argmax()])
            r, pruning = results[most], prunings[results.pruning[most]]
            (one,) = on([request], hw)
            dense = lower(one)
            why = better_than_bound(
                dense, pruning.apply(dense, one), hw, r.speedup, r.roofline_bound
            )
            at = f"{r.phase}, batch {r.batch}, seq {r.seq}"
            yield f"{hw.label}, {at}: {r.pruning} ({r.speedup:.2f}x) is {why}"


def beyond_measured(w: Workload, hw: HardwareProfile) -> str:
    """Return a note if GEMMs with a notable share of the time lie far outside the fitted sizes, or
    ""."""
    served = load_engine(w.meta.engine).serving(hw)
    for rows, dtype, weight in by_formats(w, Kind.GEMM):
        found = served.section("gemm", label_of(dtype, weight)).arrays.get("measured")
        if found is None:
            continue
        sizes = np.log2([w.m[rows], w.n[rows], w.k[rows]]).T
        octaves = octaves_outside(sizes, *np.asarray(found, dtype=np.float64))
        if octaves.max(initial=0.0) <= OCTAVES:
            continue
        spent = _timed(w, hw)[0].seconds * w.count
        if spent[rows][octaves > OCTAVES].sum() >= SHARE * spent.sum():
            m, n, k = (f"{2.0**v:.0f}" for v in sizes[np.argmax(octaves)])
            far = f"{octaves.max():.1f} octaves outside the measured sizes ({m} x {n} x {k})"
            return f"{hw.label}: GEMMs up to {far}: extrapolated, with wider intervals"
    return ""


def fallback(hw: HardwareProfile, w: Workload) -> str:
    """Return a note on assumed kernels, or "": kernels of another stack than the engine's (unless
    the user selected the stack), an unused fit of another decode kernel, generic defaults of an
    architecture without any fit, and :func:`experts_assumed`."""
    engine, labels = load_engine(w.meta.engine), sections_of(w)
    assumed = experts_assumed(w)
    if "generic" in unfitted(
        hw.section("gemm", labels.get("gemm", w.meta.dtype)), GEMM_CONSTANTS, hw.architecture
    ):
        return (
            f"{hw.label}: generic defaults, because no GEMMs of its architecture"
            f" ({hw.architecture}) have their own"
        )
    if hw.pinned or not engine.stacks:
        return assumed
    own, served = engine.stacks[0], engine.serving(hw)
    sections = {
        part: served.section(part, label) for part, label in labels.items() if part in TITLES
    }
    stacks = {
        TITLES[part]: own if SECTION_OF.get((part, own)) == one.stack else one.stack
        for part, one in sections.items()
    }
    fitted = [stack for stack in stacks.values() if stack]
    out = []
    for stack in dict.fromkeys(fitted):
        parts = [name for name, found in stacks.items() if found == stack]
        if stack != own:
            some = "" if len(parts) == len(fitted) else f" for {with_and(parts)}"
            out.append(f"{own} kernels are not calibrated{some}; {stack} kernels are used instead")
    label = labels.get("attention_decode")
    unused = next(
        (section for (part, _), section in served.sections.items() if part == "attention_decode"),
        None,
    )
    if (
        label
        and unused is not None
        and served.section("attention_decode", label).status == "default"
    ):
        name = f"{hw.name}@{unused.stack}"
        out.append(
            f"{unused.stack}'s decode attention is not the default of {own}; if it is enabled, use"
            f" {name}"
        )
    return "; ".join(filter(None, (f"{hw.label}: {'; '.join(out)}" if out else "", assumed)))


def assumed_link(hw: HardwareProfile, w: Workload) -> str:
    """Return a note on an assumed connection of the devices; "" if collectives take less than
    :data:`LINK_SHARE`."""
    if hw.link is None or w.meta.link or w.meta.devices == 1 or hw.own_link:
        return ""
    spent = _timed(w, hw)[0].seconds * w.count
    if spent[w.kind == Kind.COLLECTIVE].sum() < LINK_SHARE * spent.sum():
        return ""
    others = " or ".join(link_choices(hw.link, hw.bridge)[1:])
    return (
        f"{hw.label}: its devices are assumed to have {hw.link.text}; for another link, use --link"
        f" {others}"
    )


def experts_assumed(w: Workload) -> str:
    """Return how a workload's engine is assumed to run routed experts if its generations differ in
    that, or ""."""
    engine = load_engine(w.meta.engine)
    ways = {g.name: g.values.get("experts", engine.experts) for g in engine.generations}
    if len(set(ways.values())) < 2 or not (w.kind == Kind.EXPERTS).any():
        return ""
    name = engine.name.partition("@")[0]
    others = ", ".join(f"{name}@{other}" for other, way in ways.items() if way != engine.experts)
    return f"{engine.name} {_EXPERTS[engine.experts]} ({engine.title}); others: {others}"


def sections_of(w: Workload) -> dict[str, str]:
    """Return the operators of a profile that a workload needs, and the number format of each
    section."""
    kinds = w.kind.astype(np.int64) * 2 + (w.value_dim > 0)
    out = {}
    for row in sorted(np.unique(kinds, return_index=True)[1].tolist()):
        operator, formats = (
            BY_CODE[int(w.kind[row])],
            (DTYPES[w.dtype[row]], DTYPES[w.weight_dtype[row]]),
        )
        out[section_of(w, row)] = operator.label(*formats)
    return out


def better_than_bound(
    dense: Workload, pruned: Workload, hw: HardwareProfile, speedup: float, bound: float
) -> str:
    """Explain a speedup above its roofline bound; return "" for other speedups. One operator is
    closer to its roofline in the pruned than in the dense model, because kernels of the stack are
    slow at the dense shape; or else the removed work was farther from its roofline than the rest
    (such as the head)."""
    if speedup <= BETTER * bound:
        return ""
    (time_d, roof_d), (time_p, roof_p) = (_by_role(w, hw) for w in (dense, pruned))
    both = (time_d > 0) & (time_p > 0) & (roof_d > 0) & (roof_p > 0)
    share = [
        np.divide(roof, time, out=np.zeros(len(time)), where=both)
        for time, roof in ((time_d, roof_d), (time_p, roof_p))
    ]
    lost = np.where(
        both,
        time_d * (1.0 - np.divide(share[0], share[1], out=np.ones(len(both)), where=both)),
        0.0,
    )
    most = int(np.argmax(lost))
    better = f"better than its bound of {bound:.2f}x because"
    if lost[most] < 0.1 * (1.0 - bound / speedup) * time_d.sum():  # no operator explains the gain
        return (
            f"{better} the removed work (launches, ...) is farther from its roofline than the rest"
        )
    kind, role = divmod(most, len(ROLES))
    row = np.flatnonzero((dense.kind == kind) & (dense.role == role))[0]
    section = _timed(dense, hw)[1].section(section_of(dense, row), DTYPES[dense.dtype[row]])
    what = BY_CODE[kind].titles[0] if dense.is_attention[row] else ROLES[role]
    at = " and ".join(
        f"{100.0 * s[most]:.0f} % {name}" for s, name in zip(share, ("dense", "pruned"))
    )
    kernels = f"{section.stack}'s kernels" if section.stack else "its kernels"
    return f"{better} {kernels} run {what} at {at} of the roofline"


def uncalibrated_of(found: Iterable[Any]) -> tuple[str, float]:
    """Return the operators with default constants in some results or frontiers, and their largest
    share of the time."""
    every = list(found)
    parts = {part for r in every for part in r.uncalibrated.split("+")}
    share = max((r.uncalibrated_share for r in every), default=0.0)
    return "+".join(part for part in TITLES if part in parts), share


def uncalibrated(found: Iterable[Any], measured: bool = False) -> tuple[str, ...]:
    """Return one note on operators with default constants, for all devices on which their share of
    the time is at least :data:`SMALL_SHARE`; ``measured``: the user gave a dense time."""
    mine = by_key((r for r in found if r.uncalibrated_share >= SMALL_SHARE), lambda r: r.hardware)
    of = {device: uncalibrated_of(some) for device, some in mine.items()}
    devices: dict[str, list[str]] = {}
    for device, (parts, _) in sorted(of.items(), key=lambda item: -item[1][1]):
        devices.setdefault(with_and([TITLES[part] for part in parts.split("+")]), []).append(device)
    what = [
        f"{names} on {with_and(some)}"
        f" ({'up to ' if len(some) > 1 else ''}{100.0 * of[some[0]][1]:.0f} % of the time)"
        for names, some in devices.items()
    ]
    action = (
        "run prunesim calibrate on the"
        f" GPU{'' if measured else ', or give a measured --dense-time'}"
    )
    return (
        (f"{', '.join(what)}: not calibrated; defaults with wide intervals are used; {action}",)
        if what
        else ()
    )


def _timed(w: Workload, hw: HardwareProfile) -> tuple[OperatorTimes, HardwareProfile]:
    """Return the time of one execution of each row, and the device with the kernels of the
    workload's engine."""
    engine = load_engine(w.meta.engine)
    hw = engine.serving(hw)
    return operator_times(w, hw, engine=engine)[0], hw


def _by_role(w: Workload, hw: HardwareProfile) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return time and roofline of each kind x role of a workload, s, without overhead operators."""
    t, code = _timed(w, hw)[0], w.kind.astype(np.int64) * len(ROLES) + w.role
    size, kept = MOST_CODES * len(ROLES), np.where(w.overhead, 0.0, w.count)
    return np.bincount(code, t.seconds * kept, size), np.bincount(code, t.roofline_s * kept, size)
