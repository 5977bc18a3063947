"""2:4 kernels: gains at few tokens by architecture and library, one plan for all shapes, and
weight-only formats."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import simulator
from simulator.hardware.library import load_hardware
from simulator.models.lower import lower
from simulator.operators.gemm import GEMM_CONSTANTS, Options, sparse24_constants
from simulator.pruning import prune
from simulator.uncertainty.forward import ratio_half
from simulator.uncertainty.intervals import workload_time
from simulator.uncertainty.operators import OperatorTimes, gemm_predicted, gemm_time


def sparse24(m: Any, n: Any, k: Any, gpu: str, *, searched: bool, **options: Any) -> OperatorTimes:
    return gemm_predicted(
        m, n, k, load_hardware(gpu), Options(kernel="sparse24", searched=searched, **options)
    )[0]


@pytest.mark.quick
def test_one_plan_walks_all_of_k_whatever_else_there_is() -> None:
    """An RTX 5090 takes 0.72 us per 64 elements of k at 8 to 64 tokens, for 4,096 and for 8,192
    outputs."""
    seconds = sparse24([[8], [64]], [4096, 8192], 16384, "rtx_5090", searched=False).seconds
    assert seconds == pytest.approx(16384 / 64 * 7.2e-7, rel=0.15)
    half = sparse24(8, 4096, 8192, "rtx_5090", searched=False).seconds
    assert half / seconds[0, 0] == pytest.approx(0.5, abs=0.05)


@pytest.mark.quick
@pytest.mark.parametrize("gpu", ["a100", "h100", "rtx_4090", "rtx_5090", "b200"])
def test_a_search_never_loses_and_gains_little_where_tiles_fill_the_device(gpu: str) -> None:
    m = np.array([1, 16, 64, 256, 1024, 4096, 16384])[:, None]
    n, k = np.array([4096, 14336, 4096]), np.array([4096, 4096, 14336])
    fixed, best = (sparse24(m, n, k, gpu, searched=searched).seconds for searched in (False, True))
    assert (fixed >= best).all()
    assert fixed[0].sum() > 1.05 * best[0].sum()
    assert fixed[-1] == pytest.approx(best[-1], rel=0.02)


def ratio(
    m: Any, n: Any, k: Any, gpu: str, dtype: str = "bf16", *, searched: bool = True
) -> tuple[Any, Any, Any]:
    """Return how much faster 2:4 is than dense, and the ends of the interval."""
    hw = load_hardware(gpu)
    dense, ((_, dense_error),) = gemm_predicted(m, n, k, hw, Options(dtype))
    pruned, ((_, pruned_error),) = gemm_predicted(
        m, n, k, hw, Options(dtype, kernel="sparse24", searched=searched)
    )
    gain, width = dense.seconds / pruned.seconds, np.exp(ratio_half(dense_error, pruned_error))
    return gain, gain / width, gain * width


@pytest.mark.quick
@pytest.mark.parametrize("gpu", ["a100", "l40s", "h100", "b200"])
def test_few_tokens_are_uncertain_where_no_table_tells(gpu: str) -> None:
    """Measured 2:4 kernels gain 0.7x to 1.5x at few tokens."""
    _, lower, upper = ratio(8, 28672, 4096, gpu)
    assert lower <= 0.75
    assert upper >= 1.5


@pytest.mark.quick
def test_a_measured_kernel_is_more_certain() -> None:
    """Fp8 of CUTLASS on an H100; torch's one plan on an RTX 5090."""
    assumed, measured = (
        np.divide(*ratio(8, 8192, 8192, "h100", dtype)[:0:-1]) for dtype in ("bf16", "fp8")
    )
    assert measured < 0.8 * assumed
    fixed = {gpu: sparse24(1, 4096, 14336, gpu, searched=False) for gpu in ("a100", "rtx_5090")}
    widths = {gpu: np.log(t.upper / t.lower) for gpu, t in fixed.items()}
    assert widths["rtx_5090"] < 0.8 * widths["a100"]
    assert {str(t.bottlenecks) for t in fixed.values()} == {"latency"}


@pytest.mark.quick
@pytest.mark.parametrize("gpu", ["a100", "rtx_4090"])
def test_weights_alone_gain_their_bytes(gpu: str) -> None:
    """Sparse-Marlin reads 3 bits instead of 4; half the arithmetic saves time if a tile of one
    token is not free."""
    n, k = np.array([6144, 4096, 28672, 4096]), np.array([4096, 4096, 4096, 14336])
    dense, pruned = (
        gemm_time(1, n, k, gpu, weight_dtype="int4", kernel=kernel).seconds.sum()
        for kernel in ("dense", "sparse24")
    )
    assert 1.1 < dense / pruned <= 1.1 * 4 / 3


@pytest.mark.quick
def test_constants_that_no_fit_moved_are_those_of_the_device() -> None:
    """The RTX 5090 inherits the GEMM section of the RTX 4090, the H100 fitted `sparse_step` in fp8
    alone."""
    hw = load_hardware("rtx_5090")
    found, assumed = sparse24_constants(hw.section("gemm", "bf16"), hw.architecture)
    assert found == {name: GEMM_CONSTANTS[name].default("blackwell") for name in found}
    assert not {"compute", "memory", "serial"} & set(assumed)
    h100 = load_hardware("h100")
    (narrow, known), (wide, unknown) = (
        sparse24_constants(h100.section("gemm", d), "hopper") for d in ("fp8", "bf16")
    )
    assert narrow["sparse_step"] == h100.section("gemm", "fp8")["sparse_step"]
    assert (
        narrow["sparse_load"]
        > wide["sparse_load"]
        == GEMM_CONSTANTS["sparse_load"].default("hopper")
    )
    assert set(unknown) - set(known) == {"memory"}


def test_an_engine_with_one_plan_gains_less_in_decode() -> None:
    """The library of an engine decides, not the hardware: torch has one plan, the benchmark times
    all plans."""
    gain = {}
    for engine in ("compile", "reference"):
        dense = lower("llama-3.1-8b", phase="decode", batch=1, seq=512, engine=engine)
        whole, half = (
            workload_time(w, load_hardware("a100"))
            for w in (dense, prune(dense, "semi_structured", 0.5))
        )
        gain[engine] = whole.total_s / half.total_s
    assert gain["compile"] < 1.0 < gain["reference"]


@pytest.mark.parametrize("engine", ["reference", "trtllm", "compile"])
def test_few_tokens_gain_nothing_for_certain_where_no_table_has_them(engine: str) -> None:
    """Tables of 2:4 with few tokens have the default plan of cuSPARSELt, which is slower than dense
    on an RTX 5090."""
    for name in ("rtx_5090", "rtx_pro_6000", "a100", "l40s", "h100"):
        for batch in (1, 16, 64):
            r = simulator.predict(
                "llama-3.1-8b", "semi_structured", name, phase="decode", batch=batch, engine=engine
            )
            assert r.speedup_lower <= 1.01, (name, batch, r.speedup_lower)
