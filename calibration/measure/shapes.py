"""Candidates for a measurement plan, best first: sizes of language models and odd sizes between them, spread over
logarithmic space."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.devices.protocol import NORMS, Operator

# fmt: off
TOKENS = (
    1, 2, 3, 4, 5, 7, 8, 12, 16, 17, 24, 31, 32, 48, 64, 65, 96, 100, 127, 128, 160, 192, 256, 257, 320, 384, 512, 513,
    640, 768, 1000, 1024, 1536, 2048, 3000, 3072, 4096, 6144, 8192, 16384,
)
SIZES = (
    64, 128, 192, 256, 320, 512, 576, 640, 768, 896, 960, 1024, 1280, 1536, 1792, 2048, 2304, 2560, 3072, 3584, 4096,
    4864, 5120, 5632, 6144, 7168, 8192, 8960, 9216, 11008, 12288, 13824, 14336, 16384, 18944, 24576, 28672,
)
ODD_SIZES = (100, 321, 500, 1001, 1365, 2050, 2731, 3001, 4099, 5461, 7500, 11003)
VOCABULARIES = (32000, 49152, 50257, 128256, 151936)
HEADS = (  # heads, kv_heads, head_dim
    (9, 3, 64), (14, 2, 64), (12, 12, 64), (16, 8, 128), (32, 32, 128), (32, 8, 128), (28, 4, 128), (40, 8, 128),
    (64, 8, 128), (24, 8, 96),
)
LENGTHS = (64, 128, 200, 256, 384, 512, 768, 1000, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 16384, 32768)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
ELEMENTWISE = (NORMS[0], "activation", "residual", "rotary", "gather", "scatter", "cache_write", "select")
# fmt: on
LAYER_LENGTHS = (16, 32, 64, 96, 128, 192)  # caches so short that a copy takes no longer than a launch
SELECTED = (8, 32, 64, 256, 1024, 2048)  # numbers of scores of a selection: groups, blocks, positions

_MOST_ORDERED = 600  # points ordered at a time: the cost grows with the square of the number
_GROUP_TOKENS = 3  # values of m measured for each (n, k)
_WIDTH_ROWS = 96  # calls of one head width before the next width: a fit needs 20, and a short plan ends early
_ODD_EVERY = 8  # one group in eight is misaligned in n, in k, or in both


def spread_order(points: NDArray[np.float64], count: int, first: int = 0) -> list[int]:
    """Return indices of points in an order in which every prefix is spread widely (farthest point first)."""
    order = [first]
    nearest = np.linalg.norm(points - points[first], axis=1)
    nearest[first] = -1.0
    while len(order) < min(count, len(points)):
        chosen = int(np.argmax(nearest))
        order.append(chosen)
        nearest = np.minimum(nearest, np.linalg.norm(points - points[chosen], axis=1))
        nearest[order] = -1.0
    return order


def gemm_stream(dtype: str, rng: np.random.Generator, fits: Callable[[Operator], bool]) -> Iterable[Operator]:
    """Yield GEMMs of widely spread groups (n, k), one in eight misaligned, in rounds until nothing that fits is left.
    Each group gets one m from each stratum."""
    regular = [(n, k) for n in (*SIZES, *VOCABULARIES) for k in SIZES]
    mixed = (*ODD_SIZES, *SIZES[5:21:3])
    odd = [(n, k) for n in mixed for k in mixed if n in ODD_SIZES or k in ODD_SIZES]
    # pairs that do not fit with the smallest m are excluded
    pools = [[(n, k) for n, k in pool if fits(Operator("gemm", dtype, m=1, n=n, k=k))] for pool in (regular, odd)]
    turn, gained = 0, True
    while gained:
        gained = False
        orders = [_spread(pool, rng) for pool in pools]
        while orders[0]:
            pool = orders[1] if turn % _ODD_EVERY == _ODD_EVERY - 1 and orders[1] else orders[0]
            n, k = pool.pop(0)
            usable = [op for m in TOKENS if fits(op := Operator("gemm", dtype, m=m, n=n, k=k))]
            for stratum in np.array_split(np.arange(len(usable)), min(_GROUP_TOKENS, len(usable)) or 1):
                if len(stratum):
                    gained = True
                    yield usable[int(rng.choice(stratum))]
            turn += 1


def _spread(pool: Sequence[tuple[int, ...]], rng: np.random.Generator) -> list[tuple[int, ...]]:
    """Return up to :data:`_MOST_ORDERED` members of a pool in a spread order, from a random one on."""
    if not pool:
        return []
    order = spread_order(np.log2(np.array(pool, dtype=np.float64)), _MOST_ORDERED, int(rng.integers(len(pool))))
    return [pool[i] for i in order]


def other_streams(dtype: str, rng: np.random.Generator, kernels_apart: bool = True) -> dict[str, Iterable[Operator]]:
    aligned = [(m, n, k) for m in TOKENS for n in SIZES[3::2] for k in SIZES[3::2] if n % 32 == 0 and k % 64 == 0]
    sparse = (Operator("gemm_2to4", dtype, m=m, n=n, k=k) for m, n, k in _spread(aligned, rng))
    prefill = (
        Operator("attention_prefill", dtype, q_len=call["kv_len"], cold=False, **call)
        for call in _calls(BATCHES[:4], rng, kernels_apart)
    )
    decode = (Operator("attention_decode", dtype, q_len=1, **call) for call in _calls(BATCHES, rng, kernels_apart))
    spots = [
        _spread([(m, n) for m in TOKENS[::3] for n in (SELECTED if role == "select" else SIZES[4::4])], rng)
        for role in ELEMENTWISE
    ]
    elementwise = (
        Operator("elementwise", dtype, m=m, n=n, role=role, cold=False)
        for turn in zip_longest(*spots)
        for role, (m, n) in zip(ELEMENTWISE, (spot or (0, 0) for spot in turn), strict=True)
        if m
    )
    streams = {"runtime": _runtime(dtype), "gemm_2to4": sparse, "attention_prefill": prefill}
    return streams | {"attention_decode": decode, "elementwise": elementwise, "pruned": _pruned(dtype, rng)}


def _calls(batches: Sequence[int], rng: np.random.Generator, apart: bool) -> list[dict[str, Any]]:
    """Return shapes of attention calls. With ``apart``, head widths take turns that have enough calls for a fit."""
    every = [(b, s, *heads) for b in batches for s in LENGTHS for heads in HEADS]
    pools = [[call for call in every if call[-1] == width] for width in sorted({heads[-1] for heads in HEADS})]
    orders = [_spread(pool, rng) for pool in (pools if apart else [every])]
    turns = range(0, max(map(len, orders)), _WIDTH_ROWS)
    calls = (call for start in turns for order in orders for call in order[start : start + _WIDTH_ROWS])
    return [dict(zip(("batch", "kv_len", "heads", "kv_heads", "head_dim"), call, strict=True)) for call in calls]


def _runtime(dtype: str) -> list[Operator]:
    kinds = [(kind, role) for kind in ("launch_eager", "launch_graph") for role in ("", "gemm")]
    launches = [Operator(kind, dtype, role=role, cold=False) for kind, role in kinds]
    copies = [Operator("copy", dtype, n=1 << power) for power in (28, 22, 25, 30, 18)]
    return [*layers(dtype, LAYER_LENGTHS[1::3]), *launches, *copies]


def layers(dtype: str, lengths: Iterable[int]) -> list[Operator]:
    return [Operator("layer_eager", dtype, kv_len=length, cold=False) for length in lengths]


def host_operators(dtype: str) -> list[Operator]:
    return [Operator("launch_eager", dtype, cold=False), *layers(dtype, LAYER_LENGTHS)]


def _pruned(dtype: str, rng: np.random.Generator) -> Iterable[Operator]:
    """Yield operators that check predictions of sums of plain kernels."""
    pairs = _spread([(m, n, k) for m in TOKENS[::4] for n in SIZES[5:28:3] for k in SIZES[5:28:3]], rng)
    lengths = _spread([(s, h) for s in LENGTHS[3:13] for h in (8, 16, 32)], rng)
    for turn, (m, n, k) in enumerate(pairs):
        density = (0.75, 0.5)[turn // 3 % 2]
        if turn % 3 == 0:
            rank = max(16, 16 * round(density * n * k / (n + k) / 16))
            yield Operator("low_rank", dtype, m=m, n=n, k=k, rank=rank)
        elif turn % 3 == 1:
            yield Operator("gather_gemm", dtype, m=m, n=n, k=k, rows=max(1, round(density * m)))
            role, size = ("up", n) if turn // 3 % 4 < 2 else ("down", k)
            yield Operator("grouped_gemm", dtype, m=m, n=n, k=k, block=size // 32, density=density, role=role)
        elif turn // 3 < len(lengths):
            length, h = lengths[turn // 3]
            heads: dict[str, Any] = {"batch": 1, "heads": h, "kv_heads": h // 4, "head_dim": 64}
            sparse: dict[str, Any] = {"block": (64, 16, 128)[turn // 3 % 3], "density": density, "cold": False}
            yield Operator("attention_block_sparse", dtype, q_len=length, kv_len=length, **heads, **sparse)
