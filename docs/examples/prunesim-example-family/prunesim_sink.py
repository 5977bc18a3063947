"""Sink attention: each query sees the first positions and the last ones (StreamingLLM, arXiv
2309.17453)."""

from __future__ import annotations

import numpy as np

from simulator import Choice, Family, InputError, Workload


def sink(
    w: Workload, choice: Choice, *, ideal: bool, sinks: int = 4, window: int = 1020
) -> tuple[Workload, float]:
    """Attend to ``sinks`` first and ``window`` last positions; the cache keeps no others.

    The kernel adds no work, so ``ideal`` changes nothing. The realised sparsity is the removed
    share of the products of queries and keys."""
    for name, value in {"sinks": sinks, "window": window}.items():
        if not isinstance(value, int) or value < 1:
            raise InputError(f"option {name}: expected a whole number from 1 up, got {value!r}")
    seen = sinks + window
    longer = w.is_attention & ((w.window == 0) | (w.window > seen))
    pruned = w.replace(window=np.where(longer, seen, w.window))
    return pruned, 1.0 - products(pruned) / max(products(w), 1.0)


def products(w: Workload) -> float:
    """Return the number of products of queries and keys."""
    return float((w.pairs * w.batch * w.heads * w.count).sum())


FAMILY = Family(
    function=sink,
    axis="N, K of attention",
    loading="kernels",  # the pruning happens at inference
    parts={},
    summary="attention to the first and the last positions",
    order=30,
    layers="all",
    sets_sparsity=True,
)
