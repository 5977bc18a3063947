"""Attention: prefill (causal FlashAttention) and decode (one query against a KV cache).

Use :func:`prefill_attention_time` and :func:`decode_attention_time`; arrays broadcast. The forms are in
:mod:`simulator.kernels.attention_prefill` and :mod:`simulator.kernels.attention_decode`; here they meet a profile: its constants, residual lattice and
intervals, and the floors of physics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError
from simulator.hardware.constants import DECODE_CONSTANTS, PREFILL_CONSTANTS
from simulator.hardware.memo import PerObject
from simulator.kernels.attention_decode import decode_parts, decode_work
from simulator.kernels.attention_prefill import Device, join, prefill_parts, prefill_work
from simulator.kernels.lattice import Lattice, decode_place, prefill_place
from simulator.kernels.optime import BOUNDS, OpTime

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile

F = NDArray[np.float64]

REGIMES: tuple[str, ...] = ("launch", "mixed", "work")
"""Regimes of the intervals, by the share of the fixed time in the prediction: above 1/2, above 1/8, below."""

DEFAULT_SPREAD = 1.35
"""Factor of the 90 % interval either way of a section without intervals: one shape differs by 9-34 % between stacks (DESIGN section 10)."""

SPARSE_SPREAD, CACHE_SPREAD, WINDOW_SPREAD, WIDTH_SPREAD = 1.25, 1.10, 1.10, 1.15
"""Factors by which what no fit has seen widens an interval: skipped blocks, a cache of another format, a sliding window, and heads of
another width than the fits' 128 features (which err by 5 to 31 % there)."""

_ELEMENT_BYTES: Mapping[str, float] = {
    "fp32": 4.0,
    "tf32": 4.0,
    "fp16": 2.0,
    "bf16": 2.0,
    "fp8": 1.0,
    "int8": 1.0,
    "int4": 0.5,
}
_COMPUTE, _MEMORY, _LATENCY, _LAUNCH = (BOUNDS.index(name) for name in ("compute", "memory", "latency", "launch"))


@dataclass(frozen=True)
class _Ready:
    """What a profile says about one phase and format, as floats and arrays."""

    device: Device
    constants: Mapping[str, float]
    lattice: Lattice | None
    headroom: float  # highest over boost clock
    low: F  # log multipliers by regime at `level`
    high: F
    level: float


_MEMO: PerObject[_Ready] = PerObject()


def _element_bytes(dtype: str) -> float:
    try:
        return _ELEMENT_BYTES[dtype]
    except KeyError:
        raise InputError(f"dtype {dtype!r} is unknown; expected one of {', '.join(_ELEMENT_BYTES)}") from None


def _ready(hw: HardwareProfile, operator: str, names: Mapping[str, Any], dtype: str) -> _Ready:
    section = hw.section(operator, dtype)
    device = Device(
        float(hw.peak_flop_per_s(dtype)), float(hw.sm_count), float(hw.bandwidth_bytes_per_s), float(hw.l2_bytes)
    )
    spread = math.log(DEFAULT_SPREAD)
    low, high, level = np.full(len(REGIMES), -spread), np.full(len(REGIMES), spread), 0.9
    for interval in section.intervals:
        if interval.regime in REGIMES:
            i = REGIMES.index(interval.regime)
            low[i], high[i], level = math.log(interval.low), math.log(interval.high), interval.level
    constants = {name: float(section[name]) for name in names}
    return _Ready(device, constants, Lattice.from_arrays(section.arrays), float(hw.clock_headroom), low, high, level)


def regime_of(share: Any) -> NDArray[np.intp]:
    """Index into :data:`REGIMES` from the share of the fixed time in a prediction."""
    share = np.asarray(share)
    return np.asarray((share <= 0.5).astype(np.intp) + (share <= 0.125))


def _finish(
    core: F,
    fixed: F | float,
    floor: F,
    roofline: F,
    parts: tuple[tuple[F, int], ...],
    r: _Ready,
    level: float,
    widen: F | float,
) -> OpTime:
    """Floors of physics, interval by regime and the limit, from a core time."""
    seconds = np.maximum(core, floor)
    regime = regime_of(fixed / seconds)
    scale = 1.0
    if level != r.level:  # another level than the calibrated one: as a normal distribution would scale
        scale = NormalDist().inv_cdf(0.5 + 0.5 * level) / NormalDist().inv_cdf(0.5 + 0.5 * r.level)
    lower = np.maximum(seconds * np.exp(scale * (r.low[regime] - widen)), floor)
    upper = seconds * np.exp(scale * (r.high[regime] + widen))
    best, bound = parts[0][0], np.full(np.shape(seconds), parts[0][1], dtype=np.int8)
    for time, code in parts[1:]:
        bound = np.where(time > best, code, bound)
        best = np.maximum(time, best)
    bound = np.where(fixed > best, _LAUNCH, bound).astype(np.int8)
    return OpTime(
        seconds,
        lower,
        upper,
        roofline if roofline.shape == seconds.shape else np.broadcast_to(roofline, seconds.shape),
        bound,
    )


def _columns(*values: Any) -> list[F]:
    arrays = [np.asarray(v, dtype=np.float64) for v in values]
    if len({a.shape for a in arrays}) > 1:
        arrays = list(np.broadcast_arrays(*arrays))
    return arrays


FITTED_WIDTH = 128.0
"""Features a head of the rows the shipped profiles are fitted on."""


def _widen(density: Any, window: Any, head_dim: Any, kv_dtype: str, dtype: str) -> F:
    """Extra log half-width where the kernel is one no fit has seen."""
    cache = math.log(CACHE_SPREAD) if kv_dtype != dtype else 0.0
    other = math.log(WIDTH_SPREAD) * (np.asarray(head_dim) != FITTED_WIDTH)
    skipped = math.log(SPARSE_SPREAD) * (np.asarray(density) < 1.0)
    return np.asarray(cache + other + skipped + math.log(WINDOW_SPREAD) * (np.asarray(window) > 0), dtype=np.float64)


def prefill_attention_time(
    batch: Any,
    q_len: Any,
    kv_len: Any,
    heads: Any,
    kv_heads: Any,
    head_dim: Any,
    hw: HardwareProfile,
    *,
    window: Any = 0,
    density: Any = 1.0,
    block: Any = 0,
    dtype: str = "bf16",
    kv_dtype: str | None = None,
    level: float = 0.9,
) -> OpTime:
    """Time of causal attention of ``q_len`` new positions over ``kv_len`` in all, the new ones the last of them.

    Parameters
    ----------
    batch, q_len, kv_len, heads, kv_heads, head_dim : array_like
        Sequences; query and key positions of one; query and key/value heads; features of a head. All at least 1, ``q_len <= kv_len``.
    hw : HardwareProfile
    window : array_like
        Sliding window in positions, 0 for none.
    density : array_like, (0, 1]
        Share of the query-key blocks computed (block-sparse attention).
    block : array_like
        Edge of those blocks; 0 where nothing is skipped. Small blocks cost more than their share (uncalibrated: the interval is wider).
    dtype, kv_dtype : str
        Formats of the arithmetic and of the KV cache (default: the same).
    level : float
        Level of the interval.

    Returns
    -------
    OpTime
        Never below FLOP / peak at the highest clock, nor below bytes / bandwidth with the cache read cold.
    """
    r = _MEMO.get(hw, ("prefill", dtype), lambda: _ready(hw, "attention_prefill", PREFILL_CONSTANTS, dtype))
    kv_dtype = dtype if kv_dtype is None else kv_dtype
    b, q, kv, h, g, d = _columns(batch, q_len, kv_len, heads, kv_heads, head_dim)
    work = prefill_work(
        b,
        q,
        kv,
        h,
        g,
        d,
        window=window,
        density=density,
        block=block,
        element_bytes=_element_bytes(dtype),
        cache_bytes=_element_bytes(kv_dtype),
        sparse_block=r.constants["sparse_block"],
        packs=r.constants["packs"],
        pads=r.constants["pads"],
    )
    throughput, chain, memory = prefill_parts(work, r.device, r.constants)
    fixed = r.constants["t0_s"]
    core = fixed + join(throughput, chain, memory)
    if r.lattice is not None:
        core = core * np.exp(r.lattice(prefill_place(q, b, h, g)))
    compute_s = work.flops / r.device.peak_flop_per_s
    bytes_s = work.io_bytes / r.device.bandwidth_bytes_per_s
    floor = np.maximum(compute_s / r.headroom, bytes_s)
    parts = ((throughput, _COMPUTE), (chain, _LATENCY), (memory, _MEMORY))
    return _finish(
        core, fixed, floor, np.maximum(compute_s, bytes_s), parts, r, level, _widen(density, window, d, kv_dtype, dtype)
    )


def decode_attention_time(
    batch: Any,
    kv_len: Any,
    heads: Any,
    kv_heads: Any,
    head_dim: Any,
    hw: HardwareProfile,
    *,
    window: Any = 0,
    density: Any = 1.0,
    dtype: str = "bf16",
    kv_dtype: str | None = None,
    level: float = 0.9,
    cold: bool = True,
) -> OpTime:
    """Time of attention of one new position a sequence over a KV cache of ``kv_len`` positions.

    Parameters
    ----------
    batch, kv_len, heads, kv_heads, head_dim : array_like
        Sequences; cached positions of one; query and key/value heads; features of a head. All at least 1.
    hw : HardwareProfile
    window : array_like
        Sliding window in positions, 0 for none.
    density : array_like, (0, 1]
        Share of the cache read.
    dtype, kv_dtype : str
        Formats of the arithmetic and of the KV cache (default: the same).
    level : float
        Level of the interval.
    cold : bool
        The cache comes from DRAM, as in a model, whose other layers ran in between; False: from L2 where it fits, as in a benchmark.

    Returns
    -------
    OpTime
        Never below FLOP / peak at the highest clock, nor below cache bytes / bandwidth: the cache is read cold.
    """
    r = _MEMO.get(hw, ("decode", dtype), lambda: _ready(hw, "attention_decode", DECODE_CONSTANTS, dtype))
    kv_dtype = dtype if kv_dtype is None else kv_dtype
    b, kv, h, g, d = _columns(batch, kv_len, heads, kv_heads, head_dim)
    work = decode_work(
        b,
        kv,
        h,
        g,
        d,
        window=window,
        density=density,
        element_bytes=_element_bytes(dtype),
        cache_bytes=_element_bytes(kv_dtype),
        warm=not cold,
    )
    memory, unit, merge = decode_parts(work, r.device, r.constants)
    fixed = r.constants["t0_s"] + merge
    core = fixed + np.sqrt(memory * memory + unit * unit)
    if r.lattice is not None:
        core = core * np.exp(r.lattice(decode_place(work.kv, work.pairs, work.group)))
    compute_s = work.flops / r.device.peak_flop_per_s
    bytes_s = (work.cache_bytes + work.io_bytes) / r.device.bandwidth_bytes_per_s
    floor = np.maximum(compute_s / r.headroom, bytes_s) if cold else compute_s / r.headroom
    parts = ((memory, _MEMORY), (unit, _LATENCY))
    return _finish(
        core, fixed, floor, np.maximum(compute_s, bytes_s), parts, r, level, _widen(density, window, d, kv_dtype, dtype)
    )


__all__ = [
    "CACHE_SPREAD",
    "DECODE_CONSTANTS",
    "DEFAULT_SPREAD",
    "PREFILL_CONSTANTS",
    "REGIMES",
    "SPARSE_SPREAD",
    "WINDOW_SPREAD",
    "decode_attention_time",
    "prefill_attention_time",
    "regime_of",
]
