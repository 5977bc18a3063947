"""Attention: prompts (causal FlashAttention) and decode (one query against a KV cache), plain and
latent.

*Prefill*: each tile of 64 queries reads the key blocks inside the causal mask and window. All tiles
share the SMs. The longest tile is a chain that no number of SMs shortens. Queries, keys, values and
outputs come from memory, or from L2 if they fit. The error on all rows is 4.1 % (A100) and 6.5 %
(H100) with a 4/3-norm, 6.1 and 6.8 % with a 2-norm.

*Decode*: the work units are (sequence, KV head, some query rows). With fewer units than SMs, the
cache of a unit is split and the parts are merged; with more, units run in waves. The whole cache is
also read from memory. The start of a unit, the scheduling of a sequence and whole waves reduce the
error on all rows from 19 to 4.2 (H100) and 4.9 % (A100).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import numpy as np

from simulator.arrays import Array, FloatArray
from simulator.codes import DTYPE_BYTES, Kind
from simulator.errors import InputError
from simulator.operators.base import (
    OTHER_STACK,
    Cached,
    Calls,
    Device,
    Estimate,
    Estimates,
    FittedValues,
    Formats,
    Machine,
    ResidualGrid,
    Rows,
    RowValues,
    Sizes,
    Values,
    element_bytes,
    from_l2,
    largest_part,
    read_constants,
    unfitted,
)

_PREFILL, _PREFILL_ERRORS = read_constants("prefill_attention")
# attention differs by 10 to 100 % between stacks, by 2 to 6 % from its own fit, and by 11 % in the
# median between two releases of one kernel (vLLM's Triton kernel on a B200, 0.22 and 0.24)
_DECODE, _DECODE_ERRORS = read_constants("decode_attention")
_BY_SECTION = {**_PREFILL, **_DECODE}

DECODE_KERNELS: Mapping[str, Values] = {
    "hopper": {"tile_rows": 16.0, "e_tc": 0.5, "units_per_sm": 2.0},
}
"""Constants of the decode kernel that is assumed on an architecture without a fit, where they
differ from the defaults. FlashInfer computes with mma.sync on tiles of 16 rows
(include/flashinfer/utils.cuh: FA2DetermineCtaTileQ) and has two units per SM, as in its fit on the
L40S."""


def attention_pairs(q_len: Array, kv_len: Array, window: Array) -> Array:
    """Return the query-key pairs of one sequence and head under a causal mask. Query i of q_len
    (from 0) has position p = kv_len - q_len + i and sees min(p + 1, window) keys (window 0: no
    limit)."""
    q, kv, w = (np.asarray(x, dtype=np.float64) for x in (q_len, kv_len, window))
    first, last = kv - q + 1, kv  # keys seen by the first and the last query
    full: Array = q * (first + last) / 2
    if not np.count_nonzero(w):
        return full
    # queries whose window is shorter than their position
    capped = np.clip(last - np.maximum(w, first - 1), 0, q)
    # sum of (position + 1 - w) over the capped queries
    seen = full - capped * (last - w) + capped * (capped - 1) / 2
    return np.where(w > 0, seen, full)


def entry_pairs(q_len: Array, kv_len: Array, ratio: Array, topk: Array | float = 0.0) -> Array:
    """Return the pairs of queries and entries, of ``ratio`` positions each, that are complete at a
    query's position; a query sees at most ``topk`` of them (0: all)."""

    def until(position: Array) -> Array:
        entries = np.floor(position / ratio)
        before = np.maximum(entries - 1.0, 0.0)
        last = np.where(np.asarray(topk) > 0, np.minimum(entries, topk), entries)
        rest = (position + 1.0 - ratio * entries) * last
        return np.asarray(rest + ratio * attention_pairs(before, before, np.asarray(topk)))

    q = np.asarray(q_len, dtype=np.float64)
    kv = np.asarray(kv_len, dtype=np.float64)
    return np.asarray(until(kv) - until(kv - q))


TILE = 64.0
"""Queries of a tile and keys of a block; FlashAttention kernels use 64 or 128."""


@dataclass(frozen=True)
class Geometry(Sizes):
    """Sizes of attention calls: arrays of one shape; the fields with defaults broadcast to it."""

    batch: FloatArray  # sequences
    q_len: FloatArray  # query positions per sequence, the last of its key positions
    kv_len: FloatArray
    heads: FloatArray
    kv_heads: FloatArray
    head_dim: FloatArray  # features per head
    window: Any = 0.0  # positions, 0 for none
    # share of the query-key blocks that is computed; in decode, share of the cache that is read
    density: Any = 1.0
    block: Any = 0.0  # edge of the skipped blocks, 0 for none
    element_bytes: Any = 2.0  # bytes of an activation
    cache_bytes: Any = 2.0  # bytes of a cached element
    # whether L2 may hold the cache in decode, as in a benchmark that repeats one call
    warm: Any = False
    value_dim: Any = None  # features of a value; 0 or None: those of a key
    latent: Any = False  # values are the first features of the keys, which alone are stored
    selected: Any = False  # an indexer or a compressed cache determines the keys of a query

    @classmethod
    def of(
        cls,
        batch: Any,
        q_len: Any,
        kv_len: Any,
        heads: Any,
        kv_heads: Any,
        head_dim: Any,
        **options: Any,
    ) -> Geometry:
        """Return the sizes of calls, which broadcast; ``options`` are the fields with defaults."""
        sizes = np.broadcast_arrays(batch, q_len, kv_len, heads, kv_heads, head_dim)
        return cls(*(np.asarray(size, dtype=np.float64) for size in sizes), **options)

    @property
    def is_latent(self) -> bool:
        """Whether the calls are multi-head latent attention; all calls are, or none."""
        own = self.value_dim is not None and np.any(np.asarray(self.value_dim) > 0)
        return bool(own or np.any(self.latent))

    @property
    def sides(self) -> Any:
        """Features of a key and a value over those of the key."""
        if self.value_dim is None:
            return 2.0
        return np.where(np.asarray(self.value_dim) > 0, 1.0 + self.value_dim / self.head_dim, 2.0)

    @property
    def stored(self) -> Any:
        """Stored features of a key and a value over those of the key."""
        return self.sides if self.latent is False else np.where(self.latent, 1.0, self.sides)


class Parts(NamedTuple):
    total_s: FloatArray  # without residual
    by_bottleneck: Mapping[str, FloatArray | float]  # "launch", the fixed time, is the last
    loadings: Mapping[str, FloatArray]  # derivative of log time by the log of each part
    waves: FloatArray | None = None  # units over those that run at once


class PrefillWork(NamedTuple):
    calls: Geometry
    tiles: FloatArray  # query tiles, all heads and sequences
    blocks: FloatArray  # key blocks of all tiles
    chain: FloatArray  # key blocks of the longest tile
    flops: FloatArray  # FLOPs of the query-key pairs inside the mask
    moved_bytes: FloatArray  # queries, outputs, keys and values, each once
    cost: FloatArray | float  # time of the remaining blocks over that of all blocks


def causal_blocks(
    q: FloatArray, kv: FloatArray, window: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return the query tiles of a head, the key blocks of all tiles, and the key blocks of the
    longest tile."""
    tiles = np.ceil(q / TILE)
    last = np.ceil(kv / TILE)
    blocks = (tiles - 1.0) * (np.ceil((kv - q) / TILE) + 0.5 * tiles) + last
    if not np.count_nonzero(window):
        return tiles, blocks, last
    # first key block that the first tile reads; negative while the window is not full
    first = np.floor((kv - q - window + 1.0) / TILE)
    whole = np.clip(-first, 0.0, tiles)  # tiles that read all keys before them
    skipped = (tiles - whole) * first + 0.5 * (tiles * (tiles - 1.0) - whole * (whole - 1.0))
    longest = np.minimum(last, np.ceil((window - 1.0) / TILE) + 1.0)
    windowed = window > 0
    return (
        tiles,
        np.where(windowed, np.maximum(blocks - skipped, tiles), blocks),
        np.where(windowed, longest, last),
    )


def prefill_work(a: Geometry, c: Values) -> PrefillWork:
    """Return the work of prefill attention; it depends only on the constants ``pads``, ``packs``,
    ``sparse_block``."""
    window, density = (np.asarray(v, dtype=np.float64) for v in (a.window, a.density))
    units = a.batch * a.heads
    tiles, blocks, chain = _prefill_tiles(a, units, window, c)
    seen = np.where(window > 0, np.minimum(a.kv_len, a.q_len + window - 1.0), a.kv_len)
    queries = a.sides * a.element_bytes * a.heads * a.q_len
    keys = a.stored * a.cache_bytes * a.kv_heads * seen
    flops = 2.0 * a.sides * units * a.head_dim * attention_pairs(a.q_len, a.kv_len, window)
    cost: FloatArray | float = 1.0
    if np.count_nonzero(density < 1.0):
        # a block-sparse kernel computes fewer blocks, and small blocks cost more each; the dense
        # kernel is used when it is faster
        edge = np.asarray(a.block, dtype=np.float64)
        block_cost = 1.0 + c["sparse_block"] / np.maximum(edge, 1.0)
        cost = np.where((density < 1.0) & (edge > 0), np.minimum(density * block_cost, 1.0), 1.0)
        # if whole queries are skipped, there are fewer tiles; the last tile reads as many keys as
        # before
        left = np.where(edge > 0, 1.0, density)
        tiles = tiles * left
        blocks = blocks * left
        flops = flops * density
    return PrefillWork(
        a, tiles, blocks, chain, flops, a.batch * a.head_dim * (queries + keys), cost
    )


def _prefill_tiles(
    a: Geometry, units: FloatArray, window: FloatArray, c: Values
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return the tiles and blocks of all sequences and heads, and the longest chain."""
    tiles, blocks, chain = causal_blocks(a.q_len, a.kv_len, window)
    if c["pads"] <= 0.0:
        part = a.q_len / TILE - np.floor(a.q_len / TILE)
        blocks = np.where(
            part > 0.0, blocks - chain + part * np.minimum(chain, a.kv_len / TILE), blocks
        )
    tiles = units * tiles
    blocks = units * blocks
    if c["packs"] > 0:
        packed = np.minimum(
            tiles, a.batch * a.kv_heads * np.ceil(a.q_len * (a.heads / a.kv_heads) / TILE)
        )
        tiles, blocks = packed, blocks * (packed / tiles)
    return tiles, blocks, chain


def prefill_core(work: PrefillWork, device: Machine, c: Values) -> Parts:
    """Return the time of prefill attention: a 4/3-norm joins throughput, longest chain and
    memory."""
    per_pair = 2.0 * work.calls.sides * device.sm_count / (c["e_tc"] * device.peak_flop_per_s)
    block_s = (
        TILE * TILE * per_pair * work.calls.head_dim + TILE * TILE / c["exp_per_s"]
    ) * work.cost
    starts = (
        work.calls.batch * c["sequence_s"] + np.ceil(work.tiles / device.sm_count) * c["tile_s"]
    )
    throughput = starts + work.blocks * block_s / device.sm_count
    chain = c["kappa"] * (c["tile_s"] + work.chain * block_s)
    memory = (
        work.moved_bytes
        / (c["e_io"] * device.bandwidth_bytes_per_s)
        * from_l2(work.moved_bytes, device, c)
    )
    powers = [part * np.cbrt(part) for part in (throughput, chain, memory)]
    norm = sum(powers)
    root = np.sqrt(norm)
    total = c["t0_s"] + root * np.sqrt(root)
    launch = c["t0_s"] / total
    rest = (1.0 - launch) / norm
    compute, latency, moved = (power * rest for power in powers)
    waves = np.maximum(work.tiles / device.sm_count, 1.0)
    loadings = {"launch": launch, "compute": compute, "latency": latency, "memory": moved}
    loadings["occupancy"] = compute * np.log(np.ceil(waves) / waves)
    parts = {"compute": throughput, "latency": chain, "memory": memory, "launch": c["t0_s"]}
    return Parts(total, parts, loadings)


class DecodeWork(NamedTuple):
    calls: Geometry
    kv: FloatArray  # keys read, after window and density
    pairs: FloatArray  # batch times KV heads
    group: FloatArray  # query heads per KV head
    key_bytes: FloatArray  # cache bytes of one key and value of one KV head
    flops: FloatArray
    cache_bytes: FloatArray
    io_bytes: FloatArray  # queries and outputs

    @property
    def moved_bytes(self) -> FloatArray:
        """All bytes, those from L2 included."""
        return self.cache_bytes + self.io_bytes


def decode_work(a: Geometry) -> DecodeWork:
    seen = np.where(np.asarray(a.window) > 0, np.minimum(a.kv_len, a.window), a.kv_len)
    kv = seen * np.asarray(a.density, dtype=np.float64)
    pairs = a.batch * a.kv_heads
    key = a.stored * a.cache_bytes * a.head_dim
    sides = a.sides
    flops = 2.0 * sides * a.batch * a.heads * a.head_dim * kv
    io = sides * a.element_bytes * a.batch * a.heads * a.head_dim
    return DecodeWork(a, kv, pairs, a.heads / a.kv_heads, key, flops, pairs * key * kv, io)


def decode_core(work: DecodeWork, device: Machine, c: Values) -> Parts:
    """Return the time of decode attention: a 2-norm joins memory and work units; fixed times are
    added."""
    slots = c["units_per_sm"] * device.sm_count
    # 1e-4: rounding error of a factor on the rows
    units = work.pairs * np.ceil(work.group / c["rows"] - 1e-4)
    # partly filled splits count, or the time would fall at each new split
    splits = np.maximum(
        np.minimum(np.floor(slots / units), np.ceil(work.kv / c["split_keys"])), 1.0
    )
    waves = np.ceil(units * splits / slots)
    keys = TILE * np.ceil(work.kv / (splits * TILE))  # a unit works in whole blocks
    unit = work.calls.batch * c["sequence_s"] + waves * (
        c["unit_s"] + keys * work.key_bytes / c["unit_bytes_per_s"]
    )
    cache = work.cache_bytes
    if np.count_nonzero(work.calls.warm):
        cache = np.where(work.calls.warm, cache * from_l2(cache, device, c), cache)
    cache = cache * (1.0 + c["regroup"] * (work.group > 1.0))
    memory = (cache + work.io_bytes) / (c["e_d"] * device.bandwidth_bytes_per_s)
    merge = (splits > 1.0) * (c["split_s"] + 0.25 * c["merge_s"] * np.log2(splits)) + (
        work.group > TILE
    ) * c["wide_s"]
    fixed = c["t0_s"] + merge
    parts: dict[str, FloatArray | float] = {"memory": memory, "latency": unit}
    tile = c["tile_rows"]
    if np.count_nonzero(tile):  # tensor cores compute whole tiles
        rows = tile * np.ceil(work.group / np.maximum(tile, 1.0) - 1e-4)
        parts["compute"] = work.flops * (rows / work.group) / (c["e_tc"] * device.peak_flop_per_s)
    work_s = np.sqrt(sum(part * part for part in parts.values()))
    total = fixed + work_s
    rest = 1.0 / (total * work_s)
    loadings: dict[str, FloatArray] = {"launch": c["t0_s"] / total}
    loadings |= {name: part * part * rest for name, part in parts.items()}
    loadings["merge"] = merge / total
    return Parts(total, {**parts, "launch": fixed}, loadings, units * splits / slots)


# stacks that run Triton kernels where latent attention has no kernel of its own
_TRITON = ("sglang", "vllm")

OTHER_KERNEL = 1.0
"""Distance of a kernel with a window, or with another cache format, from a fitted kernel: octaves
of head width."""


@dataclass(frozen=True)
class Kernels:
    """The v kernels of one section, each fitted separately: by head width, sliding window, and
    whether the cache is narrower than the arithmetic."""

    # (v, 3): log2 of the features per head, 1 with a window, 1 with a narrower cache
    kinds: FloatArray
    factors: FloatArray  # (v, c) logs of a kernel's constants over those of the section
    grid: ResidualGrid | None = None  # residuals of all kernels, joined along the first coordinate

    @classmethod
    def of(cls, section: FittedValues) -> Kernels:
        """Return the kernels of a section; a section without these arrays has one kernel for 128
        features per head."""
        kinds = np.asarray(section.arrays.get("kinds", [[7.0, 0.0, 0.0]]), dtype=np.float64)
        factors = np.asarray(
            section.arrays.get("factors", np.zeros((len(kinds), 0))), dtype=np.float64
        )
        return cls(kinds, factors, ResidualGrid.from_arrays(section.arrays))

    def which(self, width: Any, windowed: Any, narrow: bool) -> tuple[Any, Any]:
        """Return the kernel nearest to each call and its distance in octaves; ``width`` is features
        per head."""
        log_width, of_window, narrower = self.kinds.T
        apart = np.abs(np.log2(width)[..., None] - log_width) + OTHER_KERNEL * (
            windowed[..., None] != of_window
        )
        apart = apart + OTHER_KERNEL * (narrow != narrower)
        return apart.argmin(axis=-1), apart.min(axis=-1)

    def constants(self, common: Values, which: Any) -> dict[str, Any]:
        """Return the constants of each call; constants that all kernels share are numbers."""
        own = ((name, logs) for name, logs in zip(common, self.factors.T) if logs.any())
        return {**common, **{name: common[name] * np.exp(logs)[which] for name, logs in own}}

    def residual(self, position: Any, which: Any) -> FloatArray | None:
        """Return the residual of each call from the grid of its kernel."""
        if self.grid is None:
            return None
        start = self.grid.start[0]
        step = self.grid.step[0]
        nodes = self.grid.values.shape[0] // len(self.kinds)
        first = which * (nodes * step) + np.clip(position[0], start, start + (nodes - 1) * step)
        return self.grid((first, *position[1:]))


@dataclass(frozen=True)
class AttentionCalls(Calls):
    phase: str  # "prefill" or "decode"
    latent: bool  # multi-head latent attention
    geometry: Geometry
    machine: Machine
    fastest: float  # FLOP/s of the arithmetic that a kernel may use
    distance: Any = 0.0  # octaves from the nearest fitted kernel
    unfitted: tuple[str, ...] = ()  # error factors of a section of defaults
    makeshift: bool = False  # decode over a latent cache without a kernel of its own

    @property
    def operator(self) -> str:
        return f"{'mla' if self.latent else 'attention'}_{self.phase}"

    def seconds(self, c: RowValues) -> FloatArray:
        if self.phase == "decode":
            return decode_core(decode_work(self.geometry), self.machine, c).total_s
        return prefill_core(prefill_work(self.geometry, c), self.machine, c).total_s

    def estimate(self, c: RowValues) -> Estimate:
        """Return the cost; a constant that differs between kernels is an array."""
        g = self.geometry
        decodes = self.phase == "decode"
        work: DecodeWork | PrefillWork
        if decodes:
            work = decode_work(g)
            parts = decode_core(work, self.machine, c)
            position = (
                np.log2(work.group),
                np.log2(work.pairs * np.ceil(work.group / 128.0)),
                np.log2(work.kv),
            )
            length = g.kv_len
            kind = Kind.DECODE_ATTENTION
        else:
            work = prefill_work(g, c)
            parts = prefill_core(work, self.machine, c)
            sharing = g.heads if self.latent else g.kv_heads  # keys of one head or of all
            position = np.log2(g.heads / sharing), np.log2(g.batch * g.heads), np.log2(g.q_len)
            length = g.q_len
            kind = Kind.PREFILL_ATTENTION
        shape = parts.total_s.shape
        compute_s = work.flops / self.fastest
        bytes_s = work.moved_bytes / self.machine.bandwidth_bytes_per_s
        loadings: dict[str, Any] = {**parts.loadings, **dict.fromkeys(self.unfitted, 1.0)}
        if np.count_nonzero(self.distance):
            loadings["kernel"] = np.broadcast_to(self.distance, shape)
        if np.count_nonzero(np.asarray(g.density) < 1.0):
            loadings["sparse"] = np.broadcast_to(np.asarray(g.density) < 1.0, shape)
        if np.count_nonzero(g.selected):
            loadings["selected"] = np.broadcast_to(g.selected, shape) * (1.0 - loadings["launch"])
        sizes = (length, g.batch * g.kv_heads, g.heads / g.kv_heads)
        warm = np.asarray(g.warm, dtype=np.bool_)
        return Estimate(
            operator="mla_decode" if decodes and self.latent else self.phase,
            kind=int(kind),
            time=parts.total_s,
            floor=np.maximum(compute_s / self.machine.headroom, np.where(warm, 0.0, bytes_s)),
            roofline=np.maximum(compute_s, bytes_s),
            bottleneck=largest_part(parts.by_bottleneck, shape),
            loadings=loadings,
            coordinates=np.array([np.log2(size).ravel() for size in sizes]).T,
            position=position,
            unlike=1.0 - parts.loadings["launch"] if self.makeshift else None,
            waves=parts.waves,
        )


@dataclass(frozen=True, eq=False)
class _Ready:
    machine: Machine
    section: FittedValues
    fastest: float
    common: Values
    kernels: Kernels
    narrow: bool  # the cache is narrower than the arithmetic
    makeshift: bool
    unfitted: tuple[str, ...]


@lru_cache(maxsize=128)
def _ready(hw: Device, operator: str, dtype: str, kv_dtype: str | None) -> _Ready:
    section = hw.section(operator, dtype)
    cache = kv_dtype or dtype
    cache_bytes = element_bytes(cache)
    machine = Machine.of(hw, dtype)
    constants = {name: section[name] for name in _BY_SECTION[operator]}
    machine, fastest = replace(machine, weight_bytes=cache_bytes), machine.peak_flop_per_s
    # kernels of TensorRT-LLM compute in the format of the cache
    if operator.startswith("mla") and cache in hw.rates:
        fastest = max(fastest, hw.peak_flop_per_s(cache))
    known = operator == "attention_decode" and hw.architecture in DECODE_KERNELS
    factors = () if known else unfitted(section, _BY_SECTION[operator], hw.architecture)
    narrow = cache_bytes < machine.element_bytes
    makeshift = operator == "mla_decode" and _makeshift(hw, section, narrow)
    return _Ready(
        machine, section, fastest, constants, Kernels.of(section), narrow, makeshift, factors
    )


def _makeshift(hw: Device, section: FittedValues, narrow: bool) -> bool:
    """Return whether decode over a latent cache may run an entirely different kernel than the
    fitted one."""
    if hw.architecture in ("hopper", "blackwell_sm100"):
        # on Hopper, SGLang converts a whole fp8 cache, so the time does not depend on the calls
        # alone
        own = section.stack == "sglang" == (hw.engine_stack or section.stack)
        return own and narrow and hw.architecture == "hopper"
    similar = not narrow and section.stack in _TRITON and hw.engine_stack in _TRITON
    return hw.error_scales(section)[0] >= OTHER_STACK and not similar


def _estimate(phase: str, g: Geometry, hw: Device, dtype: str, kv_dtype: str | None) -> Estimate:
    latent = g.is_latent
    r = _ready(hw, f"{'mla' if latent else 'attention'}_{phase}", dtype, kv_dtype)
    stored: dict[str, Any] = {
        "element_bytes": r.machine.element_bytes,
        "cache_bytes": r.machine.weight_bytes,
    }
    g = replace(g, **stored) if latent else replace(g, **stored, value_dim=None, latent=False)
    which, distance = r.kernels.which(g.head_dim, np.asarray(g.window) > 0, r.narrow)
    e = AttentionCalls(
        phase, latent, g, r.machine, r.fastest, distance, r.unfitted, r.makeshift
    ).estimate(r.kernels.constants(r.common, which))
    return e.with_residual(r.kernels.residual(e.position, which), r.section)


def prefill(
    calls: Geometry, hw: Device, dtype: str = "bf16", kv_dtype: str | None = None
) -> Estimate:
    """Return the cost of causal attention of ``q_len`` new positions, the last of ``kv_len``. Small
    skipped blocks save less than their share; this is uncalibrated, so the interval is wider. In
    multi-head latent attention a query or key has ``head_dim`` features and a value ``value_dim``.
    DeepSeek-V3's prompts have 192 and 128 features; its decode, whose queries absorb the weights,
    has 576 and 512 of one latent KV head."""
    if np.count_nonzero(longer := calls.q_len > calls.kv_len):
        raise InputError(f"q_len: expected at most kv_len, got more in {int(longer.sum())} calls")
    return _estimate("prefill", calls, hw, dtype, kv_dtype)


def decode(
    calls: Geometry, hw: Device, dtype: str = "bf16", kv_dtype: str | None = None
) -> Estimate:
    """Return the cost of attention of one new position per sequence over a KV cache of ``kv_len``
    positions. The cache comes from DRAM, as in a model with several layers; a ``warm`` cache comes
    from L2 if it fits, as in a benchmark."""
    return _estimate("decode", calls, hw, dtype, kv_dtype)


class Attention(Cached):
    sizes: ClassVar[tuple[str, ...]] = ("batch", "kv_len", "heads", "kv_heads", "head_dim")

    def flops(self, w: Rows) -> Any:
        """2 (d_key + d_value) per query-key pair and head."""
        return 2.0 * w.batch * w.heads * (w.head_dim + w.value_features) * w.pairs

    def bytes(self, w: Rows) -> Any:
        """Queries, outputs, and the keys and values that some query sees."""
        cache = self.cache_bytes_read(w)
        return (
            cache
            + 1.0
            * w.batch
            * w.heads
            * w.q_len
            * (w.head_dim + w.value_features)
            * DTYPE_BYTES[w.dtype]
        )

    def cache_bytes_read(self, w: Rows) -> Any:
        """Bytes of keys and values that some query sees."""
        elements = w.kv_heads * (w.head_dim + w.value_features)
        return 1.0 * w.batch * w.keys_seen * elements * DTYPE_BYTES[w.weight_dtype]

    def _stored(self, w: Rows) -> Any:
        """Elements per position: keys and values of all heads, or the latent vector."""
        return np.where(w.latent > 0, w.latent, w.kv_heads * (w.head_dim + w.value_features))

    def cache_bytes(self, w: Rows, sequences: Any, positions: Any) -> Any:
        """Elements at the positions inside the window, selected or not, and of the entries of a
        compressed cache."""
        seen = np.where(w.window > 0, np.minimum(positions, w.window), positions)
        seen = seen + np.where(w.n > 0, positions // np.maximum(w.n, 1), 0)
        return sequences * self._stored(w) * seen * DTYPE_BYTES[w.weight_dtype]

    def section(self, w: Rows) -> str:
        return list(self.constants)[int(w.value_dim[0] > 0)]

    def _calls(self, w: Rows, **options: Any) -> Geometry:
        sizes = (w.batch, w.q_len, w.kv_len, w.heads, w.kv_heads, w.head_dim)
        options |= {"value_dim": w.value_dim, "window": w.limit, "density": w.density}
        compressed = w.n > 0
        if compressed.any():  # a share of all positions
            share = w.pairs / attention_pairs(w.q_len, w.kv_len, np.zeros(1))
            options["window"] = np.where(compressed, 0, w.limit)
            options["density"] = w.density * np.where(compressed, share, 1.0)
        options["selected"] = compressed | (w.k > 0)
        return Geometry.of(*sizes, **options)


class PrefillAttention(Attention):
    code = int(Kind.PREFILL_ATTENTION)
    name = "prefill_attention"
    sizes = (*Attention.sizes, "q_len")
    constants = _PREFILL
    titles = ("prefill attention", "latent prefill attention")
    errors = _PREFILL_ERRORS

    def estimates(self, w: Rows, hw: Device, formats: Formats) -> Estimates:
        yield slice(None), prefill(self._calls(w, block=w.block), hw, formats.dtype, formats.second)


class DecodeAttention(Attention):
    code = int(Kind.DECODE_ATTENTION)
    name = "decode_attention"
    constants = _DECODE
    titles = ("decode attention", "latent decode attention")
    errors = _DECODE_ERRORS

    def cache_bytes_read(self, w: Rows) -> Any:
        """Bytes that are read of keys and values of all heads, or of the latent vector."""
        each = self._stored(w) * DTYPE_BYTES[w.weight_dtype] * w.density
        return 1.0 * w.batch * w.keys_seen * each

    def estimates(self, w: Rows, hw: Device, formats: Formats) -> Estimates:
        calls = self._calls(w, latent=w.latent)
        # positions that are checked together share the keys of a KV head, as its query heads do
        calls = replace(
            calls, heads=calls.heads * np.maximum(calls.q_len, 1.0), q_len=np.ones_like(calls.q_len)
        )
        yield slice(None), decode(calls, hw, formats.dtype, formats.second)

    def idling(self, w: Rows, hw: Device, formats: Formats) -> Estimates:
        return self.estimates(w, hw, formats)
