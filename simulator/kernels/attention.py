"""Attention: prefill (causal FlashAttention) and decode (one query against a KV cache).

Use :func:`prefill_attention_time` and :func:`decode_attention_time`; arrays broadcast. The forms of
:mod:`simulator.kernels.attention_core` meet a profile here: constants, residual lattice, intervals, floors of physics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError
from simulator.hardware.constants import DECODE_CONSTANTS, PREFILL_CONSTANTS
from simulator.kernels import attention_core
from simulator.kernels.gemm_core import ELEMENT_BYTES, Machine
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


@dataclass(frozen=True)
class _Ready:
    """What a profile says about one phase and two formats, as floats and arrays."""

    device: Machine
    constants: Mapping[str, float]
    lattice: Lattice | None
    bands: Bands
    widen: float  # extra log half-width for a cache of another format

    def calls(self, *sizes: Any, **options: Any) -> attention_core.Calls:
        """Attention calls of these sizes in these formats."""
        options |= {"element_bytes": self.device.element_bytes, "cache_bytes": self.device.weight_bytes}
        return attention_core.Calls(*(a.astype(np.float64) for a in np.broadcast_arrays(*sizes)), **options)


@lru_cache(maxsize=128)
def _ready(hw: HardwareProfile, operator: str, dtype: str, kv_dtype: str | None) -> _Ready:
    section, cache = hw.section(operator, dtype), kv_dtype or dtype
    names = PREFILL_CONSTANTS if operator == "attention_prefill" else DECODE_CONSTANTS
    machine, constants = Machine.of(hw, dtype), {name: section[name] for name in names}
    if cache not in ELEMENT_BYTES:
        raise InputError(f"dtype {cache!r} is unknown; expected one of {', '.join(ELEMENT_BYTES)}")
    machine, widen = replace(machine, weight_bytes=ELEMENT_BYTES[cache]), math.log(CACHE_SPREAD) * (cache != dtype)
    return _Ready(machine, constants, Lattice.from_arrays(section.arrays), bands_of(section, REGIMES), widen)


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

    All sizes are at least 1, ``q_len <= kv_len``; a ``window`` of 0 is none; ``density`` is the share of the query-key
    blocks computed and ``block`` their edge (0 where nothing is skipped): small blocks cost more than their share
    (uncalibrated: the interval is wider). ``kv_dtype`` is the format of the KV cache (default: the arithmetic's).
    """
    r = _ready(hw, "attention_prefill", dtype, kv_dtype)
    a = r.calls(batch, q_len, kv_len, heads, kv_heads, head_dim, window=window, density=density, block=block)
    work = attention_core.prefill_work(a, r.constants)
    place = prefill_place(a.q_len, a.batch, a.heads, a.kv_heads)
    return _finish(r, work, attention_core.prefill_core(work, r.device, r.constants), place, level)


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
    r = _ready(hw, "attention_decode", dtype, kv_dtype)
    a = r.calls(batch, 1, kv_len, heads, kv_heads, head_dim, window=window, density=density, warm=not cold)
    work = attention_core.decode_work(a)
    place = decode_place(work.kv, work.pairs, work.group)
    return _finish(r, work, attention_core.decode_core(work, r.device, r.constants), place, level)


def _finish(r: _Ready, work: attention_core.Work, parts: attention_core.Parts, place: Any, level: float) -> OpTime:
    """Residual, floors of physics, interval by regime, and the limit: the largest of the parts."""
    a, core = work.calls, parts.total_s
    if r.lattice is not None:
        core = core * np.exp(r.lattice(place))
    compute_s, bytes_s = work.flops / r.device.peak_flop_per_s, work.moved_bytes / r.device.bandwidth_bytes_per_s
    floor = np.maximum(compute_s / r.device.headroom, 0.0 if a.warm else bytes_s)
    seconds = np.maximum(core, floor)
    # of a kernel that no fit has seen
    widen = r.widen + math.log(WIDTH_SPREAD) * (a.head_dim != FITTED_WIDTH)
    widen = widen + math.log(SPARSE_SPREAD) * (np.asarray(a.density) < 1.0)
    widen = widen + math.log(WINDOW_SPREAD) * (np.asarray(a.window) > 0)
    regime, scale = regime_of(parts.by_limit["launch"] / seconds), level_scale(level, r.bands.level)
    lower = np.maximum(seconds * np.exp(scale * (r.bands.low[regime] - widen)), floor)
    upper = seconds * np.exp(scale * (r.bands.high[regime] + widen))
    largest = np.argmax([np.broadcast_to(part, seconds.shape) for part in parts.by_limit.values()], axis=0)
    bound = np.array([BOUNDS.index(name) for name in parts.by_limit], dtype=np.int8)[largest]
    return OpTime(seconds, lower, upper, np.maximum(compute_s, bytes_s), bound)
