"""Run a model, dense and pruned, and compare its times with predictions.

:func:`compare` times each pruned model in alternation with the dense model, so a slower machine
slows both, and keeps every result in a run folder. :func:`rows_of` adds predictions and bounds to
the records, :func:`conclusions` states how measured and predicted speedups agree. torch and the
libraries are imported only to run a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib import metadata, resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from calibration.devices.protocol import CaptureFailed, Device, DeviceLost
from calibration.measure.run import (
    CAPTURE_FAILED,
    FAILED,
    LOST,
    UNSUPPORTED,
    Interrupt,
    Interrupted,
)
from calibration.measure.timing import OK, median_interval
from calibration.records.store import Store
from calibration.records.timing_table import Row
from calibration.runners.cases import (
    MOST,
    PRECISION,
    Case,
    CaseRow,
    ModelRun,
    Runner,
    description_of,
    predicted_speedup,
)
from calibration.runners.runs import begin
from calibration.validation.scoring import errors, spearman
from calibration.validation.validate import verdict_of
from simulator.arrays import FloatArray
from simulator.codes import PHASES
from simulator.display import few
from simulator.engines.engine import load_engine, numbers
from simulator.errors import InputError
from simulator.hardware.profile import HardwareProfile
from simulator.units import ratio

# engine files of our decoder in plain PyTorch (with families, and with methods of files) and of
# Transformers under torch.compile
EXECUTED, STATED, COMPILED = (
    str(resources.files(__package__) / f"{name}.yaml")
    for name in ("executed", "stated", "compiled")
)


@dataclass(frozen=True)
class RunEngine:
    title: str
    lowered: str  # engine of the predicted workloads; "": bare kernels
    phases: tuple[str, ...]
    package: str = ""  # library that runs the models; "": our decoder


ENGINES: Mapping[str, RunEngine] = {
    "reference": RunEngine("our decoder", "", ("prefill", "decode")),
    "hf": RunEngine("Transformers, eager", "hf", ("prefill", "decode", "generate"), "transformers"),
    "compile": RunEngine(
        "Transformers, compiled", COMPILED, ("prefill", "decode", "generate"), "transformers"
    ),
    "vllm": RunEngine("vLLM", "vllm", PHASES, "vllm"),
}
_FAILURES_IN_A_ROW = 3
REPEATS = 0.02  # speedups of two runs on a quiet machine differ by up to this share
DECIDE = 10  # fewest speedups that can say whether predictions hold
DTYPES = ("fp32", "bf16", "fp16")


def kernels_on(device: str) -> dict[str, str]:
    """Return the kernels of dynamic families in the decoder: Triton's, which skip tiles, else
    gathers and loops."""
    skips = device.startswith("cuda") and find_spec("triton") is not None
    kernels = ("reference", "reference") if skips else ("gathered", "looped")
    return dict(zip(("dynamic_depth", "dynamic_width"), kernels))


@dataclass(frozen=True)
class ComparedCases:
    records: tuple[Row, ...]
    left: int  # number of cases that were not reached in time
    notes: tuple[str, ...]  # why cases have no time
    stopped: str = ""

    @property
    def needs_new_process(self) -> bool:
        """After a failed capture or an error of CUDA, only a new process can time the rest."""
        return self.stopped.startswith((CAPTURE_FAILED, LOST)) and self.left > 0


def compare(
    folder: str | Path,
    device: Device,
    model: ModelRun,
    cases: Sequence[Case],
    budget_s: float,
    progress: Callable[[int, int], None] = lambda done_s, total_s: None,
) -> ComparedCases:
    """Time every case into a run folder, new or of an earlier run of the same device. The cases
    share the budget equally, in the order of their prunings; the next run measures the cases that
    remain."""
    dtype = model.dtype
    engine = model.engine
    if dtype not in DTYPES or dtype not in device.dtypes():
        known = ", ".join(d for d in DTYPES if d in device.dtypes())
        raise InputError(
            f"--dtype: expected one of {known} for a model on {device.name}, got {dtype}"
        )
    if not device.name.startswith(("cpu", "cuda")):
        raise InputError(
            f"device: expected cpu or cuda, which run a model in torch, got {device.name!r}"
        )
    runner = runner_of(device, model)
    names, refused = _named(runner, cases)
    check_budget(runner, budget_s)
    # vLLM states its version in each record
    package = "" if engine == "vllm" else ENGINES[engine].package
    software = {package: metadata.version(package)} if package else {}
    file, header = begin(
        folder,
        device,
        dtype,
        budget_s,
        file_name("decoder.jsonl", engine),
        software=software,
        model=model.config.name,
    )
    file.parent.mkdir(exist_ok=True)
    with Store(file, header) as kept, Interrupt() as interrupt, closing(runner):
        start = device.clock()

        def interrupted() -> bool:
            progress(round(device.clock() - start), round(budget_s))
            return interrupt.requested

        runner.interrupted = interrupted
        left, stopped = _time_cases(runner, names, kept, budget_s)
        records = {str(row["key"]): row for row in kept.rows if row.get("key") in names}
    notes = dict.fromkeys(
        (
            r["reason"]
            if r["status"] == OK
            else f"{names[str(r['key'])].prune} in {r['phase']}: {r['status']}: {r['reason']}"
        )
        for r in records.values()
        if r["reason"] or r["status"] != OK
    )
    return ComparedCases(tuple(records.values()), left, (*refused, *notes), stopped)


def check_budget(runner: Runner, budget_s: float) -> None:
    """Raise InputError for a budget in which two models cannot start."""
    if budget_s < runner.least_s:
        raise InputError(
            f"--budget: expected at least {runner.least_s:.0f}s, as"
            f" {ENGINES[runner.model.engine].title} starts two models, got {budget_s:g}s"
        )


def _named(runner: Runner, cases: Sequence[Case]) -> tuple[dict[str, Case], list[str]]:
    """Return the cases that can run, by name, and a note per reason why others cannot."""
    names = dict[str, Case]()
    unable = dict[str, dict[str, None]]()
    for case in cases:
        try:
            runner.check(case)
            names[name_of(case, runner.model.dtype, runner.model.engine)] = case
        except InputError as error:
            unable.setdefault(str(error), {})[case.prune] = None
    refused = [f"{few(prunings)}: not executed: {reason}" for reason, prunings in unable.items()]
    if not names:
        raise InputError("; ".join(refused) or "expected at least one case")
    return names, refused


@dataclass
class _Turns:
    """The cases of a run that take turns within its budget."""

    runner: Runner
    kept: Store
    end: float  # on the device's clock
    failures: int = 0  # in a row

    @property
    def left_s(self) -> float:
        return self.end - self.runner.device.clock()

    def share_s(self, cases: Sequence[Case]) -> float:
        """Return the time of the first of some cases: an equal share of what their starts leave."""
        starting = {case.prune for case in cases if self.runner.starts(case)}
        left_s = self.left_s - len(starting) * self.runner.start_s
        return max(left_s + self.runner.start_s * self.runner.starts(cases[0]), 0.0) / len(cases)

    def time(self, name: str, case: Case, seconds: float, earlier: Row | None = None) -> Row:
        """Time a case and keep its record, with the samples of an ``earlier`` one. CaptureFailed:
        this process can time nothing more, which the record states."""
        about = {"type": "decoder", "key": name, "dtype": self.runner.model.dtype}
        try:
            record = self.runner.record(case, seconds)
        except CaptureFailed as error:
            record = {"status": UNSUPPORTED, "reason": str(error)}
            self.kept.append({**about, **case.identity, **record})
            raise
        if earlier and record["status"] == OK:
            more = {n: [*earlier[n], *record[n]] for n in ("dense_s", "pruned_s")}
            record = {**earlier, **record, **more}
        if not earlier or record["status"] == OK:
            self.kept.append({**about, **case.identity, **record})
        self.failures = self.failures + 1 if record["status"] == FAILED else 0
        if self.failures >= _FAILURES_IN_A_ROW:
            last = f"the last: {record['reason']}"
            raise DeviceLost(f"{self.failures} cases in a row failed; {last}")
        return record


def _time_cases(
    runner: Runner, names: Mapping[str, Case], kept: Store, budget_s: float
) -> tuple[int, str]:
    """Time the cases that have no record, then take more samples of those that need them; return
    how many are left, and why the run stopped, if it did."""
    todo = _todo(runner, names, kept.rows)
    turns = _Turns(runner, kept, runner.device.clock() + budget_s)
    found: dict[str, Row] = {}
    try:
        if todo:
            _prepare(runner, todo[0][1])
        for number, (name, case) in enumerate(todo):
            if runner.interrupted():
                return len(todo) - number, "interrupted"
            # a run measures one pruning in all its settings, however short its budget is
            if turns.left_s <= 0.0 and case.prune != todo[0][1].prune:
                return len(todo) - number, "budget"
            share_s = turns.share_s([case for _, case in todo[number:]])
            found[name] = turns.time(name, case, share_s)
        _refine(turns, names, found)
    except CaptureFailed as error:
        return len(todo) - len(found) - 1, f"{CAPTURE_FAILED}: {error}"
    except DeviceLost as error:
        return len(todo) - len(found) - 1, f"{LOST}: {error}"
    except Interrupted:
        return len(todo) - len(found), "interrupted"
    return 0, ""


def _refine(turns: _Turns, names: Mapping[str, Case], found: Mapping[str, Row]) -> None:
    """Take more samples of the cases with wide intervals until the time is over."""
    rough = {name: row for name, row in found.items() if row["status"] == OK and not _narrow(row)}
    while rough:
        again = dict[str, Row]()
        for number, (name, row) in enumerate(rough.items()):
            cases = [names[other] for other in list(rough)[number:]]
            share_s = turns.share_s(cases)
            start_s = turns.runner.start_s * turns.runner.starts(cases[0])
            if turns.runner.interrupted() or share_s <= 2.0 * start_s:
                continue
            more = turns.time(name, names[name], share_s, row)
            if more["status"] == OK and not _narrow(more):
                again[name] = more
        rough = again


def _narrow(record: Row) -> bool:
    ratios = [a / b for a, b in zip(record["dense_s"], record["pruned_s"])]
    middle, low, high = median_interval(ratios)
    return len(ratios) >= MOST or high - low <= 2.0 * PRECISION * middle


def _todo(
    runner: Runner, names: Mapping[str, Case], rows: Iterable[Mapping[str, Any]]
) -> list[tuple[str, Case]]:
    """Return the cases without a result in the order of their prunings; phases with processes of
    their own come last, then those that failed: one may spoil this process again."""
    status = {str(row["key"]): row.get("status") for row in rows}
    left = {n: case for n, case in names.items() if status.get(n) not in (OK, UNSUPPORTED)}
    order = list(dict.fromkeys(case.prune for case in left.values()))
    return sorted(
        left.items(),
        key=lambda item: (
            status.get(item[0]) == FAILED,
            item[1].phase in runner.apart,
            order.index(item[1].prune),
        ),
    )


def file_name(name: str, engine: str) -> str:
    return name if engine == "reference" else name.replace(".", f".{engine}.", 1)


def runner_of(device: Device, model: ModelRun) -> Runner:
    engine = model.engine
    if engine == "reference":
        from calibration.runners.decoder.timing import Executor

        return Executor(device, model)
    if engine == "vllm":
        from calibration.runners.vllm.runner import VllmRunner

        return VllmRunner(device, model)
    if find_spec(package := ENGINES[engine].package) is None:
        raise InputError(
            f"--engine {engine} needs {package}, which is not installed; try: pip install {package}"
        )
    from calibration.runners.hf import HfRunner

    return HfRunner(device, model)


def _prepare(runner: Runner, case: Case) -> None:
    try:
        runner.prepare(case)
    except (RuntimeError, MemoryError) as error:
        from calibration.devices.operators import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        what = f"{runner.model.config.name} in {runner.model.dtype}"
        fewer = "use its first layers with --layers"
        raise InputError(f"{what} does not fit on {runner.device.name}; {fewer}") from None


def name_of(case: Case, dtype: str, engine: str = "reference") -> str:
    w = case.dense
    layers = int((w.layer + w.layers)[w.layer >= 0].max(initial=0))
    where = f"{case.phase} batch={case.batch} seq={case.seq} {dtype} layers={layers}"
    if case.phase in ("generate", "serve"):
        where += f" new={w.meta.new_tokens}"
    return f"{'decoder' if engine == 'reference' else engine} {w.meta.model} {case.prune} {where}"


@dataclass(frozen=True)
class ComparedSpeedup(CaseRow):
    """A row of ``comparison.csv``. Times are those of a pass; generate and serve: of a request."""

    runtime: str
    dense_s: float  # this and the next two: the pair of alternating passes with the median ratio
    pruned_s: float
    measured: float
    measured_lower: float  # 95 % interval of the median ratio; extremes if there are few pairs
    measured_upper: float
    predicted_dense_s: float
    predicted_pruned_s: float
    predicted: float
    predicted_lower: float
    predicted_upper: float
    error: float  # predicted / measured - 1
    flop_bound: float
    byte_bound: float
    roofline_bound: float
    measured_bound: float  # NaN if there is none
    operator_bound: float  # operators of the dense model over those of the pruned one
    # energy of a pass, J, and the saved share: medians and extremes of the turns; NaN without a
    # counter
    dense_joules: float
    pruned_joules: float
    energy_saved: float
    energy_saved_lower: float
    energy_saved_upper: float
    predicted_dense_joules: float
    predicted_pruned_joules: float
    predicted_energy_saved: float
    predicted_energy_saved_lower: float
    predicted_energy_saved_upper: float


def rows_of(
    cases: Sequence[Case],
    records: Iterable[Mapping[str, Any]],
    hw: HardwareProfile,
    *,
    device: str = "",
    dtype: str = "bf16",
    engine: str = "reference",
    measured_bounds: Sequence[float] = (),
) -> list[ComparedSpeedup]:
    """Return the cases that have a measured time and a prediction; ``measured_bounds`` are NaN if
    unknown."""
    timed = {str(r["key"]): r for r in records if r.get("status") == OK}
    out = []
    for case, bound in zip(cases, measured_bounds or [math.nan] * len(cases), strict=True):
        record = timed.get(name_of(case, dtype, engine))
        if record is None:
            continue
        s = predicted_speedup(_as_executed(case, record, hw), hw)
        if not math.isfinite(s.speedup):
            continue
        measured = _measured(record)
        row = ComparedSpeedup(
            **case.columns(hw, s),
            **measured,
            **_energies(record),
            **{f"predicted_{name}": getattr(s, name) for name in ENERGIES},
            device=device,
            dtype=dtype,
            runtime=str(record["runtime"]),
            measured_bound=bound,
            operator_bound=float(case.dense.layers.sum() / max(case.pruned.layers.sum(), 1)),
            predicted_dense_s=s.dense_s,
            predicted_pruned_s=s.pruned_s,
            error=s.speedup / measured["measured"] - 1,
        )
        out.append(row)
    return out


def _measured(record: Mapping[str, Any]) -> Row:
    """Return the columns of the pair of passes with the median ratio, and of its interval."""
    dense_s, pruned_s = (
        np.asarray(record[name], dtype=np.float64) for name in ("dense_s", "pruned_s")
    )
    ratios = dense_s / pruned_s
    pair = int(np.argsort(ratios, kind="stable")[(len(ratios) - 1) // 2])
    _, low, high = median_interval(ratios.tolist())
    if not math.isfinite(high):
        low, high = float(ratios.min()), float(ratios.max())
    return {
        "dense_s": float(dense_s[pair]),
        "pruned_s": float(pruned_s[pair]),
        "measured": float(ratios[pair]),
        "measured_lower": low,
        "measured_upper": high,
    }


ENERGIES = (
    "dense_joules",
    "pruned_joules",
    "energy_saved",
    "energy_saved_lower",
    "energy_saved_upper",
)


def _energies(record: Mapping[str, Any]) -> Row:
    """Return the measured columns :data:`ENERGIES`."""
    dense, pruned = (
        np.asarray(record.get(name, [math.nan]), dtype=np.float64)
        for name in ("dense_j", "pruned_j")
    )
    saved = 1.0 - pruned / dense
    values = *map(np.median, (dense, pruned, saved)), saved.min(), saved.max()
    return dict(zip(ENERGIES, map(float, values), strict=True))


def _as_executed(case: Case, record: Mapping[str, Any], hw: HardwareProfile) -> Case:
    """Return a case with the launches of the library's version. Our decoder has those of eager
    Transformers in a decode step without a CUDA graph on a GPU, else the sum of its operators. A
    method of a file states each kernel that it adds, so none of them consists of several."""
    if not case.dense.meta.engine:
        host_bound = (
            record["runtime"] == "eager" and case.phase == "decode" and hw.architecture != "cpu"
        )
        ours = STATED if any(map(description_of, case.steps)) else EXECUTED
        return case.run_in("hf" if host_bound else ours)
    engine = load_engine(case.dense.meta.engine)
    version = str(record.get("versions", {}).get(engine.name, ""))
    return (
        case.run_in(f"{engine.name}@{version}") if engine.generations and numbers(version) else case
    )


def summary(rows: Sequence[ComparedSpeedup]) -> dict[str, float]:
    """Return number, rank correlation and errors of speedups, their median deviation ("bias"), the
    coverage of their intervals ("inside"), and the median error of the dense times
    ("dense_time")."""
    if not rows:
        raise InputError("comparison: expected at least one measured case, got none")

    def values(name: str) -> FloatArray:
        return np.array([getattr(r, name) for r in rows])

    predicted, measured = values("predicted"), values("measured")
    low, high = values("predicted_lower"), values("predicted_upper")
    return {
        "count": len(rows),
        "spearman": spearman(predicted, measured),
        **errors(predicted, measured),
        "bias": float(np.median(predicted / measured)) - 1.0,
        "dense_time": errors(values("predicted_dense_s"), values("dense_s"))["median"],
        "inside": float(np.mean((low <= measured) & (measured <= high))),
    }


def by_phase(rows: Sequence[ComparedSpeedup]) -> dict[str, dict[str, float]]:
    phases = list(dict.fromkeys(r.phase for r in rows))
    out = {phase: summary([r for r in rows if r.phase == phase]) for phase in phases}
    return {**out, "all": summary(rows)} if len(phases) > 1 else out


def of_energies(rows: Sequence[ComparedSpeedup]) -> list[str]:
    """Return how measured and predicted energies agree, if any was measured."""
    inside = [
        r.predicted_energy_saved_lower <= r.energy_saved <= r.predicted_energy_saved_upper
        for r in rows
        if math.isfinite(r.energy_saved)
    ]
    count = f"{sum(inside)} of {len(inside)} shares in their 90 % interval"
    return [f"energy saved: {count}"] if inside else []


def conclusions(rows: Sequence[ComparedSpeedup]) -> list[str]:
    """Return whether the predicted speedups hold, next to roofline bounds as predictions, and the
    worst case."""
    names = ("measured", "predicted", "predicted_lower", "predicted_upper", "roofline_bound")
    columns = [[getattr(r, name) for r in rows] for name in names]
    columns.append([spread_of(r) for r in rows])
    every = verdict_of("speedups", *columns)
    first = rows[0]
    worst = _in_words(max(rows, key=lambda r: abs(r.error)))
    one = "1 measured speedup" if every.rows == 1 else f"{every.rows} measured speedups"
    if every.clear < DECIDE:
        few = f"{first.model} on {first.device}, predicted with {first.hardware}: {every.errors}"
        rough = f", {every.unclear} of them too rough to tell" if every.unclear else ""
        return [f"{few}, {one}{rough}; a verdict needs {DECIDE}.", f"Worst: {worst}."]
    holds = "hold" if every.holds else "do not hold"
    about = f"The predictions of {first.hardware} for {first.model} {holds} on {first.device}"
    return [f"{about}: {every.text}, {one}.", f"Worst: {worst}."]


def _in_words(r: ComparedSpeedup) -> str:
    values = f"measured {ratio(r.measured)}x, predicted {ratio(r.predicted)}x"
    ends = f"({ratio(r.predicted_lower)}-{ratio(r.predicted_upper)})"
    return f"{r.pruning} in {r.phase}, {values} {ends}"


def doubts(rows: Sequence[ComparedSpeedup]) -> list[str]:
    """Return notes on measured speedups that noise made: those above what FLOPs, bytes and the
    number of operators allow. A prediction may be above that bound, as recurrences in plain torch
    move results that no bound counts."""
    bounds = [max(r.flop_bound, r.byte_bound, r.operator_bound, r.predicted) for r in rows]
    return [
        f"{r.pruning} in {r.phase}, batch {r.batch}: measured {ratio(r.measured)}x is above"
        f" {ratio(bound)}x, the bound of its FLOPs, bytes and number of operators: noise"
        for r, bound in zip(rows, bounds)
        if r.measured_lower > (1.0 + REPEATS) * bound
    ]


def known_within(rows: Sequence[ComparedSpeedup]) -> float:
    """Return the median relative half-width of the intervals of measured speedups."""
    return float(np.median([spread_of(r) for r in rows])) if rows else math.nan


def spread_of(r: ComparedSpeedup) -> float:
    return math.sqrt(r.measured_upper / r.measured_lower) - 1.0
