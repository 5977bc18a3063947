"""Unstructured pruning: zeros anywhere (SparseGPT, Wanda, magnitude). No dense kernel gains; one for vectors may."""

from __future__ import annotations

from simulator.pruning._edits import changed, zeroed
from simulator.pruning._family import WEIGHTS, Choice, Family, Pruned, one_of
from simulator.pruning._rows import projections
from simulator.workload import Kernel, Workload

KERNELS = ("dense", "spmv")
"""Dense kernels, which compute the zeros; a sparse matrix times a vector where a GEMM has one token."""


def unstructured(w: Workload, choice: Choice, *, ideal: bool, kernel: str = "dense") -> Pruned:
    """Density ``1-s`` in the projections; counted in the bounds, timed as dense.

    With ``kernel`` "spmv" the GEMMs of one token (decode at batch 1) read only what is not zero, each value with four
    bits that tell where it is (MACKO, github.com/vlejd/macko_spmv): a gain from a sparsity of about 0.25 on.
    """
    one_of("kernel", kernel, KERNELS)
    out, realised = zeroed(w, choice, Kernel.UNSTRUCTURED, "unstructured")
    if kernel == "spmv":
        out = changed(out, projections(out) & (choice.rows > 0) & (out.m == 1), kernel=Kernel.SPMV)
    return out, realised


FAMILY = Family(
    function=unstructured, axis="static K", order=6,
    summary="zeros without structure in all projections",
    cost="no gain: dense kernels compute the zeros; the bounds count them (kernel=\"spmv\": a kernel for one token)",
    realised="zero parameters / parameters of the projections",
    whole=False, targets=WEIGHTS,
)  # fmt: skip
