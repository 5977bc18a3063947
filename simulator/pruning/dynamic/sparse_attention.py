"""Sparse attention: compute only some blocks of queries and keys (MInference, FlexPrefill,
Quest)."""

from __future__ import annotations

from typing import Any

import numpy as np

from simulator.arrays import Array
from simulator.codes import DTYPE_BYTES, Kernel, Kind
from simulator.operators.attention import attention_pairs
from simulator.pruning._family import SCORE_BYTES, Choice, Family, one_of, whole
from simulator.pruning.dynamic.rows import changed, insert, overheads
from simulator.workload import Workload


def sparse_attention(
    w: Workload, choice: Choice, *, ideal: bool, block: int = 64, budget: Any = None
) -> tuple[Workload, float]:
    """Compute a share ``1-s`` of the q-k blocks of edge ``block``; in decode, read that share of
    the cache's blocks.

    With ``budget``, each query sees at most that many keys. Prefill pools queries and keys by block
    and scores them (``mask``); decode scores two bounds of the keys in every cached block. Then
    blocks are selected (``select``)."""
    one_of("block", block, (16, 64, 128))
    s, realised = (
        (choice.rows(w), choice.asked) if budget is None else beyond(w, whole("budget", budget))
    )
    out = skip_keys(w, s, block)
    at = np.flatnonzero(w.is_attention & (s > 0))
    if ideal or not len(at):
        return out, realised if len(at) else 0.0
    x = w.take(at)
    prefill = x.kind == Kind.PREFILL_ATTENTION
    tiles, blocks = np.where(prefill, np.ceil(x.q_len / block), 1.0), np.ceil(x.keys_seen / block)
    queries = x.batch * x.q_len * x.heads * x.head_dim * DTYPE_BYTES[x.dtype]
    keys = x.batch * x.kv_heads * x.head_dim * DTYPE_BYTES[x.weight_dtype]
    # prefill pools all keys; decode reads two bounds per cached block
    read, tiles = (
        queries + keys * np.where(prefill, x.keys_seen, 2.0 * blocks),
        x.batch * x.heads * tiles,
    )
    scores = tiles * blocks * SCORE_BYTES
    mask = overheads(
        w, at, "mask", m=x.batch * x.q_len, n=blocks, read_bytes=read, write_bytes=scores
    )
    chosen = scores * (1.0 - s[at])
    select = overheads(w, at, "select", m=tiles, n=blocks, read_bytes=scores, write_bytes=chosen)
    return insert(out, [(at - 0.5, mask), (at - 0.5, select)]), realised


def skip_keys(w: Workload, s: Array, block: int) -> Workload:
    """Return the workload whose attention skips a share ``s`` (by row) of its blocks of keys."""
    rows = w.is_attention & (s > 0)
    return changed(w, rows, density=w.density * (1.0 - s), block=block, kernel=Kernel.BLOCK_SPARSE)


def beyond(w: Workload, budget: Array | int) -> tuple[Array, float]:
    """Return the share of q-k pairs beyond ``budget`` keys per query, of each row and of all
    rows."""
    most = np.where(w.limit > 0, np.minimum(w.limit, budget), budget)
    # entries of a compressed cache are few already
    pairs = np.where(w.is_attention & (w.n == 0), w.pairs, 0.0)
    share = np.where(
        pairs > 0, 1.0 - attention_pairs(w.q_len, w.kv_len, most) / np.maximum(pairs, 1.0), 0.0
    )
    weight = pairs * w.batch * w.heads * w.count
    return share, float(weight @ share / weight.sum()) if weight.any() else 0.0


FAMILY = Family(
    function=sparse_attention,
    axis="dynamic N, K of attention",
    loading="kernels",
    parts={},
    order=9,
    summary=(
        "computes a share of the q-k blocks (16, 64 or 128), or a budget of keys per query; in"
        " decode, reads that share of the cache's blocks"
    ),
)
