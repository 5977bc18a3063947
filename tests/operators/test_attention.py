"""Attention times: geometry against brute force, physics, limits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_times import decode_time, prefill_time

from simulator.hardware.library import load_hardware
from simulator.hardware.sections import Fitted, Section
from simulator.operators.attention import DECODE_CONSTANTS, attention_pairs, causal_blocks
from simulator.operators.residual_grid import ResidualGrid

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
    kv = 64 * (history // 64) + q  # after a history of whole blocks; of another, the form counts a block a tile off
    pairs, blocks, longest = brute_force(q, kv, window)
    args = [np.array(float(x)) for x in (q, kv, window)]
    assert float(attention_pairs(*args)) == pairs
    tiles, counted, chain = (float(x) for x in causal_blocks(*args))
    assert tiles == -(-q // 64)
    slack = 0 if not window else 1  # a window may start inside a block: at most one block a tile apart
    assert abs(counted - blocks) <= slack * tiles
    assert abs(chain - longest) <= slack


@given(NAMES, st.integers(1, 64), st.integers(1, 8192), st.integers(0, 8192), HEADS, DIMS, st.floats(0.05, 1.0))
@settings(max_examples=150, deadline=None)
def test_prefill_never_beats_the_roofline(
    name: str, batch: int, q: int, history: int, heads: tuple[int, int], dim: int, density: float
) -> None:
    hw = load_hardware(name)
    t = prefill_time(batch, q, q + history, *heads, dim, hw, density=density, block=64)
    pairs = q * history + q * (q + 1) / 2
    flop_s = 4.0 * batch * heads[0] * dim * pairs * density / (hw.peak_flop_per_s("bf16") * hw.clock_headroom)
    bytes_s = 2.0 * batch * dim * (2 * heads[0] * q + 2 * heads[1] * (q + history)) / hw.bandwidth_bytes_per_s
    assert float(t.seconds) >= max(flop_s, bytes_s) * (1 - 1e-12)
    assert float(t.lower) <= float(t.seconds) <= float(t.upper)
    assert float(t.roofline_s) > 0


@given(NAMES, st.integers(1, 512), st.integers(1, 131072), HEADS, DIMS, st.sampled_from(["bf16", "int8"]))
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
    # splitting the cache over the SMs comes in whole splits and waves: one sequence more may fill them better, by no
    # more than one split
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
    assert decode[1] == pytest.approx(decode[0], rel=0.2)  # a kernel of its own where the stack has one


@pytest.mark.parametrize("name", DEVICES)
def test_limits(name: str) -> None:
    hw = bare(name)
    assert prefill_time(8, 8192, 8192, 32, 8, 128, hw).bottlenecks == "compute"
    assert prefill_time(1, 16, 16, 8, 8, 64, hw).bottlenecks == "launch"
    assert decode_time(1, 16, 8, 8, 128, hw).bottlenecks == "launch"
    assert decode_time(64, 16384, 32, 8, 128, hw).bottlenecks in {"memory", "latency"}


def test_a_section_brings_constants_residual_and_intervals() -> None:
    base = load_hardware("h100_sxm")
    constants = {n: Fitted(k.default("hopper")) for n, k in DECODE_CONSTANTS.items()}
    residual_grid = ResidualGrid((0.0, 0.0, 0.0), (8.0, 8.0, 8.0), np.full((3, 3, 2), np.log(1.5)))
    plain = replace(base, sections={("attention_decode", "bf16"): Section(constants, status="calibrated")})
    wide = Section(constants, residual_grid.arrays(), 3.0, status="calibrated")
    fitted = replace(base, sections={("attention_decode", "bf16"): wide})
    a, b = (decode_time([1, 64], [100, 4096], 32, 8, 128, hw) for hw in (plain, fitted))
    assert b.seconds == pytest.approx(1.5 * a.seconds)
    assert (b.upper / b.seconds > a.upper / a.seconds).all()
