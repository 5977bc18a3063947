"""Find the least sparsity of each family, and of depth with width, that reaches a target:
:func:`advise`.

Per device, a coarse grid of sparsities is tried first, then a fine grid between the last sparsity
that misses the target and the first that reaches it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import NormalDist
from typing import Any

import numpy as np

from simulator.arrays import Array
from simulator.display import Displayed, as_plain, by_column, few
from simulator.engines.engine import load_engine
from simulator.errors import InputError
from simulator.hardware.profile import HardwareProfile
from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.models.model import Model
from simulator.prediction.batch import batch_of
from simulator.prediction.budget import KernelBudget, kernel_budget
from simulator.prediction.compare import compare, results_of
from simulator.prediction.limits import check_probability
from simulator.prediction.prunings import Pruning, dividing, families
from simulator.prediction.requests import (
    batch_name,
    by_budget,
    check_measured,
    dense_seconds,
    profiles,
    requests_of,
)
from simulator.prediction.result import HasResult, Result, Results
from simulator.prediction.runnable import runnable
from simulator.prediction.service import probability_of
from simulator.request import Request
from simulator.units import ratio, seconds
from simulator.workload import WorkloadBatch

# largest sparsity of a family: no published method keeps a model useful beyond it
LARGEST_SPARSITY = 0.9
COARSE, FINE = 0.02, 0.001  # steps of the coarse and the fine grid of sparsities
BOTH = "depth+width"  # depth and width at the same sparsity each
Point = tuple[str, float]  # a family or BOTH, and a sparsity


@dataclass(frozen=True)
class Target:
    """A target: a speedup, or a time or throughput of a pass (of a request in serve)."""

    speedup: float | None = None
    latency_s: float | None = None
    tokens_per_s: float | None = None  # new tokens of all sequences; in prefill, prompt tokens

    def __post_init__(self) -> None:
        stated = [value for value in vars(self).values() if value is not None]
        if len(stated) != 1:
            raise InputError("target: expected one of speedup, latency and tokens/s")
        if self.speedup is not None and not 1.0 < self.speedup <= 1000.0:
            raise InputError(f"target {self.speedup:g}: expected a speedup above 1, such as 1.5")
        if not 1e-9 < stated[0] < 1e12:
            raise InputError(f"target {stated[0]:g}: expected a number between 1e-9 and 1e12")

    @property
    def text(self) -> str:
        if self.speedup is not None:
            return f"{ratio(self.speedup)}x"
        return (
            seconds(self.latency_s)
            if self.latency_s is not None
            else f"{self.tokens_per_s:,.4g} tokens/s"
        )

    def over(self, dense_s: float, request: Request) -> float:
        """Return the required speedup over a dense time; at most 1 if the dense model reaches the
        target."""
        if self.speedup is not None:
            return self.speedup
        if self.latency_s is not None:
            return dense_s / self.latency_s
        return dense_s / dense_seconds(self.tokens_per_s, request)


@dataclass(frozen=True, repr=False)
class Advice(HasResult):
    """A family on one device and request: at the least sparsity that reaches the target, else at
    the fastest."""

    result: Result
    target: float  # required speedup
    probability: float  # probability of reaching the target, from the speedup's interval
    reached: bool  # with at least the required probability, by some sparsity up to LARGEST_SPARSITY
    runs: bool | None  # whether the stock engine runs it; None if its file does not state it
    asked: tuple[Request, Pruning, HardwareProfile] = field(repr=False)

    @cached_property
    def budget(self) -> KernelBudget | None:
        """The kernel budget for the target, without the settings that reach it."""
        return kernel_budget(*self.asked, (self.target,))

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "budget": as_plain(self.budget)}

    def _title(self) -> str:
        r, verb = self.result, "reaches" if self.reached else "misses"
        return (
            f"{r.model} on {r.request}: {r.pruning} {verb} {ratio(self.target)}x with"
            f" {ratio(r.speedup)}x"
        )


@dataclass(frozen=True, repr=False)
class Advised(Displayed):
    """Advice per family, best first for each device and request; notes; settings where the dense
    model reaches it."""

    advice: tuple[Advice, ...]
    notes: tuple[str, ...]
    dense: tuple[str, ...] = ()

    def rows(self) -> list[dict[str, Any]]:
        return [one.to_dict() for one in self.advice]

    def _title(self) -> str:
        reached = few((a.result.family for a in self.advice if a.reached), 8) or "no family"
        return f"reached by {reached} of {len({a.result.family for a in self.advice})} families"

    def _columns(self) -> Mapping[str, Any]:
        return by_column(self.rows())


def advise(
    model: str | Model,
    hardware: Sequence[str | HardwareProfile],
    target: float | Target,
    family: Sequence[str] | None = None,
    *,
    probability: float = 0.5,
    **settings: Any,
) -> Advised:
    """Find the least sparsity of families (None: all) that reaches a target: a :class:`Target`, or
    a speedup above 1. The settings are fields of :class:`simulator.Request`, each one value or a
    list. ``probability`` is the least probability of reaching the target, from the speedup's
    interval; 0.5: the prediction reaches it."""
    check_probability(probability)
    aim, config = target if isinstance(target, Target) else Target(target), load_model(model)
    names = [*families(("all",) if family is None else family, [config])]
    devices = profiles(hardware)
    if {"depth", "width"} <= set(names):
        names.append(BOTH)
    requests = requests_of([config], settings)
    check_measured(requests, devices)
    advice, reached = list[Advice](), list[str]()
    notes = dict[str, None]()
    for (request,), same in (part for one in requests for part in by_budget([one], devices)):
        search = _Search(request, names, probability, notes)
        for hw in same:
            needed = aim.over(search.dense_s(hw), request)
            if needed > 1.0:
                advice += search.on(hw, needed)
            else:
                reached.append(_setting(hw, request))
    if not advice and not reached:
        raise InputError("; ".join(notes) or "nothing to advise")
    return Advised(tuple(advice), tuple(notes), tuple(reached))


def _setting(hw: HardwareProfile, one: Request) -> str:
    request = f"{one.phase}, {batch_name(one.phase)} {one.batch}, seq {one.seq}"
    return f"{hw.label} in {load_engine(one.engine).name} ({request})"


@dataclass(frozen=True)
class _Search:
    """The search for one request; reasons why families cannot be predicted go to ``notes``."""

    request: Request
    names: Sequence[str]
    probability: float
    notes: dict[str, None]

    def dense_s(self, hw: HardwareProfile) -> float:
        one = self.request
        dense = WorkloadBatch.of([lower(one)])
        return float(compare(dense, hw, one.level, one.dense_s)[0]["dense_s"][0])

    @cached_property
    def coarse(self) -> tuple[list[Point], WorkloadBatch]:
        """The coarse grid of all families, pruned once for all devices."""
        grid = [round(COARSE * i, 6) for i in range(1, round(LARGEST_SPARSITY / COARSE) + 1)]
        points, reasons = list(itertools.product(self.names, grid)), dict[str, list[str]]()

        def reject(pruning: int | None, reason: str, _device: str) -> None:
            if pruning is not None:
                reasons.setdefault(points[pruning][0], []).append(reason)

        batch = batch_of([self.request], [self.pruning(*point) for point in points], reject)
        supported = {points[i][0] for i in batch.pruning if i >= 0}
        for name, texts in reasons.items():
            # report a sparsity without pattern only if the engine lacks no kernels
            if name not in supported:
                error = min(texts, key=lambda text: "at sparsity" in text)
                self.notes[error if name in error else f"{name}: {error}"] = None
        return points, batch

    def pruning(self, name: str, sparsity: float) -> Pruning:
        """Return the pruning of a family at a sparsity, of sizes that the devices can divide."""
        one = Pruning.of(name, sparsity)
        if name == BOTH:
            one = Pruning.read(f"depth {sparsity:g} + width {sparsity:g}")
        request = self.request
        return dividing(one, load_model(request.model), request.devices, request.parallel)

    def on(self, hw: HardwareProfile, target: float) -> list[Advice]:
        """Return the advice for every family on a device: by realised sparsity, then those that
        miss the target by speedup."""
        coarse = _Timed(self, hw, *self.coarse)
        finer = self.finer(hw, coarse, target)
        advice = [
            self.advice(hw, name, coarse, finer, target)
            for name in dict.fromkeys(name for name, _ in coarse.points)
        ]
        return sorted(
            advice,
            key=lambda a: (
                not a.reached,
                a.result.realised_sparsity if a.reached else -a.result.speedup,
            ),
        )

    def finer(self, hw: HardwareProfile, coarse: _Timed, target: float) -> _Timed:
        """Return the fine grid of each family below the first sparsity that reaches the target."""
        points: list[Point] = []
        for name, row in coarse.first(target).items():
            end = coarse.points[row][1]
            start = coarse.points[row - 1][1] if row and coarse.points[row - 1][0] == name else 0.0
            steps = range(1, round((end - start) / FINE))
            points += [(name, round(start + FINE * i, 6)) for i in steps]
        batch = batch_of([self.request], [self.pruning(*point) for point in points], _reject)
        return _Timed(self, hw, points, batch)

    def advice(
        self, hw: HardwareProfile, name: str, coarse: _Timed, finer: _Timed, target: float
    ) -> Advice:
        reached, fine = name in coarse.first(target), finer.first(target)
        timed = finer if name in fine else coarse
        row = timed.first(target)[name] if reached else coarse.fastest(name)
        r = timed.results.take([row])[0]
        probability = probability_of(target, r.speedup, r.speedup_lower, r.speedup_upper, r.level)
        asked = self.request, self.pruning(*timed.points[row]), hw
        runs = runnable(*asked).works
        return Advice(r, target, probability, reached, runs, asked)


class _Timed:
    """Points of a search that a device can run, in order, with their results."""

    def __init__(
        self, search: _Search, hw: HardwareProfile, points: list[Point], batch: WorkloadBatch
    ) -> None:
        prunings = [search.pruning(*point) for point in points]
        self.results: Results = results_of(batch, prunings, [hw], [search.request], _reject)
        self.points = [points[i] for i in self.results.pruning.tolist()]
        # speedups that are reached with at least the required probability: the inverse of
        # probability_of
        columns, quantile = self.results.columns, NormalDist().inv_cdf
        share = quantile(search.probability) / quantile(0.5 + 0.5 * search.request.level)
        speedup: Array = columns["speedup"]
        end = columns["speedup_lower" if search.probability > 0.5 else "speedup_upper"]
        self.speedup = speedup * (end / speedup) ** abs(share)

    def first(self, target: float) -> dict[str, int]:
        return {
            self.points[row][0]: row
            for row in reversed(np.flatnonzero(self.speedup >= target).tolist())
        }

    def fastest(self, name: str) -> int:
        return int(
            np.where([name == other for other, _ in self.points], self.speedup, 0.0).argmax()
        )


def _reject(_pruning: int | None, reason: str, device: str) -> None:
    """Ignore prunings that a family does not support; raise InputError if a device cannot run
    one."""
    if device:
        raise InputError(reason)
