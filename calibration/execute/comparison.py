"""Predictions and bounds beside what a decoder took: rows of a table, and how well the two agree.

Use :func:`rows_of` with the records that :func:`calibration.execute.compare.compare` keeps, :func:`summary` and
:func:`by_phase` on the rows, :func:`repeatability` on the records. :mod:`calibration.execute.compare_figure` draws the
rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from calibration.execute.cases import Case, Key, predicted_speedup
from calibration.measure.timing import median_interval
from simulator.errors import InputError
from simulator.hardware.profile import HardwareProfile

OK = "ok"
"""Status of a record that has times."""


@dataclass(frozen=True)
class Row:
    """One comparison; the order of fields is that of columns. Times are of a forward pass; ``error`` is predicted over
    measured, less 1.

    ``measured`` is the median ratio of passes taken in turns; ``measured_lower`` and ``measured_upper`` enclose it (95
    %), or are the smallest and largest ratio where they are too few for an interval.
    """

    model: str
    device: str
    hardware: str
    family: str
    sparsity: float
    realised_sparsity: float
    phase: str
    batch: int
    seq: int
    dtype: str
    runtime: str
    dense_s: float
    pruned_s: float
    measured: float
    measured_lower: float
    measured_upper: float
    predicted_dense_s: float
    predicted_pruned_s: float
    predicted: float
    predicted_lower: float
    predicted_upper: float
    error: float
    flop_bound: float
    byte_bound: float
    roofline_bound: float
    measured_bound: float


@dataclass(frozen=True)
class Agreement:
    """How well predicted and measured speedups agree.

    ``median`` and ``p95`` are of |predicted / measured - 1|, ``bias`` is the median of predicted / measured, less 1;
    ``inside`` the share of the measured speedups in their predicted interval; ``dense_time`` the median of |predicted /
    measured - 1| of the dense times themselves.
    """

    count: int
    spearman: float
    median: float
    p95: float
    bias: float
    inside: float
    dense_time: float


def name_of(case: Case, dtype: str) -> str:
    """Text that identifies a case: equal cases, equal names."""
    w = case.dense
    layers = int((w.layer + w.layers)[w.layer >= 0].max(initial=0))
    where = f"{case.phase} batch={case.batch} seq={case.seq} {dtype} layers={layers}"
    return f"decoder {w.meta.model} {case.family} {case.sparsity:g} {where}"


def rows_of(
    cases: Sequence[Case],
    records: Iterable[Mapping[str, Any]],
    hw: HardwareProfile,
    *,
    device: str = "",
    dtype: str = "bf16",
    measured_bounds: Mapping[Key, float] | None = None,
) -> list[Row]:
    """Comparisons of the cases, in their order, that have a time and that the profile can predict.

    A pass launched from a graph, a prefill, and any pass on a CPU (whose operators' times hold their launches) are
    predicted as the sum of their operators; a decode step launched one by one on a GPU in eager mode.

    Parameters
    ----------
    records : iterable of mapping
        As :func:`calibration.execute.compare.compare` keeps them.
    measured_bounds : mapping, optional
        Keys of cases to the measured upper bound, where there is one.
    """
    found = {str(r["key"]): r for r in records if r.get("status") == OK}
    out = []
    for case in cases:
        record = found.get(name_of(case, dtype))
        if record is None:
            continue
        host_bound = record["runtime"] == "eager" and case.phase == "decode" and hw.architecture != "cpu"
        s = predicted_speedup(case, hw, "eager" if host_bound else "cuda_graph")
        if not math.isfinite(s.speedup):
            continue
        dense_s, pruned_s = (np.asarray(record[name], dtype=np.float64) for name in ("dense_s", "pruned_s"))
        ratio = dense_s / pruned_s
        measured, low, high = median_interval(ratio.tolist())
        if not math.isfinite(high):
            low, high = float(ratio.min()), float(ratio.max())
        out.append(
            Row(
                **case.columns(hw, s),
                device=device,
                dtype=dtype,
                runtime=str(record["runtime"]),
                dense_s=float(np.median(dense_s)),
                pruned_s=float(np.median(pruned_s)),
                measured=measured,
                measured_lower=low,
                measured_upper=high,
                predicted_dense_s=s.dense_s,
                predicted_pruned_s=s.pruned_s,
                error=s.speedup / measured - 1.0,
                measured_bound=(measured_bounds or {}).get(case.key, math.nan),
            )
        )
    return out


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Rank correlation, equal values sharing a mean rank; NaN below three values or when one side never changes.

    >>> spearman([1.0, 2.0, 3.0, 4.0], [1.1, 2.5, 2.4, 9.0])
    0.8
    """
    from scipy.stats import rankdata

    r, s = (rankdata(v) - (np.size(v) + 1) / 2.0 for v in (x, y))
    scale = math.sqrt(float(r @ r) * float(s @ s))
    return float(r @ s) / scale if scale and len(r) >= 3 else math.nan


def summary(rows: Sequence[Row]) -> Agreement:
    """How well the rows' predictions agree with what was measured; an InputError when there is no row."""
    if not rows:
        raise InputError("nothing was measured that could be compared")
    predicted, measured = (np.array([getattr(r, name) for r in rows]) for name in ("predicted", "measured"))
    ratio = predicted / measured
    error = np.abs(ratio - 1.0)
    inside = [r.predicted_lower <= r.measured <= r.predicted_upper for r in rows]
    dense = [abs(r.predicted_dense_s / r.dense_s - 1.0) for r in rows]
    return Agreement(
        len(rows),
        spearman(predicted, measured),
        float(np.median(error)),
        float(np.quantile(error, 0.95)),
        float(np.median(ratio) - 1.0),
        float(np.mean(inside)),
        float(np.median(dense)),
    )


def by_phase(rows: Sequence[Row]) -> dict[str, Agreement]:
    """The same for each phase, and for ``"all"`` of them where there are several."""
    phases = list(dict.fromkeys(r.phase for r in rows))
    out = {phase: summary([r for r in rows if r.phase == phase]) for phase in phases}
    return {**out, "all": summary(rows)} if len(phases) > 1 else out


def repeatability(records: Iterable[Mapping[str, Any]]) -> float:
    """How far a speedup differs when measured again: median |ratio of the medians of the two halves of its passes - 1|.

    NaN where nothing has six passes or more.

    >>> repeatability([{"status": "ok", "dense_s": [2, 2, 2, 2.2, 2.2, 2.2], "pruned_s": [1] * 6}])
    0.1
    """
    off: list[float] = []
    for r in records:
        if r.get("status") == OK and len(r["dense_s"]) >= 6:
            ratio = np.asarray(r["dense_s"], dtype=np.float64) / np.asarray(r["pruned_s"], dtype=np.float64)
            half = len(ratio) // 2
            off.append(abs(float(np.median(ratio[-half:]) / np.median(ratio[:half])) - 1.0))
    return round(float(np.median(off)), 12) if off else math.nan


def table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows as plain data."""
    return [asdict(row) for row in rows]
