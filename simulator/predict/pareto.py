"""Acceleration against quality: speedups joined with quality rows, and the frontier of what no other point beats.

Use :func:`fronts` for the frontiers of a model (a device, phase, batch and length each), :func:`frontier` for the rule itself on arrays.
Quality loss is the relative drop of one metric under one protocol, see :mod:`simulator.predict.quality`; speedups are predicted with their
interval, or measured where the caller has them. A *band* is the range of quality budgets in which one family is the fastest.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simulator.errors import InputError
from simulator.hardware.library import load_hardware
from simulator.models.config import ModelConfig
from simulator.models.library import load_model
from simulator.predict.settings import Setting, one_of, whole_number
from simulator.predict.speedup import Speedup, speedups
from simulator.pruning import prune
from simulator.workload import PHASES

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile
    from simulator.predict.measured import Measured
    from simulator.predict.quality import Axis, QualityRow, QualityTable
    from simulator.workload import Workload

DENSE = "dense"
"""Family of the dense model's own point: no loss, speedup 1."""


@dataclass(frozen=True)
class Point:
    """One pruned model on the plane of quality loss and speedup; the order of the fields is that of JSON keys.

    ``optimal``: no other point is as fast at no more loss. ``sure``: still so when its speedup is at the low end of its interval and those
    of other families are at the high end. ``beaten_by`` names the fastest point at no more loss, for points that are not optimal.
    """

    model: str
    hardware: str
    phase: str
    batch: int
    seq: int
    runtime: str
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
    optimal: bool
    sure: bool
    beaten_by: str
    limit: str
    calibrated: bool
    source: str

    @property
    def name(self) -> str:
        """Method and fraction removed."""
        return f"{self.method} {100 * self.sparsity:.3g} %"


@dataclass(frozen=True)
class Band:
    """Quality budgets ``[low, high)`` in which a family is the fastest, from one speedup to another; ``high`` may be infinite."""

    family: str
    low: float
    high: float
    speedup_low: float
    speedup_high: float
    sure: bool


@dataclass(frozen=True)
class Front:
    """The frontier of one device, phase, batch and length."""

    model: str
    hardware: str
    phase: str
    batch: int
    seq: int
    runtime: str
    axis: Axis
    points: tuple[Point, ...]
    bands: tuple[Band, ...]
    calibrated: bool
    level: float


def frontier(loss: ArrayLike, speedup: ArrayLike) -> NDArray[np.bool_]:
    """Which points no other point beats: none is at least as fast at no more loss, and better in one of the two.

    Parameters
    ----------
    loss, speedup : array, shape (n,)
        Less loss is better, more speedup is better. Of equal points all count.

    Returns
    -------
    bool array, shape (n,)

    Raises
    ------
    InputError
        When there are no points or a value is not finite.

    Examples
    --------
    >>> frontier([0.0, 0.1, 0.2, 0.2], [1.0, 1.3, 1.2, 1.6]).tolist()
    [True, True, False, True]
    """
    x, y = np.asarray(loss, dtype=float), np.asarray(speedup, dtype=float)
    if not x.size or x.shape != y.shape or not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise InputError(f"frontier: expected finite losses and speedups, as many of each, got {x.size} and {y.size}")
    no_worse = (x[:, None] <= x) & (y[:, None] >= y)
    better = (x[:, None] < x) | (y[:, None] > y)
    out: NDArray[np.bool_] = np.logical_not(np.any(no_worse & better, axis=0))
    return out


def bands(points: Sequence[Point]) -> tuple[Band, ...]:
    """The family that is fastest at each quality budget, neighbours of one family joined; the dense model until something beats it.

    Parameters
    ----------
    points : sequence of Point
        All points of a frontier, optimal or not.

    Returns
    -------
    tuple of Band
        By rising loss, without gaps, the last one open.
    """
    best = sorted((p for p in points if p.optimal and p.speedup > 1.0), key=lambda p: (p.loss, -p.speedup))
    edges = [*(max(p.loss, 0.0) for p in best), math.inf]
    out: list[Band] = []
    if not best or edges[0] > 0.0:
        out.append(Band(DENSE, 0.0, edges[0], 1.0, 1.0, all(p.speedup_upper <= 1.0 for p in points if p.loss <= 0.0)))
    for p, low, high in zip(best, edges[:-1], edges[1:]):
        if high <= low:
            continue
        sure = p.speedup_lower > max(
            (q.speedup_upper for q in points if q.family != p.family and q.loss < high), default=1.0
        )
        if out and out[-1].family == p.family:
            out[-1] = replace(out[-1], high=high, speedup_high=p.speedup, sure=out[-1].sure and sure)
        else:
            out.append(Band(p.family, low, high, p.speedup, p.speedup, sure))
    return tuple(out)


def fronts(
    model: str | ModelConfig,
    hardware: Sequence[str | HardwareProfile],
    quality: QualityTable,
    axis: Axis,
    phase: Sequence[str] = ("prefill",),
    batch: Sequence[int] = (1,),
    seq: Sequence[int] = (2048,),
    *,
    setting: Setting | None = None,
    measured: Sequence[Measured] = (),
) -> tuple[tuple[Front, ...], tuple[str, ...]]:
    """Frontiers of a model from the quality rows on one axis.

    Parameters
    ----------
    model : str or ModelConfig
        The model whose speed is predicted; the quality rows may be those of another model of its kind (the caller says so).
    hardware : sequence of str or HardwareProfile
    quality : QualityTable
        Rows of one model.
    axis : Axis
        The metric and protocol; see :func:`simulator.predict.quality.choose_axis`.
    phase, batch, seq : sequences
        As in :func:`simulator.predict.table.table`.
    setting : Setting, optional
        Number formats, runtime, devices.
    measured : sequence of Measured
        Speedups that stand in for predictions where their conditions fit.

    Returns
    -------
    fronts : tuple of Front
        Ordered by phase, batch, seq, device.
    notes : tuple of str
        Rows that could not be used and why, one line each.

    Raises
    ------
    InputError
        For bad names, no rows on the axis, or no row that the model and the devices support.
    """
    rows, setting = quality.on_axis(axis).rows, setting or Setting()
    if not rows:
        raise InputError(f"{quality.name}: no rows on the axis {axis}")
    config = load_model(model) if isinstance(model, str) else model
    devices = list({hw.name: hw for hw in (load_hardware(h) if isinstance(h, str) else h for h in hardware)}.values())
    notes: dict[str, None] = {}
    out = []
    for p, b, s in itertools.product(dict.fromkeys(phase), dict.fromkeys(batch), dict.fromkeys(seq)):
        dense = setting.lower(config, one_of("phase", p, PHASES), whole_number("batch", b), whole_number("seq", s))
        usable = _pruned(dense, rows, notes)
        for hw in devices:
            found = _predicted(dense, usable, hw, setting, notes)
            points = [_point(row, speed, dense, hw, setting, measured) for row, speed in found]
            if not points:
                raise InputError(
                    f"empty frontier: none of the {len(rows)} rows on {axis} can run on {hw.name}: {'; '.join(notes)}"
                )
            judged = judge(points)
            calibrated = all(q.calibrated or q.measured for q in judged)
            out.append(
                Front(
                    config.name,
                    hw.name,
                    p,
                    b,
                    s,
                    setting.runtime,
                    axis,
                    judged,
                    bands(judged),
                    calibrated,
                    setting.level,
                )
            )
    return tuple(out), tuple(notes)


def judge(points: Sequence[Point]) -> tuple[Point, ...]:
    """Points by rising loss with ``optimal``, ``sure`` and ``beaten_by`` filled in; the dense model (loss 0, speedup 1) takes part."""
    points = sorted(points, key=lambda p: (p.loss, -p.speedup))
    mask = frontier([0.0, *(p.loss for p in points)], [1.0, *(p.speedup for p in points)])[1:]
    out = []
    for p, optimal in zip(points, mask):
        rivals = [q for q in points if q is not p and q.loss <= p.loss]
        others = [q for q in rivals if q.family != p.family]
        sure = bool(optimal) and p.speedup_lower > max(
            [1.0 if p.loss >= 0 else 0.0, *(q.speedup_upper for q in others)]
        )
        fastest = max(rivals, key=lambda q: q.speedup, default=None)
        winner = (
            "" if optimal else fastest.name if fastest and fastest.speedup >= max(p.speedup, 1.0) else "the dense model"
        )
        out.append(replace(p, optimal=bool(optimal), sure=sure, beaten_by=winner))
    return tuple(out)


def _pruned(dense: Workload, rows: Iterable[QualityRow], notes: dict[str, None]) -> list[tuple[QualityRow, Workload]]:
    """The pruned workload of every row; what the family does not support goes to the notes."""
    out = []
    for row in rows:
        try:
            out.append((row, prune(dense, row.family, row.sparsity, **dict(row.options))))
        except InputError as error:
            notes[f"{row.method} at {row.sparsity:g}: {error}"] = None
    return out


def _predicted(
    dense: Workload,
    usable: Sequence[tuple[QualityRow, Workload]],
    hw: HardwareProfile,
    setting: Setting,
    notes: dict[str, None],
) -> list[tuple[QualityRow, Speedup]]:
    """Speedups on one device in one pass; one at a time where something cannot run there (2:4 without sparse tensor cores)."""
    try:
        return list(
            zip((row for row, _ in usable), speedups(dense, [w for _, w in usable], hw, setting.runtime, setting.level))
        )
    except InputError:
        speedups(dense, [], hw, setting.runtime, setting.level)  # the dense model must run
    out = []
    for row, workload in usable:
        try:
            out.append((row, speedups(dense, [workload], hw, setting.runtime, setting.level)[0]))
        except InputError as error:
            notes[f"{row.method} at {row.sparsity:g} on {hw.name}: {error}"] = None
    return out


def _point(
    row: QualityRow,
    speed: Speedup,
    dense: Workload,
    hw: HardwareProfile,
    setting: Setting,
    measured: Sequence[Measured],
) -> Point:
    """A point, not yet judged."""
    meta = dense.meta
    where = {"model": meta.model, "hardware": hw.name, "phase": meta.phase, "batch": meta.batch, "seq": meta.seq}
    known = [m for m in measured if m.fits(row.sparsity, {**where, "family": row.family, "method": row.method})]
    value, lower, upper = (
        (known[0].speedup, known[0].lower, known[0].upper) if known else (speed.speedup, speed.lower, speed.upper)
    )
    return Point(
        model=meta.model,
        hardware=hw.name,
        phase=meta.phase,
        batch=meta.batch,
        seq=meta.seq,
        runtime=setting.runtime,
        method=row.method,
        family=row.family,
        sparsity=row.sparsity,
        realised_sparsity=speed.realised_sparsity,
        metric=row.metric,
        protocol=row.protocol,
        dense_quality=row.dense,
        pruned_quality=row.pruned,
        loss=row.relative_loss,
        speedup=value,
        speedup_lower=lower,
        speedup_upper=upper,
        measured=bool(known),
        optimal=False,
        sure=False,
        beaten_by="",
        limit="" if known else speed.limit,
        calibrated=speed.calibrated,
        source=row.source,
    )
