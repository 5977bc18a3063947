"""Semi-structured pruning: two of four neighbouring weights are zero (SparseGPT, Wanda at 2:4)."""

from __future__ import annotations

from simulator.codes import Kernel
from simulator.errors import InputError
from simulator.pruning._family import WEIGHTS, Choice, Family, Pruned
from simulator.pruning._rows import projections, zeroed
from simulator.workload import Workload


def semi_structured(w: Workload, choice: Choice, *, ideal: bool) -> Pruned:
    """Make the projections 2:4 sparse: density 0.5 on sparse tensor cores. The kernel pads ``m`` to
    a multiple of 8.

    A sparsity per part or per layer of 0.5 and 0 selects some of the projections."""
    wrong = choice.rows[projections(w) & (choice.rows > 0) & (choice.rows != 0.5)]
    if len(wrong):
        expected = "expected 0.5, as 2:4 removes half (0 keeps a projection dense)"
        raise InputError(f"semi_structured at sparsity {wrong[0]:g}: {expected}")
    return zeroed(w, choice, Kernel.SPARSE24, "semi_structured")


FAMILY = Family(
    function=semi_structured,
    axis="static K",
    loading="checkpoint",
    parts={},
    order=4,
    summary="2:4 sparsity in all projections: half the weights and FLOPs, plus 2-bit indices",
    default=0.5,
    whole=False,
    targets=WEIGHTS,
)
