"""Dynamic width: choose head and channel groups per token (Deja Vu, Mixture-of-Heads, contextual
sparsity)."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Groups:
    """Groups of heads and channels that tokens choose; arrays have a value per row."""

    outer: Array  # mask of projections that compute a share of their N
    inner: Array  # mask of projections that read a share of their K
    s: Array  # share that a token does not choose
    many: Array  # groups of each projection
    kernel: str = "ideal"  # one of KERNELS
    per: int = 1  # neighbouring tokens that choose together
    shared: bool = False  # whether all tokens of a pass choose together
    align: Array | int = ALIGN

    @property
    def tiles(self) -> Array:
        tiles: Array = self.outer | self.inner
        return tiles

    def used(self, w: Workload) -> Array:
        """Return the share of the groups that at least one token of each row chose."""
        if self.shared:
            return np.where(self.tiles, 1.0 - self.s, 1.0)
        choices = np.ceil(np.maximum(_rows.tokens_of(w), 1) / self.per)
        chance = -np.expm1(choices * np.log(np.where(self.tiles, self.s, 0.5)))
        return np.where(self.tiles, chance, 1.0)


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
    one_of("kernel", kernel, KERNELS)
    w, s = _rows.split_fused_qkv(w, choice.rows(w))
    groups = Groups(
        outer=_rows.writers(w, "q", "gate", "up", "gate_up") & (s > 0),
        inner=_rows.readers(w, "o", "down") & (s > 0),
        s=s,
        many=groups_of(w, channel_groups),
        kernel="ideal" if ideal else kernel,
    )
    pruned = choose_groups(w, groups)
    pruned = choose_heads(pruned, np.where(w.is_attention, s, 0.0))
    pruned = narrow_activations(pruned, s)
    if groups.kernel == "ideal":
        return pruned, choice.asked
    ends = np.flatnonzero(_rows.sublayer_ends(w) & (s > 0))
    parts = router_rows(w, ends, groups)
    if kernel != "reference":
        parts += copies_of(w, ends, groups)
    return _rows.insert(pruned, parts), choice.asked


def groups_of(w: Workload, channel_groups: int) -> Array:
    """Return the groups of each row: KV heads in attention, ``channel_groups`` elsewhere."""
    heads = _rows.covering(w, w.is_attention, w.kv_heads)
    return np.where(w.part == Part.ATTENTION, np.maximum(heads, 1), channel_groups)


def choose_groups(w: Workload, groups: Groups) -> Workload:
    """Return the workload whose projections compute the groups that tokens choose."""
    outer, tiles = groups.outer, groups.tiles
    if np.isin(w.kernel[tiles], (Kernel.SPARSE24, Kernel.UNSTRUCTURED)).any():
        expected = "expected dense projections, as no kernel skips both zeros and tiles"
        raise InputError(f"dynamic_width: {expected}, got sparse ones")
    pruned = _tiled(w, groups)
    if groups.kernel == "reference":
        edge = np.maximum(np.where(outer, w.n, w.k) // groups.many, 1)
        pruned = _rows.changed(pruned, outer, kernel=Kernel.GROUPS_N, block=edge)
        pruned = _rows.changed(pruned, tiles & ~outer, kernel=Kernel.GROUPS_K, block=edge)
    return _looped(w, pruned, groups) if groups.kernel == "looped" else pruned


def choose_heads(w: Workload, s: Array) -> Workload:
    """Return the workload whose attention computes a share ``1-s`` of its heads, ``s`` by row."""
    return _rows.changed(
        w, w.is_attention & (s > 0), kernel=Kernel.BLOCK_SPARSE, density=w.density * (1.0 - s)
    )


def narrow_activations(w: Workload, s: Array) -> Workload:
    """Return the workload whose activations between projections have a share ``1-s`` of their
    features, and whose rotary embedding has that share of the queries."""
    channels = w.is_role("activation", "quantize_heads", "quantize_inner") & (w.layer >= 0)
    share = np.where(channels, 1.0 - s, _rows.query_share(w, 1.0 - s))
    return w.replace(**_rows.moved(w, share))


def _tiled(w: Workload, groups: Groups) -> Workload:
    """Return tiled GEMMs over the tokens of a group in use and the width of all groups in use."""
    outer, tiles, used, left = groups.outer, groups.tiles, groups.used(w), 1.0 - groups.s
    width, tokens = np.where(outer, w.n, w.k), np.maximum(_rows.tokens_of(w), 1).astype(np.float64)
    kept = _rows.aligned(width, used, groups.align)
    m = np.ceil(tokens * left / used - 1e-9)
    if not groups.shared:
        # rounding can exceed 1
        exact = np.minimum(tokens * left * width / np.maximum(m * kept, 1.0), 1.0)
        w = _rows.changed(w, tiles, density=w.density * exact)
    w = _rows.changed(w, tiles, m=m)
    return _rows.changed(_rows.changed(w, outer, n=kept), tiles & ~outer, k=kept)


def _looped(w: Workload, tiled: Workload, groups: Groups) -> Workload:
    """Return tiled GEMMs of several tokens as one GEMM per group in use, with the same FLOPs."""
    outer, tiles = groups.outer, groups.tiles & (_rows.tokens_of(w) > 1)
    width = np.where(outer, w.n, w.k)
    number = np.minimum(groups.many, np.maximum(width, 1))
    many, each = np.where(tiles, number * groups.used(w), 1.0), -(-width // number)
    computed = np.maximum(tiled.m * each * many, 1.0)
    tokens = _rows.tokens_of(w).astype(np.float64)
    exact = np.minimum(tokens * (1.0 - groups.s) * width / computed, 1.0)
    tiled = tiled.replace(count=tiled.count * many, params=tiled.params / many)
    tiled = _rows.changed(tiled, tiles, density=w.density * exact)
    return _rows.changed(_rows.changed(tiled, tiles & outer, n=each), tiles & ~outer, k=each)


def router_rows(w: Workload, ends: Array, groups: Groups) -> _rows.Inserted:
    """Return a router and the sorting of its choices before each sublayer."""
    m, size, outputs = w.m[ends], _rows.stream_bytes(w, ends), groups.many[ends]
    scores, chosen = m * outputs, m * outputs * (1.0 - groups.s[ends])
    sort = _rows.overheads(
        w, ends, "sort", m=m, n=outputs, read_bytes=scores * size, write_bytes=chosen * SCORE_BYTES
    )
    sort = sort.replace(count=sort.count * (SORT if groups.kernel == "reference" else 1))
    place = _rows.before_sublayer(w, ends)
    return [(place, _rows.overhead_gemm(w, ends, "router", outputs, w.n[ends])), (place, sort)]


def copies_of(w: Workload, ends: Array, groups: Groups) -> _rows.Inserted:
    """Return a gather before and a scatter after each sublayer of several tokens, one per loop of
    its kernels; ``groups.s`` counts at the ends of the sublayers."""
    at = ends[w.m[ends] > 1]
    m, n, size, s = w.m[at], w.n[at], _rows.stream_bytes(w, at), groups.s[at]
    looped = groups.kernel == "looped"
    many = groups.many[at] * (1.0 - s ** np.maximum(m, 1)) if looped else np.ones(len(at))
    pairs = m * groups.many[at] * (1.0 - s) / many  # per loop
    moved_bytes, columns = (
        pairs * n * size,
        {"m": np.ceil(pairs), "n": n, "count": many * w.count[at]},
    )
    copied = _rows.overheads(
        w, at, "gather", read_bytes=moved_bytes, write_bytes=moved_bytes, **columns
    )
    # atomics read both operands of the addition, at three quarters of the bandwidth
    summed = _rows.overheads(
        w, at, "scatter", read_bytes=3.0 * moved_bytes, write_bytes=moved_bytes, **columns
    )
    place = _rows.before_sublayer(w, at)
    parts = [(place, copied), (at + 0.5, summed)]
    if (many > 1.0).any():
        found = _rows.overheads(
            w, at, "select", read_bytes=m * 1.0, write_bytes=pairs * SCORE_BYTES, **columns
        )
        parts.append((place, found))
    return parts


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
