"""Answer the questions of a service: at equal concurrency, at equal memory, within limits, and at
what cost.

:func:`serve` does so for engines and devices. It predicts the
steady state of continuous batching (phase ``serve``) over a grid of concurrencies in one batch,
then over a second grid around the answer. A model fits up to the concurrency at which its weights
and caches fill the memory, or up to the sequences that the engine admits. W: workloads, models at
concurrencies.

Limits of the time to the first token and per output token hold together with at most the smaller of
the two probabilities, which is used: both times follow the same pass, so their errors move
together.

The cost of a request is the price of the devices for its share of their time. It counts wholly for
its output (``cost_output``), or equally for all its tokens (``cost_all``), or for prompt and new
tokens by the share of prefills and of decode steps in that time (``cost_prompt``, ``cost_new``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from simulator.arguments import OneOrMore, Range, listed, number
from simulator.arrays import FloatArray, IndexArray
from simulator.capacity import cache_parts, weights_bytes
from simulator.display import Displayed, by_column
from simulator.engines.engine import load_engine
from simulator.errors import InputError
from simulator.hardware.profile import HardwareProfile
from simulator.models.library import load_model
from simulator.models.model import Model
from simulator.prediction.batch import batch_of, rejecting
from simulator.prediction.compare import request_results
from simulator.prediction.energy import energy_columns
from simulator.prediction.limits import Limits
from simulator.prediction.load import (
    Interval,
    Load,
    LoadPoint,
    LoadService,
    Simulation,
    load_service,
)
from simulator.prediction.notes import (
    computed_wide,
    dense_notes,
    differences,
    overridden,
    uncalibrated,
)
from simulator.prediction.prunings import (
    Excluded,
    Pruning,
    asked,
    exclude,
    excluded_lines,
    in_formats,
)
from simulator.prediction.requests import by_key, device_text, on, once, profiles
from simulator.prediction.runnable import Runnable, runnable
from simulator.prediction.tariff import ENDS, Tariff, energy_of
from simulator.request import MAX_TOKENS, SETTINGS, Request
from simulator.serving.steady import memory_columns, serving
from simulator.uncertainty.forward import PredictedPass, forward_passes
from simulator.uncertainty.intervals import PredictionIntervals, prediction_intervals
from simulator.units import ratio
from simulator.workload import WorkloadBatch

EQUAL, MEMORY, LIMITS, CURVE = "equal concurrency", "equal memory", "within limits", "curve"
"""Kinds of operating points: three comparisons of models, and the concurrencies of a curve."""

REFINED = 16  # concurrencies of the second grid, for each model
# rounds in which the largest concurrencies are found; they hardly change after the second
ROUNDS = 4
_PRUNINGS = ("family", "method", "pruned", "prune")
PRICE = Range(1e-9, 1e9, "a positive price per GPU-hour, such as 2.5")


def probability_of(
    target: float, speedup: float, lower: float, upper: float, level: float = 0.9
) -> float:
    """Return the probability that a speedup is at least a target. On either side of the prediction
    its log is normal, with the standard deviation that follows from that end of the interval."""
    left, quantile = math.log(speedup / target), NormalDist().inv_cdf(0.5 + 0.5 * level)
    deviation = math.log(speedup / lower if left > 0.0 else upper / speedup) / quantile
    return NormalDist().cdf(left / deviation) if deviation > 0.0 else float(left >= 0.0)


def probability_within(limit: float, s: float, lower: float, upper: float, level: float) -> float:
    """Return the probability that a time is at most a limit, as :func:`probability_of`."""
    return probability_of(1.0 / limit, 1.0 / s, 1.0 / upper, 1.0 / lower, level)


@dataclass(frozen=True, repr=False, kw_only=True)
class OperatingPoint(Displayed):
    """One model in a service at one number of requests in flight. Its fields are the keys of
    ``--json`` and the columns of ``--csv``; numbers that do not exist are NaN: where no request
    fits, or limits do not hold even for one."""

    point: str  # EQUAL, MEMORY, LIMITS or CURVE
    model: str
    hardware: str
    engine: str
    devices: int  # devices that share the model
    power_limit: float | None  # power limit of each device, W
    seq: int  # tokens of a prompt
    cached_prefix: int  # tokens of a prompt in the prefix cache
    new_tokens: int  # tokens that each request decodes
    pruning: str  # in words; "" for the dense model
    prune: str  # text of --prune
    family: str  # families joined by "+"
    concurrency: int  # requests in flight; 0 if none fits or keeps the limits
    fits: bool  # whether the memory and the engine hold so many
    request_s: float
    request_lower: float
    request_upper: float
    ttft_s: float
    ttft_lower: float
    ttft_upper: float
    tpot_s: float
    tpot_lower: float
    tpot_upper: float
    tokens_per_s: float  # new tokens/s per device
    tokens_per_s_lower: float
    tokens_per_s_upper: float
    # tokens/s over those of the dense model at its operating point of this kind
    ratio: float = math.nan
    ratio_lower: float = math.nan
    ratio_upper: float = math.nan
    probability: float  # probability that the limits hold; NaN without limits
    unmet: str  # the limit that fails for a single request: "ttft" or "tpot"
    excess: float  # predicted time over this limit
    cost_output: float = math.nan  # cost of a million tokens in the currency of the price
    cost_all: float = math.nan
    cost_prompt: float = math.nan
    cost_new: float = math.nan
    # with a tariff, per output token on all devices; watts of one
    joules_per_token: float = math.nan
    joules_per_token_lower: float = math.nan
    joules_per_token_upper: float = math.nan
    # share of the dense model's energy per token at its operating point of this kind
    energy_saved: float = math.nan
    energy_saved_lower: float = math.nan
    energy_saved_upper: float = math.nan
    watts: float = math.nan
    electricity: float = math.nan  # price of the energy of a million tokens
    carbon_g: float = math.nan  # carbon of a million tokens
    largest_concurrency: int  # most requests in flight of this model
    limited_by: str  # "memory" or "engine", which sets the largest concurrency
    weights_bytes: float  # weights on the fullest device
    cache_bytes: float  # cache of one request
    level: float  # level of the intervals

    @property
    def name(self) -> str:
        return self.pruning or "dense"

    @property
    def numbers(self) -> dict[str, Interval]:
        """Numbers of energy with intervals, if they are known."""
        found = {
            name: Interval(*(getattr(self, f"{name}{end}", getattr(self, name)) for end in ENDS))
            for name in ("joules_per_token", "energy_saved", "watts", "electricity", "carbon_g")
        }
        return {name: one for name, one in found.items() if not math.isnan(one.value)}

    @property
    def setting(self) -> str:
        cached = f", {self.cached_prefix} of them cached," if self.cached_prefix else ""
        return (
            f"{device_text(self)} in {self.engine} (seq {self.seq}{cached} + {self.new_tokens} new)"
        )

    def _title(self) -> str:
        rate = f"{self.tokens_per_s:,.4g} tokens/s per GPU" if self.concurrency else "nothing"
        times = "" if math.isnan(self.ratio) else f", {ratio(self.ratio)}x of dense"
        return (
            f"{self.model} {self.name} on {self.setting}, {self.point}: {rate} at"
            f" {self.concurrency}{times}"
        )


@dataclass(frozen=True, repr=False)
class Service(Displayed):
    points: tuple[OperatingPoint, ...]  # by kind, each kind by model, the dense one first
    curve: tuple[OperatingPoint, ...]  # each model at concurrencies from 1 to the largest that fits
    limits: Limits
    runs: tuple[Runnable, ...]  # whether the stock engine runs each pruned model

    @property
    def kinds(self) -> dict[str, list[OperatingPoint]]:
        """Points by kind, the dense model first."""
        return by_key(self.points, lambda point: point.point)

    @property
    def equal(self) -> list[list[OperatingPoint]]:
        """Points of each equal concurrency, the dense model first."""
        return list(by_key(self.kinds[EQUAL], lambda point: point.concurrency).values())

    def _title(self) -> str:
        first = self.points[0]
        return f"{first.model} on {first.setting}: {len(self.points)} operating points"


# fields of operating points: columns of a pruned model's energy
_ENERGY = {
    **{f"joules_per_token{end}": f"joules_per_token{end}" for end in ENDS},
    "watts": "watts",
    "electricity": "cost_per_million_tokens",
    "carbon_g": "carbon_g_per_million_tokens",
}


@dataclass(frozen=True)
class ServePasses:
    """A batch of serve workloads (W,) with the numbers of a service."""

    batch: WorkloadBatch
    p: PredictedPass
    level: float
    limits: Limits

    def ratios(self, other: IndexArray) -> PredictionIntervals:
        """Return the times of requests, s, and their ratios to those of other workloads, with
        intervals."""
        return prediction_intervals(self.p, self.level, other)

    def place(self, model: int, concurrency: int) -> int:
        """Return the index of a model (0: dense) at a concurrency; 0 is the smallest of the
        batch."""
        wanted = concurrency or self.batch.sequences.min()
        return int(
            np.flatnonzero((self.batch.pruning == model - 1) & (self.batch.sequences == wanted))[0]
        )

    @cached_property
    def intervals(self) -> PredictionIntervals:
        """Times of requests, s, with intervals."""
        return self.ratios(np.arange(len(self.batch)))

    @cached_property
    def columns(self) -> Mapping[str, FloatArray]:
        """Fields of operating points (W,) with intervals."""
        times, meta = self.intervals, self.batch.rows.meta
        served = serving(self.p, times, self.level)
        tokens = self.batch.sequences * (meta.new_tokens / meta.devices)
        return {
            **{name: served[name] for name in served if name.startswith(("ttft", "tpot"))},
            "request_s": times.seconds,
            "request_lower": times.lower,
            "request_upper": times.upper,
            "tokens_per_s": tokens / times.seconds,
            "tokens_per_s_lower": tokens / times.upper,
            "tokens_per_s_upper": tokens / times.lower,
        }

    @cached_property
    def chances(self) -> Mapping[str, FloatArray]:
        """Probability (W,) with which each limit holds."""
        out = {}
        for name, limit in self.limits.named.items():
            ends = (self.columns[f"{name}_{end}"].tolist() for end in ("s", "lower", "upper"))
            chances = [
                probability_within(limit, time, lower, upper, self.level)
                for time, lower, upper in zip(*ends)
            ]
            out[name] = np.array(chances)
        return out

    def kept(self, i: int, concurrency: int, fails: bool) -> dict[str, Any]:
        """Return the fields of an operating point of one workload about limits; ``fails``: no
        concurrency keeps them if it is 0."""
        chances = {name: float(chance[i]) for name, chance in self.chances.items()}
        excess = {
            name: float(self.columns[f"{name}_s"][i]) / limit
            for name, limit in self.limits.named.items()
        }
        unmet = ""
        if fails and not concurrency:
            unmet = min(chances, key=lambda name: (chances[name], -excess[name]))
        known = chances and (concurrency or unmet)
        return {
            "probability": min(chances.values()) if known else math.nan,
            "unmet": unmet,
            "excess": excess.get(unmet, math.nan),
        }

    def energy(
        self, tariff: Tariff | None, other: IndexArray | None = None
    ) -> dict[str, FloatArray]:
        """Return the fields of operating points (W,) about energy, against workloads ``other``."""
        if tariff is None:
            return {}
        batch, meta = self.batch, self.batch.rows.meta
        dense = np.arange(len(batch)) if other is None else other
        times = self.ratios(dense)
        columns = {
            **times.columns(dense),
            **energy_columns(self.p, times, self.level, dense),
            **{name: getattr(meta, name) for name in ("devices", "phase", "seq", "new_tokens")},
            "batch": batch.sequences,
        }
        found = energy_of(columns, tariff)
        out = {name: found[f"pruned_{column}"] for name, column in _ENERGY.items()}
        if other is not None:
            share = batch.sequences[other] / batch.sequences
            for end in ENDS:
                out[f"energy_saved{end}"] = 1.0 - (1.0 - found[f"energy_saved{end}"]) * share
        return out

    @cached_property
    def bytes_held(self) -> tuple[FloatArray, FloatArray]:
        """Bytes of the weights, and of the cache of one request, on the fullest device."""
        return weights_bytes(self.batch), cache_parts(self.batch)[0]

    def last_within(self, model: int, among: Iterable[int]) -> int:
        """Return the largest of some concurrencies at which the limits hold for a model, or 0."""
        holds = np.min(list(self.chances.values()), axis=0) >= self.limits.probability
        return max((c for c in among if holds[self.place(model, c)]), default=0)

    def all_within(self, finer: Sequence[Sequence[int]], last: Sequence[int]) -> list[int]:
        """Return :meth:`last_within` of all models; 0 for those without one in the first grid."""
        return [self.last_within(m, finer[m]) if kept else 0 for m, kept in enumerate(last)]


def _grids(largest: Sequence[int], equal: Sequence[int]) -> list[list[int]]:
    """Return the first grid of concurrencies of each model, up to its largest."""
    steady = {*steps(max(largest)), *equal}
    return [sorted({c for c in steady if c < most} | {most}) for most in largest]


def _finer(last: int, grid: Sequence[int]) -> list[int]:
    """Return the second grid: from the last concurrency of a grid that keeps the limits to the next
    one."""
    end = next((c for c in grid if c > last), last)
    return sorted({round(c) for c in np.linspace(last, end, REFINED + 2).tolist()})


def steps(last: int) -> list[int]:
    """Return concurrencies up to a last one: powers of two, and one step between two powers."""
    powers = [2**i for i in range(max(last, 1).bit_length())]
    return sorted({c for power in powers for c in (power, power + power // 2) if c < last} | {last})


@dataclass(frozen=True)
class _Models:
    """The dense and the pruned models of a service on one kind of device."""

    request: Request  # as the device computes it; its batch is ignored
    hw: HardwareProfile
    prunings: Sequence[Pruning]  # prunings that run on the device
    names: Sequence[str]  # names of the prunings
    limits: Limits
    price: float | None
    tariff: Tariff | None

    def points(
        self, concurrency: Sequence[int]
    ) -> tuple[tuple[OperatingPoint, ...], tuple[OperatingPoint, ...]]:
        """Return the operating points by kind, each kind by model, and the curves. Points at equal
        concurrency are at each ``concurrency``, by default the largest that fits the dense model;
        if none does, the smallest of the largest that fit the pruned models. InputError if no
        model fits."""
        largest, models = self.largest, range(1 + len(self.prunings))
        equal = [*(concurrency or [largest[0] or min(filter(None, largest))])]
        grids = _grids(largest, equal)
        curve = passes = self.passes({*itertools.chain(*grids), *equal})
        kinds = [*((EQUAL, [c] * len(models)) for c in equal), (MEMORY, largest)]
        if self.limits.named:
            last = [curve.last_within(m, filter(None, grids[m])) for m in models]
            finer = list(map(_finer, last, grids))
            passes = self.passes({*itertools.chain(*finer), *equal, *largest, 1})
            kinds.append((LIMITS, passes.all_within(finer, last)))
        compared = (point for kind in kinds for point in self.of_kind(passes, *kind))
        return tuple(compared), self.curves(curve, grids)

    def batch(self, concurrencies: Iterable[int]) -> WorkloadBatch:
        requests = [replace(self.request, batch=c) for c in sorted({*concurrencies} - {0})]
        return batch_of(requests, self.prunings, rejecting)

    def passes(self, concurrencies: Iterable[int]) -> ServePasses:
        batch, level = self.batch(concurrencies), self.request.level
        return ServePasses(batch, forward_passes(batch, self.hw, level), level, self.limits)

    @cached_property
    def largest(self) -> list[int]:
        """The largest concurrency of each model, the dense one first: that at which its memory is
        full, or the engine's limit. InputError if no model fits. The prompts that a step computes
        together, and their memory, depend on the concurrency: the result is the largest that
        follows from a request at the largest."""
        largest = [1] * (1 + len(self.prunings))
        for _ in range(ROUNDS):
            batch = self.batch(largest)
            every = np.arange(len(batch))
            columns = memory_columns(batch, every, [self.hw], np.zeros_like(every))
            most = np.minimum(columns["pruned_largest_batch"], MAX_TOKENS // self.request.seq)
            rows = zip((batch.pruning + 1).tolist(), batch.sequences.tolist(), most.tolist())
            new = {m: n for m, c, n in rows if c == largest[m]}
            if not any(new.values()):
                need = columns["pruned_memory_bytes"].min() / 2**30
                room = columns["capacity_bytes"][0] / 2**30
                raise InputError(
                    f"{self.hw.label}: no model fits: with one request, the smallest needs"
                    f" {need:.1f} GiB, {room:.1f} GiB available; expected more devices (--tp)"
                )
            before, largest = largest, [new.get(m, 0) for m in range(len(largest))]
            if largest == before:
                break
        return largest

    def of_kind(self, passes: ServePasses, kind: str, each: Sequence[int]) -> list[OperatingPoint]:
        """Return the points of a kind, of all models, each at its concurrency."""
        ratios: dict[str, FloatArray] = {}
        other: IndexArray | None = None
        if each[0]:
            other = np.full(len(passes.batch), passes.place(0, each[0]))
            times, many = passes.ratios(other), passes.batch.sequences / each[0]
            for end in ENDS:
                ratios[f"ratio{end}"] = getattr(times, f"ratio{end}") * many
        columns = {**self.columns(passes, other), **ratios}
        return [self.one(passes, kind, m, c, columns) for m, c in enumerate(each)]

    def curves(
        self, passes: ServePasses, grids: Sequence[Sequence[int]]
    ) -> tuple[OperatingPoint, ...]:
        """Return the points of all models, each at the concurrencies of its grid."""
        columns = self.columns(passes, None)
        each = ((model, c) for model, grid in enumerate(grids) for c in grid if c)
        return tuple(self.one(passes, CURVE, model, c, columns) for model, c in each)

    def columns(self, passes: ServePasses, other: IndexArray | None) -> dict[str, FloatArray]:
        """Return the fields of operating points (W,) that are NaN where no request fits."""
        return {**passes.columns, **self.costs(passes), **passes.energy(self.tariff, other)}

    def one(
        self,
        passes: ServePasses,
        kind: str,
        model: int,
        concurrency: int,
        columns: Mapping[str, FloatArray],
    ) -> OperatingPoint:
        """Return the point of a model (0: dense) at a concurrency."""
        meta, i = passes.batch.rows.meta, passes.place(model, concurrency)
        numbers: Any = {n: float(c[i]) if concurrency else math.nan for n, c in columns.items()}
        engine, most = load_engine(meta.engine), self.largest[model]
        limit = engine.limit(self.hw.memory_bytes, self.hw.name)
        engine_limits = (limit.sequences, meta.asked.token_budget) if limit else ()
        pruning = self.prunings[model - 1] if model else None
        return OperatingPoint(
            point=kind,
            model=meta.model,
            hardware=self.hw.label,
            engine=engine.name,
            devices=meta.devices,
            power_limit=meta.asked.power_limit,
            seq=meta.seq,
            cached_prefix=int(meta.cached_prefix),
            new_tokens=meta.new_tokens,
            pruning=self.names[model - 1] if model else "",
            prune=pruning.prune if pruning else "",
            family=pruning.family if pruning else "",
            concurrency=concurrency,
            fits=0 < concurrency <= most,
            **numbers,
            **passes.kept(i, concurrency, fails=bool(kind == LIMITS and most)),
            largest_concurrency=most,
            limited_by="engine" if most in engine_limits else "memory",
            weights_bytes=float(passes.bytes_held[0][i]),
            cache_bytes=float(passes.bytes_held[1][i]),
            level=passes.level,
        )

    def costs(self, passes: ServePasses) -> dict[str, FloatArray]:
        """Return the costs of a million tokens (W,)."""
        if self.price is None:
            return {}
        meta, p = passes.batch.rows.meta, passes.p
        server = p.host.server[:, 0]
        prefill = (p.phase_s[:, 0] - server) / (p.total_s - server)
        million = 1e6 * self.price / 3600.0 / passes.columns["tokens_per_s"]
        return {
            "cost_output": million,
            "cost_all": million * meta.new_tokens / (meta.seq + meta.new_tokens),
            "cost_prompt": million * prefill * (meta.new_tokens / meta.seq),
            "cost_new": million * (1.0 - prefill),
        }


@dataclass(frozen=True, repr=False)
class Served(Displayed):
    """Services by engine and device, and notes on exclusions and limits of the predictions."""

    services: tuple[Service, ...]
    notes: tuple[str, ...] = ()
    loads: tuple[LoadService, ...] = ()  # instead of services, if requests arrive

    @property
    def points(self) -> tuple[OperatingPoint | LoadPoint, ...]:
        steady = (point for service in self.services for point in service.points)
        return (*steady, *(point for load in self.loads for point in load.points))

    def to_dict(self) -> dict[str, Any]:
        return {"points": [point.to_dict() for point in self.points], "notes": list(self.notes)}

    def _title(self) -> str:
        first = self.points[0]
        services = len(self.services) or len(self.loads)
        return f"{first.model} in {services} services: {len(self.points)} operating points"

    def _columns(self) -> Mapping[str, Any]:
        return by_column([point.to_dict() for point in self.points])


def serve(
    model: str | Model,
    hardware: OneOrMore[str | HardwareProfile],
    *,
    concurrency: OneOrMore[int] | None = None,
    ttft_s: float | None = None,
    tpot_s: float | None = None,
    probability: float = 0.5,
    price: float | None = None,
    tariff: Tariff | None = None,
    rate: float | None = None,
    requests: int | None = None,
    trace: str | Path | None = None,
    length_sd: float = 0.0,
    goodput: float = 0.99,
    replicas: int | None = None,
    seed: int = 0,
    server: str | Sequence[str] = (),
    **settings: Any,
) -> Served:
    """Compare models in a server: in a steady state, or for requests that arrive.

    In the steady state they are compared at equal concurrency, at equal memory, and within limits.
    With ``rate``, ``requests`` or ``trace``, the engine's schedule is simulated.

    Parameters
    ----------
    model : str or Model
        Name, path or shapes of the dense model.
    hardware : one or more
        Devices: names, paths or profiles.
    concurrency : one or more, optional
        Requests in flight of the comparison at equal concurrency. Default: the largest number that
        fits the dense model.
    ttft_s, tpot_s : float, optional
        Limits of the time to the first token and of the time per further token, s.
    probability : float
        Probability with which the limits must hold, in (0, 1).
    price : float, optional
        Price of a GPU-hour, in any currency.
    tariff : Tariff, optional
        What energy costs; with it, energy is predicted.
    rate : float, optional
        Requests per second that arrive (Poisson); prompts have ``seq`` tokens, outputs
        ``new_tokens``.
    requests : int, optional
        Number of requests: 1,000 at a rate. Without a rate they arrive at once, or ``concurrency``
        clients send the next one when the last one ends.
    trace : str or Path, optional
        CSV file with the columns ``arrival`` (s), ``prompt`` and ``output`` (tokens).
    length_sd : float
        Deviation of the logs of log-normal lengths; 0: fixed lengths.
    goodput : float
        Share of the requests that must keep the limits.
    replicas : int, optional
        Replicas that a balanced router fills. Default: as many as the limits need at the rate.
    seed : int
        Seed of the arrivals and lengths.
    server : str or list of str
        Options of the engine's server, such as ``--max-num-seqs 64``.
    **settings
        Prunings as in :func:`simulator.table` (``family``, ``sparsity``, ``method``, ``pruned``,
        ``prune``, ``options``; default under a load: none), and fields of
        :class:`simulator.Request`, such as ``seq`` (tokens of each prompt), ``new_tokens`` and
        ``engine`` (one or more), except ``phase``, ``batch`` and ``dense_s``.

    Returns
    -------
    Served
        One :class:`Service` per engine and device, each with its operating points.

    Raises
    ------
    InputError
        For an unknown name or a value out of range, if no model fits any device, and if no pruning
        can be predicted.

    Examples
    --------
    >>> import simulator
    >>> found = simulator.serve("llama-3.1-8b", "h100", prune="depth 0.25", tpot_s=0.02)
    >>> for point in found.services[0].points:
    ...     print(f"{point.point}: {point.name} at {point.concurrency}")
    equal concurrency: dense at 214
    equal concurrency: depth at 25 % at 214
    equal memory: dense at 214
    equal memory: depth at 25 % at 303
    within limits: dense at 30
    within limits: depth at 25 % at 44
    """
    stated = () if concurrency is None else listed("concurrency", concurrency)
    equal = once(SETTINGS["batch"].check(c, "concurrency") for c in stated)
    if price is not None:
        number("price", price, PRICE)
    if settings.get("dense_s") is not None:
        raise InputError("dense time: expected none, as a service has many concurrencies")
    load = Load(
        rate=rate,
        requests=requests,
        trace=trace,
        concurrency=max(equal, default=None) if requests is not None else None,
        length_sd=length_sd,
        share=goodput,
        replicas=replicas,
        seed=seed,
        options=server,
    )
    load.check(len(equal))
    limits, dense = Limits(ttft_s, tpot_s, probability), load_model(model)
    devices = profiles(hardware)
    settings |= {"phase": "serve", "batch": max(equal, default=1)}
    chosen, every, skipped = asked([dense], settings)
    if load.given and not any(settings.get(name) for name in _PRUNINGS):
        chosen = ()
    # of several number formats, the first is that of the dense model
    prunings, kept = in_formats(chosen, every)
    notes = dict.fromkeys((*skipped, *differences([dense], prunings)))
    servers = _Servers(prunings, equal, limits, price, tariff, notes, load)
    for request, hw in itertools.product(kept, devices):
        servers.add(request, hw)
    return servers.served()


@dataclass(frozen=True)
class _Servers:
    """What :func:`serve` predicts for each engine and device."""

    prunings: Sequence[Pruning]
    equal: Sequence[int]
    limits: Limits
    price: float | None
    tariff: Tariff | None
    notes: dict[str, None]
    load: Load
    services: list[Service] = field(default_factory=list)
    loads: list[LoadService] = field(default_factory=list)
    excluded: Excluded = field(default_factory=Excluded)  # prunings
    without: dict[str, InputError] = field(default_factory=dict)  # engines and devices

    def reject(self, pruning: int | None, reason: str, device: str) -> None:
        if pruning is None or len(self.prunings) == 1:
            raise InputError(reason)
        exclude(self.excluded, self.prunings[pruning], reason, device)

    def add(self, request: Request, hw: HardwareProfile) -> None:
        """Add the service of the prunings that the device can run, or the reason why it cannot."""
        try:
            results = request_results([request], self.prunings, [hw], self.reject)
            if not len(results) and self.prunings:
                return
            notes = [*uncalibrated(results)]
            prunings = [self.prunings[i].computed(request, hw) for i in results.pruning.tolist()]
            names = [r.pruning for r in results]
            if self.load.given:
                simulation = Simulation.of(
                    self.load, self.limits, request, hw, prunings, tariff=self.tariff
                )
                self.loads.append(load_service(simulation, names, self.price))
            else:
                priced = self.limits, self.price, self.tariff
                models = _Models(on([request], hw)[0], hw, prunings, names, *priced)
                runs = tuple(runnable(request, pruning) for pruning in prunings)
                service = Service(*models.points(self.equal), self.limits, runs)
                self.services.append(service)
                notes = [*dense_notes(results, request, [hw]), *_too_many(service), *notes]
        except InputError as error:
            some = f" on {request.devices} devices" if request.devices > 1 else ""
            place = f"{hw.label} in {load_engine(request.engine).name}{some}"
            self.without[f"{place} is excluded: {error}"] = error
            return
        every = (request.model, *(pruning.model for pruning in self.prunings))
        asked_for = [request, *(pruning.request(request) for pruning in self.prunings)]
        wide = [note for one in asked_for for note in computed_wide(one, [hw], every)]
        notes = [*overridden(request, every), *wide, *notes]
        self.notes.update(dict.fromkeys(notes))

    def served(self) -> Served:
        excluded = excluded_lines(self.excluded)
        if not self.services and not self.loads:
            for error in self.without.values():
                raise error
            raise InputError(next(iter(excluded), "nothing to predict"))
        notes = (*self.notes, *self.without, *excluded)
        return Served(tuple(self.services), notes, tuple(self.loads))


def _too_many(service: Service) -> list[str]:
    """Return a note on each model that does not fit at equal concurrency; the dense model's memory
    has one already."""
    return [
        f"{p.name} at concurrency {p.concurrency} on {p.hardware}: {p.largest_concurrency} fit;"
        " hypothetical times"
        for p in service.kinds[EQUAL]
        if not p.fits and (p.pruning or p.limited_by == "engine")
    ]
