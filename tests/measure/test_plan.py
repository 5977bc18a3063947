"""Plans: they fit the budget, spread over the space, hold out groups, and are the same for the same seed."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from calibration.devices.protocol import OPERATORS, Operator
from calibration.measure.plan import EXACT, FIT, HOLDOUT, SHARES, Plan, Rates, anchor_operator, base_plan, for_model
from calibration.measure.shapes import ODD_SIZES, spread_order
from calibration.measure.timing import Protocol
from simulator.errors import InputError

GPU = Rates(8e14, 2.5e12, 3e-6, 0.02, 70e9)
CPU = Rates(2e12, 2.5e10, 3e-6, 0.1, 8e9)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return base_plan(GPU, budget_s=600.0, seed=0)


def _gemms(plan: Plan) -> list[Operator]:
    return [item.operator for item in plan.items if item.operator.kind == "gemm"]


@pytest.mark.parametrize("rates", [GPU, CPU])
@pytest.mark.parametrize("budget_s", [20.0, 120.0, 900.0])
def test_the_estimate_fits_the_budget_and_uses_it(rates: Rates, budget_s: float) -> None:
    made = base_plan(rates, budget_s=budget_s, protocol=Protocol(time_limit_s=0.5))
    assert 0.85 * budget_s <= made.estimated_s <= budget_s


def test_a_plan_has_every_kind_of_operator_and_keeps_the_shares_of_the_budget(plan: Plan) -> None:
    assert {item.operator.kind for item in plan.items} == set(OPERATORS)
    kinds = ("gemm", "elementwise", "attention_decode")
    spent = {kind: sum(item.cost_s for item in plan.items if item.operator.kind == kind) for kind in kinds}
    assert spent["gemm"] >= 0.9 * SHARES["gemm"] * 600.0
    for kind in ("elementwise", "attention_decode"):
        assert spent[kind] == pytest.approx(SHARES[kind] * 600.0, rel=0.2)


def test_gemms_are_spread_over_the_whole_space(plan: Plan) -> None:
    gemms = _gemms(plan)
    for name, least in (("m", 10.0), ("n", 8.0), ("k", 7.5)):
        values = np.log2([getattr(op, name) for op in gemms])
        assert np.ptp(values) >= least, name
        counts, _ = np.histogram(values, bins=5)
        assert counts.min() >= 0.04 * len(values), (name, counts)


def test_spread_beats_chance() -> None:
    """The largest hole a farthest-point choice leaves is smaller than that of each of ten random choices."""
    points = np.random.default_rng(0).uniform(0, 1, (500, 3))

    def hole(chosen: list[int]) -> float:
        return float(np.min(np.linalg.norm(points[:, None] - points[chosen][None], axis=2), axis=1).max())

    ours = hole(spread_order(points, 40))
    assert all(ours < hole(list(np.random.default_rng(seed).permutation(500)[:40])) for seed in range(10))


def test_misaligned_sizes_are_there_but_few(plan: Plan) -> None:
    odd = [op for op in _gemms(plan) if op.n in ODD_SIZES or op.k in ODD_SIZES]
    assert 0.05 <= len(odd) / len(_gemms(plan)) <= 0.2
    assert any(op.n % 8 for op in odd)
    assert any(op.k % 8 for op in odd)


def test_groups_are_held_out_whole_and_a_fifth_of_them_and_have_several_m(plan: Plan) -> None:
    gemms = [item for item in plan.items if item.operator.kind == "gemm"]
    held = {item.operator.group for item in gemms if item.purpose == HOLDOUT}
    fitted = {item.operator.group for item in gemms if item.purpose == FIT}
    assert not held & fitted
    assert len(held) / len(held | fitted) == pytest.approx(0.2, abs=0.02)
    shapes = {(op.group, op.m) for op in _gemms(plan)}
    assert np.median([*Counter(group for group, _ in shapes).values()]) >= 3  # values of m in a group


def test_the_same_seed_gives_the_same_plan() -> None:
    first, again, other = (base_plan(CPU, budget_s=60.0, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first != other
    assert [item.operator.key for item in first.items] != sorted(item.operator.key for item in first.items)


def test_order_is_random_in_cost() -> None:
    """A run cut short by its budget must not have measured the cheap shapes only."""
    made = base_plan(CPU, budget_s=300.0, protocol=Protocol(time_limit_s=1.0))
    costs = np.array([item.cost_s for item in made.items])
    half = len(costs) // 2
    assert costs[:half].mean() == pytest.approx(costs[half:].mean(), rel=0.25)


def test_what_a_device_refuses_is_not_planned_and_its_time_goes_to_gemms() -> None:
    made = base_plan(CPU, budget_s=100.0, refuses=lambda op: "no" if op.kind != "gemm" else "")
    assert {item.operator.kind for item in made.items} == {"gemm"}
    assert made.estimated_s >= 85.0


def test_shapes_too_slow_or_too_large_are_left_out() -> None:
    small = Rates(1e11, 1e10, 1e-6, 0.05, memory_bytes=1e8)
    made = base_plan(small, budget_s=200.0, protocol=Protocol(time_limit_s=0.6))
    assert max(small.launch_s(item.operator) for item in made.items) <= 0.05
    assert max(item.operator.footprint_bytes for item in made.items) <= 1e8


def test_a_budget_of_nothing_or_for_not_one_gemm_is_refused() -> None:
    for budget in (0, -1.0, math.nan):
        with pytest.raises(InputError, match="budget: expected a time above zero"):
            base_plan(CPU, budget_s=budget)
    with pytest.raises(InputError, match="too short to measure a single GEMM in bf16"):
        base_plan(CPU, budget_s=0.01)


def test_for_model_takes_exactly_the_shapes_given() -> None:
    shapes = [(1, 4096, 4096), (2048, 14336, 4096), (1, 4096, 4096)]
    made = for_model(shapes, GPU, dtype="fp16", seed=1)
    assert {(op.m, op.n, op.k) for op in _gemms(made)} == set(shapes)
    assert {item.purpose for item in made.items} == {EXACT}
    assert {op.dtype for op in _gemms(made)} == {"fp16"}
    with pytest.raises(InputError, match="no shapes"):
        for_model([], GPU)


def test_exact_shapes_come_first_at_every_visit() -> None:
    base = base_plan(CPU, budget_s=60.0, seed=3)
    both = replace(base.joined(for_model([(m, 48, 48) for m in range(1, 9)], CPU)), visits=3)
    orders = [both.order(visit) for visit in range(3)]
    assert all({item.purpose for item in order[:8]} == {EXACT} for order in orders)
    assert all({item.operator.key for item in order} == {item.operator.key for item in both.items} for order in orders)
    assert len({tuple(item.operator.key for item in part) for order in orders for part in (order[:8], order[8:])}) == 6


def test_joined_plans_have_each_operator_once() -> None:
    base = base_plan(CPU, budget_s=60.0)
    op = next(item.operator for item in base.items if item.operator.kind == "gemm")
    both = base.joined(for_model([(op.m, op.n, op.k), (1, 48, 48)], CPU))
    keys = [item.operator.key for item in both.items]
    assert len(keys) == len(set(keys)) == len(base.items) + 1
    assert next(item for item in both.items if item.operator == op).purpose in (FIT, HOLDOUT)


@pytest.mark.parametrize("rates", [GPU, CPU, Rates(5e10, 5e9)])
def test_an_anchor_is_compute_bound_and_short(rates: Rates) -> None:
    op = anchor_operator(rates, "bf16", Protocol(min_window_s=4e-3))
    assert op.flops / rates.flop_per_s > op.bytes / rates.bytes_per_s
    assert rates.launch_s(op) < 0.01


def test_rates_name_what_is_wrong() -> None:
    for name in ("flop_per_s", "bytes_per_s", "floor_s", "setup_s", "memory_bytes"):
        with pytest.raises(ValueError, match=name):
            Rates(**{"flop_per_s": 1e12, "bytes_per_s": 1e10, name: 0.0})
