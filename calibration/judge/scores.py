"""The numbers of a validation: errors of times and of speedups, by size and by regime, and how often an interval holds.

Use :func:`summary` for all of them as plain data, or :func:`errors`, :func:`by_size`, :func:`speedups` and :func:`coverage` one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.judge.validate import Part, Report

F = NDArray[np.float64]

M_RANGES: tuple[tuple[str, float, float], ...] = (
    ("m <= 16", 0.0, 16.0),
    ("m 17-256", 16.0, 256.0),
    ("m > 256", 256.0, np.inf),
)
PAIRS = 200_000
"""Pairs of rows that speedups are judged on; more are drawn from by chance."""


def errors(predicted_s: F, measured_s: F) -> dict[str, float]:
    """Accuracy of times, as fractions.

    Returns
    -------
    dict
        "mape", "median" and "p95" of the absolute relative error, and its signed mean "bias".

    Examples
    --------
    >>> errors(np.array([1.1, 0.9]), np.array([1.0, 1.0]))["mape"].__round__(3)
    0.1
    """
    e = predicted_s / measured_s - 1.0
    a = np.abs(e)
    return {
        "mape": float(a.mean()),
        "median": float(np.median(a)),
        "p95": float(np.quantile(a, 0.95)),
        "bias": float(e.mean()),
    }


def by_size(part: Part, name: str, bins: int = 12) -> list[dict[str, float]]:
    """Errors over one dimension, in at most ``bins`` ranges that hold equal numbers of distinct sizes.

    Returns
    -------
    list of dict
        "low", "high" (of the sizes), "rows", and the values of :func:`errors`.
    """
    values = np.unique(part.sizes[name])
    out = []
    for chunk in np.array_split(values, min(bins, len(values))):
        rows = (part.sizes[name] >= chunk[0]) & (part.sizes[name] <= chunk[-1])
        out.append(
            {
                "low": float(chunk[0]),
                "high": float(chunk[-1]),
                "rows": int(rows.sum()),
                **errors(part.predicted_s[rows], part.measured_s[rows]),
            }
        )
    return out


def pairs(sizes: Mapping[str, F], limit: int = PAIRS, low: float = 0.25, seed: int = 0) -> NDArray[np.intp]:
    """Pairs (smaller, larger) of rows that differ in exactly one size, by a ratio in [``low``, 1); at most ``limit``, drawn by chance.

    >>> pairs({"m": np.array([1.0, 2.0, 8.0]), "n": np.array([4.0, 4.0, 4.0])}).tolist()
    [[0, 1], [1, 2]]
    """
    names = list(sizes)
    out = []
    for axis in names:
        others = np.stack([sizes[o] for o in names if o != axis] or [np.zeros(len(sizes[axis]))], axis=1)
        key = np.unique(others, axis=0, return_inverse=True)[1].reshape(-1)
        order = np.lexsort((sizes[axis], key))
        key, size = key[order], sizes[axis][order]
        for gap in range(1, len(key)):
            same = key[gap:] == key[:-gap]
            if not same.any():
                break
            ratio = size[:-gap] / np.where(size[gap:] > 0, size[gap:], 1.0)
            at = np.flatnonzero(same & (ratio >= low) & (ratio < 1.0))
            out.append(np.stack([order[at], order[at + gap]], axis=1))
    found = np.concatenate(out) if out else np.zeros((0, 2), dtype=np.intp)
    if len(found) > limit:
        found = found[np.sort(np.random.default_rng(seed).choice(len(found), limit, replace=False))]
    return found


def speedups(part: Part, limit: int = PAIRS) -> dict[str, float]:
    """Accuracy of ratios of two times, over pairs of rows that differ in one size only by a ratio in [0.25, 1).

    Returns
    -------
    dict
        "pairs" and, where there are any, "median" and "p95" of the absolute relative error of the speedup, and "spearman" of predicted
        against measured speedup.
    """
    sizes = {name: v for name, v in part.sizes.items() if name != "role"}
    at = pairs(sizes, limit)
    if not len(at):
        return {"pairs": 0}
    from scipy.stats import spearmanr

    predicted = part.predicted_s[at[:, 1]] / part.predicted_s[at[:, 0]]
    measured = part.measured_s[at[:, 1]] / part.measured_s[at[:, 0]]
    e = np.abs(predicted / measured - 1.0)
    rank = (
        float(spearmanr(predicted, measured).statistic)
        if len(at) > 2 and np.ptp(predicted) > 0 and np.ptp(measured) > 0
        else float("nan")
    )
    return {"pairs": len(at), "median": float(np.median(e)), "p95": float(np.quantile(e, 0.95)), "spearman": rank}


def coverage(part: Part) -> list[dict[str, Any]]:
    """Share of the measured times inside their interval and its geometric half width, in all and by regime.

    Returns
    -------
    list of dict
        "regime" ("all" first), "rows", "coverage", "width" (a factor less 1).
    """
    inside = (part.measured_s >= part.lower_s) & (part.measured_s <= part.upper_s)
    half = 0.5 * np.log(part.upper_s / part.lower_s)
    out = []
    for name in ["all", *sorted(set(part.regime.tolist()))]:
        rows = np.ones(len(part), dtype=bool) if name == "all" else part.regime == name
        out.append(
            {
                "regime": name,
                "rows": int(rows.sum()),
                "coverage": float(inside[rows].mean()),
                "width": float(np.expm1(half[rows].mean())),
            }
        )
    return out


def part_summary(part: Part) -> dict[str, Any]:
    """Every number of one part as plain data."""
    out: dict[str, Any] = {
        "operator": part.operator,
        "dtype": part.dtype,
        "rows": len(part),
        "status": part.status,
        "fitted_on_these_rows": part.seen,
        "errors": errors(part.predicted_s, part.measured_s),
        "roofline": errors(part.roofline_s, part.measured_s),
        "simple": errors(part.simple_s, part.measured_s),
        "speedup": speedups(part),
        "coverage": coverage(part),
    }
    if "m" in part.sizes:
        m = part.sizes["m"]
        masks = {name: (m > low) & (m <= high) for name, low, high in M_RANGES}
        out["by_m"] = {
            name: {"rows": int(rows.sum()), **errors(part.predicted_s[rows], part.measured_s[rows])}
            for name, rows in masks.items()
            if rows.any()
        }
    out["by_size"] = {name: by_size(part, name) for name in part.sizes if name != "role"}
    return out


def summary(report: Report) -> dict[str, Any]:
    """A report as plain data: what ``prunesim validate --json`` prints."""
    return {
        "hardware": report.hardware,
        "measured_on": report.device,
        "software": report.software,
        "level": report.level,
        "held_out_when_fitted": {name: dict(values) for name, values in report.accuracy.items()},
        "skipped": dict(report.skipped),
        "parts": [part_summary(part) for part in report.parts],
    }
