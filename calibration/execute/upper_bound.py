"""The measured upper bound of pruning: dense GEMMs timed at the dense and at the pruned shapes of a model, nothing else.

``measured_bound`` is the time of a model's dense GEMMs over the time of plain dense GEMMs at the pruned model's shapes, on the device: what
silicon grants at best, with no sparse kernel, no router, no gather. Use :func:`settings_of` to make the cases of a model,
:func:`measure_bounds` to time them into a run folder, :func:`bounds` to read them from records.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.devices.protocol import Device, Operator
from calibration.fit.base_profile import base_profile
from calibration.measure.plan import Rates, check_budget, for_model
from calibration.measure.probe import default_protocol, default_visits, probe
from calibration.measure.run import Outcome, Progress, run
from calibration.measure.runs import DATASHEET, PROFILE, RECORDS, check_folder
from calibration.records.exact import without_exact
from calibration.records.recorded import content_records
from calibration.records.records import Records
from calibration.records.store import Header, Store, read_store
from simulator.errors import InputError
from simulator.hardware.library import list_hardware, load_hardware, save_hardware
from simulator.hardware.profile import HardwareProfile
from simulator.kernels.gemm import gemm_time
from simulator.models.config import ModelConfig
from simulator.models.library import load_model
from simulator.predict.settings import Setting, check_fraction, once, one_of, whole_number
from simulator.predict.speedup import Speedup, pairs_of, speedups
from simulator.predict.table import families as family_names
from simulator.pruning import prune
from simulator.workload import PHASES, Kind, Workload

F = NDArray[np.float64]
ALIGN = 16
"""Features that zeros without structure leave are rounded to a multiple of this, as the families with structure do."""


@dataclass(frozen=True)
class Case:
    """A dense and a pruned workload of a model in one setting."""

    family: str
    sparsity: float
    phase: str
    batch: int
    seq: int
    dense: Workload
    pruned: Workload


@dataclass(frozen=True)
class Bound:
    """The measured upper bound of one case beside the others and the prediction; the order of fields is that of columns.

    ``lower`` and ``upper`` enclose the measured bound as far as the spread of its samples goes (95 %). ``predicted_bound`` is the profile's
    ratio for the same plain GEMMs, from its exact shapes where it has them, ``model_bound`` that of its model alone; ``predicted`` is the
    whole pass, what pruning adds included. ``missing`` counts shapes without a time, with which there is no measured bound (NaN).
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


def settings_of(
    model: str | ModelConfig,
    *,
    phases: Sequence[str] = ("prefill", "decode"),
    batch: Sequence[int] = (1,),
    seq: Sequence[int] = (2048,),
    families: Sequence[str] = ("all",),
    sparsities: Sequence[float] = (0.25, 0.5),
    setting: Setting | None = None,
    options: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> tuple[list[Case], list[str]]:
    """Every combination as a case, and a line for each that a family does not support; ``options`` of families by their names.

    Raises
    ------
    InputError
        For an unknown name, a value out of range, or when no case is left.

    Examples
    --------
    >>> cases, notes = settings_of("smollm2-135m", phases=["decode"], families=["depth", "semi_structured"], sparsities=[0.25])
    >>> [(c.family, c.sparsity) for c in cases], len(notes)
    ([('depth', 0.25)], 1)
    """
    config = load_model(model) if isinstance(model, str) else model
    setting, notes = setting or Setting(), dict[str, None]()
    cases: list[Case] = []
    for phase in once(one_of("phase", p, PHASES[:2]) for p in phases):
        for b in once(whole_number("batch", b) for b in batch):
            for s in once(whole_number("seq", s) for s in seq):
                dense = setting.lower(config, phase, b, s)
                for family in family_names(families):
                    for fraction in once(check_fraction(f) for f in sparsities):
                        try:
                            cases.append(
                                Case(
                                    family,
                                    fraction,
                                    phase,
                                    b,
                                    s,
                                    dense,
                                    prune(dense, family, fraction, **options.get(family, {})),
                                )
                            )
                        except InputError as error:
                            notes[f"left out: {family} at {fraction:g} in {phase}: {error}"] = None
    if not cases:
        raise InputError(next(iter(notes)).removeprefix("left out: ") if notes else "nothing to compare")
    return cases, list(notes)


def plain_gemms(w: Workload) -> tuple[NDArray[np.int64], F]:
    """A workload's GEMMs as plain dense ones: shapes (g, 3) as m, n, k, and how often each runs.

    What pruning adds is left out. Where a kernel computes with zeros in its weights (2:4, or without structure) the bound is a dense GEMM
    over as many input features as there are weights left, in multiples of :data:`ALIGN`.

    >>> w = Workload.from_rows([{"role": "q", "m": 2, "n": 64, "k": 64, "count": 3}, {"role": "k", "m": 2, "n": 64, "k": 64}])
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


def shapes_of(cases: Sequence[Case]) -> list[tuple[int, int, int]]:
    """Every (m, n, k) the bounds of some cases need, once."""
    found = {
        tuple(int(v) for v in shape) for case in cases for w in (case.dense, case.pruned) for shape in plain_gemms(w)[0]
    }
    return sorted((m, n, k) for m, n, k in found)


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

    Parameters
    ----------
    folder : str or Path
    device : Device
        Open, and left open.
    cases : sequence of Case
    budget_s : float, s
        Shared among the shapes: the more there are the less time each gets; what does not fit is left for the next run.
    dtype : str
    seed : int
    progress, say : callable
        As for :func:`calibration.measure.runs.measure_into`.

    Raises
    ------
    InputError
        Before anything is measured: a budget of zero, a number format the device lacks, a folder of another device or software.
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
            shapes, rates, dtype=dtype, protocol=protocol, refuses=device.refuses, budget_s=left, seed=seed
        )
        turn = {shape: i for i, shape in enumerate(_by_case(cases, seed))}
        ordered = sorted(plan.items, key=lambda i: turn[i.operator.m, i.operator.n, i.operator.k])
        plan = replace(plan, items=tuple(ordered), visits=visits)
        say(f"{description.device}; {description.software}; {dtype}; {len(shapes)} shapes")
        outcome = run(
            plan, device, store.append, previous=store.rows, protocol=protocol, budget_s=left, progress=progress
        )
    return Measured(outcome, content_records(read_store(file)), len(shapes))


def _by_case(cases: Sequence[Case], seed: int) -> list[tuple[int, int, int]]:
    """The shapes case after case in random order: where time runs out some cases are whole, rather than all of them in part."""
    rng = np.random.default_rng(seed)
    found: dict[tuple[int, int, int], None] = {}
    for i in rng.permutation(len(cases)):
        shapes = np.concatenate([plain_gemms(w)[0] for w in (cases[i].dense, cases[i].pruned)])
        found.update(dict.fromkeys((int(m), int(n), int(k)) for m, n, k in rng.permutation(shapes)))
    return list(found)


def _share(budget_s: float, shapes: int, rates: Rates, longest_s: float) -> float:
    """Time limit a shape that lets all of them fit: at most twice the protocol's own, at least what makes a few samples.

    A third of the time is left for anchors, and for what is repeated because other processes held the machine.
    """
    each = 0.65 * budget_s / max(shapes, 1) - rates.setup_s
    return min(max(each, 0.05), 2.0 * longest_s)


def gemm_seconds(records: Records, dtype: str) -> Mapping[str, tuple[float, float]]:
    """Time and relative half width (95 %) of every cold dense GEMM in a table, by operator key; the median of repeats."""
    names = records.labels() == dtype
    rows = records.select(
        records.is_operator("gemm") & names & records.cold & np.isfinite(records.seconds) & (records.seconds > 0)
    )
    found: dict[str, list[tuple[float, float]]] = {}
    for m, n, k, seconds, spread in zip(rows.m, rows.n, rows.k, rows.seconds, rows.spread, strict=True):
        key = Operator("gemm", dtype, m=int(m), n=int(n), k=int(k)).key
        found.setdefault(key, []).append((float(seconds), float(spread) if math.isfinite(spread) else 0.0))
    return {key: (float(np.median([s for s, _ in v])), float(np.median([h for _, h in v]))) for key, v in found.items()}


def bounds(
    cases: Sequence[Case], records: Records, hw: HardwareProfile, *, runtime: str = "cuda_graph", dtype: str = "bf16"
) -> list[Bound]:
    """Measured bounds of cases from records, beside the datasheet's bounds and a profile's prediction.

    Parameters
    ----------
    cases : sequence of Case
    records : Records
        With the cold dense GEMMs of the cases; a case of which some are missing has no measured bound.
    hw : HardwareProfile
    runtime : {"cuda_graph", "eager"}
        Of the predicted pass.
    dtype : str

    Returns
    -------
    list of Bound
        In the order of the cases; those the profile cannot predict (2:4 without sparse tensor cores) have NaN predictions.
    """
    times = gemm_seconds(records, dtype)
    device = records.sources[0].device if records.sources else ""
    alone = without_exact(hw)
    out = []
    for case in cases:
        (dense_s, dense_error, gone), (pruned_s, pruned_error, too) = (
            _total(w, times, dtype) for w in (case.dense, case.pruned)
        )
        ratio, half = (
            (math.nan, math.nan) if gone or too else (dense_s / pruned_s, math.hypot(dense_error, pruned_error))
        )
        model = [_predicted(w, hw, dtype) for w in (case.dense, case.pruned)]
        s = predicted_speedup(case, hw, runtime)
        gain = ratio - 1.0
        out.append(
            Bound(
                model=case.dense.meta.model,
                device=device,
                hardware=hw.name,
                family=case.family,
                sparsity=case.sparsity,
                realised_sparsity=case.pruned.meta.applied[-1].realised,
                phase=case.phase,
                batch=case.batch,
                seq=case.seq,
                dtype=dtype,
                dense_gemm_s=math.nan if gone else dense_s,
                pruned_gemm_s=math.nan if too else pruned_s,
                measured_bound=ratio,
                lower=ratio * math.exp(-half),
                upper=ratio * math.exp(half),
                predicted_bound=model[0] / model[1],
                model_bound=_predicted(case.dense, alone, dtype) / _predicted(case.pruned, alone, dtype),
                flop_bound=s.flop_bound,
                byte_bound=s.byte_bound,
                roofline_bound=s.roofline_bound,
                predicted=s.speedup,
                predicted_lower=s.lower,
                predicted_upper=s.upper,
                efficiency=(s.speedup - 1.0) / gain if gain > 1e-9 else math.nan,
                gemm_share=model[0] / s.dense_s,
                missing=gone + too,
            )
        )
    return out


def measured_bounds(
    file: str | Path, cases: Sequence[Case], dtype: str = "bf16"
) -> dict[tuple[str, float, str, int, int], float]:
    """Measured bounds of the cases whose GEMMs a store of records has, by (family, sparsity, phase, batch, seq); empty without the file."""
    if not Path(file).is_file():
        return {}
    times = gemm_seconds(content_records(read_store(file)), dtype)
    out = {}
    for case in cases:
        (dense_s, _, gone), (pruned_s, _, too) = (_total(w, times, dtype) for w in (case.dense, case.pruned))
        if not (gone or too):
            out[case.family, case.sparsity, case.phase, case.batch, case.seq] = dense_s / pruned_s
    return out


def bound_errors(rows: Sequence[Bound]) -> dict[str, float]:
    """Median relative errors of the predicted bounds, from the profile (``predicted``) and from its model alone (``model``).

    Where the profile has measured the same shapes before, the first is how well the device repeats itself.
    """
    known = [r for r in rows if math.isfinite(r.measured_bound)]
    names = {"predicted": "predicted_bound", "model": "model_bound"} if known else {}
    return {
        k: float(np.median([abs(getattr(r, name) / r.measured_bound - 1.0) for r in known]))
        for k, name in names.items()
    }


def predicted_speedup(case: Case, hw: HardwareProfile, runtime: str) -> Speedup:
    """The predicted speedup of a case; NaN times and speedup where the device cannot run the pruned model."""
    try:
        return speedups(case.dense, [case.pruned], hw, runtime)[0]
    except InputError:
        plain = speedups(case.dense, [case.dense], hw, runtime)[0]
        pairs = pairs_of(case.dense, [case.pruned])
        return replace(
            plain,
            flop_bound=float(pairs.flop_bound[1]),
            byte_bound=float(pairs.byte_bound[1]),
            roofline_bound=math.nan,
            pruned_s=math.nan,
            speedup=math.nan,
            lower=math.nan,
            upper=math.nan,
        )


def profile_of(folder: str | Path, device: Device, dtype: str, hardware: str = "") -> HardwareProfile:
    """The profile to predict a device with: the one named, else the one calibrated in the folder, else the shipped one of its kind.

    A device of none of these gets facts measured on the spot, which the folder keeps, and default constants: its predictions are
    uncalibrated.
    """
    path = check_folder(folder)
    kept = next((path / name for name in (PROFILE, DATASHEET) if (path / name).is_file()), None)
    if hardware or kept:
        profile = load_hardware(hardware or kept or "")
        profile.rate(dtype)  # refuses a number format it has not
        return profile
    if device.name == "cpu" and "cpu" in list_hardware():
        return base_profile(device, dtype, "cpu")
    profile = replace(base_profile(device, dtype), path=None)
    path.mkdir(exist_ok=True)
    save_hardware(profile, path / DATASHEET)
    return profile


def _total(w: Workload, times: Mapping[str, tuple[float, float]], dtype: str) -> tuple[float, float, int]:
    """Time of a workload's plain GEMMs, its relative half width, and the number of shapes without a time."""
    total, variance, missing = 0.0, 0.0, 0
    for (m, n, k), count in zip(*plain_gemms(w), strict=True):
        found = times.get(Operator("gemm", dtype, m=int(m), n=int(n), k=int(k)).key)
        if found is None:
            missing += 1
            continue
        total += float(count) * found[0]
        variance += (float(count) * found[0] * found[1]) ** 2
    return total, math.sqrt(variance) / total if total else 0.0, missing


def _predicted(w: Workload, hw: HardwareProfile, dtype: str) -> float:
    shapes, count = plain_gemms(w)
    m, n, k = shapes.T
    return float(gemm_time(m, n, k, hw, dtype=dtype).seconds @ count)
