"""Attention times: geometry against brute force, physics, limits, speed."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.errors import InputError
from simulator.hardware.library import load_hardware
from simulator.hardware.parts import Fitted, Interval, Section
from simulator.kernels import attention
from simulator.kernels.attention import decode_attention_time, prefill_attention_time
from simulator.kernels.attention_prefill import causal_blocks, causal_pairs, prefill_work
from simulator.kernels.lattice import Lattice

DEVICES = ("a100_sxm_80gb", "h100_sxm", "rtx_4090", "l40s")
NAMES = st.sampled_from(DEVICES)
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


@pytest.mark.parametrize(
    ("q", "kv", "window"),
    [
        (1, 1, 0),
        (64, 64, 0),
        (65, 65, 0),
        (256, 256, 0),
        (300, 300, 0),
        (128, 640, 0),
        (256, 256, 64),
        (512, 512, 100),
        (192, 1024, 256),
        (64, 64, 1000),
    ],
)
def test_geometry_equals_brute_force(q: int, kv: int, window: int) -> None:
    pairs, blocks, longest = brute_force(q, kv, window)
    args = [np.array(float(x)) for x in (q, kv, window)]
    assert float(causal_pairs(*args)) == pairs
    tiles, counted, chain = (float(x) for x in causal_blocks(*args))
    assert tiles == -(-q // 64)
    if not window:
        assert counted == blocks
        assert chain == longest
    else:  # a window may start inside a block: at most one block a tile apart
        assert abs(counted - blocks) <= tiles
        assert abs(chain - longest) <= 1


def test_flops_and_bytes_of_work() -> None:
    one = [np.array(float(x)) for x in (2, 128, 128, 32, 8, 64)]
    work = prefill_work(*one)
    assert float(work.flops) == 4 * 2 * 32 * 64 * (128 * 129 // 2)
    assert float(work.io_bytes) == 2 * 64 * (2 * 2 * 32 * 128 + 2 * 2 * 8 * 128)


@given(
    NAMES,
    st.integers(1, 64),
    st.integers(1, 8192),
    st.integers(0, 8192),
    HEADS,
    st.sampled_from([64, 128]),
    st.floats(0.05, 1.0),
)
@settings(max_examples=150, deadline=None)
def test_prefill_never_beats_the_roofline(
    name: str, batch: int, q: int, history: int, heads: tuple[int, int], dim: int, density: float
) -> None:
    hw = load_hardware(name)
    t = prefill_attention_time(batch, q, q + history, *heads, dim, hw, density=density, block=64)
    pairs = q * history + q * (q + 1) / 2
    flop_s = 4.0 * batch * heads[0] * dim * pairs * density / (hw.peak_flop_per_s("bf16") * hw.clock_headroom)
    bytes_s = 2.0 * batch * dim * (2 * heads[0] * q + 2 * heads[1] * (q + history)) / hw.bandwidth_bytes_per_s
    assert float(t.seconds) >= max(flop_s, bytes_s) * (1 - 1e-12)
    assert float(t.lower) <= float(t.seconds) <= float(t.upper)
    assert float(t.roofline_s) > 0


@given(
    NAMES,
    st.integers(1, 512),
    st.integers(1, 131072),
    HEADS,
    st.sampled_from([64, 128]),
    st.sampled_from(["bf16", "int8"]),
)
@settings(max_examples=150, deadline=None)
def test_decode_reads_its_cache_cold(
    name: str, batch: int, kv: int, heads: tuple[int, int], dim: int, cache: str
) -> None:
    hw = load_hardware(name)
    t = decode_attention_time(batch, kv, *heads, dim, hw, kv_dtype=cache)
    size = 2.0 * batch * heads[1] * kv * dim * (2 if cache == "bf16" else 1)
    assert float(t.seconds) >= size / hw.bandwidth_bytes_per_s
    assert float(t.lower) >= size / hw.bandwidth_bytes_per_s
    warm = decode_attention_time(batch, kv, *heads, dim, hw, kv_dtype=cache, cold=False)
    assert float(warm.seconds) <= float(t.seconds) * (1 + 1e-12)


def bare(name: str) -> object:
    """A device without fitted sections: the defaults of its architecture, no residual."""
    return replace(load_hardware(name), sections={})


@pytest.mark.parametrize("name", DEVICES)
def test_more_work_is_never_faster_by_more_than_a_step(name: str) -> None:
    hw = bare(name)
    q = np.arange(1, 4097)
    t = prefill_attention_time(4, q, q, 32, 8, 128, hw).seconds
    assert np.all(np.diff(t) >= -1e-12)
    b = np.arange(1, 513)
    t = decode_attention_time(b, 2048, 32, 8, 128, hw).seconds
    # splitting the cache over the SMs comes in whole splits and waves: one sequence more may fill them better, by no more than one split
    assert np.all(t[1:] >= t[:-1] * 0.6)
    assert np.all(np.diff(t[::64]) > 0)


def test_fewer_blocks_cost_less_but_small_ones_cost_more_than_their_share() -> None:
    hw = bare("h100_sxm")
    full = float(prefill_attention_time(1, 8192, 8192, 32, 8, 128, hw).seconds)
    part = {
        b: float(prefill_attention_time(1, 8192, 8192, 32, 8, 128, hw, density=0.25, block=b).seconds)
        for b in (16, 64, 128)
    }
    assert full > part[16] > part[64] > part[128]
    assert part[128] > 0.25 * full * 0.9
    assert float(prefill_attention_time(1, 8192, 8192, 32, 8, 128, hw, density=1.0, block=16).seconds) == full
    assert float(prefill_attention_time(1, 8192, 8192, 32, 8, 128, hw, density=0.99, block=16).seconds) <= full


def test_what_no_fit_has_seen_widens_the_interval() -> None:
    hw = load_hardware("h100_sxm")

    def width(**options: object) -> float:
        t = prefill_attention_time(1, 4096, 4096, 32, 8, 128, hw, **options)  # type: ignore[arg-type]
        return float(np.log(t.upper / t.lower))

    assert width(density=0.5, block=64) > width()
    assert width(kv_dtype="fp8") > width()
    assert width(window=1024) > width()
    assert width(level=0.5) < width() < width(level=0.99)


def test_a_window_bounds_the_work() -> None:
    hw = load_hardware("h100_sxm")
    windowed, full = (
        float(prefill_attention_time(1, 16384, 16384, 32, 8, 128, hw, window=w).seconds) for w in (4096, 0)
    )
    assert windowed < 0.7 * full
    same, short = (float(decode_attention_time(1, 4096, 32, 8, 128, hw, window=w).seconds) for w in (8192, 0))
    assert same == short
    long, cut = (
        float(decode_attention_time(8, kv, 32, 8, 128, hw, window=w).seconds) for kv, w in ((65536, 4096), (4096, 0))
    )
    assert long == cut


@pytest.mark.parametrize("name", DEVICES)
def test_limits(name: str) -> None:
    hw = bare(name)
    assert prefill_attention_time(8, 8192, 8192, 32, 8, 128, hw).limits == "compute"
    assert prefill_attention_time(1, 16, 16, 8, 8, 64, hw).limits == "launch"
    assert decode_attention_time(1, 16, 8, 8, 128, hw).limits == "launch"
    assert decode_attention_time(64, 16384, 32, 8, 128, hw).limits in {"memory", "latency"}


def test_a_section_brings_constants_residual_and_intervals() -> None:
    base = load_hardware("h100_sxm")
    constants = {n: Fitted(k.default("hopper")) for n, k in attention.DECODE_CONSTANTS.items()}
    lattice = Lattice((0.0, 0.0, 0.0), (8.0, 8.0, 8.0), np.full((3, 3, 2), np.log(1.5)))
    intervals = tuple(Interval(r, 0.9, 1.2, 0.9, 50) for r in attention.REGIMES)
    plain = replace(base, sections={("attention_decode", "bf16"): Section(constants)})
    fitted = replace(base, sections={("attention_decode", "bf16"): Section(constants, lattice.arrays(), intervals)})
    a, b = (decode_attention_time([1, 64], [100, 4096], 32, 8, 128, hw) for hw in (plain, fitted))
    assert b.seconds == pytest.approx(1.5 * a.seconds)
    assert b.upper == pytest.approx(1.2 * b.seconds)


def test_shapes_broadcast_and_bad_formats_are_named() -> None:
    hw = load_hardware("a100")
    t = prefill_attention_time(np.ones((3, 1)), np.array([16, 128]), 4096, 32, 8, 128, hw)
    assert t.seconds.shape == t.upper.shape == t.bound.shape == t.roofline_s.shape == (3, 2)
    assert len(prefill_attention_time([], [], [], [], [], [], hw).seconds) == 0
    with pytest.raises(InputError, match="fp8"):
        prefill_attention_time(1, 16, 16, 8, 8, 64, hw, dtype="fp8")
    with pytest.raises(InputError, match="bf17"):
        decode_attention_time(1, 16, 8, 8, 64, hw, kv_dtype="bf17")


def test_a_small_call_is_quick() -> None:
    hw = load_hardware("h100_sxm")
    calls = (
        lambda: prefill_attention_time([1, 2], 2048, 2048, 32, 8, 128, hw),
        lambda: decode_attention_time([1, 64], 2048, 32, 8, 128, hw),
    )
    for call in calls:
        call()
        best = min(_timed(call) for _ in range(50))
        assert best < 1e-3  # 0.09 ms measured on an idle core; the rest is room for a busy machine


def _timed(call: object) -> float:
    began = time.perf_counter()
    call()  # type: ignore[operator]
    return time.perf_counter() - began
