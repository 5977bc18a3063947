"""Fewer tokens: rows on a random number of their tokens, queries apart from keys, and prompts in the cache."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from simulator.columns import Array
from simulator.errors import InputError
from simulator.pruning._common import F, attention_rows, covering, has_role, layer_count
from simulator.workload import Kind, Workload, role_code

EXACT_TOKENS = 16
"""Up to so many tokens every outcome of a binomial is a row of its own."""

CAPACITY_TOKENS = 512
"""From so many tokens on the number computed is taken as fixed, as capacity-based routers fix it; its spread is below 5 %."""

BINS = 5
"""Equally likely bins that stand for a binomial between the two."""


@lru_cache(maxsize=4096)
def token_points(tokens: int, keep: float) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """How many of ``tokens`` are computed when each is with probability ``keep``, and how likely; none computed is left out.

    The expected number is exactly ``tokens * keep``. Up to :data:`EXACT_TOKENS` this is the binomial distribution; then the means of
    :data:`BINS` bins of it, each shared between the two whole numbers around it; from :data:`CAPACITY_TOKENS` the mean alone.

    >>> token_points(1, 0.75)
    ((1,), (0.75,))
    >>> points, likely = token_points(64, 0.9)
    >>> len(points), round(sum(m * p for m, p in zip(points, likely)), 9)
    (8, 57.6)
    """
    if tokens <= 0 or keep >= 1.0:
        return (tokens,), (1.0,)
    if tokens <= EXACT_TOKENS:
        many = np.arange(tokens + 1)
        chance = np.array([math.comb(tokens, j) * keep**j * (1.0 - keep) ** (tokens - j) for j in range(tokens + 1)])
    else:
        if tokens >= CAPACITY_TOKENS:
            means, weights = np.array([tokens * keep]), np.array([1.0])
        else:
            outcome = np.arange(tokens + 1)
            choose = np.array(
                [math.lgamma(tokens + 1) - math.lgamma(j + 1) - math.lgamma(tokens - j + 1) for j in range(tokens + 1)]
            )
            mass = np.exp(choose + outcome * math.log(keep) + (tokens - outcome) * math.log1p(-keep))
            mass /= mass.sum()
            which = np.minimum((np.cumsum(mass) - mass / 2) * BINS, BINS - 1).astype(np.int64)
            weights = np.bincount(which, weights=mass, minlength=BINS)
            used = weights > 0
            means = np.bincount(which, weights=mass * outcome, minlength=BINS)[used] / weights[used]
            weights = weights[used]
            means = np.minimum(
                means * (tokens * keep / (means @ weights)), tokens
            )  # undoes the rounding of the sums above
        low = np.floor(means)
        many = np.concatenate([low, low + 1]).astype(np.int64)
        chance = np.concatenate([weights * (low + 1 - means), weights * (means - low)])
        many, inverse = np.unique(many, return_inverse=True)
        chance = np.bincount(inverse.reshape(-1), weights=chance)
    kept = (many > 0) & (chance > 0)
    return tuple(int(j) for j in many[kept]), tuple(float(c) for c in chance[kept])


def split_tokens(w: Workload, mask: Array, keep: F) -> Workload:
    """Masked rows on a random number of their tokens: one row a possible number, counted as often as it is expected.

    Tokens are ``m`` (``batch`` for decode attention); bytes of elementwise and collective rows follow; parameters are conserved.
    """
    tokens = tokens_of(w)
    chosen = np.flatnonzero(mask & (keep < 1.0))
    if not len(chosen):
        return w
    pairs, inverse = np.unique(np.stack([tokens[chosen].astype(np.float64), keep[chosen]]), axis=1, return_inverse=True)
    points = [token_points(int(t), float(p)) for t, p in pairs.T]
    length = np.array([len(many) for many, _ in points])
    many_table = np.concatenate([np.array(many, dtype=np.int64) for many, _ in points])
    chance_table = np.concatenate([np.array(chance) for _, chance in points])
    conserve = np.array([1.0 / sum(chance) for _, chance in points])
    inverse = inverse.reshape(-1)
    times = np.ones(len(w), dtype=np.int64)
    times[chosen] = length[inverse]
    begin = np.zeros(len(w), dtype=np.int64)
    begin[chosen] = (np.cumsum(length) - length)[inverse]
    index = np.repeat(np.arange(len(w)), times)
    which = begin[index] + np.arange(len(index)) - np.repeat(np.cumsum(times) - times, times)
    split = np.zeros(len(w), dtype=bool)
    split[chosen] = True
    split = split[index]
    scale = np.ones(len(w))
    scale[chosen] = conserve[inverse]
    out = w.take(index)
    many = np.where(split, many_table[which], tokens[index])
    share = many / np.maximum(tokens[index], 1)
    decode = out.kind == Kind.DECODE_ATTENTION
    return out.replace(
        count=out.count * np.where(split, chance_table[which], 1.0),
        m=np.where(split & (out.m > 0), many, out.m),
        batch=np.where(split & decode, many, out.batch),
        read_bytes=out.read_bytes * share,
        write_bytes=out.write_bytes * share,
        params=out.params * scale[index],
    )


def tokens_of(w: Workload) -> Array:
    """Tokens of every row: ``m``, or ``batch`` for decode attention."""
    out: Array = np.where(w.kind == Kind.DECODE_ATTENTION, w.batch, w.m)
    return out


def split_fused_qkv(w: Workload, s: F) -> tuple[Workload, F]:
    """Fused q, k, v projections of sparsity ``s > 0`` as two GEMMs, queries and the rest, for methods that treat them differently."""
    attention = attention_rows(w)
    queries, keys = covering(w, attention, w.heads * w.head_dim), covering(w, attention, w.kv_heads * w.head_dim)
    fused = (s > 0) & has_role(w, "qkv") & (w.stage != 1) & (w.n != 2 * keys)  # not split before
    if not fused.any():
        return w, s
    if (w.stage[fused] == 2).any():
        raise InputError(
            "the queries of a low-rank fused qkv projection cannot be computed alone; lower with fuse_qkv=False"
        )
    times = np.where(fused, 2, 1)
    index = np.repeat(np.arange(len(w)), times)
    first = np.r_[True, index[1:] != index[:-1]]
    out, two = w.take(index), fused[index]
    n = np.where(two, np.where(first, queries[index], out.n - queries[index]), out.n)
    role = np.where(two & first, role_code("q")[0], out.role)
    params = np.where(two, out.params * (n / np.maximum(out.n, 1)), out.params)
    return out.replace(n=n, role=role, params=params), s[index]


def query_share(w: Workload, keep: F) -> F:
    """Share of rotary (or query-key norm) left when ``keep`` of the query work is and all of the keys'."""
    attention = attention_rows(w)
    heads, groups = covering(w, attention, w.heads), covering(w, attention, w.kv_heads)
    share: F = (heads * keep + groups) / np.maximum(heads + groups, 1)
    return share


def prompt_of(w: Workload) -> Array:
    """Prompt positions in the cache of every layer row's layer, as its decodes (or its prefill) see them; int64, 0 outside."""
    none = np.iinfo(np.int64).max
    out = np.full(layer_count(w) + 1, none)
    decode = w.kind == Kind.DECODE_ATTENTION
    rows = np.flatnonzero(decode if decode.any() else w.kind == Kind.PREFILL_ATTENTION)
    length = w.kv_len[rows] - (1 if decode.any() else 0)  # a decode attends to its own position too
    span = (w.layer[rows].astype(np.int64) << 32) | w.layers[rows]
    for code in np.unique(span):
        run = slice(code >> 32, (code >> 32) + (code & 0xFFFFFFFF))
        out[run] = np.minimum(out[run], length[span == code].min())
    out[out == none] = 0
    prompt: Array = np.where(w.layer >= 0, out[np.maximum(w.layer, 0)], 0)
    return prompt
