"""Split-conformal intervals and errors from log residuals of rows a fit did not see.

:func:`bands` and :func:`pair_bands` are for GEMMs and their ratios, :func:`outer_bands` for attention and elementwise
operators.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from calibration.fit.core import Shapes
from calibration.fit.solver import numbered
from simulator.hardware.profile import Interval, Section
from simulator.kernels.gemm_core import Core, CoreTime
from simulator.kernels.intervals import PAIR_EDGES, PAIR_REGIMES, REGIMES, regimes

F = NDArray[np.float64]

LEVEL = 0.9
PRIOR_GROUPS = 4.0
ENOUGH, OUTER_ENOUGH = 40, 20
"""Rows a regime needs for its own quantiles: with fewer, a GEMM's are mixed with all rows, others take those of all
rows."""


def accuracy_of(error: F) -> dict[str, float]:
    """Mean ("mape"), "median" and "p95" of the size of relative errors, and their signed mean "bias".

    >>> accuracy_of(np.array([0.125, -0.25]))["mape"]
    0.1875
    """
    size = np.abs(error)
    scores = {"mape": size.mean(), "median": np.median(size), "p95": np.quantile(size, 0.95), "bias": error.mean()}
    return {name: float(v) for name, v in scores.items()}


def quantiles(errors: F) -> tuple[float, float]:
    """Lower and upper log multiplier: quantiles of log measured over predicted with the finite-sample correction of
    split-conformal prediction."""
    tail = (1.0 - LEVEL) / 2.0
    up = min(1.0, (1.0 - tail) * (len(errors) + 1) / len(errors))
    return float(np.quantile(errors, 1.0 - up)), float(np.quantile(errors, up))


def few_groups(count: int) -> float:
    """Factor that widens intervals learnt on few (n, k) pairs: Student's quantile with a degree of freedom a pair, over
    the normal one.

    Errors within a pair are alike, so that a table of three projections says little about a fourth, however many m it
    holds.
    """
    tail = 0.5 + 0.5 * LEVEL
    return float(student.ppf(tail, max(count, 1)) / student.ppf(tail, np.inf))


def bands(
    log_ratio: F, m: F, parts: CoreTime, core: Core, groups: int, prior: Section | None = None
) -> tuple[Interval, ...]:
    """Intervals by regime of single GEMMs, from log predicted over measured of unseen shapes of ``groups`` (n, k)
    pairs.

    ``parts`` of ``core`` decide the regime. On few pairs the intervals of ``prior`` count for as much as
    :data:`PRIOR_GROUPS` pairs of one's own.
    """
    errors = -log_ratio
    regime = regimes(m, parts, core)
    everywhere = quantiles(errors)
    wider = few_groups(groups)
    known = {i.regime: (np.log(i.low), np.log(i.high)) for i in prior.intervals} if prior is not None else {}
    out = []
    for i, name in enumerate(REGIMES):
        own = errors[regime == i]
        share = min(1.0, len(own) / ENOUGH)
        mine = quantiles(own) if len(own) >= 10 else everywhere
        low, high = (wider * (share * x + (1.0 - share) * y) for x, y in zip(mine, everywhere, strict=True))
        if name in known:
            trust = groups / (groups + PRIOR_GROUPS)
            low, high = (trust * x + (1.0 - trust) * y for x, y in zip((low, high), known[name], strict=True))
        out.append(Interval(name, float(np.exp(min(low, -1e-4))), float(np.exp(max(high, 1e-4))), LEVEL, len(own)))
    return tuple(out)


def pair_bands(log_ratio: F, data: Shapes, limit: int = 200_000) -> tuple[Interval, ...]:
    """Intervals of a ratio of two times, by the distance of the shapes in octaves: errors of neighbours cancel."""
    sizes = data.m, data.n, data.k
    pairs = neighbours(sizes, nested=True)
    if len(pairs) > limit:
        pairs = pairs[np.random.default_rng(0).choice(len(pairs), limit, replace=False)]
    small, large = pairs.T
    difference = np.abs(log_ratio[small] - log_ratio[large])
    octaves = sum(np.abs(np.log2(a[small]) - np.log2(a[large])) for a in sizes)
    where = np.searchsorted(PAIR_EDGES, octaves, side="left")
    out = []
    for i, name in enumerate(PAIR_REGIMES):
        own = difference[where == i]
        if len(own) >= ENOUGH:
            half = float(np.quantile(own, LEVEL))
            out.append(Interval(name, float(np.exp(-half)), float(np.exp(half)), LEVEL, len(own)))
    return tuple(out)


def outer_bands(log_ratio: F, regime: NDArray[np.intp], names: Sequence[str]) -> list[Interval]:
    """Intervals by regime (an index into ``names``) from log predicted over measured of unseen rows: the rows next
    beyond the quantiles.

    An interval always holds the prediction itself, also where a biased fit puts all its errors on one side.
    """
    errors, tail = -log_ratio, 0.5 * (1.0 - LEVEL)
    out = []
    for i, name in enumerate(names):
        mine = errors[regime == i]
        used = mine if len(mine) >= OUTER_ENOUGH else errors
        n = len(used)
        low = np.quantile(used, max(tail - tail / n, 0.0), method="lower")
        high = np.quantile(used, min(1.0 - tail + (1.0 - tail) / n, 1.0), method="higher")
        out.append(Interval(name, float(np.exp(min(low, 0.0))), float(np.exp(max(high, 0.0))), LEVEL, len(mine)))
    return out


def neighbours(sizes: Sequence[F], nested: bool = False) -> NDArray[np.intp]:
    """Pairs (smaller, larger) of rows that differ in exactly one of several sizes, by a ratio in [0.25, 1).

    >>> neighbours([np.array([1.0, 2.0, 8.0]), np.array([4.0, 4.0, 4.0])]).tolist()
    [[0, 1], [1, 2]]
    """
    return np.concatenate([pairs_along(s, [*sizes[:i], *sizes[i + 1 :]], nested) for i, s in enumerate(sizes)])


def pairs_along(size: F, others: Sequence[F], nested: bool = False) -> NDArray[np.intp]:
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
