"""The GEMM fit: planted truth, intervals, priors, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from calibration.fit.gemm import GemmFit, fit_gemm, products, starting_constants
from calibration.fit.residual import FewRows, evaluate, gemm_blocks, solve
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import with_section
from simulator.operators.base import Machine
from simulator.uncertainty.operators import gemm_time

HW = load_hardware("h100_sxm")
MACHINE = Machine.of(HW, "bf16")
START = starting_constants(HW, "bf16")
PLANTED = {"t0": 2.4e-6, "e_tc": 0.72, "tau": 1.3e-7, "e_d": 0.88, "t_s": 2.0e-6}
TRUTH = {**START, **PLANTED}


def timed_by(
    data: GemmFit, truth: dict[str, float], noise: float = 0.0, seed: int = 0, **changes: Any
) -> GemmFit:
    """GEMMs, with changes to machine or copies, with the times of planted constants and log-normal
    noise."""
    rng, calls = np.random.default_rng(seed), replace(data.calls, **changes)
    return replace(
        data, calls=calls, seconds=calls.seconds(truth) * np.exp(noise * rng.normal(size=len(data)))
    )


def planted(size: int, seed: int, noise: float = 0.02) -> GemmFit:
    rng = np.random.default_rng(seed)
    m = np.ceil(2.0 ** rng.uniform(0, 13, size))
    n, k = (64.0 * np.ceil(2.0 ** rng.uniform(0, 8, size)) for _ in range(2))
    return timed_by(products(m, n, k, np.ones(size), MACHINE, np.inf), TRUTH, noise, seed + 1000)


@pytest.mark.quick
def test_planted_constants_are_recovered() -> None:
    fit = planted(1500, 3).constants(START)
    for name in PLANTED:
        assert abs(fit.values[name] - TRUTH[name]) < 3 * fit.std_errors[name] < 0.3 * TRUTH[name], (
            name
        )
    np.testing.assert_allclose(np.diag(fit.correlation), 1.0)


@pytest.mark.parametrize("pack_m", [2.0, 4.0, 8.0])
def test_where_a_cpu_begins_to_rearrange_its_weights_is_found(pack_m: float) -> None:
    hw = load_hardware("cpu")
    machine, start = Machine.of(hw, "fp32"), starting_constants(hw, "fp32")
    rng = np.random.default_rng(5)
    m = rng.choice([1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0, 64.0, 512.0], 300)
    n, k = (64.0 * np.ceil(2.0 ** rng.uniform(0, 6, 300)) for _ in range(2))
    truth = {**start, "pack": 1.4, "pack_m": pack_m, "e_d": 0.6}
    data = timed_by(products(m, n, k, np.ones(300), machine, np.inf), truth, 0.02)
    fit = data.constants(start)
    assert fit.values["pack_m"] == pack_m
    assert "pack_m" in fit.fixed
    for name in ("pack", "e_d"):
        assert abs(fit.values[name] - truth[name]) < 4 * fit.std_errors[name], name


@pytest.mark.parametrize("by_rows", [False, True])
def test_solving_by_row_equals_solving_by_node(by_rows: bool) -> None:
    data = planted(120, 2)
    target = 0.1 * np.sin(data.position[0]) + 0.05 * np.cos(data.position[1])
    prepared = gemm_blocks(data.position, by_rows)
    few, every = FewRows.of(prepared), np.arange(len(data))
    dual = few.dual(target, every, rounds=1)
    fitted = few.at(dual, every, every)
    np.testing.assert_allclose(evaluate(prepared, few.values(dual, every)), fitted, atol=1e-9)
    # the stationary point of the ridge problem: residual = dual (unit weights); by nodes: gradient
    # of data and penalty
    np.testing.assert_allclose(target - fitted, dual, atol=1e-9)
    for block, values in zip(prepared, few.values(dual, every), strict=True):
        np.testing.assert_allclose(block.matrix.T @ dual, block.penalty @ values, atol=1e-9)
    robust = evaluate(prepared, solve(prepared, target))
    assert np.abs(robust - target).mean() < 0.5 * np.abs(target).mean()
    np.testing.assert_allclose(robust, fitted, atol=0.03)


def test_fit_beats_its_analytical_model_on_a_smooth_distortion_and_its_intervals_cover() -> None:
    data = planted(900, 5, noise=0.03)
    log_m, _, log_k = data.position
    data = replace(data, seconds=data.seconds * np.exp(0.15 * np.sin(log_m) * np.cos(log_k)))
    test, section = data.take(slice(450, 900)), fit_gemm(data.take(slice(0, 450)), HW).section
    time = gemm_time(
        test.calls.m, test.calls.n, test.calls.k, HW.calibrated({("gemm", "bf16"): section})
    )
    error = np.abs(time.seconds / test.seconds - 1.0)
    assert error.mean() < 0.05  # the wobble alone is 6.6 % on average, the noise 2.4 %
    assert 0.84 <= np.mean((test.seconds >= time.lower) & (test.seconds <= time.upper)) <= 0.97
    assert section.accuracy["mape"] == pytest.approx(error.mean(), rel=0.35)


@pytest.mark.quick
def test_few_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 20 shapes, got 5"):
        fit_gemm(products(*np.ones((4, 5)), machine=MACHINE), HW)


@pytest.mark.quick
def test_l2_is_no_slower_than_dram_and_a_constant_on_its_bound_stays_there() -> None:
    slow_l2 = {**TRUTH, "b_hit": 0.4 * MACHINE.bandwidth_bytes_per_s, "c_l2": 1.0}
    fit = timed_by(planted(800, 4), slow_l2, 0.01, copies=np.ones(800)).constants(START)
    assert fit.values["b_hit"] == pytest.approx(MACHINE.bandwidth_bytes_per_s, rel=1e-9)
    assert (fit.fixed["b_hit"], fit.fitted()["b_hit"].status) == ("at its lower bound", "fixed")


@pytest.mark.quick
def test_weight_only_kernels_have_a_section_of_their_own() -> None:
    machine, start = Machine.of(HW, "int4_wo"), starting_constants(HW, "int4_wo")
    assert (machine.element_bytes, machine.weight_bytes) == (2.0, 0.5)
    assert (start["tau"], start["t0"] > START["t0"]) == (START["tau"] / 4.0, True)
    truth = {**start, "t0": 9e-6, "e_d": 0.6}
    data = timed_by(planted(300, 6), truth, 0.01, machine=machine)
    fit = fit_gemm(data, HW, dtype="int4_wo")
    assert fit.constants.values["t0"] == pytest.approx(9e-6, rel=0.05)
    with_own = with_section(HW, "int4_wo", fit.section)
    shape: dict[str, Any] = {"dtype": "bf16", "weight_dtype": "int4"}
    sizes = data.calls.m, data.calls.n, data.calls.k
    own, dense_only = (gemm_time(*sizes, hw, **shape).seconds for hw in (with_own, HW))
    assert (
        np.abs(own / data.seconds - 1.0).mean()
        < 0.03
        < np.abs(dense_only / data.seconds - 1.0).mean()
    )
    dense = (gemm_time(8, 4096, 4096, hw).seconds.item() for hw in (with_own, HW))
    assert len(set(dense)) == 1  # nothing of it is in other formats


def test_a_prior_of_another_stack_makes_a_small_sample_enough() -> None:
    other = fit_gemm(planted(600, 9), HW).section
    few, test = planted(12, 10), planted(300, 11)
    with pytest.raises(ValueError, match="at least 20 shapes, got 12"):
        fit_gemm(few, HW)
    section = fit_gemm(few, HW, prior=other).section
    sizes = test.calls.m, test.calls.n, test.calls.k
    time = gemm_time(*sizes, HW.calibrated({("gemm", "bf16"): section})).seconds
    assert np.abs(time / test.seconds - 1.0).mean() < 0.04
