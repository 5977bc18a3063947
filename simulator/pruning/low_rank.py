"""Low-rank factorisation: replace each weight by two thin factors (SVD-LLM, ASVD)."""

from __future__ import annotations

import numpy as np

from simulator.errors import InputError
from simulator.pruning._family import WEIGHTS, Choice, Family, Pruned, whole
from simulator.pruning._rows import biases, changed, doubled, parameters_removed, projections, zeros
from simulator.workload import Workload


def low_rank(w: Workload, choice: Choice, *, ideal: bool, align: int = 16) -> Pruned:
    """Replace W of N x K by K x r and r x N, r = ``floor((1-s) N K / (N + K))`` rounded up to
    ``align``, at most N, K.

    A fused projection is factorised as one weight; a tensor-parallel device factorises its own
    shard. The second factor keeps the bias."""
    align = whole("align", align)
    rows = projections(w) & (choice.rows > 0)
    if (w.stage[rows] > 0).any():
        raise InputError("low_rank: expected dense projections, got low-rank ones; factorise once")
    if (rows & zeros(w)).any():
        raise InputError(
            "low_rank: expected dense projections, got sparse ones; apply low_rank first"
        )
    n, k = w.n.astype(np.float64), w.k.astype(np.float64)
    exact = np.floor((1.0 - choice.rows) * n * k / np.maximum(n + k, 1.0) + 1e-9)
    rank = np.minimum(np.maximum(np.ceil(exact / align), 1) * align, np.minimum(n, k)).astype(
        np.int64
    )
    bias = biases(w)
    owned = (w.params - bias) / np.maximum(n * k, 1.0)  # not 1 if executions and layers differ
    out, index, first, second = doubled(w, rows)
    r, owned = rank[index], owned[index]
    out = changed(out, first, n=r, stage=1, params=owned * r * out.k)
    out = changed(out, second, k=r, stage=2, params=owned * r * out.n + bias[index])
    return out, parameters_removed(w, out)


FAMILY = Family(
    function=low_rank,
    axis="static K",
    loading="checkpoint",
    parts={},
    narrows=True,
    order=5,
    summary="replaces each projection by two GEMMs of a small rank",
    whole=False,
    targets=WEIGHTS,
)
