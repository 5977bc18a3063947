"""Attention: prefill (causal FlashAttention) and decode (one query against a KV cache), plain and latent.

Use :func:`prefill` and :func:`decode`; arrays broadcast. The analytical forms of :mod:`simulator.cost.attention_model`
meet a profile here: constants, residual, floor of physics.

Symbols
-------
batch, q_len, kv_len : sequences, new positions per sequence, positions in all
heads, kv_heads, head_dim : query heads, KV heads, features per head
density, block : share of the query-key blocks that is computed, and their edge
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from simulator.arguments import COUNT, SIZE, Range, array, flag, instance, plain, text, together
from simulator.arrays import FloatArray
from simulator.cost.attention_model import (
    DecodeWork,
    Geometry,
    PrefillWork,
    decode_core,
    decode_work,
    prefill_core,
    prefill_work,
)
from simulator.cost.base import Calls, Estimate, Machine, element_bytes, largest_part
from simulator.cost.residual_grid import ResidualGrid
from simulator.errors import InputError
from simulator.hardware.attention_constants import DECODE_KERNELS
from simulator.hardware.constants import CONSTANTS
from simulator.hardware.profile import OTHER_STACK, HardwareProfile
from simulator.hardware.sections import Section, unfitted
from simulator.workload import Kind

_PART = Range(1e-9, 1.0, "numbers above 0, up to 1")
_RANGES = {"window": SIZE, "block": SIZE, "value_dim": SIZE, "density": _PART}  # others: whole numbers from 1 up

_TRITON = ("sglang", "vllm")  # run Triton's kernels where no other was written for latent attention

OTHER_KERNEL = 1.0
"""Octaves of head width that a window, or a cache of another format, counts for in the distance from a fitted
kernel."""


@dataclass(frozen=True)
class Kernels:
    """The v kernels of one section: for heads of a width, with a sliding window or none, with a cache in the format of
    the arithmetic or a narrower one. Each is fitted separately."""

    kinds: FloatArray  # (v, 3): log2 of the features a head, 1 with a window, 1 with a narrower cache
    factors: FloatArray  # (v, c) logs of their constants over the section's, in the order of the registry
    grid: ResidualGrid | None = None  # of all, one after the other along its first coordinate

    @classmethod
    def of(cls, section: Section) -> Kernels:
        """Return the kernels of a section's arrays; a section without them has one, for 128 features per head."""
        kinds = np.asarray(section.arrays.get("kinds", [[7.0, 0.0, 0.0]]), dtype=np.float64)
        factors = np.asarray(section.arrays.get("factors", np.zeros((len(kinds), 0))), dtype=np.float64)
        return cls(kinds, factors, ResidualGrid.from_arrays(section.arrays))

    def which(self, a: Geometry, narrow: bool) -> tuple[Any, Any]:
        """Return the kernel nearest to each call, and its distance in octaves; numbers where all calls share one."""
        width, window = np.asarray(a.head_dim), np.asarray(a.window) > 0
        if width.size and (width == width.flat[0]).all() and (window == window.flat[0]).all():
            width, window = width.flat[0], window.flat[0]
        log_width, windowed, narrower = self.kinds.T
        apart = np.abs(np.log2(width)[..., None] - log_width) + OTHER_KERNEL * (window[..., None] != windowed)
        apart = apart + OTHER_KERNEL * (narrow != narrower)
        return apart.argmin(axis=-1), apart.min(axis=-1)

    def constants(self, common: Mapping[str, float], which: Any) -> dict[str, Any]:
        """Return the constants of each call: numbers where the kernels share them."""
        out: dict[str, Any] = dict(common)
        for name, logs in zip(common, self.factors.T):
            if logs.any():
                out[name] = common[name] * np.exp(logs)[which]
        return out

    def residual(self, position: Any, which: Any) -> FloatArray | None:
        """Return the log factor of each call at a position in the grid of its kernel."""
        if self.grid is None:
            return None
        start, step = self.grid.start[0], self.grid.step[0]
        nodes = self.grid.values.shape[0] // len(self.kinds)
        first = which * (nodes * step) + np.clip(position[0], start, start + (nodes - 1) * step)
        return np.asarray(self.grid((first, *position[1:])))


@dataclass(frozen=True)
class AttentionCalls(Calls):
    """Attention calls of one phase on one device."""

    phase: str  # "prefill" or "decode"
    latent: bool  # multi-head latent attention
    geometry: Geometry
    machine: Machine
    fastest: float  # FLOP/s of the arithmetic that a kernel may use
    distance: Any = 0.0  # octaves from the nearest fitted kernel
    unfitted: tuple[str, ...] = ()  # error factors of what no fit has seen
    makeshift: bool = False  # decode over a latent cache without a kernel written for it

    @property
    def operator(self) -> str:
        return f"{'mla' if self.latent else 'attention'}_{self.phase}"

    def seconds(self, c: Mapping[str, Any]) -> FloatArray:
        """Return the analytical time alone, s."""
        if self.phase == "decode":
            return decode_core(decode_work(self.geometry), self.machine, c).total_s
        return prefill_core(prefill_work(self.geometry, c), self.machine, c).total_s

    def estimate(self, c: Mapping[str, Any]) -> Estimate:
        """Return the cost; ``c`` may hold arrays, where kernels have constants of their own."""
        g, decodes = self.geometry, self.phase == "decode"
        work: DecodeWork | PrefillWork
        if decodes:
            work = decode_work(g)
            parts = decode_core(work, self.machine, c)
            position = np.log2(work.group), np.log2(work.pairs * np.ceil(work.group / 128.0)), np.log2(work.kv)
            length, kind = g.kv_len, Kind.DECODE_ATTENTION
        else:
            work = prefill_work(g, c)
            parts = prefill_core(work, self.machine, c)
            sharing = g.heads if self.latent else g.kv_heads  # keys of one head or of all
            position = np.log2(g.heads / sharing), np.log2(g.batch * g.heads), np.log2(g.q_len)
            length, kind = g.q_len, Kind.PREFILL_ATTENTION
        shape = parts.total_s.shape
        compute_s, bytes_s = work.flops / self.fastest, work.moved_bytes / self.machine.bandwidth_bytes_per_s
        loadings: dict[str, Any] = {**parts.loadings, **dict.fromkeys(self.unfitted, 1.0)}
        if np.any(np.asarray(self.distance) > 0.0):
            loadings["kernel"] = np.broadcast_to(self.distance, shape)
        if np.any(np.asarray(g.density) < 1.0):
            loadings["sparse"] = np.broadcast_to(np.asarray(g.density) < 1.0, shape)
        sizes, warm = (length, g.batch * g.kv_heads, g.heads / g.kv_heads), np.asarray(g.warm, dtype=np.bool_)
        return Estimate(
            operator="mla_decode" if decodes and self.latent else self.phase,
            kind=int(kind),
            time=parts.total_s,
            floor=np.maximum(compute_s / self.machine.headroom, np.where(warm, 0.0, bytes_s)),
            roofline=np.maximum(compute_s, bytes_s),
            bottleneck=largest_part(parts.by_bottleneck, shape),
            loadings=loadings,
            coordinates=np.stack([np.log2(size).ravel() for size in sizes], axis=1),
            position=position,
            unlike=1.0 - parts.loadings["launch"] if self.makeshift else None,
        )


@dataclass(frozen=True)
class _Ready:
    """What a profile says about one phase and two number formats."""

    machine: Machine
    section: Section
    fastest: float
    common: Mapping[str, float]
    kernels: Kernels
    narrow: bool  # a cache narrower than the arithmetic
    makeshift: bool
    unfitted: tuple[str, ...]


@lru_cache(maxsize=128)
def _ready(hw: HardwareProfile, operator: str, dtype: str, kv_dtype: str | None) -> _Ready:
    section, cache = hw.section(operator, dtype), kv_dtype or dtype
    cache_bytes = element_bytes(cache)
    machine, constants = Machine.of(hw, dtype), {name: section[name] for name in CONSTANTS[operator]}
    machine, fastest = replace(machine, weight_bytes=cache_bytes), machine.peak_flop_per_s
    if operator.startswith("mla") and cache in hw.rates:  # kernels of TensorRT-LLM compute in the format of the cache
        fastest = max(fastest, hw.peak_flop_per_s(cache))
    known = operator == "attention_decode" and (hw.architecture, hw.engine_stack) in DECODE_KERNELS
    factors = () if known else unfitted(operator, section, hw.architecture)
    narrow = cache_bytes < machine.element_bytes
    makeshift = operator == "mla_decode" and _makeshift(hw, section, narrow)
    return _Ready(machine, section, fastest, constants, Kernels.of(section), narrow, makeshift, factors)


def _makeshift(hw: HardwareProfile, section: Section, narrow: bool) -> bool:
    """Return whether kernels of decode over a latent cache may differ entirely from those fitted."""
    if hw.architecture in ("hopper", "blackwell_sm100"):
        # SGLang converts the whole cache on Hopper if it is fp8: no time of the calls alone
        own = section.stack == "sglang" == (hw.engine_stack or section.stack)
        return own and narrow and hw.architecture == "hopper"
    similar = not narrow and section.stack in _TRITON and hw.engine_stack in _TRITON
    return hw.error_scales(section)[0] >= OTHER_STACK and not similar


def _checked(hw: Any, dtype: Any, kv_dtype: Any, latent: Any, **sizes: Any) -> None:
    """Check arguments of attention calls, of shapes that broadcast."""
    instance("hw", hw, HardwareProfile, "load_hardware")
    text("dtype", dtype)
    if kv_dtype is not None:
        text("kv_dtype", kv_dtype)
    found = {name: array(name, value, _RANGES.get(name, COUNT)) for name, value in sizes.items()}
    known = plain(latent)  # truth values, or elements of the cache
    together(**found, latent=known if known.dtype == np.bool_ else array("latent", latent, SIZE))


def _is_latent(value_dim: Any, latent: Any) -> bool:
    """Return whether calls are of latent attention; InputError for a mixture."""
    mla = (np.asarray(value_dim) > 0) | np.asarray(latent, dtype=np.bool_)
    if mla.any() and not mla.all():
        raise InputError("value_dim, latent: expected all calls of plain attention, or none, got both")
    return bool(mla.any())


def _estimate(
    phase: str, hw: HardwareProfile, dtype: str, kv_dtype: str | None, value_dim: Any, latent: Any, **sizes: Any
) -> Estimate:
    """Return the cost of calls of one phase, from the profile's section for it."""
    mla = _is_latent(value_dim, latent)
    r = _ready(hw, f"{'mla' if mla else 'attention'}_{phase}", dtype, kv_dtype)
    named = ("batch", "q_len", "kv_len", "heads", "kv_heads", "head_dim")
    arrays = together(**{name: np.asarray(sizes[name]) for name in named})
    batch, q_len, kv_len, heads, kv_heads, head_dim = (a.astype(np.float64) for a in arrays)
    geometry = Geometry(
        batch,
        q_len,
        kv_len,
        heads,
        kv_heads,
        head_dim,
        window=sizes["window"],
        density=sizes["density"],
        block=sizes.get("block", 0.0),
        warm=sizes.get("warm", False),
        element_bytes=r.machine.element_bytes,
        cache_bytes=r.machine.weight_bytes,
        value_dim=np.asarray(value_dim) if mla else None,
        latent=latent if mla else False,
    )
    which, distance = r.kernels.which(geometry, r.narrow)
    calls = AttentionCalls(phase, mla, geometry, r.machine, r.fastest, distance, r.unfitted, r.makeshift)
    e = calls.estimate(r.kernels.constants(r.common, which))
    return e.with_residual(r.kernels.residual(e.position, which), r.section)


def prefill(
    batch: Any,
    q_len: Any,
    kv_len: Any,
    heads: Any,
    kv_heads: Any,
    head_dim: Any,
    hw: HardwareProfile,
    *,
    value_dim: Any = 0,
    latent: Any = False,
    window: Any = 0,
    density: Any = 1.0,
    block: Any = 0,
    dtype: str = "bf16",
    kv_dtype: str | None = None,
) -> Estimate:
    """Return the cost of causal attention of ``q_len`` new positions over ``kv_len`` in all, the new ones the last.

    All sizes are at least 1, ``q_len <= kv_len``; a ``window`` of 0 is none; ``density`` is the share of the query-key
    blocks that is computed and ``block`` their edge (0 where nothing is skipped): small blocks cost more than their
    share (uncalibrated: the interval is wider). ``kv_dtype`` is the format of the KV cache (default: ``dtype``). The
    floor is FLOP / peak at the highest clock, and bytes / bandwidth with the cache read cold.

    Multi-head latent attention: ``head_dim`` features of a query and a key, ``value_dim`` of a value (0: as many), and
    ``latent`` where the values are the first features of the keys, which alone are stored. DeepSeek-V3's prompt has 192
    and 128; its decode, whose queries absorbed the weights, 576 and 512 of one latent KV head. Such calls have separate
    sections.
    """
    sizes = {"batch": batch, "q_len": q_len, "kv_len": kv_len, "heads": heads, "kv_heads": kv_heads}
    sizes |= {"head_dim": head_dim, "window": window, "density": density, "block": block}
    _checked(hw, dtype, kv_dtype, latent, **sizes, value_dim=value_dim)
    if np.any(longer := np.asarray(q_len) > np.asarray(kv_len)):
        raise InputError(f"q_len: expected at most kv_len, got more in {int(longer.sum())} calls")
    return _estimate("prefill", hw, dtype, kv_dtype, value_dim, latent, **sizes)


def decode(
    batch: Any,
    kv_len: Any,
    heads: Any,
    kv_heads: Any,
    head_dim: Any,
    hw: HardwareProfile,
    *,
    value_dim: Any = 0,
    latent: Any = False,
    window: Any = 0,
    density: Any = 1.0,
    dtype: str = "bf16",
    kv_dtype: str | None = None,
    cold: bool = True,
) -> Estimate:
    """Return the cost of attention of one new position per sequence over a KV cache of ``kv_len`` positions.

    As :func:`prefill`, but ``density`` is the share of the cache that is read. With ``cold`` the cache comes from DRAM,
    as in a model, whose other layers ran in between; else from L2 where it fits, as in a benchmark.
    """
    sizes = {"batch": batch, "kv_len": kv_len, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    sizes |= {"window": window, "density": density}
    _checked(hw, dtype, kv_dtype, latent, **sizes, value_dim=value_dim)
    flag("cold", cold)
    return _estimate("decode", hw, dtype, kv_dtype, value_dim, latent, q_len=1, warm=not cold, **sizes)
