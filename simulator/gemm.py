"""GEMM cost: arrays of shapes and a profile in, times with intervals out.

Use :func:`gemm_time` for times, :func:`gemm_ladder` for the same time built up effect by effect. The analytic form is in :mod:`simulator.gemm_core`; a
fitted profile multiplies it by a smooth residual (:mod:`simulator.lattice`), and no time beats the datasheet at the device's highest clock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError
from simulator.gemm_constants import CONSTANTS
from simulator.gemm_core import PERSISTENT_ARCHITECTURES, Core, CoreTime, Machine, core_time, machine_core
from simulator.intervals import Bands, bands_of
from simulator.lattice import Residual, residual_of
from simulator.memo import PerObject
from simulator.optime import BOUNDS, OpTime

if TYPE_CHECKING:
    from simulator.hardware import HardwareProfile

__all__ = ["BOUNDS", "CONSTANTS", "GemmTime", "gemm_ladder", "gemm_time"]

F = NDArray[np.floating[Any]]

ELEMENT_BYTES: Mapping[str, float] = {"fp32": 4.0, "tf32": 4.0, "fp16": 2.0, "bf16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5}
DENSE, SPARSE24, UNSTRUCTURED, BLOCK_SPARSE = range(4)
CHUNK = 2048
"""Shapes timed at once: an array of six tiles of them is 48 kB, which stays in the cache and off the system's page allocator."""
PRECISION = np.float32
"""Arithmetic of predictions; the fit's is float64. Results are float64 either way, 1e-6 apart at most."""

_COMPUTE, _MEMORY, _L2, _LATENCY, _LAUNCH = (BOUNDS.index(name) for name in ("compute", "memory", "l2", "latency", "launch"))


def _no_values() -> F:
    return np.zeros(0)


@dataclass(frozen=True)
class GemmTime(OpTime):
    """Times of GEMMs; the fields of :class:`OpTime`, and with ``detail`` what the model chose (else empty arrays).

    Attributes
    ----------
    tile_m, tile_n : float64 array
        Output tile of a block.
    split_k : float64 array
        Blocks that share one tile's k.
    waves : float64 array
        Output tiles (times split_k) over SMs.
    compute_s, memory_s, fixed_s : float64 array, s
        Main loop, memory system and fixed time of the analytic form, before the residual.
    residual : float64 array
        Factor of the fitted residual.
    """

    tile_m: F = field(default_factory=_no_values)
    tile_n: F = field(default_factory=_no_values)
    split_k: F = field(default_factory=_no_values)
    waves: F = field(default_factory=_no_values)
    compute_s: F = field(default_factory=_no_values)
    memory_s: F = field(default_factory=_no_values)
    fixed_s: F = field(default_factory=_no_values)
    residual: F = field(default_factory=_no_values)


@dataclass(frozen=True)
class Plan:
    """What a profile says about GEMMs of one dtype, weight format and kernel, as numbers."""

    core: Core
    residual: Residual | None
    bands: Bands
    flop_rate: float  # datasheet, of the kernel's path
    pad_m: float
    align_step: float
    align_load: float
    load_scale: float
    widen: float  # extra log half-width of what no fit has seen


_PLANS: PerObject[Plan] = PerObject()


def gemm_plan(hw: HardwareProfile, dtype: str, weight_dtype: str | None, kernel: int) -> Plan:
    """The plan of a profile, made on first use and kept with it.

    Raises
    ------
    InputError
        For a dtype the device lacks or a weight format that is none.
    """
    return _PLANS.get(hw, (dtype, weight_dtype, kernel), lambda: _plan(hw, dtype, weight_dtype, kernel))


def _plan(hw: HardwareProfile, dtype: str, weight_dtype: str | None, kernel: int) -> Plan:
    rate = hw.rate(dtype)
    weight = weight_dtype or dtype
    if weight not in ELEMENT_BYTES:
        raise InputError(f"weight dtype {weight!r} is unknown; expected one of {', '.join(ELEMENT_BYTES)}")
    section = hw.section("gemm", dtype)
    c = {name: float(section[name]) for name in CONSTANTS}
    if section.status == "default" and ELEMENT_BYTES[dtype] == 1.0:
        c["e_tc"], c["t0"] = c["e_tc_8bit"], c["t0_8bit"]
    element, weight_bytes, peak = ELEMENT_BYTES[dtype], ELEMENT_BYTES[weight], rate.flop_per_s
    load_scale, pad_m, widen = 1.0, 1.0, 0.0
    if kernel == SPARSE24 and rate.sparse_factor > 1.0:
        peak *= rate.sparse_factor
        c["e_tc"] *= c["sparse_step"]
        c["t0"] += c["sparse_time"]
        load_scale /= c["sparse_load"]
        weight_bytes = 0.5 * weight_bytes + 0.125  # half the values, two bits of index for each
        pad_m, widen = 8.0, math.log(1.15)
    elif kernel == BLOCK_SPARSE:
        c["e_tc"] *= c["block_step"]
        widen = math.log(1.15)
    if ELEMENT_BYTES[weight] < element:
        c["e_tc"] *= c["quant_step"]
        load_scale /= c["quant_load"]
        widen += math.log(1.1)
    machine = Machine(
        peak, float(hw.bandwidth_bytes_per_s), float(hw.l2_bytes), int(hw.sm_count), max(1.0, float(hw.clock_headroom)), element, weight_bytes,
        hw.architecture in PERSISTENT_ARCHITECTURES,
    )  # fmt: skip
    core = machine_core(machine, c, PRECISION)
    return Plan(core, residual_of(section.arrays, PRECISION), bands_of(section), peak, pad_m, c["align_step"], c["align_load"], load_scale, widen)


def alignment_halvings(n: F, k: F, element_bytes: float) -> F:
    """Times the alignment of a row of n or k elements falls short of 16 bytes by a factor of two; 0 when it does not.

    >>> alignment_halvings(np.array([8816.0, 8810.0, 8809.0]), np.array([4096.0, 4096.0, 4096.0]), 2.0)
    array([0., 2., 3.])
    """
    full = int(16 / element_bytes)
    low = n.astype(np.int32) | k.astype(np.int32)
    out = np.zeros(n.shape, dtype=n.dtype)
    size = full
    while size > 1:
        out += (low & (size - 1)) != 0
        size >>= 1
    return out


def _aligned(n: F, k: F, plan: Plan) -> tuple[F | float, F | float]:
    """Factors of the main-loop step and of the weights' load for the alignment of n and k; plain numbers when all are aligned."""
    full = int(16 / plan.core.machine.element_bytes)
    if not np.bitwise_or.reduce(n.astype(np.int32) | k.astype(np.int32)) & (full - 1):
        return 1.0, plan.load_scale
    halvings = alignment_halvings(n, k, plan.core.machine.element_bytes)
    return 1.0 + plan.align_step * halvings, plan.load_scale * (1.0 + plan.align_load * halvings)


@dataclass(frozen=True)
class _Timed:
    """A chunk's results, microseconds."""

    us: F
    lower_us: F
    upper_us: F
    roofline_us: F
    bound: NDArray[np.int8]
    parts: CoreTime
    residual: F | float


def _timed(m: F, n: F, k: F, plan: Plan, copies: F | float | None, level: float) -> _Timed:
    core, machine = plan.core, plan.core.machine
    byte_us, flop_us = 1e6 / machine.bandwidth_bytes_per_s, 1e6 / plan.flop_rate
    flop = n * k
    moved = flop * (machine.weight_bytes * byte_us)
    flop *= m
    flop *= 2.0 * flop_us
    acts = n + k
    acts *= m
    acts *= machine.element_bytes * byte_us
    moved += acts
    roofline = np.maximum(flop, moved)
    rows = np.ceil(m * (1.0 / plan.pad_m)) * plan.pad_m if plan.pad_m > 1.0 else m
    step_scale, load_scale = _aligned(n, k, plan)
    parts = core_time(rows, n, k, core, copies, step_scale, load_scale)
    residual: F | float = 1.0
    us = parts.total_us
    if plan.residual is not None:
        residual = plan.residual.at(rows, n, k, parts, core)
        np.exp(residual, out=residual)
        us = us * residual
    flop *= 1.0 / machine.headroom
    floor = np.maximum(flop, parts.dram_bytes * byte_us)
    floor *= 1.0 + 5e-7  # single precision must not round below the physics
    us = np.maximum(us, floor)
    low, high = plan.bands.factors(rows, parts, core, level, plan.widen)
    low *= us
    np.maximum(low, floor, out=low)
    high *= us
    return _Timed(us, low, high, roofline, _bound(parts, core, k), parts, residual)


def _bound(parts: CoreTime, core: Core, k: F) -> NDArray[np.int8]:
    """What holds each shape: the largest part; a main loop may wait for its step's latency or for L2's feed rather than compute."""
    memory3 = parts.memory_us * parts.memory_us
    memory3 *= parts.memory_us
    kinds = core_kinds(core)
    bound = kinds.take(parts.tile)
    if core.has_feed:
        feed = core.feed_us[:, 0].take(parts.tile)
        feed *= parts.tiles
        feed *= k
        feed *= 1.0 / core.step_elements
        cubed = feed * feed
        cubed *= feed
        np.copyto(bound, _L2, where=cubed > 0.5 * parts.compute3)
    np.copyto(bound, _MEMORY, where=memory3 > parts.compute3)
    np.copyto(bound, _LAUNCH, where=parts.total_us < 2.0 * core.t0_us)
    return bound


def core_kinds(core: Core) -> NDArray[np.int8]:
    """Per tile of the menu: whether its main-loop step is compute or latency."""
    return np.where(core.step_us > 1.5 * core.flop_us, _LATENCY, _COMPUTE).astype(np.int8).reshape(-1)


def _columns(*values: Any) -> list[F]:
    arrays = [np.asarray(v, dtype=np.float64) for v in values]
    if len({a.shape for a in arrays}) > 1:
        arrays = [np.ascontiguousarray(a) for a in np.broadcast_arrays(*arrays)]
    return arrays


def gemm_time(
    m: Any,
    n: Any,
    k: Any,
    hw: HardwareProfile,
    *,
    dtype: str = "bf16",
    weight_dtype: str | None = None,
    kernel: Any = DENSE,
    density: Any = 1.0,
    cold: bool = True,
    copies: Any = None,
    level: float = 0.9,
    detail: bool = False,
) -> GemmTime:
    """Time of y[m, n] = x[m, k] w[k, n]; arrays broadcast.

    Parameters
    ----------
    m, n, k : int or array
        Tokens, output features, input features; at least 1.
    hw : HardwareProfile
    dtype : str
        Of activations and arithmetic.
    weight_dtype : str, optional
        How weights are stored; narrower than ``dtype``: a weight-only quantised kernel.
    kernel : int or array
        0 dense, 1 2:4 sparse, 2 zeros without structure (timed as dense), 3 rows skipped in blocks (m counts the rows computed).
    density : float or array
        Share of weights that are not zero; no kernel here gains by it beyond its format, so that it only documents the operand.
    cold : bool
        Weights come from DRAM, as in a decoder; False: they are as warm as L2 allows.
    copies : int or array, optional
        Weights used in turn, as benchmarks rotate them: how warm they are follows from their footprint. Overrides ``cold``.
    level : float
        Of the interval, in (0, 1).
    detail : bool
        Fill the detail fields too.

    Returns
    -------
    GemmTime
        Arrays of the broadcast shape.

    Raises
    ------
    InputError
        For a dtype the device lacks, a dimension below 1, or a level outside (0, 1).

    Examples
    --------
    >>> from simulator.hardware import load_hardware
    >>> t = gemm_time([1, 2048], 4096, 4096, load_hardware("a100"))
    >>> t.limits.tolist(), bool((t.lower < t.seconds).all())
    (['memory', 'compute'], True)
    """
    if not 0.0 < level < 1.0:
        raise InputError(f"level {level:g} is outside (0, 1)")
    m, n, k = _columns(m, n, k)
    codes = np.asarray(kernel)
    shape = m.shape if codes.ndim == 0 and np.ndim(copies) == 0 else np.broadcast_shapes(m.shape, codes.shape, np.shape(copies))
    if m.shape != shape:
        m, n, k = (np.broadcast_to(a, shape) for a in (m, n, k))
    m, n, k = (np.ascontiguousarray(a).reshape(-1) for a in (m, n, k))
    if len(m) and not (m.min() >= 1.0 and n.min() >= 1.0 and k.min() >= 1.0):  # also refuses NaN
        raise InputError("m, n and k must be at least 1")
    used: Any = None if cold and copies is None else 1.0 if copies is None else copies
    if np.ndim(used):
        used = np.broadcast_to(np.asarray(used, dtype=np.float64), shape).reshape(-1)
    kinds = np.broadcast_to(codes, shape).reshape(-1) if codes.ndim else codes.reshape(-1)
    if len(kinds) and (kinds == kinds[0]).all():
        out = _run(m, n, k, gemm_plan(hw, dtype, weight_dtype, _family(int(kinds[0]))), used, level, detail)
    else:
        out = _empty(len(m), detail)
        for code in np.unique(kinds):
            rows = np.flatnonzero(kinds == code)
            part = _run(m[rows], n[rows], k[rows], gemm_plan(hw, dtype, weight_dtype, _family(int(code))), used[rows] if np.ndim(used) else used, level, detail)
            for name, values in part.items():
                out[name][rows] = values
    return GemmTime(**{name: values.reshape(shape) for name, values in out.items()})


def _family(code: int) -> int:
    if code not in (DENSE, SPARSE24, UNSTRUCTURED, BLOCK_SPARSE):
        raise InputError(f"kernel code {code} is unknown; expected 0 dense, 1 2:4 sparse, 2 unstructured, 3 block-sparse rows")
    return DENSE if code == UNSTRUCTURED else code


_PLAIN = [f.name for f in fields(OpTime)]
_DETAIL = [f.name for f in fields(GemmTime) if f.name not in _PLAIN]


def _empty(size: int, detail: bool) -> dict[str, Any]:
    names = _PLAIN + (_DETAIL if detail else [])
    return {name: np.zeros(size, dtype=np.int8 if name == "bound" else np.float64) for name in names}


def _run(m: F, n: F, k: F, plan: Plan, copies: Any, level: float, detail: bool) -> dict[str, Any]:
    """Chunks of shapes through the model, so that their intermediate arrays stay in the cache."""
    size = len(m)
    if size <= CHUNK:
        return _fields(m, n, k, plan, copies, level, detail)
    out = _empty(size, detail)
    for start in range(0, size, CHUNK):
        part = slice(start, start + CHUNK)
        for name, values in _fields(m[part], n[part], k[part], plan, copies[part] if np.ndim(copies) else copies, level, detail).items():
            out[name][part] = values
    return out


def _fields(m: F, n: F, k: F, plan: Plan, copies: Any, level: float, detail: bool) -> dict[str, Any]:
    core = plan.core
    m, n, k = (a.astype(PRECISION) for a in (m, n, k))
    t = _timed(m, n, k, plan, copies.astype(PRECISION) if np.ndim(copies) else copies, level)
    parts = t.parts
    out: dict[str, Any] = {"seconds": t.us, "lower": t.lower_us, "upper": t.upper_us, "roofline_s": t.roofline_us}
    if detail:
        out |= {"compute_s": parts.compute_us, "memory_s": parts.memory_us, "fixed_s": np.full(len(m), core.t0_us)}
    out = {name: np.multiply(values, 1e-6, dtype=np.float64) for name, values in out.items()}
    out["bound"] = t.bound
    if detail:
        out |= {
            "tile_m": core.tile_m[:, 0].take(parts.tile).astype(np.float64), "tile_n": core.tile_n[:, 0].take(parts.tile).astype(np.float64),
            "split_k": parts.split.astype(np.float64), "waves": parts.tiles.astype(np.float64) * parts.split / core.machine.sm_count,
            "residual": np.ones(len(m)) * t.residual,
        }  # fmt: skip
    return out


def gemm_ladder(
    m: Any,
    n: Any,
    k: Any,
    hw: HardwareProfile,
    *,
    dtype: str = "bf16",
    weight_dtype: str | None = None,
    kernel: Any = DENSE,
    density: Any = 1.0,
    cold: bool = True,
    copies: Any = None,
    level: float = 0.9,
    detail: bool = False,
) -> Mapping[str, F]:
    """The time of GEMMs built up effect by effect, s.

    Parameters are those of :func:`gemm_time`.

    Returns
    -------
    mapping of str to float64 array
        "roofline": max(FLOP / peak, bytes / bandwidth); "tile": with the chosen tile's padding; "wave": and idle SMs of the last wave; "alignment":
        and n or k off 16 bytes; "kernel": all but the fixed time; "launch": equals ``gemm_time(...).seconds``.

    Examples
    --------
    >>> from simulator.hardware import load_hardware
    >>> list(gemm_ladder(64, 4096, 4096, load_hardware("a100")))
    ['roofline', 'tile', 'wave', 'alignment', 'kernel', 'launch']
    """
    t = gemm_time(m, n, k, hw, dtype=dtype, weight_dtype=weight_dtype, kernel=kernel, density=density, cold=cold, copies=copies, level=level, detail=True)
    m, n, k = _columns(m, n, k)
    m, n, k, codes = np.broadcast_arrays(m, n, k, np.asarray(kernel))
    plans = {int(c): gemm_plan(hw, dtype, weight_dtype, _family(int(c))) for c in np.unique(codes)}
    rate, weight, step, load = (np.zeros(codes.shape) for _ in range(4))
    for code, plan in plans.items():
        rows = codes == code
        halvings = alignment_halvings(n[rows], k[rows], plan.core.machine.element_bytes)
        rate[rows], weight[rows] = plan.flop_rate, plan.core.machine.weight_bytes
        step[rows], load[rows] = 1.0 + plan.align_step * halvings, 1.0 + plan.align_load * halvings
    machine = next(iter(plans.values())).core.machine
    weight_s = weight * n * k / machine.bandwidth_bytes_per_s
    memory = weight_s + machine.element_bytes * m * (n + k) / machine.bandwidth_bytes_per_s
    tiles = np.ceil(m / t.tile_m) * np.ceil(n / t.tile_n)
    padded = 2.0 * tiles * t.tile_m * t.tile_n * k / rate
    blocks = tiles * t.split_k / machine.sm_count
    idle = np.where(blocks > 1.0, 1.0 if machine.persistent else np.ceil(blocks) / blocks, 1.0 / blocks)
    fixed = np.minimum(t.fixed_s * t.residual, t.seconds)
    return {
        "roofline": t.roofline_s,
        "tile": np.maximum(padded, memory),
        "wave": np.maximum(padded * idle, memory),
        "alignment": np.maximum(padded * idle * step, memory + weight_s * (load - 1.0)),
        "kernel": t.seconds - fixed,
        "launch": t.seconds,
    }


def with_section(hw: HardwareProfile, dtype: str, section: Any) -> HardwareProfile:
    """A profile whose GEMM section of a dtype is another."""
    return replace(hw, sections={**hw.sections, ("gemm", dtype): section})
