"""Decode kernels differ in the rows that they pad query heads to; on an H20 that decides the time."""

from __future__ import annotations

import numpy as np
import pytest
from operator_times import decode, decode_time

from calibration.fit.predict import predict
from calibration.measurements import load_measurements
from calibration.measurements.wheel import datasheet
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import HardwareProfile

pytestmark = pytest.mark.quick

H20, BARE = load_hardware("h20"), datasheet("h20")
LONG = (64, 8192, 32, 8, 128)


def served(hw: HardwareProfile, engine: str) -> HardwareProfile:
    return hw.serving((engine, "sglang", "trtllm", "vllm", "torch"))


@pytest.mark.parametrize(("cache", "rows"), [("bf16", 283), ("fp8_wo", 44)])
def test_flashinfer_on_an_h20_by_its_datasheet(cache: str, rows: int) -> None:
    """No constant is fitted on these rows: the error is below 15 %, and at least 85 % lie in their interval."""
    measured = load_measurements("h20/attention_decode/flashinfer", dtype=cache)
    t = predict(measured, BARE).time
    assert len(measured) == rows
    assert np.abs(t.seconds / measured.seconds - 1.0).mean() < 0.09
    assert ((t.lower <= measured.seconds) & (measured.seconds <= t.upper)).mean() > 0.85


@pytest.mark.parametrize("hw", [H20, BARE])
def test_flash_attention_3_pads_to_128_rows_on_an_h20(hw: HardwareProfile) -> None:
    """Qwen3 in SGLang (published_dense.csv) reads its cache at 1.04 TB/s, from the slope of its time per token."""
    cache_bytes = 4.0 * 131072 * 8 * 128
    seconds = float(decode(1, 131072, 32, 8, 128, served(hw, "sglang")).time)
    assert cache_bytes / seconds == pytest.approx(1.04e12, rel=0.12)
    # SGLang's pull request 6151: 2.8 times slower than FlashInfer
    assert 2.5 < seconds / float(decode(1, 131072, 32, 8, 128, hw).time) < 3.3
    # vLLM's kernel has tiles of half the rows, whose products take longer than reading the cache too
    assert 0.6 < float(decode(*LONG, served(hw, "vllm")).time) / float(
        decode(*LONG, served(hw, "sglang")).time
    ) < 1.0  # fmt: skip


def test_the_kernels_differ_by_what_sglang_issue_5630_reports() -> None:
    """QwQ-32B on four H20, 64 requests of 12,000 to 14,000 tokens: 908 tokens/s with FlashAttention-3, 2,014 with
    FlashInfer."""
    calls = 64, 13000, 40 // 4, 8 // 4, 128
    step = [64 * float(decode(*calls, hw).time) for hw in (served(H20, "sglang"), H20)]
    assert step[0] - step[1] == pytest.approx(64 / 908.34 - 64 / 2014.2, rel=0.1)


def test_more_query_heads_are_free_within_a_tile() -> None:
    group = np.array([1, 4, 8, 16, 32, 64])
    t = decode(64, 8192, 8 * group, 8, 128, BARE).time
    assert np.ptp(np.log(t[:4])) < 0.02  # FlashInfer: 16 rows; queries and outputs are moved too
    assert (t[4:] / t[3] > [1.1, 2.0]).all()
    assert np.ptp(np.log(decode(64, 8192, 8 * group, 8, 128, served(BARE, "sglang")).time)) < 0.02


def test_tiles_count_in_the_loadings_and_never_beat_physics() -> None:
    for hw in (BARE, served(BARE, "sglang"), H20.on("flashinfer")):
        e = decode([1, 64, 512], [128, 4096, 131072], 64, 8, 128, hw)
        assert (e.loadings["compute"][1:] > 0.2).all()
        assert sum(e.loadings.values()) == pytest.approx(np.ones(3), abs=0.1)  # what is merged is fixed
        t = decode_time([1, 64, 512], [128, 4096, 131072], 64, 8, 128, hw)
        flops = 4.0 * np.array([1, 64, 512]) * np.array([128, 4096, 131072]) * 64 * 128
        assert (t.lower >= flops / (hw.peak_flop_per_s("bf16") * hw.clock_headroom) * (1 - 1e-12)).all()
