"""Published measurements that ship are those handed over, and every row is accounted for."""

from __future__ import annotations

import csv
from pathlib import Path

from calibration.evidence.published import NOT_USED
from calibration.measurements import published


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
    times_2to4 = {(r["m"], r["n"], r["k"], float(r["latency_us"])) for r in read("sparse24_gemm.csv")}
    for r in published("gemm_ratios"):
        assert (r["m"], r["n"], r["k"], float(r["dense_us"])) in times_2to4
        assert (r["m"], r["pruned_n"], r["pruned_k"], float(r["pruned_us"])) in times_2to4
