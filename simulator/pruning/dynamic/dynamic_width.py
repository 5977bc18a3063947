"""Dynamic width: choose head and channel groups per token (Deja Vu, Mixture-of-Heads, contextual
sparsity)."""

from __future__ import annotations

import numpy as np

from simulator.arrays import Array
from simulator.codes import Kernel, Part
from simulator.errors import InputError
from simulator.pruning._family import SCORE_BYTES, SUBLAYERS, Choice, Family, one_of, whole
from simulator.pruning.dynamic import rows as _rows
from simulator.workload import Workload

# GEMMs that skip tiles of tokens sorted by their masks; rows gathered for one grouped GEMM; a
# gather, a GEMM and a scatter per group in use; GEMMs of the same shapes without added work
KERNELS = ("reference", "gathered", "looped", "ideal")
# kernels from a mask to skipped tiles: order, gather, marks of tiles. They take 11 of the 22 us of
# a kernel of the benchmark at 1024^3 on an RTX 5090
SORT = 3
# width of a tensor instruction, to which the expected width of the groups in use is rounded up
ALIGN = 16


def dynamic_width(
    w: Workload, choice: Choice, *, ideal: bool, channel_groups: int = 32, kernel: str = "reference"
) -> tuple[Workload, float]:
    """Compute each (token, group) tile of q, attention, o, gate, up and down with probability
    ``1-s``; keep k and v.

    A group is in use if any of M tokens chose it, with probability ``u = 1 - s^M``; it then has ``M
    (1-s) / u`` tokens on average. The row becomes that number of tokens (rounded up) times ``u`` of
    the width (rounded up to 16), with the density that preserves the FLOPs of the tiles. Attention
    computes (in decode: reads) a share ``1-s`` of its groups.

    A router has an output per KV group, or ``channel_groups`` outputs. The kernels "gathered" and
    "looped" copy the hidden state of a token for each of its groups (``gather``) and add partial
    outputs (``scatter``)."""
    channel_groups = whole("channel_groups", channel_groups)
    ideal |= one_of("kernel", kernel, KERNELS) == "ideal"
    w, s = _rows.split_fused_qkv(w, choice.rows(w))
    outer = _rows.writers(w, "q", "gate", "up", "gate_up") & (s > 0)
    tiles = outer | (_rows.readers(w, "o", "down") & (s > 0))
    if np.isin(w.kernel[tiles], (Kernel.SPARSE24, Kernel.UNSTRUCTURED)).any():
        expected = "expected dense projections, as no kernel skips both zeros and tiles"
        raise InputError(f"dynamic_width: {expected}, got sparse ones")
    heads = _rows.covering(w, w.is_attention, w.kv_heads)
    groups = np.where(w.part == Part.ATTENTION, np.maximum(heads, 1), channel_groups)
    channels = w.is_role("activation", "quantize_heads", "quantize_inner") & (w.layer >= 0)
    # 1 - s^M
    chance = -np.expm1(np.maximum(_rows.tokens_of(w), 1) * np.log(np.where(tiles, s, 0.5)))
    used = np.where(tiles, chance, 1.0)
    pruned = _tiled(w, outer, tiles, s, used)
    attention = w.is_attention & (s > 0)
    pruned = _rows.changed(
        pruned, attention, kernel=Kernel.BLOCK_SPARSE, density=w.density * (1.0 - s)
    )
    if kernel == "reference" and not ideal:
        edge = np.maximum(np.where(outer, w.n, w.k) // groups, 1)
        pruned = _rows.changed(pruned, outer, kernel=Kernel.GROUPS_N, block=edge)
        pruned = _rows.changed(pruned, tiles & ~outer, kernel=Kernel.GROUPS_K, block=edge)
    pruned = pruned.replace(
        **_rows.moved(w, np.where(channels, 1.0 - s, _rows.query_share(w, 1.0 - s)))
    )
    if ideal:
        return pruned, choice.asked
    if kernel == "looped":
        pruned = _looped(w, pruned, outer, tiles & (_rows.tokens_of(w) > 1), s, used, groups)
    loops = np.where(kernel == "looped", groups * (1.0 - s ** np.maximum(w.m, 1)), 1.0)
    return _with_overheads(w, pruned, s, groups, loops, kernel != "reference"), choice.asked


def _tiled(w: Workload, outer: Array, tiles: Array, s: Array, used: Array) -> Workload:
    """Return tiled GEMMs over the tokens of a group in use and the width of all groups in use."""
    width, tokens = np.where(outer, w.n, w.k), np.maximum(_rows.tokens_of(w), 1).astype(np.float64)
    kept, m = _rows.aligned(width, used, ALIGN), np.ceil(tokens * (1.0 - s) / used - 1e-9)
    # rounding can exceed 1
    exact = np.minimum(tokens * (1.0 - s) * width / np.maximum(m * kept, 1.0), 1.0)
    w = _rows.changed(w, tiles, m=m, density=w.density * exact)
    return _rows.changed(_rows.changed(w, outer, n=kept), tiles & ~outer, k=kept)


def _looped(
    w: Workload, tiled: Workload, outer: Array, tiles: Array, s: Array, used: Array, groups: Array
) -> Workload:
    """Return tiled GEMMs of several tokens as one GEMM per group in use, with the same FLOPs."""
    width = np.where(outer, w.n, w.k)
    groups = np.minimum(groups, np.maximum(width, 1))
    many, each = np.where(tiles, groups * used, 1.0), -(-width // groups)
    computed = np.maximum(tiled.m * each * many, 1.0)
    exact = np.minimum(_rows.tokens_of(w).astype(np.float64) * (1.0 - s) * width / computed, 1.0)
    tiled = tiled.replace(count=tiled.count * many, params=tiled.params / many)
    tiled = _rows.changed(tiled, tiles, density=w.density * exact)
    return _rows.changed(_rows.changed(tiled, tiles & outer, n=each), tiles & ~outer, k=each)


def _with_overheads(
    w: Workload, pruned: Workload, s: Array, groups: Array, loops: Array, copies: bool
) -> Workload:
    """Insert router and sorting before each sublayer; with ``copies``, one gather and scatter per
    loop."""
    at = np.flatnonzero(_rows.sublayer_ends(w) & (s > 0))
    m, hidden, size, outputs = w.m[at], w.n[at], _rows.stream_bytes(w, at), groups[at]
    scores, chosen, place = m * outputs, m * outputs * (1.0 - s[at]), _rows.before_sublayer(w, at)
    sort = _rows.overheads(
        w, at, "sort", m=m, n=outputs, read_bytes=scores * size, write_bytes=chosen * SCORE_BYTES
    )
    sort = sort.replace(count=sort.count * (1 if copies else SORT))
    parts = [(place, _rows.overhead_gemm(w, at, "router", outputs, hidden)), (place, sort)]
    if copies:
        several = m > 1
        rows, n, many = at[several], hidden[several], loops[at][several]
        pairs = chosen[several] / many  # per loop
        moved_bytes, columns = (
            pairs * n * size[several],
            {"m": np.ceil(pairs), "n": n, "count": many * w.count[rows]},
        )
        copied = _rows.overheads(
            w, rows, "gather", read_bytes=moved_bytes, write_bytes=moved_bytes, **columns
        )
        # atomics read both operands of the addition, at three quarters of the bandwidth
        summed = _rows.overheads(
            w, rows, "scatter", read_bytes=3.0 * moved_bytes, write_bytes=moved_bytes, **columns
        )
        parts += [(place[several], copied), (rows + 0.5, summed)]
        if (many > 1.0).any():
            index = pairs * SCORE_BYTES
            found = _rows.overheads(
                w, rows, "select", read_bytes=m[several] * 1.0, write_bytes=index, **columns
            )
            parts.append((place[several], found))
    return _rows.insert(pruned, parts)


FAMILY = Family(
    function=dynamic_width,
    axis="dynamic N, K",
    loading="kernels",
    parts=None,
    order=8,
    summary="head groups and channel groups chosen per token; k and v stay dense",
    whole=False,
    targets=SUBLAYERS,
)
