"""Unstructured pruning: zeros anywhere (SparseGPT, Wanda, magnitude); dense kernels do not become
faster."""

from __future__ import annotations

from simulator.codes import Kernel
from simulator.pruning._family import WEIGHTS, Choice, Family, Pruned, one_of
from simulator.pruning._rows import changed, projections, zeroed
from simulator.workload import Workload

# dense kernels, which compute zeros; sparse matrix times vector for GEMMs of one token
KERNELS = ("dense", "spmv")


def unstructured(w: Workload, choice: Choice, *, ideal: bool, kernel: str = "dense") -> Pruned:
    """Set the density of the projections to ``1-s``: bounds count the zeros, times are those of
    dense kernels.

    With ``kernel`` "spmv" GEMMs of one token (decode at batch 1) read only nonzero values, each
    with four bits for its position (MACKO, github.com/vlejd/macko_spmv), which is faster from a
    sparsity of about 0.25."""
    one_of("kernel", kernel, KERNELS)
    out, realised = zeroed(w, choice, Kernel.UNSTRUCTURED, "unstructured")
    if kernel == "spmv":
        out = changed(out, projections(out) & (choice.rows > 0) & (out.m == 1), kernel=Kernel.SPMV)
    return out, realised


FAMILY = Family(
    function=unstructured,
    axis="static K",
    loading="checkpoint",
    parts={},
    order=6,
    summary="sets weights of all projections to zero, without structure",
    whole=False,
    targets=WEIGHTS,
)
