"""Reduce tokens: random numbers of tokens per row, queries separate from keys, and prompts in the cache."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from simulator.arrays import Array
from simulator.codes import Kind, role_code
from simulator.errors import InputError
from simulator.pruning._edits import changed, doubled
from simulator.pruning._rows import covering, layer_count
from simulator.workload import Workload

EXACT_TOKENS = 16
"""Up to this number of tokens, every outcome of the binomial distribution has its own row."""

CAPACITY_TOKENS = 512
"""From this number of tokens, the computed number is the mean, as in capacity-based routers; its sd is below 5 %."""

BINS = 5
"""Number of equally likely bins that approximate the binomial distribution between these two numbers."""


@lru_cache(maxsize=4096)
def token_points(tokens: int, keep: float) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return possible numbers of computed tokens, without 0, and their probabilities; each is kept with ``keep``.

    The expected number is exactly ``tokens * keep``. Up to :data:`EXACT_TOKENS` the distribution is binomial. Beyond,
    it has the means of :data:`BINS` bins, each divided between the two nearest whole numbers. From
    :data:`CAPACITY_TOKENS` it is the mean alone.
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
            means, weights = _binned(tokens, keep)
        low = np.floor(means)
        both = np.concatenate([low, low + 1]).astype(np.int64)
        many, inverse = np.unique(both, return_inverse=True)
        shares = np.concatenate([weights * (low + 1 - means), weights * (means - low)])
        chance = np.bincount(inverse.reshape(-1), weights=shares)
    kept = (many > 0) & (chance > 0)
    return tuple(int(j) for j in many[kept]), tuple(float(c) for c in chance[kept])


def _binned(tokens: int, keep: float) -> tuple[Array, Array]:
    """Return means and weights of the bins of a binomial distribution."""
    outcome = np.arange(tokens + 1)
    factorial = np.array([math.lgamma(j + 1) for j in range(tokens + 1)])
    choose = factorial[-1] - factorial - factorial[::-1]
    mass = np.exp(choose + outcome * math.log(keep) + (tokens - outcome) * math.log1p(-keep))
    mass /= mass.sum()
    which = np.minimum((np.cumsum(mass) - mass / 2) * BINS, BINS - 1).astype(np.int64)
    weights = np.bincount(which, weights=mass, minlength=BINS)
    used = weights > 0
    means = np.bincount(which, weights=mass * outcome, minlength=BINS)[used] / weights[used]
    weights = weights[used]
    means *= tokens * keep / (means @ weights)  # exact mean, without rounding errors
    return np.minimum(means, tokens), weights


def split_tokens(w: Workload, keep: Array) -> Workload:
    """Split rows with ``keep < 1`` into one row per possible number of tokens, counted by its probability.

    Tokens are ``m``, in decode attention ``batch``. Bytes of elementwise and collective rows scale with them.
    Parameters are conserved.
    """
    tokens, chosen = tokens_of(w), np.flatnonzero(keep < 1.0)
    if not len(chosen):
        return w
    pairs, inverse = np.unique(np.stack([tokens[chosen].astype(np.float64), keep[chosen]]), axis=1, return_inverse=True)
    inverse = inverse.reshape(-1)
    points = [token_points(int(t), float(p)) for t, p in pairs.T]
    times, conserve = np.ones(len(w), dtype=np.int64), np.ones(len(w))
    times[chosen] = np.array([len(many) for many, _ in points])[inverse]
    conserve[chosen] = np.array([1.0 / sum(chance) for _, chance in points])[inverse]
    index = np.repeat(np.arange(len(w)), times)
    out, own, split = w.take(index), tokens[index], (keep < 1.0)[index]
    many, chance = own.astype(np.float64), np.ones(len(out))
    both = [np.array(pair) for pair in points]
    many[split], chance[split] = np.concatenate([both[pair] for pair in inverse.tolist()], axis=1)
    share = many / np.maximum(own, 1)
    return out.replace(
        count=out.count * chance,
        m=np.where(out.m > 0, many, out.m),
        batch=np.where(out.kind == Kind.DECODE_ATTENTION, many, out.batch),
        read_bytes=out.read_bytes * share,
        write_bytes=out.write_bytes * share,
        params=out.params * conserve[index],
    )


def tokens_of(w: Workload) -> Array:
    """Return the tokens of every row: ``m``, in decode attention ``batch``."""
    return np.where(w.kind == Kind.DECODE_ATTENTION, w.batch, w.m)


def split_fused_qkv(w: Workload, s: Array) -> tuple[Workload, Array]:
    """Split fused qkv projections with sparsity ``s > 0`` into queries and the rest; return the rows' sparsity too."""
    keys = covering(w, w.is_attention, w.kv_heads * w.head_dim)
    fused = (s > 0) & w.is_role("qkv") & (w.stage != 1) & (w.n != 2 * keys)  # not split before
    if not fused.any():
        return w, s
    if (w.stage[fused] == 2).any():
        reason = "queries of a low-rank fused qkv projection cannot be computed separately"
        raise InputError(f"{reason}; choose an engine that does not fuse them, such as hf")
    out, index, first, rest = doubled(w, fused)
    n = np.where(first, out.n - 2 * keys[index], 2 * keys[index])  # queries, and the gate of the outputs if any
    out = changed(out, first | rest, n=n, params=out.params * (n / np.maximum(out.n, 1)))
    return changed(out, first, role=role_code("q")[0]), s[index]


def query_share(w: Workload, keep: Array) -> Array:
    """Return the share of rotary and query-key norm left if ``keep`` of the queries and all keys stay; else 1."""
    heads, groups = (covering(w, w.is_attention, heads) for heads in (w.heads, w.kv_heads))
    share: Array = (heads * keep + groups) / np.maximum(heads + groups, 1)
    return np.where(w.is_role("rotary", "qk_norm") & (w.layer >= 0), share, 1.0)


def prompt_of(w: Workload) -> Array:
    """Return the prompt positions in the cache of every row's layer, as decode (or prefill) sees them; else 0."""
    none = np.iinfo(np.int64).max
    out = np.full(layer_count(w) + 1, none)
    decodes = bool((w.kind == Kind.DECODE_ATTENTION).any())
    rows = w.take(w.kind == (Kind.DECODE_ATTENTION if decodes else Kind.PREFILL_ATTENTION))
    # a decode step also attends to its own position
    grown = (w.meta.new_tokens + 1) // 2 if w.meta.phase == "serve" else 1
    length = rows.kv_len - (grown if decodes else 0)
    for first, many in sorted(set(zip(rows.layer.tolist(), rows.layers.tolist()))):
        run, lengths = slice(first, first + many), length[(rows.layer == first) & (rows.layers == many)]
        # the first decode step, or the last chunk of the prompt
        out[run] = np.minimum(out[run], lengths.min() if decodes else lengths.max())
    out[out == none] = 0
    prompt: Array = np.where(w.layer >= 0, out[np.maximum(w.layer, 0)], 0)
    return prompt
