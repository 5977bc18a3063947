"""Conclusions of ``prunesim serve``."""

from __future__ import annotations

import math
from collections.abc import Sequence

from simulator.display import few
from simulator.prediction.energy_sentences import saved_text
from simulator.prediction.runnable import runs_clause
from simulator.prediction.service import LIMITS, MEMORY, OperatingPoint, Service
from simulator.prediction.wording import (
    gain_text,
    interval_text,
    probability_text,
)
from simulator.units import percent, ratio, seconds, size

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
    if saved := last[1].numbers.get("energy_saved"):
        out[-1] = f"{out[-1][:-1]}; it saves {saved_text(*saved)} of the energy per token."
    dense, pruned = last
    if not math.isnan(pruned.cost_output):
        known = not math.isnan(dense.cost_output)
        instead = f" instead of {_cost(dense)}" if known else ""
        out[-1] = f"{out[-1][:-1]}; a million output tokens cost {_cost(pruned)}{instead}."
    return out


def _cost(point: OperatingPoint) -> str:
    """Return a cost with the load at which it holds."""
    return f"{money(point.cost_output)} with {point.concurrency} in flight"


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
