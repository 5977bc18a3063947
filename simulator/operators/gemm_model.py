"""The analytical GEMM model (docs/model.md): tiles, waves, split-K, memory, fixed time; without
residual.

Times are microseconds, so their cubes are near one. The arithmetic has the precision of the shapes:
float64 in fits, float32 in predictions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from simulator.arrays import Array, CodeArray
from simulator.operators.base import Machine, RowValues, Values

Factor = Array | float

LINE_BYTES = 128.0
"""Bytes of k per main-loop step and row of an operand: 64 elements of 16 bits."""

MENUS: Mapping[str, tuple[tuple[int, int], ...]] = {
    "stationary": ((32, 64), (64, 64), (64, 128), (64, 256), (128, 64), (128, 256)),
    "persistent": ((16, 64), (64, 64), (64, 128), (64, 192), (64, 256), (128, 256)),
    "striped": ((8, 128), (16, 128), (32, 128), (48, 128), (64, 256)),
    "packing": ((1, 1),),
}
"""Tiles (rows of m x columns of n): of cuBLAS kernels that launch one block per tile, of cuBLAS
kernels whose blocks stay and compute several tiles (Hopper, the B200), of weight-only kernels that
share all main-loop steps among the SMs (Marlin, csrc/quantization/marlin/marlin.cu of vLLM: 8 rows
or blocks of 16, up to 64), and of products on a CPU, whose times show no padding."""

PADDED_ROWS = 256.0
WAVE_TILE = (128.0, 256.0)
"""Rows of a pair of tiles, and the tile, by which the rows of a table may choose how much of the
padding of m and of the idle SMs of the last wave persistent kernels pay (CUTLASS and DeepGEMM;
cuBLAS avoids nearly all of it with more tiles)."""

WGMMA_ROWS = 64.0
"""Rows of a warpgroup's matrix instruction on Hopper (PTX ISA, wgmma: m64). DeepGEMM's fp8 products
have no tile with fewer rows; kernels of other formats may use n instead of m. This matters on
devices with low arithmetic rate and high bandwidth."""


@dataclass(frozen=True)
class ReadyModel:
    """A machine and its constants (SI), ready to time shapes; arrays have one row per tile of the
    menu."""

    machine: Machine
    constants: Values
    tile_m: Array
    tile_n: Array
    step_us: Array  # a main-loop step
    flop_us: Array  # arithmetic of a step
    epilogue_us: Array
    feed_us: Array  # L2 feed of one step of one tile, whole device; 0 where blocks stay on their SM
    step_elements: float
    t0_us: Factor
    serial_us: float  # shortest step of a block that computes the whole k; 0 where k is split

    def for_each(self, count: int) -> ReadyModel:
        """Return the model of ``count`` shapes with the first values of its constants, then the
        second, and so on."""

        def wide(value: Any) -> Any:
            return (
                np.repeat(value, count, axis=-1)
                if isinstance(value, np.ndarray) and value.shape[-1] > 1
                else value
            )

        own = {name: wide(value) for name, value in vars(self).items()}
        return replace(
            self,
            **own | {"constants": {name: wide(value) for name, value in self.constants.items()}},
        )


class Analytical(NamedTuple):
    """Parts of the analytical time of shapes; microseconds unless stated otherwise."""

    total_us: Array  # fixed time included, residual not
    compute3: Array  # main loop of the chosen tile, cubed; a 3-norm joins it with the memory time
    serial3: Array | float  # part of the main loop that computes the whole k in sequence, cubed
    memory_us: Array  # operands and result through the memory system
    dram_bytes: Array  # to and from DRAM
    tile: CodeArray  # chosen entry of the menu
    split: Array  # split-K factor
    tiles: Array  # output tiles of the launch, split parts not counted


def ready_model(machine: Machine, constants: RowValues, dtype: Any = np.float64) -> ReadyModel:
    """Return per-tile times from the values of ``GEMM_CONSTANTS``. A constant may be an array:
    :meth:`ReadyModel.for_each` then times shapes with each of its values."""
    c: dict[str, Any] = {
        name: value if isinstance(value, np.ndarray) else float(value)
        for name, value in constants.items()
    }
    menu = "persistent" if machine.persistent else "stationary"
    menu = "packing" if machine.packs else "striped" if machine.striped else menu
    tiles = [tile if tile[0] >= machine.least_rows else tile[::-1] for tile in MENUS[menu]]
    tile_m, tile_n = np.array(tiles, dtype=np.float64).T[:, :, None]
    # scales of nvfp4 lie elsewhere
    step = LINE_BYTES / 2.0 ** math.floor(math.log2(machine.element_bytes))
    flop_us = (
        1e6
        * 2.0
        * step
        * tile_m
        * tile_n
        * machine.sm_count
        / (machine.peak_flop_per_s * c["e_tc"])
    )
    columns = {
        "tile_m": tile_m,
        "tile_n": tile_n,
        "step_us": ((1e6 * c["tau"]) ** 4 + flop_us**4) ** 0.25,
        "flop_us": flop_us,
        "epilogue_us": 1e6 * machine.element_bytes * tile_m * tile_n / c["b_e"],
        "feed_us": 1e6 * LINE_BYTES * (tile_m + tile_n) / c["b_l2"] * (menu == "stationary"),
    }
    arrays = {name: values.astype(dtype) for name, values in columns.items()}
    serial_us = 1e6 * c["sparse_tau"] if machine.serial else 0.0
    return ReadyModel(
        machine,
        MappingProxyType(c),
        **arrays,
        step_elements=step,
        t0_us=1e6 * c["t0"],
        serial_us=serial_us,
    )


def weight_only_constants(c: Values, share: float) -> dict[str, float]:
    """Return the constants of a weight-only kernel from those of the dense kernel. A main-loop step
    waits for a ``share`` of the bytes, which L2 feeds."""
    return {
        "t0": c["t0"] + c["quant_time"],
        "e_tc": c["e_tc"] * c["quant_step"],
        "tau": c["tau"] * share,
        "b_l2": c["b_l2"] / share,
    }


def residency(footprint_bytes: Array, model: ReadyModel) -> Array:
    """Return the share of a footprint that stays in L2: 1 / (1 + (footprint / (c_l2 L2))^Q)."""
    # nothing of a much larger footprint stays; single precision would overflow
    x = np.minimum(
        footprint_bytes * (1.0 / (model.constants["c_l2"] * model.machine.l2_bytes)), 100.0
    )
    power = model.constants["l2_power"]
    doublings = {2.0: 1, 4.0: 2, 8.0: 3, 16.0: 4}.get(power)
    if doublings is None:
        x = x**power
    for _ in range(doublings or 0):  # much faster than a general power
        x = x * x
    return 1.0 / (1.0 + x)


def memory_time(
    m: Array, n: Array, k: Array, model: ReadyModel, copies: Factor | None, load_scale: Factor
) -> tuple[Array, Array]:
    """Return the time of moving the operands and the result, microseconds, and the bytes that DRAM
    moves. ``copies`` weights used in turn compete for L2; None for cold weights. The activations,
    ``m (n + k)``, are in L2 if they fit. ``load_scale`` multiplies the time of the weights."""
    machine = model.machine
    c = model.constants
    weights = n * k * machine.weight_bytes
    acts = (n + k) * m * machine.element_bytes
    warm = residency(acts, model) * acts
    hit = 0.0 if copies is None else weights * residency(weights * copies, model)
    miss = weights - hit
    cold = acts - warm
    dram_us = 1e6 / (machine.bandwidth_bytes_per_s * c["e_d"])
    hit_us = 1e6 / c["b_hit"]
    return (miss * load_scale + cold) * dram_us + (hit * load_scale + warm) * hit_us, miss + cold


def analytical_time(
    m: Array,
    n: Array,
    k: Array,
    model: ReadyModel,
    copies: Factor | None = None,
    step_scale: Factor = 1.0,
    load_scale: Factor = 1.0,
) -> Analytical:
    """Return the parts of the time of GEMMs y[m, n] = x[m, k] w[k, n]; m, n, k are at least 1, of
    one shape (x,). ``copies`` and ``load_scale`` are those of :func:`memory_time`; ``step_scale``
    multiplies the main-loop step."""
    machine = model.machine
    c = model.constants
    if machine.packs:
        return _packed_time(m, n, k, model, copies, step_scale, load_scale)
    sm = float(machine.sm_count)
    step = model.step_us * step_scale
    tiles = np.ceil(m / model.tile_m) * np.ceil(n / model.tile_n)
    steps = np.ceil(k / model.step_elements)
    # a division: the reciprocal's rounding would make 132 tiles on 132 SMs two waves
    even = machine.persistent or machine.ragged or machine.striped
    waves = np.maximum(tiles / sm, 1.0) if even else np.ceil(tiles / sm)
    each = np.maximum(tiles / sm, 1.0 / steps) if machine.striped else waves
    whole = cube(each * (steps * step) + waves * model.epilogue_us)
    # split-K: SMs that would idle share the k-steps of a tile; a second pass adds the partial sums
    split = np.minimum(
        np.maximum(np.floor(sm / tiles), 1.0), np.clip(np.floor(k / 128.0), 1.0, 64.0)
    )
    chunk = np.ceil(steps / split)
    added = (4.0 * split + 2.0) * (m * n * (1e6 / c["b_s"]))
    shared = cube(chunk * step + model.epilogue_us + added + 1e6 * c["t_s"])
    if not machine.persistent:
        feed = tiles * (model.feed_us * step_scale)
        whole = whole + cube(steps * feed)
        shared = shared + cube(split * chunk * feed)
    shared[(tiles > sm) | machine.serial | machine.striped] = np.inf
    best = np.minimum(whole, shared)
    compute = best.min(axis=0)
    numbers = np.arange(len(best), dtype=np.int8)[:, None]
    tile = ((best == compute) * numbers).max(axis=0)  # the last of equally fast tiles
    chosen = tile.astype(np.intp) * len(tile) + np.arange(len(tile))
    unsplit, split, tiles = (a.take(chosen) for a in (whole, split, tiles))
    serial: Array | float = cube(steps * model.serial_us) if machine.serial else 0.0
    compute = compute + serial
    split = np.where(unsplit <= compute, 1.0, split)
    if quantises(machine):
        padding, wave = quantisation(m, n, model)
        compute = compute * cube(padding * wave)
    memory, dram = memory_time(m, n, k, model, copies, load_scale)
    total = cube_root(cube(memory) + compute) + model.t0_us
    return Analytical(total, compute, serial, memory, dram, tile, split, tiles)


def quantises(machine: Machine) -> bool:
    """Return whether the kernels pay a fitted share of :func:`quantisation`."""
    return machine.persistent and not (machine.ragged or machine.striped)


def wide_waves(m: Array, n: Array, machine: Machine) -> Array:
    """Return the waves of tiles of :data:`WAVE_TILE`."""
    tile_m, tile_n = WAVE_TILE
    tiles = np.ceil(m * (1.0 / tile_m)) * np.ceil(n * (1.0 / tile_n))
    return tiles / machine.sm_count


def quantisation(m: Array, n: Array, model: ReadyModel) -> tuple[Array, Array]:
    """Return the factors on the main loop from the padding of m and from the idle SMs of the last
    wave."""
    c = model.constants
    padded = np.minimum(np.ceil(m * (1.0 / PADDED_ROWS)) * PADDED_ROWS / m, 2.0)
    waves = wide_waves(m, n, model.machine)
    idle = np.where(waves > 1.0, np.ceil(waves) / waves, 1.0)
    return padded ** c["row_share"], idle ** c["wave_share"]


def _packed_time(
    m: Array,
    n: Array,
    k: Array,
    model: ReadyModel,
    copies: Factor | None,
    step_scale: Factor,
    load_scale: Factor,
) -> Analytical:
    """Return the parts of a product on a CPU, without overlap: fixed time, operands, arithmetic.
    From ``pack_m`` rows on, weights are rearranged."""
    c = model.constants
    packing = np.where(m >= c["pack_m"], 1.0 + c["pack"], 1.0).astype(m.dtype)
    memory, dram = memory_time(m, n, k, model, copies, load_scale * packing)
    compute = m * n * k * (2e6 / (model.machine.peak_flop_per_s * c["e_tc"])) * step_scale
    total = memory + compute + model.t0_us
    tile = np.zeros(len(m), dtype=np.int8)
    return Analytical(total, cube(compute), 0.0, memory, dram, tile, np.ones_like(m), m * n)


def cube(x: Array) -> Array:
    """Return x^3; ``x**3`` would be a general power."""
    return x * x * x


def cube_root(x: Array) -> Array:
    """Return the cube root of positive numbers; faster than ``np.cbrt``, whose loop is scalar."""
    return np.exp2(np.log2(x) * (1.0 / 3.0))
