"""The user's own result files of serving benchmarks (:mod:`simulator.prediction.benchmarks`), each
predicted under its own conditions. Requests that arrive are simulated, and several times of the run
are compared. A result with unknown conditions is skipped with the reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from calibration.records.timing_table import Row
from calibration.validation.scoring import Comparison, score_of
from simulator.display import few
from simulator.engines.engine import load_engine
from simulator.errors import InputError
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import HardwareProfile
from simulator.models.library import load_model, shipped_model
from simulator.models.lower import lower
from simulator.prediction.benchmarks import (
    BenchRun,
    checked,
    measured_of,
    read_benches,
    request_of,
)
from simulator.prediction.energy import PassEnergy
from simulator.prediction.limits import NO_LIMITS
from simulator.prediction.load import Interval, Load, SimulatedModel, Simulation
from simulator.prediction.table import speedup
from simulator.request import Request
from simulator.uncertainty.forward import forward_passes
from simulator.units import percent
from simulator.workload import WorkloadBatch

SUFFIXES, MOST_FILES, LEVEL = (".json", ".jsonl"), 10_000, 0.9
NORMAL_90 = 1.645  # half-width of an interval of this level over the standard deviation
ENERGY = "energy"
PERCENTILES = {
    "ttft_p50": "median_ttft",
    "ttft_p99": "p99_ttft",
    "tpot_p50": "median_tpot",
    "tpot_p99": "p99_tpot",
}
"""Percentiles of a load, and their names in a result."""
Compared = tuple[dict[str, tuple[float, float, float, float]], tuple[str, ...]]
"""Measured time, predicted time and its interval, s, by name; and notes."""


@dataclass(frozen=True)
class RunResult:
    source: str
    reason: str = ""
    compared: Comparison | None = None
    tool: str = ""
    model: str = ""
    phase: str = ""
    batch: int = 0
    seq: int = 0
    new_tokens: int = 0
    notes: tuple[str, ...] = ()
    # "run" or a percentile such as "ttft_p99" if requests arrive; "energy"; else ""
    time: str = ""

    @property
    def energy(self) -> bool:
        """Whether values are J per output token instead of s."""
        return self.time == ENERGY

    @property
    def request(self) -> str:
        new = f" + {self.new_tokens}" if self.new_tokens else ""
        return f"{self.phase}, {self.batch} x {self.seq:,}{new} {self.time}".strip()

    def as_row(self) -> dict[str, object]:
        """Return the fields of ``--json``; times are in s, energies in J per output token, and None
        for a skipped result."""
        names = ("source", "reason", "tool", "model", "phase", "batch", "seq", "new_tokens", "time")
        c = self.compared
        found = (c.measured, c.predicted, c.lower, c.upper, c.error, c.inside) if c else (None,) * 6
        unit = "j_per_token" if self.energy else "s"
        values = (f"{name}_{unit}" for name in ("measured", "predicted", "lower", "upper"))
        times = zip((*values, "error", "inside"), found)
        where = {"hardware": c.gpu if c else "", "engine": c.engine if c else ""}
        fields = {name: getattr(self, name) for name in names}
        return {**fields, **where, **dict(times), "notes": list(self.notes)}


def evaluate(folder: str | Path, given: Mapping[str, Any]) -> list[RunResult]:
    """Return each result in the JSON files of a folder and of folders inside it, next to its
    prediction.

    ``given`` are conditions that the user states: model, hardware and settings of a request
    (``new_tokens`` 0: a prefill). ``model``, ``batch``, ``seq`` and ``new_tokens`` apply to results
    that do not state them, the others replace those of files.
    """
    path = Path(folder)
    if not path.is_dir():
        raise InputError(f"{folder}: expected a folder with result files of serving benchmarks")
    files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    if not 0 < len(files) <= MOST_FILES:
        expected = f"1 to {MOST_FILES:,} files {' or '.join(SUFFIXES)}"
        raise InputError(f"{folder}: expected {expected}, got {len(files):,}")

    def skipped(
        source: str, error: InputError, place: object, run: BenchRun | None = None
    ) -> RunResult:
        reason = str(error).removeprefix(f"{place}").removeprefix(":").strip()
        return RunResult(
            source, reason, tool=run.tool if run else "", model=run.model if run else ""
        )

    out = []
    for file in files:
        name = str(file.relative_to(path))
        try:
            runs = read_benches(file)
        except InputError as error:
            out.append(skipped(name, error, file))
            continue
        for at, run in enumerate(runs, start=1):
            source = f"{name}:{at}" if len(runs) > 1 else name
            try:
                out += evaluated(replace(run, source=source), given)
            except InputError as error:
                out.append(skipped(source, error, source, run))
    return out


def evaluated(run: BenchRun, given: Mapping[str, Any]) -> list[RunResult]:
    """Return the times of one result next to their predictions. InputError: a condition is neither
    in the file nor given."""
    known = shipped_model(run.model) if run.model else None
    own = {name: getattr(run, name) for name in ("dtype", "weight_dtype", "kv_dtype", "devices")}
    own["engine"] = run.engine or ("vllm" if run.tool.startswith("vllm") else "")
    settings = {name: found for name, value in own.items() if (found := given.get(name) or value)}
    names: Row = {
        "model": known.name if known else given.get("model"),
        "hardware": given.get("hardware") or run.gpu,
        "engine": settings.get("engine"),
    }
    for name, value in names.items():
        if not value:
            why = "as the file does not state a known one"
            raise InputError(f"{run.source}: {name}: expected --{name}, {why}")
    request = Request(
        model=load_model(names["model"]), **_shape(run, given), **settings, level=LEVEL
    )
    hw = load_hardware(names["hardware"])
    times, notes = (_of_pass if run.arriving is None else _simulated)(run, request, hw)
    batch = request.batch if run.arriving is None else given.get("batch", 0)
    energy, more = _energy(run, request, batch, hw)
    times, notes = {**times, **energy}, (*notes, *more)
    name, prefill = request.model.name, request.phase == "prefill"
    engine, where = load_engine(request.engine).name, f"{hw.label}, {request.phase}"
    shape = request.phase, request.batch, request.seq, 0 if prefill else request.new_tokens
    out = []
    for time, values in times.items():
        source = f"{run.source} {time}".strip()
        one = Comparison(name, where, *values, source, engine=engine, gpu=hw.label, split="judge")
        out.append(RunResult(run.source, "", one, run.tool, name, *shape, notes, time))
    return out


def _shape(run: BenchRun, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the phase and the sizes of a result; requests that arrive have mean lengths."""
    if run.arriving is not None:
        shape = "serve", len(run.arriving), round(run.input_tokens), round(run.output_tokens)
    else:
        new_tokens = given.get("new_tokens")
        stated = run.output_tokens or (run.total_tokens and given.get("seq")) or new_tokens is None
        shape = request_of(
            run,
            batch=None if run.concurrency or run.mean_concurrency else given.get("batch"),
            seq=None if run.input_tokens else given.get("seq"),
            output=None if stated else (new_tokens or 0) + 1,
        )
    phase, batch, seq, steps = shape
    return {"phase": phase, "batch": batch, "seq": seq, "new_tokens": max(steps, 1)}


def _of_pass(run: BenchRun, request: Request, hw: HardwareProfile) -> Compared:
    found, dense = measured_of(run, request), lower(request)
    s = speedup(dense, dense, hw, LEVEL)
    return {"": (found.seconds, s.dense_s, s.dense_lower, s.dense_upper)}, found.notes


def _energy(run: BenchRun, request: Request, batch: int, hw: HardwareProfile) -> Compared:
    """Return the energy per output token next to that predicted at the measured throughput."""
    if (power := run.power) is None:
        return {}, ()
    if not batch or power.gpus != request.devices:
        expected = f"--devices {power.gpus}" if batch else "--batch, the sequences of its steps"
        return {}, (f"{run.source}: its energy is not compared: expected {expected}",)
    tokens = batch * (request.new_tokens + 1)
    workloads = WorkloadBatch.of([lower(replace(request, batch=batch))])
    found = PassEnergy.of(forward_passes(workloads, hw), np.array([tokens / power.tokens_per_s]))
    half = NORMAL_90 * np.linalg.norm(found.errors)
    each, low, high = (float(found.total(np.exp(x))[0]) / tokens for x in (0.0, -half, half))
    return {ENERGY: (power.watts / power.tokens_per_s, each, low, high)}, ()


def _simulated(run: BenchRun, request: Request, hw: HardwareProfile) -> Compared:
    """Return the times of requests that arrive at one replica."""
    notes = (*checked(run, request), f"{run.source}: the server is assumed to have default options")
    simulation = Simulation.of(Load(), NO_LIMITS, request, hw, requests=run.arriving)
    numbers, tokens = SimulatedModel(simulation, 0).numbers, run.requests * run.output_tokens
    numbers["run"] = [tokens / rate for rate in numbers["tokens_per_s"]]
    times = {"run": run.duration_s}
    times |= {name: run.percentiles_s.get(key, 0.0) for name, key in PERCENTILES.items()}
    return {n: (time, *Interval.of(numbers[n])) for n, time in times.items() if time}, notes


def of_runs(results: Sequence[RunResult], folder: str) -> list[str]:
    sentences = list[str]()
    for energy, what in ((False, "times"), (True, "energies per token")):
        found = {r.source: None for r in results if r.compared and r.energy == energy}
        compared = [r.compared for r in results if r.compared and r.energy == energy]
        if not compared:
            continue
        s, worst = score_of(compared), max(compared, key=lambda c: abs(c.error))
        where = few(dict.fromkeys(f"{c.engine} on {c.gpu}" for c in compared))
        runs = f"{len(found)} run{'s' if len(found) > 1 else ''}"
        sentences.append(
            f"Predicted {what} of {runs} in {folder} ({where}): median error"
            f" {percent(s['median'])}, bias {100 * s['median bias']:+.1f} %,"
            f" {sum(c.inside for c in compared)} of {len(compared)} in their {percent(LEVEL)}"
            " interval."
        )
        if len(compared) > 1:
            sentences.append(f"Worst: {worst.source} with {100 * worst.error:+.1f} %.")
    if skipped := sum(r.compared is None for r in results):
        sentences.append(f"{skipped} result{'s were' if skipped > 1 else ' was'} skipped.")
    return sentences
