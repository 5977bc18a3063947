"""Choose the operators to measure in a given time, by the rates of a device.

:func:`base_plan` takes candidates, best first, until the time is used: sizes of language models and
odd sizes between them, spread over logarithmic space. It holds out groups (n, k) before the
measurement, so no fit sees them. :func:`in_order` measures given operators.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from calibration.devices.protocol import (
    HOST_KINDS,
    LIBRARIES,
    OPERATORS,
    Device,
    Operator,
    OutOfMemory,
    Unsupported,
)
from calibration.measure.timing import WARM_VALUES, Protocol, measure
from calibration.records.timing_table import Row
from simulator.arrays import FloatArray, IndexArray
from simulator.errors import InputError
from simulator.operators.gemm_model import WAVE_TILE
from simulator.uncertainty.factors import Uncertainty, correlation

FIT, HOLDOUT, EXACT, DRIFT_CHECK = "fit", "holdout", "exact", "drift_check"
# held-out share of the (n, k) groups of a base plan, and of the items without such a group
HOLDOUT_SHARE = 0.2
DRIFT_CHECK_EVERY = 20  # items between two drift checks

_TABLE: Mapping[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
SHARES: Mapping[str, float] = _TABLE["shares"]
HYBRIDS = ("indexer", "recurrent")  # kinds of items that the usual decoders do not run
# shorter plans omit HYBRIDS: a few rows fit no constant, and the other kinds need the time
HYBRIDS_S = 60.0
# part of the share of GEMMs that the first operators of other kinds may use, if their own shares
# are too short
SPARE = 0.5

TOKENS = _TABLE["tokens"]
SIZES = _TABLE["sizes"]
ODD_SIZES = _TABLE["odd_sizes"]
HEADS = _TABLE["heads"]
LENGTHS = _TABLE["lengths"]
BATCHES = _TABLE["batches"]
INDEX_TOPK = 2048  # positions that indexers select

_MOST_ORDERED = 600  # points ordered at a time: the cost grows with the square of the number
_GROUP_TOKENS = 3  # values of m measured for each (n, k)
# sequences and their tokens of recurrences
RECURRENT_CALLS = tuple((b, t) for t in (1, 16, 64, 128, 256) for b in (1, 2, 4, 8))
# further sizes of recurrences, in the order of OPERATORS: features of a head, heads, groups, state
# or key features, chunk or positions of the convolution
RECURRENT_SHAPES: Mapping[str, Sequence[tuple[int, ...]]] = {
    "short_conv": [(n, p) for n in (512, 768, 1024, 1792, 2304, 3072, 4096) for p in (3, 4)],
    "state_space": [
        (channels, heads, groups, state, chunk)
        for channels in (32, 64)
        for heads in (8, 16, 24, 32, 48)
        for groups in (1, 8)
        for state in (64, 128)
        for chunk in (128, 256)
    ],
    "delta_net": [
        (value, heads, groups, key, 4)
        for value, key in ((64, 64), (128, 128), (128, 64))
        for heads, groups in ((2, 2), (4, 4), (8, 8), (16, 8), (16, 16))
    ],
}
# calls of one head width before the next width: a fit needs 20, and a short plan ends early
_WIDTH_ROWS = 96
WAVES = (1, 2, 4)  # waves of tiles at whose ends the GEMMs of a model are measured
BESIDE_EVERY = 4  # one attention call in four is timed in the device's library beside the engine's
_ODD_EVERY = 8  # one group in eight is misaligned in n, in k, or in both


@dataclass(frozen=True)
class Rates:
    flop_per_s: float
    bytes_per_s: float
    floor_s: float = 5e-6  # time of the smallest launch
    setup_s: float = 0.05  # time to prepare an operator
    memory_bytes: float = math.inf  # largest footprint of a planned operator
    noise: float = 0.0  # relative standard deviation of one sample
    # time to compile a kernel of block-sparse attention, once per :func:`compilation`
    compile_s: float = 0.0

    def launch_s(self, op: Operator) -> float:
        return self.floor_s * op.launches + max(
            op.flops / self.flop_per_s, op.bytes / self.bytes_per_s
        )

    def sampling_s(self, op: Operator, protocol: Protocol, needed: int = 0) -> float:
        """Estimate the time of the loop count, the warm-up and ``needed`` samples, s."""
        windows = 3 + WARM_VALUES + max(2 * protocol.min_samples, needed)
        return windows * max(1.2 * protocol.min_window_s, self.launch_s(op))

    def cost_s(self, op: Operator, protocol: Protocol, compiled: Collection[Any] = ()) -> float:
        """Estimate the time of a measurement, s: setup, loop count, warm-up and samples, up to the
        protocol's limit. ``compiled`` are the :func:`compilation` of earlier operators. The median
        of n samples has an interval of about 1.25 * 1.96 * noise / sqrt(n) to either side."""
        launch = self.launch_s(op)
        needed = min((2.45 * self.noise / protocol.precision) ** 2, protocol.max_samples)
        sampling_s = min(protocol.time_limit_s, self.sampling_s(op, protocol, math.ceil(needed)))
        kernel = compilation(op)
        compile_s = self.compile_s if kernel is not None and kernel not in compiled else 0.0
        return self.setup_s + compile_s + sampling_s + 2.0 * launch


def compilation(op: Operator) -> tuple[Any, ...] | None:
    """Return what flex attention is compiled for, once for all lengths; None for other
    operators."""
    if op.kind != "attention_block_sparse":
        return None
    return op.dtype, op.head_dim, op.heads, op.kv_heads, op.block


# time to compile flex attention for a GPU, s: an upper estimate from lowering and compiling it on a
# CPU
FLEX_COMPILE_S = 15.0


def probe(device: Device, dtype: str, protocol: Protocol | None = None) -> Rates:
    """Measure arithmetic rate, bandwidth and launch time of a device for a plan, in about one
    second. A square GEMM grows until it takes 5 ms, since a slow number format would need minutes.
    A copy of 64 MiB, an empty launch and a thin GEMM follow. The thin GEMM matters on a CPU, which
    rearranges weights before a product."""
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
        noises.append(
            1.48 * statistics.median(abs(s / timing.median_s - 1.0) for s in timing.samples_s)
        )
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
        raise Unsupported(
            f"dtype {dtype}: device {device.name} cannot run a square GEMM; supported: {formats}"
        )
    copy = Operator("copy", dtype, n=1 << 26)
    copied = time_of(copy)
    floor = time_of(Operator("launch_eager", dtype, cold=False)) or 5e-6
    bytes_per_s = copy.bytes / copied if copied else flop_per_s / 100.0
    thin = Operator("gemm", dtype, m=8, n=2048, k=2048)
    seconds = time_of(thin)
    if seconds is not None and seconds > 50.0 * floor:
        bytes_per_s = min(
            bytes_per_s, thin.bytes / max(seconds - thin.flops / flop_per_s, 0.25 * seconds)
        )
    # the median, because the first preparation in a number format also fills memory with random
    # data
    setup = max(1e-3, 1.5 * statistics.median(setups))
    memory_bytes = device.describe().memory_bytes or float("inf")
    compile_s = FLEX_COMPILE_S if device.name.startswith("cuda") else 0.0
    return Rates(
        flop_per_s, bytes_per_s, floor, setup, memory_bytes, statistics.median(noises), compile_s
    )


@dataclass(frozen=True)
class Item:
    operator: Operator
    purpose: str = FIT
    cost_s: float = 0.0


@dataclass(frozen=True)
class MeasurementPlan:
    items: tuple[Item, ...]
    # measured first and after every :data:`DRIFT_CHECK_EVERY` items, to detect drift
    drift_check: Operator
    seed: int = 0
    budget_s: float = math.inf
    # Rounds over the items, each in another order. Other work on a shared machine slows a
    # measurement down for seconds and never speeds it up, so the fastest visit of an item counts.
    visits: int = 1
    spare: int = 0  # number of last items, which are measured only if time is left

    def order(self, visit: int) -> tuple[Item, ...]:
        return self.items if visit == 0 else _shuffled(self.items, self.seed + visit)

    def counts(self) -> dict[str, int]:
        """Return the number of items by kind and purpose, without the spare ones."""
        items = self.items[: len(self.items) - self.spare]
        return dict(
            sorted(Counter(f"{item.operator.kind} {item.purpose}" for item in items).items())
        )


@dataclass(frozen=True)
class _Budget:
    rates: Rates
    protocol: Protocol
    refuses: Callable[[Operator], str]
    taken: dict[str, Item] = field(default_factory=dict)
    compiled: set[Any] = field(default_factory=set)  # compilations of the taken operators

    def fits(self, op: Operator) -> bool:
        if (
            self.rates.launch_s(op) > self.protocol.time_limit_s / 12.0
            or op.footprint_bytes > self.rates.memory_bytes
        ):
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
    earlier: Sequence[Item] = (),
) -> MeasurementPlan:
    """Plan measurements of an unknown device; ``shares`` are shares of the budget. The order begins
    with one operator per kind, so a run that ends early has a time of each. Enough attention calls
    of one head width for a fit come before the next width. The plan has none
    of the ``earlier`` items, and holds out further rows of their held-out groups."""
    protocol = protocol or Protocol()
    rng = np.random.default_rng((seed, len(earlier)) if earlier else seed)
    budget = _Budget(
        rates,
        protocol,
        refuses,
        {item.operator.key: item for item in earlier},
        {compilation(item.operator) for item in earlier},
    )
    omitted = HYBRIDS if budget_s < HYBRIDS_S else ()
    freed = sum(shares.get(name, 0.0) for name in omitted)
    shares = {**shares, "gemm": shares["gemm"] + freed}
    left = shares["gemm"] * budget_s
    spare = SPARE * left
    for name, stream in other_streams(dtype, rng, refuses).items():
        if name in omitted:
            continue
        operators, share = [*stream], shares.get(name, 0.0) * budget_s
        rest = (budget.first_of_each_kind(operators, share + spare) if share else spare) - spare
        spare += min(rest, 0.0)
        left += budget.fill(operators, rest) if rest > 0.0 else rest
    budget.fill(gemm_stream(dtype, rng, budget.fits), left)
    if not any(item.operator.kind == "gemm" for item in budget.taken.values()):
        raise InputError(
            f"budget: {budget_s:g} s are too short for one GEMM in {dtype}; increase it"
        )
    items = split_holdout([*budget.taken.values()][len(earlier) :], rng, earlier)
    return MeasurementPlan(
        _shuffled(items, seed), drift_check_operator(rates, dtype, protocol), seed, budget_s
    )


def drift_check_operator(rates: Rates, dtype: str, protocol: Protocol) -> Operator:
    """Return a compute-bound GEMM with a precise time: the largest that takes less than half a
    window."""
    candidates = [
        Operator("gemm", dtype, m=size // 2, n=size, k=size) for size in (4096, 2048, 1024, 512)
    ]
    short = [op for op in candidates if rates.launch_s(op) <= 0.5 * protocol.min_window_s]
    return short[0] if short else candidates[-1]


def split_holdout(
    items: Sequence[Item], rng: np.random.Generator, earlier: Sequence[Item] = ()
) -> list[Item]:
    """Hold out random (n, k) groups of GEMMs and random single items of other kinds; return items
    with purposes. Groups of ``earlier`` GEMMs keep their purpose."""
    known = {item.operator.group: item.purpose for item in earlier if item.operator.kind == "gemm"}
    groups = sorted(
        {item.operator.group for item in items if item.operator.kind == "gemm"} - known.keys()
    )
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
        kept = item.operator.kind == "gemm" and known.get(item.operator.group) == HOLDOUT
        out.append(replace(item, purpose=HOLDOUT if kept or name in held else FIT))
    return out


REFILLS = 2
"""Further plans of the same length behind a plan: measurements took 0.45 to 0.7 of their estimates
on planted H100s."""


def refilled_plan(
    first: Sequence[Item], mixed: Sequence[Item], budget_s: float, seed: int, **options: Any
) -> MeasurementPlan:
    """Return the ``first`` items, a base plan (:func:`base_plan` with its ``options``) with the
    ``mixed`` items among its own, and spare items for the time that the plan does not need."""
    known = [*first, *mixed]
    plan = base_plan(budget_s=budget_s, earlier=known, seed=seed, **options)
    items = [*first, *_shuffled((*mixed, *plan.items), seed)]
    many = len(items)
    for _ in range(REFILLS):
        items += base_plan(budget_s=budget_s, earlier=items, seed=seed, **options).items
    return replace(plan, items=tuple(items), spare=len(items) - many)


def wave_gemms(shapes: Iterable[tuple[int, int]], sm_count: int, dtype: str) -> list[Operator]:
    """Return GEMMs of shapes (n, k) with the largest m that :data:`WAVES` waves of tiles hold, and
    with one row more, where the time makes a step."""
    tile_m, tile_n = map(int, WAVE_TILE)
    out = []
    for waves, (n, k) in product(WAVES, dict.fromkeys(shapes)):
        m = tile_m * (waves * sm_count // math.ceil(n / tile_n))
        if 0 < m <= TOKENS[-1]:
            out += [Operator("gemm", dtype, m=rows, n=n, k=k) for rows in (m, m + 1)]
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
        items.append(
            Item(op, EXACT if op.kind == "gemm" else FIT, rates.cost_s(op, protocol, compiled))
        )
        compiled.add(compilation(op))
    return MeasurementPlan(
        tuple(items), drift_check_operator(rates, operators[0].dtype, protocol), seed, budget_s
    )


def next_rows(rows: Uncertainty, kind: IndexArray, targets: FloatArray, count: int) -> list[int]:
    """Return the ``count`` of n rows that reduce the variance of the targets most, each given the
    rows before it. ``rows`` are the errors of the rows, ``kind`` (n,) the kinds of their operators;
    ``targets`` (t, n) is the covariance of each target with each row
    (``PassUncertainty.covariance``)."""
    systematic, sd = rows.wide(), rows.correlated
    common = systematic @ systematic.T
    common += (
        correlation(rows.coordinates, rows.coordinates) * np.outer(sd, sd) * (kind[:, None] == kind)
    )
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
    """Shuffle items by seed. Since time may run out, exact shapes come first, then one item per
    kind of operator."""
    ordered = sorted(items, key=lambda item: item.operator.key)
    mixed = [ordered[i] for i in np.random.default_rng(seed).permutation(len(ordered))]
    first = {
        item.operator.kind: item.operator.key for item in reversed(mixed) if item.purpose != EXACT
    }
    early = set(first.values())
    return tuple(
        sorted(mixed, key=lambda item: (item.purpose != EXACT, item.operator.key not in early))
    )


def spread_order(points: FloatArray, count: int, first: int = 0) -> list[int]:
    """Return indices of points in an order in which every prefix is spread widely (farthest point
    first)."""
    order = [first]
    nearest = np.linalg.norm(points - points[first], axis=1)
    nearest[first] = -1.0
    while len(order) < min(count, len(points)):
        chosen = int(np.argmax(nearest))
        order.append(chosen)
        nearest = np.minimum(nearest, np.linalg.norm(points - points[chosen], axis=1))
        nearest[order] = -1.0
    return order


def gemm_stream(
    dtype: str, rng: np.random.Generator, fits: Callable[[Operator], bool]
) -> Iterable[Operator]:
    """Yield GEMMs of widely spread groups (n, k) of a few m, one group in eight misaligned, until
    nothing more fits."""
    regular = [(n, k) for n in (*SIZES, *_TABLE["vocabularies"]) for k in SIZES]
    mixed = (*ODD_SIZES, *SIZES[5:21:3])
    odd = [(n, k) for n in mixed for k in mixed if n in ODD_SIZES or k in ODD_SIZES]
    # pairs that do not fit with the smallest m are excluded
    pools = [
        [(n, k) for n, k in pool if fits(Operator("gemm", dtype, m=1, n=n, k=k))]
        for pool in (regular, odd)
    ]
    turn, gained = 0, True
    while gained:
        gained = False
        orders = [_spread(pool, rng) for pool in pools]
        while orders[0]:
            pool = orders[1] if turn % _ODD_EVERY == _ODD_EVERY - 1 and orders[1] else orders[0]
            n, k = pool.pop(0)
            usable = [op for m in TOKENS if fits(op := Operator("gemm", dtype, m=m, n=n, k=k))]
            for stratum in np.array_split(
                np.arange(len(usable)), min(_GROUP_TOKENS, len(usable)) or 1
            ):
                if len(stratum):
                    gained = True
                    yield usable[int(rng.choice(stratum))]
            turn += 1


def _spread(pool: Sequence[tuple[int, ...]], rng: np.random.Generator) -> list[tuple[int, ...]]:
    """Return up to :data:`_MOST_ORDERED` members of a pool in a spread order, from a random one
    on."""
    if not pool:
        return []
    order = spread_order(
        np.log2(np.array(pool, dtype=np.float64)), _MOST_ORDERED, int(rng.integers(len(pool)))
    )
    return [pool[i] for i in order]


def other_streams(
    dtype: str,
    rng: np.random.Generator,
    refuses: Callable[[Operator], str],
) -> dict[str, Iterable[Operator]]:
    aligned = [
        (m, n, k)
        for m in TOKENS
        for n in SIZES[3::2]
        for k in SIZES[3::2]
        if n % 32 == 0 and k % 64 == 0
    ]
    sparse = (Operator("gemm_2to4", dtype, m=m, n=n, k=k) for m, n, k in _spread(aligned, rng))
    prefill = (
        Operator("attention_prefill", dtype, q_len=call["kv_len"], cold=False, **call)
        for call in _calls(BATCHES[:4], rng)
    )
    decode = (Operator("attention_decode", dtype, q_len=1, **call) for call in _calls(BATCHES, rng))
    spots = [
        _spread(
            [
                (m, n)
                for m in TOKENS[::3]
                for n in (_TABLE["selected"] if role == "select" else SIZES[4::4])
            ],
            rng,
        )
        for role in _TABLE["elementwise"]
    ]
    elementwise = (
        Operator("elementwise", dtype, m=m, n=n, role=role, cold=False)
        for turn in zip_longest(*spots)
        for role, (m, n) in zip(
            _TABLE["elementwise"], (spot or (0, 0) for spot in turn), strict=True
        )
        if m
    )
    streams = {"runtime": _runtime(dtype), "gemm_2to4": sparse}
    return streams | {
        "attention_prefill": _in_libraries(prefill, refuses),
        "attention_decode": _in_libraries(decode, refuses),
        "elementwise": elementwise,
        "pruned": _pruned(dtype, rng),
        "indexer": _indexers(dtype, rng),
        "recurrent": _recurrent(dtype, rng),
    }


def _in_libraries(
    calls: Iterable[Operator], refuses: Callable[[Operator], str]
) -> Iterator[Operator]:
    """Yield each call in the attention library of the installed engine, and some of the calls in
    that of the device too; each in that of the device if there is no engine."""
    for number, op in enumerate(calls):
        twins = [replace(op, library=name) for name in LIBRARIES]
        runs = [twin for twin in twins if not refuses(twin)]
        yield from runs
        if not runs or number % BESIDE_EVERY == 0:
            yield op


def _indexers(dtype: str, rng: np.random.Generator) -> Iterator[Operator]:
    """Yield prompts and decode steps alternately."""
    every = [(b, s, h, d) for b in BATCHES[:5] for s in LENGTHS for h, d in _TABLE["index_heads"]]
    for turn, (batch, kv_len, heads, head_dim) in enumerate(_spread(every, rng)):
        yield Operator(
            "indexer",
            dtype,
            batch=batch,
            q_len=1 if turn % 2 else min(kv_len, 512),
            kv_len=kv_len,
            heads=heads,
            head_dim=head_dim,
            k=min(kv_len, INDEX_TOPK),
        )


def _calls(batches: Sequence[int], rng: np.random.Generator) -> list[Row]:
    """Return shapes of attention calls; head widths take turns that have enough calls for a fit."""
    every = [(b, s, *heads) for b in batches for s in LENGTHS for heads in HEADS]
    pools = [
        [call for call in every if call[-1] == width]
        for width in sorted({heads[-1] for heads in HEADS})
    ]
    orders = [_spread(pool, rng) for pool in pools]
    turns = range(0, max(map(len, orders)), _WIDTH_ROWS)
    calls = (
        call for start in turns for order in orders for call in order[start : start + _WIDTH_ROWS]
    )
    return [
        dict(zip(("batch", "kv_len", "heads", "kv_heads", "head_dim"), call, strict=True))
        for call in calls
    ]


def _runtime(dtype: str) -> list[Operator]:
    kinds = [(kind, role) for kind in ("launch_eager", "launch_graph") for role in ("", "gemm")]
    launches = [Operator(kind, dtype, role=role, cold=False) for kind, role in kinds]
    copies = [Operator("copy", dtype, n=1 << power) for power in (28, 22, 25, 30, 18)]
    return [*layers(dtype, _TABLE["layer_lengths"][1::3]), *launches, *copies]


def layers(dtype: str, lengths: Iterable[int]) -> list[Operator]:
    return [Operator("layer_eager", dtype, kv_len=length, cold=False) for length in lengths]


def _recurrent(dtype: str, rng: np.random.Generator) -> Iterable[Operator]:
    """Yield decode steps and prompts of each kind of recurrence in turn."""
    spread = {
        kind: _spread([(*calls, *sizes) for calls in RECURRENT_CALLS for sizes in shapes], rng)
        for kind, shapes in RECURRENT_SHAPES.items()
    }
    for points in zip_longest(*spread.values()):
        for kind, point in zip(spread, points):
            if point is not None:
                batch, tokens, *sizes = point
                names = (name for name in OPERATORS[kind] if name not in ("m", "batch"))
                shape = dict(zip(names, sizes, strict=True))
                yield Operator(kind, dtype, m=batch * tokens, batch=batch, **shape)


def _pruned(dtype: str, rng: np.random.Generator) -> Iterable[Operator]:
    """Yield operators that check predictions of sums of plain kernels."""
    pairs = _spread(
        [(m, n, k) for m in TOKENS[::4] for n in SIZES[5:28:3] for k in SIZES[5:28:3]], rng
    )
    lengths = _spread([(s, h) for s in LENGTHS[3:13] for h in (8, 16, 32)], rng)
    for turn, (m, n, k) in enumerate(pairs):
        density = (0.75, 0.5)[turn // 3 % 2]
        if turn % 3 == 0:
            rank = max(16, 16 * round(density * n * k / (n + k) / 16))
            yield Operator("low_rank", dtype, m=m, n=n, k=k, rank=rank)
        elif turn % 3 == 1:
            yield Operator("gather_gemm", dtype, m=m, n=n, k=k, rows=max(1, round(density * m)))
            role, size = ("up", n) if turn // 3 % 4 < 2 else ("down", k)
            yield Operator(
                "grouped_gemm", dtype, m=m, n=n, k=k, block=size // 32, density=density, role=role
            )
        elif turn // 3 < len(lengths):
            length, h = lengths[turn // 3]
            yield Operator(
                "attention_block_sparse",
                dtype,
                q_len=length,
                kv_len=length,
                batch=1,
                heads=h,
                kv_heads=h // 4,
                head_dim=64,
                block=(64, 16, 128)[turn // 3 % 3],
                density=density,
                cold=False,
            )
