"""Conclusions of ``prunesim serve`` about requests that arrive, and the columns of its table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from simulator.prediction.energy_sentences import saved_text
from simulator.prediction.load import Interval, LoadPoint, LoadService
from simulator.prediction.runnable import runs_clause
from simulator.prediction.service import OperatingPoint
from simulator.prediction.service_sentences import money
from simulator.prediction.wording import interval_text, number_text
from simulator.units import percent, seconds, seconds_between

COLUMNS = {
    "gpus": "GPUs",
    "largest_rate": "largest rate\nof a replica",
    "within": "within\nlimits",
    "ttft_p99": "first token\n99 %",
    "tpot_p99": "per token\n99 %",
    "cost": "cost/M",
    "request_mean": "request\nmean",
    "ttft_p50": "first token\nmedian",
    "tpot_p50": "per token\nmedian",
}
"""Numbers of a table, the most important first, and the titles of their columns."""

ENERGY = {
    "joules_per_token": "J per\ntoken",
    "energy_saved": "energy\nsaved",
    "watts": "W per\nGPU",
    "electricity": "electricity\n/M tokens",
    "carbon_g": "g CO2\n/M tokens",
}
"""Numbers of a table of energy."""


def load_columns(
    points: Sequence[LoadPoint | OperatingPoint], names: Mapping[str, str] = COLUMNS
) -> dict[str, list[str]]:
    """Return the columns of numbers with their intervals by title, without those that no point
    has."""
    return {
        title: [cell(name, *p.numbers[name]) if name in p.numbers else "-" for p in points]
        for name, title in names.items()
        if any(name in p.numbers for p in points)
    }


def cell(name: str, value: float, lower: float, upper: float) -> str:
    if name.startswith(("ttft", "tpot", "request_")):
        return seconds_between(value, lower, upper, short=True)
    if name == "within":
        return percent(value)
    if name == "energy_saved":
        return saved_text(value, lower, upper)
    return number_text(value, lower, upper)


def of_loads(services: Sequence[LoadService]) -> list[str]:
    """Return the conclusions on services that differ only in the devices that share a model: on the
    dense model, and on the pruning that needs the fewest GPUs."""
    dense, pruned = best_points(services)
    shown = [point for point in (dense, pruned) if point is not None]
    out = [_needs(services[0], shown)] if "largest_rate" in shown[0].numbers else []
    out += [_percentiles(point, first=point is shown[0]) for point in shown]
    if pruned is not None:
        run = next(
            run
            for service in services
            for point, run in zip(service.points[1:], service.runs)
            if point is pruned
        )
        out[-1] = f"{out[-1][:-1]}{runs_clause(run)}."
    growing = [point for point in shown if point.numbers["drains"].lower < 1.0]
    first = [_cannot_drain(point) for point in growing if not point.drains]
    return [*first, *out, *(_may_not_drain(point) for point in growing if point.drains)]


def best_points(services: Sequence[LoadService]) -> tuple[LoadPoint | None, LoadPoint | None]:
    """Return the dense and the pruned model that need the fewest GPUs, and of these the one with
    the shortest requests; None if no server can run it."""
    every = [point for service in services for point in service.points if not point.refused]
    dense, pruned = (
        min((p for p in every if bool(p.pruning) == is_pruned), key=_rank, default=None)
        for is_pruned in (False, True)
    )
    return dense, pruned


def _rank(point: LoadPoint) -> tuple[bool, float, float]:
    return not point.drains, point.numbers["gpus"].value, point.numbers["request_mean"].value


def _model(point: LoadPoint) -> str:
    return point.pruning or "the dense model"


def _needs(service: LoadService, points: Sequence[LoadPoint]) -> str:
    """Return how many GPUs the models need at the rate, or their largest rates."""
    load, share = service.load, percent(service.load.share)
    limits = f"within {service.limits.text} for {share} of the requests"
    if load.rate is not None and load.replicas is None:
        parts = "; ".join(gpus_text(point) for point in points)
        return f"At {load.rate:g} requests/s {limits}, {parts}."
    parts = "; ".join(
        f"{_model(p)} serves at most {rate_text(p.numbers['largest_rate'])} per replica"
        for p in points
    )
    return f"{limits[0].upper()}{limits[1:]}, {parts}."


def gpus_text(point: LoadPoint) -> str:
    """Return how many GPUs a model needs, and how they are shared."""
    value, lower, upper = point.numbers["gpus"]
    if math.isinf(value):
        return f"no number of GPUs serves {_model(point)}: a request alone exceeds the limits"
    inside = [f"{lower:.0f}-{upper:.0f}"] if lower != upper else []
    inside += [f"{point.replicas} x {point.devices}"] if point.devices > 1 else []
    ends = f" ({'; '.join(inside)})" if inside else ""
    return f"{_model(point)} needs {value:.0f} {point.hardware}{ends}"


def rate_text(rate: Interval) -> str:
    value, lower, upper = rate
    return f"{value:.3g} requests/s ({lower:.3g}-{upper:.3g})"


def _percentiles(point: LoadPoint, first: bool) -> str:
    """Return what half of the requests and the 99th percentile see."""
    times = [
        f"{seconds_between(*point.numbers[f'{name}_p99'])}"
        f" (median {seconds(point.numbers[f'{name}_p50'].value)}) {of}"
        for name, of in (("ttft", "to the first token"), ("tpot", "per further token"))
        if f"{name}_p99" in point.numbers
    ]
    text = f"With {_model(point)}, the 99th percentile is {' and '.join(times)}"
    if first:
        return f"{text}."
    ratio = point.numbers.get("rate_ratio")
    more = ""
    if ratio is not None and not math.isnan(ratio.value):
        more = f"; one replica serves {interval_text(*ratio)} the rate"
    if "cost" in point.numbers:
        cost = money(point.numbers["cost"].value)
        more += f"; at {point.rate:.3g} requests/s, a million output tokens cost {cost}"
    if "energy_saved" in point.numbers:
        more += f"; it saves {saved_text(*point.numbers['energy_saved'])} of the energy"
    return f"{text}{more}."


def _cannot_drain(point: LoadPoint) -> str:
    """Return that requests arrive faster than they end."""
    return (
        f"The queue of {_model(point)} cannot drain: {point.rate:.3g} requests/s arrive,"
        f" {point.numbers['requests_per_s'].value:.3g} end, so waiting times grow without a limit."
    )


def _may_not_drain(point: LoadPoint) -> str:
    return (
        f"The queue of {_model(point)} may not drain: at the slow end of its interval, requests"
        " arrive faster than they end."
    )
