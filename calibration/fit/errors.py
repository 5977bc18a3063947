"""What log residuals of rows that a fit did not see say: errors (:func:`accuracy_of`) and the factor on a shape's own
errors that holds them (:func:`spread_of`); and pairs of rows whose ratio is a speedup (:func:`neighbours`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from calibration.fit.solver import numbered
from simulator.arrays import FloatArray
from simulator.uncertainty.factors import COVERAGE_FACTOR, Uncertainty

LEVEL = 0.9


def accuracy_of(error: FloatArray) -> dict[str, float]:
    """Mean ("mape"), "median" and "p95" of the size of relative errors, and their signed mean "bias".

    >>> accuracy_of(np.array([0.125, -0.25]))["mape"]
    0.1875
    """
    size = np.abs(error)
    scores = {"mape": size.mean(), "median": np.median(size), "p95": np.quantile(size, 0.95), "bias": error.mean()}
    return {name: float(v) for name, v in scores.items()}


def few_groups(count: int) -> float:
    """Factor that widens intervals learnt on few (n, k) pairs: Student's quantile with a degree of freedom a pair, over
    the normal one.

    Errors within a pair are alike, so that a table of three projections says little about a fourth, however many m it
    holds.
    """
    tail = 0.5 + 0.5 * LEVEL
    return float(student.ppf(tail, max(count, 1)) / student.ppf(tail, np.inf))


def spread_of(log_ratio: FloatArray, uncertainty: Uncertainty) -> float:
    """Factor on local and own errors at which 90 % intervals hold nine in ten of some errors of unseen rows.

    ``log_ratio`` (n,) is log predicted over measured, ``uncertainty`` that of the rows on their own stack, the factor
    1. In [0.2, 5].
    """
    shared = np.einsum("cn,cn->n", uncertainty.shared, uncertainty.shared)
    needed = ((log_ratio / COVERAGE_FACTOR) ** 2 - shared) / np.maximum(uncertainty.variance - shared, 1e-12)
    return float(np.sqrt(np.clip(np.quantile(needed, LEVEL), 0.2**2, 5.0**2)))


def neighbours(sizes: Sequence[FloatArray], nested: bool = False) -> NDArray[np.intp]:
    """Pairs (smaller, larger) of rows that differ in exactly one of several sizes, by a ratio in [0.25, 1).

    >>> neighbours([np.array([1.0, 2.0, 8.0]), np.array([4.0, 4.0, 4.0])]).tolist()
    [[0, 1], [1, 2]]
    """
    return np.concatenate([pairs_along(s, [*sizes[:i], *sizes[i + 1 :]], nested) for i, s in enumerate(sizes)])


def pairs_along(size: FloatArray, others: Sequence[FloatArray], nested: bool = False) -> NDArray[np.intp]:
    """Pairs (smaller, larger) of rows equal in all ``others`` and whose ``size`` differs by a ratio in [0.25, 1): in
    the order of how many sizes lie between the two, or (``nested``) all pairs of a smaller one together.

    >>> pairs_along(np.array([1.0, 8.0, 2.0]), []).tolist()
    [[0, 2], [2, 1]]
    """
    key = numbered(*others) if len(others) else np.zeros(len(size), dtype=np.intp)
    order = np.lexsort((size, key))
    key, size = key[order], size[order]
    found = [np.zeros((0, 2), dtype=np.intp)]
    for gap in range(1, len(key)):
        same = key[gap:] == key[:-gap]
        if not same.any():
            break
        ratio = size[:-gap] / np.where(size[gap:] > 0, size[gap:], 1.0)
        at = np.flatnonzero(same & (ratio >= 0.25) & (ratio < 1.0))
        found.append(np.stack([at, at + gap], axis=1))
    pairs = np.concatenate(found)
    return order[pairs[np.lexsort(pairs.T[::-1])] if nested else pairs]
