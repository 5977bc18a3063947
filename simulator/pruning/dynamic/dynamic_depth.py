"""Dynamic depth: some tokens skip a sublayer or a layer (Mixture-of-Depths, SkipGPT), or all later
ones (CALM)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from simulator.arguments import flag
from simulator.arrays import Array
from simulator.codes import Kernel, Kind, Part, role_code
from simulator.errors import InputError
from simulator.pruning._family import SCORE_BYTES, SUBLAYERS, Choice, Family, one_of, whole
from simulator.pruning.dynamic import rows as _rows
from simulator.workload import Workload

# roles that compute keys and values, or update a state, for all tokens
KEYS = (
    *("k", "v", "qkv", "kv_a", "qkv_a", "kv_b", "attention_norm", "rotary", "qk_norm"),
    *("latent_norm", "cache_write"),
    *("delta_in", "delta_ba", "delta_rank", "delta_up", "delta_net", "kda"),
    *("mamba_in", "mamba_x", "mamba_dt", "mamba_norm", "mamba", "conv_in", "short_conv"),
    *("lightning", "index_q", "index_k", "index_weights", "index_norm", "indexer"),
    *("compress", "compressed"),
)
# "reference": the kernels of the taxonomy's benchmark (github.com/EIT-NLP/LLM-Pruning,
# PruningInferSim); GEMMs skip tiles of tokens sorted by a mask. "gathered": dense GEMMs of gathered
# tokens. "ideal": the same without added work
KERNELS = ("reference", "gathered", "ideal")
# numbers of kernels: from a router's scores to its mask (larger score, inverse), and from the mask
# to skipped tiles (order, marks). The benchmark has about five and nine, of one or two microseconds
# each; these numbers fit its paper, section 5.4: in decode +62 % outside GEMMs, predicted +25 to
# +74 %
SELECT, SORT = 2, 2


@dataclass(frozen=True)
class Skipping:
    """How tokens skip sublayers, and what this adds."""

    kernel: str = "ideal"  # one of KERNELS
    prune_kv: bool = False  # whether a skipped token leaves no key and value
    router: int = 0  # outputs of a router; 0: none is added
    whole_layers: bool = False  # one choice per layer instead of one per sublayer
    exact: bool = False  # the expected number of tokens instead of a binomial one
    per: int = 1  # neighbouring tokens that choose together


def dynamic_depth(
    w: Workload,
    choice: Choice,
    *,
    ideal: bool,
    kernel: str = "reference",
    prune_kv: bool = False,
    router: int = 2,
    unit: str = "sublayer",
) -> tuple[Workload, float]:
    """Compute an expected share ``1-s`` of the tokens in each attention and MLP sublayer;
    parameters are conserved.

    k, v, their rotary and cache writes, and the norm before them stay dense, so later tokens see
    every key. With ``prune_kv`` a skipped token leaves no key in that layer, and attention sees
    ``1-s`` of the positions. The number of tokens of a GEMM is binomial. Prefill attention with
    dense keys computes ``1-s`` of the query-key pairs (block-sparse); decode attention has fewer
    sequences. Early exit is a sparsity per layer that grows with depth: the share of tokens that
    have left. A router (``router`` outputs) sees all tokens, per sublayer or with ``unit`` "layer"
    per layer. With ``kernel`` "reference", each GEMM writes zeros for skipped tokens (``fill``)."""
    flag("option prune_kv", prune_kv)
    one_of("kernel", kernel, KERNELS)
    whole_layers = one_of("unit", unit, ("sublayer", "layer")) == "layer"
    if whole_layers and choice.form == "part":
        raise InputError(
            "option unit: expected unit=sublayer with a sparsity by sublayer, got 'layer'"
        )
    if any(a.family == "dynamic_depth" and a.realised > 0 for a in w.meta.applied):
        raise InputError(
            "dynamic_depth: tokens are routed already; route once, at the final sparsity"
        )
    skipping = Skipping(
        "ideal" if ideal else kernel, prune_kv, whole("router", router), whole_layers
    )
    return skip_tokens(w, choice.rows(w), skipping), choice.asked


def skip_tokens(w: Workload, s: Array, skipping: Skipping) -> Workload:
    """Return the workload whose sublayers compute a share ``1-s`` of their tokens, ``s`` by row."""
    dense_kv, kernel = not skipping.prune_kv, skipping.kernel
    if dense_kv:
        w, s = _rows.split_fused_qkv(w, s)
    keep, routed, reference = 1.0 - s, s > 0, kernel == "reference"
    prefill = w.kind == Kind.PREFILL_ATTENTION
    skips = routed & ~w.overhead & ~prefill
    if reference:
        skips &= w.kind != Kind.ELEMENTWISE
    if dense_kv:
        w = _rows.changed(w, prefill & routed, density=w.density * keep, kernel=Kernel.BLOCK_SPARSE)
        w = w.replace(**_rows.moved(w, np.where(skips, _rows.query_share(w, keep), 1.0)))
        skips &= ~computes_keys(w)
    else:
        q_len, kv_len = (
            np.maximum(_rows.whole_share(keep, length), 1) for length in (w.q_len, w.kv_len)
        )
        w = _rows.changed(w, w.is_attention & routed, q_len=q_len, kv_len=kv_len)
    keep = np.where(skips, keep, 1.0)
    fewer = (
        _rows.expected_tokens if skipping.exact else partial(_rows.split_tokens, per=skipping.per)
    )
    if kernel == "ideal":
        return fewer(w, keep)
    # router, mask and gather run before the sublayer, the scatter after it
    last = ends = np.flatnonzero(_rows.sublayer_ends(w) & routed)
    if skipping.whole_layers:
        ends, last = layer_ends(w, ends)
    first = _rows.before_sublayer(w, ends)
    parts: _rows.Inserted = []
    if skipping.router:
        hidden = _rows.hidden_at(w, ends)
        parts.append((first, _rows.overhead_gemm(w, ends, "router", skipping.router, hidden)))
    if reference:
        parts += _masked(w, ends, first, skips | (prefill & routed), skipping.router)
        w = _rows.changed(
            w,
            skips & (w.kind == Kind.GEMM) & (w.kernel == Kernel.DENSE),
            kernel=Kernel.BLOCK_SPARSE,
        )
        w = _rows.changed(w, routed & w.is_role("activation"), role=role_code("product")[0])
        of_parts = [np.ones(len(rows)) for _, rows in parts]
    else:
        of_parts = [np.ones(len(rows)) for _, rows in parts]
        parts += _copies(w, ends, last, first)
        of_parts += [1.0 - s[at[w.m[at] > 1]] for at in (ends, last)]
    keep = np.concatenate([keep, *of_parts])
    return fewer(_rows.insert(w, parts), keep[_rows.insertion(w, parts)])


def computes_keys(w: Workload) -> Array:
    """Return a mask of rows that compute keys, values or states, which later tokens need."""
    keys: Array = w.is_role(*KEYS) | (w.is_role("quantize") & (w.part == Part.ATTENTION))
    return keys


def _masked(w: Workload, ends: Array, first: Array, skips: Array, router: int) -> _rows.Inserted:
    """Return the selection of masks, the sorting of masks of several tokens, and the zeros of
    incomplete results."""
    m, several = w.m[ends], w.m[ends] > 1
    scores = m * router * _rows.stream_bytes(w, ends)
    select = _rows.overheads(
        w, ends, "select", m=m, n=router, read_bytes=scores, write_bytes=m * 1.0
    )
    at, m = ends[several], w.m[ends[several]]
    sort = _rows.overheads(
        w, at, "sort", m=m, n=1, read_bytes=m * SCORE_BYTES, write_bytes=m * SCORE_BYTES
    )
    rows = np.flatnonzero(skips & (w.kind != Kind.COLLECTIVE))
    tokens = np.where(w.is_attention[rows], w.batch[rows] * w.q_len[rows], w.m[rows])
    width = np.where(w.is_attention[rows], w.heads[rows] * w.value_features[rows], w.n[rows])
    width = np.where(w.kind[rows] == Kind.EXPERTS, w.k[rows], width)
    zeros = 1.0 * tokens * width * _rows.stream_bytes(w, rows)
    fill = _rows.overheads(w, rows, "fill", m=tokens, n=width, write_bytes=zeros)
    select, sort = (
        select.replace(count=SELECT * select.count),
        sort.replace(count=SORT * sort.count),
    )
    return [(first, select), (first[several], sort), (rows - 0.5, fill)]


def layer_ends(w: Workload, ends: Array) -> tuple[Array, Array]:
    """Return the ends of the first sublayer of each layer, and of the last."""
    each, part = w.take(ends).expand(), w.part[ends]
    attends, feeds = (
        np.isin(w.layer[ends], each.layer[each.part == of]) for of in (Part.ATTENTION, Part.MLP)
    )
    return ends[(part == Part.ATTENTION) | ~attends], ends[(part == Part.MLP) | ~feeds]


def _copies(w: Workload, ends: Array, last: Array, first: Array) -> _rows.Inserted:
    def copied(at: Array, role: str) -> Workload:
        m, hidden = w.m[at], _rows.hidden_at(w, at)
        size = m * hidden * _rows.stream_bytes(w, at)
        return _rows.overheads(
            w, at, role, m=m, n=hidden, read_bytes=size + SCORE_BYTES * m, write_bytes=size
        )

    several, after = w.m[ends] > 1, last[w.m[last] > 1]
    return [
        (first[several], copied(ends[several], "gather")),
        (after + 0.5, copied(after, "scatter")),
    ]


FAMILY = Family(
    function=dynamic_depth,
    axis="dynamic M",
    loading="kernels",
    parts=None,
    order=7,
    summary=(
        "each sublayer (or layer) computes a share of the tokens; k and v stay dense (prune_kv=True"
        " prunes them)"
    ),
    targets=SUBLAYERS,
)
