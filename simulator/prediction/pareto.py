"""Find which prunings are best: on the frontier of speed and quality, and the fastest at each batch
and length.

Use :func:`fronts` for the frontiers of a model, one per device, engine, phase, batch and length,
:func:`frontier` for arrays, :func:`winners` for the fastest prunings. Quality loss is the relative
drop of one metric under one protocol (:mod:`simulator.prediction.quality`). A *band* is the range
of quality budgets in which one family is the fastest.

One of two points is certainly faster if the interval of the ratio of their speedups is on one side
of 1. Errors that both share, such as those of the dense model, cancel in this ratio
(:func:`margins`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simulator.arrays import BoolArray, FloatArray, IndexArray
from simulator.engines.engine import load_engine
from simulator.errors import InputError, unknown
from simulator.files.csv import read_csv
from simulator.files.read import read_bounded
from simulator.hardware.profile import HardwareProfile
from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.models.model import Model
from simulator.prediction.batch import OPERATOR_ROWS, Reject, batch_of
from simulator.prediction.compare import SMALL_SHARE, against, results_of
from simulator.prediction.notes import dense_notes, uncalibrated_of
from simulator.prediction.prunings import Pruning
from simulator.prediction.quality import Axis, QualityRow, QualityTable, number_of
from simulator.prediction.requests import by_budget, profiles, requests_of
from simulator.prediction.result import Result, Results
from simulator.pruning import FAMILIES
from simulator.request import Request
from simulator.workload import WorkloadBatch

Halves = tuple[tuple[float, ...], ...]
MOST_ROWS = 1000  # each point is compared with each other one
DENSE = "dense"  # family of the dense model's point: no loss, speedup 1


@dataclass(frozen=True)
class Point:
    """One pruned model with quality loss and speedup; the fields are the JSON keys, in order."""

    model: str
    hardware: str
    phase: str
    batch: int
    seq: int
    engine: str
    method: str
    family: str
    sparsity: float
    realised_sparsity: float
    metric: str
    protocol: str
    dense_quality: float
    pruned_quality: float
    loss: float
    speedup: float
    speedup_lower: float
    speedup_upper: float
    measured: bool
    optimal: bool  # no other point is as fast at no more loss
    # optimal, and with its whole interval faster than points of other families at no more loss
    sure: bool
    beaten_by: str  # if not optimal: the fastest point at no more loss
    bottleneck: str
    calibrated: bool
    source: str

    @property
    def name(self) -> str:
        return f"{self.method} {100 * self.sparsity:.3g} %"


@dataclass(frozen=True)
class Band:
    """Quality budgets ``[low, high)`` in which a family is the fastest."""

    family: str
    low: float
    high: float  # may be infinite
    speedup_low: float
    speedup_high: float
    sure: bool


@dataclass(frozen=True)
class Front:
    model: str
    hardware: str
    phase: str
    batch: int
    seq: int
    engine: str
    axis: Axis
    points: tuple[Point, ...]
    bands: tuple[Band, ...]
    calibrated: bool
    uncalibrated: str  # operators with default constants in any predicted point
    uncalibrated_share: float
    level: float
    below: Halves = ()  # [i][j]: half-width of log(speedup of point i / of point j) below it
    devices: int = 1


def frontier(loss: ArrayLike, speedup: ArrayLike) -> NDArray[np.bool_]:
    """Return which points no other point beats: none is at least as fast at no more loss, and
    better in one of the two. Equal points do not beat each other. Raises InputError without points
    or for a value that is not finite."""
    x, y = np.asarray(loss, dtype=float), np.asarray(speedup, dtype=float)
    if not x.size or x.shape != y.shape or not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise InputError(
            f"frontier: expected finite losses and speedups, as many of each, got {x.size} and"
            f" {y.size}"
        )
    order = np.lexsort((-y, x))
    losses, speeds = x[order], y[order]
    first = np.searchsorted(losses, losses)  # of the points with the same loss, the fastest
    less = np.concatenate([[-np.inf], np.maximum.accumulate(speeds)])[first]
    optimal = np.zeros(x.size, dtype=bool)
    optimal[order] = (speeds == speeds[first]) & (speeds > less)
    return optimal


def margins(speedup: ArrayLike, below: ArrayLike) -> NDArray[np.float64]:
    """Return the margin (n, n) of point i over point j: the log of the ratio of their speedups,
    divided by its half-width towards 0. From 1 up point i is faster with the whole interval, from
    -1 down slower. ``speedup`` (n,); ``below`` (n, n) the half-width of log(speedup i / speedup j)
    below it."""
    log, half = np.log(np.asarray(speedup, dtype=float)), np.asarray(below, dtype=float)
    gap = log[:, None] - log
    return np.asarray(gap / np.maximum(np.where(gap >= 0.0, half, half.T), 1e-12))


def independent(points: Sequence[Point]) -> Halves:
    """Return ``Front.below`` of points without shared errors, from their intervals."""
    low, mid, high = (
        np.log([(p.speedup_lower, p.speedup, p.speedup_upper) for p in points]).reshape(-1, 3).T
    )
    return _nested(np.hypot((mid - low)[:, None], high - mid))


def bands(points: Sequence[Point], below: Halves | None = None) -> tuple[Band, ...]:
    """Return the family that is fastest at each quality budget among marked points, or the dense
    model. Bands are in order of loss, without gaps; neighbours of one family are joined, and the
    last band is open. ``below`` is that of :func:`marked`."""
    best = sorted(
        (i for i, p in enumerate(points) if p.optimal and p.speedup > 1.0),
        key=lambda i: _place(points[i]),
    )
    edges = [*(max(points[i].loss, 0.0) for i in best), math.inf]
    ahead = (
        margins([p.speedup for p in points], independent(points) if below is None else below) >= 1.0
    )
    out: list[Band] = []
    if not best or edges[0] > 0.0:
        out.append(
            Band(
                DENSE,
                0.0,
                edges[0],
                1.0,
                1.0,
                all(p.speedup_upper <= 1.0 for p in points if p.loss <= 0.0),
            )
        )
    for i, low, high in zip(best, edges[:-1], edges[1:]):
        if high <= low:
            continue
        p = points[i]
        others = (
            ahead[i, j] for j, q in enumerate(points) if q.family != p.family and q.loss < high
        )
        sure = p.speedup_lower > 1.0 and all(others)
        if out and out[-1].family == p.family:
            out[-1] = replace(
                out[-1], high=high, speedup_high=p.speedup, sure=out[-1].sure and sure
            )
        else:
            out.append(Band(p.family, low, high, p.speedup, p.speedup, sure))
    return tuple(out)


def fronts(
    model: str | Model,
    hardware: Sequence[str | HardwareProfile],
    quality: QualityTable,
    axis: Axis,
    *,
    measured: Sequence[MeasuredSpeedup] = (),
    **settings: Any,
) -> tuple[tuple[Front, ...], tuple[str, ...]]:
    """Return the frontiers of a model from the quality rows on one axis, by phase, batch, seq and
    device; and notes on the rows that cannot be used. Model, hardware and settings are those of
    :func:`simulator.table`; the quality rows may be those of another model of its kind.
    ``measured`` speedups replace predictions if their conditions match. Raises InputError if the
    model and the devices support no row."""
    rows = quality.on_axis(axis).rows
    if not rows:
        raise InputError(f"{quality.name}: no rows on the axis {axis}")
    if len(rows) > MOST_ROWS:
        raise InputError(
            f"{quality.name}: expected at most {MOST_ROWS:,} rows on the axis {axis}, got"
            f" {len(rows):,}"
        )
    config, devices = load_model(model), profiles(hardware)
    table = _Rows(rows, axis, measured)
    out: list[Front] = []
    for request in requests_of([config], settings):
        batches = [
            (batch_of(same, table.prunings, table.reject), some)
            for same, some in by_budget([request], devices)
        ]
        for hw in devices:
            batch = next(batch for batch, some in batches if hw in some)
            out.append(table.front(batch, request, hw))
    return tuple(out), tuple(table.notes)


@dataclass(frozen=True)
class _Rows:
    """Quality rows on one axis, and notes on those that cannot be used."""

    rows: Sequence[QualityRow]
    axis: Axis
    measured: Sequence[MeasuredSpeedup]
    notes: dict[str, None] = field(default_factory=dict)

    @cached_property
    def prunings(self) -> list[Pruning]:
        return [Pruning.of(row.family, row.sparsity, dict(row.options)) for row in self.rows]

    def reject(self, pruning: int | None, reason: str, device: str) -> None:
        if pruning is None:
            raise InputError(reason)
        row, where = self.rows[pruning], f" on {device}" if device else ""
        self.notes[f"{row.method} at {row.sparsity:g}{where}: {reason}"] = None

    def front(self, batch: WorkloadBatch, request: Request, hw: HardwareProfile) -> Front:
        results = results_of(batch, self.prunings, [hw], [request], self.reject)
        points = [
            _point(self.rows[i], r, self.measured)
            for i, r in zip(results.pruning.tolist(), results)
        ]
        if not points:
            none = f"none of the {len(self.rows)} rows on {self.axis} can run on {hw.label}"
            raise InputError(f"empty frontier: {none}: {'; '.join(self.notes)}")
        self.notes.update(dict.fromkeys(dense_notes(results, request, [hw])))
        order = sorted(range(len(points)), key=lambda i: _place(points[i]))
        below = _below(batch, results, hw, points, order, request.level)
        best = marked([points[i] for i in order], below)
        predicted = (r for r, point in zip(results, points) if not point.measured)
        parts, share = uncalibrated_of(predicted)
        return Front(
            model=load_model(request.model).name,
            hardware=hw.label,
            phase=request.phase,
            batch=request.batch,
            seq=request.seq,
            engine=load_engine(request.engine).name,
            axis=self.axis,
            points=best,
            bands=bands(best, below),
            calibrated=share < SMALL_SHARE,
            uncalibrated=parts,
            uncalibrated_share=share,
            level=request.level,
            below=below,
            devices=request.devices,
        )


def _below(
    batch: WorkloadBatch,
    results: Results,
    hw: HardwareProfile,
    points: Sequence[Point],
    order: Sequence[int],
    level: float,
) -> Halves:
    """Return ``Front.below`` of points in an order: shared errors of predicted points cancel;
    measured points have only their intervals."""
    alone = np.array(independent(points))
    measured = np.array([p.measured for p in points])
    pruned = np.flatnonzero(np.isin(batch.pruning, results.pruning))  # in the order of the points
    some = batch.take(np.r_[0, pruned])
    _, together, _ = against(
        some, hw, [np.full(len(some), 1 + i) for i in range(len(pruned))], level
    )
    below = np.where(measured[:, None] | measured, alone, together.T[1:])
    return _nested(below[np.ix_(order, order)])


def _nested(values: NDArray[Any]) -> Halves:
    return tuple(map(tuple, values.tolist()))


def _place(p: Point) -> tuple[float, float]:
    """Return a sort key: rising loss, at equal loss falling speedup."""
    return p.loss, -p.speedup


def marked(points: Sequence[Point], below: Halves | None = None) -> tuple[Point, ...]:
    """Return points by rising loss with ``optimal``, ``sure`` and ``beaten_by``, also against the
    dense model (loss 0, speedup 1). ``below`` is that of :class:`Front`, in the order of the
    points; None without shared errors."""
    halves = np.array(independent(points) if below is None else below)
    order = sorted(range(len(points)), key=lambda i: _place(points[i]))
    points = [points[i] for i in order]
    ahead = margins([p.speedup for p in points], halves[np.ix_(order, order)]) >= 1.0
    mask = frontier([0.0, *(p.loss for p in points)], [1.0, *(p.speedup for p in points)])[1:]
    return tuple(_marked(i, points, ahead[i], bool(mask[i])) for i in range(len(points)))


def _marked(i: int, points: Sequence[Point], ahead: BoolArray, optimal: bool) -> Point:
    """Return a point with its marks; ``ahead``: the points that it certainly beats in speed."""
    p = points[i]
    rivals = [j for j, q in enumerate(points) if q.loss <= p.loss]
    others = all(ahead[j] for j in rivals if points[j].family != p.family)
    sure = optimal and (p.speedup_lower > 1.0 or p.loss < 0.0) and others
    if optimal:
        return replace(p, optimal=True, sure=sure, beaten_by="")
    faster = (points[j] for j in rivals if j != i)
    fastest = max(faster, key=lambda q: q.speedup, default=None)
    beaten = fastest is not None and fastest.speedup >= max(p.speedup, 1.0)
    winner = fastest.name if fastest is not None and beaten else "the dense model"
    return replace(p, optimal=False, sure=False, beaten_by=winner)


def _point(row: QualityRow, record: Result, measured: Sequence[MeasuredSpeedup]) -> Point:
    shared = {
        f.name: getattr(of, f.name)
        for of in (row, record)
        for f in fields(Point)
        if hasattr(of, f.name)
    }
    shared["method"] = row.method  # the source's name; the prediction is of a family
    known = next((m for m in measured if m.fits(row.sparsity, shared)), None)
    if known:
        shared |= {
            "speedup": known.speedup,
            "speedup_lower": known.lower,
            "speedup_upper": known.upper,
        }
        shared["bottleneck"] = ""
    shared |= {"dense_quality": row.dense, "pruned_quality": row.pruned, "loss": row.relative_loss}
    return Point(**shared, measured=known is not None, optimal=False, sure=False, beaten_by="")


MATCHED: tuple[str, ...] = ("model", "hardware", "phase", "batch", "seq", "method", "family")
"""Optional columns of measured speedups; values that are not empty must equal those of the
point."""

SAME_SPARSITY = 5e-4  # largest difference of equal fractions: tables print three digits


@dataclass(frozen=True)
class MeasuredSpeedup:
    conditions: Mapping[str, str]
    sparsity: float
    speedup: float
    lower: float
    upper: float

    def fits(self, sparsity: float, conditions: Mapping[str, Any]) -> bool:
        same = (
            str(conditions.get(name, value)).lower() == value.lower()
            for name, value in self.conditions.items()
        )
        return abs(self.sparsity - sparsity) <= SAME_SPARSITY and all(same)


def read_measured(path: str | Path) -> tuple[MeasuredSpeedup, ...]:
    """Read measured speedups from a CSV file, to replace predictions. Columns: family, sparsity,
    speedup (dense time over pruned time); optionally :data:`MATCHED`, and the ends of the
    measurement's interval, ``speedup_lower`` and ``speedup_upper``. ``prunesim speedup --csv``
    writes this format."""
    return tuple(
        read_csv(read_bounded(path), str(path), ("family", "sparsity", "speedup")).each(_measured)
    )


def _measured(cells: Mapping[str, str]) -> MeasuredSpeedup:
    if cells["family"] not in (*FAMILIES, cells.get("method")):  # a described method is its own
        raise InputError(f"family: {unknown('family', cells['family'], FAMILIES)}")
    sparsity, speedup = number_of(cells, "sparsity"), number_of(cells, "speedup")
    if not 0.0 <= sparsity < 1.0:
        raise InputError(f"sparsity: expected a fraction in [0, 1), got {cells['sparsity']}")
    lower, upper = (
        number_of(cells, c) if cells.get(c) else speedup for c in ("speedup_lower", "speedup_upper")
    )
    if not 0.0 < lower <= speedup <= upper:
        got = f"{lower:g}, {speedup:g}, {upper:g}"
        raise InputError(
            f"speedup: expected 0 < speedup_lower <= speedup <= speedup_upper, got {got}"
        )
    return MeasuredSpeedup(
        {name: cells[name] for name in MATCHED if cells.get(name)}, sparsity, speedup, lower, upper
    )


@dataclass(frozen=True)
class Winners:
    best: Results
    gains: BoolArray  # whether it is faster than the dense model
    # whether the intervals of its ratios to the dense model and to the second fastest are above 1
    certain: BoolArray


def winners(
    requests: Sequence[Request], prunings: Sequence[Pruning], hardware: Sequence[HardwareProfile]
) -> Winners:
    """Return the fastest pruning on each device at each of some requests that differ only in shape.
    Prunings that a device, the engine or a request does not support do not compete; InputError if
    none is left."""
    reasons: dict[str, None] = {}

    def skip(_pruning: int | None, reason: str, _device: str) -> None:
        reasons[reason] = None

    operators = len(lower(requests[0]))
    together, of_devices = max(1, OPERATOR_ROWS // (operators * len(prunings))), []
    for start in range(0, len(requests), together):
        for some, devices in by_budget(requests[start : start + together], hardware):
            batch = batch_of(some, prunings, skip)
            of_devices += [
                w for hw in devices if len((w := _of_device(some, prunings, batch, hw, skip)).best)
            ]
    if not of_devices:
        raise InputError("; ".join(reasons) or "nothing to predict")
    parts = (
        np.concatenate([getattr(w, name) for w in of_devices]) for name in ("gains", "certain")
    )
    return Winners(Results.join([w.best for w in of_devices]), *parts)


def _of_device(
    requests: Sequence[Request],
    prunings: Sequence[Pruning],
    batch: WorkloadBatch,
    hw: HardwareProfile,
    skip: Reject,
) -> Winners:
    results = results_of(batch, prunings, [hw], requests, skip)
    if not len(results):
        return Winners(results, np.zeros(0, bool), np.zeros(0, bool))
    row, fastest = _by_speed(requests, results, len(prunings))
    request = np.flatnonzero(row.max(axis=1) >= 0)
    first, second = fastest[request, 0], fastest[request, min(1, len(prunings) - 1)]
    best = results.take(row[request, first])
    competes = (first != second) & (row[request, second] >= 0)
    ratio = _lower_ratio(
        batch, hw, request, first, np.where(competes, second, first), requests[0].level
    )
    certain = (best.columns["speedup_lower"] > 1.0) & ((ratio > 1.0) | ~competes)
    return Winners(best, np.asarray(best.columns["speedup"] > 1.0), np.asarray(certain))


def _by_speed(
    requests: Sequence[Request], results: Results, prunings: int
) -> tuple[IndexArray, IndexArray]:
    """Return the row of ``results`` of each request and pruning, -1 where there is none, and the
    prunings of each request, the fastest first."""
    place = {(r.batch, r.seq): i for i, r in enumerate(requests)}
    shapes = zip(results.columns["batch"].tolist(), results.columns["seq"].tolist())
    cell = np.array([place[shape] for shape in shapes]), results.pruning
    row = np.full((len(place), prunings), -1)
    row[cell] = np.arange(len(results))
    speedup = np.full(row.shape, -np.inf)
    speedup[cell] = results.columns["speedup"]
    return row, np.argsort(-speedup, axis=1, kind="stable")  # stable: the first of equal speedups


def _lower_ratio(
    batch: WorkloadBatch,
    hw: HardwareProfile,
    request: IndexArray,
    first: IndexArray,
    second: IndexArray,
    level: float,
) -> FloatArray:
    """Return the lower end of the interval of the time of a second pruning over that of a first, at
    each request."""
    dense, many = np.flatnonzero(batch.pruning < 0), len(request)
    pruned = np.flatnonzero(batch.pruning >= 0)
    index = np.zeros((len(dense), int(batch.pruning.max()) + 1), dtype=np.intp)
    index[batch.dense[pruned], batch.pruning[pruned]] = pruned
    pairs = batch.take(np.concatenate([dense, index[request, first], index[request, second]]))
    other = np.arange(len(pairs))
    other[len(dense) : len(dense) + many] += many
    (middle,), (below,), _ = against(pairs, hw, [other], level)
    return np.asarray(np.exp(middle - below)[len(dense) : len(dense) + many])
