"""Unstructured pruning: zeros anywhere (SparseGPT, Wanda, magnitude). A bound only: no dense kernel gains from them."""

from __future__ import annotations

from simulator.pruning._edits import zeroed
from simulator.pruning._family import WEIGHTS, Choice, Family, Pruned
from simulator.workload import Kernel, Workload


def unstructured(w: Workload, choice: Choice, *, ideal: bool) -> Pruned:
    """Density ``1-s`` in the projections; counted in the bounds, timed as dense."""
    return zeroed(w, choice, Kernel.UNSTRUCTURED, "unstructured")


FAMILY = Family(
    function=unstructured, axis="static K", order=6,
    summary="zeros without structure in all projections",
    cost="no gain: dense kernels compute the zeros; the bounds count them",
    realised="zero parameters / parameters of the projections",
    whole=False, targets=WEIGHTS,
)  # fmt: skip
