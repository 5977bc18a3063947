"""Find which prunings are on the frontier of speed and quality.

Use :func:`fronts` for the frontiers of a model, one per device, engine, phase, batch and length,
:func:`frontier` for arrays. Quality loss is the relative
drop of one metric under one protocol (:mod:`simulator.prediction.quality`). A *band* is the range
of quality budgets in which one family is the fastest.

One of two points is certainly faster if the interval of the ratio of their speedups is on one side
of 1. Errors that both points share, such as those of the dense model, cancel in this ratio. Only
points on the frontier are compared with all others, so a table may have a million rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simulator.arrays import FloatArray, IndexArray
from simulator.engines.engine import load_engine
from simulator.errors import InputError, unknown
from simulator.files.csv import read_csv
from simulator.files.read import read_bounded
from simulator.hardware.profile import HardwareProfile
from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.models.model import Model
from simulator.prediction.batch import OPERATOR_ROWS, Reject, batch_of, rejecting
from simulator.prediction.compare import SMALL_SHARE, against, results_of
from simulator.prediction.notes import dense_notes, uncalibrated_of
from simulator.prediction.prunings import Pruning
from simulator.prediction.quality import Axis, QualityRow, QualityTable, number_of
from simulator.prediction.requests import on, profiles, requests_of
from simulator.prediction.result import Results
from simulator.pruning import FAMILIES
from simulator.request import Request
from simulator.workload import WorkloadBatch

HalfWidths = Callable[[IndexArray, slice], FloatArray]
"""Returns for k of some points and a slice of n the half-widths (k, n) of log(speedup of the point
/ speedup of the other) below it."""

DENSE = "dense"  # family of the dense model's point: no loss, speedup 1
TOGETHER = 64, 50_000  # points that are compared with others at once: 25 MB of each number


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
    devices: int = 1
    below: HalfWidths | None = field(default=None, repr=False, compare=False)


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
    first = np.searchsorted(losses, losses)  # the fastest of the points with the same loss
    less = np.concatenate([[-np.inf], np.maximum.accumulate(speeds)])[first]
    optimal = np.zeros(x.size, dtype=bool)
    optimal[order] = (speeds == speeds[first]) & (speeds > less)
    return optimal


def independent(points: Sequence[Point]) -> HalfWidths:
    """Return the half-widths of points without shared errors, from their intervals."""
    low, mid, high = (
        np.log([(p.speedup_lower, p.speedup, p.speedup_upper) for p in points]).reshape(-1, 3).T
    )
    return lambda some, others: np.hypot((mid - low)[some, None], (high - mid)[others])


def judged(
    points: Sequence[Point], below: HalfWidths | None = None
) -> tuple[tuple[Point, ...], tuple[Band, ...]]:
    """Return points by rising loss with ``optimal``, ``sure`` and ``beaten_by``, also against the
    dense model (loss 0, speedup 1), and the bands. ``below`` has the half-widths of the points in
    the order of :func:`by_loss`; None: without shared errors."""
    points = [points[i] for i in by_loss(points)]
    loss, speedup = (np.array([getattr(p, name) for p in points]) for name in ("loss", "speedup"))
    optimal = frontier(np.r_[0.0, loss], np.r_[1.0, speedup])[1:]
    rival = _least_rivals(points, np.flatnonzero(optimal), below or independent(points))
    fastest = _fastest_others(loss, speedup).tolist()
    marked = []
    for i, p in enumerate(points):
        if optimal[i]:
            sure = bool(rival[i] > p.loss) and (p.speedup_lower > 1.0 or p.loss < 0.0)
            marked.append(replace(p, optimal=True, sure=sure, beaten_by=""))
            continue
        j = fastest[i]
        beaten = j >= 0 and speedup[j] >= max(p.speedup, 1.0)
        winner = points[j].name if beaten else "the dense model"
        marked.append(replace(p, optimal=False, sure=False, beaten_by=winner))
    return tuple(marked), _bands(marked, rival)


def by_loss(points: Sequence[Point]) -> list[int]:
    """Return the order of points by rising loss, at equal loss by falling speedup."""
    return sorted(range(len(points)), key=lambda i: (points[i].loss, -points[i].speedup))


def _least_rivals(points: Sequence[Point], some: IndexArray, below: HalfWidths) -> FloatArray:
    """Return the least loss of a point of another family than which a point is not faster with the
    whole interval of the ratio of their speedups, for ``some`` points; infinite if there is none.
    Errors that both points share cancel in this ratio."""
    out = np.full(len(points), np.inf)
    loss, log = np.array([(p.loss, math.log(p.speedup)) for p in points]).T
    family = np.unique([p.family for p in points], return_inverse=True)[1]
    firsts = (range(0, many, each) for many, each in zip((len(some), len(points)), TOGETHER))
    for row, column in itertools.product(*firsts):
        mine = some[row : row + TOGETHER[0]]
        others = slice(column, column + TOGETHER[1])
        slower = log[mine, None] - log[others] >= np.maximum(below(mine, others), 1e-12)
        alike = family[mine, None] == family[others]
        least = np.where(slower | alike, np.inf, loss[others]).min(axis=1)
        out[mine] = np.minimum(out[mine], least)
    return out


def _fastest_others(loss: FloatArray, speedup: FloatArray) -> IndexArray:
    """Return for points in the order of :func:`by_loss` the fastest other point that is as fast at
    no more loss, -1 without one."""
    every = np.arange(len(loss))
    before = np.r_[-np.inf, np.maximum.accumulate(speedup)[:-1]]
    record = np.maximum.accumulate(np.where(speedup > before, every, 0))
    last = np.searchsorted(loss, loss, side="right") - 1
    # a point that is itself the fastest takes the next with an equal loss
    second = np.where(every < last, every + 1, -1)
    return np.asarray(np.where(record[last] == every, second, record[last]))


def _bands(points: Sequence[Point], rival: FloatArray) -> tuple[Band, ...]:
    """Return the family that is fastest at each quality budget among marked points, or the dense
    model. Bands are in order of loss, without gaps; neighbours of one family are joined, and the
    last band is open."""
    best = [i for i, p in enumerate(points) if p.optimal and p.speedup > 1.0]
    edges = [*(max(points[i].loss, 0.0) for i in best), math.inf]
    out: list[Band] = []
    if edges[0] > 0.0:
        slower = all(p.speedup_upper <= 1.0 for p in points if p.loss <= 0.0)
        out.append(Band(DENSE, 0.0, edges[0], 1.0, 1.0, slower))
    for i, low, high in zip(best, edges[:-1], edges[1:]):
        if high <= low:
            continue
        p = points[i]
        sure = p.speedup_lower > 1.0 and bool(rival[i] >= high)
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
    config, devices = load_model(model), profiles(hardware)
    table = _Rows(rows, axis, measured)
    out: list[Front] = []
    for request in requests_of([config], settings):
        out += [table.front(request, hw) for hw in devices]
    return tuple(out), tuple(table.notes)


@dataclass(frozen=True)
class _Rows:
    """Quality rows on one axis, and notes on those that cannot be used."""

    rows: Sequence[QualityRow]
    axis: Axis
    measured: Sequence[MeasuredSpeedup]
    notes: dict[str, None] = field(default_factory=dict)
    # the last piece of workloads by request and first pruning
    kept: dict[tuple[Request, int], WorkloadBatch] = field(default_factory=dict)

    @cached_property
    def which(self) -> tuple[IndexArray, IndexArray]:
        """The first row of each different pruning, and the pruning of each row."""
        # options as Python writes them: 1 and True differ
        texts = [f"{row.family} {row.sparsity!r} {row.options}" for row in self.rows]
        _, first, which = np.unique(texts, return_index=True, return_inverse=True)
        return first, which

    @cached_property
    def prunings(self) -> list[Pruning]:
        """The different prunings."""
        firsts = (self.rows[i] for i in self.which[0].tolist())
        return [Pruning.of(row.family, row.sparsity, dict(row.options)) for row in firsts]

    def reject(self, pruning: int | None, reason: str, device: str) -> None:
        if pruning is None:
            raise InputError(reason)
        where = f" on {device}" if device else ""
        for row in (self.rows[i] for i in np.flatnonzero(self.which[1] == pruning).tolist()):
            self.notes[f"{row.method} at {row.sparsity:g}{where}: {reason}"] = None

    def front(self, request: Request, hw: HardwareProfile) -> Front:
        (computed,) = on([request], hw)
        results = self.results(computed, hw)
        rows, points = self.points(results)
        if not points:
            none = f"none of the {len(self.rows)} rows on {self.axis} can run on {hw.label}"
            raise InputError(f"empty frontier: {none}: {'; '.join(self.notes)}")
        self.notes.update(dict.fromkeys(dense_notes(results, request, [hw])))
        which = self.which[1][rows]
        below = self.half_widths(computed, hw, results.pruning, points, which)
        best, bands = judged(points, below)
        predicted = which[[not p.measured for p in points]]
        parts, share = uncalibrated_of(results.take(np.isin(results.pruning, predicted)))
        return Front(
            model=load_model(request.model).name,
            hardware=hw.label,
            phase=request.phase,
            batch=request.batch,
            seq=request.seq,
            engine=load_engine(request.engine).name,
            axis=self.axis,
            points=best,
            bands=bands,
            calibrated=share < SMALL_SHARE,
            uncalibrated=parts,
            uncalibrated_share=share,
            level=request.level,
            devices=request.devices,
            below=below,
        )

    def points(self, results: Results) -> tuple[list[int], list[Point]]:
        """Return the rows whose prunings have results, and their points, by rising loss."""
        place = np.full(len(self.prunings), -1)
        place[results.pruning] = np.arange(len(results))
        place = place[self.which[1]]
        rows = np.flatnonzero(place >= 0).tolist()
        names = [f.name for f in fields(Point) if f.name in results.columns]
        predicted = list(zip(*(results.columns[name].tolist() for name in names)))
        points = [
            _point(self.rows[i], dict(zip(names, predicted[place[i]])), self.measured) for i in rows
        ]
        order = by_loss(points)
        return [rows[i] for i in order], [points[i] for i in order]

    def pieces(self, request: Request) -> Iterator[tuple[int, list[Pruning], WorkloadBatch]]:
        """Yield pieces of bounded memory: the number of prunings before, the prunings, and the
        workloads, the dense one first."""
        size = max(1, OPERATOR_ROWS // len(lower(request)))
        for start in range(0, len(self.prunings), size):
            some = self.prunings[start : start + size]
            if (request, start) not in self.kept:
                self.kept.clear()
                self.kept[request, start] = batch_of([request], some, self._reject(start))
            yield start, some, self.kept[request, start]

    def _reject(self, start: int) -> Reject:
        return lambda i, *why: self.reject(None if i is None else start + i, *why)

    def results(self, request: Request, hw: HardwareProfile) -> Results:
        parts = []
        for start, some, batch in self.pieces(request):
            part = results_of(batch, some, [hw], [request], self._reject(start))
            parts.append(replace(part, pruning=start + part.pruning))
        return Results.join(parts)

    def half_widths(
        self,
        request: Request,
        hw: HardwareProfile,
        able: IndexArray,
        points: Sequence[Point],
        which: IndexArray,
    ) -> HalfWidths:
        """Return the half-widths of points of the prunings ``which``, of those that are ``able`` to
        run: shared errors of predicted points cancel; measured points have only their intervals."""
        alone, measured = independent(points), np.array([p.measured for p in points])

        @lru_cache(maxsize=1)
        def between(prunings: tuple[int, ...]) -> FloatArray:
            return self._between(request, hw, able, np.array(prunings))

        def below(some: IndexArray, others: slice) -> FloatArray:
            different, place = np.unique(which[some], return_inverse=True)
            together = between(tuple(different.tolist()))[place][:, which[others]]
            if not measured.any():
                return together
            own = measured[some, None] | measured[others]
            return np.where(own, alone(some, others), together)

        return below

    def _between(
        self, request: Request, hw: HardwareProfile, able: IndexArray, some: IndexArray
    ) -> FloatArray:
        """Return the half-widths of log(speedup of ``some`` prunings / speedup of each pruning)
        below it."""
        chosen = [self.prunings[i] for i in some]
        best = batch_of([request], chosen, rejecting).take(1 + np.arange(len(some)))
        # each piece begins with the dense workload
        best = replace(best, dense=np.zeros(len(some), dtype=np.intp))
        out = np.full((len(some), len(self.prunings)), np.nan)
        for start, _, batch in self.pieces(request):
            runs = np.isin(batch.pruning, able - start) & (batch.pruning >= 0)
            both = WorkloadBatch.join([batch.take(np.r_[0, np.flatnonzero(runs)]), best])
            others = [np.full(len(both), len(both) - len(some) + i) for i in range(len(some))]
            _, _, above = against(both, hw, others, request.level)
            out[:, start + batch.pruning[runs]] = above[:, 1 : len(both) - len(some)]
        return out


def _point(
    row: QualityRow, predicted: Mapping[str, Any], measured: Sequence[MeasuredSpeedup]
) -> Point:
    # the source's name of the method; the prediction is of a family
    of_row = {name: getattr(row, name) for name in ("method", "metric", "protocol", "source")}
    values = {**predicted, **of_row}
    known = next((m for m in measured if m.fits(row.sparsity, values)), None)
    if known:
        values |= {
            "speedup": known.speedup,
            "speedup_lower": known.lower,
            "speedup_upper": known.upper,
            "bottleneck": "",
        }
    values |= {"dense_quality": row.dense, "pruned_quality": row.pruned, "loss": row.relative_loss}
    return Point(**values, measured=known is not None, optimal=False, sure=False, beaten_by="")


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
