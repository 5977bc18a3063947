"""Rows of several measuring methods are never fitted together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from calibration.devices.protocol import Operator
from calibration.records.screening import one_method
from calibration.records.store import Header, records_of
from calibration.records.timing_table import LAUNCHES, Records, Source

pytestmark = pytest.mark.quick

GPU = Header("NVIDIA A100", {"torch": "2.13", "cuda": "13.0", "protocol": "2"}, run="new")
OLD = replace(GPU, stack={"torch": "2.13", "cuda": "13.0"}, run="old")
GRAPH, SINGLE = (
    "events around a graph of 20 launches over 3 rotated copies",
    "events around single launches",
)


def _rows(method: str, count: int, kind: str = "gemm", start: int = 1) -> list[dict[str, Any]]:
    shape = {"batch": 1, "q_len": 1, "kv_len": 64, "heads": 2, "kv_heads": 1, "head_dim": 64}
    found = []
    for m in range(start, start + count):
        op = (
            Operator(kind, m=m, n=64, k=64)
            if kind == "gemm"
            else Operator(kind, **{**shape, "kv_len": 64 * m})
        )
        found.append(
            {
                "operator": vars(op),
                "method": method,
                "median_s": 1e-6 * m,
                "status": "ok",
                "purpose": "fit",
            }
        )
    return found


def test_the_protocol_of_most_rows_of_an_operator_is_kept_and_the_others_are_counted() -> None:
    decode = _rows(GRAPH, 3, "attention_decode")
    old = records_of([*_rows(GRAPH, 2, start=10), *decode], OLD)
    kept, notes = one_method(Records.concat([records_of(_rows(GRAPH, 5), GPU), old]))
    # decode attention has one protocol, though another one than the GEMMs
    assert (len(kept), int(kept.is_operator("gemm").sum())) == (8, 5)
    assert notes == (
        "2 gemm bf16 rows excluded: timed by protocol none, the other 5 by protocol 2; measure them"
        " again",
    )


def test_kernel_names_in_a_method_do_not_change_how_launches_count() -> None:
    named = f"{SINGLE} after a flush of 4 x L2; kernels of the first gemm: graph_gemm_kernel"
    assert {LAUNCHES[code] for code in records_of(_rows(named, 2), GPU).launch} == {"eager"}


def test_runs_of_two_protocols_are_not_mixed() -> None:
    old, new = records_of(_rows(GRAPH, 3), OLD), records_of(_rows(GRAPH, 3, start=10), GPU)
    kept, notes = one_method(Records.concat([old, new]))
    # as many rows: the newest protocol is kept
    assert [source.run for source in kept.tidy().sources] == ["new"]
    assert len(notes) == 1
    assert one_method(old)[1] == ()


def test_tables_of_others_and_of_a_cpu_are_not_changed() -> None:
    table = Records.from_columns(
        [Source("A100")], m=[1, 2, 3], n=8, k=8, launch=["graph", "eager", "excluded"]
    )
    cpu = records_of(
        _rows("perf_counter_ns around a loop", 3), Header("CPU", {"torch": "2.13", "threads": "2"})
    )
    for records in (table, cpu, Records.from_columns([])):
        kept, notes = one_method(records)
        assert (kept.digest(), notes) == (records.digest(), ())
