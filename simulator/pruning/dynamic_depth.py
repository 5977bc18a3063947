"""Dynamic depth: a router lets some tokens skip a sublayer (Mixture-of-Depths, D-LLM, SkipGPT)."""

from __future__ import annotations

from typing import Any

import numpy as np

from simulator.errors import InputError
from simulator.pruning._common import (
    SCORE_BYTES,
    SUBLAYERS,
    Choice,
    Family,
    flag,
    has_role,
    insert,
    overheads,
    owns_parameters,
    part_rows,
    stream_dtype,
    sublayer_ends,
    sublayer_starts,
    whole,
    whole_share,
)
from simulator.pruning._tokens import query_share, split_fused_qkv, split_tokens
from simulator.workload import DTYPE_BYTES, Kernel, Kind, Part, Workload


def dynamic_depth(w: Workload, choice: Choice, *, ideal: bool, prune_kv: bool, router: int) -> tuple[Workload, float]:
    """Each attention and MLP sublayer computes an expected share ``1-s`` of the tokens.

    k, v, their rotary and cache writes (and the norm before them) stay dense, so that later tokens find every key; with ``prune_kv``
    a skipped token leaves no key in that layer, and attention sees ``1-s`` of the positions.

    Tokens of a GEMM: binomial, see ``token_points``; at batch 1 in decode a sublayer runs with probability ``1-s``. Prefill attention
    with dense keys keeps its rows and computes a share ``1-s`` of the query-key pairs (density, block-sparse); decode attention has fewer
    sequences. Cost: a router GEMM (``router`` outputs) over all tokens a sublayer, and where there is more than one token a gather before
    and a scatter after it. Parameters are conserved. Realised: expected share of token-sublayer pairs skipped.
    """
    dense_kv, router = not flag("prune_kv", prune_kv), whole("router", router)
    if any(a.family == "dynamic_depth" and a.realised > 0 for a in w.meta.applied):
        raise InputError("dynamic_depth: tokens are routed already; route once, at the final sparsity")
    s = choice.rows
    if dense_kv:
        w, s = split_fused_qkv(w, s)
    keep = 1.0 - s
    base, ends = w, np.flatnonzero(sublayer_ends(w) & (s > 0))
    prefill, decode = w.kind == Kind.PREFILL_ATTENTION, w.kind == Kind.DECODE_ATTENTION
    skips = (part_rows(w, Part.ATTENTION) | part_rows(w, Part.MLP)) & (s > 0) & ~w.overhead & ~prefill
    if dense_kv:
        partly = skips & has_role(w, "rotary", "qk_norm")
        share = np.where(partly, query_share(w, keep), 1.0)
        w = w.replace(
            read_bytes=w.read_bytes * share,
            write_bytes=w.write_bytes * share,
            density=np.where(prefill, w.density * keep, w.density),
            kernel=np.where(prefill & (s > 0), Kernel.BLOCK_SPARSE, w.kernel),
        )
        skips &= ~partly & ~has_role(w, "k", "v", "qkv", "attention_norm", "cache_write")
    else:
        attention = (prefill | decode) & (s > 0)
        w = w.replace(
            q_len=np.where(attention & prefill, np.maximum(whole_share(keep, w.q_len), 1), w.q_len),
            kv_len=np.where(attention, np.maximum(whole_share(keep, w.kv_len), 1), w.kv_len),
        )
    if ideal:
        return split_tokens(w, skips, keep), choice.asked
    # overheads stand where they run: router and gather before the sublayer, scatter after it
    m, hidden, size = base.m[ends], base.n[ends], DTYPE_BYTES[stream_dtype(base, ends)]
    starts = sublayer_starts(base, ends)
    moved = m * hidden * size
    route = overheads(
        base,
        ends,
        "router",
        Kind.GEMM,
        m=m,
        n=router,
        k=hidden,
        params=np.where(owns_parameters(base)[ends], float(router) * hidden, 0.0),
    )
    several = m > 1
    at = ends[several]
    read = (moved + SCORE_BYTES * m)[several]
    move: dict[str, Any] = {"m": m[several], "n": hidden[several], "read_bytes": read, "write_bytes": moved[several]}
    gather, scatter = (overheads(base, at, role, **move) for role in ("gather", "scatter"))
    first = starts - 0.5
    joined = insert(w, [(first, route), (first[several], gather), (at + 0.5, scatter)])
    masks = [skips, np.zeros(len(ends), bool), several[several], several[several]]
    keeps = [keep, np.ones(len(ends)), keep[at], keep[at]]
    place = np.concatenate([np.arange(len(w), dtype=np.float64), first, first[several], at + 0.5])
    order = np.argsort(place, kind="stable")
    return split_tokens(joined, np.concatenate(masks)[order], np.concatenate(keeps)[order]), choice.asked


FAMILY = Family(
    name="dynamic_depth",
    axis="dynamic M",
    dynamic=True,
    order=7,
    together="any",
    function=dynamic_depth,
    summary="each sublayer computes a share of the tokens; k and v stay dense (prune_kv=True prunes them)",
    cost="a router GEMM, a gather and a scatter a sublayer; at batch 1 in decode all or nothing",
    realised="expected share of token-sublayer pairs skipped",
    options={"prune_kv": False, "router": 2},
    targets=SUBLAYERS,
)
