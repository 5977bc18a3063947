"""Predicted against published: the shipped facts are those handed over, everything is accounted for, and the errors stay small."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from calibration.judge.published import (
    NOT_USED,
    Comparison,
    compare_dense,
    compare_gemms,
    compare_speedups,
    median_error,
    published_table,
    read,
)


def test_speedups_within_the_aim() -> None:
    rows = compare_speedups()
    assert len(rows) == 19
    assert median_error(rows) <= 0.10


def test_dense_times_and_narrower_gemms() -> None:
    assert median_error(compare_dense()) <= 0.15
    assert median_error(compare_gemms("narrower")) <= 0.10
    assert median_error(compare_gemms("2:4")) <= 0.15


def test_every_row_says_where_it_is_from_and_every_miss_why() -> None:
    rows = [*compare_speedups(), *compare_dense(), *compare_gemms("2:4"), *compare_gemms("narrower")]
    assert all(r.source and r.where and r.measured > 0 for r in rows)
    assert all(r.assumed for r in [*compare_speedups(), *compare_dense()])
    assert all(
        r.reason for r in [*compare_speedups(), *compare_gemms("2:4"), *compare_gemms("narrower")] if abs(r.error) > 0.1
    )


def test_table() -> None:
    text = published_table()
    assert "median absolute error" in text
    assert "## Misses" in text
    assert "## Not compared" in text
    assert text.count("eager") >= 8, "the runtime of every row is stated"
    for line in text.splitlines():
        if line.startswith("| ") and "---" not in line:
            assert line.count("|") in (5, 8)


def test_facts_are_those_handed_over(shared_data: Path) -> None:
    with (shared_data / "pruning_speedups.csv").open(encoding="utf-8", newline="") as file:
        handed = list(csv.DictReader(file))
    facts = {(float(r["dense_value"]), float(r["pruned_value"]), r["unit"]) for r in handed}
    ours = read("speedups")
    assert all((float(r["dense"]), float(r["pruned"]), r["unit"]) in facts for r in ours)
    assert len(ours) + sum(NOT_USED.values()) == len(handed), "every row is compared or left out for a stated reason"
    dense = {float(r["dense_value"]) for r in handed}
    assert all(float(r["seconds"]) in dense for r in read("dense_latency"))


def test_gemm_facts_are_those_handed_over(shared_data: Path) -> None:
    with (shared_data / "sparse24_gemm.csv").open(encoding="utf-8", newline="") as file:
        times = {(r["m"], r["n"], r["k"], float(r["latency_us"])) for r in csv.DictReader(file)}
    for r in read("gemm_ratios"):
        assert (r["m"], r["n"], r["k"], float(r["dense_us"])) in times
        assert (r["m"], r["pruned_n"], r["pruned_k"], float(r["pruned_us"])) in times


def test_errors() -> None:
    row = Comparison("a", "b", 2.0, 2.2, 1.9, 2.3, "s", "", "")
    assert row.error == pytest.approx(0.1)
    assert row.inside
    assert median_error([row, Comparison("a", "b", 2.0, 1.8, 1.9, 2.3, "s", "", "")]) == pytest.approx(0.1)
