"""Validation: planted times give the planted errors, reports are whole, and the golden report does
not change."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from operator_times import decode_time, elementwise_time, prefill_time
from planted_rows import HW, SOURCE, bare, check_golden, gemms, golden_records

from calibration.fit.profile import provenance_of
from calibration.fit.section import accuracy_of
from calibration.records.timing_table import PURPOSES, Flag, Records, Source
from calibration.validation import validate as verdict
from calibration.validation.validate import (
    Report,
    ReportPart,
    coverage,
    markdown,
    part_speedups,
    summary,
    validate,
)
from simulator.codes import ROLES
from simulator.errors import InputError
from simulator.uncertainty.operators import gemm_time


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
    assert everything["width"] == pytest.approx(
        np.expm1(0.5 * np.log(part.upper_s / part.lower_s).mean())
    )
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
    decode = {"operator": "attention_decode", "q_len": 1, "kv_len": 1024, **shape}
    lengths = {"q_len": 1024, "kv_len": 1024}
    moves = {"role": role, "read_bytes": 2e6, "write_bytes": 1e6}
    rows: list[dict[str, Any]] = [
        {"operator": "attention_prefill", **lengths, "seconds": float(prefill), **shape},
        {**decode, "seconds": float(cold)},
        {**decode, "seconds": float(warm), "cold": False},
        {"operator": "elementwise", **moves, "seconds": float(moved)},
        {"operator": "gemm_2to4", "m": 512, "n": 4096, "k": 4096, "seconds": float(sparse)},
        {"operator": "launch_graph", "seconds": 1e-5},
    ]
    report = validate(HW, Records.from_rows(rows, [SOURCE]))
    operators = ["gemm_2to4", "attention_prefill", "attention_decode", "elementwise"]
    assert [p.operator for p in report.parts] == operators
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


@pytest.mark.quick
def test_golden_validation_report() -> None:
    hw, rows = golden_records()
    origin = provenance_of(rows.select(rows.m < 0).tidy(), "2026-01-01")
    flat = replace(hw.section("gemm", "bf16"), provenance=origin, status="calibrated")
    profile = replace(hw, sections=MappingProxyType({("gemm", "bf16"): flat}))
    check_golden("validation.md", markdown(validate(profile, rows)))


def test_markdown_has_a_figure_of_each_part(tmp_path: Path) -> None:
    report = validate(HW, gemms(noise=0.03))
    image, text = verdict.write_markdown(report, tmp_path / "report.md", title="A <title>")
    assert text.read_text().startswith("# A &#60;title&#62;\n")
    assert f"]({image.name})" in text.read_text()
    assert image.read_bytes().startswith(b"\x89PNG")


def test_a_device_with_markup_in_its_name_is_text() -> None:
    device = "<img src=x> | A&B [c](d) `e`"
    records = Records.from_columns(
        [Source(device, {"torch": "<b>"})], m=[8, 16], n=4096, k=4096, seconds=2e-5
    )
    text = markdown(validate(HW, records), title=f"Calibration of {device}")
    assert not set("<>[]`") & set(text.replace("m <= 16", ""))
    assert all(line.startswith("|") for line in text.splitlines() if "|" in line)


def part(
    operator: str, error: float, roofline: float, half: float = 0.2, rows: int = 40
) -> ReportPart:
    """Measurements of 1 s, predicted with a positive error, next to a roofline with a negative
    error."""
    one = np.ones(rows)
    found = one * (1.0 + error)
    ends = found * (1.0 - half), found * (1.0 + half)
    rooflines = one * (1.0 - roofline), one
    names = np.full(rows, "memory")
    return ReportPart(operator, "bf16", {}, one, found, *ends, *rooflines, names)


def report(*parts: ReportPart) -> Report:
    return Report("planted", "planted GPU", "planted 1", parts)


USE, PARTLY, DO_NOT_USE = verdict.USE, verdict.PARTLY, verdict.DO_NOT_USE
PROFILE, AS = "run/profile.yaml", "Use run/profile.yaml as --hardware"
OTHERS = f"{AS}, but not for passes that spend most time in"
CASES = [
    ([part("gemm", 0.05, 0.4)], USE, f"{AS}: on 40 held-out shapes, ", "5 % (datasheet r"),
    (
        [part("gemm", 0.45, 0.4, 0.9)],
        DO_NOT_USE,
        f"Do not use {PROFILE}: ",
        "errs more than a datasheet roofline, ",
    ),
    (
        [part("gemm", 0.3, 0.4, 0.1)],
        PARTLY,
        f"{AS}, but do not rely on its intervals",
        "0 % in their 90 % interval, t",
    ),
    (
        [part("gemm", 0.05, 0.4), part("grouped_gemm", 80.0, 0.4, rows=2)],
        *(
            PARTLY,
            f"{OTHERS} grouped_gemm bf16, where",
            "where it errs more than a datasheet roofline: on",
        ),
    ),
    (
        [part("gemm", 0.1, 0.4), part("elementwise", 0.5, 0.4, 0.9)],
        *(PARTLY, f"{OTHERS} elementwise bf16", "where it errs more than a datasheet roofline: on"),
    ),
    (
        [part("gemm", 0.5, 0.4, 0.9), part("elementwise", 0.5, 0.4, 0.9)],
        DO_NOT_USE,
        "Do not",
        "--budget",
    ),
    (
        [part("gemm", 0.05, 0.4, rows=9)],
        DO_NOT_USE,
        f"Do not rely on {PROFILE} yet: on 9 held",
        "at least 10 are needed",
    ),
]


@pytest.mark.parametrize(("parts", "expected", "begins", "has"), CASES)
def test_a_calibration_is_for_use_only_if_it_beats_a_datasheet_roofline(
    parts: list[ReportPart], expected: str, begins: str, has: str
) -> None:
    judged = verdict.of_calibration(report(*parts), Path("run"))
    text = " ".join(judged.sentences)
    assert text.startswith(begins)
    assert has in text
    assert judged.as_row() == {"verdict": expected, "reasons": list(judged.reasons)}
    assert (judged.status, bool(judged.reasons)) == (int(expected == DO_NOT_USE), expected != USE)


def test_a_few_large_errors_count_too() -> None:
    """The median of the profile is below that of the roofline, the mean is not."""
    odd = part("gemm", 0.05, 0.3)
    predicted = odd.predicted_s.copy()
    predicted[:10] = 9.0
    v = verdict.verdict_of(
        "gemm", odd.measured_s, predicted, odd.lower_s, odd.upper_s, odd.roofline_s
    )
    assert v.median < v.roofline_median
    assert not v.better
    assert v.errors == "mean error 203.8 % (datasheet roofline 30 %)"


def test_a_run_without_held_out_shapes_is_not_for_use() -> None:
    judged = verdict.of_calibration(None, Path("run"), remedy=verdict.IDLE)
    assert judged.verdict == DO_NOT_USE
    assert judged.sentences == (
        "Do not rely on run/profile.yaml yet: no shapes were held out to validate it; measure again"
        " on an idle machine.",
    )


@pytest.mark.parametrize(
    ("share", "expected", "text"),
    [
        (0.1, USE, "Use run"),
        (0.3, PARTLY, "Use it with care: 30 % of"),
        (0.7, DO_NOT_USE, f"Do not use {PROFILE}: 70"),
    ],
)
def test_a_busy_machine_gives_no_profile_for_use(share: float, expected: str, text: str) -> None:
    judged = verdict.of_calibration(report(part("gemm", 0.05, 0.4)), Path("run"), share)
    assert judged.verdict == expected
    assert text in " ".join(judged.sentences)
    assert any(reason.startswith("machine busy") for reason in judged.reasons) == (expected != USE)


def test_disturbed_rows_waited_were_throttled_or_have_wide_intervals() -> None:
    flags = [0, int(Flag.WAITED), int(Flag.THROTTLED), int(Flag.NOISY), 0, int(Flag.WAITED), 0, 0]
    spread = [0.01, 0.01, np.nan, 0.02, 0.3, np.inf, np.nan, 0.5]
    purpose = [PURPOSES.index(name) for name in (*["fit"] * 7, "drift_check")]
    shapes = {"m": 1, "n": 8, "k": 8, "seconds": 1e-6}
    rows = Records.from_columns(
        [Source("x")], **shapes, flags=flags, spread=spread, purpose=purpose
    )
    assert verdict.disturbed_share(rows) == pytest.approx(4 / 7)
    assert verdict.disturbed_share(rows.select(np.array([7]))) == 0.0


def test_a_fit_is_judged_on_its_held_out_shapes() -> None:
    def fitted(operator: str, rows: int, **accuracy: float) -> Any:
        return Mock(operator=operator, dtype="bf16", rows=rows, section=Mock(accuracy=accuracy))

    def judge(*parts: Any, disturbed: float = 0.0) -> verdict.Judgement:
        fit = Mock(parts=parts, profile=Mock())
        fit.profile.name = "planted"
        return verdict.of_fit(
            fit, report(part("gemm", 0.0, 0.4), part("elementwise", 0.0, 0.3)), "p.yaml", disturbed
        )

    good, bad, unknown = (
        fitted("gemm", 60, mape=0.05),
        fitted("elementwise", 30, mape=0.5),
        fitted("gemm", 12),
    )
    assert (judge(good).verdict, judge(good).sentences[0][:28]) == (
        USE,
        "Use p.yaml as --hardware: 1 ",
    )
    assert judge(good, bad).verdict == PARTLY
    assert judge(good, bad).reasons == ("worse than a datasheet roofline: elementwise bf16",)
    assert (
        judge(bad).verdict
        == judge(unknown).verdict
        == judge(good, disturbed=0.9).verdict
        == DO_NOT_USE
    )
    assert judge(unknown).reasons == ("no held-out shapes",)


def test_coverage_is_judged_with_the_number_of_rows() -> None:
    few, many = (part("gemm", 0.1, 0.4, rows=rows) for rows in (5, 500))
    for each, covered in ((few, True), (many, False)):
        lower = each.lower_s.copy()
        lower[: len(each) // 5] = 1.05  # 80 % inside
        v = verdict.verdict_of(
            "gemm", each.measured_s, each.predicted_s, lower, each.upper_s, each.roofline_s
        )
        assert v.coverage == pytest.approx(0.8)
        assert v.covered == covered


def test_a_validation_names_what_does_not_hold_and_the_worst() -> None:
    good = report(part("gemm", 0.05, 0.4), part("experts", 0.1, 0.4))
    first, worst = verdict.of_validation(good).sentences
    assert verdict.of_validation(good).as_row() == {"verdict": USE, "reasons": []}
    assert first.startswith(
        "planted holds on 80 measurements of planted GPU: median error 7.5 % (datasheet roofline 40"
    )
    assert (
        worst
        == "Worst: experts bf16, median error 10 % (datasheet roofline 40 %), 100 % in their 90 %"
        " interval."
    )
    assert [v.holds for v in verdict.verdicts(good)] == [True, True]
    mixed = verdict.of_validation(report(part("gemm", 0.05, 0.4), part("experts", 0.5, 0.4)))
    first, worst = mixed.sentences
    assert mixed.verdict == PARTLY
    assert mixed.reasons == (
        "worse than a datasheet roofline: experts bf16",
        "intervals too narrow: experts bf16",
    )
    assert first.startswith("planted does not hold for experts bf16 on 80 measurements")
    assert worst.startswith("Worst: experts bf16, median error 50 %")
    failed = verdict.of_validation(report(part("gemm", 0.5, 0.4)))
    assert failed.sentences[0].startswith("planted does not hold on 40")
    assert (failed.verdict, failed.status) == (DO_NOT_USE, 1)
    few = verdict.of_validation(report(part("gemm", 0.05, 0.4, rows=4)))
    assert (few.verdict, few.reasons) == (PARTLY, ("few rows: 4, expected at least 10",))
