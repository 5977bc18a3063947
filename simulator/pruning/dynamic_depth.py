"""Dynamic depth: a router lets some tokens skip a sublayer (Mixture-of-Depths, D-LLM, SkipGPT)."""

from __future__ import annotations

import numpy as np

from simulator.errors import InputError
from simulator.pruning._added import (
    before_sublayer,
    hidden_at,
    insert,
    insertion,
    overhead_gemm,
    overheads,
    stream_bytes,
    sublayer_ends,
)
from simulator.pruning._edits import changed, moved, whole_share
from simulator.pruning._family import SCORE_BYTES, SUBLAYERS, Choice, Family, Pruned, flag, whole
from simulator.pruning._tokens import query_share, split_fused_qkv, split_tokens
from simulator.workload import Kernel, Kind, Workload

KEYS = ("k", "v", "qkv", "kv_a", "qkv_a", "kv_b", "attention_norm", "rotary", "qk_norm", "latent_norm", "cache_write")
"""What makes a token's key and value, on all tokens."""


def dynamic_depth(w: Workload, choice: Choice, *, ideal: bool, prune_kv: bool = False, router: int = 2) -> Pruned:
    """Each attention and MLP sublayer computes an expected share ``1-s`` of the tokens.

    k, v, their rotary and cache writes (and the norm before them) stay dense, so that later tokens find every key; with
    ``prune_kv`` a skipped token leaves no key in that layer, and attention sees ``1-s`` of the positions.

    Tokens of a GEMM: binomial, see ``token_points``; at batch 1 in decode a sublayer runs with probability ``1-s``.
    Prefill attention with dense keys keeps its rows and computes a share ``1-s`` of the query-key pairs (density,
    block-sparse); decode attention has fewer sequences. Cost: a router GEMM (``router`` outputs) over all tokens a
    sublayer, and where there is more than one token a gather before and a scatter after it. Parameters are conserved.
    """
    dense_kv, router = not flag("prune_kv", prune_kv), whole("router", router)
    if any(a.family == "dynamic_depth" and a.realised > 0 for a in w.meta.applied):
        raise InputError("dynamic_depth: tokens are routed already; route once, at the final sparsity")
    w, s = split_fused_qkv(w, choice.rows) if dense_kv else (w, choice.rows)
    keep, routed = 1.0 - s, s > 0
    prefill = w.kind == Kind.PREFILL_ATTENTION
    skips = routed & ~w.overhead & ~prefill
    if dense_kv:
        w = changed(w, prefill & routed, density=w.density * keep, kernel=Kernel.BLOCK_SPARSE)
        w = w.replace(**moved(w, np.where(skips, query_share(w, keep), 1.0)))
        skips &= ~w.is_role(*KEYS)
    else:
        q_len, kv_len = (np.maximum(whole_share(keep, length), 1) for length in (w.q_len, w.kv_len))
        w = changed(w, w.is_attention & routed, q_len=q_len, kv_len=kv_len)
    keep = np.where(skips, keep, 1.0)
    if ideal:
        return split_tokens(w, keep), choice.asked
    # overheads stand where they run: router and gather before the sublayer, scatter after it
    ends = np.flatnonzero(sublayer_ends(w) & routed)
    first, several = before_sublayer(w, ends), w.m[ends] > 1
    at = ends[several]
    m, hidden = w.m[at], hidden_at(w, at)
    size = m * hidden * stream_bytes(w, at)
    traffic = {"m": m, "n": hidden, "read_bytes": size + SCORE_BYTES * m, "write_bytes": size}
    gather, scatter = (overheads(w, at, role, **traffic) for role in ("gather", "scatter"))
    route = overhead_gemm(w, ends, "router", router, hidden_at(w, ends))
    parts = [(first, route), (first[several], gather), (at + 0.5, scatter)]
    keep = np.concatenate([keep, np.ones(len(ends)), 1.0 - s[at], 1.0 - s[at]])
    return split_tokens(insert(w, parts), keep[insertion(w, parts)]), choice.asked


FAMILY = Family(
    function=dynamic_depth, axis="dynamic M", dynamic=True, order=7,
    summary="each sublayer computes a share of the tokens; k and v stay dense (prune_kv=True prunes them)",
    cost="a router GEMM, a gather and a scatter a sublayer; at batch 1 in decode all or nothing",
    realised="expected share of token-sublayer pairs skipped",
    targets=SUBLAYERS,
)  # fmt: skip
