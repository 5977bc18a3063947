"""Low-rank factorisation: each weight becomes two thin ones (SVD-LLM, ASVD)."""

from __future__ import annotations

import numpy as np

from simulator.errors import InputError
from simulator.pruning._common import (
    GROUPS,
    PROJECTIONS,
    Choice,
    Family,
    has_bias,
    parameters_of,
    projections,
    removed,
    whole,
)
from simulator.workload import Kernel, Workload


def low_rank(w: Workload, choice: Choice, *, ideal: bool, align: int) -> tuple[Workload, float]:
    """W of N x K becomes K x r and r x N with r = ``floor((1-s) N K / (N + K))`` rounded up to ``align``, at most min(N, K).

    A fused projection is factorised as one; a tensor-parallel device factorises its own shard. A bias stays with the second factor.
    Realised: parameters of the projections removed / parameters of the projections, after rounding the ranks.
    """
    align = whole("align", align)
    rows = projections(w) & (choice.rows > 0)
    if (w.stage[rows] > 0).any():
        raise InputError("low_rank: the projections are low-rank already; factorise once, at the final sparsity")
    if (w.kernel[rows] != Kernel.DENSE).any():
        raise InputError("low_rank: a factorisation fills the zeros of sparse projections; apply low_rank first")
    n, k = w.n.astype(np.float64), w.k.astype(np.float64)
    exact = np.floor((1.0 - choice.rows) * n * k / np.maximum(n + k, 1.0) + 1e-9)
    rank = np.minimum(np.maximum(np.ceil(exact / align), 1) * align, np.minimum(n, k)).astype(np.int64)
    index = np.repeat(np.arange(len(w)), np.where(rows, 2, 1))
    two = rows[index]
    second = np.r_[False, index[1:] == index[:-1]]
    first = two & ~second
    out, r = w.take(index), rank[index]
    biased, each = (
        has_bias(w)[index],
        (w.params / np.maximum(n * k, 1.0))[index],
    )  # `each`: 1, or more where only some executions own them
    each = np.where(biased, 1.0, each)
    params = np.where(first, each * r * out.k, np.where(second, each * r * out.n + biased * out.n, out.params))
    out = out.replace(
        n=np.where(first, r, out.n),
        k=np.where(second, r, out.k),
        stage=np.where(first, 1, np.where(second, 2, out.stage)),
        params=params,
    )
    return out, removed(parameters_of(w), parameters_of(out))


FAMILY = Family(
    name="low_rank",
    axis="static K",
    dynamic=False,
    order=5,
    together="any",
    function=low_rank,
    summary="each projection becomes two GEMMs of a small rank",
    cost="a second launch, thin GEMMs, traffic of the intermediate",
    realised="parameters of the projections removed / parameters of the projections, after rounding the ranks",
    options={"align": 16},
    targets=(*PROJECTIONS, *(g for g in GROUPS if g not in PROJECTIONS)),
)
