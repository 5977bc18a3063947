"""Claims of the reference paper: verdicts that follow from planted numbers, and the command."""

from __future__ import annotations

import json

import pytest
from planted import WHERE, point, row

from simulator.cli import run
from simulator.predict.claims import (
    FAILS,
    HOLDS,
    NO_DATA,
    NOT_APPLICABLE,
    UNDECIDED,
    axes_to_test,
    bound_claim,
    compare,
    order_claim,
    order_verdict,
)
from simulator.predict.pareto import Front, Point, bands, judge
from simulator.predict.quality import Axis, QualityTable, shipped_quality

CLAIMED = (point("depth", 0.02, 1.1), point("dynamic_depth", 0.1, 1.3), point("width", 0.2, 1.6))
REVERSED = (point("width", 0.02, 1.1), point("dynamic_depth", 0.1, 1.3), point("depth", 0.2, 1.6))


def front(*points: Point) -> Front:
    judged = judge(points)
    return Front(*WHERE, Axis("ppl", "p"), judged, bands(judged), True, 0.9)


@pytest.mark.parametrize(
    ("points", "verdict", "predicted", "missing", "numbers"),
    [
        (CLAIMED, HOLDS, HOLDS, (), "depth from 2 % to 10 %; dynamic_depth from 10 % to 20 %; width from 20 %"),
        (REVERSED, FAILS, FAILS, (), "width from 2 %"),
        ((*CLAIMED[:2], point("width", 0.2, 1.2)), FAILS, FAILS, (), ""),  # width is never optimal
        ((*CLAIMED[:2], point("width", 0.2, 1.35, 1.1)), UNDECIDED, HOLDS, (), ""),  # within the intervals
        (
            (CLAIMED[0], CLAIMED[2]), UNDECIDED, HOLDS, ("dynamic depth",),
            "the order of those with data is the one claimed",
        ),
        # what is there can contradict it without the rest
        ((point("width", 0.01, 1.6), point("depth", 0.1, 1.2)), FAILS, FAILS, ("dynamic depth",), ""),
        ((CLAIMED[0],), NO_DATA, "", ("dynamic depth", "static width"), "only static depth"),
        ((point("token", 0.1, 1.1),), NO_DATA, "", ("static depth", "dynamic depth", "static width"), "none of the"),
        ((*CLAIMED, point("semi_structured", 0.15, 1.5)), HOLDS, HOLDS, (), "also on the frontier: semi_structured"),
    ],
)  # fmt: skip
def test_order(points: tuple[Point, ...], verdict: str, predicted: str, missing: tuple[str, ...], numbers: str) -> None:
    found = order_verdict(front(*points))
    assert (found.verdict, found.predicted, found.missing) == (verdict, predicted, missing)
    assert numbers in found.numbers


def test_compare() -> None:
    own = (0.9, 1.0, 1.0)
    assert compare(own, [(0.5, 0.6, 0.7)]) == HOLDS
    assert compare(own, [(0.5, 0.8, 0.95)]) == UNDECIDED
    assert compare(own, [(1.1, 1.2, 1.3), (0.1, 0.2, 0.3)]) == FAILS


def test_bound_claim_speaks_of_memory_bound_inference_only() -> None:
    prefill, decode = bound_claim("llama-3.1-8b", ["h100"], ["prefill", "decode"], [1])
    assert (prefill.phase, prefill.verdict, decode.phase) == ("prefill", NOT_APPLICABLE, "decode")
    assert "bound by compute" in prefill.numbers
    assert decode.verdict in (HOLDS, UNDECIDED)  # depth itself loses nothing in decode under a graph
    assert decode.predicted == HOLDS
    assert decode.numbers.count("of its bound") == 3


def test_order_claim_uses_one_axis() -> None:
    table = shipped_quality("llama-2-7b")
    axes = axes_to_test(table)
    assert len(axes) >= 3
    for axis in axes:
        (verdict,) = order_claim("llama-2-7b", ["a100"], table, axis)
        assert (verdict.axis, verdict.missing) == (str(axis), ("dynamic depth",))
        assert verdict.source


def test_order_claim_with_all_families() -> None:
    """Planted quality that makes the claim true: little depth, more dynamic depth, most width removed."""
    rows = (row("depth", 0.0625, 6.1), row("dynamic_depth", 0.4, 6.6), row("width", 0.75, 7.2))
    (verdict,) = order_claim("llama-2-7b", ["a100"], QualityTable(rows), rows[0].axis)
    assert verdict.verdict == HOLDS


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["claims", "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert {r["model"] for r in records} == {"llama-3.1-8b", "llama-2-7b"}
    assert {r["hardware"] for r in records} == {"a100_sxm_80gb", "h100_sxm", "rtx_4090"}
    assert {r["claim"] for r in records} == {"bound", "order"}
    assert all(r["verdict"] in (HOLDS, FAILS, UNDECIDED, NOT_APPLICABLE, NO_DATA) and r["numbers"] for r in records)
    no_depth = [r for r in records if r["model"] == "llama-3.1-8b" and r["claim"] == "order"]
    assert all(r["verdict"] == NO_DATA and "static depth" in r["missing"] for r in no_depth)
    assert run(["claims", "llama-2-7b", "--hardware", "h100"]) == 0
    out = capsys.readouterr().out
    assert "(a) in memory-bound inference" in out
    assert "no data for dynamic depth" in out
    assert run(["claims", "llama-9", "--hardware", "h100"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
