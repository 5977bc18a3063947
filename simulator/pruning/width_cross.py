"""Width pruning across layers: reduce the hidden size everywhere (SliceGPT, embedding axis of Minitron)."""

from __future__ import annotations

import numpy as np

from simulator.arguments import flag
from simulator.codes import Kind
from simulator.errors import InputError
from simulator.pruning._added import hidden_at, insert, overhead_gemm, sublayer_ends
from simulator.pruning._edits import aligned, moved, resized
from simulator.pruning._family import QKV, Choice, Family, Pruned, whole
from simulator.pruning._rows import parameters_removed, readers, writers
from simulator.workload import Workload

INPUTS = (*QKV, "q_a", "kv_a", "qkv_a", "delta_in", "delta_ba", "gate", "up", "gate_up", "linear", "shared_gate")
"""Projections that read the residual stream."""

NORMS = ("attention_norm", "mlp_norm", "post_norm", "final_norm")
STREAM = ("embedding", *NORMS, "residual", "gather", "scatter", "quantize", "all_reduce", "send")
"""Roles that move the residual stream; gathers of logits have their own width."""


def width_cross(
    w: Workload, choice: Choice, *, ideal: bool, align: int = 16, residual_projections: bool = False
) -> Pruned:
    """Reduce the hidden size H to H' = ``(1-s) H``, rounded up to ``align``, in embedding, norms, projections and head.

    ``residual_projections`` adds the two H'xH' GEMMs per layer with which SliceGPT changes the basis of the residual
    stream.
    """
    align = whole("align", align)
    rotates = flag("option residual_projections", residual_projections)
    ends = sublayer_ends(w)
    sizes = np.unique(hidden_at(w, np.flatnonzero(ends)))
    if len(sizes) != 1:
        raise InputError(f"width_cross: expected one hidden size in all layers, got {sizes.tolist()}")
    hidden, new = int(sizes[0]), int(aligned(sizes, np.array([1.0 - choice.asked]), align)[0])
    out = with_hidden(w, hidden, new)
    realised = parameters_removed(w, out)
    if rotates and not ideal:
        at = np.flatnonzero(ends)
        extra = overhead_gemm(out, at, "residual_projection", new, new, weight_dtype=out.weight_dtype[at])
        out = insert(out, [(at + 0.5, extra)])
    return out, realised


def with_hidden(w: Workload, hidden: int, new: int) -> Workload:
    """Return the workload with the hidden size ``new`` in place of ``hidden``."""
    stream, square, routed = w.is_role(*STREAM), w.is_role("residual_projection"), w.kind == Kind.EXPERTS
    reads = readers(w, *INPUTS) | w.is_role("lm_head", "router")
    writes = writers(w, "o", "down", "linear")
    n = np.where(writes | square | (stream & (w.n == hidden)), new, w.n)
    share = np.where(stream, new / hidden, 1.0)
    out = resized(w, n, np.where(reads | square | routed, new, w.k), **moved(w, share))
    narrower = np.where(routed, new / hidden, share)
    scaled = routed | (w.kind == Kind.ELEMENTWISE)
    return out.replace(params=np.where(scaled, w.params * narrower, out.params))


FAMILY = Family(
    function=width_cross,
    axis="static N, K across layers",
    order=3,
    summary="reduces the hidden size everywhere: embedding, norms, projections, residual stream, head",
    cost="optional residual projections H'xH', two per layer (residual_projections=True)",
    realised="parameters of the projections removed / parameters of the projections, after rounding the hidden size",
    layers="all",
)
