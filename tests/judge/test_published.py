"""Predicted against published: the shipped facts are those handed over, everything is accounted for, and the errors
stay small."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from calibration.judge import published as judged
from calibration.measurements import published

SPEEDUPS = judged.compare_speedups()
DENSE = judged.compare_dense()
GEMMS = {what: judged.compare_gemms(what) for what in ("2:4", "narrower")}


def test_errors_stay_within_the_aim_and_every_miss_has_a_reason() -> None:
    assert len(SPEEDUPS) == 19
    for rows, aim in ((SPEEDUPS, 0.10), (DENSE, 0.15), (GEMMS["narrower"], 0.10), (GEMMS["2:4"], 0.15)):
        assert judged.median_error(rows) <= aim
        assert all(r.source and r.where and r.measured > 0 and 0 < r.lower <= r.predicted <= r.upper for r in rows)
    ratios = [*SPEEDUPS, *GEMMS["2:4"], *GEMMS["narrower"]]
    assert all(r.assumed for r in [*SPEEDUPS, *DENSE])
    assert all(r.reason for r in ratios if abs(r.error) > judged.MISS)
    assert "\n".join(judged.tables()).count("eager") >= 8, "the runtime of every row is stated"
    row = judged.Comparison("a", "b", 2.0, 2.2, 1.9, 2.3, "s")
    assert row.error == pytest.approx(0.1)
    assert row.inside
    assert judged.median_error([row, replace(row, predicted=1.8)]) == pytest.approx(0.1)


def test_facts_are_those_handed_over(shared_data: Path) -> None:
    with (shared_data / "pruning_speedups.csv").open(encoding="utf-8", newline="") as file:
        handed = list(csv.DictReader(file))
    facts = {(float(r["dense_value"]), float(r["pruned_value"]), r["unit"]) for r in handed}
    ours = published("speedups")
    assert all((float(r["dense"]), float(r["pruned"]), r["unit"]) in facts for r in ours)
    assert len(ours) + sum(judged.NOT_USED.values()) == len(handed), "every row is compared or left out for a reason"
    assert {float(r["seconds"]) for r in published("dense_latency")} <= {dense for dense, _, _ in facts}


def test_gemm_facts_are_those_handed_over(shared_data: Path) -> None:
    with (shared_data / "sparse24_gemm.csv").open(encoding="utf-8", newline="") as file:
        times = {(r["m"], r["n"], r["k"], float(r["latency_us"])) for r in csv.DictReader(file)}
    for r in published("gemm_ratios"):
        assert (r["m"], r["n"], r["k"], float(r["dense_us"])) in times
        assert (r["m"], r["pruned_n"], r["pruned_k"], float(r["pruned_us"])) in times
