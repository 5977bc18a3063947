"""Attention: prefill (causal FlashAttention) and decode (one query against a KV cache).

Use :func:`prefill_attention_time` and :func:`decode_attention_time`; arrays broadcast. The forms of
:mod:`simulator.cost.attention_model` meet a profile here: constants, residual lattice, intervals, floors of physics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from simulator.arguments import COUNT, SIZE, Range, array, flag, instance, plain, text, together
from simulator.arrays import FloatArray
from simulator.cost import attention_model
from simulator.cost.gemm_model import ELEMENT_BYTES, WGMMA_ROWS, Machine
from simulator.cost.residual_grid import ResidualGrid, decode_place, prefill_place
from simulator.errors import InputError
from simulator.hardware.constants import CONSTANTS
from simulator.hardware.profile import OTHER_STACK, SAME_STACK, HardwareProfile, unfitted
from simulator.uncertainty.error_model import (
    BOTTLENECKS,
    OperatorTimes,
    Posterior,
    Spread,
    Uncertainty,
    posterior_of,
    with_intervals,
)
from simulator.workload import Kind

if TYPE_CHECKING:
    from simulator.hardware.profile import Section


_PART = Range(1e-9, 1.0, "numbers above 0, up to 1")
_RULES = {"window": SIZE, "block": SIZE, "value_dim": SIZE, "density": _PART}  # of the rest, whole numbers from 1 up

_TRITON = ("sglang", "vllm")  # run Triton's kernels where no other was written for latent attention

OTHER_KERNEL = 1.0
"""Octaves of head width that a window, or a cache of another format, counts for in how far a kernel is from a fitted
one."""


@dataclass(frozen=True)
class Variants:
    """The kernels of one section: for heads of a width, with a sliding window or none, with a cache in the format of
    the arithmetic or a narrower one. One of them is fitted after the other; arrays over v of them."""

    kinds: FloatArray  # (v, 3): log2 of the features a head, 1 with a window, 1 with a narrower cache
    factors: FloatArray  # (v, c) logs of their constants over the section's, in the order of the registry
    residual_grid: ResidualGrid | None = None  # of all, one after the other along its first coordinate

    @classmethod
    def of(cls, section: Section) -> Variants:
        """Those of a section's arrays; a section without has one, of 128 features a head."""
        kinds = np.asarray(section.arrays.get("kinds", [[7.0, 0.0, 0.0]]), dtype=np.float64)
        factors = np.asarray(section.arrays.get("factors", np.zeros((len(kinds), 0))), dtype=np.float64)
        return cls(kinds, factors, ResidualGrid.from_arrays(section.arrays))

    def which(self, a: attention_model.Calls, narrow: bool) -> tuple[Any, Any]:
        """The variant nearest to each call, and how far it is from it in octaves; numbers where all calls have one."""
        width, window = np.asarray(a.head_dim), np.asarray(a.window) > 0
        if width.size and (width == width.flat[0]).all() and (window == window.flat[0]).all():
            width, window = width.flat[0], window.flat[0]
        best: Any = 0
        far: Any = np.inf
        for i, (log_width, windowed, narrower) in enumerate(self.kinds):
            apart = np.abs(np.log2(width) - log_width) + OTHER_KERNEL * (window != windowed)
            apart = apart + OTHER_KERNEL * (narrow != narrower)
            best, far = np.where(apart < far, i, best), np.minimum(apart, far)
        return best, far

    def constants(self, common: Mapping[str, float], which: Any) -> dict[str, Any]:
        """Constants of each call: numbers where its variants share them."""
        out: dict[str, Any] = dict(common)
        for name, logs in zip(common, self.factors.T):
            if logs.any():
                out[name] = common[name] * np.exp(logs)[which]
        return out

    def residual(self, place: Any, which: Any) -> FloatArray:
        """Log factor of each call that lies at ``place`` in the lattice of its variant."""
        if self.residual_grid is None:
            return np.asarray(0.0)
        start, step = self.residual_grid.start[0], self.residual_grid.step[0]
        nodes = self.residual_grid.values.shape[0] // len(self.kinds)
        first = which * (nodes * step) + np.clip(place[0], start, start + (nodes - 1) * step)
        return np.asarray(self.residual_grid((first, *place[1:])))


@dataclass(frozen=True)
class _Ready:
    """What a profile says about one phase and two formats, as floats and arrays."""

    device: Machine
    fastest: float  # FLOP/s of the arithmetic a kernel may use
    common: Mapping[str, float]
    variants: Variants
    narrow: bool  # a cache narrower than the arithmetic
    makeshift: bool  # decode over a latent cache on a device that has no kernel of its own for it
    operator: str
    spread: Spread  # factors on the prior of its errors
    unknown: tuple[str, ...]  # columns of errors of what no fit has seen
    posterior: Posterior | None

    def calls(self, *sizes: Any, **options: Any) -> attention_model.Calls:
        """Attention calls of these sizes in these formats."""
        options |= {"element_bytes": self.device.element_bytes, "cache_bytes": self.device.weight_bytes}
        return attention_model.Calls(*(a.astype(np.float64) for a in np.broadcast_arrays(*sizes)), **options)


@lru_cache(maxsize=128)
def _ready(hw: HardwareProfile, operator: str, dtype: str, kv_dtype: str | None) -> _Ready:
    section, cache = hw.section(operator, dtype), kv_dtype or dtype
    machine, constants = Machine.of(hw, dtype), {name: section[name] for name in CONSTANTS[operator]}
    if cache not in ELEMENT_BYTES:
        raise InputError(f"dtype {cache!r} is unknown; expected one of {', '.join(ELEMENT_BYTES)}")
    machine, fastest = replace(machine, weight_bytes=ELEMENT_BYTES[cache]), machine.peak_flop_per_s
    if operator.startswith("mla") and cache in hw.rates:  # kernels of TensorRT-LLM compute in the format of the cache
        fastest = max(fastest, hw.peak_flop_per_s(cache))
    unknown = unfitted(operator, section, hw.architecture)
    if unknown and hw.architecture == "hopper" and operator == "attention_decode":
        # the queries of a KV head fill the rows of an instruction: two FLOP a row for each element of the cache
        most = hw.section("gemm", dtype)["e_tc"] * machine.peak_flop_per_s / (2.0 * WGMMA_ROWS)
        share = most * ELEMENT_BYTES[cache] / machine.bandwidth_bytes_per_s
        constants["e_d"] = min(constants["e_d"], share)
    shared, local = hw.error_scales(section)
    spread = (SAME_KERNELS if shared == SAME_STACK else shared, local)
    narrow = ELEMENT_BYTES[cache] < machine.element_bytes
    makeshift = operator == "mla_decode" and _makeshift(hw, section, narrow, shared)
    sure = operator.removeprefix("attention_"), spread, unknown, posterior_of(hw)
    return _Ready(machine, fastest, constants, Variants.of(section), narrow, makeshift, *sure)


def _makeshift(hw: HardwareProfile, section: Section, narrow: bool, shared: float) -> bool:
    """Whether kernels of decode over a latent cache may be quite others than those fitted."""
    if hw.architecture in ("hopper", "blackwell_sm100"):
        # SGLang converts all the cache there is on Hopper, if it is of fp8: no time of the calls alone
        own = section.stack == "sglang" == (hw.engine_stack or section.stack)
        return own and narrow and hw.architecture == "hopper"
    alike = not narrow and section.stack in _TRITON and hw.engine_stack in _TRITON
    return shared >= OTHER_STACK and not alike


def _checked(hw: Any, dtype: Any, kv_dtype: Any, latent: Any, **sizes: Any) -> dict[str, FloatArray]:
    """Arguments of attention calls, of shapes that broadcast."""
    instance("hw", hw, HardwareProfile, "load_hardware")
    text("dtype", dtype)
    if kv_dtype is not None:
        text("kv_dtype", kv_dtype)
    found = {name: array(name, value, _RULES.get(name, COUNT)) for name, value in sizes.items()}
    known = plain(latent)  # truth values, or elements of the cache
    together(**found, latent=known if known.dtype == np.bool_ else array("latent", latent, SIZE))
    return found


def _operator(phase: str, value_dim: Any, latent: Any) -> tuple[str, dict[str, Any]]:
    """Section of a profile for calls of a phase, and their options; those of one call are of one attention."""
    if isinstance(value_dim, int) and not value_dim and latent is False:
        return f"attention_{phase}", {}
    mla = (np.asarray(value_dim) > 0) | np.asarray(latent, dtype=np.bool_)
    if mla.any() and not mla.all():
        raise InputError("value_dim, latent: expected all calls of plain attention, or none, got both")
    if not mla.any():
        return f"attention_{phase}", {}
    return f"mla_{phase}", {"value_dim": np.asarray(value_dim), "latent": latent}


def prefill_attention_time(
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
    level: float = 0.9,
) -> OperatorTimes:
    """Time of causal attention of ``q_len`` new positions over ``kv_len`` in all, the new ones the last of them.

    Never below FLOP / peak at the highest clock, nor below bytes / bandwidth with the cache read cold.

    All sizes are at least 1, ``q_len <= kv_len``; a ``window`` of 0 is none; ``density`` is the share of the query-key
    blocks computed and ``block`` their edge (0 where nothing is skipped): small blocks cost more than their share
    (uncalibrated: the interval is wider). ``kv_dtype`` is the format of the KV cache (default: the arithmetic's).

    Multi-head latent attention: ``head_dim`` features of a query and a key, ``value_dim`` of a value (0: as many), and
    ``latent`` where the values are the first features of the keys, which alone are stored. DeepSeek-V3's prompt has 192
    and 128, its decode, whose queries took the weights in, 576 and 512 of one latent KV head. Such calls have sections
    of their own.

    >>> from simulator.hardware.library import load_hardware
    >>> sizes = dict(batch=1, q_len=4096, kv_len=4096, heads=16, kv_heads=16, hw=load_hardware("h100"))
    >>> split, wide = (prefill_attention_time(**sizes, head_dim=192, value_dim=v) for v in (128, 192))
    >>> bool(split.seconds < wide.seconds)
    True
    """
    sizes = {"batch": batch, "q_len": q_len, "kv_len": kv_len, "heads": heads, "kv_heads": kv_heads}
    sizes |= {"head_dim": head_dim, "window": window, "density": density, "block": block}
    given = _checked(hw, dtype, kv_dtype, latent, **sizes, value_dim=value_dim)
    if np.any(beyond := given["q_len"] > given["kv_len"]):
        raise InputError(f"q_len: expected at most kv_len, got more in {int(beyond.sum())} calls")
    operator, own = _operator("prefill", value_dim, latent)
    r = _ready(hw, operator, dtype, kv_dtype)
    a = r.calls(batch, q_len, kv_len, heads, kv_heads, head_dim, window=window, density=density, block=block, **own)
    which, far = r.variants.which(a, r.narrow)
    constants = r.variants.constants(r.common, which)
    work = attention_model.prefill_work(a, constants)
    parts = attention_model.prefill_core(work, r.device, constants)
    sharing = a.heads if operator == "mla_prefill" else a.kv_heads  # keys of one head or of all
    residual = r.variants.residual(prefill_place(a.q_len, a.batch, a.heads, sharing), which)
    return _finish(r, work, parts, residual, far, level)


def decode_attention_time(
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
    level: float = 0.9,
    cold: bool = True,
) -> OperatorTimes:
    """Time of attention of one new position a sequence over a KV cache of ``kv_len`` positions.

    As :func:`prefill_attention_time`, but ``density`` is the share of the cache read, and with ``cold`` it comes from
    DRAM, as in a model, whose other layers ran in between; else from L2 where it fits, as in a benchmark.
    """
    sizes = {"batch": batch, "kv_len": kv_len, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    _checked(hw, dtype, kv_dtype, latent, **sizes, window=window, density=density, value_dim=value_dim)
    flag("cold", cold)
    operator, own = _operator("decode", value_dim, latent)
    r = _ready(hw, operator, dtype, kv_dtype)
    a = r.calls(batch, 1, kv_len, heads, kv_heads, head_dim, window=window, density=density, warm=not cold, **own)
    which, far = r.variants.which(a, r.narrow)
    work = attention_model.decode_work(a)
    parts = attention_model.decode_core(work, r.device, r.variants.constants(r.common, which))
    residual = r.variants.residual(decode_place(work.kv, work.pairs, work.group), which)
    return _finish(r, work, parts, residual, far, level)


def _finish(
    r: _Ready, work: attention_model.Work, parts: attention_model.Parts, residual: FloatArray, far: Any, level: float
) -> OperatorTimes:
    """Residual, floors of physics, interval, and the limit: the largest of the parts."""
    a = work.calls
    core = parts.total_s * np.exp(residual)
    compute_s, bytes_s = work.flops / r.fastest, work.moved_bytes / r.device.bandwidth_bytes_per_s
    floor = np.maximum(compute_s / r.device.headroom, 0.0 if a.warm else bytes_s)
    known = {"far": far, "unknown": r.unknown, "makeshift": r.makeshift}
    unsure = uncertainty_of(r.operator, a, parts, spread=r.spread, **known)
    seconds, lower, upper = with_intervals(core, floor, unsure, level, r.posterior)
    largest = np.argmax([np.broadcast_to(part, seconds.shape) for part in parts.by_limit.values()], axis=0)
    bound = np.array([BOTTLENECKS.index(name) for name in parts.by_limit], dtype=np.int8)[largest]
    return OperatorTimes(seconds, lower, upper, np.maximum(compute_s, bytes_s), bound, uncertainty=unsure)


SAME_KERNELS = 0.1
"""Factor on what stacks differ by where a time is asked of the stack that was fitted: attention differs by 10 to 100 %
between stacks, and by 2 to 6 % from what was fitted on its own."""
LOCAL: Mapping[str, float] = {"prefill": 0.10, "decode": 0.16, "mla_decode": 0.05}
"""Log standard deviation of local errors by phase: between stacks they step apart by choice of kernel."""
OWN: Mapping[str, tuple[float, float]] = {"prefill": (0.03, 0.014), "decode": (0.045, 0.017)}
OWN = {**OWN, "mla_decode": OWN["decode"]}
MAKESHIFT = 1.5
"""Log standard deviation, local, of decode over a latent cache where no kernel was written for it, in another stack
than the one fitted: all but the GPUs of data centres from Hopper on. Kernels there split a cache or do not, and differ
by up to 30 times."""


def uncertainty_of(
    phase: str,
    a: attention_model.Calls,
    parts: attention_model.Parts,
    *,
    spread: Spread = (SAME_KERNELS, 1.0),
    far: Any = 0.0,
    unknown: tuple[str, ...] = (),
    makeshift: bool = False,
) -> Uncertainty:
    """What the times of calls of a phase (of :data:`LOCAL`) are unsure of, from the shares of their parts.

    ``far`` is how far a call's kernel is from the nearest fitted one (:meth:`Variants.which`), ``makeshift`` whether
    it may be quite another (:func:`_makeshift`).
    """
    shape = parts.total_s.shape
    shares: dict[str, Any] = {**parts.shares, **dict.fromkeys(unknown, 1.0)}
    if np.any(np.asarray(far) > 0.0):
        shares["kernel"] = np.broadcast_to(far, shape)
    if np.any(np.asarray(a.density) < 1.0):
        shares["sparse"] = np.broadcast_to(np.asarray(a.density) < 1.0, shape)
    phase = "prefill" if phase == "mla_prefill" else phase  # one pair of stacks tells no other prior
    base, launch = OWN[phase]
    local: Any = LOCAL[phase]
    if makeshift:
        local = np.hypot(local, MAKESHIFT / spread[1] * (1.0 - parts.shares["launch"]))
    own = base**2 + (launch * parts.shares["launch"]) ** 2
    decodes = phase.endswith("decode")
    length, kind = (a.kv_len, Kind.DECODE_ATTENTION) if decodes else (a.q_len, Kind.PREFILL_ATTENTION)
    sizes = length, a.batch * a.kv_heads, a.heads / a.kv_heads
    place = np.log2([np.broadcast_to(size, shape).ravel() for size in sizes]).T
    return Uncertainty.of(phase, shares, spread=spread, local=local, own=own, place=place, kind=int(kind))
