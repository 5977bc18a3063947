"""The fit of a profile: which rows count, sparse kernels, golden constants."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest
from planted_rows import HW, SOURCE, check_golden, gemms, golden_records

from calibration.fit.profile import fit_profile
from calibration.records.timing_table import Records
from calibration.validation.validate import validate
from simulator.hardware.profile import Fitted
from simulator.uncertainty.operators import gemm_time


def test_throttled_rows_stay_out_and_flagged_ones_are_counted() -> None:
    fit = fit_profile(
        HW, gemms(noise=0.01, rows=200).replace(flags=np.repeat([2, 1, 0], [10, 5, 185]))
    )
    assert fit.parts[0].rows == 190
    assert any(note == "10 rows excluded: measured under throttling" for note in fit.notes)
    assert any(note.startswith("5 of 190 rows are flagged NOISY") for note in fit.notes)


def test_sparse_kernels_lean_on_the_dense_fit() -> None:
    section = HW.section("gemm", "bf16")
    slow = {**section.constants, "sparse_step": Fitted(0.5, status="fixed")}
    planted = replace(
        HW, sections=MappingProxyType({("gemm", "bf16"): replace(section, constants=slow)})
    )
    m, n, k = (
        a.ravel()
        for a in np.meshgrid([256, 1024, 4096, 8192], [4096, 8192], [4096, 8192], indexing="ij")
    )
    seconds = gemm_time(m, n, k, planted, kernel="sparse24").seconds
    sparse = Records.from_columns([SOURCE], operator="gemm_2to4", m=m, n=n, k=k, seconds=seconds)
    dense = gemms(noise=0.005, rows=200)
    found = fit_profile(HW, Records.concat([dense, sparse])).profile.sections["gemm", "bf16"]
    # the dense e_tc is fitted too, on noisy rows: only their product is exact
    assert found["sparse_step"] * found["e_tc"] == pytest.approx(0.5 * section["e_tc"], rel=0.08)
    assert found.accuracy["mape_2to4"] < 0.05


def test_golden_fit_report() -> None:
    hw, rows = golden_records()
    part = fit_profile(hw, rows).parts[0]
    lines = [f"{part.operator} {part.dtype} {part.rows} rows"]
    for name, c in part.section.constants.items():
        lines.append(f"{name} {c.value:.2g} {c.status} {part.fixed.get(name, '')}".rstrip())
    lines += [f"{name} {value:.2f}" for name, value in part.section.accuracy.items()]
    check_golden("fit.txt", "\n".join(lines) + "\n")


def test_a_fit_brings_planted_times_closer_and_keeps_what_was_held_out_apart() -> None:
    rows = gemms(factor=1.2, noise=0.01, rows=400)
    held = rows.n == 2048
    fit = fit_profile(HW, rows.replace(purpose=np.where(held, 2, 1)))
    assert fit.parts[0].rows == int((~held).sum())
    before, after = (
        np.abs(validate(p, rows.select(held)).parts[0].error).mean() for p in (HW, fit.profile)
    )
    assert after < 0.05 < before
    assert any("held out" in note for note in fit.notes)
