"""The measured upper bound of pruning: dense GEMMs timed at a model's dense and pruned shapes, nothing else.

``measured_bound`` is the time of a model's dense GEMMs over the time of plain dense GEMMs at the pruned model's shapes,
on the device: what silicon grants at best, with no sparse kernel, no router, no gather. Use :func:`measure_bounds` to
time those of some cases (:func:`calibration.execute.cases.settings_of`) into a run folder, :func:`bounds` to read them
from records.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from calibration.devices.protocol import Device
from calibration.execute.cases import Case, CaseRow, predicted_speedup
from calibration.execute.runs import Measured, begin, measure_plan
from calibration.judge.scores import errors
from calibration.measure.plan import Plan, Rates, for_model
from calibration.measure.probe import default_visits
from calibration.measure.run import Progress
from calibration.measure.timing import Protocol
from calibration.records.exact import without_exact
from calibration.records.lines import content_records
from calibration.records.store import read_store
from calibration.records.table import Records
from simulator.hardware.profile import HardwareProfile
from simulator.kernels.gemm import gemm_time
from simulator.workload import Kind, Workload

Shape = tuple[int, int, int]  # m, n, k

ALIGN = 16
"""Features that zeros without structure leave are rounded to a multiple of this, as the families with structure do."""


@dataclass(frozen=True)
class Bound(CaseRow):
    """The measured upper bound of a case beside the others and the prediction; fields are in the order of columns."""

    dense_gemm_s: float
    pruned_gemm_s: float
    measured_bound: float  # NaN where shapes have no time
    lower: float  # encloses it with `upper` as far as the spread of its samples goes (95 %)
    upper: float
    predicted_bound: float  # the profile's ratio for the same plain GEMMs, from its exact shapes where it has them
    model_bound: float  # that of its model alone
    flop_bound: float
    byte_bound: float
    roofline_bound: float
    predicted: float  # the whole pass, what pruning adds included
    predicted_lower: float
    predicted_upper: float
    efficiency: float
    gemm_share: float
    missing: int  # shapes without a time


def plain_gemms(w: Workload) -> dict[Shape, float]:
    """A workload's GEMMs as plain dense ones: how often each (m, n, k) runs.

    What pruning adds is left out. Where a kernel computes with zeros in its weights (2:4, or without structure) the
    bound is a dense GEMM over as many input features as there are weights left, in multiples of :data:`ALIGN`.

    >>> q = {"role": "q", "m": 2, "n": 64, "k": 64}
    >>> plain_gemms(Workload.from_rows([{**q, "count": 3}, {**q, "role": "k"}]))
    {(2, 64, 64): 4.0}
    """
    rows = np.flatnonzero((w.kind == Kind.GEMM) & ~w.overhead & (w.count > 0))
    k = w.k[rows].astype(np.float64)
    left = np.maximum(np.round(k * w.density[rows] / ALIGN), 1.0) * ALIGN
    k = np.where(w.density[rows] < 1.0, np.minimum(left, k), k)
    m = np.maximum(np.round(w.m[rows].astype(np.float64)), 1.0)
    table = np.stack([m, w.n[rows].astype(np.float64), k], axis=1).astype(np.int64)
    shapes, which = np.unique(table, axis=0, return_inverse=True)
    counts = np.bincount(which.reshape(-1), weights=w.count[rows])
    return {(m, n, k): count for (m, n, k), count in zip(shapes.tolist(), counts.tolist(), strict=True)}


def shapes_of(cases: Sequence[Case]) -> list[Shape]:
    """Every (m, n, k) the bounds of some cases need, once."""
    return sorted({shape for case in cases for w in (case.dense, case.pruned) for shape in plain_gemms(w)})


def measure_bounds(
    folder: str | Path,
    device: Device,
    cases: Sequence[Case],
    *,
    budget_s: float,
    dtype: str = "bf16",
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Measured:
    """Time the GEMMs of some cases into a run folder, new or begun by an earlier run of the same device.

    The budget is shared among the shapes: the more there are the less time each gets; what does not fit is left for the
    next run. The other arguments, and what is refused, are as for :func:`calibration.execute.runs.measure_into`.
    """
    start, description, shapes = device.clock(), device.describe(), shapes_of(cases)
    file, header = begin(folder, device, dtype, budget_s, memory_bytes=description.memory_bytes)

    def planned(rates: Rates, protocol: Protocol, _: int) -> tuple[Plan, Protocol]:
        left, visits = max(budget_s - (device.clock() - start), 1e-3), default_visits(description)
        limit = _share(left / visits, len(shapes), rates, protocol.time_limit_s)
        protocol = replace(protocol, time_limit_s=limit)
        plan = for_model(shapes, rates, dtype=dtype, protocol=protocol, budget_s=left, seed=seed)
        turn = {shape: i for i, shape in enumerate(_by_case(cases, seed))}
        items = sorted(plan.items, key=lambda i: turn[i.operator.m, i.operator.n, i.operator.k])
        say(f"{description.device}; {description.software}; {dtype}; {len(shapes)} shapes")
        return replace(plan, items=tuple(items), visits=visits), protocol

    return measure_plan(file, header, device, planned, budget_s=budget_s, seed=seed, progress=progress)


def _by_case(cases: Sequence[Case], seed: int) -> list[Shape]:
    """Shapes, case after case in random order: where time runs out some cases are whole, rather than all in part."""
    rng = np.random.default_rng(seed)
    found: dict[Shape, None] = {}
    for i in rng.permutation(len(cases)):
        shapes = [*plain_gemms(cases[i].dense), *plain_gemms(cases[i].pruned)]
        found.update(dict.fromkeys(shapes[j] for j in rng.permutation(len(shapes))))
    return list(found)


def _share(budget_s: float, shapes: int, rates: Rates, longest_s: float) -> float:
    """Time limit a shape that lets all fit: at most twice the protocol's own, at least what makes a few samples.

    A third of the time is left for anchors, and for what is repeated because other processes held the machine.
    """
    each = 0.65 * budget_s / max(shapes, 1) - rates.setup_s
    return min(max(each, 0.05), 2.0 * longest_s)


def gemm_seconds(records: Records, dtype: str) -> Mapping[Shape, tuple[float, float]]:
    """Time and relative half width (95 %) of a table's cold dense GEMMs, by (m, n, k); the median of repeats."""
    names = records.labels() == dtype
    rows = records.select(
        records.is_operator("gemm") & names & records.cold & np.isfinite(records.seconds) & (records.seconds > 0)
    )
    found: dict[Shape, list[tuple[float, float]]] = {}
    for m, n, k, seconds, spread in zip(rows.m, rows.n, rows.k, rows.seconds, rows.spread, strict=True):
        half = float(spread) if math.isfinite(spread) else 0.0
        found.setdefault((int(m), int(n), int(k)), []).append((float(seconds), half))
    return {key: (float(np.median([s for s, _ in v])), float(np.median([h for _, h in v]))) for key, v in found.items()}


def bounds(cases: Sequence[Case], records: Records, hw: HardwareProfile, *, dtype: str = "bf16") -> list[Bound]:
    """Measured bounds of cases, in their order, beside the datasheet's and a profile's prediction of the whole pass.

    A case of which ``records`` lacks some cold dense GEMMs has no measured bound; one that the profile cannot predict
    (2:4 without sparse tensor cores) has NaN predictions.
    """
    times, alone = gemm_seconds(records, dtype), without_exact(hw)
    device = records.sources[0].device if records.sources else ""
    out = []
    for case in cases:
        s = predicted_speedup(case, hw)
        pair = case.dense, case.pruned
        (dense_s, dense_half, lacking), (pruned_s, pruned_half, lacking_too) = (_total(w, times) for w in pair)
        ratio, half = dense_s / pruned_s, math.hypot(dense_half, pruned_half)
        plain, model = ([_predicted(w, profile, dtype) for w in pair] for profile in (hw, alone))
        columns: dict[str, Any] = {"device": device, "dtype": dtype, "missing": lacking + lacking_too}
        columns |= {"dense_gemm_s": dense_s, "pruned_gemm_s": pruned_s, "gemm_share": plain[0] / s.dense_s}
        columns |= {"measured_bound": ratio, "lower": ratio * math.exp(-half), "upper": ratio * math.exp(half)}
        columns |= {"predicted_bound": plain[0] / plain[1], "model_bound": model[0] / model[1]}
        efficiency = (s.speedup - 1.0) / (ratio - 1.0) if ratio - 1.0 > 1e-9 else math.nan
        out.append(Bound(**case.columns(hw, s), **columns, efficiency=efficiency))
    return out


def measured_bounds(file: str | Path, cases: Sequence[Case], dtype: str = "bf16") -> list[float]:
    """Measured bounds of cases from a store of records; NaN where it lacks some GEMMs, or there is no file."""
    times = gemm_seconds(content_records(read_store(file)), dtype) if Path(file).is_file() else {}
    return [_total(case.dense, times)[0] / _total(case.pruned, times)[0] for case in cases]


def bound_errors(rows: Sequence[Bound]) -> dict[str, float]:
    """Median relative errors of the bounds from the profile (``predicted``) and from its model alone (``model``).

    Where the profile has measured the same shapes before, the first is how well the device repeats itself.
    """
    known = [r for r in rows if math.isfinite(r.measured_bound)]
    if not known:
        return {}
    measured, predicted, model = np.array([(r.measured_bound, r.predicted_bound, r.model_bound) for r in known]).T
    return {name: errors(b, measured)["median"] for name, b in (("predicted", predicted), ("model", model))}


def _total(w: Workload, times: Mapping[Shape, tuple[float, float]]) -> tuple[float, float, int]:
    """Time of a workload's plain GEMMs (NaN where some have none), its relative half width, and how many have none."""
    gemms = plain_gemms(w)
    if missing := sum(shape not in times for shape in gemms):
        return math.nan, math.nan, missing
    total, variance = 0.0, 0.0
    for shape, count in gemms.items():
        seconds, half = times[shape]
        total += count * seconds
        variance += (count * seconds * half) ** 2
    return total, math.sqrt(variance) / total, 0


def _predicted(w: Workload, hw: HardwareProfile, dtype: str) -> float:
    """Time of a workload's plain GEMMs on a device, s."""
    gemms = plain_gemms(w)
    m, n, k = np.array([*gemms]).T
    return float(gemm_time(m, n, k, hw, dtype=dtype).seconds @ np.array([*gemms.values()]))
