"""Power that is measured during a calibration, and the constants that are found again."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.device import PoweredDevice

import simulator
from calibration.devices.protocol import Operator
from calibration.devices.replay import ReplayDevice, roofline_timings
from calibration.fit.power import fit_measured_power
from calibration.measure.plan import FIT, Rates, in_order
from calibration.measure.power import idle_power
from calibration.measure.run import run
from calibration.measure.timing import Protocol
from calibration.records.importers import import_table
from calibration.records.store import Header, content_records, read_store, records_of
from calibration.records.timing_table import Records
from calibration.runners.runs import RunOptions, fit_run, measure_into
from simulator.power import PARTS

H100 = simulator.load_hardware("h100")
UNFITTED = H100.calibrated({key: s for key, s in H100.sections.items() if key[0] != "power"})
FAST = roofline_timings(700e12, 3.0e12)


SIZES = {"batch": 8, "heads": 32, "kv_heads": 8, "head_dim": 128}
OPERATORS = [
    *(
        Operator("gemm", m=m, n=n, k=4096)
        for m in (1, 64, 256, 1024, 8192)
        for n in (512, 4096, 14336)
    ),
    *(Operator("attention_decode", q_len=1, kv_len=kv, **SIZES) for kv in (512, 4096, 16384)),
    *(Operator("attention_prefill", q_len=q, kv_len=q, **SIZES) for q in (256, 1024, 4096)),
    *(Operator("elementwise", m=m, n=8192, role="residual") for m in (1, 256, 8192)),
]
ORDERED = in_order(OPERATORS, Rates(700e12, 3.0e12, 3e-6), protocol=Protocol())
ITEMS = tuple(replace(item, purpose=FIT) for item in ORDERED.items)
PLAN = replace(ORDERED, items=ITEMS, budget_s=1e4)


def measured(device: PoweredDevice) -> Records:
    """The rows with a power of a run over all operators, long enough to measure each."""
    kept: list[dict[str, Any]] = []
    described = device.describe()
    header = Header(described.device, described.stack, extra=idle_power(device))
    run(PLAN, device, lambda row: kept.append(dict(row)))
    records = records_of(kept, header)
    return records.select(records.watts > 0.0)


def planted(**watts: Any) -> PoweredDevice:
    # preparations of 20 s leave a tenth of the time for each power
    return PoweredDevice(FAST, setup_s=20.0, **watts)


def shares(device: PoweredDevice) -> dict[str, float]:
    return {part: getattr(device, f"{part}_w") / H100.power_w for part in PARTS}


def test_the_constants_of_a_planted_device_are_found_again() -> None:
    device = planted()
    records = measured(device)
    assert len(records) == len(PLAN.items) + 1
    assert records.watts[records.is_operator("idle")].tolist() == pytest.approx([100.0], rel=0.02)
    for hw in (UNFITTED, H100):  # the prior: defaults, and a fitted section
        section = fit_measured_power(records, hw).section
        for part, share in shares(device).items():
            # a prior of the memory's power moves that of kernels
            if part != "active" or hw is UNFITTED:
                assert section[part] == pytest.approx(share, rel=0.1), part


def test_a_device_without_counter_is_measured_by_samples_of_its_power() -> None:
    device = planted(counts=False)
    assert idle_power(device)["method"] == "power: mean of 1 s by samples"
    section = fit_measured_power(measured(device), UNFITTED).section
    assert section["idle"] == pytest.approx(shares(device)["idle"], rel=0.05)
    assert section["memory"] == pytest.approx(shares(device)["memory"], rel=0.1)


def test_errors_cover_the_constants_of_noisy_devices() -> None:
    inside = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        watts = {"idle_w": 105, "active_w": 60, "memory_w": 400, "compute_w": 500}
        drawn = {name: w * math.exp(0.15 * rng.standard_normal()) for name, w in watts.items()}
        device = planted(noise=0.02, scatter=0.05, seed=seed, **drawn)
        section = fit_measured_power(measured(device), UNFITTED).section
        for part, share in shares(device).items():
            fitted = section.constants[part]
            inside.append(abs(fitted.value - share) <= 1.645 * (fitted.std_error or 0.0))
    assert np.mean(inside) >= 0.85


def test_rows_at_a_limit_that_binds_are_left_out() -> None:
    described = replace(ReplayDevice().description, stack={"power_limit_w": "550"})
    device = planted(limit_w=550.0, description=described)
    records = measured(device)
    at_limit = records.watts > 540.0
    assert 3 < at_limit.sum() < len(records) - 8
    section = fit_measured_power(records, UNFITTED).section
    for part, share in shares(device).items():
        assert section[part] == pytest.approx(share, rel=0.15), part
    with pytest.raises(ValueError, match="0 rows below the power limit; a fit needs 4"):
        fit_measured_power(records.select(at_limit), UNFITTED)


def test_a_calibration_writes_the_section_and_how_it_was_measured(tmp_path: Path) -> None:
    measure_into(tmp_path / "run", PoweredDevice(FAST), RunOptions(100.0, hardware="h100"))
    header = read_store(tmp_path / "run" / "records.jsonl").header
    assert header.extra["method"] == "power: mean of 1 s by an energy counter"
    records = import_table(tmp_path / "run" / "records.jsonl", hw=H100).records
    assert records.is_operator("idle")[records.watts > 0.0].any()
    fitted = fit_run(tmp_path / "run").fit.profile
    again = simulator.load_hardware(tmp_path / "run" / "profile.yaml").section("power", "*")
    assert again.status == "calibrated"
    assert again["idle"] == pytest.approx(100.0 / 700.0, rel=0.05)
    assert again.provenance is not None
    assert again.provenance.protocol == header.extra["method"]
    assert again.constants == fitted.section("power", "*").constants


def test_a_device_without_readings_has_no_powers_and_old_tables_keep_their_digest(
    tmp_path: Path,
) -> None:
    device = ReplayDevice(FAST)
    records = measure_into(tmp_path / "run", device, RunOptions(30.0, hardware="h100")).records
    assert not records.watts.any()
    assert not records.is_operator("idle").any()
    with_power = records.replace(watts=np.full(len(records), 300.0))
    assert with_power.digest() != records.digest()
    again = content_records(read_store(tmp_path / "run" / "records.jsonl"))
    assert again.digest() == records.digest()
