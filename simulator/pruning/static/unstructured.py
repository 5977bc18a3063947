"""Unstructured pruning: zeros anywhere (SparseGPT, Wanda, magnitude); dense kernels do not become
faster."""

from __future__ import annotations

from simulator.models.model import Model
from simulator.pruning._family import WEIGHTS, Choice, Family, one_of, weights_removed, with_zeros

# dense kernels, which compute zeros; sparse matrix times vector for GEMMs of one token
KERNELS = ("dense", "spmv")


def unstructured(model: Model, choice: Choice, *, kernel: str = "dense") -> tuple[Model, float]:
    """Set the density of the projections to ``1-s``: bounds count the zeros, times are those of
    dense kernels.

    With ``kernel`` "spmv" GEMMs of one token (decode at batch 1) read only nonzero values, each
    with four bits for its position (MACKO, github.com/vlejd/macko_spmv), which is faster from a
    sparsity of about 0.25."""
    one_of("kernel", kernel, KERNELS)
    zeros = "spmv" if kernel == "spmv" else "unstructured"
    out = with_zeros(model, choice, zeros, "unstructured")
    return out, weights_removed(model, out)


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
