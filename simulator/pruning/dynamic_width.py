"""Dynamic width: head groups and channel groups are chosen per token (Deja Vu, Mixture-of-Heads, contextual sparsity)."""

from __future__ import annotations

import numpy as np

from simulator.columns import Array
from simulator.errors import InputError
from simulator.pruning._common import (
    SCORE_BYTES,
    SUBLAYERS,
    Choice,
    F,
    Family,
    aligned,
    attention_rows,
    covering,
    has_role,
    insert,
    one_of,
    overheads,
    owns_parameters,
    projections,
    stream_dtype,
    sublayer_ends,
    sublayer_starts,
    whole,
)
from simulator.pruning._tokens import query_share, split_fused_qkv, tokens_of
from simulator.workload import DTYPE_BYTES, Kernel, Kind, Part, Workload

KERNELS = ("tiles", "grouped", "looped")
"""A kernel that skips tiles; rows gathered for one grouped GEMM; rows gathered for a GEMM a group."""

ALIGN = 16
"""Width of a tensor instruction: the expected width of the groups in use is rounded up to it."""


def dynamic_width(
    w: Workload, choice: Choice, *, ideal: bool, channel_groups: int, kernel: str
) -> tuple[Workload, float]:
    """Each (token, group) tile of q, attention, o, gate, up and down is computed with probability ``1-s``; k and v stay dense.

    A GEMM over M tokens runs sorted by the mask. A group is in use if any token chose it, with probability ``u = 1 - s^M``, and then has
    ``M (1-s) / u`` tokens on average: the row becomes that many tokens (rounded up) by ``u`` of the width (rounded up to 16), block-sparse,
    its density such that the FLOPs are those of the tiles. So a prefill loses rows and reads all weights, a decode at batch 1 keeps its
    row and reads ``1-s`` of them. Attention computes (decode: reads) a share ``1-s`` of its head groups.
    Cost: a router a sublayer (KV groups, or ``channel_groups``, outputs) and the sorting of its mask. Without a kernel that skips tiles
    (``kernel``: "grouped" or "looped") a token's hidden state is copied for each of its groups (``gather``), and its groups' partial
    outputs are written and summed (``scatter``); without a grouped GEMM either ("looped") every group in use is a thin GEMM of its own. A
    single token needs none of this. Parameters are conserved. Realised: expected share of (token, group) tiles skipped.
    """
    groups = whole("channel_groups", channel_groups)
    one_of("kernel", kernel, KERNELS)
    w, s = split_fused_qkv(w, choice.rows)
    outer = projections(w, "q", "gate", "up", "gate_up") & (w.stage != 1) & (s > 0)
    inner = projections(w, "o", "down") & (w.stage != 2) & (s > 0)
    tiles = outer | inner
    if np.isin(w.kernel[tiles], (Kernel.SPARSE24, Kernel.UNSTRUCTURED)).any():
        raise InputError(
            "dynamic_width: sparse projections have no kernel that also skips tiles; choose one of the two"
        )
    n, k, m, density = _tiles(w, outer, inner, s)
    keep = 1.0 - s
    attention = attention_rows(w) & (s > 0)
    share = np.ones(len(w))
    queries = has_role(w, "rotary", "qk_norm") & (w.layer >= 0)
    share[queries] = query_share(w, keep)[queries]
    channels = has_role(w, "activation") & (w.layer >= 0)
    share[channels] = keep[channels]
    pruned = w.replace(
        n=n,
        k=k,
        m=m,
        density=np.where(attention, w.density * keep, density),
        kernel=np.where(tiles | attention, Kernel.BLOCK_SPARSE, w.kernel),
        read_bytes=w.read_bytes * share,
        write_bytes=w.write_bytes * share,
    )
    if ideal:
        return pruned, choice.asked
    if kernel == "looped":
        pruned = _looped(w, pruned, outer, tiles & (tokens_of(w) > 1), s, groups)
    return _with_overheads(w, pruned, s, groups, kernel != "tiles"), choice.asked


def _tiles(w: Workload, outer: Array, inner: Array, s: F) -> tuple[Array, Array, Array, Array]:
    """N, K, M and density of tiled GEMMs; others as they are."""
    tiles = outer | inner
    tokens = np.maximum(tokens_of(w), 1).astype(np.float64)
    used = np.where(tiles, -np.expm1(tokens * np.log(np.where(tiles, s, 0.5))), 1.0)  # 1 - s^M
    width = np.where(outer, w.n, w.k)
    kept = np.where(tiles, aligned(width, used, ALIGN), width)
    each = tokens * (1.0 - s) / used
    m = np.where(tiles, np.ceil(each - 1e-9), w.m).astype(np.int64)
    exact = tokens * (1.0 - s) * width / np.maximum(m.astype(np.float64) * kept, 1.0)
    density = np.where(tiles, w.density * exact, w.density)
    return np.where(outer, kept, w.n), np.where(inner, kept, w.k), m, density


def _looped(dense: Workload, pruned: Workload, outer: Array, tiles: Array, s: F, channel_groups: int) -> Workload:
    """Tiled GEMMs of several tokens as one GEMM for each group in use, the FLOPs the same."""
    tokens, width = tokens_of(dense).astype(np.float64), np.where(outer, dense.n, dense.k)
    heads = covering(dense, attention_rows(dense), dense.kv_heads)
    groups = np.minimum(
        np.where(dense.part == Part.ATTENTION, np.maximum(heads, 1), channel_groups), np.maximum(width, 1)
    )
    used = np.where(tiles, groups * -np.expm1(tokens * np.log(np.where(tiles, s, 0.5))), 1.0)
    each = -(-width // groups)
    exact = tokens * (1.0 - s) * width / np.maximum(pruned.m * each * used, 1.0)
    return pruned.replace(
        n=np.where(tiles & outer, each, pruned.n),
        k=np.where(tiles & ~outer, each, pruned.k),
        density=np.where(tiles, dense.density * exact, pruned.density),
        count=pruned.count * used,
        params=pruned.params / used,
    )


def _with_overheads(dense: Workload, pruned: Workload, s: F, channel_groups: int, gathered: bool) -> Workload:
    at = np.flatnonzero(sublayer_ends(dense) & (s > 0))
    heads = covering(dense, attention_rows(dense), dense.kv_heads)[at]
    groups = np.where(dense.part[at] == Part.ATTENTION, np.maximum(heads, 1), channel_groups)
    m, hidden, size = dense.m[at], dense.n[at], DTYPE_BYTES[stream_dtype(dense, at)]
    params = np.where(owns_parameters(dense)[at], groups * hidden.astype(np.float64), 0.0)
    router = overheads(dense, at, "router", Kind.GEMM, m=m, n=groups, k=hidden, params=params)
    chosen = m * groups * (1.0 - s[at])
    sort = overheads(dense, at, "sort", m=m, n=groups, read_bytes=m * groups * size, write_bytes=chosen * SCORE_BYTES)
    place = sublayer_starts(dense, at) - 0.5
    parts = [(place, router), (place, sort)]
    if gathered and (several := m > 1).any():
        rows, pairs = at[several], chosen[several]
        moved, count = pairs * hidden[several] * size[several], np.ceil(pairs).astype(np.int64)
        copied, summed = (
            overheads(dense, rows, role, m=count, n=hidden[several], read_bytes=moved, write_bytes=moved)
            for role in ("gather", "scatter")
        )
        parts += [(place[several], copied), (rows.astype(np.float64) + 0.5, summed)]
    return insert(pruned, parts)


FAMILY = Family(
    name="dynamic_width",
    axis="dynamic N, K",
    dynamic=True,
    order=8,
    function=dynamic_width,
    summary="head groups and channel groups chosen per token; k and v stay dense",
    cost="a router and a sort of its mask a sublayer; a batch uses the union of its tokens' groups; copies where no kernel skips tiles",
    realised="expected share of (token, group) tiles skipped",
    options={"channel_groups": 32, "kernel": "tiles"},
    targets=SUBLAYERS,
)
