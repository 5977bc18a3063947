"""GEMM times that a profile stores for exact m, n, k and that replace the prediction there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.arrays import FloatArray
from simulator.operators.base import MeasuredOperators

EXACT_NAMES: tuple[str, ...] = ("exact_m", "exact_n", "exact_k", "exact_s", "exact_log_half")
"""Arrays of exact shapes, of equal length; a profile has all of them or none."""

EXACT_BITS: tuple[int, ...] = (22, 21, 21)
"""Bits of m, n and k in the 64-bit key of an exact shape; a dimension that does not fit is never found."""


@dataclass(frozen=True)
class MeasuredShapes:
    """Measured shapes, sorted by key (m, n and k in one number)."""

    key: NDArray[np.uint64]
    seconds: FloatArray
    log_half: FloatArray  # log half-width of the 90 % interval

    def at(self, m: Any, n: Any, k: Any) -> MeasuredOperators:
        """Return which shapes were measured, their times and half-widths."""
        sizes = [np.asarray(v, dtype=np.float64) for v in (m, n, k)]
        key = pack(*sizes)
        row = np.minimum(np.searchsorted(self.key, key), len(self.key) - 1)
        hit = np.asarray(self.key[row] == key, dtype=np.bool_)
        for value, bits in zip(sizes, EXACT_BITS, strict=True):  # whole numbers that a key can hold
            hit &= (value >= 1.0) & (value < 2.0**bits) & (value == np.floor(value))
        return MeasuredOperators(hit, self.seconds[row[hit]], self.log_half[row[hit]])


def measured_shapes(arrays: Mapping[str, NDArray[Any]]) -> MeasuredShapes | None:
    """Return the measured shapes of a section's arrays, None without any; ValueError where they cannot be looked up.
    ``exact_m``, ``exact_n``, ``exact_k``; ``exact_s``: seconds, cold weights, plain dense kernel; ``exact_log_half``:
    log half-width of the 90 % interval. ``calibration.records.screening`` makes them from records."""
    if "exact_m" not in arrays:
        return None
    check_exact(arrays)
    m, n, k, seconds, log_half = (np.asarray(arrays[name], dtype=np.float64) for name in EXACT_NAMES)
    if not len(m):
        return None
    key, first = np.unique(pack(m, n, k), return_index=True)
    return MeasuredShapes(key, seconds[first], log_half[first])


def pack(m: FloatArray, n: FloatArray, k: FloatArray) -> NDArray[np.uint64]:
    """Return m, n and k in one number; shapes out of range give a meaningless one."""
    key = np.zeros(np.shape(m), dtype=np.uint64)
    for value, bits in zip((m, n, k), EXACT_BITS, strict=True):
        key = (key << np.uint64(bits)) | np.clip(value, 0.0, 2.0**bits - 1.0).astype(np.uint64)
    return key


def check_exact(arrays: Mapping[str, NDArray[Any]]) -> None:
    """Raise ValueError for exact shapes that cannot be looked up: missing arrays, unequal lengths, or bad values."""
    if missing := [name for name in EXACT_NAMES if name not in arrays]:
        raise ValueError(f"exact shapes: array {missing[0]} is missing")
    *shape, seconds, log_half = (np.asarray(arrays[name], dtype=np.float64) for name in EXACT_NAMES)
    if seconds.ndim != 1 or any(a.shape != seconds.shape for a in (*shape, log_half)):
        found = [np.shape(arrays[name]) for name in EXACT_NAMES]
        raise ValueError(f"exact shapes: expected arrays of one length, got {found}")
    if not all(((a >= 1) & (a < 2.0**bits) & (a == np.floor(a))).all() for a, bits in zip(shape, EXACT_BITS)):
        raise ValueError("exact shapes: m, n and k must be whole numbers from 1 to 2^22, 2^21 and 2^21")
    if not ((seconds > 0) & np.isfinite(seconds) & (log_half >= 0) & np.isfinite(log_half)).all():
        raise ValueError("exact shapes: times must be above zero, half-widths at least zero")
