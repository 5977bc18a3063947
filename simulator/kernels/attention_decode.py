"""Core time of decode attention: one query a sequence against its KV cache. Pure arrays in, arrays out; use :mod:`simulator.kernels.attention`.

The work units are (sequence, KV head, up to 128 query rows). Where they are fewer than the SMs, the cache of a unit is split and the parts
merged; where they are more, they run in waves, each with a start and an end of its own. Beside that, the whole cache crosses memory. Form:
DESIGN section 10, with the start of a unit, the scheduling of a sequence and whole waves added: they take the core's error over all rows
from 19 to 4.2 % on H100 and to 4.9 % on A100.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.kernels.attention_prefill import Device, from_l2

F = NDArray[np.float64]

KEYS = 64.0
"""Keys of a block: a unit works in whole blocks."""


@dataclass(frozen=True)
class DecodeWork:
    """What a decode attention computes and moves, arrays of one shape (see :func:`decode_work`)."""

    kv: F  # keys read, after window and density
    batch: F
    pairs: F  # batch times KV heads
    group: F  # query heads a KV head
    key_bytes: F  # cache bytes of one key of one KV head, its value included
    flops: F
    cache_bytes: F
    io_bytes: F  # queries and outputs
    warm: Any = False  # L2 may hold the cache, as in a benchmark that repeats one call


def decode_work(
    batch: F,
    kv_len: F,
    heads: F,
    kv_heads: F,
    head_dim: F,
    *,
    window: Any = 0.0,
    density: Any = 1.0,
    element_bytes: Any = 2.0,
    cache_bytes: Any = 2.0,
    warm: Any = False,
) -> DecodeWork:
    """Keys, FLOPs and bytes of decode attention.

    Parameters
    ----------
    batch, kv_len, heads, kv_heads, head_dim : float64 arrays
        Sequences, cached positions, heads, key/value heads, features.
    window, density : arrays
        Sliding window (0: none); share of the cache read.
    element_bytes, cache_bytes : float or array, bytes
        One element of an activation and of the cache.
    warm : bool or array
        L2 may hold the cache, as in a benchmark that repeats one call.

    Returns
    -------
    DecodeWork
    """
    window = np.asarray(window, dtype=np.float64)
    density = np.asarray(density, dtype=np.float64)
    kv = np.where(window > 0, np.minimum(kv_len, window), kv_len) if window.any() else kv_len
    if np.any(density < 1.0):
        kv = kv * density
    pairs = batch * kv_heads
    key = 2.0 * cache_bytes * head_dim
    flops = 4.0 * batch * heads * head_dim * kv
    io = 2.0 * element_bytes * batch * heads * head_dim
    return DecodeWork(kv, batch, pairs, heads / kv_heads, key, flops, pairs * key * kv, io, warm)


def decode_parts(work: DecodeWork, device: Device, c: Mapping[str, float]) -> tuple[F, F, F]:
    """Memory and unit time, and what is fixed beside ``t0_s`` (merge, wide tile), of decode attention, s each."""
    slots = c["units_per_sm"] * device.sm_count
    units = work.pairs * np.ceil(work.group / c["rows"])
    splits = np.minimum(np.floor(slots / units), np.floor(work.kv / c["split_keys"]))
    long = work.kv >= c["long_keys"]
    splits = np.where(long, np.maximum(splits, 1.0), 1.0)
    waves = np.ceil(units * splits / slots)
    keys = KEYS * np.ceil(work.kv / (splits * KEYS))
    start = c["unit_s"] + long * c["long_unit_s"]
    unit = work.batch * c["sequence_s"] + waves * (start + keys * work.key_bytes / c["unit_bytes_per_s"])
    cache = work.cache_bytes
    if np.any(work.warm):
        cache = np.where(work.warm, cache * from_l2(cache, device, c), cache)
    if c["regroup"]:
        cache = cache * (1.0 + c["regroup"] * (work.group > 1.0))
    memory = (cache + work.io_bytes) / (c["e_d"] * device.bandwidth_bytes_per_s)
    merge = (splits > 1.0) * (c["split_s"] + 0.25 * c["merge_s"] * np.log2(splits)) + (work.group > 64.0) * c["wide_s"]
    return memory, unit, merge


def decode_core(work: DecodeWork, device: Device, c: Mapping[str, float]) -> F:
    """Time of decode attention without residual, s: fixed time, joined memory and units, merge."""
    memory, unit, merge = decode_parts(work, device, c)
    return np.asarray(c["t0_s"] + np.sqrt(memory * memory + unit * unit) + merge)
