"""The analytic forms of attention (docs/model.md): FlashAttention over query tiles, and a query against its KV cache.

Pure arrays in, arrays out, residual left out; :mod:`simulator.cost.attention` joins them to a profile.

*Prefill*: a kernel of 64-query tiles walks the key blocks its causal mask and window leave. All tiles share the SMs;
the longest is a chain that no number of SMs shortens; queries, keys, values and outputs cross memory, or come from L2
while they fit. The 4/3-norm errs by 4.1 % on all rows of the A100 and 6.5 % on those of the H100, a 2-norm by 6.1 and
6.8 %.

*Decode*: the work units are (sequence, KV head, some query rows). Where they are fewer than the SMs, the cache of a
unit is split and the parts merged; where they are more, they run in waves. Beside that, the whole cache crosses memory.
The start of a unit, the scheduling of a sequence and whole waves take the error over all rows from 19 to 4.2 % (H100)
and 4.9 % (A100).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from simulator.arrays import FloatArray
from simulator.cost.base import Machine, Sizes, from_l2
from simulator.counts import attention_pairs

TILE = 64.0
"""Queries of a tile and keys of a block; FlashAttention kernels use 64 or 128 of either."""


@dataclass(frozen=True)
class Geometry(Sizes):
    """Sizes of attention calls: arrays of one shape, with which the rest broadcasts."""

    batch: FloatArray  # sequences
    q_len: FloatArray  # query positions of one, the last of its key positions
    kv_len: FloatArray
    heads: FloatArray
    kv_heads: FloatArray
    head_dim: FloatArray  # features of a head
    window: Any = 0.0  # positions, 0 for none
    density: Any = 1.0  # share of the query-key blocks computed; in decode, of the cache read
    block: Any = 0.0  # edge of the blocks skipped, 0 for none
    element_bytes: Any = 2.0  # of an activation
    cache_bytes: Any = 2.0
    warm: Any = False  # of decode: L2 may hold the cache, as in a benchmark that repeats one call
    value_dim: Any = None  # features of a value, where they are others than of a key (0: they are not)
    latent: Any = False  # values are the first features of the keys, and stored with them

    @property
    def sides(self) -> Any:
        """Features of a key and a value of a head, over those of a key alone."""
        if self.value_dim is None:
            return 2.0
        return np.where(np.asarray(self.value_dim) > 0, 1.0 + self.value_dim / self.head_dim, 2.0)

    @property
    def stored(self) -> Any:
        """Features stored of a key and its value, over those of the key."""
        return self.sides if self.latent is False else np.where(self.latent, 1.0, self.sides)


@dataclass(frozen=True)
class Parts:
    """Time of attention calls without residual, s, and the parts that it joins."""

    total_s: FloatArray
    by_bottleneck: Mapping[str, FloatArray | float]  # "launch", the fixed time, is the last
    loadings: Mapping[str, FloatArray]  # derivative of log time by the log of each part


@dataclass(frozen=True)
class PrefillWork:
    """What a prefill attention computes and moves, arrays of one shape."""

    calls: Geometry
    tiles: FloatArray  # query tiles, all heads and sequences
    blocks: FloatArray  # key blocks of all tiles
    chain: FloatArray  # key blocks of the longest tile
    flops: FloatArray  # of the query-key pairs the mask leaves
    moved_bytes: FloatArray  # queries, outputs, keys and values, each once
    cost: FloatArray | float  # time of the blocks left, over that of all of them


def causal_blocks(q: FloatArray, kv: FloatArray, window: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Query tiles of a head, key blocks over all of them, and key blocks of the longest."""
    tiles, last = np.ceil(q / TILE), np.ceil(kv / TILE)
    blocks = (tiles - 1.0) * (np.ceil((kv - q) / TILE) + 0.5 * tiles) + last
    if not np.any(window):
        return tiles, blocks, last
    first = np.floor((kv - q - window + 1.0) / TILE)  # seen first by the first tile; below 0 in a window not yet full
    whole = np.clip(-first, 0.0, tiles)  # tiles that see everything before them
    skipped = (tiles - whole) * first + 0.5 * (tiles * (tiles - 1.0) - whole * (whole - 1.0))
    longest = np.minimum(last, np.ceil((window - 1.0) / TILE) + 1.0)
    windowed = window > 0
    return tiles, np.where(windowed, np.maximum(blocks - skipped, tiles), blocks), np.where(windowed, longest, last)


def prefill_work(a: Geometry, c: Mapping[str, float]) -> PrefillWork:
    """Tiles, blocks, FLOPs and bytes of prefill attention; of the constants only those of its structure enter."""
    window, density = (np.asarray(v, dtype=np.float64) for v in (a.window, a.density))
    tiles, blocks, chain = causal_blocks(a.q_len, a.kv_len, window)
    if c["pads"] <= 0.0:
        part = a.q_len / TILE - np.floor(a.q_len / TILE)
        blocks = np.where(part > 0.0, blocks - chain + part * np.minimum(chain, a.kv_len / TILE), blocks)
    units = a.batch * a.heads
    all_tiles, all_blocks = units * tiles, units * blocks
    if c["packs"] > 0:
        packed = np.minimum(all_tiles, a.batch * a.kv_heads * np.ceil(a.q_len * (a.heads / a.kv_heads) / TILE))
        all_tiles, all_blocks = packed, all_blocks * (packed / all_tiles)
    seen = np.where(window > 0, np.minimum(a.kv_len, a.q_len + window - 1.0), a.kv_len)
    sides = a.sides
    queries, keys = sides * a.element_bytes * a.heads * a.q_len, a.stored * a.cache_bytes * a.kv_heads * seen
    flops = 2.0 * sides * units * a.head_dim * attention_pairs(a.q_len, a.kv_len, window)
    cost: FloatArray | float = 1.0
    if np.any(density < 1.0):
        # fewer blocks than a dense kernel, each of them dearer the smaller it is; a dense kernel is always to be had
        edge = np.asarray(a.block, dtype=np.float64)
        dearer = 1.0 + c["sparse_block"] / np.maximum(edge, 1.0)
        cost = np.where((density < 1.0) & (edge > 0), np.minimum(density * dearer, 1.0), 1.0)
        # whole queries gone: fewer tiles, the last of which sees as many keys as before
        left = np.where(edge > 0, 1.0, density)
        all_tiles, all_blocks = all_tiles * left, all_blocks * left
        flops = flops * density
    return PrefillWork(a, all_tiles, all_blocks, chain, flops, a.batch * a.head_dim * (queries + keys), cost)


def prefill_core(work: PrefillWork, device: Machine, c: Mapping[str, float]) -> Parts:
    """Time of prefill attention; throughput, longest chain and memory overlap in part: a 4/3-norm joins them."""
    per_pair = 2.0 * work.calls.sides * device.sm_count / (c["e_tc"] * device.peak_flop_per_s)
    block_s = (TILE * TILE * per_pair * work.calls.head_dim + TILE * TILE / c["exp_per_s"]) * work.cost
    starts = work.calls.batch * c["sequence_s"] + np.ceil(work.tiles / device.sm_count) * c["tile_s"]
    throughput = starts + work.blocks * block_s / device.sm_count
    chain = c["kappa"] * (c["tile_s"] + work.chain * block_s)
    memory = work.moved_bytes / (c["e_io"] * device.bandwidth_bytes_per_s) * from_l2(work.moved_bytes, device, c)
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


@dataclass(frozen=True)
class DecodeWork:
    """What a decode attention computes and moves, arrays of one shape."""

    calls: Geometry
    kv: FloatArray  # keys read, after window and density
    pairs: FloatArray  # batch times KV heads
    group: FloatArray  # query heads a KV head
    key_bytes: FloatArray  # cache bytes of one key of one KV head, its value included
    flops: FloatArray
    cache_bytes: FloatArray
    io_bytes: FloatArray  # queries and outputs

    @property
    def moved_bytes(self) -> FloatArray:
        """All bytes, none of them from L2."""
        return self.cache_bytes + self.io_bytes


def decode_work(a: Geometry) -> DecodeWork:
    """Keys, FLOPs and bytes of decode attention."""
    seen = np.where(np.asarray(a.window) > 0, np.minimum(a.kv_len, a.window), a.kv_len)
    kv = seen * np.asarray(a.density, dtype=np.float64)
    pairs, key, sides = a.batch * a.kv_heads, a.stored * a.cache_bytes * a.head_dim, a.sides
    flops = 2.0 * sides * a.batch * a.heads * a.head_dim * kv
    io = sides * a.element_bytes * a.batch * a.heads * a.head_dim
    return DecodeWork(a, kv, pairs, a.heads / a.kv_heads, key, flops, pairs * key * kv, io)


def decode_core(work: DecodeWork, device: Machine, c: Mapping[str, float]) -> Parts:
    """Time of decode attention: memory and units, joined by a 2-norm, and what is fixed (merge, wide tile too)."""
    slots = c["units_per_sm"] * device.sm_count
    units = work.pairs * np.ceil(work.group / c["rows"] - 1e-4)  # of a kernel's factor on the rows the rounding
    # begun parts count, else the time would fall at each new part
    splits = np.maximum(np.minimum(np.floor(slots / units), np.ceil(work.kv / c["split_keys"])), 1.0)
    waves = np.ceil(units * splits / slots)
    keys = TILE * np.ceil(work.kv / (splits * TILE))  # a unit works in whole blocks
    unit = work.calls.batch * c["sequence_s"] + waves * (c["unit_s"] + keys * work.key_bytes / c["unit_bytes_per_s"])
    cache = work.cache_bytes
    if np.any(work.calls.warm):
        cache = np.where(work.calls.warm, cache * from_l2(cache, device, c), cache)
    cache = cache * (1.0 + c["regroup"] * (work.group > 1.0))
    memory = (cache + work.io_bytes) / (c["e_d"] * device.bandwidth_bytes_per_s)
    merge = (splits > 1.0) * (c["split_s"] + 0.25 * c["merge_s"] * np.log2(splits)) + (work.group > TILE) * c["wide_s"]
    fixed = c["t0_s"] + merge
    parts: dict[str, FloatArray | float] = {"memory": memory, "latency": unit}
    if np.any(tile := c["tile_rows"]):  # tensor cores compute whole tiles, however few query heads share a KV head
        rows = tile * np.ceil(work.group / np.maximum(tile, 1.0) - 1e-4)
        parts["compute"] = work.flops * (rows / work.group) / (c["e_tc"] * device.peak_flop_per_s)
    work_s = np.sqrt(sum(part * part for part in parts.values()))
    total = fixed + work_s
    rest = 1.0 / (total * work_s)
    loadings: dict[str, FloatArray] = {"launch": c["t0_s"] / total}
    loadings |= {name: part * part * rest for name, part in parts.items()}
    loadings["merge"] = merge / total
    return Parts(total, {**parts, "launch": fixed}, loadings)
