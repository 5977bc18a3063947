"""Answer what requests see that arrive at a service: a rate, many at once, or a trace.

The engine's schedule is simulated (:mod:`simulator.serving`) with the step times of each model, at
the typical errors and at both ends of each error that all steps of a run share. The changes of a
number are combined as a root of sum of squares of their logs. Dense and pruned models serve the
same requests with the same errors, so the errors that they share cancel in ratios.

Limits hold at a rate if a share of the requests keeps them and the queue drains. The largest rate
of one replica is found by bisection with the same draws; a higher rate needs that many more
replicas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from simulator.arguments import SHARE, Range, number
from simulator.arrays import FloatArray
from simulator.display import Displayed
from simulator.errors import InputError
from simulator.hardware.profile import HardwareProfile
from simulator.models.lower import cached_tokens
from simulator.prediction.batch import batch_of, rejecting
from simulator.prediction.energy import NORMAL_90
from simulator.prediction.limits import Limits
from simulator.prediction.prunings import Pruning
from simulator.prediction.requests import computed_on, kind_text
from simulator.prediction.runnable import Runnable, runnable
from simulator.prediction.tariff import NO_TARIFF, Tariff
from simulator.request import Request
from simulator.serving.arrivals import Lengths, Requests, Traffic, read_trace
from simulator.serving.schedule import simulate, simulate_replicas
from simulator.serving.served import QUANTILES, Served, Steps
from simulator.serving.server import Server
from simulator.serving.steps import TYPICAL, Errors, Grid, StepTables, StepTimes
from simulator.uncertainty.factors import level_scale
from simulator.units import finite

T = TypeVar("T")

REQUESTS = 1000
"""Requests of a run at a rate: enough for ten beyond the 99th percentile."""

PARTS = ("mean", "p50", "p90", "p99")

ENDS = tuple(
    TYPICAL._replace(**{name: side})
    for name in ("kernels", "own", "passes", "work")
    for side in (-1.0, 1.0)
)
"""Both ends of the errors that all steps of a run share."""

NUMBERS = (
    *("tokens_per_s", "requests_per_s", "drains"),
    *(f"{time}_{part}" for time in ("ttft", "tpot", "request") for part in PARTS),
    *("within", "goodput", "largest_rate", "gpus", "cost", "latency_ratio", "rate_ratio"),
    *("joules_per_token", "energy_saved", "watts", "electricity", "carbon_g"),
)
"""Numbers of a model under a load."""

_RATES = 1000.0  # ratio of the largest to the smallest rate of a search
_NEAR = 1.5  # ratio between the largest rates at typical and at other errors, most often
_TOLERANCE = 1.02  # ratio of rates at which a search stops
_REPLICAS = Range(1.0, 10_000.0, "a whole number of replicas from 1 to 10,000", True)


class Interval(NamedTuple):
    value: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Return the interval of a number from its values at typical errors and at their ends."""
        every = np.array(values, dtype=np.float64)
        if not (np.isfinite(every).all() and every.min() > 0.0):
            return cls(float(every[0]), float(every.min()), float(every.max()))
        change = np.log(every[1:] / every[0]).reshape(-1, 2)
        below, above = (
            math.sqrt(float((np.maximum((side * change).max(axis=1), 0.0) ** 2).sum()))
            for side in (-1.0, 1.0)
        )
        first = float(every[0])
        return cls(first, first * math.exp(-below), first * math.exp(above))


@dataclass(frozen=True)
class Load:
    """What arrives at a service, and the options of its server."""

    rate: float | None = None  # requests per second
    requests: int | None = None
    trace: str | Path | None = None  # file of arrivals and lengths
    concurrency: int | None = None  # clients that send a request when the last one ends
    length_sd: float = 0.0  # standard deviation of the logs of lengths
    share: float = 0.99  # share of requests that must keep the limits
    replicas: int | None = None
    seed: int = 0
    options: str | Sequence[str] = ()  # options of the server, as users type them

    def __post_init__(self) -> None:
        number("goodput", self.share, SHARE)
        if self.replicas is not None:
            number("replicas", self.replicas, _REPLICAS)
        if self.trace is not None and (self.requests or self.concurrency or self.length_sd):
            raise InputError("trace: expected without requests, concurrency and length_sd")

    @property
    def given(self) -> bool:
        return self.rate is not None or self.requests is not None or self.trace is not None

    def check(self, concurrencies: int) -> None:
        """Refuse settings that would have no effect."""
        if not self.given:
            words = [self.options] if isinstance(self.options, str) else self.options
            option = f"server option {words[0]}" if self.options else ""
            names = option, "replicas" * bool(self.replicas), "length_sd" * bool(self.length_sd)
            for name in filter(None, names):
                raise InputError(f"{name}: expected with a rate, requests or a trace")
        elif concurrencies and (concurrencies > 1 or self.concurrency is None):
            raise InputError("concurrency: expected one, with requests, under a load")
        elif self.concurrency is not None and self.rate is not None:
            raise InputError("rate and concurrency: expected one of them")

    def arriving(self, request: Request) -> Requests:
        """Return the requests; without a rate they arrive at once, in a trace as it states."""
        prefix = cached_tokens(request)
        if self.trace is not None:
            read = read_trace(self.trace, request.model.max_positions, prefix)
            return read if self.rate is None else read.at_rate(self.rate)
        traffic = Traffic(
            prompt=Lengths(request.seq, self.length_sd),
            output=Lengths(request.new_tokens, self.length_sd),
            requests=REQUESTS if self.requests is None else self.requests,
            rate=self.rate,
            concurrency=self.concurrency,
            prefix=prefix,
            seed=self.seed,
        )
        return traffic.draw()


@dataclass(frozen=True, repr=False, kw_only=True)
class LoadPoint(Displayed):
    """One model under a load. ``numbers`` have intervals: times of requests in s (``ttft``,
    ``tpot``, ``request``; mean, median, 90th and 99th percentile), ``tokens_per_s``,
    ``requests_per_s``, ``drains`` (1 if the queue stops growing), ``within`` (share of the requests
    that keep the limits), ``goodput``
    (requests/s that keep them), ``largest_rate`` of one replica, ``gpus`` that the rate needs,
    ``cost`` of a million output tokens, and ratios of dense to pruned ``latency`` and of pruned to
    dense ``largest_rate``. With a tariff: ``joules_per_token`` of output, the share of the dense
    model's ``energy_saved``, ``watts`` of a device, and ``electricity`` (its price) and
    ``carbon_g`` of a million output tokens."""

    model: str
    hardware: str
    engine: str
    devices: int  # devices that share the model
    power_limit: float | None  # power limit of each device, W
    replicas: int  # replicas that share the requests
    rate: float  # requests/s; infinite at once
    requests: int
    seq: int
    new_tokens: int
    pruning: str
    prune: str
    family: str
    refused: str  # why the server cannot run the model, or ""
    preemptions: int
    numbers: Mapping[str, Interval]
    level: float

    @property
    def name(self) -> str:
        return self.pruning or "dense"

    @property
    def drains(self) -> bool:
        """Whether the queue stops growing."""
        return not self.refused and self.numbers["drains"].value == 1.0

    def to_dict(self) -> dict[str, Any]:
        out = {name: value for name, value in super().to_dict().items() if name != "numbers"}
        for name in NUMBERS:
            for end, value in zip(("", "_lower", "_upper"), self.numbers.get(name, [None] * 3)):
                out[f"{name}{end}"] = finite(value)
        return out

    def _title(self) -> str:
        return f"{self.model} {self.name} on {self.hardware}: {self.requests:,} requests"


@dataclass(frozen=True, repr=False)
class LoadService(Displayed):
    """The dense and the pruned models under a load, on one kind of device."""

    points: tuple[LoadPoint, ...]  # the dense model first
    runs: tuple[Runnable, ...]  # whether the stock engine runs each pruned model
    load: Load
    limits: Limits
    models: tuple[SimulatedModel, ...] = field(repr=False)

    @property
    def setting(self) -> tuple[str, str, int]:
        first = self.points[0]
        return first.hardware, first.engine, first.seq

    @property
    def title(self) -> str:
        """What the models serve."""
        first, load = self.points[0], self.load
        arrive = f"at {first.rate:.3g}/s" if math.isfinite(first.rate) else "at once"
        if load.concurrency is not None:
            arrive = f"from {load.concurrency} clients"
        lengths = f"{first.seq:,} + {first.new_tokens:,} tokens"
        of = Path(load.trace).name if load.trace is not None else lengths
        return (
            f"{first.model} on {kind_text(first)} in {first.engine}: {first.requests:,} requests"
            f" {arrive} ({of})"
        )

    def _title(self) -> str:
        return self.title


@dataclass(frozen=True)
class Simulation:
    """The models of one service: tables of their step times, and the requests."""

    load: Load
    limits: Limits
    request: Request
    requests: Requests
    server: Server
    tables: StepTables
    hw: HardwareProfile
    prunings: Sequence[Pruning]
    tariff: Tariff | None = None  # None: no energy

    @classmethod
    def of(
        cls,
        load: Load,
        limits: Limits,
        request: Request,
        hw: HardwareProfile,
        prunings: Sequence[Pruning] = (),
        requests: Requests | None = None,
        tariff: Tariff | None = None,
    ) -> Simulation:
        """Return the simulation of a load, or of ``requests`` as they arrive."""
        if request.parallel == "pipeline":
            raise InputError("parallel pipeline: expected tensor or expert for a load")
        models = [p.model for p in prunings if p.model is not None]
        request = computed_on(request, hw, models)
        server = Server.of(request.engine, hw, load.options)
        if requests is None:
            requests = load.arriving(request)
        if request.token_budget is not None:
            server = server.changed("tokens", request.token_budget)
        longest = int((requests.prompt + requests.output).max())
        grid = Grid.of(server, longest, len(requests))
        tables = StepTables.of(grid, request, hw, lambda some: batch_of(some, prunings, rejecting))
        return cls(load, limits, request, requests, server, tables, hw, prunings, tariff)

    def run(self, times: StepTimes, replicas: int) -> Served:
        return simulate_replicas(self.requests, times, self.server, replicas)

    def holds(self, times: StepTimes, rate: float) -> bool:
        """Return whether one replica keeps the limits at a rate."""
        served = simulate(self.requests.at_rate(rate), times, self.server)
        kept = served.within(self.limits.ttft_s, self.limits.tpot_s).mean()
        return bool(kept >= self.load.share) and served.drains

    def largest_rate(self, times: StepTimes, near: float = 0.0) -> float:
        """Return the largest rate at which one replica keeps the limits, 0 if it never does;
        ``near`` is a rate that is not far from it."""
        low, high = near / _NEAR, near * _NEAR
        if not near or not self.holds(times, low) or self.holds(times, high):
            most = 2.0 * simulate(self.requests.at_once, times, self.server).requests_per_s
            low, high = most / _RATES, most
            if not self.holds(times, low):
                return 0.0
        while high > low * _TOLERANCE:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if self.holds(times, middle) else (low, middle)
        return low


@dataclass(frozen=True)
class SimulatedModel:
    """One model of a simulation (0: dense)."""

    simulation: Simulation
    index: int

    @cached_property
    def errors(self) -> list[Errors]:
        """Typical errors, and their ends; the dense model has no errors of its own."""
        every = [TYPICAL, *ENDS]
        return every if self.index else [one._replace(own=0.0) for one in every]

    @cached_property
    def times(self) -> dict[Errors, StepTimes]:
        return {one: self.simulation.tables.at(self.index, one) for one in self.errors}

    def each(self, value: Callable[[StepTimes], T]) -> list[T]:
        """Return a value at typical errors and at their ends."""
        of = {errors: value(times) for errors, times in self.times.items()}
        return [of[errors] for errors in self.errors]

    @cached_property
    def largest_rates(self) -> list[float]:
        """The largest rate of one replica with each error."""
        typical = self.simulation.largest_rate(self.times[TYPICAL])
        return self.each(lambda times: self.simulation.largest_rate(times, typical))

    @cached_property
    def replicas(self) -> int:
        load, limits = self.simulation.load, self.simulation.limits
        if load.replicas is not None or not limits.named or load.rate is None:
            return load.replicas or 1
        typical = self.largest_rates[0]
        return math.ceil(load.rate / typical) if typical else 1

    @cached_property
    def typical(self) -> Served:
        """The run at typical errors."""
        return self.simulation.run(self.times[TYPICAL], self.replicas)

    @cached_property
    def numbers(self) -> dict[str, list[float]]:
        """Numbers of the service with each error."""
        limits, run = self.simulation.limits, self.simulation.run
        rows = self.each(lambda times: _numbers(run(times, self.replicas), limits))
        out = {name: [row[name] for row in rows] for name in rows[0]}
        if limits.named:
            out["largest_rate"] = self.largest_rates
        return out

    def at_rate(self, rate: float) -> dict[str, Interval]:
        """Return the numbers of one replica at another rate."""
        simulation = self.simulation
        requests = simulation.requests.at_rate(rate)
        rows = self.each(
            lambda times: _numbers(simulate(requests, times, simulation.server), simulation.limits)
        )
        return {name: Interval.of([row[name] for row in rows]) for name in rows[0]}

    @property
    def gpus(self) -> Interval:
        """GPUs that the rate needs, or that serve."""
        load, devices = self.simulation.load, self.simulation.request.devices
        if load.rate is None or load.replicas is not None or not self.simulation.limits.named:
            return Interval(*[float(devices * self.replicas)] * 3)
        value, lower, upper = Interval.of(self.largest_rates)
        most = value, upper, lower
        return Interval(*(devices * math.ceil(load.rate / m) if m else math.inf for m in most))

    @cached_property
    def energy(self) -> dict[str, list[float]]:
        """Watts of a device and energy per output token, with each error of times and then both
        ends of each part of the power."""
        run, tables = self.simulation.run, self.simulation.tables
        power, half = tables.power, NORMAL_90 * level_scale(tables.level)
        ends = np.exp(half * np.kron(np.diag(power.log_sd), [[-1.0], [1.0]]))
        rows = self.each(
            lambda times: self._use(run(times, self.replicas), times.errors, power.watts)
        )
        rows += [self._use(self.typical, TYPICAL, power.watts * end) for end in ends]
        return dict(zip(("watts", "joules_per_token"), map(list, zip(*rows))))

    def _use(self, run: Served, errors: Errors, watts: FloatArray) -> tuple[float, float]:
        """Return the watts of a device and the energy per output token of a run. Idle power is
        drawn from the first arrival to the last token."""
        tables, tariff = self.simulation.tables, self.simulation.tariff or NO_TARIFF
        work = tables.work(watts).at(self.index, errors)
        of_steps = sum(_joules(steps, work, tables.power.limit - watts[0]) for steps in run.steps)
        mean = float(watts[0] + of_steps / (self.replicas * run.duration))
        devices = self.simulation.request.devices * self.replicas
        joules = tariff.total(mean * devices * run.duration, run.duration, devices)
        return mean, joules / float(run.requests.output.sum())

    def cost(self, price: float) -> Interval:
        """Return the cost of a million output tokens."""
        load, tokens = self.simulation.load, self.typical.tokens_per_s
        if load.rate is not None and self.typical.drains:
            # the end of a run, in which few requests are left, is not typical of a service
            tokens = load.rate * float(self.simulation.requests.output.mean())
        return Interval(*(1e6 * price / 3600.0 * gpus / tokens for gpus in self.gpus))


def _joules(steps: Steps, work: StepTimes, most: float) -> float:
    """Return the energy of the work of a replica's steps on a device, J, at most W ``most``."""
    each = np.minimum(work.each(steps), most * np.array(steps.seconds))
    return float(np.dot(steps.count, each))


def _numbers(run: Served, limits: Limits) -> dict[str, float]:
    out = {"tokens_per_s": run.tokens_per_s, "requests_per_s": run.requests_per_s}
    out["drains"] = float(run.drains)
    for name, times in (("ttft", run.ttft), ("tpot", run.tpot), ("request", run.latency)):
        some = times[~np.isnan(times)]
        if len(some):  # a single token has no time per further token
            values = float(some.mean()), *np.quantile(some, QUANTILES).tolist()
            out |= {f"{name}_{part}": value for part, value in zip(PARTS, values)}
    if limits.named:
        out["within"] = float(run.within(limits.ttft_s, limits.tpot_s).mean())
        out["goodput"] = out["within"] * run.requests_per_s
    return out


def load_service(
    simulation: Simulation, names: Sequence[str], price: float | None = None
) -> LoadService:
    """Return the dense and the pruned models under a load; ``names`` are those of the prunings."""
    prunings = simulation.prunings
    models = [SimulatedModel(simulation, i) for i in range(1 + len(prunings))]
    reasons = [_refused(model) for model in models]
    if all(reasons):
        raise InputError(reasons[0])
    dense, points = None if reasons[0] else models[0], []
    for model, name, reason in zip(models, ["", *names], reasons):
        numbers = {} if reason else _intervals(model, dense if model.index else None, price)
        points.append(_point(model, name, reason, numbers))
    return LoadService(
        points=tuple(points),
        models=tuple(models),
        runs=tuple(runnable(simulation.request, pruning) for pruning in prunings),
        load=simulation.load,
        limits=simulation.limits,
    )


def _refused(model: SimulatedModel) -> str:
    """Return why a server cannot run a model, or ""."""
    try:
        _ = model.typical
    except InputError as error:
        return str(error)
    return ""


def _point(
    model: SimulatedModel, name: str, refused: str, numbers: Mapping[str, Interval]
) -> LoadPoint:
    simulation, request = model.simulation, model.simulation.request
    pruning = simulation.prunings[model.index - 1] if model.index else None
    return LoadPoint(
        model=request.model.name,
        hardware=simulation.hw.label,
        engine=simulation.server.engine,
        devices=request.devices,
        power_limit=request.power_limit,
        replicas=0 if refused else model.replicas,
        rate=simulation.load.rate or simulation.requests.rate,
        requests=len(simulation.requests),
        seq=request.seq,
        new_tokens=request.new_tokens,
        pruning=name,
        prune=pruning.prune if pruning else "",
        family=pruning.family if pruning else "",
        refused=refused,
        preemptions=0 if refused else model.typical.preemptions,
        numbers=numbers,
        level=request.level,
    )


def _intervals(
    model: SimulatedModel, dense: SimulatedModel | None, price: float | None
) -> dict[str, Interval]:
    """Return the numbers of a model with intervals, and its ratios to the dense model."""
    out = {name: Interval.of(values) for name, values in model.numbers.items()}
    out["gpus"] = model.gpus
    if price is not None:
        out["cost"] = model.cost(price)
    if (tariff := model.simulation.tariff) is not None:
        out |= {name: Interval.of(values) for name, values in model.energy.items()}
        most = model.simulation.tables.power.limit
        out["watts"] = Interval(*(min(watts, most) for watts in out["watts"]))
        costs = [tariff.per_million(joules) for joules in out["joules_per_token"]]
        for name, column in (("electricity", "cost"), ("carbon_g", "carbon_g")):
            if not math.isnan(costs[0][f"{column}_per_million_tokens"]):
                out[name] = Interval(*(cost[f"{column}_per_million_tokens"] for cost in costs))
        if dense is not None:
            kept = _ratio(model.energy["joules_per_token"], dense.energy["joules_per_token"])
            out["energy_saved"] = Interval(1.0 - kept.value, 1.0 - kept.upper, 1.0 - kept.lower)
    if dense is not None:
        ours, theirs = model.numbers, dense.numbers
        out["latency_ratio"] = _ratio(theirs["request_mean"], ours["request_mean"])
        if "largest_rate" in ours:
            out["rate_ratio"] = _ratio(ours["largest_rate"], theirs["largest_rate"])
    return out


def _ratio(over: Sequence[float], under: Sequence[float]) -> Interval:
    return Interval.of([a / b if b else math.nan for a, b in zip(over, under)])
