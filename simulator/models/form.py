"""How a weight is stored: :class:`Form`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from simulator.codes import Kernel

ZEROS = {
    "2:4": Kernel.SPARSE24,
    "unstructured": Kernel.UNSTRUCTURED,
    "spmv": Kernel.SPMV,
}
"""Zeros in a weight -> kernel that multiplies it. ``spmv`` is for products of one token: more
tokens run as unstructured."""


@dataclass(frozen=True)
class Form:
    """Form of a weight: as it is, as two factors of a rank, or with zeros."""

    rank: Any = None  # rank of two factors; None: one weight
    zeros: str = ""  # key of ZEROS; "": no zeros that are counted
    density: Any = 1.0  # share of values that are not zero

    def kernel(self, tokens: int) -> Kernel:
        if self.zeros == "spmv" and tokens > 1:
            return Kernel.UNSTRUCTURED
        return ZEROS[self.zeros]

    def weights(self, n: Any, k: Any) -> Any:
        """Return the number of stored values of n outputs and k inputs, zeros included."""
        return n * k if self.rank is None else self.rank * (n + k)

    def nonzero(self, n: Any, k: Any) -> Any:
        return self.density * self.weights(n, k)


PLAIN = Form()
SPARSE24 = Form(zeros="2:4", density=0.5)


def present(size: Any) -> bool:
    """Return whether a size, or each size of an array, is not zero."""
    return bool(size.any()) if isinstance(size, np.ndarray) else bool(size)


def alike(forms: Sequence[Form]) -> bool:
    """Return whether weights are stored plainly or with equal zeros, so that one product can
    compute them."""
    first = forms[0]
    return (
        all(
            form is first
            or (
                form.rank is None
                and form.zeros == first.zeros
                and np.array_equal(form.density, first.density)
            )
            for form in forms
        )
        and first.rank is None
    )
