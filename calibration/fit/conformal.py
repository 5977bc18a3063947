"""Split-conformal intervals and errors from log residuals of rows a fit did not see.

:func:`bands` and :func:`pair_bands` are for GEMMs and their ratios, :func:`outer_bands` for attention and elementwise
operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from calibration.fit.core import Shapes
from simulator.hardware.profile import Interval, Section
from simulator.kernels.gemm_core import Core, CoreTime
from simulator.kernels.intervals import PAIR_EDGES, PAIR_REGIMES, REGIMES, regimes

F = NDArray[np.float64]

LEVEL = 0.9
PRIOR_GROUPS = 4.0
ENOUGH, OUTER_ENOUGH = 40, 20
"""Rows a regime needs for its own quantiles: with fewer, a GEMM's are mixed with all rows, others take those of all
rows."""


def accuracy_of(log_ratio: F) -> dict[str, float]:
    """Mean, median and 95th percentile of the relative error and its signed mean, from log predicted over measured
    times."""
    error = np.expm1(log_ratio)
    size = np.abs(error)
    scores = {"mape": size.mean(), "median": np.median(size), "p95": np.quantile(size, 0.95), "bias": error.mean()}
    return {name: float(v) for name, v in scores.items()}


def quantiles(errors: F, level: float = LEVEL) -> tuple[float, float]:
    """Lower and upper log multiplier: quantiles of log measured over predicted with the finite-sample correction of
    split-conformal prediction."""
    tail = (1.0 - level) / 2.0
    up = min(1.0, (1.0 - tail) * (len(errors) + 1) / len(errors))
    return float(np.quantile(errors, 1.0 - up)), float(np.quantile(errors, up))


def few_groups(count: int, level: float = LEVEL) -> float:
    """Factor that widens intervals learnt on few (n, k) pairs: Student's quantile with a degree of freedom a pair, over
    the normal one.

    Errors within a pair are alike, so that a table of three projections says little about a fourth, however many m it
    holds.

    >>> few_groups(2) > 1.7, few_groups(300) < 1.01
    (True, True)
    """
    tail = 0.5 + 0.5 * level
    return float(student.ppf(tail, max(count, 1)) / student.ppf(tail, np.inf))


def bands(
    log_ratio: F, m: F, parts: CoreTime, core: Core, groups: int, prior: Section | None = None, level: float = LEVEL
) -> tuple[Interval, ...]:
    """Intervals by regime of single GEMMs, from log predicted over measured of unseen shapes of ``groups`` (n, k)
    pairs.

    ``parts`` of ``core`` decide the regime. On few pairs the intervals of ``prior`` count for as much as
    :data:`PRIOR_GROUPS` pairs of one's own.
    """
    errors = -log_ratio
    regime = regimes(m, parts, core)
    everywhere = quantiles(errors, level)
    wider = few_groups(groups, level)
    known = {i.regime: (np.log(i.low), np.log(i.high)) for i in prior.intervals} if prior is not None else {}
    out = []
    for i, name in enumerate(REGIMES):
        own = errors[regime == i]
        share = min(1.0, len(own) / ENOUGH)
        mine = quantiles(own, level) if len(own) >= 10 else everywhere
        low, high = (wider * (share * x + (1.0 - share) * y) for x, y in zip(mine, everywhere, strict=True))
        if name in known:
            trust = groups / (groups + PRIOR_GROUPS)
            low, high = (trust * x + (1.0 - trust) * y for x, y in zip((low, high), known[name], strict=True))
        out.append(Interval(name, float(np.exp(min(low, -1e-4))), float(np.exp(max(high, 1e-4))), level, len(own)))
    return tuple(out)


def pair_bands(log_ratio: F, data: Shapes, level: float = LEVEL, limit: int = 200_000) -> tuple[Interval, ...]:
    """Intervals of a ratio of two times, by the distance of the shapes in octaves: errors of neighbours cancel."""
    small, large = neighbours(data, limit).T
    difference = np.abs(log_ratio[small] - log_ratio[large])
    octaves = sum(np.abs(np.log2(a[small]) - np.log2(a[large])) for a in (data.m, data.n, data.k))
    where = np.searchsorted(PAIR_EDGES, octaves, side="left")
    out = []
    for i, name in enumerate(PAIR_REGIMES):
        own = difference[where == i]
        if len(own) >= ENOUGH:
            half = float(np.quantile(own, level))
            out.append(Interval(name, float(np.exp(-half)), float(np.exp(half)), level, len(own)))
    return tuple(out)


def outer_bands(log_ratio: F, regime: NDArray[np.intp], names: Sequence[str], level: float = LEVEL) -> list[Interval]:
    """Intervals by regime (an index into ``names``) from log predicted over measured of unseen rows: the rows next
    beyond the quantiles.

    An interval always holds the prediction itself, also where a biased fit puts all its errors on one side.
    """
    errors, tail = -log_ratio, 0.5 * (1.0 - level)
    out = []
    for i, name in enumerate(names):
        mine = errors[regime == i]
        used = mine if len(mine) >= OUTER_ENOUGH else errors
        n = len(used)
        low = np.quantile(used, max(tail - tail / n, 0.0), method="lower")
        high = np.quantile(used, min(1.0 - tail + (1.0 - tail) / n, 1.0), method="higher")
        out.append(Interval(name, float(np.exp(min(low, 0.0))), float(np.exp(max(high, 0.0))), level, len(mine)))
    return out


def neighbours(data: Any, limit: int | None = None, low: float = 0.25, seed: int = 0) -> NDArray[np.intp]:
    """Pairs (smaller, larger) of rows that differ in exactly one of m, n, k, by a ratio in [``low``, 1); at most
    ``limit`` of them, drawn at random."""
    columns = [np.asarray(v) for v in (data.m, data.n, data.k)]
    out = []
    for axis in range(3):
        a, b = (columns[i] for i in range(3) if i != axis)
        key = a * 2.0**24 + b
        order = np.lexsort((columns[axis], key))
        edges = np.flatnonzero(np.diff(key[order])) + 1
        for rows in np.split(order, edges):
            size = columns[axis][rows]
            i, j = np.triu_indices(len(rows), 1)
            ratio = size[i] / size[j]
            near = (ratio >= low) & (ratio < 1.0)
            out.append(np.stack([rows[i[near]], rows[j[near]]], axis=1))
    pairs = np.concatenate(out)
    if limit is not None and len(pairs) > limit:
        pairs = pairs[np.random.default_rng(seed).choice(len(pairs), limit, replace=False)]
    return pairs
