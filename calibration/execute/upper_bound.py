"""The measured upper bound of pruning: dense GEMMs timed at a model's dense and pruned shapes, nothing else.

``measured_bound`` is the time of a model's dense GEMMs over the time of plain dense GEMMs at the pruned model's shapes,
on the device: what silicon grants at best, with no sparse kernel, no router, no gather. Use :func:`measure_bounds` to
time those of some cases (:func:`calibration.execute.cases.settings_of`) into a run folder, :func:`bounds` to read them
from records.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from calibration.devices.protocol import Device
from calibration.execute.cases import Case, Key, predicted_speedup
from calibration.execute.runs import RECORDS, check_folder
from calibration.measure.plan import Rates, check_budget, for_model
from calibration.measure.probe import default_protocol, default_visits, probe
from calibration.measure.run import Outcome, Progress, run
from calibration.records.exact import without_exact
from calibration.records.lines import content_records
from calibration.records.store import Header, Store, read_store
from calibration.records.table import Records
from simulator.errors import InputError
from simulator.hardware.profile import HardwareProfile
from simulator.kernels.gemm import gemm_time
from simulator.workload import Kind, Workload

F = NDArray[np.float64]
Shape = tuple[int, int, int]
ALIGN = 16
"""Features that zeros without structure leave are rounded to a multiple of this, as the families with structure do."""


@dataclass(frozen=True)
class Bound:
    """The measured upper bound of a case beside the others and the prediction; fields are in the order of columns.

    ``lower`` and ``upper`` enclose the measured bound as far as the spread of its samples goes (95 %).
    ``predicted_bound`` is the profile's ratio for the same plain GEMMs, from its exact shapes where it has them,
    ``model_bound`` that of its model alone; ``predicted`` is the whole pass, what pruning adds included. ``missing``
    counts shapes without a time, with which there is no measured bound (NaN).
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
    dense_gemm_s: float
    pruned_gemm_s: float
    measured_bound: float
    lower: float
    upper: float
    predicted_bound: float
    model_bound: float
    flop_bound: float
    byte_bound: float
    roofline_bound: float
    predicted: float
    predicted_lower: float
    predicted_upper: float
    efficiency: float
    gemm_share: float
    missing: int


@dataclass(frozen=True)
class Measured:
    """What :func:`measure_bounds` did: how the run ended, the records of the folder, the number of shapes asked for."""

    outcome: Outcome
    records: Records
    shapes: int


def plain_gemms(w: Workload) -> tuple[NDArray[np.int64], F]:
    """A workload's GEMMs as plain dense ones: shapes (g, 3) as m, n, k, and how often each runs.

    What pruning adds is left out. Where a kernel computes with zeros in its weights (2:4, or without structure) the
    bound is a dense GEMM over as many input features as there are weights left, in multiples of :data:`ALIGN`.

    >>> q = {"role": "q", "m": 2, "n": 64, "k": 64}
    >>> w = Workload.from_rows([{**q, "count": 3}, {**q, "role": "k"}])
    >>> shapes, count = plain_gemms(w)
    >>> shapes.tolist(), count.tolist()
    ([[2, 64, 64]], [4.0])
    """
    rows = np.flatnonzero((w.kind == Kind.GEMM) & ~w.overhead & (w.count > 0))
    k = w.k[rows].astype(np.float64)
    left = np.maximum(np.round(k * w.density[rows] / ALIGN), 1.0) * ALIGN
    k = np.where(w.density[rows] < 1.0, np.minimum(left, k), k)
    m = np.maximum(np.round(w.m[rows].astype(np.float64)), 1.0)
    table = np.stack([m, w.n[rows].astype(np.float64), k], axis=1).astype(np.int64)
    shapes, which = np.unique(table, axis=0, return_inverse=True)
    return shapes, np.bincount(which.reshape(-1), weights=w.count[rows], minlength=len(shapes)).astype(np.float64)


def shapes_of(cases: Sequence[Case]) -> list[Shape]:
    """Every (m, n, k) the bounds of some cases need, once."""
    tables = [plain_gemms(w)[0] for case in cases for w in (case.dense, case.pruned)]
    return [(int(m), int(n), int(k)) for m, n, k in np.unique(np.concatenate(tables), axis=0)]


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
    path = check_folder(folder)
    check_budget(budget_s)
    if dtype not in device.dtypes():
        raise InputError(f"--dtype {dtype}: device {device.name} has none; it has {', '.join(device.dtypes())}")
    description = device.describe()
    extra = {"opened": device.name, "memory_bytes": description.memory_bytes}
    header = Header(description.device, dict(description.stack), dtype, extra=extra)
    file = path / RECORDS
    start = device.clock()
    base = default_protocol(description, budget_s)
    if file.exists() and file.stat().st_size:
        read_store(file).header.refuse_other(header, str(file))
    else:
        path.mkdir(exist_ok=True)
        header = replace(
            header, extra={**extra, "rates": asdict(probe(device, dtype, base)), "seed": seed, "budget_s": budget_s}
        )
    shapes = shapes_of(cases)
    with Store(file, header) as store:
        kept = store.header.extra.get("rates")
        rates = Rates(**kept) if isinstance(kept, Mapping) else probe(device, dtype, base)
        left = max(budget_s - (device.clock() - start), 1e-3)
        visits = default_visits(description)
        protocol = replace(base, time_limit_s=_share(left / visits, len(shapes), rates, base.time_limit_s))
        plan = for_model(
            shapes, rates, dtype=dtype, protocol=protocol, budget_s=left, seed=seed
        )
        turn = {shape: i for i, shape in enumerate(_by_case(cases, seed))}
        ordered = sorted(plan.items, key=lambda i: turn[i.operator.m, i.operator.n, i.operator.k])
        plan = replace(plan, items=tuple(ordered), visits=visits)
        say(f"{description.device}; {description.software}; {dtype}; {len(shapes)} shapes")
        outcome = run(
            plan, device, store.append, previous=store.rows, protocol=protocol, budget_s=left, progress=progress
        )
    return Measured(outcome, content_records(read_store(file)), len(shapes))


def _by_case(cases: Sequence[Case], seed: int) -> list[Shape]:
    """Shapes, case after case in random order: where time runs out some cases are whole, rather than all in part."""
    rng = np.random.default_rng(seed)
    found: dict[Shape, None] = {}
    for i in rng.permutation(len(cases)):
        shapes = np.concatenate([plain_gemms(w)[0] for w in (cases[i].dense, cases[i].pruned)])
        found.update(dict.fromkeys((int(m), int(n), int(k)) for m, n, k in rng.permutation(shapes)))
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


def bounds(
    cases: Sequence[Case], records: Records, hw: HardwareProfile, *, runtime: str = "cuda_graph", dtype: str = "bf16"
) -> list[Bound]:
    """Measured bounds of cases, in their order, beside the datasheet's and a profile's prediction of the whole pass.

    A case of which ``records`` lacks some cold dense GEMMs has no measured bound; one that the profile cannot predict
    (2:4 without sparse tensor cores) has NaN predictions.
    """
    times, alone = gemm_seconds(records, dtype), without_exact(hw)
    device = records.sources[0].device if records.sources else ""
    out = []
    for case in cases:
        s = predicted_speedup(case, hw, runtime)
        dense, pruned = (_total(w, times) for w in (case.dense, case.pruned))
        ratio, half = dense.seconds / pruned.seconds, math.hypot(dense.half, pruned.half)
        plain = [_predicted(w, hw, dtype) for w in (case.dense, case.pruned)]
        model = [_predicted(w, alone, dtype) for w in (case.dense, case.pruned)]
        out.append(
            Bound(
                **case.columns(hw, s),
                device=device,
                dtype=dtype,
                dense_gemm_s=dense.seconds,
                pruned_gemm_s=pruned.seconds,
                measured_bound=ratio,
                lower=ratio * math.exp(-half),
                upper=ratio * math.exp(half),
                predicted_bound=plain[0] / plain[1],
                model_bound=model[0] / model[1],
                efficiency=(s.speedup - 1.0) / (ratio - 1.0) if ratio - 1.0 > 1e-9 else math.nan,
                gemm_share=plain[0] / s.dense_s,
                missing=dense.missing + pruned.missing,
            )
        )
    return out


def measured_bounds(file: str | Path, cases: Sequence[Case], dtype: str = "bf16") -> dict[Key, float]:
    """Measured bounds of the cases whose GEMMs a store of records has, by their keys; empty without the file."""
    if not Path(file).is_file():
        return {}
    times = gemm_seconds(content_records(read_store(file)), dtype)
    ratios = {c.key: _total(c.dense, times).seconds / _total(c.pruned, times).seconds for c in cases}
    return {key: ratio for key, ratio in ratios.items() if math.isfinite(ratio)}


def bound_errors(rows: Sequence[Bound]) -> dict[str, float]:
    """Median relative errors of the bounds from the profile (``predicted``) and from its model alone (``model``).

    Where the profile has measured the same shapes before, the first is how well the device repeats itself.
    """
    known = [r for r in rows if math.isfinite(r.measured_bound)]
    names = {"predicted": "predicted_bound", "model": "model_bound"} if known else {}
    return {
        k: float(np.median([abs(getattr(r, name) / r.measured_bound - 1.0) for r in known]))
        for k, name in names.items()
    }


@dataclass(frozen=True)
class _Total:
    """Time of plain GEMMs (NaN where some have none), its relative half width, the number of shapes without one."""

    seconds: float
    half: float
    missing: int


def _total(w: Workload, times: Mapping[Shape, tuple[float, float]]) -> _Total:
    shapes, count = plain_gemms(w)
    keys = [(m, n, k) for m, n, k in shapes.tolist()]
    missing = sum(key not in times for key in keys)
    if missing:
        return _Total(math.nan, math.nan, missing)
    total, variance = 0.0, 0.0
    for key, number in zip(keys, count.tolist(), strict=True):
        seconds, half = times[key]
        total += number * seconds
        variance += (number * seconds * half) ** 2
    return _Total(total, math.sqrt(variance) / total, 0)


def _predicted(w: Workload, hw: HardwareProfile, dtype: str) -> float:
    shapes, count = plain_gemms(w)
    m, n, k = shapes.T
    return float(gemm_time(m, n, k, hw, dtype=dtype).seconds @ count)
