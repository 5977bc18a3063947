"""The GEMM fit: planted truth, intervals, priors, anchoring, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from calibration.fit.conformal import few_groups, neighbours, outer_bands, quantiles
from calibration.fit.core import Shapes, bootstrap, fit_constants, free_constants, shapes, timed
from calibration.fit.gemm import accuracy, anchor_gemm, fit_gemm, starting_constants
from calibration.fit.residual import FEW, FEW_OWN, FewRows, blocks, evaluate, solve
from simulator.hardware.library import load_hardware
from simulator.kernels.gemm import gemm_time, with_section
from simulator.kernels.gemm_core import Machine, machine_core

HW = load_hardware("h100_sxm")
MACHINE = Machine.of(HW, "bf16")
START = starting_constants(HW, "bf16")
PLANTED = {"t0": 2.4e-6, "e_tc": 0.72, "tau": 1.3e-7, "e_d": 0.88, "t_s": 2.0e-6}
TRUTH = {**START, **PLANTED}


def planted(size: int, seed: int, noise: float = 0.02) -> Shapes:
    rng = np.random.default_rng(seed)
    m = np.ceil(2.0 ** rng.uniform(0, 13, size))
    n, k = (64.0 * np.ceil(2.0 ** rng.uniform(0, 8, size)) for _ in range(2))
    empty = shapes(m, n, k, np.ones(size), MACHINE, np.inf)
    seconds = 1e-6 * timed(empty, MACHINE, TRUTH).total_us * np.exp(noise * rng.normal(size=size))
    return replace(empty, seconds=seconds)


def test_planted_constants_are_recovered_and_a_bootstrap_agrees_with_their_errors() -> None:
    fit = fit_constants(planted(1500, 3), MACHINE, START, tuple(PLANTED))
    assert set(fit.std_errors) == set(PLANTED)
    for name, error in fit.std_errors.items():
        assert abs(fit.values[name] - TRUTH[name]) < 3 * error, name
        assert error < 0.1 * TRUTH[name], name
    np.testing.assert_allclose(np.diag(fit.correlation), 1.0)
    data = planted(400, 1)
    fit = fit_constants(data, MACHINE, START, ("t0", "e_tc", "e_d"))
    spread = bootstrap(data, MACHINE, fit, repeats=20)
    for name, error in fit.std_errors.items():
        assert 0.3 < spread[name] / (error / fit.values[name]) < 3.0, name


@pytest.mark.parametrize("pack_m", [2.0, 4.0, 8.0])
def test_where_a_cpu_begins_to_rearrange_its_weights_is_found(pack_m: float) -> None:
    hw = load_hardware("cpu")
    machine, start = Machine.of(hw, "fp32"), starting_constants(hw, "fp32")
    rng = np.random.default_rng(5)
    m = rng.choice([1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0, 64.0, 512.0], 300)
    n, k = (64.0 * np.ceil(2.0 ** rng.uniform(0, 6, 300)) for _ in range(2))
    truth = {**start, "pack": 1.4, "pack_m": pack_m, "e_d": 0.6}
    empty = shapes(m, n, k, np.ones(300), machine, np.inf)
    data = replace(empty, seconds=1e-6 * timed(empty, machine, truth).total_us * np.exp(0.02 * rng.normal(size=300)))
    fit = fit_constants(data, machine, start)
    assert fit.values["pack_m"] == pack_m
    assert "pack_m" in fit.fixed
    for name in ("pack", "e_d"):
        assert abs(fit.values[name] - truth[name]) < 4 * fit.std_errors[name], name


@pytest.mark.slow
def test_intervals_of_planted_constants_cover() -> None:
    hits = []
    for seed in range(400):
        fit = fit_constants(planted(200, seed), MACHINE, START, tuple(PLANTED))
        hits += [abs(np.log(fit.values[x] / TRUTH[x])) < 1.96 * e / fit.values[x] for x, e in fit.std_errors.items()]
    assert 0.92 <= np.mean(hits) <= 0.98


def test_constant_without_a_shape_in_its_regime_is_named_and_kept() -> None:
    data = planted(600, 0)
    fit = fit_constants(data.take((data.m >= 1024) & (data.n >= 4096) & (data.k >= 4096)), MACHINE, START)
    assert "b_hit" in fit.fixed  # cold weights, compute-bound: nothing waits for L2
    assert fit.values["b_hit"] == START["b_hit"]
    assert fit.fitted()["b_hit"].status == "fixed"
    assert not set(fit.fixed) & set(fit.std_errors)


def test_solving_by_row_equals_solving_by_node() -> None:
    data = planted(120, 2)
    target = 0.1 * np.sin(np.log2(data.m)) + 0.05 * np.cos(np.log2(data.n))
    parts = timed(data, MACHINE, TRUTH)
    prepared = blocks(data, parts, machine_core(MACHINE, TRUTH), (("time", "nk"),), data.m, FEW, FEW_OWN)
    few, every = FewRows.of(prepared), np.arange(len(data))
    dual = few.dual(target, every, rounds=1)
    fitted = few.at(dual, every, every)
    np.testing.assert_allclose(evaluate(prepared, few.values(dual, every)), fitted, atol=1e-9)
    # the stationary point of the ridge problem: residual = dual (unit weights); by nodes: gradient of data and penalty
    np.testing.assert_allclose(target - fitted, dual, atol=1e-9)
    for block, values in zip(prepared, few.values(dual, every), strict=True):
        np.testing.assert_allclose(block.matrix.T @ dual, block.penalty @ values, atol=1e-9)
    robust = evaluate(prepared, solve(prepared, target))
    assert np.abs(robust - target).mean() < 0.5 * np.abs(target).mean()
    np.testing.assert_allclose(robust, fitted, atol=0.03)


def test_fit_beats_its_core_on_a_smooth_distortion_and_its_intervals_cover() -> None:
    data = planted(900, 5, noise=0.0)
    wobble = np.exp(0.15 * np.sin(np.log2(data.m)) * np.cos(np.log2(data.k)))
    rng = np.random.default_rng(0)
    data = replace(data, seconds=data.seconds * wobble * np.exp(0.03 * rng.normal(size=len(data))))
    train, test = data.take(slice(0, 450)), data.take(slice(450, 900))
    found = fit_gemm(train.m, train.n, train.k, train.seconds, HW, copies=np.inf)
    time = gemm_time(test.m, test.n, test.k, with_section(HW, "bf16", found.section))
    error = np.abs(time.seconds / test.seconds - 1.0)
    assert error.mean() < 0.05  # the wobble alone is 6.6 % on average, the noise 2.4 %
    inside = (test.seconds >= time.lower) & (test.seconds <= time.upper)
    assert 0.84 <= inside.mean() <= 0.97
    assert found.section.status == "calibrated"
    assert found.section.accuracy["mape"] == pytest.approx(error.mean(), rel=0.35)


def test_anchoring_moves_a_section_to_another_stack() -> None:
    data = planted(700, 7, noise=0.01)
    shipped = fit_gemm(data.m, data.n, data.k, data.seconds, HW, copies=np.inf).section
    other = replace(data, seconds=1e-6 * timed(data, MACHINE, {**TRUTH, "e_tc": 0.6, "t0": 3.5e-6}).total_us)
    few, rest = other.take(slice(0, 40)), other.take(slice(40, 700))
    moved = anchor_gemm(shipped, few.m, few.n, few.k, few.seconds, HW, copies=np.inf).section
    before, after = (
        np.abs(gemm_time(rest.m, rest.n, rest.k, with_section(HW, "bf16", s)).seconds / rest.seconds - 1).mean()
        for s in (shipped, moved)
    )
    assert after < min(0.3 * before, 0.03)
    with pytest.raises(ValueError, match="at least 10 shapes, got 9"):
        anchor_gemm(shipped, *(np.full(9, 64.0) for _ in range(4)), HW)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seconds": np.full(30, np.nan)}, "30 of 30"),
        ({"seconds": np.r_[0.0, np.ones(29)]}, "1 of 30"),
        ({"m": np.zeros(30)}, "at least 1"),
        ({"m": np.ones(29)}, "equal lengths"),
        (dict.fromkeys(("m", "n", "k", "seconds"), np.ones(5)), "at least 20 shapes, got 5"),
    ],
)
def test_bad_arrays_are_refused_with_counts(change: dict[str, np.ndarray], message: str) -> None:
    good = {"m": np.ones(30), "n": np.full(30, 64.0), "k": np.full(30, 64.0), "seconds": np.full(30, 1e-5)}
    with pytest.raises(ValueError, match=message):
        fit_gemm(**{**good, **change}, hw=HW)


def test_neighbours_differ_in_one_dimension_by_at_most_four() -> None:
    m, n, k = np.array([[1, 2, 8, 2, 2], [64, 64, 64, 128, 64], [64, 64, 64, 64, 32]], dtype=float)
    data = Shapes(m, n, k, np.ones(5), np.ones(5))
    assert sorted(map(tuple, neighbours(data).tolist())) == [(0, 1), (1, 2), (1, 3), (4, 1)]


def test_small_helpers() -> None:
    errors = np.linspace(-1, 1, 2001)
    assert quantiles(errors) == pytest.approx((-0.9, 0.9), abs=0.01)
    band, rare = outer_bands(errors, np.r_[np.zeros(1990, dtype=int), np.ones(11, dtype=int)], ("many", "few"))
    assert (band.rows, rare.rows) == (1990, 11)
    assert (rare.low, rare.high) == pytest.approx((np.exp(-0.9), np.exp(0.9)), rel=0.01)  # those of all rows
    biased = outer_bands(np.full(50, 0.5), np.zeros(50, dtype=int), ("all",))[0]
    assert (biased.low, biased.high) == pytest.approx((np.exp(-0.5), 1.0))
    assert few_groups(2) > few_groups(10) > few_groups(1000) > 1
    assert accuracy(np.log([1.1, 0.9]), np.array([1.0, 300.0]))["mape"] == pytest.approx(0.1)
    hopper, ampere = (free_constants(Machine.of(load_hardware(g), "bf16")) for g in ("h100", "a100"))
    assert set(ampere) - set(hopper) == {"b_l2"}
