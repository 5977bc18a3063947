"""The analytic form of the GEMM model (docs/model.md): tiles, waves, split-K, memory, fixed time; no residual.

Use :func:`machine_core` to turn datasheet facts and named constants into a :class:`Core`, :func:`core_time` to time
shapes on it. Times are microseconds, so that their cubes stay near one. Arithmetic is in the precision of the shapes:
float64 to fit, float32 to predict many.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simulator.arrays import Array
from simulator.hardware.formats import formats_of
from simulator.workload import DTYPE_BYTES, DTYPES

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile

Factor = Array | float

ELEMENT_BYTES: Mapping[str, float] = MappingProxyType(dict(zip(DTYPES, DTYPE_BYTES.tolist(), strict=True)))

LINE_BYTES = 128.0
"""Bytes of K a main-loop step covers per row of an operand: 64 elements of 16 bits."""

MENUS: Mapping[str, tuple[tuple[int, int], ...]] = MappingProxyType(
    {
        "stationary": ((32, 64), (64, 64), (64, 128), (64, 256), (128, 64), (128, 256)),
        "persistent": ((16, 64), (64, 64), (64, 128), (64, 192), (64, 256), (128, 256)),
        "packing": ((1, 1),),
    }
)
"""Tiles of cuBLAS kernels (rows of m x columns of n): of kernels that launch a block a tile, of kernels whose blocks
stay and take tile after tile (Hopper, the B200), and of products on a CPU, which pad nothing that could be seen in
their time."""


WGMMA_ROWS = 64.0
"""Rows of a warpgroup's matrix instruction on Hopper (PTX ISA, wgmma: m64). Kernels may have n in their place; where
nothing was fitted, no tile has fewer, which shows on a device that computes little for its bandwidth."""


@dataclass(frozen=True)
class Machine:
    """Datasheet facts of one arithmetic on one device, SI."""

    peak_flop_per_s: float
    bandwidth_bytes_per_s: float
    l2_bytes: float
    sm_count: int
    headroom: float  # highest clock over boost clock
    element_bytes: float  # of an activation
    weight_bytes: float  # of a stored weight, indices included; of attention, of the KV cache
    persistent: bool  # blocks stay on their SM and take tile after tile
    packs: bool = False  # a CPU: no tiles and waves, weights rearranged from `pack_m` rows on, nothing overlaps
    least_rows: float = 1.0  # rows of the smallest tile that is used
    ragged: bool = False  # tiles that are skipped end at once: SMs go on one by one, not in waves

    @classmethod
    def of(cls, hw: HardwareProfile, label: str = "bf16") -> Machine:
        """Those of a profile for a number format of its sections; InputError where the device has no such
        arithmetic."""
        dtype, weight = formats_of(label, hw.rates)
        peak, memory = hw.rate(dtype).flop_per_s, (float(hw.bandwidth_bytes_per_s), float(hw.l2_bytes))
        sizes, headroom = (ELEMENT_BYTES[dtype], ELEMENT_BYTES[weight]), max(1.0, float(hw.clock_headroom))
        kind = hw.architecture in ("hopper", "blackwell_sm100"), hw.architecture == "cpu"
        return cls(peak, *memory, int(hw.sm_count), headroom, *sizes, *kind)


@dataclass(frozen=True)
class Core:
    """A machine and its constants (SI), ready to time shapes; the arrays have one row a tile of the menu."""

    machine: Machine
    constants: Mapping[str, float]
    tile_m: Array
    tile_n: Array
    step_us: Array  # a main-loop step
    flop_us: Array  # its arithmetic alone
    epilogue_us: Array
    feed_us: Array  # L2 feed of one step of one tile, whole device; 0 where blocks stay on their SM
    step_elements: float
    t0_us: float


@dataclass(frozen=True)
class CoreTime:
    """What the core says about shapes, arrays of their length; microseconds unless said otherwise."""

    total_us: Array  # fixed time included, residual not
    compute3: Array  # main loop of the chosen tile, cubed; it joins the memory time by a 3-norm
    memory_us: Array  # operands and result through the memory system
    dram_bytes: Array  # come from or go to DRAM
    tile: NDArray[np.int8]  # chosen entry of the menu
    split: Array  # split-K factor
    tiles: Array  # output tiles of the launch, split parts not counted


def machine_core(machine: Machine, constants: Mapping[str, float], dtype: Any = np.float64) -> Core:
    """Per-tile times, once for many shapes of a precision, from constants by their names in ``GEMM_CONSTANTS``."""
    c = {name: float(value) for name, value in constants.items()}
    menu = "packing" if machine.packs else "persistent" if machine.persistent else "stationary"
    tiles = [tile for tile in MENUS[menu] if tile[0] >= machine.least_rows]
    tile_m, tile_n = np.array(tiles, dtype=np.float64).T[:, :, None]
    step = LINE_BYTES / 2.0 ** math.floor(math.log2(machine.element_bytes))  # scales of nvfp4 lie elsewhere
    flop_us = 1e6 * 2.0 * step * tile_m * tile_n * machine.sm_count / (machine.peak_flop_per_s * c["e_tc"])
    columns = {
        "tile_m": tile_m,
        "tile_n": tile_n,
        "step_us": ((1e6 * c["tau"]) ** 4 + flop_us**4) ** 0.25,
        "flop_us": flop_us,
        "epilogue_us": 1e6 * machine.element_bytes * tile_m * tile_n / c["b_e"],
        "feed_us": 1e6 * LINE_BYTES * (tile_m + tile_n) / c["b_l2"] * (menu == "stationary"),
    }
    arrays = {name: values.astype(dtype) for name, values in columns.items()}
    return Core(machine, MappingProxyType(c), **arrays, step_elements=step, t0_us=1e6 * c["t0"])


def quantised(c: Mapping[str, float], share: float) -> dict[str, float]:
    """Constants of a weight-only kernel from those of the dense one: a step of the main loop waits for, and L2 feeds, a
    ``share`` of the bytes."""
    return {
        "t0": c["t0"] + c["quant_time"],
        "e_tc": c["e_tc"] * c["quant_step"],
        "tau": c["tau"] * share,
        "b_l2": c["b_l2"] / share,
    }


def residency(footprint_bytes: Array, core: Core) -> Array:
    """Share of a footprint that stays in L2: 1 / (1 + (footprint / (c_l2 L2))^Q)."""
    # far beyond, nothing stays; single precision would overflow
    x = np.minimum(footprint_bytes * (1.0 / (core.constants["c_l2"] * core.machine.l2_bytes)), 100.0)
    power = core.constants["l2_power"]
    doublings = {2.0: 1, 4.0: 2, 8.0: 3, 16.0: 4}.get(power)
    if doublings is None:
        x = x**power
    for _ in range(doublings or 0):  # much faster than a general power
        x = x * x
    return np.asarray(1.0 / (1.0 + x))


def memory_time(
    m: Array, n: Array, k: Array, core: Core, copies: Factor | None, load_scale: Factor
) -> tuple[Array, Array]:
    """Microseconds of moving the operands and the result, and the bytes of them that DRAM moves.

    ``copies`` weights are used in turn: the footprint that competes for L2; None for cold weights. The activations,
    ``m (n + k)``, are warm as far as they fit. ``load_scale`` stretches the weights' time.
    """
    machine, c = core.machine, core.constants
    weights, acts = n * k * machine.weight_bytes, (n + k) * m * machine.element_bytes
    warm = residency(acts, core) * acts
    hit = 0.0 if copies is None else weights * residency(weights * copies, core)
    miss, cold = weights - hit, acts - warm
    dram_us, hit_us = 1e6 / (machine.bandwidth_bytes_per_s * c["e_d"]), 1e6 / c["b_hit"]
    return (miss * load_scale + cold) * dram_us + (hit * load_scale + warm) * hit_us, miss + cold


def core_time(
    m: Array,
    n: Array,
    k: Array,
    core: Core,
    copies: Factor | None = None,
    step_scale: Factor = 1.0,
    load_scale: Factor = 1.0,
) -> CoreTime:
    """Time of GEMMs y[m, n] = x[m, k] w[k, n] by the analytic form; m, n, k at least 1, of one shape (x,).

    ``copies`` and ``load_scale`` are of :func:`memory_time`, ``step_scale`` a factor of the main-loop step.
    """
    machine, c = core.machine, core.constants
    if machine.packs:
        return _packed_time(m, n, k, core, copies, step_scale, load_scale)
    sm, step = float(machine.sm_count), core.step_us * step_scale
    tiles, steps = np.ceil(m / core.tile_m) * np.ceil(n / core.tile_n), np.ceil(k / core.step_elements)
    # a division: the reciprocal's rounding would make 132 tiles on 132 SMs two waves
    even = machine.persistent or machine.ragged
    waves = np.maximum(tiles / sm, 1.0) if even else np.ceil(tiles / sm)
    whole = cube(waves * (steps * step + core.epilogue_us))
    # split-K: SMs that would idle share one tile's k-steps, and their partial sums are added up in a second pass
    split = np.minimum(np.maximum(np.floor(sm / tiles), 1.0), np.clip(np.floor(k / 128.0), 1.0, 64.0))
    chunk = np.ceil(steps / split)
    added = (4.0 * split + 2.0) * (m * n * (1e6 / c["b_s"]))
    shared = cube(chunk * step + core.epilogue_us + added + 1e6 * c["t_s"])
    if not machine.persistent:
        feed = tiles * (core.feed_us * step_scale)
        whole = whole + cube(steps * feed)
        shared = shared + cube(split * chunk * feed)
    shared[tiles > sm] = np.inf
    best = np.minimum(whole, shared)
    compute = best.min(axis=0)
    numbers = np.arange(len(best), dtype=np.int8)[:, None]
    tile = ((best == compute) * numbers).max(axis=0)  # of equally fast ones the last
    chosen = tile.astype(np.intp) * len(tile) + np.arange(len(tile))
    unsplit, split, tiles = (a.take(chosen) for a in (whole, split, tiles))
    memory, dram = memory_time(m, n, k, core, copies, load_scale)
    total = cube_root(cube(memory) + compute) + core.t0_us
    if machine.element_bytes < 2.0:  # 16-bit activations read, narrow ones written, by a kernel of its own before
        total = total + m * k * (1e6 * (2.0 + machine.element_bytes) / c["b_convert"])
    return CoreTime(total, compute, memory, dram, tile, np.where(unsplit <= compute, 1.0, split), tiles)


def _packed_time(
    m: Array, n: Array, k: Array, core: Core, copies: Factor | None, step_scale: Factor, load_scale: Factor
) -> CoreTime:
    """A product on a CPU: fixed time, operands, rearranging weights from ``pack_m`` rows on, and arithmetic in turn."""
    c = core.constants
    packing = np.where(m >= c["pack_m"], 1.0 + c["pack"], 1.0).astype(m.dtype)
    memory, dram = memory_time(m, n, k, core, copies, load_scale * packing)
    compute = m * n * k * (2e6 / (core.machine.peak_flop_per_s * c["e_tc"])) * step_scale
    total, tile = memory + compute + core.t0_us, np.zeros(len(m), dtype=np.int8)
    return CoreTime(total, cube(compute), memory, dram, tile, np.ones_like(m), m * n)


def cube(x: Array) -> Array:
    """x^3; ``x**3`` would be a general power."""
    return np.asarray(x * x * x)


def cube_root(x: Array) -> Array:
    """Cube root of positive numbers; faster than ``np.cbrt``, whose loop is scalar."""
    return np.asarray(np.exp2(np.log2(x) * (1.0 / 3.0)))
