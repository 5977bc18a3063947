"""Width pruning across layers: reduce the hidden size everywhere (SliceGPT, embedding axis of
Minitron)."""

from __future__ import annotations

import numpy as np

from simulator.arguments import flag
from simulator.errors import InputError
from simulator.pruning import _rows
from simulator.pruning._family import Choice, Family, Pruned, whole
from simulator.workload import Workload


def width_cross(
    w: Workload, choice: Choice, *, ideal: bool, align: int = 16, residual_projections: bool = False
) -> Pruned:
    """Reduce the hidden size H to H' = ``(1-s) H``, rounded up to ``align``, in embedding, norms,
    projections and head.

    ``residual_projections`` adds the two H'xH' GEMMs per layer with which SliceGPT changes the
    basis of the residual stream."""
    align = whole("align", align)
    rotates = flag("option residual_projections", residual_projections)
    ends = _rows.sublayer_ends(w)
    sizes = np.unique(_rows.hidden_at(w, np.flatnonzero(ends)))
    if len(sizes) != 1:
        raise InputError(
            f"width_cross: expected one hidden size in all layers, got {sizes.tolist()}"
        )
    hidden, new = int(sizes[0]), int(_rows.aligned(sizes, np.array([1.0 - choice.asked]), align)[0])
    out = _rows.with_hidden(w, hidden, new)
    realised = _rows.parameters_removed(w, out)
    if rotates and not ideal:
        at = np.flatnonzero(ends)
        extra = _rows.overhead_gemm(
            out, at, "residual_projection", new, new, weight_dtype=out.weight_dtype[at]
        )
        out = _rows.insert(out, [(at + 0.5, extra)])
    return out, realised


FAMILY = Family(
    function=width_cross,
    axis="static N, K across layers",
    loading="config",
    parts={"": ("hidden size",)},
    narrows=True,
    order=3,
    summary=(
        "reduces the hidden size everywhere: embedding, norms, projections, residual stream, head"
    ),
    layers="all",
)
