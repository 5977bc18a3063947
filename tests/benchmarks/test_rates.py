"""Shapes and configurations a second on one core."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.fit.gemm import fit_gemm, products
from calibration.measurements import load_measurements
from simulator.hardware.library import load_hardware
from simulator.operators.base import Machine
from simulator.prediction.sweep import Grid, piece_results, write_sweep
from simulator.uncertainty.operators import gemm_time

Floor = Callable[..., None]
DEVICES = ("a100_sxm_80gb", "h100_sxm", "rtx_4090")
SHAPES = 200_000
GRID = Grid(
    ("llama-3.1-8b",),
    DEVICES,
    tuple(round(0.08 * i, 2) for i in range(1, 13)),
    ("prefill", "decode"),
    tuple(2**i for i in range(8)),
    tuple(2**i for i in range(7, 15)),
    engines=("reference", "hf"),
)
"""About 100,000 configurations: 11 families on three devices in two engines, prefill and decode."""


@pytest.fixture(scope="module")
def shapes() -> tuple[Any, Any, Any]:
    """Shapes spread over the range that decoders use."""
    rng = np.random.default_rng(0)
    m = np.floor(2.0 ** rng.uniform(0, 13, SHAPES))
    n, k = (16.0 * (1 + np.floor(2.0 ** rng.uniform(6, 14, SHAPES) / 16)) for _ in range(2))
    return m, n, k


@pytest.mark.parametrize("name", DEVICES)
def test_calibrated_gemms(
    benchmark: Any, shapes: tuple[Any, Any, Any], name: str, floor: Floor
) -> None:
    """Analytical time, residual and interval of the shipped profile."""
    hw = load_hardware(name)
    section = hw.section("gemm", "bf16")
    time = benchmark(gemm_time, *shapes, hw)
    assert (time.lower <= time.seconds).all()
    what = (
        f"GEMMs a second, {name} ({section.status}, {'with' if section.arrays else 'without'}"
        " residual)"
    )
    floor(what, SHAPES / benchmark.stats["min"], 3e6)


def test_configurations_of_a_sweep(benchmark: Any, floor: Floor) -> None:
    """Amortised cost of a configuration: lowering, pruning, three devices, two engines, intervals,
    bounds, memory."""
    some = list(GRID.pieces())[:2]
    piece_results(some[0], GRID.hardware, {})
    rows = benchmark(lambda: sum(len(piece_results(p, GRID.hardware, {})) for p in some))
    floor(
        "microseconds a configuration, without the file",
        1e6 * benchmark.stats["min"] / rows,
        10.0,
        False,
    )


def test_a_whole_sweep(benchmark: Any, tmp_path: Path, floor: Floor) -> None:
    """A hundred thousand configurations, one process."""
    pytest.importorskip("pyarrow")
    targets = iter(tmp_path / str(i) for i in range(1000))
    done = benchmark.pedantic(lambda: write_sweep(GRID, next(targets)), rounds=3, warmup_rounds=1)
    assert done.configurations == GRID.size
    million_s = 1e6 * benchmark.stats["min"] / GRID.size
    floor("seconds for a million configurations at this rate, one process", million_s, 120.0, False)


@pytest.mark.parametrize("rows", [100, 400, 4000])
def test_fit_of_gemms(benchmark: Any, rows: int, floor: Floor) -> None:
    """Time to fit a profile's GEMM section from the measurements that ship."""
    records = load_measurements("h100_sxm/gemm/trtllm", "bf16")
    at = np.random.default_rng(0).permutation(len(records))[:rows]
    hw, some = load_hardware("h100_sxm"), records.select(at)
    data = products(some.m, some.n, some.k, some.seconds, Machine.of(hw))
    benchmark.pedantic(fit_gemm, (data, hw), rounds=1)
    floor(f"seconds to fit {rows} rows", benchmark.stats["min"], 60.0, False)
