"""Calibration of attention: planted constants, refusals, named constants, intervals, and the
accuracy on shipped tables."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from operator_times import decode_time, prefill_time

from calibration.evidence.measurements.wheel import datasheet
from calibration.evidence.sets import TableChoice, evaluate_table
from calibration.fit.attention import AttentionFit, fit_attention
from calibration.fit.residual import Regularisation, fit_grid
from calibration.fit.solver import FittedPart
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import HardwareProfile
from simulator.operators import CONSTANTS
from simulator.operators.attention import AttentionCalls, Geometry
from simulator.operators.base import Machine, ResidualGrid
from simulator.uncertainty.operators import OperatorTimes

HW, A100 = load_hardware("h100_sxm"), load_hardware("a100_sxm_80gb")
DEVICE = Machine.of(HW)
MOVED = {
    "prefill": {"t0_s": 7e-6, "e_tc": 0.6, "kappa": 1.4, "e_io": 0.5},
    "decode": {"t0_s": 9e-6, "unit_s": 3e-6, "e_d": 0.8},
}


def defaults(phase: str, architecture: str = "hopper") -> dict[str, float]:
    return {
        name: constant.default(architecture)
        for name, constant in CONSTANTS[f"attention_{phase}"].items()
    }


def shapes(phase: str, rows: int, seed: int) -> AttentionFit:
    rng = np.random.default_rng(seed)
    heads = rng.choice([8.0, 16.0, 32.0, 64.0], rows)
    group = rng.choice([1.0, 2.0, 4.0, 8.0], rows)
    batch = 2.0 ** rng.integers(0, 8, rows)
    length = np.round(2.0 ** rng.uniform(4, 13, rows))
    query = length if phase == "prefill" else np.ones(rows)
    size = np.full(rows, 128.0)
    geometry = Geometry(batch, query, length, heads, heads / group, size, warm=np.ones(rows))
    return AttentionFit(
        AttentionCalls(phase, False, geometry, DEVICE, DEVICE.peak_flop_per_s), np.ones(rows)
    )


def changed(c: AttentionFit, machine: Machine = DEVICE, **columns: np.ndarray) -> AttentionFit:
    """The same calls with other sizes, or on another machine."""
    return replace(
        c, calls=replace(c.calls, geometry=replace(c.calls.geometry, **columns), machine=machine)
    )


def timed(c: AttentionFit, truth: dict[str, float]) -> AttentionFit:
    return replace(c, seconds=c.calls.seconds(truth))


def planted(phase: str, rows: int, seed: int, noise: float) -> AttentionFit:
    c = timed(shapes(phase, rows, seed), defaults(phase) | MOVED[phase])
    return replace(
        c, seconds=c.seconds * np.exp(noise * np.random.default_rng(seed + 1).normal(size=rows))
    )


def shown(c: AttentionFit, fit: FittedPart, dtype: str = "bf16", **options: bool) -> np.ndarray:
    hw = replace(HW, sections={(c.calls.operator, dtype): fit.section})
    g = c.calls.geometry
    heads = g.heads, g.kv_heads, g.head_dim
    if c.calls.phase == "prefill":
        return prefill_time(g.batch, g.q_len, g.kv_len, *heads, hw, dtype=dtype).seconds
    return decode_time(g.batch, g.kv_len, *heads, hw, dtype=dtype, **options).seconds


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_planted_constants_are_recovered_and_a_profile_predicts_what_the_fit_does(
    phase: str,
) -> None:
    c = planted(phase, 400, 11, 0.02)
    truth, fit = defaults(phase) | MOVED[phase], fit_attention(c, "hopper")
    for name in (*MOVED[phase], *(["sequence_s"] if phase == "decode" else [])):
        constant = fit.section.constants[name]
        assert constant.std_error is not None, fit.fixed
        assert constant.std_error < 0.2 * constant.value
        # heads of one width do not tell products from exponentials: only their sum is known
        if name == "e_tc":
            sums = [
                4 * 128 * DEVICE.sm_count / (v["e_tc"] * DEVICE.peak_flop_per_s)
                + 1 / v["exp_per_s"]
                for v in (truth, fit.constants.values)
            ]
            assert sums[1] == pytest.approx(sums[0], rel=0.01)
        else:
            assert abs(constant.value - truth[name]) < max(
                4 * constant.std_error, 0.03 * truth[name]
            )
    assert fit.section.accuracy["mape"] < 0.03
    assert fit.section.accuracy["core_mape"] < 0.03
    assert {pair for pair in fit.correlations if "t0_s" in pair}
    error = c.log_error(fit.constants.values, ResidualGrid.from_arrays(fit.section.arrays))
    expected = c.seconds * np.exp(error)
    time = shown(c, fit, cold=False)
    assert np.median(np.abs(time / expected - 1.0)) < 1e-12
    assert np.all(time >= expected * (1 - 1e-12))  # the floors of physics may only raise it


def test_what_the_rows_cannot_tell_is_named_and_kept() -> None:
    c = planted("decode", 300, 5, 0.02)
    fit = fit_attention(c, "hopper")
    assert fit.fixed["rows"] == "structure"
    # no KV head serves more than 64 heads here
    assert fit.fixed["wide_s"] == "not identified by these rows"
    kept = fit.section.constants["wide_s"]
    assert (kept.value, kept.status) == (defaults("decode")["wide_s"], "fixed")
    # all but its fixed time: t0 can only end on its bound
    fast = replace(c, seconds=np.maximum(c.seconds - 8.9e-6, 3e-7))
    assert fit_attention(fast, "hopper").fixed["t0_s"] == "at its lower bound"


def test_rows_that_no_device_reaches_are_not_usable() -> None:
    c = planted("prefill", 60, 7, 0.02)
    seconds = c.seconds.copy()
    seconds[:3] = 1e-9
    assert replace(c, seconds=seconds).usable().seconds.tolist() == c.seconds[3:].tolist()
    with pytest.raises(ValueError, match="at least 20 usable rows, got 19 of 19"):
        fit_attention(c.take(np.arange(19)), "hopper")


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_what_was_measured_cold_in_fp32_is_predicted_so(phase: str) -> None:
    """A fit that took a rotated cache for a warm one, or four bytes for two, would agree with its
    rows, not with what is shown."""
    columns = {
        "element_bytes": np.full(300, 4.0),
        "cache_bytes": np.full(300, 4.0),
        "warm": np.zeros(300),
    }
    c = timed(changed(shapes(phase, 300, 4), Machine.of(HW, "tf32"), **columns), defaults(phase))
    times = shown(c, fit_attention(c, "hopper"), "tf32")
    assert np.median(np.abs(times / c.seconds - 1.0)) < 0.02


@pytest.mark.parametrize("rows", [1200, 3000])  # row by row, and node by node
def test_grid_fit_follows_a_smooth_residual_between_its_points(rows: int) -> None:
    def truth(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        return 0.1 * np.sin(x) + 0.05 * y - 0.02 * z

    rng = np.random.default_rng(2)
    position, other = rng.uniform(0, 6, (3, rows)), rng.uniform(0.5, 5.5, (3, 500))
    blank = ResidualGrid((0.0,) * 3, (1.0,) * 3, np.zeros((7, 7, 28)))
    noisy = truth(*position) + 0.01 * rng.normal(size=rows)
    noisy[::50] += 3.0  # outliers weigh little
    grid = fit_grid(
        blank, position, noisy, Regularisation(0.02, (0.05, 0.05, 0.03), 0.02), rounds=4
    )
    assert np.sqrt(np.mean((grid(other) - truth(*other)) ** 2)) < (0.012 if rows == 3000 else 0.02)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_intervals_on_the_same_stack_hold_nine_in_ten_held_out_rows(phase: str) -> None:
    c = planted(phase, 1200, 21, 0.05)
    fit, rest = (
        fit_attention(c.take(np.arange(600)), "hopper", fold_by=("heads",)),
        c.take(np.arange(600, 1200)),
    )
    section = replace(fit.section, stack=HW.stack)
    inside = []
    for same_stack in (True, False):
        hw = replace(HW, sections={(f"attention_{phase}", "bf16"): section}, same_stack=same_stack)
        t = timed_by(hw, rest)
        inside.append(np.mean((rest.seconds >= t.lower) & (rest.seconds <= t.upper)))
    assert 0.86 < inside[0] < 0.96
    assert inside[1] > inside[0]  # another stack may differ by far more


def kernels(rows: int) -> AttentionFit:
    """Decode of four kernels: two head widths, a window, a cache of fp8; each of another speed."""
    c = shapes("decode", 4 * rows, 31)
    kind = np.arange(4 * rows) % 4
    size, window = np.where(kind == 1, 64.0, 128.0), np.where(kind == 2, 256.0, 0.0)
    c = changed(c, head_dim=size, window=window, cache_bytes=np.where(kind == 3, 1.0, 2.0))
    seconds = np.empty(len(c))
    for i in range(4):
        truth = defaults("decode") | {
            "t0_s": (6e-6, 9e-6, 1.2e-5, 8e-6)[i],
            "e_d": (0.9, 0.7, 0.8, 0.6)[i],
        }
        seconds[kind == i] = timed(c.take(kind == i), truth).seconds
    return replace(c, seconds=seconds)


def timed_by(hw: HardwareProfile, c: AttentionFit, **options: Any) -> OperatorTimes:
    g = c.calls.geometry
    heads = g.heads, g.kv_heads, g.head_dim
    if c.calls.phase == "prefill":
        return prefill_time(g.batch, g.q_len, g.kv_len, *heads, hw, **options)
    return decode_time(g.batch, g.kv_len, *heads, hw, window=g.window, cold=False, **options)


def test_one_section_holds_kernels_of_widths_windows_and_caches_each_with_its_own_speed() -> None:
    c = kernels(300)
    fit = fit_attention(c, "hopper")
    assert fit.rows == 1200
    assert fit.section.accuracy["mape"] < 0.03
    assert fit.section.arrays["kinds"].tolist() == [[7, 0, 0], [6, 0, 0], [7, 0, 1], [7, 1, 0]]
    assert fit.constants.values["t0_s"] == pytest.approx(6e-6, rel=0.02)
    hw = replace(HW, sections={("attention_decode", "bf16"): fit.section})
    for narrow, cache in ((False, "bf16"), (True, "fp8")):  # all widths and windows in one call
        rows = c.take((c.calls.geometry.cache_bytes == 1.0) == narrow)
        assert np.abs(timed_by(hw, rows, kv_dtype=cache).seconds / rows.seconds - 1.0).mean() < 0.02
    fitted, other = (decode_time(8, 4096, 32, 8, dim, hw) for dim in (128, 96))
    # no kernel of 96 features was fitted
    assert other.upper / other.lower > fitted.upper / fitted.lower
    few = changed(c, cache_bytes=np.where(np.arange(1200) < 15, 1.0, 2.0))
    assert fit_attention(few, "hopper").rows < 1200  # fewer than 20 rows of their kernel


@pytest.mark.parametrize(
    ("measurement", "mape"),
    [
        ("a100_sxm/attention_prefill/trtllm", 3.0),
        ("h100_sxm/attention_prefill/sglang", 5.5),
        ("a100_sxm/attention_decode/sglang", 5.0),
        ("h100_sxm/attention_decode/sglang", 4.5),
    ],
)
def test_accuracy_on_unseen_heads_at_400_rows(measurement: str, mape: float) -> None:
    table = TableChoice(measurement).load()
    one_width = table.take(table.data.calls.geometry.head_dim == 128)  # 400 rows of one kernel
    result = evaluate_table(one_width, 400, 0, "heads")
    assert 100.0 * result["mape"] < mape
    assert 100.0 * result["speedup median"] < 4.5


@pytest.mark.parametrize("tile", [0.0, 16.0, 128.0])
def test_tiles_of_decode_are_found_where_products_show_and_only_there(tile: float) -> None:
    """An H20 has an eighth of the H100's FLOP per byte: products of padded rows take as long as
    reading the cache."""
    machine = Machine.of(datasheet("h20"))
    truth = defaults("decode") | {"tile_rows": tile, "e_tc": 0.6}
    c = timed(changed(shapes("decode", 300, 3), machine), truth)
    fit = fit_attention(replace(c, calls=replace(c.calls, machine=machine)), "hopper")
    if tile:
        assert fit.constants.values["tile_rows"] == tile
        assert fit.constants.values["e_tc"] == pytest.approx(0.6, rel=0.02)
    elsewhere = timed(shapes("decode", 300, 3), defaults("decode"))
    assert fit_attention(elsewhere, "hopper").constants.values["tile_rows"] == 0.0


def latent_calls(rows: int, form: dict[str, float]) -> AttentionFit:
    """Decode over a latent cache of a kernel of some structure."""
    rng = np.random.default_rng(3)
    heads, batch = 2.0 ** rng.integers(0, 8, rows), 2.0 ** rng.integers(0, 10, rows)
    length, one = np.round(2.0 ** rng.uniform(4, 15, rows)), np.ones(rows)
    shape = batch, one, length, heads, one, 576.0 * one
    geometry = Geometry(*shape, value_dim=512.0 * one, latent=True, warm=one)
    calls = AttentionCalls(
        "decode", True, geometry, Machine.of(A100), Machine.of(A100).peak_flop_per_s
    )
    truth = {
        name: constant.default("ampere") for name, constant in CONSTANTS["mla_decode"].items()
    } | form
    return AttentionFit(calls, calls.seconds(truth) * np.exp(0.01 * rng.normal(size=rows)))


@pytest.mark.parametrize(("rows", "split_keys"), [(64.0, 128.0), (16.0, 1e6)])
def test_whether_a_kernel_splits_a_cache_is_found(rows: float, split_keys: float) -> None:
    c = latent_calls(
        400, {"rows": rows, "split_keys": split_keys, "e_d": 0.7, "unit_bytes_per_s": 2e10}
    )
    fit = fit_attention(c, "ampere", fold_by=("heads",))
    assert (fit.section["rows"], fit.section["split_keys"]) == (rows, split_keys)
    assert fit.section["e_d"] == pytest.approx(0.7, rel=0.05)
    assert fit.section["unit_bytes_per_s"] == pytest.approx(2e10, rel=0.05)
    assert fit.section.arrays["kinds"].tolist() == [[pytest.approx(np.log2(576)), 0, 0]]
    hw = A100.calibrated({("mla_decode", "bf16"): fit.section})
    g = c.calls.geometry
    t = decode_time(
        g.batch,
        g.kv_len,
        g.heads,
        g.kv_heads,
        g.head_dim,
        hw,
        value_dim=512,
        latent=True,
        cold=False,
    )
    assert np.abs(t.seconds / c.seconds - 1.0).mean() < 0.02


@pytest.mark.parametrize(("operator", "mape"), [("mla_prefill", 0.075), ("mla_decode", 0.05)])
def test_latent_accuracy_on_unseen_lengths_of_the_shipped_tables(
    operator: str, mape: float
) -> None:
    result = evaluate_table(TableChoice(f"a100_sxm/{operator}/trtllm").load(), 400, 0, "lengths")
    assert result["mape"] < mape
    assert result["coverage"] > 0.85
