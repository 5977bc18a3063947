"""2:4 sparse weights on sparse tensor cores, by cuSPARSELt with the fastest algorithm per number of rows.

torch's own tensor class always uses algorithm 0 and adds its dispatcher to every call. This module calls cuSPARSELt's
functions of torch directly; ``searched=False`` uses algorithm 0, as engines built on torch do. The library times its
algorithms at the first call with a number of rows, before a CUDA graph is recorded, since the search waits for the
device. cuSPARSELt makes a plan at every call; only a graph hides that host time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from calibration.devices.protocol import Unsupported

Tensor = Any
Algorithm = tuple[Any, ...]  # number and, if torch can search for it, split of K

_ROWS = 8  # rows of activations are a multiple of this, in 16 bits


@dataclass(frozen=True)
class SparseWeight:
    """A compressed weight (n, k) in which two of four neighbours in a row are zero."""

    packed: Tensor
    shape: tuple[int, int]
    searched: bool = True  # False: algorithm 0, as torch's tensor class
    algorithms: dict[int, Algorithm] = field(default_factory=dict)  # by rows of activations; equal shapes share it

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x weight^T + bias of x (..., k)."""
        flat = x.reshape(-1, self.shape[1])
        rows = len(flat)
        if rows % _ROWS:
            flat = F.pad(flat, (0, 0, 0, -rows % _ROWS))
        algorithm = self.algorithms.get(len(flat)) if self.searched else (0,)
        if algorithm is None:
            algorithm = self.algorithms[len(flat)] = _fastest(self.packed, flat.t(), bias)
        out = torch._cslt_sparse_mm(self.packed, flat.t(), bias, None, None, True, *algorithm)
        return out[:rows].view(*x.shape[:-1], self.shape[0])


def sparse_weight(
    weight: Tensor, algorithms: dict[int, Algorithm] | None = None, *, searched: bool = True
) -> SparseWeight:
    """Compress a weight that is 2:4 sparse. Unsupported: torch has no cuSPARSELt."""
    library = getattr(torch.backends, "cusparselt", None)
    if library is None or not library.is_available():
        raise Unsupported("2:4: this torch has no cuSPARSELt, or no kernels for this GPU")
    found = {} if algorithms is None else algorithms
    packed = torch._cslt_compress(weight.contiguous())
    return SparseWeight(packed, (weight.shape[0], weight.shape[1]), searched, found)


def _fastest(packed: Tensor, dense: Tensor, bias: Tensor | None) -> Algorithm:
    """Return the last arguments of ``_cslt_sparse_mm``: the algorithm and, if torch searches for it, the split of K."""
    both = getattr(getattr(torch._C, "_cusparselt", None), "mm_search", None)
    if both is not None:
        return tuple(both(packed, dense, bias, None, None, True)[:3])
    return (torch._cslt_sparse_mm_search(packed, dense, bias, None, None, True),)


def linear(x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
    """Return x weight^T + bias of a dense or a sparse weight."""
    return weight.linear(x, bias) if isinstance(weight, SparseWeight) else F.linear(x, weight, bias)
