"""Conclusions of ``prunesim pareto``."""

from __future__ import annotations

import math
from collections.abc import Sequence

from simulator.display import few, with_and
from simulator.prediction.pareto import Front, Point
from simulator.prediction.requests import by_key, setting
from simulator.prediction.wording import (
    MOST_SENTENCES,
    NAMED,
    speedup_text,
)
from simulator.units import percent, ratio


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
    optimal = [p for p in front.points if p.optimal]
    where = f"On {setting(front)}"
    if not optimal:
        return (
            f"{where}, no pruned {front.model} is on the frontier: none is faster at its loss than"
            " the dense model."
        )
    text = (
        f"{where}, {len(optimal)} of {len(front.points):,} pruned {front.model} are on the"
        f" frontier: {_by_method(optimal)}"
    )
    trade = best_trade(front)
    if trade is None:
        return f"{text}; none is faster than the dense model."
    gain = f"{speedup_text(trade)} at {percent(trade.loss)} loss of {front.axis.metric}"
    return f"{text}; best trade: {trade.name}, {gain}."


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
