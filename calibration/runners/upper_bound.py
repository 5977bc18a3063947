"""Measured upper bound of pruning: times of GEMMs and attention at a model's dense and pruned
shapes.

``measured_bound`` is the time of the dense model's GEMMs and attention over the time of dense
kernels at the pruned shapes, on the device: the best possible speedup, without sparse kernels,
routers or gathers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from calibration.devices.protocol import LIBRARIES, Device, Operator
from calibration.measure.plan import MeasurementPlan, Rates, in_order
from calibration.measure.timing import Protocol, default_visits
from calibration.records.screening import without_exact
from calibration.records.store import content_records, read_store
from calibration.records.timing_table import OPERATORS, Records, Row
from calibration.runners.cases import Case, CaseRow, predicted_speedup
from calibration.runners.runs import MeasuredRun, RunOptions, begin, measure_plan
from calibration.validation.scoring import errors
from simulator.arrays import FloatArray
from simulator.codes import Kind
from simulator.hardware.profile import HardwareProfile
from simulator.operators.attention import Geometry, decode, prefill
from simulator.operators.base import Estimate
from simulator.uncertainty.operators import OperatorTimes, gemm_time, operator_time
from simulator.workload import Workload

# features that remain after unstructured pruning are rounded to a multiple, as in structured
# families
ALIGN = 16
# Plain kernels and the dimensions of their shapes
DIMENSIONS: Mapping[str, tuple[str, ...]] = {
    "gemm": ("m", "n", "k"),
    "attention_prefill": ("batch", "q_len", "kv_len", "heads", "kv_heads", "head_dim"),
    "attention_decode": ("batch", "kv_len", "heads", "kv_heads", "head_dim"),
}
# its operands are in the cache, because the previous kernel wrote them
HOT = ("attention_prefill",)
Shape = tuple[str, tuple[int, ...]]  # a plain kernel and its sizes


@dataclass(frozen=True)
class Bound(CaseRow):
    dense_kernels_s: float  # GEMMs and attention
    pruned_kernels_s: float
    measured_bound: float  # NaN if shapes have no time
    lower: float  # 95 % interval of the measured bound, from the scatter of its samples
    upper: float
    # ratio predicted for the same plain kernels, from measured shapes if the profile has them
    predicted_bound: float
    model_bound: float  # the same ratio from the cost model alone
    flop_bound: float
    byte_bound: float
    roofline_bound: float
    predicted: float  # speedup of the whole pass, including work that pruning adds
    predicted_lower: float
    predicted_upper: float
    efficiency: float
    kernel_share: float  # share of the plain kernels in the predicted dense pass
    missing: int  # number of shapes without a time


def plain_kernels(w: Workload) -> dict[Shape, float]:
    """Return a workload's GEMMs and attention as plain dense kernels: the count of each shape.

    Work that pruning adds is excluded, and so are routed experts and latent attention, which have
    no plain kernel. A GEMM with zeros in its weights (2:4 or unstructured) becomes a dense GEMM
    with fewer input features, in multiples of :data:`ALIGN`. A decode that skips blocks becomes a
    decode with the remaining keys. A prefill that skips blocks, or has a sliding window, becomes a
    share of a dense prefill, because its queries need all keys.
    """
    runs = ~w.overhead & (w.count > 0)
    plain = runs & (w.latent == 0) & ((w.value_dim == 0) | (w.value_dim == w.head_dim))
    gemm, prefill, decode = (
        w.take(rows & (w.kind == kind))
        for rows, kind in (
            (runs, Kind.GEMM),
            (plain, Kind.PREFILL_ATTENTION),
            (plain, Kind.DECODE_ATTENTION),
        )
    )
    k = gemm.k.astype(np.float64)
    left = np.maximum(np.round(k * gemm.density / ALIGN), 1.0) * ALIGN
    k = np.where(gemm.density < 1.0, np.minimum(left, k), k)
    share = (
        prefill.density
        * prefill.pairs
        / prefill.replace(window=np.zeros_like(prefill.window)).pairs
    )
    found = (
        _counted("gemm", gemm, gemm.count, k=k),
        _counted("attention_prefill", prefill, prefill.count * share),
        _counted(
            "attention_decode", decode, decode.count, kv_len=decode.keys_seen * decode.density
        ),
    )
    return {shape: count for counts in found for shape, count in counts}


def _counted(
    kind: str, w: Workload, counts: FloatArray, **changed: FloatArray
) -> Iterator[tuple[Shape, float]]:
    """Yield each shape of a kernel with its count; ``changed`` replaces columns of the workload."""
    sizes = np.stack([changed.get(name, getattr(w, name)) for name in DIMENSIONS[kind]], axis=1)
    shapes, which = np.unique(
        np.maximum(np.round(sizes), 1.0).astype(np.int64), axis=0, return_inverse=True
    )
    found = np.bincount(which.reshape(-1), weights=counts, minlength=len(shapes))
    for shape, count in zip(shapes.tolist(), found.tolist(), strict=True):
        yield (kind, tuple(shape)), count


def operator_of(shape: Shape, dtype: str) -> Operator:
    kind, sizes = shape
    named: Row = dict(zip(DIMENSIONS[kind], sizes, strict=True))
    if kind == "attention_decode":
        named["q_len"] = 1
    return Operator(kind, dtype, **named, cold=kind not in HOT)


def shapes_of(cases: Sequence[Case], seed: int = 0) -> list[Shape]:
    """Return every shape of some cases once, case by case in random order: short runs complete some
    cases."""
    rng = np.random.default_rng(seed)
    found: dict[Shape, None] = {}
    for i in rng.permutation(len(cases)):
        shapes = [*plain_kernels(cases[i].dense), *plain_kernels(cases[i].pruned)]
        found.update(dict.fromkeys(shapes[j] for j in rng.permutation(len(shapes))))
    return list(found)


def measure_bounds(
    folder: str | Path,
    device: Device,
    cases: Sequence[Case],
    options: RunOptions,
    *,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> MeasuredRun:
    """Time the plain kernels of cases into a run folder, new or of an earlier run of the same
    device."""
    dtype = options.dtype
    budget_s = options.budget_s
    seed = options.seed
    start = device.clock()
    description = device.describe()
    shapes = shapes_of(cases, seed)
    file, header = begin(folder, device, dtype, budget_s, memory_bytes=description.memory_bytes)

    def planned(rates: Rates, protocol: Protocol, _: int) -> tuple[MeasurementPlan, Protocol]:
        left = max(budget_s - (device.clock() - start), 1e-3)
        visits = default_visits(description)
        # a third of the time is reserved for drift checks and for repeats
        each = 0.65 * (left / visits) / max(len(shapes), 1) - rates.setup_s
        operators = [operator_of(shape, dtype) for shape in shapes]
        # a short budget times fewer shapes, each with enough samples
        enough = max(2.0 * rates.sampling_s(op, protocol) for op in operators)
        limit = max(enough, min(each, 2.0 * protocol.time_limit_s))
        protocol = replace(protocol, time_limit_s=limit)
        plan = in_order(operators, rates, protocol=protocol, budget_s=left, seed=seed)
        note(f"{description.device}; {description.software}; {dtype}; {len(shapes)} shapes")
        return replace(plan, visits=visits), protocol

    return measure_plan(file, header, device, options, planned, progress)


def kernel_seconds(records: Records, dtype: str) -> Mapping[Shape, tuple[float, float]]:
    """Return time and relative half-width (95 %) of plain kernels by shape, as medians over
    repeats."""
    usable = (
        records.timed
        & (records.labels() == dtype)
        & (records.window == 0)
        & (records.density == 1.0)
        & np.array([s.kernel not in LIBRARIES for s in records.sources], dtype=bool)[records.source]
    )
    out: dict[Shape, tuple[float, float]] = {}
    for kind, names in DIMENSIONS.items():
        of_kind = records.operator == OPERATORS.index(kind)
        rows = records.select(usable & of_kind & (records.cold == (kind not in HOT)))
        half = np.nan_to_num(rows.spread, posinf=0.0)
        group = rows.groups(*names)
        for i in np.unique(group):
            same = np.flatnonzero(group == i)
            shape = tuple(int(getattr(rows, name)[same[0]]) for name in names)
            out[kind, shape] = float(np.median(rows.seconds[same])), float(np.median(half[same]))
    return out


def bounds(
    cases: Sequence[Case], records: Records, hw: HardwareProfile, *, dtype: str = "bf16"
) -> list[Bound]:
    times = kernel_seconds(records, dtype)
    alone = without_exact(hw)
    device = records.sources[0].device if records.sources else ""
    out = []
    for case in cases:
        s = predicted_speedup(case, hw)
        measured = _measured(case, times)
        plain, model = (
            [_predicted(w, profile, dtype) for w in (case.dense, case.pruned)]
            for profile in (hw, alone)
        )
        gain = measured["measured_bound"] - 1.0
        bound = Bound(
            **case.columns(hw, s),
            **measured,
            device=device,
            dtype=dtype,
            predicted_bound=plain[0] / plain[1],
            model_bound=model[0] / model[1],
            efficiency=(s.speedup - 1.0) / gain if gain > 1e-9 else math.nan,
            kernel_share=plain[0] / s.dense_s,
        )
        out.append(bound)
    return out


def _measured(case: Case, times: Mapping[Shape, tuple[float, float]]) -> Row:
    """Return the columns of the measured bound."""
    dense_s, dense_half, dense_missing = _total(case.dense, times)
    pruned_s, pruned_half, pruned_missing = _total(case.pruned, times)
    ratio = dense_s / pruned_s
    half = math.hypot(dense_half, pruned_half)
    return {
        "dense_kernels_s": dense_s,
        "pruned_kernels_s": pruned_s,
        "measured_bound": ratio,
        "lower": ratio * math.exp(-half),
        "upper": ratio * math.exp(half),
        "missing": dense_missing + pruned_missing,
    }


def measured_bounds(file: str | Path, cases: Sequence[Case], dtype: str = "bf16") -> list[float]:
    """Return the measured bounds of cases; NaN if the file lacks some kernels or does not exist."""
    times = kernel_seconds(content_records(read_store(file)), dtype) if Path(file).is_file() else {}
    return [_total(case.dense, times)[0] / _total(case.pruned, times)[0] for case in cases]


def bound_errors(rows: Sequence[Bound]) -> dict[str, float]:
    """Return median errors of the bounds that the profile and its cost model alone predict."""
    known = [r for r in rows if math.isfinite(r.measured_bound)]
    if not known:
        return {}
    measured, predicted, model = np.array(
        [(r.measured_bound, r.predicted_bound, r.model_bound) for r in known]
    ).T
    return {
        name: errors(b, measured)["median"]
        for name, b in (("predicted", predicted), ("model", model))
    }


def _total(w: Workload, times: Mapping[Shape, tuple[float, float]]) -> tuple[float, float, int]:
    """Return time, relative half-width and the number of missing kernels."""
    kernels = plain_kernels(w)
    if missing := sum(shape not in times for shape in kernels):
        return math.nan, math.nan, missing
    each, half = np.array([times[shape] for shape in kernels]).T
    seconds = each * np.array([*kernels.values()])
    total = float(seconds.sum())
    return total, float(np.sqrt(((seconds * half) ** 2).sum())) / total, 0


def _attention(
    cost: Callable[..., Estimate], calls: Geometry, hw: HardwareProfile, dtype: str
) -> OperatorTimes:
    return operator_time(cost(calls, hw, dtype), hw)


_PREDICT: Mapping[str, Callable[..., OperatorTimes]] = {
    "gemm": gemm_time,
    "attention_prefill": lambda *sizes, dtype: _attention(
        prefill, Geometry.of(*sizes[:-1]), sizes[-1], dtype
    ),
    "attention_decode": lambda batch, *sizes, dtype: _attention(
        decode, Geometry.of(batch, 1, *sizes[:-1]), sizes[-1], dtype
    ),
}


def _predicted(w: Workload, hw: HardwareProfile, dtype: str) -> float:
    kernels = plain_kernels(w)
    total = 0.0
    for kind, time in _PREDICT.items():
        counts = np.array([count for (own, _), count in kernels.items() if own == kind])
        if len(counts):
            sizes = np.array([sizes for own, sizes in kernels if own == kind]).T
            total += float(time(*sizes, hw, dtype=dtype).seconds @ counts)
    return total
