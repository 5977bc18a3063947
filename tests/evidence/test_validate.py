"""Validation: planted times give the errors that were planted, reports are whole, golden ones do not change unseen."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from operator_times import decode_time, elementwise_time, prefill_time

from calibration.evidence.report import markdown, write_markdown
from calibration.evidence.validate import coverage, part_speedups, summary, validate
from calibration.fit.errors import accuracy_of, neighbours
from calibration.fit.profile import fit_profile, provenance_of
from calibration.records.timing_table import Records, Source
from simulator.errors import InputError
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import HardwareProfile
from simulator.hardware.save import save_hardware
from simulator.hardware.sections import Fitted
from simulator.uncertainty.operators import gemm_time
from simulator.workload import ROLES

GOLDEN = Path(__file__).parents[1] / "golden"
SOURCE = Source("planted GPU", {"planted": "1"}, method="planted", origin="test", date="2026-01-01")


def bare(name: str = "h100_sxm") -> HardwareProfile:
    """A profile with the datasheet alone, so that nothing here depends on how well a table was fitted."""
    return replace(load_hardware(name), sections=MappingProxyType({}), path=None)


HW = bare()


def gemms(factor: float = 1.0, noise: float = 0.0, rows: int = 300, seed: int = 0) -> Records:
    """GEMMs whose times are the model's, times a factor and log-normal noise."""
    rng = np.random.default_rng(seed)
    m = rng.choice([1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048], rows)
    n, k = rng.choice([512, 1024, 2048, 4096, 8192], (2, rows))
    seconds = gemm_time(m, n, k, HW).seconds * factor * np.exp(noise * rng.standard_normal(rows))
    return Records.from_columns([SOURCE], m=m, n=n, k=k, seconds=seconds)


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


@pytest.mark.quick
def test_pairs_are_all_that_differ_in_one_size_by_at_most_a_factor_of_four() -> None:
    rng = np.random.default_rng(3)
    sizes = {name: rng.choice([1.0, 2.0, 4.0, 16.0], 60) for name in "mnk"}
    table = np.stack(list(sizes.values()), axis=1)
    ratios = table[:, None] / table[None]
    fits = ((ratios != 1.0).sum(axis=2) == 1) & (ratios.min(axis=2) >= 0.25) & (ratios.max(axis=2) <= 1.0)
    assert sorted(neighbours(list(sizes.values())).tolist()) == np.argwhere(fits).tolist() != []


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


def test_throttled_rows_stay_out_and_flagged_ones_are_counted() -> None:
    fit = fit_profile(HW, gemms(noise=0.01, rows=200).replace(flags=np.repeat([2, 1, 0], [10, 5, 185])))
    assert fit.parts[0].rows == 190
    assert any(note == "10 rows excluded: measured under throttling" for note in fit.notes)
    assert any(note.startswith("5 of 190 rows are flagged NOISY") for note in fit.notes)


def test_exact_shapes_stay_with_the_profile(tmp_path: Path) -> None:
    rows = gemms(noise=0.01, rows=120).replace(purpose=np.repeat([3, 1], [7, 113]))
    save_hardware(fit_profile(HW, rows).profile, tmp_path / "p.yaml")
    arrays = load_hardware(tmp_path / "p.yaml").sections["gemm", "bf16"].arrays
    kept = {(m, n, k): t for m, n, k, t in zip(*(arrays[f"exact_{x}"].tolist() for x in "mnks"), strict=True)}
    for m, n, k, t in zip(rows.m[:7], rows.n[:7], rows.k[:7], rows.seconds[:7], strict=True):
        assert kept[m, n, k] == pytest.approx(t, rel=0.1)  # a shape that is there twice has the median


def test_too_few_rows_are_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"gemm bf16: 10 rows are too few; a fit needs 20"):
        fit_profile(HW, gemms(rows=10))


def test_sparse_kernels_lean_on_the_dense_fit() -> None:
    section = HW.section("gemm", "bf16")
    slow = {**section.constants, "sparse_step": Fitted(0.5, status="fixed")}
    planted = replace(HW, sections=MappingProxyType({("gemm", "bf16"): replace(section, constants=slow)}))
    m, n, k = (a.ravel() for a in np.meshgrid([256, 1024, 4096, 8192], [4096, 8192], [4096, 8192], indexing="ij"))
    seconds = gemm_time(m, n, k, planted, kernel="sparse24").seconds
    sparse = Records.from_columns([SOURCE], operator="gemm_2to4", m=m, n=n, k=k, seconds=seconds)
    dense = gemms(noise=0.005, rows=200)
    found = fit_profile(HW, Records.concat([dense, sparse])).profile.sections["gemm", "bf16"]
    # the dense e_tc is fitted too, on noisy rows: only their product is exact
    assert found["sparse_step"] * found["e_tc"] == pytest.approx(0.5 * section["e_tc"], rel=0.08)
    assert found.accuracy["mape_2to4"] < 0.05


def golden_records() -> tuple[HardwareProfile, Records]:
    """A small fixed case: 60 GEMMs with a planted pattern of errors, no random numbers."""
    hw = replace(bare(), name="planted", title="planted GPU")
    sizes = [1, 16, 256, 4096, 8192], [1024, 4096, 8192], [1024, 2048, 4096, 16384]
    m, n, k = (a.ravel() for a in np.meshgrid(*sizes, indexing="ij"))
    wave = 1.0 + 0.06 * np.sin(np.arange(len(m)))
    return hw, Records.from_columns([SOURCE], m=m, n=n, k=k, seconds=gemm_time(m, n, k, hw).seconds * wave)


def check_golden(name: str, text: str) -> None:
    """Compare with a golden file; ``PRUNESIM_GOLDEN=write`` in the environment writes it anew."""
    path = GOLDEN / name
    if os.environ.get("PRUNESIM_GOLDEN") == "write":
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.quick
def test_golden_validation_report() -> None:
    hw, rows = golden_records()
    origin = provenance_of(rows.select(rows.m < 0).tidy(), "2026-01-01")
    flat = replace(hw.section("gemm", "bf16"), provenance=origin, status="calibrated")
    profile = replace(hw, sections=MappingProxyType({("gemm", "bf16"): flat}))
    check_golden("validation.md", markdown(validate(profile, rows)))


def test_golden_fit_report() -> None:
    hw, rows = golden_records()
    part = fit_profile(hw, rows).parts[0]
    lines = [f"{part.operator} {part.dtype} {part.rows} rows"]
    for name, c in part.section.constants.items():
        lines.append(f"{name} {c.value:.2g} {c.status} {part.fixed.get(name, '')}".rstrip())
    lines += [f"{name} {value:.2f}" for name, value in part.section.accuracy.items()]
    check_golden("fit.txt", "\n".join(lines) + "\n")


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
