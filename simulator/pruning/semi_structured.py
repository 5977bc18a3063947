"""Semi-structured pruning: two of four neighbouring weights are zero, run on sparse tensor cores (SparseGPT, Wanda at 2:4)."""

from __future__ import annotations

import numpy as np

from simulator.columns import Array
from simulator.errors import InputError
from simulator.pruning._common import GROUPS, PROJECTIONS, Choice, Family, has_bias, parameters_of, projections, removed
from simulator.workload import Kernel, Workload


def semi_structured(w: Workload, choice: Choice, *, ideal: bool) -> tuple[Workload, float]:
    """2:4 in the projections: density 0.5 on the sparse tensor cores. ``m`` stays logical; the kernel pads it to 8.

    A part of the projections is chosen by a per-projection or per-layer sparsity of 0.5 and 0.
    Realised: zero parameters / parameters of the projections.
    """
    rows = projections(w) & (choice.rows > 0)
    wrong = choice.rows[rows & (choice.rows != 0.5)]
    if len(wrong):
        raise InputError(
            f"semi_structured at sparsity {wrong[0]:g}: 2:4 removes exactly 0.5 (0 leaves a projection dense)"
        )
    return zeroed(w, rows, np.full(len(w), 0.5), Kernel.SPARSE24, "semi_structured")


def zeroed(w: Workload, rows: Array, keep: Array, kernel: Kernel, name: str) -> tuple[Workload, float]:
    """Weights of some rows set to zero; ``params`` counts those that are not (and the biases)."""
    if (w.kernel[rows] != Kernel.DENSE).any():
        which = Kernel(int(w.kernel[rows].max())).name.lower()
        raise InputError(f"{name}: the projections are sparse already ({which}); a weight is zeroed once")
    bias = np.where(has_bias(w), w.n, 0.0)
    left = np.where(rows, keep * (w.params - bias) + bias, w.params)
    density, code = np.where(rows, w.density * keep, w.density), np.where(rows, kernel, w.kernel)
    out = w.replace(density=density, kernel=code, params=left)
    return out, removed(parameters_of(w), parameters_of(out))


FAMILY = Family(
    name="semi_structured",
    axis="static K",
    dynamic=False,
    order=4,
    function=semi_structured,
    summary="2:4 sparsity in all projections: half the weights and FLOPs, plus 2-bit indices",
    cost="kernels less efficient than dense ones; no gain, often a loss, when M is small",
    realised="zero parameters / parameters of the projections (0.5)",
    targets=(*PROJECTIONS, *(g for g in GROUPS if g not in PROJECTIONS)),
)
