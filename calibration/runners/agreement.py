"""State how measured and predicted speedups of a comparison agree.

:func:`summary` and :func:`by_phase` compute numbers, :func:`conclusions` states them, :func:`repeatability` is the
scatter of repeated measurements.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from calibration.evidence.scoring import errors, spearman
from calibration.evidence.verdict import verdict_of
from calibration.measure.timing import OK
from calibration.runners.compare import ComparedSpeedup
from simulator.errors import InputError
from simulator.units import ratio


def summary(rows: Sequence[ComparedSpeedup]) -> dict[str, float]:
    """Return the agreement of predicted and measured speedups; InputError if there is no row.

    Keys: "count", "spearman", those of :func:`~calibration.evidence.scoring.errors` ("median", "p95"), "bias" (median
    of predicted / measured - 1), "inside" (coverage of the predicted intervals) and "dense_time" (median error of the
    dense times).
    """
    if not rows:
        raise InputError("comparison: expected at least one measured case, got none")
    names = ("predicted", "measured", "predicted_lower", "predicted_upper", "predicted_dense_s", "dense_s")
    predicted, measured, low, high, dense, dense_s = (np.array([getattr(r, name) for r in rows]) for name in names)
    found = {"count": len(rows), "spearman": spearman(predicted, measured), **errors(predicted, measured)}
    found |= {"bias": float(np.median(predicted / measured)) - 1.0, "dense_time": errors(dense, dense_s)["median"]}
    return {**found, "inside": float(np.mean((low <= measured) & (measured <= high)))}


def by_phase(rows: Sequence[ComparedSpeedup]) -> dict[str, dict[str, float]]:
    """Return the :func:`summary` of each phase, and of ``"all"`` phases if there are several."""
    phases = list(dict.fromkeys(r.phase for r in rows))
    out = {phase: summary([r for r in rows if r.phase == phase]) for phase in phases}
    return {**out, "all": summary(rows)} if len(phases) > 1 else out


def conclusions(rows: Sequence[ComparedSpeedup]) -> list[str]:
    """Return whether predicted speedups hold on a device, next to the roofline bound as prediction, and the worst."""
    every = verdict_of(
        "speedups",
        measured=[r.measured for r in rows],
        predicted=[r.predicted for r in rows],
        lower=[r.predicted_lower for r in rows],
        upper=[r.predicted_upper for r in rows],
        roofline=[r.roofline_bound for r in rows],
    )
    first, worst = rows[0], max(rows, key=lambda r: abs(r.error))
    holds = "hold" if every.holds else "do not hold"
    one = "1 measured speedup" if every.rows == 1 else f"{every.rows} measured speedups"
    about = f"The predictions of {first.hardware} for {first.model} {holds} on {first.device}"
    case = f"{worst.pruning} in {worst.phase}"
    values = f"measured {ratio(worst.measured)}x, predicted {ratio(worst.predicted)}x"
    ends = f"({ratio(worst.predicted_lower)}-{ratio(worst.predicted_upper)})"
    return [f"{about}: {every.text}, {one}.", f"Worst: {case}, {values} {ends}."]


def repeatability(records: Iterable[Mapping[str, Any]]) -> float:
    """Return the scatter of a repeated speedup: median |ratio of the medians of two halves of its passes - 1|.

    NaN if no case has six passes.
    """
    off: list[float] = []
    for r in records:
        if r.get("status") == OK and len(r["dense_s"]) >= 6:
            ratio = np.asarray(r["dense_s"], dtype=np.float64) / np.asarray(r["pruned_s"], dtype=np.float64)
            half = len(ratio) // 2
            off.append(abs(float(np.median(ratio[-half:]) / np.median(ratio[:half])) - 1.0))
    return round(float(np.median(off)), 12) if off else math.nan
