"""Which operators to measure in the time there is.

:func:`base_plan` spreads shapes over (m, n, k) in logarithmic space, with sizes that language models have and odd ones
between them, and adds attention, elementwise, copy and launch items, in random order by seed. :func:`in_order` takes
exactly the operators it is given, in an order as :func:`next_rows` finds the best one. Both return a :class:`Plan`:
items, each with an estimated cost, that together fit the budget. Groups (n, k) are held out here, before anything is
measured, so that no fit can have seen them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from calibration.devices.protocol import HOST_KINDS, Operator
from calibration.measure.shapes import gemm_stream, other_streams
from calibration.measure.timing import Protocol
from simulator.arrays import FloatArray
from simulator.errors import InputError
from simulator.uncertainty.error_model import correlation

FIT, HOLDOUT, EXACT, ANCHOR = "fit", "holdout", "exact", "anchor"
HOLDOUT_SHARE = 0.2  # of the (n, k) groups of a base plan, and of the items that have none, to keep from the fit
ANCHOR_EVERY = 20  # items between two measurements of the anchor

# fmt: off
SHARES: Mapping[str, float] = {
    "gemm": 0.56, "gemm_2to4": 0.06, "attention_prefill": 0.10, "attention_decode": 0.10, "elementwise": 0.12,
    "pruned": 0.04, "runtime": 0.02,
}
# fmt: on
"""Share of the budget of each kind of item in a base plan; what a device refuses goes to the GEMMs."""


@dataclass(frozen=True)
class Rates:
    """What a plan must know of a device to estimate times: measured by a probe, or taken from a datasheet."""

    flop_per_s: float
    bytes_per_s: float
    floor_s: float = 5e-6  # time of the smallest launch
    setup_s: float = 0.05  # preparing an operator
    memory_bytes: float = math.inf  # largest footprint to plan for
    noise: float = 0.0  # standard deviation of one sample over its mean

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "noise" and not value > 0:
                raise ValueError(f"rates {name}: expected a number above zero, got {value}")

    def launch_s(self, op: Operator) -> float:
        """Rough time of one launch, s."""
        return self.floor_s * op.launches + max(op.flops / self.flop_per_s, op.bytes / self.bytes_per_s)

    def cost_s(self, op: Operator, protocol: Protocol) -> float:
        """Rough time that measuring takes, s: setup, loop calibration, warm-up and samples, under the protocol's limit.

        ``noise`` decides how many samples reach the protocol's precision: the interval of a median of n samples is
        some 1.25 * 1.96 * noise / sqrt(n) either way.
        """
        launch = self.launch_s(op)
        needed = min((2.45 * self.noise / protocol.precision) ** 2, protocol.max_samples)
        windows = 3 + protocol.warm_values + max(2 * protocol.min_samples, math.ceil(needed))
        sampling_s = min(protocol.time_limit_s, windows * max(1.2 * protocol.min_window_s, launch))
        return self.setup_s + sampling_s + 2.0 * launch


@dataclass(frozen=True)
class Item:
    """One operator to measure, what for, and what it is expected to cost."""

    operator: Operator
    purpose: str = FIT
    cost_s: float = 0.0


@dataclass(frozen=True)
class Plan:
    """Items in the order they are to be measured."""

    items: tuple[Item, ...]
    anchor: Operator  # shape measured first and after every :data:`ANCHOR_EVERY` items, to see drift
    seed: int = 0
    budget_s: float = math.inf
    # Rounds over the items, each in an order of its own. On a shared machine other work slows this one down for seconds
    # at a time and never speeds it up: what counts of an item is its fastest visit.
    visits: int = 1

    def order(self, visit: int) -> tuple[Item, ...]:
        """The items in the order of one visit, from 0; the first is that of the plan."""
        return self.items if visit == 0 else _shuffled(self.items, self.seed + visit)

    @property
    def estimated_s(self) -> float:
        """Expected time of one visit of all items, s; anchors are part of the estimate of the items."""
        return sum(item.cost_s for item in self.items)

    def counts(self) -> dict[str, int]:
        """Items by kind of operator and purpose: ``{"gemm fit": 40, ...}``."""
        return dict(sorted(Counter(f"{item.operator.kind} {item.purpose}" for item in self.items).items()))


@dataclass(frozen=True)
class _Budget:
    """Takes items from a stream until a share of the time is used."""

    rates: Rates
    protocol: Protocol
    refuses: Callable[[Operator], str]
    taken: dict[str, Item] = field(default_factory=dict)

    def fits(self, op: Operator) -> bool:
        """Whether the device can run it, and it is not too slow or too large to be worth it."""
        small = op.footprint_bytes <= self.rates.memory_bytes
        quick = self.rates.launch_s(op) <= self.protocol.time_limit_s / 12.0
        return op.key not in self.taken and quick and small and not self.refuses(op)

    def fill(self, stream: Iterable[Operator], seconds: float) -> float:
        """Take operators while they fit; returns the time left."""
        for op in filter(self.fits, stream):
            cost = (1.0 + 1.0 / ANCHOR_EVERY) * self.rates.cost_s(op, self.protocol)
            if cost > seconds:
                break
            self.taken[op.key] = Item(op, FIT, cost)
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
) -> Plan:
    """A plan for a device of which nothing is known yet; ``refuses`` is the device's, ``shares`` are of the budget.
    ``kernels_apart``: so much attention of one head width before the next that each can be fitted.

    InputError: the budget is no positive number or too short for a single GEMM.

    >>> plan = base_plan(Rates(1e12, 3e10), budget_s=60, seed=1)
    >>> plan.estimated_s <= 60, {item.purpose for item in plan.items} == {"fit", "holdout"}
    (True, True)
    """
    protocol = protocol or Protocol()
    check_budget(budget_s)
    rng = np.random.default_rng(seed)
    budget = _Budget(rates, protocol, refuses)
    left = 0.0
    for name, stream in other_streams(dtype, rng, kernels_apart).items():
        left += budget.fill(stream, shares.get(name, 0.0) * budget_s)
    budget.fill(gemm_stream(dtype, rng, budget.fits), shares["gemm"] * budget_s + left)
    if not any(item.operator.kind == "gemm" for item in budget.taken.values()):
        raise InputError(f"budget: {budget_s:g} s are too short to measure a single GEMM in {dtype}; give more")
    items = split_holdout([*budget.taken.values()], rng)
    return Plan(_shuffled(items, seed), anchor_operator(rates, dtype, protocol), seed, budget_s)


def check_budget(budget_s: float) -> float:
    """The budget itself when it is a positive number of seconds, else an InputError."""
    if not (isinstance(budget_s, int | float) and budget_s > 0):
        raise InputError(f"budget: expected a time above zero, got {budget_s!r}")
    return float(budget_s)


def anchor_operator(rates: Rates, dtype: str, protocol: Protocol) -> Operator:
    """A compute-bound GEMM, long enough to be timed sharply: the largest that stays under half a window."""
    candidates = [Operator("gemm", dtype, m=size // 2, n=size, k=size) for size in (4096, 2048, 1024, 512)]
    short = [op for op in candidates if rates.launch_s(op) <= 0.5 * protocol.min_window_s]
    return short[0] if short else candidates[-1]


def split_holdout(items: Sequence[Item], rng: np.random.Generator) -> list[Item]:
    """Items with their purpose set: whole (n, k) groups of GEMMs, single items of other kinds, held out by chance."""
    groups = sorted({item.operator.group for item in items if item.operator.kind == "gemm"})
    apart = ("gemm", "copy", "launch_graph", *HOST_KINDS)
    others = sorted(item.operator.key for item in items if item.operator.kind not in apart)
    held: set[Any] = set()
    for pool in (groups, others):
        if len(pool) >= 5:  # fewer leave a fit with too little and a judgement with nothing
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
) -> Plan:
    """A plan of exactly these operators in their order; GEMMs are kept with the profile. What a device refuses is
    counted and named when it is measured.

    >>> plan = in_order([Operator("gemm", m=m, n=64, k=64) for m in (1, 8, 1)], Rates(1e12, 3e10))
    >>> [item.operator.m for item in plan.items], plan.items[0].purpose
    ([1, 8], 'exact')
    """
    if not operators:
        raise InputError("in_order: there are no operators to measure")
    protocol = protocol or Protocol()
    unique = {op.key: op for op in operators}.values()
    items = [Item(op, EXACT if op.kind == "gemm" else FIT, rates.cost_s(op, protocol)) for op in unique]
    return Plan(tuple(items), anchor_operator(rates, operators[0].dtype, protocol), seed, budget_s)


def next_rows(rows: Mapping[str, FloatArray], targets: FloatArray, count: int) -> list[int]:
    """Which of n rows to measure: first the one that takes most of the variance of some targets, then the one that does
    after it, and so on, ``count`` of them.

    ``rows`` are arrays of the error model (:meth:`simulator.uncertainty.error_model.Uncertainty.columns`) and their
    ``kind`` (n,);
    ``targets`` (t, n) is the covariance of each target with each row, as by
    :meth:`simulator.uncertainty.forward.PassUncertainty.covariance`.
    """
    local, place, kind = rows["local"], rows["place"], rows["kind"]
    common = rows["shared"] @ rows["shared"].T
    common += correlation(place, place) * np.outer(local, local) * (kind[:, None] == kind)
    left, targets, order = np.ones(len(local), dtype=bool), np.array(targets), []
    for _ in range(min(count, len(local))):
        variance = np.diag(common) + np.maximum(rows["own"], 1e-6)
        best = int(np.argmax(np.where(left, (targets * targets).sum(axis=0) / variance, -1.0)))
        order.append(best)
        left[best] = False
        told = common[best] / variance[best]  # of the error of each row, by one of this
        targets -= np.outer(targets[:, best], told)
        common -= np.outer(common[best], told)
    return order


def _shuffled(items: Sequence[Item], seed: int) -> tuple[Item, ...]:
    """Random order by seed, whatever order they came in; exact ones first, since time may run out on the others."""
    ordered = sorted(items, key=lambda item: item.operator.key)
    mixed = [ordered[i] for i in np.random.default_rng(seed).permutation(len(ordered))]
    return tuple(sorted(mixed, key=lambda item: item.purpose != EXACT))
