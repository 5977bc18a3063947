"""Core time of decode attention: one query a sequence against its KV cache. Pure arrays in, arrays out; use :mod:`simulator.attention`.

The work units are (sequence, KV head, up to 128 query rows). Where they are fewer than the SMs, the cache of a unit is split and the parts
merged; where they are more, they run in waves, each with a start and an end of its own. Beside that, the whole cache crosses memory. Form:
DESIGN section 10, with the start of a unit, the scheduling of a sequence and whole waves added: they take the core's error over all rows
from 19 to 4.2 % on H100 and to 4.9 % on A100.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.attention_prefill import Device, from_l2
from simulator.constants import Constant

F = NDArray[np.float64]

KEYS = 64.0
"""Keys of a block: a unit works in whole blocks."""

_TABLES = "fits on the generation tables of aiconfigurator-core 0.12.0 (sglang: FlashAttention on A100 and H100, FlashInfer on L40S; bf16)"

DECODE_CONSTANTS: Mapping[str, Constant] = MappingProxyType(
    {
        "t0_s": Constant("s", 1e-6, 4e-5, "fixed time of the kernel and what its library launches with it",
                         {"ampere": 1.05e-5, "ada": 4.1e-6, "hopper": 6.65e-6, "*": 8e-6}, _TABLES),
        "unit_s": Constant("s", 1e-9, 2e-5, "start and end of a work unit on an SM",
                           {"ampere": 1.5e-6, "ada": 6.5e-7, "hopper": 2.3e-6, "*": 2e-6}, _TABLES),
        "wide_s": Constant("s", 1e-10, 2e-5, "fixed time more where a KV head serves more than 64 query heads (a larger tile)",
                           {"ampere": 4e-7, "hopper": 1.7e-6, "*": 5e-7}, _TABLES),
        "long_unit_s": Constant("s", 1e-9, 5e-5, "what a unit takes more from `long_keys` keys on, where the kernel is one that splits",
                                {"ampere": 6.9e-6, "hopper": 1e-8, "*": 5e-7}, _TABLES),
        "sequence_s": Constant("s", 1e-11, 1e-6, "scheduling one sequence of the batch",
                               {"ampere": 1.2e-8, "ada": 2.6e-9, "hopper": 1.1e-8, "*": 5e-9}, _TABLES),
        "unit_bytes_per_s": Constant("B/s", 1e9, 1e12, "what one work unit draws from its cache",
                                     {"ampere": 1.4e10, "ada": 4e10, "hopper": 7.2e10, "*": 4e10}, _TABLES),
        "e_d": Constant("1", 0.2, 1.0, "share of the datasheet bandwidth a long cache reaches",
                        {"ampere": 0.95, "ada": 0.83, "hopper": 0.93, "*": 0.85}, _TABLES),
        "split_s": Constant("s", 1e-9, 2e-5, "a second kernel that merges the parts of split caches",
                            {"ampere": 1e-8, "ada": 2.2e-6, "hopper": 1.65e-6, "*": 1.5e-6}, _TABLES),
        "merge_s": Constant("s", 1e-9, 2e-5, "time of that kernel more for 16 times the splits",
                            {"ampere": 4.6e-6, "ada": 1.1e-6, "hopper": 1.9e-6, "*": 2e-6}, _TABLES),
        "l2_gain": Constant("1", 1.0, 10.0, "rate of a cache that lies in L2, in units of that out of DRAM",
                            {"ampere": 1.0, "ada": 7.0, "hopper": 3.0, "*": 2.0}, _TABLES),
        "l2_share": Constant("1", 0.1, 4.0, "cache bytes, in units of the L2, at which half of them are found there",
                             {"ada": 1.01, "*": 0.71}, _TABLES),
        "rows": Constant("1", 1.0, 128.0, "query rows of one KV head a unit takes at most",
                         {"*": 128.0}, "96 and 128 rows start no second unit in the A100 and H100 tables"),
        "units_per_sm": Constant("1", 0.25, 8.0, "units an SM holds when the splits are chosen",
                                 {"ada": 2.0, "*": 1.0}, _TABLES),
        "long_keys": Constant("1", 1.0, 1e6, "keys from which a sequence counts as long", {"*": 512.0}, "where the A100 table steps up"),
        "split_keys": Constant("1", 16.0, 4096.0, "keys a split keeps at least", {"*": 128.0}, "64 to 256 fit the tables alike"),
        "regroup": Constant("1", 0.0, 4.0, "time more of a cache whose KV heads serve several query heads: a CPU packs it",
                            {"cpu": 1.0, "*": 0.0}, "fp32 attention measured by prunesim on two cores of a Xeon"),
    }
)  # fmt: skip
"""Constants of the ``attention_decode`` section of a profile."""


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
    batch: F, kv_len: F, heads: F, kv_heads: F, head_dim: F, *,
    window: Any = 0.0, density: Any = 1.0, element_bytes: Any = 2.0, cache_bytes: Any = 2.0, warm: Any = False,
) -> DecodeWork:  # fmt: skip
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
