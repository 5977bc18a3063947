"""Predicted against published: the shipped facts are those handed over, everything is accounted for, and the errors
stay small."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from calibration.measurements import published
from calibration.validation import published as judged
from calibration.validation.engines import NOT_USED

GEMMS = {what: judged.compare_gemms(what) for what in ("2:4", "narrower")}


def test_errors_of_gemms_stay_within_the_aim_and_every_miss_has_a_reason() -> None:
    for what, aim in (("narrower", 0.10), ("2:4", 0.15)):
        assert judged.median_error(GEMMS[what]) <= aim
        assert all(r.source and r.where and r.measured > 0 and 0 < r.lower <= r.predicted for r in GEMMS[what])
        assert all(r.reason for r in GEMMS[what] if abs(r.error) > judged.MISS)
    row = judged.Comparison("a", "b", 2.0, 2.2, 1.9, 2.3, "s")
    assert row.error == pytest.approx(0.1)
    assert row.inside
    assert judged.median_error([row, replace(row, predicted=1.8)]) == pytest.approx(0.1)


def test_facts_are_those_handed_over(shared_data: Path) -> None:
    def read(name: str) -> list[dict[str, str]]:
        lines = (shared_data / name).read_text(encoding="utf-8").splitlines()
        return list(csv.DictReader(line for line in lines if not line.startswith("#")))

    handed, engines = read("pruning_speedups.csv"), read("engine_pruned.csv")
    values = [(float(r["dense_value"] or 1), float(r["pruned_value"] or r["speedup"])) for r in (*handed, *engines)]
    ours = published("speedups")
    assert all((float(r["dense"]), float(r["pruned"])) in values for r in ours)
    expected = len(handed) + len(engines)
    assert len(ours) + sum(NOT_USED.values()) == expected, "every row is there or left out for a reason"
    times = {dense for dense, _ in values}
    for r in read("engine_dense.csv"):
        value = float(r["value"])
        times |= {value, float(f"{1024 / value:.7g}")} if r["metric"].startswith("prefill") else {value}
    assert {float(r["value"]) for r in published("dense")} <= times


def test_gemm_facts_are_those_handed_over(shared_data: Path) -> None:
    with (shared_data / "sparse24_gemm.csv").open(encoding="utf-8", newline="") as file:
        times = {(r["m"], r["n"], r["k"], float(r["latency_us"])) for r in csv.DictReader(file)}
    for r in published("gemm_ratios"):
        assert (r["m"], r["n"], r["k"], float(r["dense_us"])) in times
        assert (r["m"], r["pruned_n"], r["pruned_k"], float(r["pruned_us"])) in times
