"""State the operating points of a service in sentences: :func:`sentences`, :func:`equal_memory`."""

from __future__ import annotations

import math

from simulator.display import few
from simulator.prediction.conclusions import probability_text
from simulator.prediction.operating import EQUAL, LIMITS, MEMORY, OperatingPoint, Service
from simulator.units import percent, ratio, seconds, size

NAMED = 3
"""Further prunings that a sentence names."""

LEAST = 0.001
"""Relative change of a number of bytes from which it is stated."""

_LIMITED = {"ttft": "time to the first token", "tpot": "time per output token"}


def sentences(service: Service) -> list[str]:
    """Return the conclusion on a service: at equal concurrency, at equal memory, and within limits if there are some.

    The first two are about the pruning with the most tokens/s at equal memory, the last about that within limits.

    >>> from simulator import serve
    >>> lines = sentences(serve("llama-3.1-8b", "h100", prune="depth 0.25").services[0])
    >>> print(lines[0][70:])
    depth at 25 % makes llama-3.1-8b 1.32x faster (1.30-1.34); stock vllm runs it.
    >>> print(lines[1][:108])
    depth at 25 % serves 1.35x (1.31-1.39) as many tokens/s at equal memory: 1.42x as many sequences fit (303 in
    """
    kinds, best = service.kinds, ranked(service)[0]
    out = [_equal_concurrency(service, best)] if kinds[MEMORY][0].fits else []
    out.append(equal_memory(kinds[MEMORY][0], kinds[MEMORY][best]))
    last = kinds[MEMORY][0], kinds[MEMORY][best]
    if LIMITS in kinds:
        last = kinds[LIMITS][0], kinds[LIMITS][ranked(service, LIMITS)[0]]
        out.append(within_limits(service, *last))
    return [*out[:-1], f"{out[-1][:-1]}{_cost(*last)}."]


def ranked(service: Service, kind: str = MEMORY) -> list[int]:
    """Return the indices of the pruned models (from 1) by their tokens/s at the points of a kind, the most first."""
    rates = [point.tokens_per_s if point.concurrency else 0.0 for point in service.kinds[kind]]
    return sorted(range(1, len(rates)), key=lambda i: -rates[i])


def best_point(service: Service) -> OperatingPoint:
    """Return the pruned model with the most tokens/s at equal memory, there."""
    return service.kinds[MEMORY][ranked(service)[0]]


def equal_memory(dense: OperatingPoint, pruned: OperatingPoint) -> str:
    """Return why a pruned model serves more at equal memory: how many more sequences fit, and how long each takes."""
    name = pruned.name
    if not pruned.concurrency:
        return f"{name} does not fit on {pruned.setting}: {_weights(pruned)}."
    if not dense.concurrency:
        here = f"{_count(pruned)} sequences fit: {pruned.tokens_per_s:,.0f} tokens/s per GPU"
        return f"{dense.model} does not fit on {dense.setting}: {_weights(dense)}; with {name}, {here}."
    if pruned.concurrency == dense.concurrency:
        fit = f"as many sequences {'run' if pruned.limited_by == 'engine' else 'fit'} ({_count(pruned)})"
    else:
        times = ratio(pruned.concurrency / dense.concurrency)
        fit = f"{times}x as many sequences fit ({_instead(dense, pruned)}{_smaller(dense, pruned)})"
    longer = pruned.request_s / dense.request_s
    start = f"{name} serves {_times(pruned)} as many tokens/s at equal memory"
    return f"{start}: {fit}, and each request takes {ratio(longer)}x as long."


def within_limits(service: Service, dense: OperatingPoint, pruned: OperatingPoint) -> str:
    """Return how much more a pruned model serves within limits, or which limit a model cannot keep."""
    limits = service.limits
    chance = f" (with a probability of {percent(limits.probability)})"
    start = f"Within {limits.text}{chance}"
    if not dense.concurrency and not pruned.concurrency:
        return f"{start}, no request can be served: {_failing(service, dense)}; {_failing(service, pruned)}."
    if not dense.concurrency:
        rate = f"{pruned.tokens_per_s:,.0f} tokens/s per GPU with {_requests(pruned)}"
        return f"{start}, {pruned.name} serves {rate}; {_failing(service, dense)}."
    if not pruned.concurrency:
        return f"{start}, the dense model serves {_requests(dense)}; {_failing(service, pruned)}."
    more = f"{_requests(pruned)} instead of {dense.concurrency:,}"
    return f"{start}, {pruned.name} serves {_times(pruned)} as many tokens/s: {more}."


def failing_text(service: Service, point: OperatingPoint) -> str:
    """Return which limit a model cannot keep even for one request, and by how much; "" if it keeps them."""
    if not point.unmet:
        return ""
    time = seconds(service.limits.named[point.unmet] * point.excess)
    start = f"{_LIMITED[point.unmet]} {time} for one request"
    if point.excess > 1.0:
        return f"{start}, {ratio(point.excess)}x the limit"
    return f"{start}, below the limit with a probability of only {probability_text(point.probability)}"


def _failing(service: Service, point: OperatingPoint) -> str:
    name = point.pruning or "the dense model"
    text = failing_text(service, point)
    return f"{name} fails ({text})" if text else f"{name} does not fit"


def _equal_concurrency(service: Service, best: int) -> str:
    """Return how much faster the best pruned model is with equally many requests in flight, and the others."""
    points = service.kinds[EQUAL]
    dense, pruned = points[0], points[best]
    start = f"With {_requests(dense)} on {dense.setting}, {pruned.name}"
    text = f"{start} {_gain(pruned)}{service.runs[best - 1].clause}"
    others = [
        f"{p.name} {_times(p)}{f', which stock {p.engine} does not run' if service.runs[i - 1].works is False else ''}"
        for i, p in enumerate(points)
        if i not in (0, best)
    ]
    return f"{text}; others: {few(others, NAMED)}." if others else f"{text}."


def _gain(point: OperatingPoint) -> str:
    if point.ratio_upper < 1.0:
        return f"makes {point.model} slower: {_times(point)}"
    if point.ratio_lower <= 1.0:
        return f"gives {point.model} no certain gain: {_times(point)}"
    return f"makes {point.model} {_times(point).replace(' ', ' faster ', 1)}"


def _times(point: OperatingPoint) -> str:
    return f"{ratio(point.ratio)}x ({ratio(point.ratio_lower)}-{ratio(point.ratio_upper)})"


def _requests(point: OperatingPoint) -> str:
    return f"{point.concurrency:,} request{'s' if point.concurrency > 1 else ''} in flight"


def _count(point: OperatingPoint) -> str:
    limit = point.limited_by == "engine" and point.concurrency == point.largest_concurrency
    return f"{point.concurrency:,}{', the limit of the engine' if limit else ''}"


def _instead(dense: OperatingPoint, pruned: OperatingPoint) -> str:
    """Return two numbers of sequences."""
    comma = "," if pruned.limited_by == "engine" else ""
    return f"{_count(pruned)}{comma} instead of {_count(dense)}"


def _smaller(dense: OperatingPoint, pruned: OperatingPoint) -> str:
    """Return by how much weights and cache shrink."""
    parts = []
    for name, ours, theirs in (
        ("weights", pruned.weights_bytes, dense.weights_bytes),
        ("the cache of each", pruned.cache_bytes, dense.cache_bytes),
    ):
        change = 1.0 - ours / max(theirs, 1.0)
        if abs(change) >= LEAST:
            verb = ("shrink" if change > 0.0 else "grow") + ("" if name == "weights" else "s")
            parts.append((name, verb, percent(abs(change))))
    if not parts:
        return ""
    (name, verb, by), *rest = parts
    text = f", as {name} {verb} by {by}"
    for name, other, by in rest:
        text += f" and {name} by {by}" if other.rstrip("s") == verb.rstrip("s") else f" and {name} {other} by {by}"
    return text


def _weights(point: OperatingPoint) -> str:
    return f"its weights take {size(point.weights_bytes)}{' of each device' if point.devices > 1 else ''}"


def _cost(dense: OperatingPoint, pruned: OperatingPoint) -> str:
    """Return the cost of output as the end of a sentence."""
    if math.isnan(pruned.cost_output):
        return ""
    instead = "" if math.isnan(dense.cost_output) else f" instead of {price(dense.cost_output)}"
    return f"; a million output tokens cost {price(pruned.cost_output)}{instead}"


def price(value: float) -> str:
    """Return an amount of money without its currency.

    >>> price(1.216), price(123.4), price(0.9), price(0.0123)
    ('1.22', '123', '0.900', '0.0123')
    """
    digits = 0 if value >= 99.5 else 2 if value >= 1.0 else 3
    return f"{value:,.{digits}f}" if value >= 0.1 else f"{value:.3g}"
