"""Sparse attention: only some blocks of queries and keys are computed (MInference, FlexPrefill, Quest)."""

from __future__ import annotations

import numpy as np

from simulator.pruning._common import SCORE_BYTES, Choice, Family, attention_rows, insert, one_of, overheads
from simulator.workload import DTYPE_BYTES, Kernel, Kind, Workload

BLOCKS = (16, 64, 128)


def sparse_attention(w: Workload, choice: Choice, *, ideal: bool, block: int) -> tuple[Workload, float]:
    """A share ``1-s`` of the q-k blocks of edge ``block`` is computed; in decode, of the cache's blocks is read.

    Cost, an attention: prefill pools queries and keys by block and scores the pooled ones (``mask``: reads Q and K, writes a score a block
    pair and head); decode scores two bounds of every cached block's keys. Then blocks are chosen (``select``). Cache and parameters stay.
    Realised: share of the q-k pairs (cache positions) skipped.
    """
    one_of("block", block, BLOCKS)
    rows = attention_rows(w) & (choice.rows > 0)
    out = w.replace(
        density=np.where(rows, w.density * (1.0 - choice.rows), w.density),
        block=np.where(rows, block, w.block),
        kernel=np.where(rows, Kernel.BLOCK_SPARSE, w.kernel),
    )
    if ideal or not rows.any():
        return out, choice.asked if rows.any() else 0.0
    at = np.flatnonzero(rows)
    prefill = w.kind[at] == Kind.PREFILL_ATTENTION
    seen = np.where(w.window[at] > 0, np.minimum(w.kv_len[at], w.q_len[at] + w.window[at] - 1), w.kv_len[at])
    tiles, blocks = np.where(prefill, np.ceil(w.q_len[at] / block), 1.0), np.ceil(seen / block)
    queries = w.batch[at] * w.q_len[at] * w.heads[at] * w.head_dim[at] * DTYPE_BYTES[w.dtype[at]]
    keys = w.batch[at] * w.kv_heads[at] * w.head_dim[at] * DTYPE_BYTES[w.weight_dtype[at]]
    read = queries + keys * np.where(
        prefill, seen, 2.0 * blocks
    )  # all keys are pooled once; a cached block keeps two bounds
    write = w.batch[at] * w.heads[at] * tiles * blocks * SCORE_BYTES
    mask = overheads(
        w, at, "mask", m=w.batch[at] * w.q_len[at], n=blocks.astype(np.int64), read_bytes=read, write_bytes=write
    )
    rows_of_scores = (w.batch[at] * w.heads[at] * tiles).astype(np.int64)
    chosen = write * (1.0 - choice.rows[at])
    select = overheads(
        w, at, "select", m=rows_of_scores, n=blocks.astype(np.int64), read_bytes=write, write_bytes=chosen
    )
    return insert(out, [(at - 0.5, mask), (at - 0.5, select)]), choice.asked


FAMILY = Family(
    name="sparse_attention",
    axis="dynamic N, K of attention",
    dynamic=True,
    order=9,
    together="any",
    function=sparse_attention,
    summary="a share of the q-k blocks (16, 64 or 128) computed; in decode, of the cache's blocks read",
    cost="scoring and choosing the blocks; small blocks cost more a pair",
    realised="share of q-k pairs skipped",
    options={"block": 64},
)
