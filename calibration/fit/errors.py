"""Scores of held-out rows: errors (:func:`accuracy_of`), the section scale (:func:`section_scale`), and pairs of rows
whose ratio is a speedup (:func:`neighbours`)."""

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
    """Return the mean ("mape"), "median" and "p95" of absolute relative errors, and their signed mean "bias"."""
    size = np.abs(error)
    scores = {"mape": size.mean(), "median": np.median(size), "p95": np.quantile(size, 0.95), "bias": error.mean()}
    return {name: float(v) for name, v in scores.items()}


def few_groups(count: int) -> float:
    """Return the factor that widens intervals fitted on few (n, k) pairs, within which errors are similar: Student's
    quantile with one degree of freedom per pair, over the normal one."""
    tail = 0.5 + 0.5 * LEVEL
    return float(student.ppf(tail, max(count, 1)) / student.ppf(tail, np.inf))


def section_scale(log_ratio: FloatArray, uncertainty: Uncertainty) -> float:
    """Return the factor in [0.2, 5] on correlated and independent errors at which 90 % intervals cover nine in ten
    held-out rows; ``log_ratio`` is log predicted over measured, ``uncertainty`` that of a section scale of 1."""
    systematic = np.einsum("cn,cn->n", uncertainty.systematic, uncertainty.systematic)
    scaled = np.maximum(uncertainty.variance - systematic, 1e-12)
    needed = ((log_ratio / COVERAGE_FACTOR) ** 2 - systematic) / scaled
    return float(np.sqrt(np.clip(np.quantile(needed, LEVEL), 0.2**2, 5.0**2)))


def neighbours(sizes: Sequence[FloatArray]) -> NDArray[np.intp]:
    """Return pairs (smaller, larger) of rows that differ in exactly one of several sizes, by a ratio in [0.25, 1)."""
    return np.concatenate([pairs_along(s, [*sizes[:i], *sizes[i + 1 :]]) for i, s in enumerate(sizes)])


def pairs_along(size: FloatArray, others: Sequence[FloatArray]) -> NDArray[np.intp]:
    """Return such pairs of rows that are equal in ``others``, ordered by the number of sizes between them."""
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
    return order[np.concatenate(found)]
