"""Core time of prefill attention: causal FlashAttention over query tiles. Pure arrays in, arrays out; use :mod:`simulator.kernels.attention`.

A kernel of 64-query tiles walks the key blocks its causal mask and window leave. All tiles share the SMs; the longest tile is a chain
that no number of SMs shortens; queries, keys, values and outputs cross memory, or come from L2 while they fit. Form: DESIGN section 10,
with the 4/3-norm in place of the 2-norm (core error on all rows 4.1 % against 6.1 % on A100, 6.5 % against 6.8 % on H100).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

F = NDArray[np.float64]

TILE = 64.0
"""Queries of a tile and keys of a block in the model; FlashAttention kernels use 64 or 128 of either."""

RESIDENCY_POWER = 8
"""Steepness of the residency h = 1 / (1 + (bytes / (l2_share L2))^8); fixed: L40S decode errs by 16.3, 14.0, 13.2 % with 4, 8, 16."""


@dataclass(frozen=True)
class Device:
    """The facts of a device the attention cores need, SI."""

    peak_flop_per_s: float
    sm_count: float
    bandwidth_bytes_per_s: float
    l2_bytes: float


@dataclass(frozen=True)
class PrefillWork:
    """What a prefill attention computes and moves, arrays of one shape (see :func:`prefill_work`)."""

    batch: F
    tiles: F  # query tiles, all heads and sequences
    blocks: F  # key blocks of all tiles
    chain: F  # key blocks of the longest tile
    head_dim: F
    flops: F  # of the query-key pairs the mask leaves
    io_bytes: F  # queries, outputs, keys and values, each once
    cost: F | float  # time of the blocks left, over that of all of them


def causal_pairs(q: F, kv: F, window: F) -> F:
    """Query-key pairs a causal mask with an optional sliding window leaves, for one sequence and head.

    >>> float(causal_pairs(np.array(4.0), np.array(4.0), np.array(0.0)))
    10.0
    """
    full = q * (kv - q + 1.0 + kv) * 0.5
    if not np.any(window):
        return np.asarray(full)
    capped = np.clip(
        kv - np.maximum(window, kv - q), 0.0, q
    )  # queries whose window is shorter than what lies before them
    return np.where(window > 0, full - capped * (kv - window) + capped * (capped - 1.0) * 0.5, full)


def causal_blocks(q: F, kv: F, window: F) -> tuple[F, F, F]:
    """Query tiles of a head, key blocks over all of them, and key blocks of the longest.

    >>> [float(x) for x in causal_blocks(np.array(256.0), np.array(256.0), np.array(0.0))]
    [4.0, 10.0, 4.0]
    """
    tiles = np.ceil(q / TILE)
    history = np.ceil((kv - q) / TILE)
    last = np.ceil(kv / TILE)
    blocks = (tiles - 1.0) * (history + 0.5 * tiles) + last
    if not np.any(window):
        return tiles, blocks, last
    first = np.floor(
        (kv - q - window + 1.0) / TILE
    )  # first block the first tile sees, negative while the window is not full
    whole = np.clip(-first, 0.0, tiles)  # tiles that see everything before them
    skipped = (tiles - whole) * first + 0.5 * (tiles * (tiles - 1.0) - whole * (whole - 1.0))
    windowed = window > 0
    longest = np.minimum(last, np.ceil((window - 1.0) / TILE) + 1.0)
    return tiles, np.where(windowed, np.maximum(blocks - skipped, tiles), blocks), np.where(windowed, longest, last)


def prefill_work(
    batch: F,
    q_len: F,
    kv_len: F,
    heads: F,
    kv_heads: F,
    head_dim: F,
    *,
    window: Any = 0.0,
    density: Any = 1.0,
    block: Any = 0.0,
    element_bytes: Any = 2.0,
    cache_bytes: Any = 2.0,
    sparse_block: float = 16.0,
    packs: float = 0.0,
    pads: float = 1.0,
) -> PrefillWork:
    """Tiles, blocks, FLOPs and bytes of prefill attention.

    Parameters
    ----------
    batch, q_len, kv_len, heads, kv_heads, head_dim : float64 arrays
        Sequences, query positions, key positions (the last ``q_len`` of them the queries' own), heads, key/value heads, features.
    window, density, block : arrays
        Sliding window (0: none), share of the q-k blocks computed, their edge (0: no skipping).
    element_bytes, cache_bytes : float, bytes
        One element of an activation and of the KV cache.
    sparse_block, packs, pads : float
        The constants of those names.

    Returns
    -------
    PrefillWork
    """
    window = np.asarray(window, dtype=np.float64)
    density = np.asarray(density, dtype=np.float64)
    tiles, blocks, chain = causal_blocks(q_len, kv_len, window)
    if pads <= 0.0:
        part = q_len / TILE - np.floor(q_len / TILE)
        blocks = np.where(part > 0.0, blocks - chain + part * np.minimum(chain, kv_len / TILE), blocks)
    units = batch * heads
    all_tiles, all_blocks = units * tiles, units * blocks
    if packs > 0:
        packed = np.minimum(all_tiles, batch * kv_heads * np.ceil(q_len * (heads / kv_heads) / TILE))
        all_blocks = all_blocks * (packed / all_tiles)
        all_tiles = packed
    seen = np.where(window > 0, np.minimum(kv_len, q_len + window - 1.0), kv_len) if window.any() else kv_len
    io = batch * head_dim * (2.0 * element_bytes * heads * q_len + 2.0 * cache_bytes * kv_heads * seen)
    flops = 4.0 * units * head_dim * causal_pairs(q_len, kv_len, window)
    cost: F | float = 1.0
    if np.any(density < 1.0):
        # fewer blocks than a dense kernel, each of them dearer the smaller it is; a dense kernel is always to be had
        edge = np.asarray(block, dtype=np.float64)
        dearer = np.where(edge > 0, 1.0 + sparse_block / np.maximum(edge, 1.0), 1.0)
        cost = np.where(density < 1.0, np.minimum(density * dearer, 1.0), 1.0)
        flops = flops * density
    return PrefillWork(batch, all_tiles, all_blocks, chain, head_dim, flops, io, cost)


def prefill_parts(work: PrefillWork, device: Device, c: Mapping[str, float], warm: bool = True) -> tuple[F, F, F]:
    """Throughput, chain and memory time of prefill attention, s each, to be joined. ``warm``: L2 may hold the operands."""
    per_pair = 4.0 * device.sm_count / (c["e_tc"] * device.peak_flop_per_s)
    block_s = (TILE * TILE * per_pair * work.head_dim + TILE * TILE / c["exp_per_s"]) * work.cost
    starts = work.batch * c["sequence_s"] + np.ceil(work.tiles / device.sm_count) * c["tile_s"]
    throughput = starts + work.blocks * block_s / device.sm_count
    chain = c["kappa"] * (c["tile_s"] + work.chain * block_s)
    memory = work.io_bytes / (c["e_io"] * device.bandwidth_bytes_per_s)
    if warm:
        memory = memory * from_l2(work.io_bytes, device, c)
    return throughput, chain, memory


def from_l2(footprint_bytes: F, device: Device, c: Mapping[str, float]) -> F:
    """Time of moving bytes of which L2 holds a share, over that of moving them from DRAM."""
    ratio = footprint_bytes / (c["l2_share"] * device.l2_bytes)
    for _ in range(3):  # to the eighth power
        ratio = ratio * ratio
    return np.asarray(1.0 - (1.0 - 1.0 / c["l2_gain"]) / (1.0 + ratio))


def join(*parts: F) -> F:
    """4/3-norm of times that overlap in part: more than the longest, less than the sum.

    >>> float(join(np.array(1.0), np.array(0.0))), round(float(join(np.array(1.0), np.array(1.0))), 3)
    (1.0, 1.682)
    """
    total = parts[0] * np.cbrt(parts[0])
    for part in parts[1:]:
        total = total + part * np.cbrt(part)
    root = np.sqrt(total)
    return np.asarray(root * np.sqrt(root))


def prefill_core(work: PrefillWork, device: Device, c: Mapping[str, float], warm: bool = True) -> F:
    """Time of prefill attention without residual, s: fixed time plus the joined throughput, chain and memory."""
    return np.asarray(c["t0_s"] + join(*prefill_parts(work, device, c, warm)))
