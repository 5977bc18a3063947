"""2:4 sparse weights on the sparse tensor cores, by cuSPARSELt with the algorithm that is fastest at each number of
rows.

torch's own tensor class takes algorithm 0 whatever the shape and goes through its dispatcher at every call. This calls
cuSPARSELt's functions of torch directly, and has the library time its algorithms when it first meets a number of rows:
before a CUDA graph is recorded, since a search waits for the device. The plan that cuSPARSELt makes at every call is
host time that only a graph hides.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from calibration.devices.protocol import Unsupported

Tensor = Any
Algorithm = tuple[Any, ...]  # its number and, where torch can search for them, how K is split

_ROWS = 8  # activations come in multiples of this many rows, in 16 bits


@dataclass(frozen=True)
class SparseWeight:
    """A weight (n, k) with two of every four neighbours of a row zero, compressed."""

    packed: Tensor
    shape: tuple[int, int]
    algorithms: dict[int, Algorithm] = field(default_factory=dict)  # by rows of the activations; shared by equal shapes

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x weight^T + bias of x (..., k)."""
        flat = x.reshape(-1, self.shape[1])
        rows = len(flat)
        if rows % _ROWS:
            flat = F.pad(flat, (0, 0, 0, -rows % _ROWS))
        how = self.algorithms.get(len(flat))
        if how is None:
            how = self.algorithms[len(flat)] = _fastest(self.packed, flat.t(), bias)
        out = torch._cslt_sparse_mm(self.packed, flat.t(), bias, None, None, True, *how)
        return out[:rows].view(*x.shape[:-1], self.shape[0])


def sparse_weight(weight: Tensor, algorithms: dict[int, Algorithm] | None = None) -> SparseWeight:
    """Compress a weight that is 2:4 already. Unsupported: torch was built without cuSPARSELt."""
    library = getattr(torch.backends, "cusparselt", None)
    if library is None or not library.is_available():
        raise Unsupported("2:4: this torch has no cuSPARSELt, or the GPU none of its kernels")
    found = {} if algorithms is None else algorithms
    return SparseWeight(torch._cslt_compress(weight.contiguous()), (weight.shape[0], weight.shape[1]), found)


def _fastest(packed: Tensor, dense: Tensor, bias: Tensor | None) -> Algorithm:
    """Trailing arguments of ``_cslt_sparse_mm``: the algorithm, and how it splits K where torch searches that too."""
    both = getattr(getattr(torch._C, "_cusparselt", None), "mm_search", None)
    if both is not None:
        return tuple(both(packed, dense, bias, None, None, True)[:3])
    return (torch._cslt_sparse_mm_search(packed, dense, bias, None, None, True),)


def linear(x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias of a plain or a sparse weight."""
    return weight.linear(x, bias) if isinstance(weight, SparseWeight) else F.linear(x, weight, bias)
