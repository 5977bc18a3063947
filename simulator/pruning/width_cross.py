"""Width pruning across layers: the hidden size shrinks everywhere (SliceGPT, Minitron's embedding axis)."""

from __future__ import annotations

import numpy as np

from simulator.errors import InputError
from simulator.pruning._common import (
    INPUTS,
    Choice,
    Family,
    aligned,
    flag,
    has_role,
    insert,
    overheads,
    owns_parameters,
    parameters_of,
    projections,
    removed,
    resized,
    sublayer_ends,
    whole,
)
from simulator.workload import Kind, Workload

STREAM = (
    "embedding",
    "attention_norm",
    "mlp_norm",
    "post_norm",
    "final_norm",
    "residual",
    "gather",
    "scatter",
    "quantize",
    "all_reduce",
    "send",
)
"""Roles that move the hidden state; gathers of the head's logits have their own width."""


def width_cross(
    w: Workload, choice: Choice, *, ideal: bool, align: int, residual_projections: bool
) -> tuple[Workload, float]:
    """The hidden size H becomes H' = ``(1-s) H`` rounded up to ``align`` in embedding, norms, projections, residuals and head.

    ``residual_projections`` adds the two H'xH' GEMMs a layer with which SliceGPT turns the residual stream from one basis to the next.
    Realised: parameters of the projections removed / parameters of the projections.
    """
    align, turn = whole("align", align), flag("residual_projections", residual_projections)
    ends = sublayer_ends(w)
    sizes = np.unique(w.n[ends])
    if len(sizes) != 1:
        raise InputError(f"width_cross needs one hidden size in all layers, found {sizes.tolist()}")
    hidden = int(sizes[0])
    new = int(aligned(np.array([hidden]), np.array([1.0 - choice.asked]), align)[0])
    reads = (projections(w, *INPUTS) | has_role(w, "lm_head", "router")) & (w.stage != 2)
    k = np.where(reads, new, w.k)
    stream = has_role(w, *STREAM)
    n = np.where(ends | (stream & (w.n == hidden)), new, w.n)
    square = has_role(w, "residual_projection")
    n, k = np.where(square, new, n), np.where(square, new, k)
    share = np.where(stream, new / hidden, 1.0)
    elementwise = w.kind == Kind.ELEMENTWISE
    out = resized(w, n, k, read_bytes=w.read_bytes * share, write_bytes=w.write_bytes * share)
    out = out.replace(params=np.where(elementwise, w.params * share, out.params))
    realised = removed(parameters_of(w), parameters_of(out))
    if turn and not ideal:
        at = np.flatnonzero(ends)
        extra = overheads(
            out,
            at,
            "residual_projection",
            Kind.GEMM,
            m=out.m[at],
            n=new,
            k=new,
            weight_dtype=out.weight_dtype[at],
            params=np.where(owns_parameters(out)[at], float(new) ** 2, 0.0),
        )
        out = insert(out, [(at + 0.5, extra)])
    return out, realised


FAMILY = Family(
    name="width_cross",
    axis="static N, K across layers",
    dynamic=False,
    order=3,
    together="any",
    function=width_cross,
    summary="the hidden size shrinks everywhere: embedding, norms, projections, residual stream, head",
    cost="optional residual projections H'xH', two a layer (residual_projections=True)",
    realised="parameters of the projections removed / parameters of the projections, after rounding the hidden size",
    options={"align": 16, "residual_projections": False},
    per_layer=False,
)
