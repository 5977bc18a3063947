"""The scores of predictions next to measurements: errors, speedups of pairs, coverage of intervals,
as fractions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from calibration.fit.section import accuracy_of
from simulator.arrays import BoolArray, FloatArray, IndexArray

# Ranges (low, high] of m for which errors are reported
M_RANGES = (("m <= 16", 0.0, 16.0), ("m 17-256", 16.0, 256.0), ("m > 256", 256.0, np.inf))


@dataclass(frozen=True, eq=False)
class ScoredRows:
    measured: FloatArray
    predicted: FloatArray
    lower: FloatArray | None = None
    upper: FloatArray | None = None
    m: FloatArray | None = None  # tokens of GEMMs, which are also scored by range of m
    pairs: IndexArray | None = None  # (smaller, larger) rows whose ratio is a speedup
    half_width: FloatArray | None = None  # half-width of the interval of each pair's log ratio


@dataclass(frozen=True)
class Comparison:
    """One measured time (s) or ratio of a whole model or GEMM, and its prediction."""

    what: str  # method, model and fraction
    where: str  # GPU, phase, batch and length
    measured: float
    predicted: float
    lower: float
    upper: float
    source: str
    assumed: str = ""  # conditions that the source does not state
    reason: str = ""  # likely reason of a large error
    engine: str = ""
    gpu: str = ""  # name of its profile
    split: str = ""  # "fit": engine parameters were fitted on this source; "judge": they were not
    own_code: bool = False  # the pruned model needed custom modelling code

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1.0

    @property
    def inside(self) -> bool:
        return self.lower <= self.measured <= self.upper


def m_ranges(m: FloatArray) -> Iterator[tuple[str, BoolArray]]:
    for name, low, high in M_RANGES:
        rows = (m > low) & (m <= high)
        if rows.any():
            yield name, rows


def errors(predicted: FloatArray, measured: FloatArray) -> dict[str, float]:
    return accuracy_of(predicted / measured - 1.0)


def spearman(a: FloatArray, b: FloatArray) -> float:
    """Return the rank correlation; NaN with fewer than three values, or where one side is
    constant."""
    from scipy.stats import spearmanr

    return (
        float(spearmanr(a, b).statistic)
        if len(a) > 2 and np.ptp(a) > 0 and np.ptp(b) > 0
        else float("nan")
    )


def speedups(predicted: FloatArray, measured: FloatArray, pairs: IndexArray) -> dict[str, float]:
    """Return the errors of the ratio of the larger to the smaller row of each pair, and the number
    of pairs."""
    if not len(pairs):
        return {"pairs": 0}
    small, large = pairs.T
    found, true = predicted[large] / predicted[small], measured[large] / measured[small]
    error = np.abs(found / true - 1.0)
    ends = {"median": float(np.median(error)), "p95": float(np.quantile(error, 0.95))}
    return {"pairs": len(pairs), **ends, "spearman": spearman(found, true)}


def score(p: ScoredRows) -> dict[str, float]:
    """Return every score that the rows allow; ``width`` is the median distance of the upper end
    from the prediction, ``half-width`` the geometric half-width."""
    error = p.predicted / p.measured - 1.0
    ranges = [] if p.m is None else [(f" {name}", rows) for name, rows in m_ranges(p.m)]
    out = {**accuracy_of(error), "median bias": np.median(error)}
    out |= {f"mape{key}": np.abs(error[rows]).mean() for key, rows in ranges}
    if p.pairs is not None:
        out |= {
            f"speedup {name}": v for name, v in speedups(p.predicted, p.measured, p.pairs).items()
        }
    if p.lower is not None and p.upper is not None:
        inside, above = (
            (p.lower <= p.measured) & (p.measured <= p.upper),
            p.upper / p.predicted - 1.0,
        )
        for key, rows in [("", np.ones(len(error), dtype=bool)), *ranges]:
            out |= {f"coverage{key}": inside[rows].mean(), f"width{key}": np.median(above[rows])}
        out["lowest coverage"] = min(v for name, v in out.items() if name.startswith("coverage"))
        out["half-width"] = np.median(np.sqrt(p.upper / p.lower)) - 1.0
    if p.pairs is not None and p.half_width is not None:
        log = np.log(p.measured / p.predicted)
        difference = np.abs(log[p.pairs[:, 0]] - log[p.pairs[:, 1]])
        out["ratio coverage"] = (difference <= p.half_width).mean()
        out["ratio width"] = np.expm1(np.median(p.half_width))
    return {name: float(v) for name, v in out.items()}


def score_of(rows: Sequence[Comparison]) -> dict[str, float]:
    values = np.array([(c.measured, c.predicted, c.lower, c.upper) for c in rows]).T
    return score(ScoredRows(*values))


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: Iterable[int] = (0,)) -> str:
    """Return a Markdown table; the columns ``left`` align left, the others right."""
    rule = ["---" if i in left else "---:" for i in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def percent(value: float, digits: str = ".1f") -> str:
    """Return a share as a cell; NaN is an empty cell."""
    return "" if np.isnan(value) else f"{100 * value:{digits}} %"
