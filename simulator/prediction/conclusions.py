"""Conclusions of ``speedup``, ``advise`` and ``pareto``: one to three sentences with their numbers and intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from simulator.display import few, with_and
from simulator.prediction.scenario import setting
from simulator.units import percent, ratio, seconds

if TYPE_CHECKING:
    from simulator.prediction.advise import Advice, Advised, Target
    from simulator.prediction.pareto import Front, Point
    from simulator.prediction.result import HasResult, Result

T = TypeVar("T", bound="HasResult")

NAMED = 4
"""Settings or models that a sentence names; of more it states the number."""


MOST_FRONTS = 3
"""Frontiers with a sentence and a table of their own, and predictions or settings with a sentence."""


def speedup_text(r: Result | Point) -> str:
    """Return a speedup with its interval."""
    return f"{ratio(r.speedup)}x ({ratio(r.speedup_lower)}-{ratio(r.speedup_upper)})"


def probability_text(probability: float) -> str:
    """Return a probability in percent.

    >>> probability_text(0.523), probability_text(0.9999), probability_text(1e-5)
    ('52 %', '> 99 %', '< 1 %')
    """
    return "> 99 %" if probability > 0.99 else "< 1 %" if probability < 0.01 else f"{100.0 * probability:.0f} %"


def of_speedups(results: Sequence[Result], clauses: Sequence[str] = ()) -> list[str]:
    """Return how much faster each pruning is: a sentence for each of a few, and of many the fastest of each of a few
    settings, or of all, with the number of gains and losses.

    ``clauses``, one for each result, end its sentence, such as whether the engine runs it.

    >>> from simulator import table
    >>> print(of_speedups(list(table("llama-3.1-8b", "h100", prune="depth 0.25", phase="decode")))[0][:74])
    depth at 25 % makes llama-3.1-8b 1.27x faster (1.17-1.31) on h100_sxm in v
    """
    ends = dict(zip(results, clauses))
    if len(results) <= MOST_FRONTS:
        return [f"{_one(r)}{ends.get(r, '')}." for r in results]
    groups: dict[str, list[Result]] = {}
    several = len({r.model for r in results}) > 1
    for r in results:
        groups.setdefault(f"{setting(r)} of {r.model}" if several else setting(r), []).append(r)
    if len(groups) <= MOST_FRONTS:
        return [_fastest(some, ends, f"On {where}") for where, some in groups.items()]
    best = max(results, key=lambda r: r.speedup)
    return [_fastest(results, ends, f"Of {len(groups)} settings", f" on {setting(best)}")]


def _one(r: Result) -> str:
    where = f"on {setting(r)}, {r.bottleneck}-bound"
    if r.speedup_upper < 1.0:
        text = f"makes {r.model} slower: {speedup_text(r)} {where}"
    elif r.speedup_lower <= 1.0:
        text = f"gives {r.model} no certain gain: {speedup_text(r)} {where}"
    else:
        ends = f"({ratio(r.speedup_lower)}-{ratio(r.speedup_upper)})"
        text = f"makes {r.model} {ratio(r.speedup)}x faster {ends} {where}"
    return f"{r.pruning} {text}"


def _fastest(some: Sequence[Result], ends: Mapping[Result, str], start: str, where: str = "") -> str:
    best = max(some, key=lambda r: r.speedup)
    gains, losses = (sum(test) for test in ([r.speedup_lower > 1 for r in some], [r.speedup_upper < 1 for r in some]))
    counts = f"{gains} of {len(some)} are faster with their whole interval" + (f", {losses} slower" if losses else "")
    return f"{start}, the fastest is {best.pruning}{where}: {speedup_text(best)}{ends.get(best, '')}; {counts}."


def settings_of(held: Sequence[T]) -> Mapping[str, list[T]]:
    """Return what is held of each setting (device, engine and request), in its order."""
    groups: dict[str, list[T]] = {}
    for one in held:
        groups.setdefault(setting(one.result), []).append(one)
    return groups


def of_advice(found: Advised, target: Target) -> list[str]:
    """Return the least pruning that reaches a target with its probability, or the closest pruning; and where the dense
    model reaches the target.

    >>> from simulator.prediction.advise import Target, advise
    >>> found = advise("llama-3.1-8b", ["h100"], 1.3, ["decode"], [8], family=["depth"])
    >>> print(of_advice(found, Target(1.3))[0][:100])
    The least pruning of llama-3.1-8b that reaches 1.30x on h100_sxm in vllm (decode, batch 8, seq 2048)
    """
    groups = settings_of(found.advice)
    dense = f"The dense model reaches {target.text} on {few(found.dense, NAMED)}." if found.dense else ""
    if len(groups) > 1:
        return [*_one_by_one(groups, target), dense]
    for where, (best, *_) in groups.items():
        if best.reached:
            start = f"The least pruning of {best.result.model} that reaches {target.text} on {where} is"
            return [f"{start} {best.result.pruning}; predicted {_predicted(best)}.", dense]
        start = f"No pruning of {best.result.model} reaches {target.text} on {where}"
        return [f"{start}; the closest is {best.result.pruning}: {_predicted(best)}.", dense]
    return [dense]


def _predicted(a: Advice) -> str:
    return f"{speedup_text(a.result)}, {seconds(a.result.pruned_s)}, probability {probability_text(a.probability)}"


def _one_by_one(groups: Mapping[str, Sequence[Advice]], target: Target) -> list[str]:
    """Return the settings that need the least and the most pruning, and the closest setting without any."""
    best = {where: group[0] for where, group in groups.items()}
    reached = {where: a.result for where, a in best.items() if a.reached}
    missed = {where: a for where, a in best.items() if not a.reached}
    parts = []
    if reached:
        low, high = (pick(reached, key=lambda where: reached[where].sparsity) for pick in (min, max))
        ends = [f"{reached[where].pruning} on {where}" for where in dict.fromkeys((low, high))]
        parts.append(f"The least pruning that reaches {target.text} is {' to '.join(ends)}.")
    if missed:
        where = max(missed, key=lambda where: missed[where].result.speedup)
        closest = f"the closest is {missed[where].result.pruning} on {where}: {_predicted(missed[where])}"
        count = f"{len(missed)} of {len(groups)} settings"
        parts.append(f"No family reaches {target.text} on {count}; {closest}.")
    return parts


def of_fronts(fronts: Sequence[Front], max_loss: float | None = None) -> list[str]:
    """Return which models are on each frontier and the best trade, which is the most speedup (its log) per loss; or
    with ``max_loss`` the fastest model with at most this loss."""
    if len(fronts) <= MOST_FRONTS:
        return [_front(front) if max_loss is None else _within(front, max_loss) for front in fronts]
    best: dict[str, list[Point]] = {}
    for front in fronts:
        if trade := best_trade(front) if max_loss is None else fastest_within(front, max_loss):
            best.setdefault(trade.name, []).append(trade)
    order = sorted(best.values(), key=len, reverse=True)
    named = [
        f"{some[0].name} on {len(some)} of {len(fronts)} settings ({_range([p.speedup for p in some])})"
        for some in order[:NAMED]
    ]
    if max_loss is not None:
        start = f"The fastest with at most {percent(max_loss)} loss of {fronts[0].axis.metric}"
        return [f"{start}: {', '.join(named) or 'none is faster than the dense model'}."]
    often = _by_method([p for front in fronts for p in front.points if p.optimal])
    return [
        f"The best trade, most speedup per loss of {fronts[0].axis.metric}: {', '.join(named) or 'none'}.",
        f"On at least one frontier: {often or 'only the dense model'}.",
    ]


def _front(front: Front) -> str:
    own = [p for p in front.points if p.optimal]
    where = f"On {setting(front)}"
    if not own:
        return f"{where}, no pruned {front.model} is on the frontier: none is faster at its loss than the dense model."
    text = f"{where}, {len(own)} of {len(front.points)} pruned {front.model} are on the frontier: {_by_method(own)}"
    trade = best_trade(front)
    if trade is None:
        return f"{text}; none is faster than the dense model."
    return (
        f"{text}; best trade: {trade.name}, {speedup_text(trade)} at {percent(trade.loss)} loss of {front.axis.metric}."
    )


def _within(front: Front, max_loss: float) -> str:
    best = fastest_within(front, max_loss)
    kept = f"{front.model} with at most {percent(max_loss)} loss of {front.axis.metric}"
    if best is None:
        return f"On {setting(front)}, no pruned {kept} is faster than the dense model."
    return f"On {setting(front)}, the fastest {kept} is {best.name}: {speedup_text(best)} at {percent(best.loss)} loss."


def _by_method(points: Sequence[Point]) -> str:
    """Return methods with their sparsities, by the smallest loss of each."""
    methods: dict[str, dict[float, None]] = {}
    for p in sorted(points, key=lambda p: p.loss):
        methods.setdefault(p.method, {})[100.0 * p.sparsity] = None
    return few((f"{name} {with_and([f'{s:.3g}' for s in sorted(of)])} %" for name, of in methods.items()), 2 * NAMED)


def best_trade(front: Front) -> Point | None:
    """Return the point of a frontier with the largest log speedup per loss, preferably one whose whole interval is a
    gain; None if no point is faster than the dense model."""
    faster = [p for p in front.points if p.optimal and p.speedup > 1.0]
    certain = [p for p in faster if p.speedup_lower > 1.0]
    return max(certain or faster, key=lambda p: math.log(p.speedup) / max(p.loss, 1e-3), default=None)


def fastest_within(front: Front, max_loss: float) -> Point | None:
    """Return the fastest point of a frontier with at most this loss; None if none is faster than the dense model."""
    faster = [p for p in front.points if p.optimal and p.speedup > 1.0 and p.loss <= max_loss]
    return max(faster, key=lambda p: p.speedup, default=None)


def _range(values: Sequence[float]) -> str:
    low, high = ratio(min(values)), ratio(max(values))
    return f"{low}x" if low == high else f"{low}-{high}x"
