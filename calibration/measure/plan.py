"""Choose the operators to measure in a given time, by the rates of a device.

:func:`base_plan` takes candidates of ``shapes`` until the time is used, and holds out groups (n, k) before the
measurement, so no fit sees them. :func:`in_order` measures given operators.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from calibration.devices.protocol import HOST_KINDS, Device, Operator, OutOfMemory, Unsupported
from calibration.measure.shapes import gemm_stream, other_streams
from calibration.measure.timing import WARM_VALUES, Protocol, measure
from simulator.arrays import FloatArray, IndexArray
from simulator.errors import InputError
from simulator.uncertainty.factors import Uncertainty, correlation

FIT, HOLDOUT, EXACT, DRIFT_CHECK = "fit", "holdout", "exact", "drift_check"
HOLDOUT_SHARE = 0.2  # held-out share of the (n, k) groups of a base plan, and of the items without such a group
DRIFT_CHECK_EVERY = 20  # items between two drift checks

# Share of the budget per kind of item in a base plan. GEMMs get the shares of unsupported kinds.
SHARES: Mapping[str, float] = {
    "gemm": 0.56,
    "gemm_2to4": 0.06,
    "attention_prefill": 0.10,
    "attention_decode": 0.10,
    "elementwise": 0.12,
    "pruned": 0.04,
    "runtime": 0.02,
}
# part of the share of GEMMs that the first operators of other kinds may use, if their own shares are too short
SPARE = 0.5


@dataclass(frozen=True)
class Rates:
    flop_per_s: float
    bytes_per_s: float
    floor_s: float = 5e-6  # time of the smallest launch
    setup_s: float = 0.05  # time to prepare an operator
    memory_bytes: float = math.inf  # largest footprint of a planned operator
    noise: float = 0.0  # relative standard deviation of one sample
    compile_s: float = 0.0  # time to compile a kernel of block-sparse attention, once per :func:`compilation`

    def launch_s(self, op: Operator) -> float:
        return self.floor_s * op.launches + max(op.flops / self.flop_per_s, op.bytes / self.bytes_per_s)

    def cost_s(self, op: Operator, protocol: Protocol, compiled: Collection[Any] = ()) -> float:
        """Estimate the time of a measurement, s: setup, loop count, warm-up and samples, up to the protocol's limit.
        ``compiled`` are the :func:`compilation` of earlier operators. The median of n samples has an interval of about
        1.25 * 1.96 * noise / sqrt(n) to either side."""
        launch = self.launch_s(op)
        needed = min((2.45 * self.noise / protocol.precision) ** 2, protocol.max_samples)
        windows = 3 + WARM_VALUES + max(2 * protocol.min_samples, math.ceil(needed))
        sampling_s = min(protocol.time_limit_s, windows * max(1.2 * protocol.min_window_s, launch))
        kernel = compilation(op)
        compile_s = self.compile_s if kernel is not None and kernel not in compiled else 0.0
        return self.setup_s + compile_s + sampling_s + 2.0 * launch


def compilation(op: Operator) -> tuple[Any, ...] | None:
    """Return what flex attention is compiled for, once for all lengths; None for other operators."""
    if op.kind != "attention_block_sparse":
        return None
    return op.dtype, op.head_dim, op.heads, op.kv_heads, op.block


# time to compile flex attention for a GPU, s: an upper estimate from lowering and compiling it on a CPU
FLEX_COMPILE_S = 15.0


def probe(device: Device, dtype: str, protocol: Protocol | None = None) -> Rates:
    """Measure arithmetic rate, bandwidth and launch time of a device for a plan, in about one second. A square GEMM
    grows until it takes 5 ms, since a slow number format would need minutes. A copy of 64 MiB, an empty launch and a
    thin GEMM follow. The thin GEMM matters on a CPU, which rearranges weights before a product."""
    window_s = protocol.min_window_s if protocol else 1e-3
    quick = Protocol(window_s, precision=0.05, min_samples=6, max_samples=8, time_limit_s=0.2)
    setups: list[float] = []
    noises: list[float] = []

    def time_of(op: Operator) -> float | None:
        if device.refuses(op):
            return None
        start = device.clock()
        try:
            prepared = device.prepare(op)
        except (OutOfMemory, Unsupported):  # a library may refuse one shape
            return None
        setups.append(device.clock() - start)
        timing = measure(prepared.sample, quick, device.clock)
        noises.append(1.48 * statistics.median(abs(s / timing.median_s - 1.0) for s in timing.samples_s))
        return timing.median_s

    flop_per_s = 0.0
    for size in (256, 512, 1024, 2048, 4096):
        op = Operator("gemm", dtype, m=size, n=size, k=size)
        seconds = time_of(op)
        if seconds is not None:
            flop_per_s = max(flop_per_s, op.flops / seconds)
            if seconds > 5e-3:
                break
    if not flop_per_s:
        formats = ", ".join(device.dtypes())
        raise Unsupported(f"dtype {dtype}: device {device.name} cannot run a square GEMM; supported: {formats}")
    copy = Operator("copy", dtype, n=1 << 26)
    copied = time_of(copy)
    floor = time_of(Operator("launch_eager", dtype, cold=False)) or 5e-6
    bytes_per_s = copy.bytes / copied if copied else flop_per_s / 100.0
    thin = Operator("gemm", dtype, m=8, n=2048, k=2048)
    seconds = time_of(thin)
    if seconds is not None and seconds > 50.0 * floor:
        bytes_per_s = min(bytes_per_s, thin.bytes / max(seconds - thin.flops / flop_per_s, 0.25 * seconds))
    # the median, because the first preparation in a number format also fills memory with random data
    setup = max(1e-3, 1.5 * statistics.median(setups))
    memory_bytes = device.describe().memory_bytes or float("inf")
    compile_s = FLEX_COMPILE_S if device.name.startswith("cuda") else 0.0
    return Rates(flop_per_s, bytes_per_s, floor, setup, memory_bytes, statistics.median(noises), compile_s)


@dataclass(frozen=True)
class Item:
    operator: Operator
    purpose: str = FIT
    cost_s: float = 0.0


@dataclass(frozen=True)
class MeasurementPlan:
    items: tuple[Item, ...]
    drift_check: Operator  # measured first and after every :data:`DRIFT_CHECK_EVERY` items, to detect drift
    seed: int = 0
    budget_s: float = math.inf
    # Rounds over the items, each in another order. Other work on a shared machine slows a measurement down for seconds
    # and never speeds it up, so the fastest visit of an item counts.
    visits: int = 1

    def order(self, visit: int) -> tuple[Item, ...]:
        return self.items if visit == 0 else _shuffled(self.items, self.seed + visit)

    @property
    def estimated_s(self) -> float:
        """Expected seconds of one visit, drift checks included."""
        return sum(item.cost_s for item in self.items)

    def counts(self) -> dict[str, int]:
        return dict(sorted(Counter(f"{item.operator.kind} {item.purpose}" for item in self.items).items()))


@dataclass(frozen=True)
class _Budget:
    rates: Rates
    protocol: Protocol
    refuses: Callable[[Operator], str]
    taken: dict[str, Item] = field(default_factory=dict)
    compiled: set[Any] = field(default_factory=set)  # compilations of the taken operators

    def fits(self, op: Operator) -> bool:
        if self.rates.launch_s(op) > self.protocol.time_limit_s / 12.0 or op.footprint_bytes > self.rates.memory_bytes:
            return False
        return op.key not in self.taken and not self.refuses(op)

    def cost_s(self, op: Operator) -> float:
        return (1.0 + 1.0 / DRIFT_CHECK_EVERY) * self.rates.cost_s(op, self.protocol, self.compiled)

    def take(self, op: Operator, cost_s: float) -> None:
        self.taken[op.key] = Item(op, FIT, cost_s)
        self.compiled.add(compilation(op))

    def fill(self, stream: Iterable[Operator], seconds: float) -> float:
        for op in filter(self.fits, stream):
            cost = self.cost_s(op)
            if cost > seconds and self.rates.compile_s and compilation(op) is not None:
                continue  # operators that need no compilation may fit
            if cost > seconds:
                break
            self.take(op, cost)
            seconds -= cost
        return seconds

    def first_of_each_kind(self, stream: Iterable[Operator], seconds: float) -> float:
        kinds = set[str]()
        for op in filter(self.fits, stream):
            if op.kind not in kinds and (cost := self.cost_s(op)) <= seconds:
                kinds.add(op.kind)
                self.take(op, cost)
                seconds -= cost
        return seconds


def base_plan(
    rates: Rates,
    *,
    budget_s: float,
    dtype: str = "bf16",
    protocol: Protocol | None = None,
    refuses: Callable[[Operator], str] = lambda op: "",
    seed: int = 0,
    shares: Mapping[str, float] = SHARES,
    kernels_apart: bool = True,
) -> MeasurementPlan:
    """Plan measurements of an unknown device; ``shares`` are shares of the budget. The order begins with one operator
    per kind, so a run that ends early has a time of each. With ``kernels_apart``, enough attention calls of one head
    width for a fit come before the next width."""
    protocol = protocol or Protocol()
    rng = np.random.default_rng(seed)
    budget = _Budget(rates, protocol, refuses)
    left = shares["gemm"] * budget_s
    spare = SPARE * left
    for name, stream in other_streams(dtype, rng, kernels_apart).items():
        operators, share = [*stream], shares.get(name, 0.0) * budget_s
        rest = (budget.first_of_each_kind(operators, share + spare) if share else spare) - spare
        spare += min(rest, 0.0)
        left += budget.fill(operators, rest) if rest > 0.0 else rest
    budget.fill(gemm_stream(dtype, rng, budget.fits), left)
    if not any(item.operator.kind == "gemm" for item in budget.taken.values()):
        raise InputError(f"budget: {budget_s:g} s are too short for one GEMM in {dtype}; increase it")
    items = split_holdout([*budget.taken.values()], rng)
    return MeasurementPlan(_shuffled(items, seed), drift_check_operator(rates, dtype, protocol), seed, budget_s)


def check_budget(budget_s: float) -> float:
    if not (isinstance(budget_s, int | float) and budget_s > 0):
        raise InputError(f"budget: expected a time above zero, got {budget_s!r}")
    return float(budget_s)


def drift_check_operator(rates: Rates, dtype: str, protocol: Protocol) -> Operator:
    """Return a compute-bound GEMM with a precise time: the largest that takes less than half a window."""
    candidates = [Operator("gemm", dtype, m=size // 2, n=size, k=size) for size in (4096, 2048, 1024, 512)]
    short = [op for op in candidates if rates.launch_s(op) <= 0.5 * protocol.min_window_s]
    return short[0] if short else candidates[-1]


def split_holdout(items: Sequence[Item], rng: np.random.Generator) -> list[Item]:
    """Hold out random (n, k) groups of GEMMs and random single items of other kinds; return items with purposes."""
    groups = sorted({item.operator.group for item in items if item.operator.kind == "gemm"})
    apart = ("gemm", "copy", "launch_graph", *HOST_KINDS)
    others = sorted(item.operator.key for item in items if item.operator.kind not in apart)
    held: set[Any] = set()
    for pool in (groups, others):
        if len(pool) >= 5:  # a smaller pool is too small for a fit and a validation
            chosen = rng.permutation(len(pool))[: max(1, round(HOLDOUT_SHARE * len(pool)))]
            held.update(pool[i] for i in chosen)
    out = []
    for item in items:
        name = item.operator.group if item.operator.kind == "gemm" else item.operator.key
        out.append(replace(item, purpose=HOLDOUT if name in held else FIT))
    return out


def in_order(
    operators: Sequence[Operator],
    rates: Rates,
    *,
    protocol: Protocol | None = None,
    budget_s: float = math.inf,
    seed: int = 0,
) -> MeasurementPlan:
    if not operators:
        raise InputError("in_order: expected at least one operator, got none")
    protocol = protocol or Protocol()
    unique = {op.key: op for op in operators}.values()
    items: list[Item] = []
    compiled: set[Any] = set()
    for op in unique:
        items.append(Item(op, EXACT if op.kind == "gemm" else FIT, rates.cost_s(op, protocol, compiled)))
        compiled.add(compilation(op))
    return MeasurementPlan(tuple(items), drift_check_operator(rates, operators[0].dtype, protocol), seed, budget_s)


def next_rows(rows: Uncertainty, kind: IndexArray, targets: FloatArray, count: int) -> list[int]:
    """Return the ``count`` of n rows that reduce the variance of the targets most, each given the rows before it.
    ``rows`` are the errors of the rows, ``kind`` (n,) the kinds of their operators; ``targets`` (t, n) is the
    covariance of each target with each row (``PassUncertainty.covariance``)."""
    systematic, sd = rows.wide(), rows.correlated
    common = systematic @ systematic.T
    common += correlation(rows.coordinates, rows.coordinates) * np.outer(sd, sd) * (kind[:, None] == kind)
    left, targets, order = np.ones(len(sd), dtype=bool), np.array(targets), []
    for _ in range(min(count, len(sd))):
        variance = np.diag(common) + np.maximum(rows.independent, 1e-6)
        best = int(np.argmax(np.where(left, (targets * targets).sum(axis=0) / variance, -1.0)))
        order.append(best)
        left[best] = False
        explained = common[best] / variance[best]  # error of each row per error of this one
        targets -= np.outer(targets[:, best], explained)
        common -= np.outer(common[best], explained)
    return order


def _shuffled(items: Sequence[Item], seed: int) -> tuple[Item, ...]:
    """Shuffle items by seed. Since time may run out, exact shapes come first, then one item per kind of operator."""
    ordered = sorted(items, key=lambda item: item.operator.key)
    mixed = [ordered[i] for i in np.random.default_rng(seed).permutation(len(ordered))]
    first = {item.operator.kind: item.operator.key for item in reversed(mixed) if item.purpose != EXACT}
    early = set(first.values())
    return tuple(sorted(mixed, key=lambda item: (item.purpose != EXACT, item.operator.key not in early)))
