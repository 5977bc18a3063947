"""Exact shapes: GEMM times measured on a device, kept with its profile and used in place of the model's where m, n and k match.

Use :func:`exact_of` to read them from a profile's arrays, :meth:`Exact.at` to look shapes up (:func:`lookup` does both), and
:func:`overlay` to put them in the place of predictions. The arrays are
``exact_m``, ``exact_n``, ``exact_k``, ``exact_s`` (seconds, cold weights, plain dense kernel) and ``exact_log_half`` (log half-width of the
90 % interval); ``calibration.records.exact`` makes them from records.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.hardware.checks import check_exact
from simulator.hardware.constants import EXACT_BITS
from simulator.hardware.constants import EXACT_NAMES as NAMES

F = NDArray[np.float64]


LEVEL = 0.9
"""Level of the interval that ``exact_log_half`` belongs to."""

_LIMITS = tuple(float(2**bits) for bits in EXACT_BITS)


@dataclass(frozen=True)
class Exact:
    """Measured shapes, sorted by key.

    Attributes
    ----------
    key : uint64 array (shapes,)
        m, n and k in one number.
    seconds : float64 array, s
    log_half : float64 array
        Log half-width of the interval at :data:`LEVEL`.
    """

    key: NDArray[np.uint64]
    seconds: F
    log_half: F

    def __len__(self) -> int:
        return len(self.key)

    def at(self, m: Any, n: Any, k: Any) -> tuple[NDArray[np.bool_], F, F]:
        """Which shapes were measured, their times, and the log half-widths; NaN where they were not.

        Parameters
        ----------
        m, n, k : arrays of one shape
        """
        m, n, k = (np.asarray(v, dtype=np.float64) for v in (m, n, k))
        key = pack(m, n, k)
        place = np.minimum(np.searchsorted(self.key, key), len(self.key) - 1)
        hit = np.asarray((self.key[place] == key) & _inside(m, n, k), dtype=np.bool_)
        return hit, np.where(hit, self.seconds[place], np.nan), np.where(hit, self.log_half[place], np.nan)


def exact_of(arrays: Mapping[str, NDArray[Any]]) -> Exact | None:
    """The exact shapes of a section's arrays; None where there are none.

    Raises
    ------
    ValueError
        When one of the arrays is missing, lengths differ, a dimension is no whole number in range, or a time is not above zero.

    Examples
    --------
    >>> exact = exact_of({n: np.array(v) for n, v in zip(NAMES, ([1, 8], [64, 64], [32, 32], [1e-6, 2e-6], [0.01, 0.01]))})
    >>> hit, seconds, _ = exact.at(np.array([8, 9]), np.array([64, 64]), np.array([32, 32]))
    >>> hit.tolist(), float(seconds[0])
    ([True, False], 2e-06)
    """
    if "exact_m" not in arrays:
        return None
    check_exact(arrays)
    m, n, k, seconds, log_half = (np.asarray(arrays[name], dtype=np.float64) for name in NAMES)
    if not len(m):
        return None
    key, first = np.unique(pack(m, n, k), return_index=True)
    return Exact(key, seconds[first], log_half[first])


def lookup(arrays: Mapping[str, NDArray[Any]], m: Any, n: Any, k: Any) -> tuple[NDArray[np.bool_], F, F]:
    """Which shapes a section has measured, their times, s, and the log half-widths of their 90 % intervals; NaN where it has not.

    Parameters
    ----------
    arrays : mapping of str to array
        Of a profile's GEMM section.
    m, n, k : arrays of one shape
        Tokens, output features, input features.

    Examples
    --------
    >>> lookup({}, np.array([1]), np.array([8]), np.array([8]))[0].tolist()
    [False]
    """
    exact = exact_of(arrays)
    if exact is None:
        shape = np.shape(m)
        return np.zeros(shape, dtype=np.bool_), np.full(shape, np.nan), np.full(shape, np.nan)
    return exact.at(m, n, k)


def overlay(out: dict[str, Any], exact: Exact | None, m: Any, n: Any, k: Any, level: float) -> None:
    """Put measured times in the place of predicted ones, in the columns of a prediction: ``seconds``, ``lower``, ``upper``, ``measured``.

    Parameters
    ----------
    out : dict of str to array
        Columns of equal length, changed in place; ``measured`` is made.
    exact : Exact, optional
        None: nothing was measured.
    m, n, k : arrays of that length
    level : float
        Of the interval.

    Examples
    --------
    >>> exact = exact_of({n: np.array(v) for n, v in zip(NAMES, ([8], [64], [32], [2e-6], [0.0]))})
    >>> out = {name: np.array([1e-6, 1e-6]) for name in ("seconds", "lower", "upper")}
    >>> overlay(out, exact, np.array([8, 9]), np.array([64, 64]), np.array([32, 32]), 0.9)
    >>> out["seconds"].tolist(), out["measured"].tolist()
    ([2e-06, 1e-06], [True, False])
    """
    out["measured"] = np.zeros(len(out["seconds"]), dtype=np.bool_)
    if exact is None:
        return
    hit, seconds, log_half = exact.at(m, n, k)
    if not hit.any():
        return
    out["measured"], seconds = hit, seconds[hit]
    width = np.exp(width_at(log_half[hit], level))
    for name, values in (("seconds", seconds), ("lower", seconds / width), ("upper", seconds * width)):
        out[name][hit] = values


def width_at(log_half: F, level: float) -> F:
    """Log half-widths at another level than :data:`LEVEL`, as a normal distribution would have them.

    >>> round(float(width_at(np.array([0.01]), 0.99)[0]), 4)
    0.0157
    """
    normal = NormalDist()
    return log_half * (normal.inv_cdf(0.5 + 0.5 * level) / normal.inv_cdf(0.5 + 0.5 * LEVEL))


def pack(m: F, n: F, k: F) -> NDArray[np.uint64]:
    """m, n and k in one number; shapes out of range give a meaningless one.

    >>> int(pack(np.array([1.0]), np.array([2.0]), np.array([3.0]))[0]) == 2**42 + 2 * 2**21 + 3
    True
    """
    inside = [np.clip(v, 0.0, limit - 1.0).astype(np.uint64) for v, limit in zip((m, n, k), _LIMITS, strict=True)]
    out: NDArray[np.uint64] = (
        (inside[0] << np.uint64(EXACT_BITS[1] + EXACT_BITS[2])) | (inside[1] << np.uint64(EXACT_BITS[2])) | inside[2]
    )
    return out


def _inside(m: F, n: F, k: F) -> NDArray[np.bool_]:
    """Whole numbers that a key can hold."""
    good = np.ones(np.shape(m), dtype=np.bool_)
    for value, limit in zip((m, n, k), _LIMITS, strict=True):
        good &= (value >= 1.0) & (value < limit) & (value == np.floor(value))
    return good
