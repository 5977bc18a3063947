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
from numpy.typing import NDArray

from simulator.arrays import Array, FloatArray, IndexArray
from simulator.codes import DTYPES, EXPERTS, GEMM
from simulator.engines.engine import load_engine
from simulator.errors import InputError
from simulator.models.lower import cached_tokens
from simulator.operators import TITLES
from simulator.operators.base import BOTTLENECKS
from simulator.passes import ForwardPass
from simulator.prediction.batch import Reject, batch_of, rejecting
from simulator.prediction.prunings import Pruning, removed_parts, sizes
from simulator.prediction.requests import by_budget
from simulator.prediction.result import COLUMNS, Labels, Results
from simulator.prediction.serving import memory_columns, serving
from simulator.request import Request
from simulator.uncertainty.forward import forward_passes
from simulator.uncertainty.intervals import Inferred, prediction_intervals
from simulator.workload import WorkloadBatch, sums

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile

# correlation of the errors of equal operators in two workloads; the kernels around them differ
SAME_SHAPE = 0.99

SMALL_SHARE = 0.05
"""A result counts as calibrated if operators with default constants take less than this share of
the time."""

NAMED_SHARE = 0.01  # share of the time from which operators with default constants are named


def compare(
    batch: WorkloadBatch, hw: HardwareProfile, level: float = 0.9, dense_s: float | None = None
) -> tuple[dict[str, Array], Inferred | None]:
    """Return the columns of a result that follow from times, one entry per workload of a batch
    (``bottleneck`` is an index into ``BOTTLENECKS``, ``uncalibrated`` has one bit per entry of
    ``TITLES``), on one device; and what is inferred from a measured time. ``level`` is the level of
    the intervals, ``dense_s`` a measured time of the first workload. Raises InputError for a
    workload that cannot run."""
    p, dense = forward_passes(batch, hw, level), batch.dense
    found = prediction_intervals(
        p, level, dense, *alike(dense, p), None if dense_s is None else (0, dense_s)
    )
    served = serving(p, found, level)
    code, share = p.bottleneck
    default_parts, default_share = _uncalibrated(p, dense)
    roofline_bound = batch.bound(p.ideal_s)
    gain = roofline_bound - 1.0
    efficiency = np.divide(
        found.ratio - 1.0, gain, out=np.full(len(batch), np.nan), where=gain > 1e-9
    )
    return {
        "dense_s": found.seconds[dense],
        "dense_lower": found.lower[dense],
        "dense_upper": found.upper[dense],
        "pruned_s": found.seconds,
        "pruned_lower": found.lower,
        "pruned_upper": found.upper,
        "speedup": found.ratio,
        "speedup_lower": found.ratio_lower,
        "speedup_upper": found.ratio_upper,
        "roofline_bound": roofline_bound,
        "bottleneck": code,
        "bottleneck_share": share,
        "efficiency": efficiency,
        "calibrated": default_share < SMALL_SHARE,
        "uncalibrated": default_parts,
        "uncalibrated_share": default_share,
        **served,
        **{f"dense_{name}": column[dense] for name, column in served.items()},
    }, found.inferred


def results_of(
    batch: WorkloadBatch,
    prunings: Sequence[Pruning],
    hardware: Sequence[HardwareProfile],
    requests: Sequence[Request],
    reject: Reject = rejecting,
) -> Results:
    """Return the results of the pruned workloads of a batch by request, pruning and device;
    prunings that a device cannot run go to ``reject``."""
    found = [
        (d, at, timed)
        for d, hw in enumerate(hardware)
        for at, timed in _timed(batch, hw, requests[0], reject)
    ]
    if not found:
        return Results.empty()
    device = np.concatenate([np.full(len(at), d) for d, at, _ in found])
    at = np.concatenate([at for _, at, _ in found])
    order = np.lexsort((device, batch.pruning[at], batch.dense[at]))
    device, at = device[order], at[order]
    columns: dict[str, Array | Labels] = dict(found[0][2])
    if len(found) > 1:
        columns = {
            name: np.concatenate([timed[name] for _, _, timed in found])[order] for name in columns
        }
    elif np.count_nonzero(order[1:] - order[:-1] != 1):
        columns = {name: column[order] for name, column in columns.items()}
    columns |= _identity(batch, prunings, hardware, device, at, requests[0].ideal)
    columns["bottleneck"] = Labels(np.asarray(columns["bottleneck"], dtype=np.int32), BOTTLENECKS)
    columns["uncalibrated"] = _names(columns["uncalibrated"])
    columns["batch"], columns["seq"] = np.array([(r.batch, r.seq) for r in requests])[
        batch.dense[at]
    ].T
    columns["cached_prefix"] = np.array([cached_tokens(r) for r in requests])[batch.dense[at]]
    columns["sparsity"], columns["realised_sparsity"] = batch.sparsity[at], batch.realised[at]
    columns["flop_bound"], columns["byte_bound"] = batch.flop_bound[at], batch.byte_bound[at]
    columns["measured_bound"], columns["level"] = (
        np.full(len(at), np.nan),
        np.full(len(at), requests[0].level),
    )
    columns |= memory_columns(batch, at, hardware, device)
    return Results({name: columns[name] for name in COLUMNS}, pruning=batch.pruning[at])


def request_results(
    requests: Sequence[Request],
    prunings: Sequence[Pruning],
    hardware: Sequence[HardwareProfile],
    reject: Reject = rejecting,
) -> Results:
    """Return the results of requests that differ only in shape, by request, pruning and device.
    Workloads differ between devices where the token budget of the engine does."""
    parts = [
        results_of(batch_of(some, prunings, reject), prunings, devices, some, reject)
        for some, devices in by_budget(requests, hardware)
    ]
    if len(parts) == 1:
        return parts[0]
    found = Results.join(parts)
    shape = {(r.batch, r.seq): i for i, r in enumerate(requests)}
    place = [
        shape[one] for one in zip(found.columns["batch"].tolist(), found.columns["seq"].tolist())
    ]
    label = {hw.label: i for i, hw in enumerate(hardware)}
    device = [label[name] for name in found.columns["hardware"].tolist()]
    return found.take(np.lexsort((np.array(device), found.pruning, np.array(place))))


def against(
    batch: WorkloadBatch, hw: HardwareProfile, others: Sequence[IndexArray], level: float = 0.9
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return the log speedup (R, W) of every workload of a batch over R others of the batch,
    indices (W,) each, and the half-widths of its interval below and above."""
    p, every = forward_passes(batch, hw, level), []
    for other in others:
        found = prediction_intervals(p, level, other, *alike(other, p))
        middle = np.log(found.ratio)
        every.append(
            (middle, middle - np.log(found.ratio_lower), np.log(found.ratio_upper) - middle)
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

    def timed(at: IndexArray) -> dict[str, Array]:
        some = batch if at is pruned else batch.take(np.concatenate([dense, at]))
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
        at = np.flatnonzero(batch.pruning == i)
        try:
            yield at, timed(at)
        except InputError as error:
            reject(i, str(error), hw.label)


def _identity(
    batch: WorkloadBatch,
    prunings: Sequence[Pruning],
    hardware: Sequence[HardwareProfile],
    device: IndexArray,
    at: IndexArray,
    ideal: bool,
) -> dict[str, Array | Labels]:
    meta, pruning = batch.rows.meta, batch.pruning[at].astype(np.int32)
    weights, cache = _formats(batch)
    columns: dict[str, Array | Labels] = {
        "hardware": Labels(device.astype(np.int32), tuple(hw.label for hw in hardware)),
        "family": Labels(pruning, tuple(p.family for p in prunings)),
        "options": Labels(pruning, tuple(p.label for p in prunings)),
        "method": Labels(pruning, tuple(p.method for p in prunings)),
        "prune": Labels(pruning, tuple(p.prune for p in prunings)),
        "parts": Labels(pruning, _parts(batch, prunings)),
        "pruned": Labels(pruning, tuple(p.model.name if p.model else "" for p in prunings)),
        "new_tokens": np.full(len(at), meta.new_tokens),
        "devices": np.full(len(at), meta.devices),
        "ideal": np.full(len(at), ideal),
    }
    equal, none = (
        {"model": meta.model, "engine": load_engine(meta.engine).name},
        np.zeros(len(at), dtype=np.int32),
    )
    equal |= {"phase": meta.phase, "dtype": meta.dtype, "weight_dtype": weights, "kv_dtype": cache}
    for name, text in {**equal, "parallel": meta.parallel}.items():
        columns[name] = Labels(none, (text,))
    return columns


def _parts(batch: WorkloadBatch, prunings: Sequence[Pruning]) -> tuple[str, ...]:
    """Return what each pruning removes of the parts of the model, from its first workload of the
    batch."""
    out, each = [""] * len(prunings), sizes(batch)
    for i in set(batch.pruning.tolist()) - {-1}:
        first = int((batch.pruning == i).argmax())
        steps = () if prunings[i].model else prunings[i].steps
        out[i] = removed_parts(steps, each[int(batch.dense[first])], each[first])
    return tuple(out)


def _formats(batch: WorkloadBatch) -> tuple[str, str]:
    """Return the number formats of the layers' weights (of routed experts, if the model has some)
    and of the cache."""
    rows, first = batch.rows, slice(int(batch.lengths[0]))
    kind, formats, dtype = rows.kind[first], rows.weight_dtype[first], rows.meta.dtype
    experts, gemm = kind == EXPERTS, (kind == GEMM) & (rows.layer[first] >= 0)
    weights, caches = (
        formats[experts if np.count_nonzero(experts) else gemm],
        formats[rows.is_attention[first]],
    )
    return DTYPES[weights[0]] if len(weights) else dtype, DTYPES[caches[0]] if len(
        caches
    ) else dtype


def _uncalibrated(p: ForwardPass, dense: IndexArray) -> tuple[IndexArray, FloatArray]:
    """Return for each workload and its dense workload together which operators have default
    constants, one bit per entry of :data:`TITLES`, and their share of the time, of the two the
    larger."""
    (w, which), many = p.workloads.shapes, len(TITLES)
    part, places = np.full(len(w), many), {name: i for i, name in enumerate(TITLES)}
    for operator, rows, formats in p.workloads.distinct:
        name, label = operator.section(rows), operator.label(formats.dtype, formats.second)
        if name in TITLES and p.hw.section(name, label).status == "default":
            part[rows.at] = places[name]
    if part.min() == many:
        return np.zeros(len(p.workloads), dtype=np.intp), np.zeros(len(p.workloads))
    spent = sums(
        p.workloads.owner * (many + 1) + part[which], p.row_s, (len(p.workloads), many + 1)
    )[:, :many]
    share = spent * (p.device_share / np.maximum(p.device_s, 1e-300))[:, None]
    both = np.maximum(share, share[dense])
    total = share.sum(axis=1)
    return (both >= NAMED_SHARE) @ (1 << np.arange(many)), np.maximum(total, total[dense])


def _names(codes: Array | Labels) -> Labels:
    """Return sets of :data:`TITLES`, one bit each, as texts joined by "+"."""
    found = sorted(set(codes.tolist()))
    texts = ("+".join(name for i, name in enumerate(TITLES) if code >> i & 1) for code in found)
    return Labels(
        np.array(found, dtype=np.intp).searchsorted(np.asarray(codes)).astype(np.int32),
        tuple(texts),
    )


def alike(other: IndexArray, p: ForwardPass) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Return the correlation (W, G) of errors of groups with those of another workload, and whether
    (W,) the host launches another mix of kernels."""
    groups, spent = p.workloads.groups, p.group_s
    each = spent / np.maximum(groups.count, 1e-300)
    equal = np.abs(each - each[other]) <= 1e-9 * each[other]
    untouched = np.abs(spent - spent[other]) <= 1e-9 * spent[other]
    same = np.where(untouched, 1.0, np.where(equal, SAME_SHAPE, 0.0))
    # other kernels, or fewer launches
    return same, ~(groups.count == groups.count[other]).all(axis=1)
