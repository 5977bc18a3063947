"""Calibration of attention: planted constants, refusals, named constants, intervals, and the accuracy on shipped tables."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from calibration.fit.attention import fit_attention, predict, registry
from calibration.fit.attention_columns import Columns, core_of, device_of, residual_coordinates, usable, work_of
from calibration.fit.attention_lattice import Smoothing, fit_lattice
from calibration.judge.protocol_attention import score
from simulator.hardware.library import load_hardware
from simulator.kernels.attention import REGIMES, decode_attention_time, prefill_attention_time
from simulator.kernels.attention_residual import Lattice

HW = load_hardware("h100_sxm")
DEVICE = device_of(HW)


def shapes(phase: str, rows: int, seed: int) -> Columns:
    rng = np.random.default_rng(seed)
    heads = rng.choice([8.0, 16.0, 32.0, 64.0], rows)
    group = rng.choice([1.0, 2.0, 4.0, 8.0], rows)
    batch = 2.0 ** rng.integers(0, 8, rows)
    length = np.round(2.0 ** rng.uniform(4, 13, rows))
    query = length if phase == "prefill" else np.ones(rows)
    return Columns(batch, query, length, heads, heads / group, rng.choice([64.0, 128.0], rows), np.ones(rows))


def planted(phase: str, rows: int, seed: int, noise: float) -> tuple[Columns, dict[str, float]]:
    truth = {n: k.default("hopper") for n, k in registry(phase).items()}
    truth |= (
        {"t0_s": 7e-6, "e_tc": 0.6, "kappa": 1.4, "e_io": 0.5}
        if phase == "prefill"
        else {"t0_s": 9e-6, "unit_s": 3e-6, "e_d": 0.8}
    )
    c = shapes(phase, rows, seed)
    rng = np.random.default_rng(seed + 1)
    core = core_of(phase, work_of(phase, c, truth), DEVICE, truth)
    return replace(c, seconds=core * np.exp(noise * rng.normal(size=rows))), truth


@pytest.mark.parametrize(
    ("phase", "names"),
    [("prefill", ("t0_s", "e_tc", "kappa", "e_io")), ("decode", ("t0_s", "unit_s", "e_d", "sequence_s"))],
)
def test_planted_constants_are_recovered(phase: str, names: tuple[str, ...]) -> None:
    c, truth = planted(phase, 400, 11, 0.02)
    fit = fit_attention(phase, c, DEVICE, "hopper")
    for name in names:
        constant = fit.constants[name]
        assert constant.std_error is not None, fit.fixed
        assert constant.std_error < 0.2 * constant.value
        assert abs(constant.value - truth[name]) < 4 * constant.std_error
    assert fit.accuracy["mape"] < 0.03
    assert fit.accuracy["core_mape"] < 0.03
    assert {pair for pair in fit.correlations if "t0_s" in pair}


def test_what_the_rows_cannot_tell_is_named_and_kept() -> None:
    c, _ = planted("decode", 300, 5, 0.02)
    fit = fit_attention("decode", c, DEVICE, "hopper")
    assert fit.fixed["rows"] == "structure"
    assert fit.fixed["wide_s"] == "not identified by these rows"  # no KV head serves more than 64 heads here
    assert fit.constants["wide_s"].value == registry("decode")["wide_s"].default("hopper")
    assert fit.constants["wide_s"].status == "fixed"
    fast = replace(
        c, seconds=np.maximum(c.seconds - 8.9e-6, 3e-7)
    )  # all but its fixed time: t0 can only end on its bound
    assert fit_attention("decode", fast, DEVICE, "hopper").fixed["t0_s"] == "on its lower bound"


def test_unusable_rows_are_counted_by_reason() -> None:
    c, _ = planted("prefill", 60, 7, 0.02)
    seconds, kv_heads, batch = c.seconds.copy(), c.kv_heads.copy(), c.batch.copy()
    seconds[:3] = [np.nan, 0.0, -1.0]
    kv_heads[3] = 3.0
    batch[4] = 0.0
    seconds[5] = 1e-9
    good, counts = usable("prefill", replace(c, seconds=seconds, kv_heads=kv_heads, batch=batch), DEVICE)
    assert not good[:6].any()
    assert good[6:].all()
    assert sum(counts.values()) == 6
    assert counts["the time is not positive"] == 2
    assert counts["a value is not finite"] == 1
    assert "heads are no multiple of KV heads" in counts
    with pytest.raises(ValueError, match="at least 20 usable rows, got 19"):
        fit_attention("prefill", c.take(np.arange(19)), DEVICE, "hopper")


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_what_was_measured_cold_in_fp32_is_predicted_so(phase: str) -> None:
    """A fit that took a rotated cache for a warm one, or four bytes for two, would agree with its rows and predict the wrong times."""
    truth = {n: k.default("hopper") for n, k in registry(phase).items()}
    c = replace(shapes(phase, 300, 4), element_bytes=np.full(300, 4.0), warm=np.zeros(300))
    device = device_of(HW, "tf32")
    c = replace(c, seconds=core_of(phase, work_of(phase, c, truth), device, truth))
    fit = fit_attention(phase, c, device, "hopper")
    hw = replace(HW, sections={**HW.sections, (f"attention_{phase}", "tf32"): fit.section()})
    call = (c.batch, c.q_len, c.kv_len) if phase == "prefill" else (c.batch, c.kv_len)
    time = prefill_attention_time if phase == "prefill" else decode_attention_time
    t = time(*call, c.heads, c.kv_heads, c.head_dim, hw, dtype="tf32")
    assert np.median(np.abs(t.seconds / c.seconds - 1.0)) < 0.02


def test_few_rows_keep_the_lattice_only_where_it_helps() -> None:
    c, _ = planted("decode", 40, 21, 0.15)  # noise that a lattice could only learn by heart
    assert not fit_attention("decode", c, DEVICE, "hopper").arrays
    smooth = replace(
        c, seconds=planted("decode", 40, 21, 0.0)[0].seconds * np.where(c.heads / c.kv_heads > 1.0, 1.6, 1.0)
    )
    assert fit_attention("decode", smooth, DEVICE, "hopper").arrays


def test_a_cpu_takes_longer_over_a_cache_that_several_heads_share() -> None:
    truth = {n: k.default("cpu") for n, k in registry("decode").items()} | {"regroup": 0.6}
    c = replace(shapes("decode", 200, 8), warm=np.zeros(200))
    c = replace(c, seconds=core_of("decode", work_of("decode", c, truth), DEVICE, truth))
    assert fit_attention("decode", c, DEVICE, "cpu").constants["regroup"].value == pytest.approx(0.6, abs=0.1)
    assert fit_attention("decode", c, DEVICE, "hopper").constants["regroup"].value == 0.0


def test_rows_that_beat_dram_are_kept_only_while_l2_could_hold_them() -> None:
    c = Columns(
        *(
            np.array(x, dtype=float)
            for x in ([1, 64], [1, 1], [8192, 8192], [32, 32], [8, 8], [128, 128], [1.2e-5, 2e-4])
        )
    )
    good, counts = usable("decode", c, DEVICE)
    assert good.tolist() == [True, False]
    assert list(counts) == ["faster than bytes / bandwidth with more bytes than the L2 holds"]


def test_lattice_fit_follows_a_smooth_residual_between_its_points() -> None:
    rng = np.random.default_rng(2)
    place = tuple(rng.uniform(0, 6, 3000) for _ in range(3))
    truth = 0.1 * np.sin(place[0]) + 0.05 * place[1] - 0.02 * place[2]
    lattice = fit_lattice((place[0], place[1], place[2]), truth + 0.01 * rng.normal(size=3000), Smoothing())
    other = tuple(rng.uniform(0.5, 5.5, 500) for _ in range(3))
    expected = 0.1 * np.sin(other[0]) + 0.05 * other[1] - 0.02 * other[2]
    assert np.sqrt(np.mean((lattice((other[0], other[1], other[2])) - expected) ** 2)) < 0.012


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_intervals_hold_nine_in_ten_unseen_rows(phase: str) -> None:
    c, _ = planted(phase, 1200, 21, 0.05)
    fit = fit_attention(phase, c.take(np.arange(600)), DEVICE, "hopper", fold_by=("heads",))
    rest = c.take(np.arange(600, 1200))
    predicted, regime = predict(phase, rest, DEVICE, fit.values, Lattice.from_arrays(fit.arrays))
    low, high = (np.array([getattr(i, side) for i in fit.intervals])[regime] for side in ("low", "high"))
    assert [i.regime for i in fit.intervals] == list(REGIMES)
    assert 0.86 < np.mean((rest.seconds >= predicted * low) & (rest.seconds <= predicted * high)) < 0.95


def test_a_fitted_section_predicts_in_a_profile_what_the_fit_predicts() -> None:
    for phase in ("prefill", "decode"):
        c, _ = planted(phase, 400, 3, 0.05)
        fit = fit_attention(phase, c, DEVICE, "hopper")
        hw = replace(HW, sections={(f"attention_{phase}", "bf16"): fit.section()})
        expected, _ = predict(phase, c, DEVICE, fit.values, Lattice.from_arrays(fit.arrays))
        if phase == "prefill":
            shown = prefill_attention_time(c.batch, c.q_len, c.kv_len, c.heads, c.kv_heads, c.head_dim, hw).seconds
        else:
            shown = decode_attention_time(c.batch, c.kv_len, c.heads, c.kv_heads, c.head_dim, hw, cold=False).seconds
        assert np.median(np.abs(shown / expected - 1.0)) < 1e-12
        assert np.all(shown >= expected * (1 - 1e-12))  # the floors of physics may only raise it


def test_residual_coordinates_are_those_of_prediction() -> None:
    c = shapes("decode", 5, 1)
    length, units, group = residual_coordinates("decode", c)
    assert length == pytest.approx(np.log2(c.kv_len))
    assert units == pytest.approx(np.log2(c.batch * c.kv_heads))
    assert group == pytest.approx(np.log2(c.heads / c.kv_heads))


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
    from calibration.fit.attention_columns import columns_of
    from calibration.measurements import load_measurements

    hw = load_hardware("a100_sxm_80gb" if table.startswith("a100") else "h100_sxm")
    c = columns_of(load_measurements(table, dtype="bf16"))
    c = c.take(c.head_dim == 128)
    result = score(phase, c, device_of(hw), hw.architecture, "heads", 400, 0)
    assert result["mape"] < mape
    assert result["roofline"] > 0.5
    assert result["speedup_median"] < 0.045


def test_a_fit_of_400_rows_is_quick() -> None:
    c, _ = planted("decode", 400, 2, 0.05)
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        fit_attention("decode", c, DEVICE, "hopper")
        best = min(best, time.perf_counter() - began)
    assert best < 6.0  # under 2 s on an idle core; the rest is room for a busy machine
