"""Unstructured pruning: zeros anywhere (SparseGPT, Wanda, magnitude). A bound only: no dense kernel gains from them."""

from __future__ import annotations

from simulator.pruning._common import GROUPS, PROJECTIONS, Choice, Family, projections
from simulator.pruning.semi_structured import zeroed
from simulator.workload import Kernel, Workload


def unstructured(w: Workload, choice: Choice, *, ideal: bool) -> tuple[Workload, float]:
    """Density ``1-s`` in the projections; counted in the bounds, timed as dense.

    Realised: zero parameters / parameters of the projections.
    """
    rows = projections(w) & (choice.rows > 0)
    return zeroed(w, rows, 1.0 - choice.rows, Kernel.UNSTRUCTURED, "unstructured")


FAMILY = Family(
    name="unstructured",
    axis="static K",
    dynamic=False,
    order=6,
    together="any",
    function=unstructured,
    summary="zeros without structure in all projections",
    cost="no gain: dense kernels compute the zeros; the bounds count them",
    realised="zero parameters / parameters of the projections",
    targets=(*PROJECTIONS, *(g for g in GROUPS if g not in PROJECTIONS)),
)
