"""Exact shapes: GEMM times measured on a device, kept with its profile, in place of the model's at these m, n, k.

Use :func:`exact_of` to read them from a profile's arrays, :meth:`Exact.at` to look shapes up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.arrays import FloatArray
from simulator.hardware.arrays import check_exact
from simulator.hardware.constants import EXACT_BITS
from simulator.hardware.constants import EXACT_NAMES as NAMES

LEVEL = 0.9
"""Level of the interval that ``exact_log_half`` belongs to."""


@dataclass(frozen=True)
class Exact:
    """Measured shapes, sorted by key (m, n and k in one number): seconds, log half-width of the interval."""

    key: NDArray[np.uint64]
    seconds: FloatArray
    log_half: FloatArray

    def at(self, m: Any, n: Any, k: Any) -> tuple[NDArray[np.bool_], FloatArray, FloatArray]:
        """Which shapes were measured, their times, and the log half-widths; NaN where they were not."""
        m, n, k = (np.asarray(v, dtype=np.float64) for v in (m, n, k))
        key = pack(m, n, k)
        place = np.minimum(np.searchsorted(self.key, key), len(self.key) - 1)
        hit = np.asarray(self.key[place] == key, dtype=np.bool_)
        for value, bits in zip((m, n, k), EXACT_BITS, strict=True):  # whole numbers that a key can hold
            hit &= (value >= 1.0) & (value < 2.0**bits) & (value == np.floor(value))
        return hit, np.where(hit, self.seconds[place], np.nan), np.where(hit, self.log_half[place], np.nan)


def exact_of(arrays: Mapping[str, NDArray[Any]]) -> Exact | None:
    """The exact shapes of a section's arrays, None where there are none; ValueError where they cannot be looked up.

    ``exact_m``, ``exact_n``, ``exact_k``; ``exact_s``: seconds, cold weights, plain dense kernel; ``exact_log_half``:
    log half-width of the 90 % interval. ``calibration.records.exact_shapes`` makes them from records.
    """
    if "exact_m" not in arrays:
        return None
    check_exact(arrays)
    m, n, k, seconds, log_half = (np.asarray(arrays[name], dtype=np.float64) for name in NAMES)
    if not len(m):
        return None
    key, first = np.unique(pack(m, n, k), return_index=True)
    return Exact(key, seconds[first], log_half[first])


def pack(m: FloatArray, n: FloatArray, k: FloatArray) -> NDArray[np.uint64]:
    """m, n and k in one number; shapes out of range give a meaningless one."""
    key = np.zeros(np.shape(m), dtype=np.uint64)
    for value, bits in zip((m, n, k), EXACT_BITS, strict=True):
        key = (key << np.uint64(bits)) | np.clip(value, 0.0, 2.0**bits - 1.0).astype(np.uint64)
    return key
