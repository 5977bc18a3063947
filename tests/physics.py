"""Physics of predictions over all GPUs, engines, formats and pruning families. Tests run a few
thousand cases; ``python tests/physics.py 5000000 5000`` runs more, and the sweeps."""

from __future__ import annotations

import contextlib
import math
import random
import sys
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

import simulator
from simulator.codes import LABELS, Kernel, Kind
from simulator.engines.engine import list_engines, load_engine
from simulator.errors import InputError
from simulator.hardware.library import list_hardware, load_hardware
from simulator.hardware.profile import HardwareProfile
from simulator.models.library import list_models
from simulator.operators.base import ELEMENT_BYTES
from simulator.prediction.explain import waterfall
from simulator.prediction.table import speedups
from simulator.pruning import FAMILIES
from simulator.uncertainty.intervals import workload_time
from simulator.uncertainty.operators import gemm_time
from simulator.workload import Workload

ROUNDING = 1 - 1e-6  # residual grids have single precision
CHUNK = 4096  # GEMMs at once
SWEPT = (("h100_sxm", "vllm"), ("a100_sxm_80gb", "hf"), ("l40s", "trtllm"))
"""GPUs and engines of the sweeps."""
REQUESTS = (("prefill", 1), ("decode", 1), ("decode", 32))
"""Phases and batches of the sweeps."""
STEP = 0.02
"""Change of speedup over bound between neighbouring sparsities that needs a cause."""


@lru_cache
def served() -> tuple[HardwareProfile, ...]:
    """Every GPU, with the kernels of every engine that has its own."""
    engines = [load_engine(name) for name in ("vllm", "sglang", "trtllm")]
    found = []
    for name in list_hardware():
        hw = load_hardware(name)
        found += [engine.serving(hw) for engine in engines] if hw.stacks else [hw]
    return tuple(found)


def formats(hw: HardwareProfile) -> Iterator[tuple[str, str]]:
    """Formats of arithmetic and weights that have a rate, and weights alone."""
    for dtype in hw.rates:
        yield dtype, dtype
    for label, needed in LABELS.items():
        for dtype in needed:
            if dtype in hw.rates:
                yield dtype, label.removesuffix("_wo")


def wrong_gemms(count: int, seed: int) -> list[str]:
    """Return the products that are faster than the floors of FLOPs and bytes, without a number, or
    outside their own interval."""
    rng = np.random.default_rng(seed)
    cases = [
        (hw, dtype, weight, kernel)
        for hw in served()
        for dtype, weight in formats(hw)
        for kernel in (Kernel.DENSE, Kernel.SPARSE24)
        if kernel == Kernel.DENSE or hw.rates[dtype].sparse_factor > 1.0
    ]
    wrong, each = [], min(max(count // len(cases), 1), CHUNK)
    for i in range(-(-count // each)):
        hw, dtype, weight, kernel = cases[i % len(cases)]
        m = np.round(2.0 ** rng.uniform(0.0, 15.0, each)).astype(int)
        n, k = np.round(2.0 ** rng.uniform(5.0, 16.0, (2, each))).astype(int)
        aligned = rng.random(each) < 0.7
        n, k = (np.where(aligned, -(-x // 64) * 64, x) for x in (n, k))
        t = gemm_time(m, n, k, hw, dtype=dtype, weight_dtype=weight, kernel=kernel.name.lower())
        sparse = kernel == Kernel.SPARSE24
        size = ELEMENT_BYTES[weight]
        stored = 0.5 * size + 0.125 if sparse else size
        peak = hw.peak_flop_per_s(dtype, sparse=sparse) * hw.clock_headroom
        floor = np.maximum(2.0 * m * n * k / peak, stored * n * k / hw.bandwidth_bytes_per_s)
        good = (t.seconds >= ROUNDING * floor) & (t.lower >= ROUNDING * 2.0 * m * n * k / peak)
        good &= (t.lower <= t.seconds) & (t.seconds <= t.upper) & np.isfinite(t.upper)
        for bad in np.flatnonzero(~good)[:3]:
            shape = f"{m[bad]} x {n[bad]} x {k[bad]}"
            share = t.seconds[bad] / floor[bad]
            name = f"{hw.label} {hw.stack} {dtype}/{weight} {kernel.name}"
            wrong.append(f"{name}: {shape}: {share:.4f} of its floor")
    return wrong


def wrong_models(count: int, seed: int) -> tuple[int, list[str]]:
    """Return how many random pruned models were predicted, and those whose times break a law."""
    rng, wrong, done = random.Random(seed), [], 0
    for _ in range(count):
        hw = load_hardware(rng.choice(list_hardware()))
        name = rng.choice(list_models())
        family = rng.choice([*FAMILIES])
        sparsity = round(rng.uniform(0.01, 0.95), 2)
        request: dict[str, Any] = {
            "phase": rng.choice(["prefill", "decode", "generate", "serve"]),
            "batch": rng.choice([1, 3, 16, 64]),
            "seq": rng.choice([17, 512, 2048, 9000]),
            "new_tokens": 33,
            "engine": rng.choice(list_engines()),
            "devices": rng.choice([1, 1, 2, 8]),
            "dtype": rng.choice([None, *hw.rates]),
        }
        case = f"{name} {hw.label} {family} {sparsity} {request}"
        try:
            dense = simulator.lower(name, **request)
            pruned = simulator.prune(dense, family, sparsity)
            s = simulator.speedup(dense, pruned, hw)
        except InputError:
            continue
        done += 1
        numbers = (s.speedup, s.lower, s.upper, s.dense_s, s.pruned_s, s.roofline_bound)
        if not all(map(math.isfinite, numbers)) or min(numbers) <= 0.0:
            wrong.append(f"{case}: not a number")
            continue
        if not s.lower <= s.speedup <= s.upper:
            wrong.append(f"{case}: {s.speedup} is outside its interval")
        for w in (dense, pruned):
            t = workload_time(w, hw)
            # activations may lie in L2; products have :func:`wrong_gemms`
            bound = ~np.isin(w.kind, (Kind.ELEMENTWISE, Kind.GEMM))
            if (t.seconds < ROUNDING * t.roofline_s / hw.clock_headroom)[bound].any():
                wrong.append(f"{case}: an operator is faster than its floor")
            if not t.total_lower_s <= t.total_s <= t.total_upper_s:
                wrong.append(f"{case}: {t.total_s} s is outside its interval")
    return done, wrong


CAUSES = ("rounding", "tile quantisation", "wave quantisation", "alignment")
"""Steps of the waterfall that jump between neighbouring sparsities: heads, experts and layers are
whole, and so are tiles and waves."""


def jumps(gpu: str, engine: str, phase: str, batch: int, family: str) -> Iterator[tuple[str, str]]:
    """Yield each jump of the speedup over sparsities in steps of 0.01, and its cause or "". A jump
    is a fall, or a change of speedup over bound that its neighbours do not have."""
    hw = load_hardware(gpu)
    model = "qwen3-30b-a3b" if family == "experts" else "llama-3.1-8b"
    dense = simulator.lower(model, engine=engine, phase=phase, batch=batch, seq=2048)
    grid = {}
    for s in np.round(np.arange(0.01, 0.96, 0.01), 2).tolist():
        with contextlib.suppress(InputError):
            grid[s] = simulator.prune(dense, family, s)
    sparsities = [*grid]
    found = speedups(dense, [*grid.values()], hw) if len(grid) > 1 else []
    log = np.log([s.speedup for s in found])
    rise = np.diff(log)
    over = np.diff(log - np.log([s.roofline_bound for s in found]))
    usual = [np.median(over[max(i - 3, 0) : i + 4]) for i in range(len(over))]
    for i in np.flatnonzero((np.abs(over - usual) > STEP) | (rise < -STEP)):
        before, after = (_factors(dense, grid[s], hw) for s in sparsities[i : i + 2])
        moved = {name: math.log(after[name] / before[name]) for name in after}
        largest = max(CAUSES, key=lambda name: abs(moved[name]))
        cause = largest if abs(moved[largest]) > STEP / 3 else ""
        if len({_edges(grid[s]) for s in sparsities[i : i + 2]}) > 1:
            cause = cause or "tiles of tokens or of a rank"
        ends = " -> ".join(f"{s.sparsity:.2f} {s.speedup:.3f}x" for s in found[i : i + 2])
        yield f"{gpu} {engine} {phase} batch {batch} {family}: {ends}", cause


def _edges(w: Workload) -> tuple[float, ...]:
    """Tiles of 64 tokens, and of 64 of a rank, of the products."""
    products = w.kind == Kind.GEMM
    rank = np.where(w.stage == 1, w.n, 0)[products]
    return tuple(np.unique(-(-np.r_[w.m[products], rank] // 64)).tolist())


def _factors(dense: Workload, pruned: Workload, hw: HardwareProfile) -> dict[str, float]:
    return {step.name: step.factor for step in waterfall(dense, pruned, hw)}


def main(gemms: int, models: int) -> None:
    """Print what breaks a law, and the jumps without a cause."""
    print(f"{gemms:,} products: {wrong_gemms(gemms, 0) or 'none breaks a law'}", flush=True)
    done, wrong = wrong_models(models, 0)
    print(f"{done:,} of {models:,} models run: {wrong or 'none breaks a law'}", flush=True)
    causes = Counter[str]()
    for gpu, engine in SWEPT:
        for phase, batch in REQUESTS:
            for family in FAMILIES:
                with contextlib.suppress(InputError):
                    for jump, cause in jumps(gpu, engine, phase, batch, family):
                        causes[cause] += 1
                        print("" if cause else f"{jump}\n", end="", flush=True)
    print(causes)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
