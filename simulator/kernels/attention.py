"""Attention: prefill (causal FlashAttention) and decode (one query against a KV cache).

Use :func:`prefill_attention_time` and :func:`decode_attention_time`; arrays broadcast. The forms of
:mod:`simulator.kernels.attention_core` meet a profile here: constants, residual lattice, intervals, floors of physics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError
from simulator.hardware.constants import DECODE_CONSTANTS, PREFILL_CONSTANTS
from simulator.kernels.attention_core import Device, decode_parts, decode_work, join, prefill_parts, prefill_work
from simulator.kernels.gemm_core import ELEMENT_BYTES
from simulator.kernels.intervals import BOUNDS, Bands, OpTime, bands_of, level_scale
from simulator.kernels.lattice import Lattice, decode_place, prefill_place

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile

F = NDArray[np.float64]

REGIMES: tuple[str, ...] = ("launch", "mixed", "work")
"""Regimes of the intervals, by the share of the fixed time in the prediction: above 1/2, above 1/8, below."""

SPARSE_SPREAD, CACHE_SPREAD, WINDOW_SPREAD, WIDTH_SPREAD = 1.25, 1.10, 1.10, 1.15
"""Factors by which what no fit has seen widens an interval: skipped blocks, a cache of another format, a sliding
window, and heads of another width than the fits' 128 features (which err by 5 to 31 % there)."""

FITTED_WIDTH = 128.0
"""Features a head of the rows the shipped profiles are fitted on."""

_COMPUTE, _MEMORY, _LATENCY, _LAUNCH = (BOUNDS.index(name) for name in ("compute", "memory", "latency", "launch"))


@dataclass(frozen=True)
class _Ready:
    """What a profile says about one phase and format, as floats and arrays."""

    device: Device
    constants: Mapping[str, float]
    lattice: Lattice | None
    headroom: float  # highest over boost clock
    bands: Bands


@lru_cache(maxsize=128)
def _ready(hw: HardwareProfile, operator: str, dtype: str) -> _Ready:
    section = hw.section(operator, dtype)
    names = PREFILL_CONSTANTS if operator == "attention_prefill" else DECODE_CONSTANTS
    device = Device(hw.peak_flop_per_s(dtype), float(hw.sm_count), hw.bandwidth_bytes_per_s, hw.l2_bytes)
    constants, lattice = {name: section[name] for name in names}, Lattice.from_arrays(section.arrays)
    return _Ready(device, constants, lattice, hw.clock_headroom, bands_of(section, REGIMES))


def regime_of(share: Any) -> NDArray[np.intp]:
    """Index into :data:`REGIMES` from the share of the fixed time in a prediction."""
    share = np.asarray(share)
    return np.asarray((share <= 0.5).astype(np.intp) + (share <= 0.125))


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

    Never below FLOP / peak at the highest clock, nor below bytes / bandwidth with the cache read cold.

    Parameters
    ----------
    batch, q_len, kv_len, heads, kv_heads, head_dim : array_like
        Sequences; query and key positions of one; query and key/value heads; features of a head. All at least 1,
        ``q_len <= kv_len``.
    window : array_like
        Sliding window in positions, 0 for none.
    density, block : array_like
        Share of the query-key blocks computed, in (0, 1], and their edge (0 where nothing is skipped): small blocks
        cost more than their share (uncalibrated: the interval is wider).
    dtype, kv_dtype : str
        Formats of the arithmetic and of the KV cache (default: the same).
    """
    r, sizes = _ready(hw, "attention_prefill", dtype), _element_sizes(dtype, kv_dtype)
    b, q, kv, h, g, d = _columns(batch, q_len, kv_len, heads, kv_heads, head_dim)
    c = r.constants
    options = {name: c[name] for name in ("sparse_block", "packs", "pads")}
    work = prefill_work(b, q, kv, h, g, d, window=window, density=density, block=block, **sizes, **options)
    throughput, chain, memory = prefill_parts(work, r.device, c)
    parts = {_COMPUTE: throughput, _LATENCY: chain, _MEMORY: memory, _LAUNCH: c["t0_s"]}
    core = c["t0_s"] + join(throughput, chain, memory)
    if r.lattice is not None:
        core = core * np.exp(r.lattice(prefill_place(q, b, h, g)))
    widen = _widen(density, window, d, kv_dtype not in (None, dtype))
    return _finish(r, core, parts, work.flops, work.io_bytes, level, widen)


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

    As :func:`prefill_attention_time`, but ``density`` is the share of the cache read, and with ``cold`` it comes from
    DRAM, as in a model, whose other layers ran in between; else from L2 where it fits, as in a benchmark.
    """
    r, sizes = _ready(hw, "attention_decode", dtype), _element_sizes(dtype, kv_dtype)
    b, kv, h, g, d = _columns(batch, kv_len, heads, kv_heads, head_dim)
    work = decode_work(b, kv, h, g, d, window=window, density=density, **sizes, warm=not cold)
    memory, unit, merge = decode_parts(work, r.device, r.constants)
    fixed = r.constants["t0_s"] + merge
    parts = {_MEMORY: memory, _LATENCY: unit, _LAUNCH: fixed}
    core = fixed + np.sqrt(memory * memory + unit * unit)
    if r.lattice is not None:
        core = core * np.exp(r.lattice(decode_place(work.kv, work.pairs, work.group)))
    widen = _widen(density, window, d, kv_dtype not in (None, dtype))
    return _finish(r, core, parts, work.flops, work.cache_bytes + work.io_bytes, level, widen, cold)


def _element_sizes(dtype: str, kv_dtype: str | None) -> dict[str, float]:
    """Bytes of an element of the activations and of the cache."""
    for name in (dtype, kv_dtype or dtype):
        if name not in ELEMENT_BYTES:
            raise InputError(f"dtype {name!r} is unknown; expected one of {', '.join(ELEMENT_BYTES)}")
    return {"element_bytes": ELEMENT_BYTES[dtype], "cache_bytes": ELEMENT_BYTES[kv_dtype or dtype]}


def _columns(*values: Any) -> list[F]:
    return [a.astype(np.float64) for a in np.broadcast_arrays(*values)]


def _widen(density: Any, window: Any, head_dim: F, other_cache: bool) -> F:
    """Extra log half-width where the kernel is one no fit has seen."""
    cache = math.log(CACHE_SPREAD) * other_cache
    other = math.log(WIDTH_SPREAD) * (head_dim != FITTED_WIDTH)
    skipped = math.log(SPARSE_SPREAD) * (np.asarray(density) < 1.0)
    return np.asarray(cache + other + skipped + math.log(WINDOW_SPREAD) * (np.asarray(window) > 0))


def _finish(
    r: _Ready, core: F, parts: dict[int, Any], flops: F, bytes_: F, level: float, widen: F, cold: bool = True
) -> OpTime:
    """Floors of physics, interval by regime, and the limit: the largest of the parts (by code, the fixed time last)."""
    compute_s, bytes_s = flops / r.device.peak_flop_per_s, bytes_ / r.device.bandwidth_bytes_per_s
    floor = np.maximum(compute_s / r.headroom, bytes_s if cold else 0.0)
    seconds = np.maximum(core, floor)
    regime, scale = regime_of(parts[_LAUNCH] / seconds), level_scale(level, r.bands.level)
    lower = np.maximum(seconds * np.exp(scale * (r.bands.low[regime] - widen)), floor)
    upper = seconds * np.exp(scale * (r.bands.high[regime] + widen))
    largest = np.argmax([np.broadcast_to(part, seconds.shape) for part in parts.values()], axis=0)
    bound = np.array(list(parts), dtype=np.int8)[largest]
    return OpTime(seconds, lower, upper, np.maximum(compute_s, bytes_s), bound)
