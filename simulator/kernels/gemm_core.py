"""The analytic core of the GEMM model: tiles, waves, split-K, memory and fixed time, on arrays; no profile, no residual.

Use :func:`machine_core` to turn datasheet facts and named constants into a :class:`Core`, :func:`core_time` to time shapes on it.
Times inside are microseconds, so that their cubes stay near one. The form is DESIGN section 10; its tile shapes are those of cuBLAS
kernels.
Arithmetic is in the precision of the shapes given: float64 to fit, float32 to predict many.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

F = NDArray[np.floating[Any]]

LINE_BYTES = 128.0
"""Bytes of K a main-loop step covers per row of an operand: 64 elements of 16 bits."""

MENUS: Mapping[str, tuple[tuple[int, int], ...]] = MappingProxyType(
    {
        "stationary": ((32, 64), (64, 64), (64, 128), (64, 256), (128, 64), (128, 256)),
        "persistent": ((16, 64), (64, 64), (64, 128), (64, 192), (64, 256), (128, 256)),
        "packing": ((1, 1),),
    }
)
"""Tiles (rows of m x columns of n): kernels that launch a block a tile, kernels whose blocks stay and take tile after tile (Hopper), and
products on a CPU, which pad nothing that could be seen in their time."""

PERSISTENT_ARCHITECTURES = frozenset({"hopper"})
PACKING_ARCHITECTURES = frozenset({"cpu"})


@dataclass(frozen=True)
class Machine:
    """Datasheet facts of one arithmetic on one device.

    Attributes
    ----------
    peak_flop_per_s, bandwidth_bytes_per_s, l2_bytes : float
    sm_count : int
    headroom : float
        Highest clock over boost clock.
    element_bytes : float
        Bytes of an activation.
    weight_bytes : float
        Bytes of a stored weight, indices included.
    persistent : bool
        Blocks stay on their SM and take tile after tile.
    packs : bool
        A CPU: no tiles and waves; weights are rearranged for the caches from ``pack_m`` rows on, and nothing overlaps with arithmetic.
    """

    peak_flop_per_s: float
    bandwidth_bytes_per_s: float
    l2_bytes: float
    sm_count: int
    headroom: float
    element_bytes: float
    weight_bytes: float
    persistent: bool
    packs: bool = False


@dataclass(frozen=True)
class Core:
    """A machine and its constants, ready to time shapes: microseconds, bytes and elements.

    The arrays have one row a tile of the menu.
    """

    machine: Machine
    constants: Mapping[str, float]
    tile_m: F
    tile_n: F
    step_elements: float
    step_us: F
    flop_us: F
    epilogue_us: F
    feed_us: F  # L2 feed of one k-step of one tile, whole device
    has_feed: bool
    t0_us: float
    split_us: float
    split_us_per_byte: float
    dram_us_per_byte: float
    hit_us_per_byte: float
    convert_us_per_element: float
    resident_bytes: float
    residency_power: float


@dataclass(frozen=True)
class CoreTime:
    """What the core says about shapes; microseconds unless said otherwise.

    Attributes
    ----------
    total_us : array
        Fixed time included, residual not.
    log2_us : array
        Its logarithm to base 2.
    compute3, memory_us : array
        Main loop of the chosen tile, cubed; operands and result through the memory system. They combine by a 3-norm.
    dram_bytes : array
        Bytes that come from or go to DRAM.
    tile, split, tiles : array
        Chosen entry of the menu, split-K factor, output tiles of the launch (split parts not counted).
    """

    total_us: F
    log2_us: F
    compute3: F
    memory_us: F
    dram_bytes: F
    tile: NDArray[np.int8]
    split: F
    tiles: F

    @property
    def compute_us(self) -> F:
        """Main loop of the chosen tile."""
        return np.asarray(np.cbrt(self.compute3))


def machine_core(machine: Machine, constants: Mapping[str, float], dtype: Any = np.float64) -> Core:
    """Per-tile times and other derived numbers, once for many shapes.

    Parameters
    ----------
    machine : Machine
    constants : mapping of str to float
        SI values of the names in :data:`simulator.kernels.gemm.CONSTANTS`.
    dtype : dtype
        Precision of the shapes it will time.

    Returns
    -------
    Core
    """
    c = {name: float(value) for name, value in constants.items()}
    kind = "packing" if machine.packs else "persistent" if machine.persistent else "stationary"
    menu = np.array(MENUS[kind], dtype=np.float64)
    bm, bn = menu[:, 0], menu[:, 1]
    step = LINE_BYTES / machine.element_bytes
    flop_us = 1e6 * 2.0 * step * bm * bn * machine.sm_count / (machine.peak_flop_per_s * c["e_tc"])

    def column(values: F) -> F:
        return np.ascontiguousarray(values[:, None].astype(dtype))

    return Core(
        machine=machine,
        constants=MappingProxyType(c),
        tile_m=column(bm),
        tile_n=column(bn),
        step_elements=step,
        step_us=column(((1e6 * c["tau"]) ** 4 + flop_us**4) ** 0.25),
        flop_us=column(flop_us),
        epilogue_us=column(1e6 * machine.element_bytes * bm * bn / c["b_e"]),
        feed_us=column(1e6 * LINE_BYTES * (bm + bn) / c["b_l2"]),
        has_feed=kind == "stationary",
        t0_us=1e6 * c["t0"],
        split_us=1e6 * c["t_s"],
        split_us_per_byte=1e6 / c["b_s"],
        dram_us_per_byte=1e6 / (machine.bandwidth_bytes_per_s * c["e_d"]),
        hit_us_per_byte=1e6 / c["b_hit"],
        # 16-bit activations read, narrow ones written, by a kernel of its own before the product
        convert_us_per_element=1e6 * (2.0 + machine.element_bytes) / c["b_convert"]
        if machine.element_bytes == 1.0
        else 0.0,
        resident_bytes=c["c_l2"] * machine.l2_bytes,
        residency_power=c["l2_power"],
    )


def residency(footprint_bytes: F, core: Core) -> F:
    """Share of a footprint that stays in L2: 1 / (1 + (footprint / (c_l2 L2))^Q)."""
    x = np.minimum(
        footprint_bytes * (1.0 / core.resident_bytes), 100.0
    )  # beyond, nothing stays; single precision would overflow
    power = core.residency_power
    doublings = {2.0: 1, 4.0: 2, 8.0: 3, 16.0: 4}.get(power)
    if doublings:  # much faster than a general power
        for _ in range(doublings):
            x *= x
    else:
        x **= power
    x += 1.0
    return np.asarray(np.reciprocal(x, out=x))


def memory_time(m: F, n: F, k: F, core: Core, copies: F | float | None, load_scale: F | float) -> tuple[F, F]:
    """Microseconds of moving the operands and the result, and the bytes of them that DRAM moves.

    ``copies`` weights are used in turn: the footprint that competes for L2; None for cold weights. The activations, ``m (n + k)``, are
    warm as far
    as they fit. ``load_scale`` stretches the weights' time.
    """
    machine = core.machine
    weights = n * k
    weights *= machine.weight_bytes
    acts = n + k
    acts *= m
    acts *= machine.element_bytes
    warm = residency(acts, core)
    warm *= acts
    dram = np.subtract(acts, warm, out=acts)
    if copies is None:
        time = weights * load_scale
        time += dram
        time *= core.dram_us_per_byte
        warm *= core.hit_us_per_byte
        time += warm
        dram += weights
        return time, dram
    hit = weights * residency(weights * copies, core)
    miss = weights - hit
    time = (miss * load_scale + dram) * core.dram_us_per_byte + (hit * load_scale + warm) * core.hit_us_per_byte
    return time, miss + dram


def core_time(
    m: F,
    n: F,
    k: F,
    core: Core,
    copies: F | float | None = None,
    step_scale: F | float = 1.0,
    load_scale: F | float = 1.0,
) -> CoreTime:
    """Time of GEMMs y[m, n] = x[m, k] w[k, n] by the analytic form.

    Parameters
    ----------
    m, n, k : float arrays of one shape (x,)
        At least 1, of the precision the core was made for.
    core : Core
    copies : array, float or None
        Weights used in turn (see :func:`memory_time`); None: cold.
    step_scale, load_scale : array or float
        Factors of the main-loop step and of the weights' memory time: alignment, dequantisation.

    Returns
    -------
    CoreTime
    """
    if core.machine.packs:
        return _packed_time(m, n, k, core, copies, step_scale, load_scale)
    sm = float(core.machine.sm_count)
    tiles = m / core.tile_m
    np.ceil(tiles, out=tiles)
    cols = n / core.tile_n
    np.ceil(cols, out=cols)
    tiles *= cols
    steps = np.ceil(k * (1.0 / core.step_elements))
    step_us = core.step_us if isinstance(step_scale, float) and step_scale == 1.0 else core.step_us * step_scale
    # whole k: waves of tiles, each its main loop and epilogue
    unsplit = np.multiply(step_us, steps, out=cols) if np.size(step_us) <= len(core.step_us) else step_us * steps
    unsplit += core.epilogue_us
    waves = tiles / sm  # a division: the reciprocal's rounding would make 132 tiles on 132 SMs two waves
    if core.machine.persistent:
        np.maximum(waves, 1.0, out=waves)
    else:
        np.ceil(waves, out=waves)
    unsplit *= waves
    cube(unsplit, waves)
    # split-K: SMs that would idle share one tile's k-steps, and their partial sums are added up in a second pass
    split = sm / tiles
    np.floor(split, out=split)
    np.maximum(split, 1.0, out=split)
    np.minimum(split, np.clip(np.floor(k * (1.0 / 128.0)), 1.0, 64.0), out=split)
    chunk = steps / split
    np.ceil(chunk, out=chunk)
    parts = chunk * step_us
    parts += core.epilogue_us
    extra = np.multiply(split, 4.0, out=waves)
    extra += 2.0
    extra *= m * n * core.split_us_per_byte
    parts += extra
    parts += core.split_us
    cube(parts, extra)
    if core.has_feed:
        feed = tiles * core.feed_us
        chunk *= split
        chunk *= feed
        cube(chunk, extra)
        parts += chunk
        feed *= steps
        cube(feed, extra)
        unsplit += feed
    parts[tiles > sm] = np.inf
    best = np.minimum(unsplit, parts)
    compute = np.minimum.reduce(best, axis=0)
    at = np.arange(len(compute))
    choice = np.zeros(len(compute), dtype=np.int8)
    for i in range(1, len(best)):
        np.copyto(choice, i, where=best[i] == compute)
    flat = choice.astype(np.intp) * len(compute) + at  # the cast first: NumPy 1 would multiply in 8 bits
    chosen_split = split.take(flat)
    chosen_split[unsplit.take(flat) <= compute] = 1.0
    memory, dram = memory_time(m, n, k, core, copies, load_scale)
    total = memory * memory
    total *= memory
    total += compute
    cube_root(total)
    total += core.t0_us
    if core.convert_us_per_element:
        total += m * k * core.convert_us_per_element
    return CoreTime(total, np.log2(total), compute, memory, dram, choice, chosen_split, tiles.take(flat))


def _packed_time(
    m: F, n: F, k: F, core: Core, copies: F | float | None, step_scale: F | float, load_scale: F | float
) -> CoreTime:
    """A product on a CPU: fixed time, operands, the rearranging of the weights from ``pack_m`` rows on, and arithmetic in turn."""
    c = core.constants
    memory, dram = memory_time(
        m, n, k, core, copies, load_scale * np.where(m >= c["pack_m"], 1.0 + c["pack"], 1.0).astype(m.dtype)
    )
    flop = m * n
    tiles = flop.copy()
    flop *= k
    flop *= 2e6 / (core.machine.peak_flop_per_s * c["e_tc"])
    flop *= step_scale
    total = memory + flop
    total += core.t0_us
    cube(flop, np.empty_like(flop))
    ones = np.ones_like(total)
    return CoreTime(total, np.log2(total), flop, memory, dram, np.zeros(len(total), dtype=np.int8), ones, tiles)


def cube(x: F, work: F) -> None:
    """x^3 in place, with a scratch array of its shape."""
    np.multiply(x, x, out=work)
    x *= work


def cube_root(x: F) -> F:
    """Cube root of positive numbers, in place; faster than ``np.cbrt``, whose loop is scalar."""
    np.log2(x, out=x)
    x *= 1.0 / 3.0
    return np.exp2(x, out=x)
