"""The GEMM model: physics, alignment, formats, steps of the waterfall, and details of its
interface; residual grids."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from physics import wrong_gemms
from scipy.interpolate import RegularGridInterpolator

from simulator.codes import Kernel
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import HardwareProfile
from simulator.operators.base import Machine, ResidualGrid, RowResidual
from simulator.operators.gemm import CHUNK, UNLIMITED, alignment_halvings, clocked
from simulator.operators.gemm import GEMM_CONSTANTS as CONSTANTS
from simulator.operators.gemm_model import ReadyModel, analytical_time, ready_model
from simulator.uncertainty.operators import TIMES, GemmOptions, gemm_time

pytestmark = pytest.mark.quick

GPUS = ("a100_sxm_80gb", "h100_sxm", "rtx_4090")
widths = st.integers(1, 8192).map(lambda i: 8 * i)


def defaults(architecture: str) -> dict[str, float]:
    return {name: constant.default(architecture) for name, constant in CONSTANTS.items()}


def model_of(gpu: str, dtype: Any = np.float64) -> ReadyModel:
    return ready_model(
        Machine.of(load_hardware(gpu)), defaults(load_hardware(gpu).architecture), dtype
    )


@pytest.mark.parametrize("count", [3000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_no_gpu_stack_or_format_beats_the_physics(count: int) -> None:
    assert wrong_gemms(count, 1) == []


@settings(max_examples=100, deadline=None)
@given(
    m=st.integers(1, 8192), n=widths, k=widths, axis=st.integers(0, 2), gpu=st.sampled_from(GPUS)
)
def test_more_work_is_never_faster_by_more_than_a_tile_step(
    m: int, n: int, k: int, axis: int, gpu: str
) -> None:
    """In the analytical model, one more whole tile may be cheaper only by the difference in
    efficiency of two tiles."""
    model = model_of(gpu)
    shape = np.array([[m], [n], [k]], dtype=np.float64)
    larger = shape.copy()
    larger[axis] += (128, 256, 128)[axis]
    small, large = (analytical_time(*sizes, model).total_us[0] for sizes in (shape, larger))
    assert large >= 0.85 * small  # split-K: one more whole k-step of a tile can balance better


def test_a_cpu_has_no_tiles_and_reads_its_weights_twice_from_some_rows_on() -> None:
    machine = Machine(1e12, 3e10, 1e6, 2, 1.0, 4.0, 4.0, False, packs=True)
    constants = defaults("cpu") | {"pack": 1.0, "pack_m": 4.0, "t0": 1e-7, "e_d": 1.0}
    model = ready_model(machine, constants)
    m, wide = np.array([1.0, 3.0, 4.0, 5.0]), np.full(4, 4096.0)
    t = analytical_time(m, wide, wide, model)
    weights_us = 4e6 * 4096.0**2 / 3e10
    np.testing.assert_allclose(t.memory_us, weights_us * np.array([1, 1, 2, 2]), rtol=0.01)
    np.testing.assert_allclose(
        np.cbrt(t.compute3), 2e6 * m * 4096.0**2 / (1e12 * constants["e_tc"]), rtol=1e-9
    )
    np.testing.assert_allclose(t.total_us, t.memory_us + np.cbrt(t.compute3) + 0.1, rtol=1e-9)


@pytest.mark.parametrize("gpu", GPUS)
def test_halving_both_rates_doubles_time_minus_overhead(gpu: str) -> None:
    machine, c = Machine.of(load_hardware(gpu)), defaults(load_hardware(gpu).architecture)
    twice, halved = ("tau", "t_s"), ("b_e", "b_l2", "b_hit", "b_s")
    slow = c | {name: 2 * c[name] for name in twice} | {name: c[name] / 2 for name in halved}
    rates = (machine.peak_flop_per_s / 2, machine.bandwidth_bytes_per_s / 2)
    half = replace(machine, peak_flop_per_s=rates[0], bandwidth_bytes_per_s=rates[1])
    shapes = np.array(
        [[1, 4096, 4096], [64, 11008, 4096], [2048, 4096, 11008], [8192, 8192, 512]],
        dtype=np.float64,
    ).T
    fast, slowed = (
        analytical_time(*shapes, ready_model(machine, c)),
        analytical_time(*shapes, ready_model(half, slow)),
    )
    np.testing.assert_allclose(
        slowed.total_us - 1e6 * c["t0"], 2 * (fast.total_us - 1e6 * c["t0"]), rtol=1e-12
    )


def test_a_published_pair_of_widths_is_what_alignment_costs() -> None:
    """Llama-3.1-8B on an A100, 4096 tokens: 0.45 s with a width of 11468, 0.33 s with 11472
    (NIRVANA, table 8)."""
    off, on = (
        gemm_time(4096, [w, w, 4096], [4096, 4096, w], load_hardware("a100")).seconds.sum()
        for w in (11468, 11472)
    )
    assert 0.33 / (0.33 + 32 * (off - on)) == pytest.approx(0.33 / 0.45, abs=0.05)


@pytest.mark.parametrize(("size", "halvings"), [(2.0, [0, 1, 2, 3, 0]), (1.0, [1, 1, 1, 1, 0])])
def test_alignment_counts_halvings_below_16_bytes(size: float, halvings: list[int]) -> None:
    odd, even = np.array([8.0, 4.0, 2.0, 1.0, 16.0]), np.full(5, 16.0)
    assert (
        alignment_halvings(odd, even, size).tolist()
        == alignment_halvings(even, odd, size).tolist()
        == halvings
    )


@pytest.mark.parametrize(
    ("gpu", "options", "decode", "prefill"),
    [(gpu, {"kernel": "sparse24"}, (1.03, 16 / 9), (1.1, 2.0)) for gpu in GPUS]
    + [
        ("h100", {"kernel": "unstructured"}, (1, 1), (1, 1)),
    ],
)
def test_other_kernels_gain_where_their_saving_is_the_limit(
    gpu: str, options: dict[str, Any], decode: tuple[float, float], prefill: tuple[float, float]
) -> None:
    """2:4 saves arithmetic in prefill and up to 7 of 16 bytes in decode. Narrow weights save time
    if reading them takes the time. Scattered zeros save nothing."""
    plain, other = (
        gemm_time([1, 4096], 8192, 8192, load_hardware(gpu), **o) for o in ({}, options)
    )
    for gain, (least, most) in zip(plain.seconds / other.seconds, (decode, prefill), strict=True):
        assert least <= gain <= most


@pytest.mark.parametrize("gpu", GPUS)
def test_steps_end_in_the_time_and_start_at_the_roofline(gpu: str) -> None:
    hw = load_hardware(gpu)
    m, n, k = (
        np.array([1, 100, 2048, 2048]),
        np.array([4096, 11008, 8810, 4096]),
        np.array([4096, 4096, 4096, 8809]),
    )
    steps = gemm_time(m, n, k, hw, options=GemmOptions(detail=True)).details
    time = gemm_time(m, n, k, hw)
    assert (steps["launch"] == time.seconds).all()
    compute = 2.0 * m * n * k / hw.peak_flop_per_s("bf16")
    roofline = np.maximum(compute, 2.0 * (n * k + m * (n + k)) / hw.bandwidth_bytes_per_s)
    np.testing.assert_allclose(steps["roofline"], roofline, rtol=1e-6)
    assert (steps["tile"] >= steps["roofline"] * (1 - 1e-6)).all()
    assert (steps["wave"] >= steps["tile"]).all()
    assert (steps["alignment"][2:] > 1.1 * steps["wave"][2:]).all()
    assert (steps["alignment"][:2] == steps["wave"][:2]).all()


def test_bottlenecks_are_named_and_levels_nest() -> None:
    hw = load_hardware("h100")
    t, narrow, wide = (
        gemm_time(
            [1, 1, 8192], [128, 16384, 8192], [128, 16384, 8192], hw, options=GemmOptions(level=v)
        )
        for v in (0.9, 0.5, 0.99)
    )
    assert t.bottlenecks.tolist() == ["launch", "memory", "compute"]
    assert (wide.lower <= narrow.lower).all()
    assert (narrow.lower < narrow.seconds).all()
    assert (narrow.upper < wide.upper).all()


def test_warm_weights_are_faster_and_many_copies_are_cold() -> None:
    hw = replace(load_hardware("a100"), sections={})  # a fit may find no difference
    cold, warm = (
        gemm_time(1, 2048, 2048, hw, options=GemmOptions(copies=c)).seconds for c in (None, 1)
    )
    assert warm < 0.95 * cold
    assert gemm_time(1, 2048, 2048, hw, options=GemmOptions(copies=1000)).seconds == pytest.approx(
        float(cold), rel=1e-3
    )


@pytest.mark.parametrize("size", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
@pytest.mark.parametrize("kernels", [1, len(Kernel)])
def test_neither_chunks_nor_other_kernels_show(size: int, kernels: int) -> None:
    hw, rng = load_hardware("h100"), np.random.default_rng(size)
    m, n, k = (np.ceil(2.0 ** rng.uniform(0, 13, size)) for _ in range(3))
    kernel = np.arange(size) % kernels
    m = np.where(kernel == Kernel.SPMV, 1.0, m)
    whole = gemm_time(m, n, k, hw, kernel=kernel, options=GemmOptions(detail=True))
    for i in {0, size // 2, size - 1}:
        alone = gemm_time(m[i], n[i], k[i], hw, kernel=kernel[i], options=GemmOptions(detail=True))
        assert all(getattr(whole, name)[i] == getattr(alone, name) for name in TIMES)
        assert all(values[i] == alone.details[name] for name, values in whole.details.items())


def test_whole_waves_are_whole() -> None:
    """As many tiles as SMs are one wave at any precision; one row more begins another wave."""
    for sm in (56, 84, 108, 114, 128, 132, 142, 188):
        machine = Machine(3e14, 2e12, 4e7, sm, 1.0, 2.0, 2.0, False)
        for dtype in (np.float64, np.float32):
            m = np.array([128 * sm, 128 * sm + 1, 128 * sm + 1024], dtype=dtype)
            n, k = np.full(3, 256, dtype=dtype), np.full(3, 8192, dtype=dtype)
            whole, begun, filled = analytical_time(
                m, n, k, ready_model(machine, defaults("ampere"), dtype)
            ).total_us
            assert begun > 1.3 * whole
            assert filled < 1.1 * begun


def bare(name: str) -> HardwareProfile:
    """The datasheet alone."""
    return replace(load_hardware(name), sections={}, stacks={}, stack="")


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("name", ["a100", "h100", "l40s", "rtx_4090", "mi300x", "h20", "b200"])
def test_weights_alone_save_no_arithmetic(name: str, weights: str) -> None:
    hw = load_hardware(name)
    n, k = np.array(
        [(4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (8192, 8192)], dtype=float
    ).T
    dense, narrow = (gemm_time(8192, n, k, hw, weight_dtype=w).seconds for w in (None, weights))
    assert (narrow > 0.93 * dense).all()
    few = [gemm_time(1, n, k, hw, weight_dtype=w).seconds for w in (None, weights)]
    assert (few[1] < few[0] + 10e-6).all()
    assert few[1].sum() < 0.95 * few[0].sum()


@pytest.mark.parametrize("name", ["a100@vllm", "h100", "rtx_3090", "rtx_4090", "l40s"])
def test_few_tokens_with_narrow_weights_wait_for_memory(name: str) -> None:
    """Marlin dequantises in registers: up to 16 tokens take little more than the bytes."""
    t = gemm_time(np.array([1, 8, 16]), 14336, 4096, load_hardware(name), weight_dtype="int4")
    assert (t.bottlenecks == "memory").all()
    dense = gemm_time(1, 14336, 4096, load_hardware(name)).seconds
    assert (t.seconds < 0.4 * dense).all()


def test_sections_of_another_weight_only_kernel_are_not_used() -> None:
    few = {
        name: gemm_time(16, 8192, 8192, load_hardware(name), weight_dtype="int4").seconds
        for name in ("a100@vllm", "a100@sglang", "a100@trtllm")
    }
    assert max(few["a100@vllm"], few["a100@sglang"]) < 0.8 * few["a100@trtllm"]


def test_a_step_of_a_persistent_kernel_is_inside() -> None:
    """TensorRT-LLM's tables: cuBLAS changes the kernel at 1,025 tokens, and CUTLASS kernels in
    nvfp4 begin a wave that hardly fills."""
    bf16 = gemm_time(np.array([1024, 1025]), 5120, 5120, load_hardware("h100@trtllm"))
    assert (bf16.lower < np.array([69.8e-6, 105.0e-6])).all()
    assert (bf16.upper > np.array([69.8e-6, 105.0e-6])).all()
    width = np.log(bf16.upper / bf16.lower)
    assert width[1] > 1.3 * width[0]  # only past the edge
    b200 = load_hardware("b200@trtllm")
    for m, n in ((1152, 4096), (2304, 2048)):  # 144 tiles of 128 x 256 on 148 SMs
        whole, begun = gemm_time(np.array([m, m + 1]), n, 8192, b200, dtype="nvfp4").seconds
        assert 1.4 < begun / whole < 2.0


def test_the_clock_follows_the_power_per_flop() -> None:
    h100 = load_hardware("h100_sxm")
    assert clocked(0.8, h100) == pytest.approx(0.8, rel=0.01)
    assert clocked(0.8, replace(h100, power_w=h100.power_w / 4)) == pytest.approx(0.4, rel=0.01)
    assert clocked(0.8, replace(h100, power_w=100 * h100.power_w)) == UNLIMITED
    assert clocked(0.8, load_hardware("mi300x")) == 0.8
    # more power is never slower
    hw = bare("h20")
    times = [
        gemm_time(4096, 4096, 4096, replace(hw, power_w=p), dtype="fp8").seconds
        for p in (25.0, 50.0, 400.0)
    ]
    assert times[0] > times[1] > times[2]


SHAPES = [(7,), (6, 7), (4, 5, 3), (1, 4), (2, 1, 3)]


def grid(shape: tuple[int, ...], dtype: type = np.float64) -> ResidualGrid:
    values = np.random.default_rng(len(shape)).normal(size=shape).astype(dtype)
    return ResidualGrid((1.0, 2.0, 0.0)[: len(shape)], (2.0, 1.0, 0.5)[: len(shape)], values)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_interpolation_equals_scipys_and_is_flat_beyond_the_edges(
    shape: tuple[int, ...], dtype: type
) -> None:
    one = grid(shape, dtype)
    points = np.random.default_rng(0).uniform(-3.0, 18.0, (len(shape), 500))
    # scipy needs two nodes an axis: one that stands alone is there twice
    nodes = [
        a + s * np.arange(max(n, 2)) for a, s, n in zip(one.start, one.step, shape, strict=True)
    ]
    values = one.values.astype(np.float64)
    for axis, count in enumerate(shape):
        values = np.repeat(values, 2, axis) if count == 1 else values
    inside = np.stack([np.clip(p, x[0], x[-1]) for p, x in zip(points, nodes, strict=True)], axis=1)
    found = one(points)
    assert found.dtype == dtype
    expected = RegularGridInterpolator(nodes, values)(inside)
    np.testing.assert_allclose(found, expected, atol=1e-9 if dtype is np.float64 else 3e-5)


def test_rows_between_measured_numbers_of_rows_lie_between_their_factors() -> None:
    rows = RowResidual(np.array([1.0, 4.0, 64.0]), np.array([0.3, -0.1, 0.1]))
    again = RowResidual.from_arrays(rows.arrays())
    found = again(np.array([1.0, 2.0, 4.0, 16.0, 64.0, 4096.0], dtype=np.float32))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [0.3, 0.1, -0.1, 0.0, 0.1, 0.1], atol=1e-7)
    assert RowResidual.from_arrays(grid((3,)).arrays()) is None


def test_times_of_gemms_do_not_jump_from_one_m_to_the_next() -> None:
    times = gemm_time([391, 392, 393], 6144, 4096, load_hardware("h100")).seconds
    assert times.max() / times.min() < 1.01
