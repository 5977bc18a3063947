"""Plans: they fit the budget, spread over the space, hold out groups, and are the same for the same
seed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from calibration.devices.protocol import OPERATORS, RECURRENT, Operator
from calibration.measure.plan import (
    EXACT,
    FIT,
    HOLDOUT,
    SHARES,
    MeasurementPlan,
    Rates,
    base_plan,
    in_order,
    next_rows,
)
from calibration.measure.timing import Protocol
from calibration.runners.runs import target_operators, target_workloads
from simulator.codes import Kernel, Kind
from simulator.errors import InputError
from simulator.hardware.library import load_hardware
from simulator.prediction.batch import batch_with
from simulator.uncertainty import factors
from simulator.uncertainty.forward import forward_passes

GPU = Rates(8e14, 2.5e12, 3e-6, 0.02, 70e9)
SLOW = Rates(5e10, 4e9, 2e-5, 0.3, 8e9)
CPU = Rates(2e12, 2.5e10, 3e-6, 0.1, 8e9)


@pytest.fixture(scope="module")
def plan() -> MeasurementPlan:
    return base_plan(GPU, budget_s=600.0, seed=0)


def _gemms(plan: MeasurementPlan) -> list[Operator]:
    return [item.operator for item in plan.items if item.operator.kind == "gemm"]


def seconds(plan: MeasurementPlan) -> float:
    return sum(item.cost_s for item in plan.items)


@pytest.mark.parametrize(("rates", "budget_s"), [(GPU, 20.0), (GPU, 900.0), (CPU, 120.0)])
def test_the_estimate_fits_the_budget_and_uses_it(rates: Rates, budget_s: float) -> None:
    made = base_plan(rates, budget_s=budget_s, protocol=Protocol(time_limit_s=0.5))
    assert 0.85 * budget_s <= seconds(made) <= budget_s


def test_a_plan_has_every_kind_of_operator_and_keeps_the_shares_of_the_budget(
    plan: MeasurementPlan,
) -> None:
    assert {item.operator.kind for item in plan.items} == set(OPERATORS)
    kinds = ("gemm", "elementwise", "attention_decode")
    spent = {
        kind: sum(item.cost_s for item in plan.items if item.operator.kind == kind)
        for kind in kinds
    }
    assert spent["gemm"] >= 0.9 * SHARES["gemm"] * 600.0
    for kind in ("elementwise", "attention_decode"):
        assert spent[kind] == pytest.approx(SHARES[kind] * 600.0, rel=0.2)


@pytest.mark.parametrize(
    ("rates", "budget_s"), [(SLOW, 12.0), (SLOW, 33.0), (CPU, 12.0), (GPU, 20.0)]
)
@pytest.mark.parametrize("seed", range(3))
def test_a_plan_begins_with_each_kind_of_operator_even_on_a_slow_machine(
    rates: Rates, budget_s: float, seed: int
) -> None:
    """The share of an operator in a short budget can be shorter than one execution on a slow
    machine. Each operator is planned nevertheless."""
    made = base_plan(
        rates, budget_s=budget_s, seed=seed, protocol=Protocol(time_limit_s=0.25 / 3.0)
    )
    exact = in_order([Operator("gemm", m=m, n=48, k=48) for m in (1, 2)], rates).items
    both = replace(made, items=(*exact, *made.items), visits=3)
    orders = [both.order(visit) for visit in range(3)]
    for order in orders:
        assert {item.purpose for item in order[:2]} == {EXACT}
        assert {item.operator.key for item in order} == {item.operator.key for item in both.items}
        kinds = [item.operator.kind for item in order[2:]]
        assert len(set(kinds)) == len(set(kinds[: len(set(kinds))]))
        rare = {"gemm_2to4", "attention_block_sparse", "indexer", *RECURRENT}
        assert set(kinds) >= {*OPERATORS} - rare
        assert not {"indexer", *RECURRENT} & {*kinds}  # a plan below a minute omits them
    assert len({tuple(item.operator.key for item in order) for order in orders}) == 3
    assert seconds(made) <= budget_s
    assert _gemms(made)


def test_gemms_are_spread_over_the_whole_space(plan: MeasurementPlan) -> None:
    gemms = _gemms(plan)
    for name, least in (("m", 10.0), ("n", 8.0), ("k", 7.5)):
        values = np.log2([getattr(op, name) for op in gemms])
        assert np.ptp(values) >= least, name
        counts, _ = np.histogram(values, bins=5)
        assert counts.min() >= 0.04 * len(values), (name, counts)


def test_groups_are_held_out_whole_and_a_fifth_of_them_and_have_several_m(
    plan: MeasurementPlan,
) -> None:
    gemms = [item for item in plan.items if item.operator.kind == "gemm"]
    held = {item.operator.group for item in gemms if item.purpose == HOLDOUT}
    fitted = {item.operator.group for item in gemms if item.purpose == FIT}
    assert not held & fitted
    assert len(held) / len(held | fitted) == pytest.approx(0.2, abs=0.02)
    shapes = {(op.group, op.m) for op in _gemms(plan)}
    # values of m in a group
    assert np.median([*Counter(group for group, _ in shapes).values()]) >= 3


def test_a_short_plan_has_enough_attention_of_one_head_width_for_a_fit() -> None:
    items = base_plan(CPU, budget_s=200.0, dtype="fp32", seed=2).items
    for kind in ("attention_prefill", "attention_decode"):
        widths = [item.operator.head_dim for item in items if item.operator.kind == kind]
        assert len(widths) >= 20
        assert max(Counter(widths).values()) / len(widths) > 0.9


def test_the_same_seed_gives_the_same_plan() -> None:
    first, again, other = (base_plan(CPU, budget_s=60.0, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first != other
    assert [item.operator.key for item in first.items] != sorted(
        item.operator.key for item in first.items
    )


def test_what_a_device_refuses_is_not_planned_and_its_time_goes_to_gemms() -> None:
    made = base_plan(CPU, budget_s=100.0, refuses=lambda op: "no" if op.kind != "gemm" else "")
    assert {item.operator.kind for item in made.items} == {"gemm"}
    assert seconds(made) >= 85.0


def test_shapes_too_slow_or_too_large_are_left_out() -> None:
    small = Rates(1e11, 1e10, 1e-6, 0.05, memory_bytes=1e8)
    made = base_plan(small, budget_s=200.0, protocol=Protocol(time_limit_s=0.6))
    assert max(small.launch_s(item.operator) for item in made.items) <= 0.05
    assert max(item.operator.footprint_bytes for item in made.items) <= 1e8


def test_a_budget_for_not_one_gemm_is_refused() -> None:
    with pytest.raises(InputError, match="too short for one GEMM in bf16"):
        base_plan(CPU, budget_s=0.01)


def test_in_order_takes_exactly_the_operators_given() -> None:
    shapes = [(2048, 14336, 4096), (1, 4096, 4096), (2048, 14336, 4096)]
    gemms = [Operator("gemm", "fp16", m=m, n=n, k=k) for m, n, k in shapes]
    attention = Operator(
        "attention_decode", "fp16", batch=1, q_len=1, kv_len=64, heads=2, kv_heads=1, head_dim=8
    )
    made = in_order([*gemms, attention], GPU)
    assert [item.operator for item in made.items] == [*gemms[:2], attention]
    assert [item.purpose for item in made.items] == [EXACT, EXACT, FIT]
    with pytest.raises(InputError, match="expected at least one operator"):
        in_order([], GPU)


SPARSE: dict[str, Any] = {
    "kind": "attention_block_sparse",
    "batch": 1,
    "heads": 8,
    "kv_heads": 2,
    "head_dim": 64,
}


def _sparse(block: int, length: int) -> Operator:
    return Operator(block=block, q_len=length, kv_len=length, density=0.5, **SPARSE)


def test_flex_attention_is_compiled_once_per_configuration() -> None:
    rates = replace(GPU, compile_s=15.0)
    lengths = [_sparse(block, length) for block in (64, 128) for length in (512, 1024, 2048)]
    gemm = Operator("gemm", m=1, n=64, k=64)
    plain, compiled = in_order([gemm, *lengths], GPU), in_order([gemm, *lengths], rates)
    assert seconds(compiled) == pytest.approx(seconds(plain) + 30.0)
    assert rates.cost_s(gemm, Protocol()) == GPU.cost_s(gemm, Protocol())


def test_gemms_chosen_for_a_model_narrow_its_speedup_more_than_random_ones() -> None:
    families = ("depth", "width", "width_cross", "low_rank")
    dense, *pruned = target_workloads("llama-3.1-8b", families, (0.25, 0.5), {})[0]
    hw = load_hardware("h100_sxm")
    batch = batch_with(dense, pruned)
    p = forward_passes(batch, hw)
    shapes, _ = batch.shapes
    at = np.flatnonzero((shapes.kind == Kind.GEMM) & (shapes.kernel == Kernel.DENSE))
    sizes = np.stack([shapes.m, shapes.n, shapes.k], axis=1)[at]
    at = at[np.sort(np.unique(sizes, axis=0, return_index=True)[1])]
    rows, kind = factors.in_order(p.errors, len(shapes)).take(at), shapes.kind[at].astype(np.intp)
    systematic = rows.wide()
    covariance = p.uncertainty.covariance(systematic, rows.correlated, rows.coordinates, kind)
    targets = (covariance[batch.dense] - covariance)[1:]
    similar = factors.correlation(rows.coordinates, rows.coordinates)
    similar = similar * np.outer(rows.correlated, rows.correlated)
    common = systematic @ systematic.T + similar + np.diag(rows.independent)

    def told(chosen: Any) -> float:
        """Variance of the speedups that a measurement of some rows removes."""
        of = targets[:, chosen]
        return float(np.einsum("ti,ij,tj->", of, np.linalg.inv(common[np.ix_(chosen, chosen)]), of))

    chosen = next_rows(rows, kind, targets, 10)
    assert len(set(chosen)) == 10
    random = [
        told(np.random.default_rng(seed).choice(len(at), 10, replace=False)) for seed in range(20)
    ]
    every = told(np.arange(len(at)))
    assert every - told(chosen) < 0.5 * (every - np.mean(random))
    assert told(chosen) > max(random)
    first = [(op.m, op.n, op.k) for op in target_operators([[dense, *pruned]], hw)[:10]]
    names = ("m", "n", "k")
    assert first == [tuple(int(getattr(shapes, x)[at[i]]) for x in names) for i in chosen]
