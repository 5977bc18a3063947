"""Sparse attention: compute only some blocks of queries and keys (MInference, FlexPrefill, Quest)."""

from __future__ import annotations

import numpy as np

from simulator.pruning._added import insert, overheads
from simulator.pruning._edits import changed
from simulator.pruning._family import SCORE_BYTES, Choice, Family, Pruned, one_of
from simulator.workload import DTYPE_BYTES, Kernel, Kind, Workload


def sparse_attention(w: Workload, choice: Choice, *, ideal: bool, block: int = 64) -> Pruned:
    """Compute a share ``1-s`` of the q-k blocks of edge ``block``; in decode, read that share of the cache's blocks.

    Cost per attention: prefill pools queries and keys by block and scores them (``mask``: it reads Q and K, and writes
    one score per block pair and head); decode scores two bounds of the keys in every cached block. Then blocks are
    selected (``select``). Cache and parameters do not change.
    """
    one_of("block", block, (16, 64, 128))
    rows = w.is_attention & (choice.rows > 0)
    out = changed(w, rows, density=w.density * (1.0 - choice.rows), block=block, kernel=Kernel.BLOCK_SPARSE)
    at = np.flatnonzero(rows)
    if ideal or not len(at):
        return out, choice.asked if len(at) else 0.0
    x = w.take(at)
    prefill = x.kind == Kind.PREFILL_ATTENTION
    tiles, blocks = np.where(prefill, np.ceil(x.q_len / block), 1.0), np.ceil(x.keys_seen / block)
    queries = x.batch * x.q_len * x.heads * x.head_dim * DTYPE_BYTES[x.dtype]
    keys = x.batch * x.kv_heads * x.head_dim * DTYPE_BYTES[x.weight_dtype]
    # prefill pools all keys; decode reads two bounds per cached block
    read, tiles = queries + keys * np.where(prefill, x.keys_seen, 2.0 * blocks), x.batch * x.heads * tiles
    scores = tiles * blocks * SCORE_BYTES
    mask = overheads(w, at, "mask", m=x.batch * x.q_len, n=blocks, read_bytes=read, write_bytes=scores)
    chosen = scores * (1.0 - choice.rows[at])
    select = overheads(w, at, "select", m=tiles, n=blocks, read_bytes=scores, write_bytes=chosen)
    return insert(out, [(at - 0.5, mask), (at - 0.5, select)]), choice.asked


FAMILY = Family(
    function=sparse_attention,
    axis="dynamic N, K of attention",
    dynamic=True,
    order=9,
    summary="computes a share of the q-k blocks (16, 64 or 128); in decode, reads a share of the cache's blocks",
    cost="scoring and selecting blocks; small blocks cost more per pair",
    realised="share of q-k pairs skipped",
)
