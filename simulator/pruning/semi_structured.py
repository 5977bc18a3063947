"""Semi-structured pruning: two of four neighbouring weights are zero (SparseGPT, Wanda at 2:4); sparse tensor cores."""

from __future__ import annotations

from simulator.errors import InputError
from simulator.pruning._edits import zeroed
from simulator.pruning._family import WEIGHTS, Choice, Family, Pruned
from simulator.pruning._rows import projections
from simulator.workload import Kernel, Workload


def semi_structured(w: Workload, choice: Choice, *, ideal: bool) -> Pruned:
    """2:4 in the projections: density 0.5 on the sparse tensor cores. ``m`` stays logical; the kernel pads it to 8.

    A part of the projections is chosen by a per-projection or per-layer sparsity of 0.5 and 0.
    """
    wrong = choice.rows[projections(w) & (choice.rows > 0) & (choice.rows != 0.5)]
    if len(wrong):
        removes = "2:4 removes exactly 0.5 (0 leaves a projection dense)"
        raise InputError(f"semi_structured at sparsity {wrong[0]:g}: {removes}")
    return zeroed(w, choice, Kernel.SPARSE24, "semi_structured")


FAMILY = Family(
    function=semi_structured, axis="static K", order=4,
    summary="2:4 sparsity in all projections: half the weights and FLOPs, plus 2-bit indices",
    cost="kernels less efficient than dense ones; no gain, often a loss, when M is small",
    realised="zero parameters / parameters of the projections (0.5)",
    whole=False, targets=WEIGHTS,
)  # fmt: skip
