"""Attention times: geometry against brute force, physics, limits; kernels of decode attention;
latent attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_times import decode, decode_time, errors_of, prefill_time

from calibration.evidence.measurements.wheel import datasheet
from calibration.fit.predict import predict
from calibration.measurements import load_measurements
from simulator import gemm_time
from simulator.engines.engine import load_engine
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import Fitted, HardwareProfile, Section
from simulator.operators import CONSTANTS
from simulator.operators.attention import (
    Geometry,
    attention_pairs,
    causal_blocks,
    decode_work,
    prefill_work,
)
from simulator.operators.base import ResidualGrid

pytestmark = pytest.mark.quick

DEVICES = ("a100_sxm_80gb", "h100_sxm", "rtx_4090", "l40s")
NAMES, DIMS = st.sampled_from(DEVICES), st.sampled_from([64, 128])
HEADS = st.sampled_from([(32, 32), (32, 8), (64, 8), (8, 1), (71, 71)])


def brute_force(q: int, kv: int, window: int) -> tuple[int, int, int]:
    """Pairs, 64x64 blocks touched, blocks of the longest tile, by visiting every query."""
    pairs, blocks, longest = 0, 0, 0
    for first in range(0, q, 64):
        seen = set()
        for i in range(first, min(first + 64, q)):
            position = kv - q + i
            low = max(0, position - window + 1) if window else 0
            pairs += position - low + 1
            seen.update(range(low // 64, position // 64 + 1))
        blocks += len(seen)
        longest = max(longest, len(seen))
    return pairs, blocks, longest


@given(st.integers(1, 400), st.integers(0, 800), st.integers(0, 1300))
@settings(max_examples=60, deadline=None)
def test_geometry_equals_brute_force(q: int, history: int, window: int) -> None:
    # after a history of whole blocks; of another, the form counts a block a tile off
    kv = 64 * (history // 64) + q
    pairs, blocks, longest = brute_force(q, kv, window)
    args = [np.array(float(x)) for x in (q, kv, window)]
    assert float(attention_pairs(*args)) == pairs
    further = [np.array(float(x)) for x in (q, history + q, window)]
    assert float(attention_pairs(*further)) == brute_force(q, history + q, window)[0]
    tiles, counted, chain = (float(x) for x in causal_blocks(*args))
    assert tiles == -(-q // 64)
    # a window may start inside a block: at most one block a tile apart
    slack = 0 if not window else 1
    assert abs(counted - blocks) <= slack * tiles
    assert abs(chain - longest) <= slack


@given(
    NAMES,
    st.integers(1, 512),
    st.integers(1, 131072),
    HEADS,
    DIMS,
    st.sampled_from(["bf16", "int8"]),
)
@settings(max_examples=150, deadline=None)
def test_decode_reads_its_cache_cold(
    name: str, batch: int, kv: int, heads: tuple[int, int], dim: int, cache: str
) -> None:
    hw = load_hardware(name)
    t = decode_time(batch, kv, *heads, dim, hw, kv_dtype=cache)
    size = 2.0 * batch * heads[1] * kv * dim * (2 if cache == "bf16" else 1)
    assert float(t.seconds) >= size / hw.bandwidth_bytes_per_s
    assert float(t.lower) >= size / hw.bandwidth_bytes_per_s
    warm = decode_time(batch, kv, *heads, dim, hw, kv_dtype=cache, cold=False)
    assert float(warm.seconds) <= float(t.seconds) * (1 + 1e-6)  # a gain of 1 is stored rounded


def bare(name: str) -> object:
    """A device without fitted sections: the defaults of its architecture, no residual."""
    return replace(load_hardware(name), sections={})


@pytest.mark.parametrize("name", DEVICES)
def test_more_work_is_never_faster_by_more_than_a_step(name: str) -> None:
    hw = bare(name)
    q = np.arange(1, 4097)
    t = prefill_time(4, q, q, 32, 8, 128, hw).seconds
    assert np.all(np.diff(t) >= -1e-12)
    b = np.arange(1, 513)
    t = decode_time(b, 2048, 32, 8, 128, hw).seconds
    # splitting the cache over the SMs comes in whole splits and waves: one sequence more may fill
    # them better, by no more than one split
    assert np.all(t[1:] >= t[:-1] * 0.6)
    assert np.all(np.diff(t[::64]) > 0)


def test_fewer_blocks_cost_less_but_small_ones_cost_more_than_their_share() -> None:
    blocks = {"density": [1.0, 0.25, 0.25, 0.25, 1.0, 0.99], "block": [0, 16, 64, 128, 16, 16]}
    t = prefill_time(1, 8192, 8192, 32, 8, 128, bare("h100_sxm"), **blocks).seconds
    assert t[0] > t[1] > t[2] > t[3] > 0.25 * t[0] * 0.9
    assert t[4] == t[0] >= t[5]


def test_a_window_bounds_the_work() -> None:
    hw = load_hardware("h100_sxm@sglang")
    prefill = prefill_time(1, 16384, 16384, 32, 8, 128, hw, window=[4096, 0]).seconds
    assert prefill[0] < 0.7 * prefill[1]
    decode = decode_time(8, [4096, 4096, 65536], 32, 8, 128, hw, window=[8192, 0, 4096]).seconds
    assert decode[0] == decode[2]
    # a kernel of its own where the stack has one
    assert decode[1] == pytest.approx(decode[0], rel=0.2)


@pytest.mark.parametrize("name", DEVICES)
def test_limits(name: str) -> None:
    hw = bare(name)
    assert prefill_time(8, 8192, 8192, 32, 8, 128, hw).bottlenecks == "compute"
    assert prefill_time(1, 16, 16, 8, 8, 64, hw).bottlenecks == "launch"
    assert decode_time(1, 16, 8, 8, 128, hw).bottlenecks == "launch"
    assert decode_time(64, 16384, 32, 8, 128, hw).bottlenecks in {"memory", "latency"}


def test_a_section_brings_constants_residual_and_intervals() -> None:
    base = load_hardware("h100_sxm")
    constants = {n: Fitted(k.default("hopper")) for n, k in CONSTANTS["attention_decode"].items()}
    residual_grid = ResidualGrid((0.0, 0.0, 0.0), (8.0, 8.0, 8.0), np.full((3, 3, 2), np.log(1.5)))
    plain = replace(
        base, sections={("attention_decode", "bf16"): Section(constants, status="calibrated")}
    )
    wide = Section(constants, residual_grid.arrays(), 3.0, status="calibrated")
    fitted = replace(base, sections={("attention_decode", "bf16"): wide})
    a, b = (decode_time([1, 64], [100, 4096], 32, 8, 128, hw) for hw in (plain, fitted))
    assert b.seconds == pytest.approx(1.5 * a.seconds)
    assert (b.upper / b.seconds > a.upper / a.seconds).all()


@pytest.mark.parametrize("name", ["rtx_4090", "l40s@sglang", "l40s", "rtx_3090", "h100@trtllm"])
def test_no_step_where_a_kernel_begins_to_split_the_cache(name: str) -> None:
    keys, batch = np.arange(256, 2048), np.array([[1], [2], [4], [8], [16], [64]])
    for heads, kv_heads in ((32, 8), (32, 32), (8, 1)):
        seconds = decode_time(batch, keys, heads, kv_heads, 128, load_hardware(name)).seconds
        ratio = seconds[:, 1:] / seconds[:, :-1]
        assert ratio.max() < 1.15
        assert ratio.min() > 0.97


# -- kernels of decode attention differ in the rows that they pad query heads to; on an H20 that

H20, BARE = load_hardware("h20"), datasheet("h20")
LONG = (64, 8192, 32, 8, 128)


def served(hw: HardwareProfile, engine: str) -> HardwareProfile:
    return load_engine(engine).serving(hw)


@pytest.mark.parametrize(("cache", "rows"), [("bf16", 283), ("fp8_wo", 44)])
def test_flashinfer_on_an_h20_by_its_datasheet(cache: str, rows: int) -> None:
    """No constant is fitted on these rows. The mean error is below 9 %, and at least 85 % of the
    rows lie in their interval."""
    measured = load_measurements("h20/attention_decode/flashinfer", dtype=cache)
    t = predict(measured, BARE).time
    assert len(measured) == rows
    assert np.abs(t.seconds / measured.seconds - 1.0).mean() < 0.09
    assert ((t.lower <= measured.seconds) & (measured.seconds <= t.upper)).mean() > 0.85


@pytest.mark.parametrize("hw", [H20, BARE])
def test_flash_attention_3_pads_to_128_rows_on_an_h20(hw: HardwareProfile) -> None:
    """Qwen3 in SGLang (published_dense.csv) reads its cache at 1.04 TB/s, from the slope of its
    time per token."""
    cache_bytes = 4.0 * 131072 * 8 * 128
    seconds = float(decode(1, 131072, 32, 8, 128, served(hw, "sglang@0.4.6")).time)
    assert cache_bytes / seconds == pytest.approx(1.04e12, rel=0.12)
    # SGLang's pull request 6151: 2.8 times slower than FlashInfer
    assert 2.5 < seconds / float(decode(1, 131072, 32, 8, 128, hw).time) < 3.3
    # later releases, and other engines, have tiles for few rows: the fit counts
    times = [
        float(decode(*LONG, served(hw, engine)).time) for engine in ("sglang", "vllm", "trtllm")
    ]
    assert times == pytest.approx([float(decode(*LONG, hw).time)] * 3)


def test_early_sglang_pads_one_token_to_64_rows_in_16_bits_on_an_h20() -> None:
    """Without a fit; fp8 products of DeepGEMM are padded in every release."""
    early, late = (served(BARE, engine) for engine in ("sglang@0.4.6", "sglang"))
    times = [[gemm_time(m, 12288, 4096, hw).seconds for m in (1, 64)] for hw in (early, late)]
    assert times[0][1] < 1.05 * times[0][0]
    assert 1.4 * times[1][0] < times[1][1] == pytest.approx(times[0][1])
    fp8 = [gemm_time(1, 12288, 4096, hw, dtype="fp8").seconds for hw in (early, late)]
    assert fp8[0] == fp8[1]


def test_the_kernels_differ_by_what_sglang_issue_5630_reports() -> None:
    """QwQ-32B on four H20, 64 requests of 12,000 to 14,000 tokens: 908 tokens/s with
    FlashAttention-3, 2,014 with FlashInfer."""
    calls = 64, 13000, 40 // 4, 8 // 4, 128
    step = [64 * float(decode(*calls, hw).time) for hw in (served(H20, "sglang@0.5.0"), H20)]
    assert step[0] - step[1] == pytest.approx(64 / 908.34 - 64 / 2014.2, rel=0.1)


def test_more_query_heads_are_free_within_a_tile() -> None:
    group = np.array([1, 4, 8, 16, 32, 64])
    t = decode(64, 8192, 8 * group, 8, 128, BARE).time
    assert np.ptp(np.log(t[:4])) < 0.02  # FlashInfer: 16 rows; queries and outputs are moved too
    assert (t[4:] / t[3] > [1.1, 2.0]).all()
    assert (
        np.ptp(np.log(decode(64, 8192, 8 * group, 8, 128, served(BARE, "sglang@overlap")).time))
        < 0.02
    )


def test_tiles_count_in_the_loadings_and_never_beat_physics() -> None:
    for hw in (BARE, served(BARE, "sglang@overlap"), H20.on("flashinfer")):
        e = decode([1, 64, 512], [128, 4096, 131072], 64, 8, 128, hw)
        assert (e.loadings["compute"][1:] > 0.2).all()
        # what is merged is fixed
        assert sum(e.loadings.values()) == pytest.approx(np.ones(3), abs=0.1)
        t = decode_time([1, 64, 512], [128, 4096, 131072], 64, 8, 128, hw)
        flops = 4.0 * np.array([1, 64, 512]) * np.array([128, 4096, 131072]) * 64 * 128
        assert (
            t.lower >= flops / (hw.peak_flop_per_s("bf16") * hw.clock_headroom) * (1 - 1e-12)
        ).all()


# -- multi-head latent attention -------------------------------------------------------------------

DECODE: dict[str, Any] = {"kv_heads": 1, "head_dim": 576, "value_dim": 512, "latent": True}


def sizes(*values: float) -> list[Any]:
    return [np.array(float(v)) for v in values]


def test_work_of_latent_attention_by_hand() -> None:
    known = {"value_dim": np.array(128.0)}
    prompt = prefill_work(
        Geometry(*sizes(2, 128, 128, 16, 16, 192), **known), {"pads": 1.0, "packs": 0.0}
    )
    assert float(prompt.flops) == 2 * (192 + 128) * 2 * 16 * (128 * 129 // 2)
    assert float(prompt.moved_bytes) == pytest.approx(2 * 2 * 128 * 16 * 2 * (192 + 128))
    decode = decode_work(
        Geometry(*sizes(8, 1, 4096, 128, 1, 576), value_dim=np.array(512.0), latent=True)
    )
    assert float(decode.flops) == pytest.approx(2 * (576 + 512) * 8 * 128 * 4096)
    assert float(decode.cache_bytes) == 8 * 4096 * 576 * 2  # the latent once, whatever the heads
    assert float(decode.io_bytes) == pytest.approx(8 * 128 * (576 + 512) * 2)


def test_latent_attention_has_sections_of_its_own_and_is_wide_where_nothing_was_fitted() -> None:
    hw = load_hardware("h100@sglang")
    status = [
        hw.section(operator, "bf16").status
        for operator in ("mla_decode", "mla_prefill", "attention_decode")
    ]
    # SGLang's prompts are not in the tables
    assert status == ["calibrated", "inherited", "calibrated"]
    widths = []
    # fitted; fitted, but other stacks differ; nothing there
    for name in ("h100@trtllm", "h20", "l40s", "a6000"):
        t = decode_time(8, 8192, 128, hw=load_hardware(name), **DECODE)
        widths.append(float(t.upper / t.seconds))
    assert widths[0] < 1.4
    assert widths[2] > 4.0
    assert widths[3] > widths[2]
    # Triton runs there, as for SGLang
    vllm = load_hardware("l40s").serving(("vllm", "sglang", "trtllm"))
    t = decode_time(8, 8192, 128, hw=vllm, **DECODE)
    assert t.upper < 1.5 * t.seconds
    hopper = (load_hardware("h200").serving((stack, "sglang")) for stack in ("sglang", "vllm"))
    wide, other = (decode_time(8, 8192, 128, hw=hw, kv_dtype="fp8", **DECODE) for hw in hopper)
    # SGLang converts fp8 caches there
    assert wide.upper / wide.seconds > 4.0 > other.upper / other.seconds
    generic = errors_of(decode, 8, 8192, 128, hw=load_hardware("t4"), dtype="fp16", **DECODE)
    assert "mla_decode generic" in generic.factors
