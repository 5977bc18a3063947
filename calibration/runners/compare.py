"""A decoder really executed, dense and pruned by every family, beside what is predicted for it.

:func:`compare` times each pruned decoder in turns with the dense one, so that a machine that slows down slows both, and
keeps every result in a run folder. :func:`rows_of` puts predictions and bounds beside its records, :func:`summary` and
:func:`by_phase` say how well they agree, :func:`repeatability` how well the machine agrees with itself.
:mod:`calibration.runners.decoder` and torch are imported only when a decoder is run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from calibration.devices.protocol import Device
from calibration.measure.interrupt import Interrupt
from calibration.measure.run import FAILED, UNSUPPORTED
from calibration.measure.timing import OK, median_interval
from calibration.records.store import Store
from calibration.runners.cases import Case, CaseRow, predicted_speedup
from calibration.runners.runs import begin
from calibration.validation.scores import errors, spearman
from simulator.errors import InputError
from simulator.hardware.profile import HardwareProfile
from simulator.models.config import ModelConfig

STORE = "decoder.jsonl"
EXECUTED = str(resources.files(__package__) / "executed.yaml")
"""The engine of what is run here: plain PyTorch, with the error of a whole pass (:mod:`simulator.engines.engine`)."""

_FAILURES_IN_A_ROW = 3
DTYPES: tuple[str, ...] = ("fp32", "bf16", "fp16")
"""Number formats a decoder runs in."""


def as_executed(device: str) -> dict[str, dict[str, Any]]:
    """Options of families for what the decoder runs: kernels that skip tiles on a GPU with Triton, gathers in torch.

    >>> as_executed("cpu")
    {'dynamic_depth': {'kernel': 'gathered'}, 'dynamic_width': {'kernel': 'looped'}}
    """
    skips = device.startswith("cuda") and find_spec("triton") is not None
    kernels = ("reference", "reference") if skips else ("gathered", "looped")
    return {family: {"kernel": kernel} for family, kernel in zip(("dynamic_depth", "dynamic_width"), kernels)}


@dataclass(frozen=True)
class Compared:
    """What :func:`compare` did."""

    records: tuple[dict[str, Any], ...]  # of the cases, in the folder
    left: int  # cases not reached in the time
    notes: tuple[str, ...]  # why others have no time
    stopped: str = ""


def compare(
    folder: str | Path,
    device: Device,
    config: ModelConfig,
    cases: Sequence[Case],
    *,
    budget_s: float,
    dtype: str = "bf16",
    runtime: str = "",
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done_s, total_s: None,
) -> Compared:
    """Run and time a decoder in every case, into a run folder, new or begun by an earlier run of the same device.

    The device is open, and left open; the cases were lowered from ``config`` and share the budget equally: those that
    time is too short for are left for the next run. ``runtime`` ("cuda_graph" or "eager") is how decode steps are
    launched: from a graph, where device and family can, if left out. ``seed`` is that of the weights and of the order
    of the cases. An InputError for a budget of zero, a device without torch, a number format or a model the decoder
    cannot run, a folder of another device.
    """
    if dtype not in DTYPES or dtype not in device.dtypes():
        known = ", ".join(d for d in DTYPES if d in device.dtypes())
        raise InputError(f"--dtype {dtype}: a decoder on {device.name} runs in {known}")
    if not device.name.startswith(("cpu", "cuda")):
        raise InputError(f"device {device.name!r}: a decoder needs one that runs torch: cpu or cuda")
    from calibration.runners.decoder.model import check_model
    from calibration.runners.decoder.timing import Executor

    check_model(config)
    file, header = begin(folder, device, dtype, budget_s, STORE, model=config.name)
    file.parent.mkdir(exist_ok=True)
    start, stopped, failures = device.clock(), "", 0
    names = {name_of(case, dtype): case for case in cases}
    with Store(file, header) as store, Interrupt() as interrupt:
        done = {str(row["key"]) for row in store.rows if row.get("status") in (OK, UNSUPPORTED)}
        todo = _shuffled({name: case for name, case in names.items() if name not in done}, seed)
        left = len(todo)
        executor = Executor(device, config, dtype, runtime, seed) if todo else None
        for name, case in todo:
            spent = device.clock() - start
            if interrupt.asked or spent >= budget_s:
                stopped = "interrupted" if interrupt.asked else "budget"
                break
            assert executor is not None
            # building a pruned decoder takes its share too: what a case does not use goes to those after it
            record = executor.record(case, (budget_s - spent) / left)
            store.append({"type": "decoder", "key": name, "dtype": dtype, **case.identity, **record})
            left -= 1
            failures = failures + 1 if record["status"] == FAILED else 0
            if failures >= _FAILURES_IN_A_ROW:
                stopped = f"device lost: {failures} cases in a row failed; the last: {record['reason']}"
                break
            progress(round(device.clock() - start), round(budget_s))
        found = {str(row["key"]): row for row in store.rows if row.get("key") in names}
    notes = dict.fromkeys(
        f"{r['family']} at {r['sparsity']:g} in {r['phase']}: {r['status']}: {r['reason']}"
        for r in found.values()
        if r["status"] != OK
    )
    return Compared(tuple(found.values()), left, tuple(notes), stopped)


def name_of(case: Case, dtype: str) -> str:
    """Text that identifies a case: equal cases, equal names."""
    w = case.dense
    layers = int((w.layer + w.layers)[w.layer >= 0].max(initial=0))
    where = f"{case.phase} batch={case.batch} seq={case.seq} {dtype} layers={layers}"
    return f"decoder {w.meta.model} {case.family} {case.sparsity:g} {where}"


def _shuffled(cases: Mapping[str, Case], seed: int) -> list[tuple[str, Case]]:
    """Pruned decoders in random order, so that drift falls on none in particular; cases of one stay together."""
    kinds = list(dict.fromkeys((case.family, case.sparsity) for case in cases.values()))
    turn = {kinds[i]: place for place, i in enumerate(np.random.default_rng(seed).permutation(len(kinds)))}
    return sorted(cases.items(), key=lambda item: turn[item[1].family, item[1].sparsity])


@dataclass(frozen=True)
class Row(CaseRow):
    """One comparison; the order of fields is that of columns. Times are of a forward pass.

    ``measured`` is the median ratio of passes taken in turns; ``measured_lower`` and ``measured_upper`` enclose it (95
    %), or are the smallest and largest ratio where they are too few for an interval.
    """

    runtime: str
    dense_s: float
    pruned_s: float
    measured: float
    measured_lower: float
    measured_upper: float
    predicted_dense_s: float
    predicted_pruned_s: float
    predicted: float
    predicted_lower: float
    predicted_upper: float
    error: float  # predicted over measured, less 1
    flop_bound: float
    byte_bound: float
    roofline_bound: float
    measured_bound: float  # NaN where there is none


def rows_of(
    cases: Sequence[Case],
    records: Iterable[Mapping[str, Any]],
    hw: HardwareProfile,
    *,
    device: str = "",
    dtype: str = "bf16",
    measured_bounds: Sequence[float] = (),
) -> list[Row]:
    """Comparisons of the cases, in their order, that have a time among the records and that the profile can predict.

    A pass launched from a graph, a prefill, and any pass on a CPU (whose operators' times hold their launches) are
    predicted as the sum of their operators; a decode step launched one by one on a GPU in eager mode.
    ``measured_bounds``: the measured upper bound of each case, NaN where it has none.
    """
    found = {str(r["key"]): r for r in records if r.get("status") == OK}
    out = []
    for case, bound in zip(cases, measured_bounds or [math.nan] * len(cases), strict=True):
        record = found.get(name_of(case, dtype))
        if record is None:
            continue
        host_bound = record["runtime"] == "eager" and case.phase == "decode" and hw.architecture != "cpu"
        s = predicted_speedup(case.run_in("hf" if host_bound else EXECUTED), hw)
        if not math.isfinite(s.speedup):
            continue
        dense_s, pruned_s = (np.asarray(record[name], dtype=np.float64) for name in ("dense_s", "pruned_s"))
        ratio = dense_s / pruned_s
        measured, low, high = median_interval(ratio.tolist())
        if not math.isfinite(high):
            low, high = float(ratio.min()), float(ratio.max())
        columns: dict[str, Any] = {"device": device, "dtype": dtype, "runtime": str(record["runtime"])}
        columns |= {"dense_s": float(np.median(dense_s)), "pruned_s": float(np.median(pruned_s))}
        columns |= {"measured": measured, "measured_lower": low, "measured_upper": high, "measured_bound": bound}
        columns |= {"predicted_dense_s": s.dense_s, "predicted_pruned_s": s.pruned_s, "error": s.speedup / measured - 1}
        out.append(Row(**case.columns(hw, s), **columns))
    return out


def summary(rows: Sequence[Row]) -> dict[str, float]:
    """How well predicted and measured speedups agree; an InputError when there is no row.

    "count", "spearman", :func:`~calibration.validation.scores.errors` ("median", "p95") with the median of predicted
    over measured, less 1, as "bias", the share "inside" their predicted interval, and the median error of the dense
    times themselves ("dense_time").
    """
    if not rows:
        raise InputError("nothing was measured that could be compared")
    names = ("predicted", "measured", "predicted_lower", "predicted_upper", "predicted_dense_s", "dense_s")
    predicted, measured, low, high, dense, dense_s = (np.array([getattr(r, name) for r in rows]) for name in names)
    found = {"count": len(rows), "spearman": spearman(predicted, measured), **errors(predicted, measured)}
    found |= {"bias": float(np.median(predicted / measured)) - 1.0, "dense_time": errors(dense, dense_s)["median"]}
    return {**found, "inside": float(np.mean((low <= measured) & (measured <= high)))}


def by_phase(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """The same for each phase, and for ``"all"`` of them where there are several."""
    phases = list(dict.fromkeys(r.phase for r in rows))
    out = {phase: summary([r for r in rows if r.phase == phase]) for phase in phases}
    return {**out, "all": summary(rows)} if len(phases) > 1 else out


def repeatability(records: Iterable[Mapping[str, Any]]) -> float:
    """How far a speedup differs when measured again: median |ratio of the medians of the two halves of its passes - 1|.

    NaN where nothing has six passes or more.

    >>> repeatability([{"status": "ok", "dense_s": [2, 2, 2, 2.2, 2.2, 2.2], "pruned_s": [1] * 6}])
    0.1
    """
    off: list[float] = []
    for r in records:
        if r.get("status") == OK and len(r["dense_s"]) >= 6:
            ratio = np.asarray(r["dense_s"], dtype=np.float64) / np.asarray(r["pruned_s"], dtype=np.float64)
            half = len(ratio) // 2
            off.append(abs(float(np.median(ratio[-half:]) / np.median(ratio[:half])) - 1.0))
    return round(float(np.median(off)), 12) if off else math.nan
