"""Shapes and configurations a second on one core."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simulator.hardware.library import load_hardware
from simulator.kernels.gemm import gemm_time
from simulator.predict.compare import compare
from simulator.predict.grid import Grid
from simulator.predict.sweep import compute_part, piece_columns, pieces, sweep

Floor = Callable[..., None]
SHAPES = 200_000


@pytest.fixture(scope="module")
def shapes() -> tuple[Any, Any, Any]:
    """Shapes spread over the range that decoders use."""
    rng = np.random.default_rng(0)
    m = np.floor(2.0 ** rng.uniform(0, 13, SHAPES))
    n, k = (16.0 * (1 + np.floor(2.0 ** rng.uniform(6, 14, SHAPES) / 16)) for _ in range(2))
    return m, n, k


def grid(sparsities: int = 12) -> Grid:
    """11 families on three devices under both runtimes."""
    return Grid(
        ("llama-3.1-8b",),
        ("a100_sxm_80gb", "h100_sxm", "rtx_4090"),
        tuple(round(0.08 * i, 2) for i in range(1, sparsities)),
        ("prefill", "decode"),
        tuple(2**i for i in range(8)),
        tuple(2**i for i in range(7, 15)),
        runtimes=("cuda_graph", "eager"),
    )


@pytest.mark.parametrize("name", ["a100_sxm_80gb", "h100_sxm", "rtx_4090"])
def test_calibrated_gemms(benchmark: Any, shapes: tuple[Any, Any, Any], name: str, floor: Floor) -> None:
    """Core, residual and interval of the shipped profile."""
    hw = load_hardware(name)
    section = hw.section("gemm", "bf16")
    time = benchmark(gemm_time, *shapes, hw)
    assert (time.lower <= time.seconds).all()
    what = f"GEMMs a second, {name} ({section.status}, {'with' if section.arrays else 'without'} residual)"
    floor(what, SHAPES / benchmark.stats["min"], 3e6)


def test_configurations_of_a_sweep(benchmark: Any, floor: Floor) -> None:
    """Amortised cost of a configuration: lowering, pruning, three devices, two runtimes, intervals, bounds, memory."""
    g = grid()
    some = list(pieces(g))[:2]
    piece_columns(g, some[0], {})
    rows = benchmark(lambda: sum(len(piece_columns(g, p, {})["speedup"]) for p in some))
    floor("microseconds a configuration, without the file", 1e6 * benchmark.stats["min"] / rows, 10.0, False)


def test_configurations_of_a_sweep_as_parquet(benchmark: Any, floor: Floor) -> None:
    pytest.importorskip("pyarrow")
    g = grid()
    compute_part(g, None, 0)
    piece = next(pieces(g))
    benchmark(compute_part, g, None, 0)
    rows = len(piece.shapes) * len(piece.choices) * len(g.hardware) * len(g.runtimes)
    floor("microseconds a configuration, as Parquet", 1e6 * benchmark.stats["min"] / rows, 20.0, False)


def test_a_whole_sweep(benchmark: Any, tmp_path: Path, floor: Floor) -> None:
    """A hundred thousand configurations, one process."""
    pytest.importorskip("pyarrow")
    targets = iter(tmp_path / f"{i}.parquet" for i in range(1000))
    g = grid()
    done = benchmark.pedantic(lambda: sweep(g, next(targets)), rounds=3, warmup_rounds=1)
    assert done.configurations == g.size
    floor(
        "seconds for a million configurations at this rate, one process",
        1e6 * benchmark.stats["min"] / g.size,
        120.0,
        False,
    )


def test_comparing_a_stack(benchmark: Any) -> None:
    """The cost pass alone: one device, one runtime, a thousand workloads."""
    from simulator.models.library import load_model
    from simulator.models.lower import lower
    from simulator.predict.speedup import pairs_of
    from simulator.pruning import prune

    dense = lower(load_model("llama-3.1-8b"), phase="prefill", batch=1, seq=2048)
    pruned = [
        prune(dense, family, round(0.001 * i, 3))
        for family in ("depth", "width", "low_rank", "width_cross")
        for i in range(1, 250)
    ]
    hw = load_hardware("h100_sxm")
    (c,) = benchmark(lambda: compare(pairs_of(dense, pruned), hw))
    assert len(c.speedup) == 1 + len(pruned)
