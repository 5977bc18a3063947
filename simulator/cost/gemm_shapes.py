"""Read and check the shapes of GEMMs, and cut them into chunks of one kernel and one precision.

Used by :mod:`simulator.cost.gemm`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.arguments import COUNT, SHARE, SIZE, Range, array, flag, plain, text, together
from simulator.arrays import Array
from simulator.cost.base import ELEMENT_BYTES
from simulator.counts import spmv_bytes
from simulator.errors import unknown
from simulator.workload import Kernel

_DENSE, _SPMV = int(Kernel.DENSE), int(Kernel.SPMV)

PRECISION = np.float32
"""Arithmetic of predictions; the fit's is float64. Results are float64 either way, 1e-6 apart at most."""

CHUNK = 4096
"""Shapes timed at once: few enough for the second-level cache, many enough to hide the cost of calls."""

EXACT, MOST_PRODUCT = 2.0**24, 1e16
"""Largest size, and product of sizes, of a shape in :data:`PRECISION`: beyond, it does not tell whole numbers apart, or
the cube of a slow device's microseconds overflows. Such shapes are timed in float64."""

# alignment is looked at in 32 bits
_WIDTH = Range(1.0, 2.0**31 - 1.0, "whole numbers from 1 to 2147483647", whole=True)
_COPIES = Range(1.0, math.inf, "whole numbers from 1 up", whole=True)  # infinitely many: always cold
KERNELS: tuple[str, ...] = tuple(kernel.name.lower() for kernel in Kernel)
"""Names of kernels; the index is the code."""
_CODE = Range(0.0, len(KERNELS) - 1.0, "names of kernels, or their codes", whole=True)


@dataclass(frozen=True)
class Options:
    """The options of :func:`simulator.gemm_time`, and what engines differ by."""

    dtype: str = "bf16"
    weight_dtype: str | None = None
    kernel: Any = "dense"
    cold: bool = True
    copies: Any = None
    density: Any = 1.0
    block: Any = 0
    # 2:4: whether the library times its plans and takes the fastest for a shape, as a benchmark does; else one plan
    searched: bool = True


def read_shapes(m: Any, n: Any, k: Any, path: Options) -> tuple[NDArray[np.int8], dict[str, Array]]:
    """Return kernel codes, and m, n, k, copies and block where given, of one shape; InputError for bad arguments."""
    text("dtype", path.dtype)
    if path.weight_dtype is not None:
        text("weight_dtype", path.weight_dtype)
    codes = _kernel_codes(path.kernel)
    given = {"m": array("m", m, COUNT), "n": array("n", n, _WIDTH), "k": array("k", k, _WIDTH)}
    given["n"] = _stored(given["n"], codes, path)
    if path.copies is not None:
        given["copies"] = array("copies", path.copies, _COPIES)
    elif not flag("cold", path.cold):
        given["copies"] = np.asarray(1.0)
    if np.any(block := array("block", path.block, SIZE)):
        given["block"] = block
    codes, *same = together(kernel=codes, **given)
    return codes, dict(zip(given, same))


def _kernel_codes(kernel: Any) -> NDArray[np.int8]:
    """Return codes of kernels given as names, members of :class:`Kernel` or codes."""
    given = plain(kernel)
    if given.dtype.kind not in "UO":
        return array("kernel", kernel, _CODE).astype(np.int8)
    for name in given.ravel().tolist():
        if name not in KERNELS:
            raise unknown("kernel", str(name), KERNELS)
    return np.array([KERNELS.index(name) for name in given.ravel().tolist()], dtype=np.int8).reshape(given.shape)


def _stored(n: Any, codes: NDArray[Any], path: Options) -> Any:
    """Return the outputs of dense products with as many bytes as SpMV kernels store, in whole rows of eight."""
    density = array("density", path.density, SHARE)
    if not np.any(codes == _SPMV):
        return n
    codes, rows, density = together(kernel=codes, n=n, density=density)
    value = ELEMENT_BYTES[path.weight_dtype or path.dtype]
    return np.where(codes == _SPMV, np.ceil(rows * spmv_bytes(density, value) / (8.0 * value)) * 8.0, rows)


def _large(m: Array, n: Array, k: Array) -> NDArray[np.bool_] | None:
    """Return a mask of shapes that single precision would round or overflow; None where there are none."""

    def large(m: Any, n: Any, k: Any) -> Any:
        return (np.maximum(m, np.maximum(n, k)) > EXACT) | (m * n * k > MOST_PRODUCT)

    return large(m, n, k) if len(m) and large(m.max(), n.max(), k.max()) else None


def chunks(codes: NDArray[np.int8], m: Array, n: Array, k: Array) -> Iterator[tuple[int, Any, Any]]:
    """Yield a kernel code, some of the flat rows that run it, and their precision."""
    size, found, large = codes.size, np.unique(codes).tolist() or [_DENSE], _large(m, n, k)
    if len(found) == 1 and large is None:
        for start in range(0, max(size, 1), CHUNK):
            yield found[0], slice(start, start + CHUNK), PRECISION
        return
    groups = [(code, codes.reshape(-1) == code) for code in found]
    parts = [(code, mask, PRECISION) for code, mask in groups]
    if large is not None:
        parts = [(code, mask & ~large, PRECISION) for code, mask in groups]
        parts += [(code, mask & large, np.float64) for code, mask in groups]
    for code, mask, precision in parts:
        at = np.flatnonzero(mask)
        for start in range(0, len(at), CHUNK):
            yield code, at[start : start + CHUNK], precision
