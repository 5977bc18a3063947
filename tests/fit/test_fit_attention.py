"""Calibration of attention: planted constants, refusals, named constants, intervals, and the accuracy on shipped
tables."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from calibration.fit.attention import REGISTRY, Columns, core_of, fit_attention, predict, usable, work_of
from calibration.fit.residual import Stiffness, fit_lattice
from calibration.judge.protocol_attention import score
from simulator.hardware.library import load_hardware
from simulator.kernels.attention import REGIMES, decode_attention_time, prefill_attention_time
from simulator.kernels.gemm_core import Machine
from simulator.kernels.lattice import Lattice

HW = load_hardware("h100_sxm")
DEVICE = Machine.of(HW)
MOVED = {
    "prefill": {"t0_s": 7e-6, "e_tc": 0.6, "kappa": 1.4, "e_io": 0.5},
    "decode": {"t0_s": 9e-6, "unit_s": 3e-6, "e_d": 0.8},
}


def defaults(phase: str, architecture: str = "hopper") -> dict[str, float]:
    return {name: constant.default(architecture) for name, constant in REGISTRY[phase].items()}


def shapes(phase: str, rows: int, seed: int) -> Columns:
    rng = np.random.default_rng(seed)
    heads = rng.choice([8.0, 16.0, 32.0, 64.0], rows)
    group = rng.choice([1.0, 2.0, 4.0, 8.0], rows)
    batch = 2.0 ** rng.integers(0, 8, rows)
    length = np.round(2.0 ** rng.uniform(4, 13, rows))
    query = length if phase == "prefill" else np.ones(rows)
    return Columns(batch, query, length, heads, heads / group, rng.choice([64.0, 128.0], rows), np.ones(rows))


def timed(phase: str, c: Columns, truth: dict[str, float], device: object = DEVICE) -> Columns:
    return replace(c, seconds=core_of(phase, work_of(phase, c, truth), device, truth).total_s)


def planted(phase: str, rows: int, seed: int, noise: float) -> Columns:
    c = timed(phase, shapes(phase, rows, seed), defaults(phase) | MOVED[phase])
    rng = np.random.default_rng(seed + 1)
    return replace(c, seconds=c.seconds * np.exp(noise * rng.normal(size=rows)))


def shown(phase: str, c: Columns, fit: object, dtype: str = "bf16", **options: bool) -> np.ndarray:
    hw = replace(HW, sections={(f"attention_{phase}", dtype): fit.section})  # type: ignore[attr-defined]
    heads = c.heads, c.kv_heads, c.head_dim
    if phase == "prefill":
        return prefill_attention_time(c.batch, c.q_len, c.kv_len, *heads, hw, dtype=dtype).seconds
    return decode_attention_time(c.batch, c.kv_len, *heads, hw, dtype=dtype, **options).seconds


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_planted_constants_are_recovered_and_a_profile_predicts_what_the_fit_does(phase: str) -> None:
    c = planted(phase, 400, 11, 0.02)
    truth, fit = defaults(phase) | MOVED[phase], fit_attention(phase, c, DEVICE, "hopper")
    for name in (*MOVED[phase], *(["sequence_s"] if phase == "decode" else [])):
        constant = fit.section.constants[name]
        assert constant.std_error is not None, fit.fixed
        assert constant.std_error < 0.2 * constant.value
        assert abs(constant.value - truth[name]) < 4 * constant.std_error
    assert fit.section.accuracy["mape"] < 0.03
    assert fit.section.accuracy["core_mape"] < 0.03
    assert {pair for pair in fit.correlations if "t0_s" in pair}
    expected, _ = predict(phase, c, DEVICE, fit.constants.values, Lattice.from_arrays(fit.section.arrays))
    time = shown(phase, c, fit, cold=False)
    assert np.median(np.abs(time / expected - 1.0)) < 1e-12
    assert np.all(time >= expected * (1 - 1e-12))  # the floors of physics may only raise it


def test_what_the_rows_cannot_tell_is_named_and_kept() -> None:
    c = planted("decode", 300, 5, 0.02)
    fit = fit_attention("decode", c, DEVICE, "hopper")
    assert fit.fixed["rows"] == "structure"
    assert fit.fixed["wide_s"] == "not identified by these rows"  # no KV head serves more than 64 heads here
    kept = fit.section.constants["wide_s"]
    assert (kept.value, kept.status) == (defaults("decode")["wide_s"], "fixed")
    # all but its fixed time: t0 can only end on its bound
    fast = replace(c, seconds=np.maximum(c.seconds - 8.9e-6, 3e-7))
    assert fit_attention("decode", fast, DEVICE, "hopper").fixed["t0_s"] == "on its lower bound"


def test_unusable_rows_are_counted_by_reason() -> None:
    c = planted("prefill", 60, 7, 0.02)
    seconds, kv_heads, batch = c.seconds.copy(), c.kv_heads.copy(), c.batch.copy()
    seconds[:3] = [np.nan, 0.0, -1.0]
    kv_heads[3], batch[4], seconds[5] = 3.0, 0.0, 1e-9
    good, counts = usable("prefill", replace(c, seconds=seconds, kv_heads=kv_heads, batch=batch), DEVICE)
    assert good.tolist() == [False] * 6 + [True] * 54
    assert sum(counts.values()) == 6
    assert counts["the time is not positive"] == 2
    assert counts["a value is not finite"] == 1
    assert "heads are no multiple of KV heads" in counts
    with pytest.raises(ValueError, match="at least 20 usable rows, got 19"):
        fit_attention("prefill", c.take(np.arange(19)), DEVICE, "hopper")


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_what_was_measured_cold_in_fp32_is_predicted_so(phase: str) -> None:
    """A fit that took a rotated cache for a warm one, or four bytes for two, would agree with its rows, not with what
    is shown."""
    c = replace(shapes(phase, 300, 4), element_bytes=np.full(300, 4.0), warm=np.zeros(300))
    device = Machine.of(HW, "tf32")
    c = timed(phase, c, defaults(phase), device)
    times = shown(phase, c, fit_attention(phase, c, device, "hopper"), "tf32")
    assert np.median(np.abs(times / c.seconds - 1.0)) < 0.02


def test_few_rows_keep_the_lattice_only_where_it_helps() -> None:
    c = planted("decode", 40, 21, 0.15)  # noise that a lattice could only learn by heart
    assert not fit_attention("decode", c, DEVICE, "hopper").section.arrays
    smooth = planted("decode", 40, 21, 0.0).seconds * np.where(c.heads / c.kv_heads > 1.0, 1.6, 1.0)
    assert fit_attention("decode", replace(c, seconds=smooth), DEVICE, "hopper").section.arrays


def test_a_cpu_takes_longer_over_a_cache_that_several_heads_share() -> None:
    c = replace(shapes("decode", 200, 8), warm=np.zeros(200))
    c = timed("decode", c, defaults("decode", "cpu") | {"regroup": 0.6})
    assert fit_attention("decode", c, DEVICE, "cpu").constants.values["regroup"] == pytest.approx(0.6, abs=0.1)
    assert fit_attention("decode", c, DEVICE, "hopper").constants.values["regroup"] == 0.0


def test_rows_that_beat_dram_are_kept_only_while_l2_could_hold_them() -> None:
    columns = [1, 64], [1, 1], [8192, 8192], [32, 32], [8, 8], [128, 128], [1.2e-5, 2e-4]
    good, counts = usable("decode", Columns(*(np.array(x, dtype=float) for x in columns)), DEVICE)
    assert good.tolist() == [True, False]
    assert list(counts) == ["faster than bytes / bandwidth with more bytes than the L2 holds"]


@pytest.mark.parametrize("rows", [1200, 3000])  # row by row, and node by node
def test_lattice_fit_follows_a_smooth_residual_between_its_points(rows: int) -> None:
    def truth(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        return 0.1 * np.sin(x) + 0.05 * y - 0.02 * z

    rng = np.random.default_rng(2)
    place, other = rng.uniform(0, 6, (3, rows)), rng.uniform(0.5, 5.5, (3, 500))
    blank = Lattice((0.0,) * 3, (1.0,) * 3, np.zeros((7, 7, 28)))
    noisy = truth(*place) + 0.01 * rng.normal(size=rows)
    noisy[::50] += 3.0  # outliers weigh little
    lattice = fit_lattice(blank, place, noisy, Stiffness(0.02, (0.05, 0.05, 0.03), 0.02), rounds=4)
    assert np.sqrt(np.mean((lattice(other) - truth(*other)) ** 2)) < (0.012 if rows == 3000 else 0.02)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_intervals_hold_nine_in_ten_unseen_rows(phase: str) -> None:
    c = planted(phase, 1200, 21, 0.05)
    fit = fit_attention(phase, c.take(np.arange(600)), DEVICE, "hopper", fold_by=("heads",))
    rest, intervals = c.take(np.arange(600, 1200)), fit.section.intervals
    predicted, regime = predict(phase, rest, DEVICE, fit.constants.values, Lattice.from_arrays(fit.section.arrays))
    low, high = (np.array([getattr(i, side) for i in intervals])[regime] for side in ("low", "high"))
    assert [i.regime for i in intervals] == list(REGIMES)
    assert 0.86 < np.mean((rest.seconds >= predicted * low) & (rest.seconds <= predicted * high)) < 0.95


@pytest.mark.parametrize(
    ("phase", "table", "mape"),
    [
        ("prefill", "a100_sxm/attention_prefill/trtllm", 0.03),
        ("prefill", "h100_sxm/attention_prefill/sglang", 0.055),
        ("decode", "a100_sxm/attention_decode/sglang", 0.05),
        ("decode", "h100_sxm/attention_decode/sglang", 0.045),
    ],
)
def test_accuracy_on_unseen_heads_at_400_rows(phase: str, table: str, mape: float) -> None:
    pytest.importorskip("pyarrow")
    from calibration.fit.attention import columns_of
    from calibration.measurements import load_measurements

    hw = load_hardware("a100_sxm_80gb" if table.startswith("a100") else "h100_sxm")
    c = columns_of(load_measurements(table, dtype="bf16"))
    result = score(phase, c.take(c.head_dim == 128), Machine.of(hw), hw.architecture, "heads", 400, 0)
    assert result["mape"] < mape
    assert result["roofline"] > 0.5
    assert result["speedup_median"] < 0.045


def test_a_fit_of_400_rows_is_quick() -> None:
    c, best = planted("decode", 400, 2, 0.05), float("inf")
    for _ in range(3):
        began = time.process_time()
        fit_attention("decode", c, DEVICE, "hopper")
        best = min(best, time.process_time() - began)
    assert best < 6.0  # under 2 s on an idle core; the rest is room for a busy machine
