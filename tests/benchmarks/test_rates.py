"""Shapes and configurations a second on one core."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layouts import folder_of, save_shards, tensors_of
from operator_times import decode_time, prefill_time
from scale import grid

from calibration.fit.attention import calls_of, fit_attention
from calibration.fit.gemm import fit_gemm, products
from calibration.measurements import load_measurements
from simulator.cost.base import Machine
from simulator.hardware.library import load_hardware
from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.prediction.batch import batch_with
from simulator.prediction.compare import compare
from simulator.prediction.sweep import compute_part, piece_results, write_sweep
from simulator.pruning import prune
from simulator.uncertainty.operators import gemm_time

Floor = Callable[..., None]
DEVICES = ("a100_sxm_80gb", "h100_sxm", "rtx_4090")
SHAPES = 200_000


@pytest.fixture(scope="module")
def shapes() -> tuple[Any, Any, Any]:
    """Shapes spread over the range that decoders use."""
    rng = np.random.default_rng(0)
    m = np.floor(2.0 ** rng.uniform(0, 13, SHAPES))
    n, k = (16.0 * (1 + np.floor(2.0 ** rng.uniform(6, 14, SHAPES) / 16)) for _ in range(2))
    return m, n, k


@pytest.mark.parametrize("name", DEVICES)
def test_calibrated_gemms(benchmark: Any, shapes: tuple[Any, Any, Any], name: str, floor: Floor) -> None:
    """Analytical time, residual and interval of the shipped profile."""
    hw = load_hardware(name)
    section = hw.section("gemm", "bf16")
    time = benchmark(gemm_time, *shapes, hw)
    assert (time.lower <= time.seconds).all()
    what = f"GEMMs a second, {name} ({section.status}, {'with' if section.arrays else 'without'} residual)"
    floor(what, SHAPES / benchmark.stats["min"], 3e6)


def test_configurations_of_a_sweep(benchmark: Any, floor: Floor) -> None:
    """Amortised cost of a configuration: lowering, pruning, three devices, two engines, intervals, bounds, memory."""
    g = grid(100_000)
    some = list(g.pieces())[:2]
    piece_results(some[0], g.hardware, {})
    rows = benchmark(lambda: sum(len(piece_results(p, g.hardware, {})) for p in some))
    floor("microseconds a configuration, without the file", 1e6 * benchmark.stats["min"] / rows, 10.0, False)


def test_configurations_of_a_sweep_as_parquet(benchmark: Any, floor: Floor) -> None:
    pytest.importorskip("pyarrow")
    g = grid(100_000)
    scenario, prunings = piece = next(g.pieces())
    compute_part(g.hardware, piece, g.digest(), 0)
    benchmark(compute_part, g.hardware, piece, g.digest(), 0)
    rows = len(scenario.shapes) * len(prunings) * len(g.hardware)
    floor("microseconds a configuration, as Parquet", 1e6 * benchmark.stats["min"] / rows, 20.0, False)


def test_a_whole_sweep(benchmark: Any, tmp_path: Path, floor: Floor) -> None:
    """A hundred thousand configurations, one process."""
    pytest.importorskip("pyarrow")
    targets = iter(tmp_path / str(i) for i in range(1000))
    g = grid(100_000)
    done = benchmark.pedantic(lambda: write_sweep(g, next(targets)), rounds=3, warmup_rounds=1)
    assert done.configurations == g.size
    million_s = 1e6 * benchmark.stats["min"] / g.size
    floor("seconds for a million configurations at this rate, one process", million_s, 120.0, False)


def test_comparing_a_stack(benchmark: Any) -> None:
    """The cost pass alone: one device, one engine, a thousand workloads."""
    dense = lower(load_model("llama-3.1-8b"), phase="prefill", batch=1, seq=2048)
    families = ("depth", "width", "low_rank", "width_cross")
    pruned = [prune(dense, family, round(0.001 * i, 3)) for family in families for i in range(1, 250)]
    c, _ = benchmark(lambda: compare(batch_with(dense, pruned), load_hardware("h100_sxm")))
    assert len(c["speedup"]) == 1 + len(pruned)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_few_attention_calls(benchmark: Any, phase: str, floor: Floor) -> None:
    hw = load_hardware("h100_sxm")
    if phase == "prefill":
        benchmark(prefill_time, [1, 64], 2048, 2048, 32, 8, 128, hw)
    else:
        benchmark(decode_time, [1, 64], 2048, 32, 8, 128, hw)
    floor(f"milliseconds for two calls, {phase}", 1e3 * benchmark.stats["min"], 1.0, False)


def test_headers_of_a_large_checkpoint(benchmark: Any, floor: Floor, tmp_path: Path) -> None:
    """LLaMA-2-70B in thirty files."""
    folder, model = folder_of(tmp_path, "llama-2-70b"), load_model("llama-2-70b")
    save_shards(folder, tensors_of(model), 30)
    assert benchmark.pedantic(load_model, (folder,), rounds=3) == model
    floor("seconds to read the headers of LLaMA-2-70B", benchmark.stats["min"], 1.0, False)


@pytest.mark.parametrize("rows", [100, 400, 4000])
def test_fit_of_gemms(benchmark: Any, rows: int, floor: Floor) -> None:
    """Time to fit a profile's GEMM section from the measurements that ship."""
    records = load_measurements("h100_sxm/gemm/trtllm", "bf16")
    at = np.random.default_rng(0).permutation(len(records))[:rows]
    hw, some = load_hardware("h100_sxm"), records.select(at)
    data = products(some.m, some.n, some.k, some.seconds, Machine.of(hw))
    benchmark.pedantic(fit_gemm, (data, hw), rounds=1)
    floor(f"seconds to fit {rows} rows", benchmark.stats["min"], 60.0, False)


def test_fit_of_attention(benchmark: Any, floor: Floor) -> None:
    records = load_measurements("h100_sxm/attention_decode/trtllm", "bf16")
    some = records.select(np.random.default_rng(0).permutation(len(records))[:400])
    hw = load_hardware("h100_sxm")
    calls = calls_of(some, "attention_decode", Machine.of(hw, "bf16"))
    benchmark.pedantic(fit_attention, (calls, hw.architecture), rounds=3)
    floor("seconds to fit 400 rows of attention", benchmark.stats["min"], 3.0, False)
