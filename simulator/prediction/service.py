"""Answer the questions of a service: at equal concurrency, at equal memory, within limits, and at what cost.

Use :func:`serve`; :func:`sentences` states its conclusion. A pruned model is faster with equally many requests in
flight; it also leaves memory for more of them, and keeps limits of latency at a higher load.
:mod:`simulator.prediction.operating` finds the operating points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from simulator.arguments import OneOrMore, listed, number, shown
from simulator.display import Displayed, few
from simulator.engines import DEFAULT_ENGINE
from simulator.errors import InputError
from simulator.models.library import load_model
from simulator.prediction.caveats import uncalibrated
from simulator.prediction.compare import scenario_results
from simulator.prediction.conclusions import probability_text
from simulator.prediction.operating import (
    CURVE,
    EQUAL,
    LIMITS,
    MEMORY,
    PRICE,
    Limits,
    OperatingPoint,
    Service,
    operating_points,
)
from simulator.prediction.prunings import Excluded, difference_lines, exclude, excluded_lines, prunings_of, readable
from simulator.prediction.runnable import runnable
from simulator.prediction.scenario import Scenario, profiles, scenarios, whole_number
from simulator.prediction.table import dense_notes
from simulator.units import percent, ratio, seconds, size

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile
    from simulator.models.config import ModelConfig


NAMED = 3  # further prunings that a sentence names
LEAST = 0.001  # relative change of a number of bytes from which it is stated

_LIMITED = {"ttft": "time to the first token", "tpot": "time per output token"}


@dataclass(frozen=True, repr=False)
class Served(Displayed):
    """Services by engine and device, and notes on exclusions and limits of the predictions."""

    services: tuple[Service, ...]
    notes: tuple[str, ...] = ()

    @property
    def points(self) -> tuple[OperatingPoint, ...]:
        """Operating points of all services, without curves."""
        return tuple(point for service in self.services for point in service.points)

    def to_dict(self) -> dict[str, Any]:
        """Return ``points`` as dictionaries, and ``notes``."""
        return {"points": [point.to_dict() for point in self.points], "notes": list(self.notes)}

    def _title(self) -> str:
        first = self.points[0]
        return f"{first.model} in {len(self.services)} services: {len(self.points)} operating points"

    def _columns(self) -> Mapping[str, Any]:
        """Return one row per operating point."""
        rows = [vars(point) for point in self.points]
        return {name: [row[name] for row in rows] for name in rows[0]}


def serve(
    model: str | ModelConfig,
    hardware: OneOrMore[str | HardwareProfile],
    family: OneOrMore[str] | None = None,
    sparsity: OneOrMore[float] | None = None,
    seq: int = 2048,
    *,
    method: OneOrMore[str] = (),
    pruned: OneOrMore[str | ModelConfig] = (),
    prune: OneOrMore[str] = (),
    engine: OneOrMore[str] = DEFAULT_ENGINE,
    concurrency: int | None = None,
    ttft_s: float | None = None,
    tpot_s: float | None = None,
    probability: float = 0.5,
    price: float | None = None,
    scenario: Scenario | None = None,
    options: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Served:
    """Compare the dense and pruned models in a server: at equal concurrency, at equal memory, and within limits.

    Parameters
    ----------
    model : str or ModelConfig
        Name, path or shapes of the dense model.
    hardware : one or more
        Devices: names, paths or profiles.
    family, sparsity : one or more
        Families and fractions removed, as in :func:`simulator.table`.
    seq : int
        Tokens of each prompt, at least 1.
    method, pruned, prune : one or more
        Instead of families: published methods, existing pruned models, or texts such as ``"width mlp=0.3"``.
    engine : one or more
        Names or paths of engines.
    concurrency : int, optional
        Requests in flight of the comparison at equal concurrency. Default: the largest number that fits the dense
        model.
    ttft_s, tpot_s : float, optional
        Limits of the time to the first token and of the time per further token, s.
    probability : float
        Probability with which the limits must hold, in (0, 1).
    price : float, optional
        Price of a GPU-hour, in any currency.
    scenario : Scenario
        Common inputs: new tokens, number formats, devices, cached prefix, token budget, level of the intervals.
    options : mapping
        Further options of a single family.
    progress : callable
        Called with services done and their number.

    Returns
    -------
    Served
        One :class:`Service` per engine and device, each with its operating points.

    Raises
    ------
    InputError
        For an unknown name or a value out of range, if no model fits a device, and if no pruning can be predicted.

    Examples
    --------
    >>> import simulator
    >>> found = simulator.serve("llama-3.1-8b", "h100", prune="depth 0.25", tpot_s=0.02)
    >>> for point in found.points:
    ...     print(f"{point.point}: {point.name} at {point.concurrency}")
    equal concurrency: dense at 214
    equal concurrency: depth at 25 % at 214
    equal memory: dense at 214
    equal memory: depth at 25 % at 303
    within limits: dense at 30
    within limits: depth at 25 % at 44
    """
    if not isinstance(options, Mapping | None):
        raise InputError(f"options: expected a mapping from option to value, got {shown(options)}")
    if concurrency is not None:
        whole_number("concurrency", concurrency)
    if price is not None:
        number("price", price, PRICE)
    if scenario is not None and scenario.dense_s is not None:
        raise InputError("dense time: expected none, as a service has many concurrencies")
    limits, dense = Limits(ttft_s, tpot_s, probability), load_model(model)
    devices, (existing, skipped) = profiles(hardware), readable(listed("pruned", pruned))
    chosen, fractions = (None if v is None else listed(n, v) for n, v in (("family", family), ("sparsity", sparsity)))
    texts = listed("prune", prune)
    prunings = prunings_of([dense], chosen, listed("method", method), existing, fractions, options, texts)
    requested = scenarios(scenario, [dense], engine, ["serve"], [concurrency or 1], [seq])
    excluded, several = Excluded(), len(prunings) > 1

    def reject(pruning: int | None, reason: str, device: str) -> None:
        if pruning is None or not several:
            raise InputError(reason)
        exclude(excluded, prunings[pruning], reason, device)

    services: list[Service] = []
    notes = dict.fromkeys((*skipped, *(line for p in prunings for line in difference_lines(dense, p.model or dense))))
    for done, (one, hw) in enumerate(((one, hw) for one in requested for hw in devices), start=1):
        results = scenario_results(one, prunings, [hw], reject)
        if len(results):
            own = [prunings[i] for i in results.pruning.tolist()]
            names = [r.pruning for r in results]
            points = operating_points(one, hw, own, names, concurrency=concurrency, limits=limits, price=price)
            kinds = tuple(p for p in points if p.point != CURVE), tuple(p for p in points if p.point == CURVE)
            service = Service(*kinds, limits, tuple(runnable(one, pruning) for pruning in own))
            services.append(service)
            notes |= dict.fromkeys((*dense_notes(results, one, [hw]), *_too_many(service), *uncalibrated(results)))
        if progress is not None:
            progress(done, len(requested) * len(devices))
    if not services:
        raise InputError(next(iter(excluded_lines(excluded)), "nothing to predict"))
    return Served(tuple(services), (*notes, *excluded_lines(excluded)))


def _too_many(service: Service) -> list[str]:
    """Return a note on each model that does not fit at equal concurrency; the dense model's memory has one already."""
    return [
        f"{p.name} at concurrency {p.concurrency} on {p.hardware}: {p.largest_concurrency} fit; hypothetical times"
        for p in service.kinds[EQUAL]
        if not p.fits and (p.pruning or p.limited_by == "engine")
    ]


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
    instead = "" if math.isnan(dense.cost_output) else f" instead of {money(dense.cost_output)}"
    return f"; a million output tokens cost {money(pruned.cost_output)}{instead}"


def money(value: float) -> str:
    """Return an amount of money without its currency.

    >>> money(1.216), money(123.4), money(0.9), money(0.0123)
    ('1.22', '123', '0.900', '0.0123')
    """
    digits = 0 if value >= 99.5 else 2 if value >= 1.0 else 3
    return f"{value:,.{digits}f}" if value >= 0.1 else f"{value:.3g}"
