"""The first run on a device: four GPUs in simulated time, and planted H100s that differ from their
shipped fit. ``python -m pytest -m slow tests/measure/test_first_run.py -s`` prints both tables."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.device import GpuDevice, gpu_device
from fakes.gpu import GPUS

from calibration.devices.protocol import Operator
from calibration.devices.replay import gpu_timings, roofline_timings
from calibration.devices.telemetry import UNKNOWN
from calibration.fit.predict import predict
from calibration.fit.profile import fit_profile
from calibration.records.store import Header, content_records, read_store, records_of
from calibration.runners.in_engine import trust
from calibration.runners.runs import (
    DATASHEET,
    PROFILE,
    RECORDS,
    Calibrated,
    MeasuredRun,
    RunOptions,
    fit_run,
    keep_apart,
    measure_into,
    target_workloads,
    warnings_of,
)
from calibration.validation.validate import Judgement, of_calibration
from simulator.errors import InputError
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import HardwareProfile
from simulator.uncertainty.operators import gemm_time

pytestmark = pytest.mark.usefixtures("undrawn", "three_folds")

KILLS = int(os.environ.get("PRUNESIM_KILLS", "2"))

# planted GPU -> shipped profile whose times it has ("": a roofline), and its power limit, W
PLANTED: Mapping[str, tuple[str, float]] = {
    "H100": ("h100", 700.0),
    "RTX 4090": ("rtx_4090", 300.0),
    "T4": ("", 70.0),
    "RTX 4090 laptop": ("", 80.0),
}


def device(name: str, seed: int = 0, truth: HardwareProfile | None = None) -> GpuDevice:
    gpu, (like, limit_w) = GPUS[name], PLANTED[name]
    roofline = gpu_timings(roofline_timings(gpu.flop_per_s, gpu.bytes_per_s, 4e-6))
    hw = truth or (load_hardware(like) if like else None)

    @cache
    def seconds(op: Operator) -> float:
        fitted = op.kind in ("gemm", "attention_prefill", "attention_decode")
        return roofline(op) if hw is None or not fitted else predicted_s(op, hw)

    return gpu_device(gpu, seconds, limit_w, seed)


def predicted_s(op: Operator, hw: HardwareProfile) -> float:
    row = {"key": op.key, "operator": dict(vars(op)), "median_s": 1e-3, "status": "ok"}
    return float(predict(records_of([row], Header("x", dtype=op.dtype)), hw).time.seconds[0])


def calibrate(folder: Path, gpu: GpuDevice, budget_s: float) -> tuple[MeasuredRun, Calibrated]:
    options = RunOptions(budget_s, gpu.formats[0])
    llama = target_workloads("llama-3.1-8b", (), (), {"phase": "prefill", "batch": 1, "seq": 1})
    found = measure_into(folder, gpu, options, run_models=llama[0], draft=True)
    return found, fit_run(folder)


def judged(folder: Path, done: Calibrated) -> Judgement:
    return of_calibration(done.held_out, folder, done.disturbed)


@pytest.mark.quick
def test_what_may_spoil_a_measurement_is_said_before_it() -> None:
    assert [warnings_of(device(name)) for name in PLANTED] == [
        [],
        ["the power limit, 300 W, is below the default, 450 W; times of other machines will be"
         " shorter"],
        ["the GPU is throttled (sw_thermal_slowdown): it needs cooling"],
        ["other processes load the GPU (40 %); end them",
         "the power limit, 80 W, is below the default, 150 W; times of other machines will be"
         " shorter"],
    ]  # fmt: skip
    blind = device("H100")
    blind.throttle = UNKNOWN
    assert "pip install nvidia-ml-py" in warnings_of(blind)[0]
    busy = device("H100")
    busy.description = replace(busy.description, memory_bytes=40e9)
    assert warnings_of(busy) == ["other processes hold 47.7 % of the GPU's memory; end them"]


@pytest.mark.parametrize("name", PLANTED)
def test_a_budget_is_used_and_a_run_that_ends_measures_nothing_more(
    name: str, tmp_path: Path
) -> None:
    gpu = device(name)
    found, _ = calibrate(tmp_path / "run", gpu, 40.0)
    assert 0.95 * 40.0 <= found.outcome.elapsed_s <= 1.05 * 40.0
    assert found.plan.spare > 0
    rows = read_store(tmp_path / "run" / RECORDS).rows
    again, _ = calibrate(tmp_path / "run", device(name), 40.0)
    assert again.outcome.counts.resumed > 0
    later = read_store(tmp_path / "run" / RECORDS).rows[len(rows) :]
    assert len([row for row in later if row["purpose"] != "drift_check"]) <= 0.02 * len(rows)


def interrupted(name: str, seed: int, folder: Path, budget_s: float) -> HardwareProfile:
    """Return the profile after an interrupt at a random moment."""
    gpu = device(name, seed)
    gpu.interrupt_s = random.Random(seed).uniform(0.0, budget_s)
    options = RunOptions(budget_s, gpu.formats[0])
    outcome = measure_into(folder, gpu, options, draft=True).outcome
    assert outcome.stopped in ("interrupted", "budget")
    if content_records(read_store(folder / RECORDS)).timed.any():
        with suppress(InputError):  # an unknown GPU with few rows: the draft is its profile
            fit_run(folder)
    return load_hardware(folder / PROFILE)


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize(
    ("seeds", "budget_s"),
    [(range(1), 20.0), pytest.param(range(1, 1 + KILLS), 180.0, marks=pytest.mark.slow)],
    ids=["short", "long"],
)
def test_an_interrupt_at_any_moment_leaves_a_profile(
    name: str, seeds: range, budget_s: float, tmp_path: Path
) -> None:
    for seed in seeds:
        hw = interrupted(name, seed, tmp_path / f"run{seed}", budget_s)
        assert hw.sm_count == GPUS[name].sms
        if PLANTED[name][0]:
            assert hw.section("gemm", "bf16").status != "default"


def differing(seed: int, size: float = 0.1) -> HardwareProfile:
    """Return an H100 whose fitted constants of GEMMs and attention differ from the shipped ones by a
    share, up or down."""
    hw, rng = load_hardware("h100"), np.random.default_rng(seed)
    sections = dict(hw.sections)
    for key in [key for key in sections if key[0] == "gemm" or key[0].startswith("attention")]:
        constants = {
            name: replace(c, value=c.value * math.exp(size * rng.choice([-1, 1])))
            if c.status == "fitted"
            else c
            for name, c in sections[key].constants.items()
        }
        sections[key] = replace(sections[key], constants=constants)
    return replace(hw, sections=sections)


def unseen_error(truth: HardwareProfile, profile: HardwareProfile) -> float:
    """Return the mean error of GEMMs that no run has measured."""
    rng = np.random.default_rng(99)
    m = np.round(2 ** rng.uniform(0, 13, 600))
    n, k = (64 * np.round(2 ** rng.uniform(9, 14, 600) / 64) for _ in range(2))
    ratio = gemm_time(m, n, k, profile).seconds / gemm_time(m, n, k, truth).seconds
    return float(np.abs(ratio - 1.0).mean())


def errors_with_and_without(seed: int, budget_s: float, folder: Path) -> tuple[float, ...]:
    """Return the error of the shipped fit, of a fit without it, and of one with it as prior."""
    truth = differing(seed)
    calibrate(folder, device("H100", seed, truth), budget_s)
    base = load_hardware(folder / DATASHEET)
    records = keep_apart(content_records(read_store(folder / RECORDS)))
    alone: Any = {"sections": {}, "stacks": {}, "stack": ""}
    without = fit_profile(replace(base, **alone), records).profile
    profiles = base, without, load_hardware(folder / PROFILE)
    return tuple(unseen_error(truth, profile) for profile in profiles)


def test_the_shipped_fit_makes_a_short_calibration_better(tmp_path: Path) -> None:
    shipped, without, prior = errors_with_and_without(0, 30.0, tmp_path / "run")
    assert prior < 0.7 * without < without < shipped


@pytest.mark.slow
def test_the_shipped_fit_makes_any_calibration_better(tmp_path: Path) -> None:
    print("\nseconds  shipped %  without %  prior %")
    for budget_s in (60.0, 180.0):  # another test has 30 s
        found = [
            errors_with_and_without(seed, budget_s, tmp_path / f"{budget_s:.0f} {seed}")
            for seed in range(2)
        ]
        shipped, without, prior = 100.0 * np.mean(found, axis=0)
        print(f"{budget_s:7.0f}  {shipped:9.1f}  {without:9.1f}  {prior:7.1f}")
        assert prior < without < shipped


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_three_minutes_on_four_gpus(name: str, tmp_path: Path) -> None:
    found, done = calibrate(tmp_path / "run", device(name), 180.0)
    verdict = judged(tmp_path / "run", done)
    assert done.fit is not None
    assert done.held_out is not None
    dtype = device(name).formats[0]
    text = trust(tmp_path / "run" / PROFILE, verdict, done.fit.parts, dtype, None)
    gemm = next(part for part in done.held_out.parts if part.operator == "gemm")
    error, roofline = (
        100.0 * float(np.abs(seconds / gemm.measured_s - 1.0).mean())
        for seconds in (gemm.predicted_s, gemm.roofline_s)
    )
    print(
        f"\n{name}: {found.outcome.elapsed_s / 60:.1f} min, {found.outcome.counts.timed} rows,"
        f" held-out GEMMs {error:.1f} % (roofline {roofline:.1f} %), {verdict.verdict}; {text}"
    )
    assert verdict.status == 0
    assert error < 0.5 * roofline
