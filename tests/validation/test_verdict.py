"""Verdicts: a profile is for use only where it errs less than a datasheet roofline and its intervals hold."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from calibration.fit.local_update import Updated, UpdateErrors
from calibration.records.timing_table import PURPOSES, Flag, Records, Source
from calibration.runners.compare import conclusions
from calibration.validation.validate import Report, ReportPart
from calibration.validation.verdict import (
    DO_NOT_USE,
    PARTLY,
    USE,
    Judgement,
    disturbed_share,
    of_calibration,
    of_fit,
    of_validation,
    verdict_of,
    verdicts,
)

pytestmark = pytest.mark.quick


def part(operator: str, error: float, roofline: float, half: float = 0.2, rows: int = 40) -> ReportPart:
    """Measurements of 1 s, predicted too long by an error, next to a roofline that is too short by another."""
    one = np.ones(rows)
    times = {"measured_s": one, "predicted_s": one * (1.0 + error), "roofline_s": one * (1.0 - roofline)}
    ends = {"lower_s": times["predicted_s"] * (1.0 - half), "upper_s": times["predicted_s"] * (1.0 + half)}
    return ReportPart(operator, "bf16", {}, **times, **ends, simple_s=one, bottleneck=np.full(rows, "memory"))


def report(*parts: ReportPart) -> Report:
    return Report("planted", "planted GPU", "planted 1", 0.9, parts)


def update(before: float, after: float) -> Any:
    fit = UpdateErrors("gemm bf16", 30, before, after, 0.4, 0.1, 0.9, 0.9, 1.0)
    return Mock(spec=Updated, fits=(fit,), rows=30)


@pytest.mark.parametrize(
    ("parts", "verdict", "begins", "has"),
    [
        (
            [part("gemm", 0.05, 0.4)],
            USE,
            "Use run/profile.yaml as --hardware: on 40 held-out shapes, ",
            "5 % (datasheet r",
        ),
        (
            [part("gemm", 0.45, 0.4, half=0.9)],
            DO_NOT_USE,
            "Do not use run/profile.yaml: ",
            "errs more than a datasheet roofline, ",
        ),
        (
            [part("gemm", 0.3, 0.4, half=0.1)],
            PARTLY,
            "Use run/profile.yaml as --hardware, but do not rely on its intervals",
            "0 % in their 90 % interval, t",
        ),
        (
            [part("gemm", 0.05, 0.4), part("grouped_gemm", 80.0, 0.4, rows=2)],
            PARTLY,
            "Use run/profile.yaml as --hardware, but not for passes that spend most time in grouped_gemm bf16: on 40",
            "grouped_gemm bf16: median error 8000 %",
        ),
        (
            [part("gemm", 0.1, 0.4), part("elementwise", 0.5, 0.4, half=0.9)],
            PARTLY,
            "Use run/profile.yaml as --hardware, but not for passes that spend most time in elementwise bf16",
            "elementwise bf16: median error 50 % (datasheet roofline 40 %)",
        ),
        ([part("gemm", 0.5, 0.4, half=0.9), part("elementwise", 0.5, 0.4, half=0.9)], DO_NOT_USE, "Do not", "--budget"),
        (
            [part("gemm", 0.05, 0.4, rows=9)],
            DO_NOT_USE,
            "Do not rely on run/profile.yaml yet: on 9 held",
            "fewer than 10",
        ),
    ],
)
def test_a_calibration_is_for_use_only_if_it_beats_a_datasheet_roofline(
    parts: list[ReportPart], verdict: str, begins: str, has: str
) -> None:
    judged = of_calibration(report(*parts), None, "run", "planted")
    text = " ".join(judged.sentences)
    assert text.startswith(begins)
    assert has in text
    assert judged.as_row() == {"verdict": verdict, "reasons": list(judged.reasons)}
    assert (judged.status, bool(judged.reasons)) == (int(verdict == DO_NOT_USE), verdict != USE)


def test_a_few_large_errors_count_too() -> None:
    """The median of the profile is below that of the roofline, the mean is not."""
    odd = part("gemm", 0.05, 0.3)
    predicted = odd.predicted_s.copy()
    predicted[:10] = 9.0
    v = verdict_of("gemm", odd.measured_s, predicted, odd.lower_s, odd.upper_s, odd.roofline_s)
    assert v.median < v.roofline_median
    assert not v.better
    assert v.errors == "mean error 203.8 % (datasheet roofline 30 %)"


def test_a_run_without_held_out_shapes_is_not_for_use_and_an_update_is_if_it_helps() -> None:
    (text,) = of_calibration(None, None, "run", "planted").sentences
    assert text.startswith("Do not rely on run/profile.yaml yet: no shapes were held out")
    helps = of_calibration(None, update(0.3, 0.05), "run", "h100_sxm")
    (text,), useless = (
        helps.sentences,
        of_calibration(report(part("gemm", 0.05, 0.4)), update(0.1, 0.2), "run", "h100_sxm"),
    )
    assert text.startswith("Use run/profile.yaml as --hardware: mean error 5 %, before 30 % of 30 rows")
    (text,) = useless.sentences
    assert text.startswith("Do not use run/profile.yaml: the rows do not improve h100_sxm")
    assert (helps.status, useless.status) == (0, 1)


@pytest.mark.parametrize(
    ("share", "verdict", "text"),
    [
        (0.1, USE, "Use run"),
        (0.3, PARTLY, "Use it with care: 30 % of"),
        (0.7, DO_NOT_USE, "Do not use run/profile.yaml: 70"),
    ],
)
def test_a_busy_machine_gives_no_profile_for_use(share: float, verdict: str, text: str) -> None:
    judged = of_calibration(report(part("gemm", 0.05, 0.4)), None, "run", "planted", share)
    assert judged.verdict == verdict
    assert text in " ".join(judged.sentences)
    assert any(reason.startswith("machine busy") for reason in judged.reasons) == (verdict != USE)


def test_disturbed_rows_waited_were_throttled_or_have_wide_intervals() -> None:
    flags = [0, int(Flag.WAITED), int(Flag.THROTTLED), int(Flag.NOISY), 0, int(Flag.WAITED), 0, 0]
    spread = [0.01, 0.01, np.nan, 0.02, 0.3, np.inf, np.nan, 0.5]
    purpose = [PURPOSES.index(name) for name in (*["fit"] * 7, "drift_check")]
    shapes = {"m": 1, "n": 8, "k": 8, "seconds": 1e-6}
    rows = Records.from_columns([Source("x")], **shapes, flags=flags, spread=spread, purpose=purpose)
    assert disturbed_share(rows) == pytest.approx(4 / 7)
    assert disturbed_share(rows.select(np.array([7]))) == 0.0


def test_a_fit_is_judged_on_its_held_out_shapes() -> None:
    def fitted(operator: str, rows: int, **accuracy: float) -> Any:
        return Mock(operator=operator, dtype="bf16", rows=rows, section=Mock(accuracy=accuracy))

    def judge(*parts: Any, disturbed: float = 0.0) -> Judgement:
        fit = Mock(parts=parts, profile=Mock())
        fit.profile.name = "planted"
        return of_fit(fit, report(part("gemm", 0.0, 0.4), part("elementwise", 0.0, 0.3)), "p.yaml", disturbed)

    good, bad, unknown = fitted("gemm", 60, mape=0.05), fitted("elementwise", 30, mape=0.5), fitted("gemm", 12)
    assert (judge(good).verdict, judge(good).sentences[0][:28]) == (USE, "Use p.yaml as --hardware: 1 ")
    assert judge(good, bad).verdict == PARTLY
    assert judge(good, bad).reasons == ("worse than a datasheet roofline: elementwise bf16",)
    assert judge(bad).verdict == judge(unknown).verdict == judge(good, disturbed=0.9).verdict == DO_NOT_USE
    assert judge(unknown).reasons == ("no held-out shapes",)


def test_coverage_is_judged_with_the_number_of_rows() -> None:
    few, many = (part("gemm", 0.1, 0.4, rows=rows) for rows in (5, 500))
    for each, covered in ((few, True), (many, False)):
        lower = each.lower_s.copy()
        lower[: len(each) // 5] = 1.05  # 80 % inside
        v = verdict_of("gemm", each.measured_s, each.predicted_s, lower, each.upper_s, each.roofline_s)
        assert v.coverage == pytest.approx(0.8)
        assert v.covered == covered


def test_a_validation_names_what_does_not_hold_and_the_worst() -> None:
    good = report(part("gemm", 0.05, 0.4), part("experts", 0.1, 0.4))
    first, worst = of_validation(good).sentences
    assert of_validation(good).as_row() == {"verdict": USE, "reasons": []}
    assert first.startswith(
        "planted holds on 80 measurements of planted GPU: median error 7.5 % (datasheet roofline 40"
    )
    assert worst == "Worst: experts bf16, median error 10 % (datasheet roofline 40 %), 100 % in their 90 % interval."
    assert [v.holds for v in verdicts(good)] == [True, True]
    mixed = of_validation(report(part("gemm", 0.05, 0.4), part("experts", 0.5, 0.4)))
    first, worst = mixed.sentences
    assert mixed.verdict == PARTLY
    assert mixed.reasons == ("worse than a datasheet roofline: experts bf16", "intervals too narrow: experts bf16")
    assert first.startswith("planted does not hold for experts bf16 on 80 measurements")
    assert worst.startswith("Worst: experts bf16, median error 50 %")
    failed = of_validation(report(part("gemm", 0.5, 0.4)))
    assert failed.sentences[0].startswith("planted does not hold on 40")
    assert (failed.verdict, failed.status) == (DO_NOT_USE, 1)
    few = of_validation(report(part("gemm", 0.05, 0.4, rows=4)))
    assert (few.verdict, few.reasons) == (PARTLY, ("few rows: 4, expected at least 10",))


def test_a_comparison_states_whether_predictions_hold_and_its_worst_case() -> None:
    def row(family: str, measured: float, predicted: float) -> Any:
        ends = {"predicted_lower": 0.9 * predicted, "predicted_upper": 1.1 * predicted}
        about = {"model": "m", "hardware": "planted", "device": "planted GPU", "sparsity": 0.5, "phase": "decode"}
        error = predicted / measured - 1.0
        return Mock(
            family=family,
            pruning=f"{family} at 50 %",
            measured=measured,
            predicted=predicted,
            roofline_bound=2.0,
            error=error,
            **ends,
            **about,
        )

    first, worst = conclusions([row("depth", 1.5, 1.52), row("width", 1.3, 1.4)])
    assert first.startswith("The predictions of planted for m hold on planted GPU: median error 4.5 % (datasheet roof")
    assert worst == "Worst: width at 50 % in decode, measured 1.30x, predicted 1.40x (1.26-1.54)."
    assert "do not hold" in conclusions([row("depth", 1.0, 1.9), row("width", 1.0, 2.1)])[0]
