"""Scores of predictions: errors of times and of speedups, by size, and coverage of intervals.

Use :func:`errors` and :func:`speedups` with arrays; :func:`summary` for all scores of a report as plain data. Scores
are fractions, or percent with ``scale=100``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.fit.errors import accuracy_of, neighbours
from calibration.validation.validate import Report, ReportPart
from simulator.arrays import FloatArray

M_RANGES: tuple[tuple[str, str, float, float], ...] = (
    ("m <= 16", "m<=16", 0.0, 16.0),
    ("m 17-256", "m<=256", 16.0, 256.0),
    ("m > 256", "m>256", 256.0, np.inf),
)
"""Title, key of a score, and bounds (low, high] of each range of m for which errors are reported."""
PAIRS = 200_000
"""Most pairs of rows for the speedups of a report; of more, a random sample."""


def m_ranges(m: FloatArray) -> Iterator[tuple[str, str, NDArray[np.bool_]]]:
    """Yield title, key and rows of each of :data:`M_RANGES` that has rows."""
    for title, key, low, high in M_RANGES:
        rows = (m > low) & (m <= high)
        if rows.any():
            yield title, key, rows


def errors(predicted_s: FloatArray, measured_s: FloatArray, scale: float = 1.0) -> dict[str, float]:
    """Return :func:`calibration.fit.errors.accuracy_of` of times."""
    return accuracy_of(scale * (predicted_s / measured_s - 1.0))


def spearman(a: FloatArray, b: FloatArray) -> float:
    """Return the rank correlation; NaN with fewer than three values, or where one side is constant."""
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic) if len(a) > 2 and np.ptp(a) > 0 and np.ptp(b) > 0 else float("nan")


def speedups(
    predicted_s: FloatArray, measured_s: FloatArray, at: NDArray[np.intp], scale: float = 1.0
) -> dict[str, float]:
    """Return the accuracy of larger over smaller time at pairs (smaller, larger) of rows.

    "pairs" is their number. If there are any, "median" and "p95" are of the absolute relative error, and "spearman"
    compares predicted with measured.
    """
    if not len(at):
        return {"pairs": 0}
    small, large = at[:, 0], at[:, 1]
    predicted, measured = predicted_s[large] / predicted_s[small], measured_s[large] / measured_s[small]
    error = scale * np.abs(predicted / measured - 1.0)
    return {
        "pairs": len(at),
        "median": float(np.median(error)),
        "p95": float(np.quantile(error, 0.95)),
        "spearman": spearman(predicted, measured),
    }


def part_errors(part: ReportPart, rows: Any = slice(None)) -> dict[str, float]:
    """Return the errors of some rows of a part."""
    return accuracy_of(part.error[rows])


def by_size(part: ReportPart, name: str, bins: int = 12) -> list[dict[str, float]]:
    """Return errors over one size, in at most ``bins`` ranges ("low" to "high") of equal numbers of distinct sizes."""
    size = part.sizes[name]
    out: list[dict[str, float]] = []
    for chunk in np.array_split(values := np.unique(size), min(bins, len(values))):
        rows = (size >= chunk[0]) & (size <= chunk[-1])
        ends = {"low": float(chunk[0]), "high": float(chunk[-1]), "rows": int(rows.sum())}
        out.append({**ends, **part_errors(part, rows)})
    return out


def part_speedups(part: ReportPart) -> dict[str, float]:
    """Return :func:`speedups` of the rows of a part that differ in one size."""
    at = neighbours([size for name, size in part.sizes.items() if name != "role"])
    if len(at) > PAIRS:
        at = at[np.sort(np.random.default_rng(0).choice(len(at), PAIRS, replace=False))]
    return speedups(part.predicted_s, part.measured_s, at)


def coverage(part: ReportPart) -> list[dict[str, Any]]:
    """Return the coverage of measured times and the geometric half-width of their intervals (a factor less 1): "all",
    then by bottleneck."""
    inside = (part.measured_s >= part.lower_s) & (part.measured_s <= part.upper_s)
    half = 0.5 * np.log(part.upper_s / part.lower_s)
    out = []
    for bottleneck in ["all", *sorted(set(part.bottleneck.tolist()))]:
        rows = np.full(len(part), bottleneck == "all") | (part.bottleneck == bottleneck)
        share, width = float(inside[rows].mean()), float(np.expm1(half[rows].mean()))
        out.append({"bottleneck": bottleneck, "rows": int(rows.sum()), "coverage": share, "width": width})
    return out


def part_summary(part: ReportPart) -> dict[str, Any]:
    """Return all scores of one part as plain data."""
    out: dict[str, Any] = {
        "operator": part.operator,
        "dtype": part.dtype,
        "rows": len(part),
        "status": part.status,
        "fitted_on_these_rows": part.in_fit,
        "errors": part_errors(part),
        "roofline": errors(part.roofline_s, part.measured_s),
        "simple": errors(part.simple_s, part.measured_s),
        "speedup": part_speedups(part),
        "coverage": coverage(part),
    }
    if "m" in part.sizes:
        ranges = m_ranges(part.sizes["m"])
        out["by_m"] = {title: {"rows": int(rows.sum()), **part_errors(part, rows)} for title, _, rows in ranges}
    out["by_size"] = {name: by_size(part, name) for name in part.sizes if name != "role"}
    return out


def summary(report: Report) -> dict[str, Any]:
    """Return a report as plain data, the output of ``prunesim validate --json``."""
    return {
        "hardware": report.hardware,
        "measured_on": report.device,
        "software": report.software,
        "level": report.level,
        "held_out_when_fitted": {name: dict(values) for name, values in report.accuracy.items()},
        "skipped": dict(report.skipped),
        "parts": [part_summary(part) for part in report.parts],
    }
