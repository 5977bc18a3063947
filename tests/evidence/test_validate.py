"""Validation: planted times give the errors that were planted, reports are whole, golden ones do not change unseen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from operator_times import decode_time, elementwise_time, prefill_time
from planted_rows import HW, SOURCE, bare, check_golden, gemms, golden_records

from calibration.evidence.report import markdown, write_markdown
from calibration.evidence.validate import coverage, part_speedups, summary, validate
from calibration.fit.errors import accuracy_of
from calibration.fit.profile import fit_profile, provenance_of
from calibration.records.timing_table import Records, Source
from simulator.errors import InputError
from simulator.uncertainty.operators import gemm_time
from simulator.workload import ROLES


@pytest.mark.quick
@pytest.mark.parametrize("factor", [0.8, 1.0, 1.25])
def test_a_planted_factor_is_the_error_reported(factor: float) -> None:
    part = validate(HW, gemms(factor)).parts[0]
    found = accuracy_of(part.error)
    assert found["bias"] == pytest.approx(1.0 / factor - 1.0, abs=1e-6)
    assert found["mape"] == pytest.approx(abs(found["bias"]), abs=1e-6)
    # a common factor cancels in every ratio
    assert part_speedups(part)["median"] < 1e-5
    assert part_speedups(part)["spearman"] > 0.999


def test_planted_noise_shows_in_errors_and_coverage() -> None:
    part = validate(HW, gemms(noise=0.05, rows=3000)).parts[0]
    assert accuracy_of(part.error)["median"] == pytest.approx(0.0337, abs=0.004)  # 0.6745 sigma
    everything, *bottlenecks = coverage(part)
    assert everything["bottleneck"] == "all"
    assert everything["coverage"] > 0.99  # without a calibration the interval is wide
    assert everything["width"] == pytest.approx(np.expm1(0.5 * np.log(part.upper_s / part.lower_s).mean()))
    assert 0.3 < everything["width"] < 1.0
    assert sum(c["rows"] for c in bottlenecks) == len(part)
    data = json.loads(json.dumps(summary(validate(HW, gemms(noise=0.02)))))["parts"][0]
    assert sum(v["rows"] for v in data["by_m"].values()) == data["rows"] == 300
    assert list(data["errors"]) == ["mape", "median", "p95", "bias"]
    assert data["speedup"]["pairs"] > 100


def test_baselines_are_the_rooflines_they_say() -> None:
    r = Records.from_columns([SOURCE], m=[4096, 1], n=4096, k=4096, seconds=[2e-4, 2e-5])
    part = validate(HW, r).parts[0]
    flop = 2 * 4096.0**3 / HW.peak_flop_per_s("bf16")
    moved = 2.0 * (4096.0**2 + 2 * 4096) / HW.bandwidth_bytes_per_s
    assert part.roofline_s == pytest.approx([flop, moved], rel=1e-6)
    assert part.simple_s == pytest.approx([flop + 3e-6, moved / 0.8 + 3e-6], rel=1e-6)


@pytest.mark.quick
def test_every_operator_is_compared_with_its_own_model() -> None:
    shape = {"batch": 2, "heads": 32, "kv_heads": 8, "head_dim": 128}
    prefill = prefill_time(2, 1024, 1024, 32, 8, 128, HW).seconds
    warm, cold = (decode_time(2, 1024, 32, 8, 128, HW, cold=c).seconds for c in (False, True))
    role = ROLES.index("activation")
    moved = elementwise_time(2e6, 1e6, HW, role=role).seconds
    sparse = gemm_time(512, 4096, 4096, HW, kernel="sparse24").seconds
    rows: list[dict[str, Any]] = [
        {"operator": "attention_prefill", "q_len": 1024, "kv_len": 1024, "seconds": float(prefill), **shape},
        {"operator": "attention_decode", "q_len": 1, "kv_len": 1024, "seconds": float(cold), **shape},
        {"operator": "attention_decode", "q_len": 1, "kv_len": 1024, "seconds": float(warm), "cold": False, **shape},
        {"operator": "elementwise", "role": role, "read_bytes": 2e6, "write_bytes": 1e6, "seconds": float(moved)},
        {"operator": "gemm_2to4", "m": 512, "n": 4096, "k": 4096, "seconds": float(sparse)},
        {"operator": "launch_graph", "seconds": 1e-5},
    ]
    records = Records.from_rows(rows, [SOURCE])
    report = validate(HW, records)
    assert [p.operator for p in report.parts] == ["gemm_2to4", "attention_prefill", "attention_decode", "elementwise"]
    for part in report.parts:
        assert np.abs(part.error).max() < 1e-6, part.operator
    assert dict(report.skipped) == {"launch_graph is not a single operator of the model": 1}


@pytest.mark.quick
def test_nothing_to_validate_says_why() -> None:
    hw = bare("a100_sxm_80gb")
    r = Records.from_columns([SOURCE], m=8, n=64, k=64, dtype="fp8", seconds=1e-5)
    with pytest.raises(InputError, match=r"1 rows: a100_sxm_80gb has no fp8 arithmetic"):
        validate(hw, r)
    with pytest.raises(InputError, match="nothing to validate in fp16"):
        validate(hw, gemms(), dtype="fp16")
    with pytest.raises(InputError, match="the time is not positive and finite"):
        validate(hw, Records.from_columns([SOURCE], m=8, n=64, k=64, seconds=[-1.0, np.nan]))


def test_rows_a_profile_was_fitted_on_are_named_so() -> None:
    rows = gemms(factor=1.1, noise=0.02)
    profile = fit_profile(HW, rows).profile
    assert validate(profile, rows).parts[0].in_fit
    assert not validate(profile, gemms(seed=1)).parts[0].in_fit


def test_a_fit_brings_planted_times_closer_and_keeps_what_was_held_out_apart() -> None:
    rows = gemms(factor=1.2, noise=0.01, rows=400)
    held = rows.n == 2048
    fit = fit_profile(HW, rows.replace(purpose=np.where(held, 2, 1)))
    assert fit.parts[0].rows == int((~held).sum())
    before, after = (np.abs(validate(p, rows.select(held)).parts[0].error).mean() for p in (HW, fit.profile))
    assert after < 0.05 < before
    assert any("held out" in note for note in fit.notes)


@pytest.mark.quick
def test_golden_validation_report() -> None:
    hw, rows = golden_records()
    origin = provenance_of(rows.select(rows.m < 0).tidy(), "2026-01-01")
    flat = replace(hw.section("gemm", "bf16"), provenance=origin, status="calibrated")
    profile = replace(hw, sections=MappingProxyType({("gemm", "bf16"): flat}))
    check_golden("validation.md", markdown(validate(profile, rows)))


def test_markdown_has_a_figure_of_each_part(tmp_path: Path) -> None:
    report = validate(HW, gemms(noise=0.03))
    image, text = write_markdown(report, tmp_path / "report.md", title="A <title>")
    assert text.read_text().startswith("# A &#60;title&#62;\n")
    assert f"]({image.name})" in text.read_text()
    assert image.read_bytes().startswith(b"\x89PNG")


def test_a_device_with_markup_in_its_name_is_text() -> None:
    device = "<img src=x> | A&B [c](d) `e`"
    records = Records.from_columns([Source(device, {"torch": "<b>"})], m=[8, 16], n=4096, k=4096, seconds=2e-5)
    text = markdown(validate(HW, records), title=f"Calibration of {device}")
    assert not set("<>[]`") & set(text.replace("m <= 16", ""))
    assert all(line.startswith("|") for line in text.splitlines() if "|" in line)
