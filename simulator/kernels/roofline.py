"""The plain datasheet roofline of GEMMs: what a FLOP-and-byte count alone would say.

Use :func:`gemm_roofline` for millions of shapes where only the bound is wanted; :func:`simulator.gemm_time` returns the same numbers as
``roofline_s`` beside the prediction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError, unknown
from simulator.workload import DTYPE_BYTES, DTYPES, dtype_code

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile

CHUNK = 16_384
"""Shapes worked on at once: five columns of them stay in a core's cache."""


def gemm_roofline(
    m: Any, n: Any, k: Any, hw: HardwareProfile, *, dtype: str = "bf16", weight_dtype: str | None = None
) -> NDArray[np.float64]:
    """max(FLOP / datasheet peak, bytes / datasheet bandwidth) of y[m, n] = x[m, k] w[k, n], operands read once, results written once.

    Parameters
    ----------
    m, n, k : int or array
        Tokens, output features, input features; at least 1. Arrays broadcast.
    hw : HardwareProfile
    dtype, weight_dtype : str
        Formats of activations and arithmetic, and of stored weights (default: the same).

    Returns
    -------
    float64 array, s
        Of the broadcast shape.

    Raises
    ------
    InputError
        For a format the device does not compute in, an unknown one, or a dimension below 1.

    Examples
    --------
    >>> from simulator import gemm_time, load_hardware
    >>> hw = load_hardware("h100")
    >>> bool(np.allclose(gemm_roofline([1, 4096], 4096, 4096, hw), gemm_time([1, 4096], 4096, 4096, hw).roofline_s, rtol=1e-6))
    True
    """
    for name in (dtype, weight_dtype or dtype):
        if name not in DTYPES:
            raise unknown("dtype", name, DTYPES)
    element, weight = (float(DTYPE_BYTES[dtype_code(name)]) for name in (dtype, weight_dtype or dtype))
    per_flop, per_byte = 2.0 / hw.peak_flop_per_s(dtype), 1.0 / hw.bandwidth_bytes_per_s
    columns = [np.asarray(x, dtype=np.float64) for x in (m, n, k)]
    shape = np.broadcast_shapes(*(c.shape for c in columns))
    rows, cols, deep = (np.broadcast_to(c, shape).reshape(-1) for c in columns)
    out = np.empty(rows.shape)
    for start in range(0, len(out), CHUNK):
        part = slice(start, start + CHUNK)
        a, b, c = rows[part], cols[part], deep[part]
        if not (a.min() >= 1.0 and b.min() >= 1.0 and c.min() >= 1.0):  # also refuses NaN
            raise InputError("m, n and k must be at least 1")
        weights = b * c
        memory = b + c
        memory *= a
        memory *= element * per_byte
        flops = weights * a
        flops *= per_flop
        weights *= weight * per_byte
        memory += weights
        np.maximum(flops, memory, out=out[part])
    return out.reshape(shape)
