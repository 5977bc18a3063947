"""Compare the workloads of a batch with their dense workloads, into
:class:`~simulator.prediction.result.Results`.

Use :func:`results_of` for a batch on some devices, :func:`compare` for the columns of one device
that follow from times. :func:`against` compares pruned workloads with each other: errors that two
of them share cancel in their ratio, so its interval is narrower than the interval of either
speedup. In a large batch, equal shapes are timed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from simulator.arrays import Array, FloatArray, IndexArray
from simulator.codes import DTYPES, EXPERTS, GEMM, Kind
from simulator.engines.engine import load_engine
from simulator.errors import InputError
from simulator.models.lower import NumberFormats, cached_tokens
from simulator.operators import TITLES
from simulator.operators.base import BOTTLENECKS
from simulator.prediction.batch import Reject, batch_of, rejecting
from simulator.prediction.energy import REASONS, energy_columns
from simulator.prediction.prunings import Pruning, removed_parts, sizes
from simulator.prediction.requests import by_budget
from simulator.prediction.result import COLUMNS, Results, texts
from simulator.request import Request
from simulator.serving.steady import memory_columns, serving
from simulator.uncertainty.forward import PredictedPass, forward_passes
from simulator.uncertainty.intervals import Inferred, prediction_intervals
from simulator.workload import WorkloadBatch, sums

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile

SMALL_SHARE = 0.05
"""A result counts as calibrated if operators with default constants take less than this share of
the time."""

NAMED_SHARE = 0.01  # share of the time from which operators with default constants are named


def compare(
    batch: WorkloadBatch, hw: HardwareProfile, level: float = 0.9, dense_s: float | None = None
) -> tuple[dict[str, Array], Inferred | None]:
    """Return the columns of a result that follow from times, one entry per workload of a batch
    (``bottleneck`` and ``energy_reason`` are indices into ``BOTTLENECKS`` and ``REASONS``,
    ``uncalibrated`` has one bit per entry of ``TITLES``), on one device; and what is inferred from
    a measured time. ``level`` is the level of the intervals, ``dense_s`` a measured time of the
    first workload. Raises InputError for a workload that cannot run."""
    p, dense = forward_passes(batch, hw, level), batch.dense
    times = prediction_intervals(p, level, dense, dense_s)
    served = serving(p, times, level)
    code, share = p.bottleneck(times.device_share)
    default_parts, default_share = _uncalibrated(p, dense)
    roofline_bound = batch.bound(p.ideal_s)
    gain = roofline_bound - 1.0
    efficiency = np.divide(
        times.ratio - 1.0, gain, out=np.full(len(batch), np.nan), where=gain > 1e-9
    )
    return {
        **times.columns(dense),
        "roofline_bound": roofline_bound,
        "bottleneck": code,
        "bottleneck_share": share,
        "efficiency": efficiency,
        "calibrated": default_share < SMALL_SHARE,
        "uncalibrated": default_parts,
        "uncalibrated_share": default_share,
        **served,
        **{f"dense_{name}": column[dense] for name, column in served.items()},
        **energy_columns(p, times, level, dense),
    }, times.inferred


def results_of(
    batch: WorkloadBatch,
    prunings: Sequence[Pruning],
    hardware: Sequence[HardwareProfile],
    requests: Sequence[Request],
    reject: Reject = rejecting,
) -> Results:
    """Return the results of the pruned workloads of a batch by request, pruning and device;
    prunings that a device cannot run go to ``reject``."""
    timed = [
        (np.full(len(rows), d), rows, columns)
        for d, hw in enumerate(hardware)
        for rows, columns in _timed(batch, hw, requests[0], reject)
    ]
    if not timed:
        return Results.empty()
    device, rows = (np.concatenate([part[i] for part in timed]) for i in (0, 1))
    order = np.lexsort((device, batch.pruning[rows], batch.dense[rows]))
    device, rows = device[order], rows[order]
    columns = {
        name: np.concatenate([part[name] for _, _, part in timed])[order] for name in timed[0][2]
    }
    columns["bottleneck"] = texts(BOTTLENECKS, columns["bottleneck"])
    columns["energy_reason"] = texts(REASONS, columns["energy_reason"])
    columns["uncalibrated"] = _names(columns["uncalibrated"])
    columns |= _identity(batch, prunings, rows, requests)
    columns |= memory_columns(batch, rows, hardware, device)
    columns["hardware"] = texts([hw.label for hw in hardware], device)
    return Results({name: columns[name] for name in COLUMNS}, pruning=batch.pruning[rows])


def request_results(
    requests: Sequence[Request],
    prunings: Sequence[Pruning],
    hardware: Sequence[HardwareProfile],
    reject: Reject = rejecting,
) -> Results:
    """Return the results of requests that differ only in shape, by request, pruning and device.
    Workloads differ between devices where the engine's arithmetic or token budget does."""
    parts = [
        results_of(batch_of(some, computed, reject), prunings, devices, some, reject)
        for some, computed, devices in _computed_together(requests, prunings, hardware)
    ]
    if len(parts) == 1:
        return parts[0]
    results = Results.join(parts)
    shape = {(r.batch, r.seq): i for i, r in enumerate(requests)}
    place = [
        shape[one]
        for one in zip(results.columns["batch"].tolist(), results.columns["seq"].tolist())
    ]
    label = {hw.label: i for i, hw in enumerate(hardware)}
    device = [label[name] for name in results.columns["hardware"].tolist()]
    return results.take(np.lexsort((np.array(device), results.pruning, np.array(place))))


def _computed_together(
    requests: Sequence[Request], prunings: Sequence[Pruning], hardware: Sequence[HardwareProfile]
) -> Iterator[tuple[list[Request], list[Pruning], tuple[HardwareProfile, ...]]]:
    """Yield the requests and prunings as some devices compute them, with these devices."""
    models = [p.model for p in prunings if p.model is not None]
    together = [[hw] for hw in hardware] if any(p.formats for p in prunings) else [hardware]
    for one in together:
        for some, devices in by_budget(requests, one, models):
            yield some, [p.computed(some[0], devices[0]) for p in prunings], devices


def against(
    batch: WorkloadBatch, hw: HardwareProfile, others: Sequence[IndexArray], level: float = 0.9
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return the log speedup (R, W) of every workload of a batch over R others of the batch,
    indices (W,) each, and the half-widths of its interval below and above."""
    p, every = forward_passes(batch, hw, level), []
    for other in others:
        times = prediction_intervals(p, level, other)
        middle = np.log(times.ratio)
        every.append(
            (middle, middle - np.log(times.ratio_lower), np.log(times.ratio_upper) - middle)
        )
    middle, below, above = (np.stack(part) for part in zip(*every))
    return middle, below, above


def _timed(
    batch: WorkloadBatch, hw: HardwareProfile, request: Request, reject: Reject
) -> Iterator[tuple[IndexArray, Mapping[str, Array]]]:
    """Yield indices of pruned workloads of a batch, and their columns on a device."""
    dense, pruned = (batch.pruning < 0).nonzero()[0], (batch.pruning >= 0).nonzero()[0]
    if not len(pruned):
        return

    def timed(rows: IndexArray) -> dict[str, Array]:
        some = batch if rows is pruned else batch.take(np.concatenate([dense, rows]))
        columns, _ = compare(some, hw, request.level, request.dense_s)
        return {name: column[len(dense) :] for name, column in columns.items()}

    try:
        yield pruned, timed(pruned)
        return
    except InputError:
        requested = np.unique(batch.pruning[pruned]).tolist()
    try:
        timed(pruned[:0])
    except InputError as error:
        for i in (None, *requested):
            reject(i, str(error), hw.label)
        return
    for i in requested:
        rows = np.flatnonzero(batch.pruning == i)
        try:
            yield rows, timed(rows)
        except InputError as error:
            reject(i, str(error), hw.label)


def _identity(
    batch: WorkloadBatch,
    prunings: Sequence[Pruning],
    rows: IndexArray,
    requests: Sequence[Request],
) -> dict[str, Array]:
    """Return the columns of some workloads of a batch that follow from requests and prunings."""
    meta, pruning, request = batch.rows.meta, batch.pruning[rows], batch.dense[rows]
    formats = _formats(batch, 0)
    of_pruning = {
        "family": [p.family for p in prunings],
        "options": [p.label for p in prunings],
        "method": [p.method for p in prunings],
        "prune": [p.prune for p in prunings],
        **_changes(batch, prunings),
        "pruned": [p.model.name if p.model else "" for p in prunings],
    }
    equal = {
        "model": meta.model,
        "engine": load_engine(meta.engine).name,
        "phase": meta.phase,
        **vars(formats),
        "parallel": meta.parallel,
        "new_tokens": meta.new_tokens,
        "devices": meta.devices,
        "power_limit": np.nan if (limit := requests[0].power_limit) is None else limit,
        "ideal": requests[0].ideal,
        "level": requests[0].level,
        "measured_bound": np.nan,
    }
    return {
        **{name: texts(names, pruning) for name, names in of_pruning.items()},
        **{
            name: np.full(len(rows), value, dtype=object if isinstance(value, str) else None)
            for name, value in equal.items()
        },
        "batch": np.array([r.batch for r in requests])[request],
        "seq": np.array([r.seq for r in requests])[request],
        "cached_prefix": np.array([cached_tokens(r) for r in requests])[request],
        "sparsity": batch.sparsity[rows],
        "realised_sparsity": batch.realised[rows],
        "flop_bound": batch.flop_bound[rows],
        "byte_bound": batch.byte_bound[rows],
    }


def _changes(batch: WorkloadBatch, prunings: Sequence[Pruning]) -> dict[str, list[str]]:
    """Return what each pruning removes of the parts of the model, and its number formats if the
    dense model has others, from its first workload of the batch."""
    parts, formats = [""] * len(prunings), [""] * len(prunings)
    for i, first in zip(*(one.tolist() for one in np.unique(batch.pruning, return_index=True))):
        if i < 0:
            continue
        pruning, of_dense = prunings[i], int(batch.dense[first])
        dense, pruned = batch.models[of_dense], batch.models[first]
        if dense is not None and pruned is not None:
            steps = () if pruning.model else pruning.steps
            parts[i] = removed_parts(steps, sizes(dense), sizes(pruned))
        if pruning.other:
            ours, theirs = (_formats(batch, one) for one in (first, of_dense))
            formats[i] = "" if ours == theirs else f"{ours.text} against {theirs.text}"
    return {"parts": parts, "formats": formats}


def _formats(batch: WorkloadBatch, workload: int) -> NumberFormats:
    """Return the number formats of a workload's layers (weights: of routed experts, if the model
    has some)."""
    w, at = batch.rows, batch.rows_of(workload)
    experts, gemm = at[w.kind[at] == EXPERTS], at[(w.kind[at] == GEMM) & (w.layer[at] >= 0)]
    codes = (
        w.dtype[gemm],
        w.weight_dtype[experts if len(experts) else gemm],
        w.weight_dtype[at[w.is_attention[at]]],
    )
    return NumberFormats(*(DTYPES[some[0]] if len(some) else w.meta.dtype for some in codes))


def _uncalibrated(p: PredictedPass, dense: IndexArray) -> tuple[IndexArray, FloatArray]:
    """Return for each workload and its dense workload together which operators have default
    constants, one bit per entry of :data:`TITLES`, and their share of the time, of the two the
    larger."""
    (w, which), many = p.workloads.shapes, len(TITLES)
    part, places = np.full(len(w), many), {name: i for i, name in enumerate(TITLES)}
    for operator, rows, formats in p.workloads.distinct:
        name, label = operator.section(rows), operator.label(formats.dtype, formats.second)
        if name in TITLES and p.hw.section(name, label).status == "default":
            part[rows.at] = places[name]
    part[(w.kind == Kind.ELEMENTWISE) & (w.k > 0)] = many  # their times are known
    if part.min() == many:
        return np.zeros(len(p.workloads), dtype=np.intp), np.zeros(len(p.workloads))
    spent = sums(
        p.workloads.owner * (many + 1) + part[which], p.row_s, (len(p.workloads), many + 1)
    )[:, :many]
    share = spent * (p.device_share / np.maximum(p.device_s, 1e-300))[:, None]
    both = np.maximum(share, share[dense])
    total = share.sum(axis=1)
    return (both >= NAMED_SHARE) @ (1 << np.arange(many)), np.maximum(total, total[dense])


def _names(codes: Array) -> Array:
    """Return sets of :data:`TITLES`, one bit each, as texts joined by "+"."""
    sets, which = np.unique(codes, return_inverse=True)
    names = ["+".join(name for i, name in enumerate(TITLES) if code >> i & 1) for code in sets]
    return texts(names, which)
