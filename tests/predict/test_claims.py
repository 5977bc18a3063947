"""Claims of the reference paper: verdicts that follow from planted numbers, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

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
from simulator.predict.quality import Axis, QualityRow, QualityTable, shipped_quality


def point(family: str, loss: float, speedup: float, spread: float = 1.0) -> Point:
    return Point(
        "m",
        "h",
        "prefill",
        1,
        1,
        "cuda_graph",
        family,
        family,
        0.25,
        0.25,
        "ppl",
        "p",
        1.0,
        1.0 + loss,
        loss,
        speedup,
        speedup / spread,
        speedup * spread,
        False,
        False,
        False,
        "",
        "compute",
        True,
        "s",
    )


def front(*points: Point) -> Front:
    judged = judge(points)
    return Front("m", "h", "prefill", 1, 1, "cuda_graph", Axis("ppl", "p"), judged, bands(judged), True, 0.9)


CLAIMED = (point("depth", 0.02, 1.1), point("dynamic_depth", 0.1, 1.3), point("width", 0.2, 1.6))


def test_order_holds_where_the_points_are_as_claimed() -> None:
    verdict = order_verdict(front(*CLAIMED))
    assert (verdict.verdict, verdict.predicted, verdict.missing) == (HOLDS, HOLDS, ())
    assert "depth from 2 % to 10 %; dynamic_depth from 10 % to 20 %; width from 20 %" in verdict.numbers


def test_order_does_not_hold_where_width_comes_first() -> None:
    verdict = order_verdict(
        front(point("width", 0.02, 1.1), point("dynamic_depth", 0.1, 1.3), point("depth", 0.2, 1.6))
    )
    assert (verdict.verdict, verdict.predicted) == (FAILS, FAILS)


def test_order_does_not_hold_where_a_family_is_never_optimal() -> None:
    assert order_verdict(front(*CLAIMED[:2], point("width", 0.2, 1.2))).verdict == FAILS


def test_order_is_undecided_within_the_intervals() -> None:
    verdict = order_verdict(front(*CLAIMED[:2], point("width", 0.2, 1.35, 1.1)))
    assert (verdict.verdict, verdict.predicted) == (UNDECIDED, HOLDS)


def test_order_without_data_for_a_family_says_so() -> None:
    verdict = order_verdict(front(CLAIMED[0], CLAIMED[2]))
    assert (verdict.verdict, verdict.predicted, verdict.missing) == (UNDECIDED, HOLDS, ("dynamic depth",))
    assert "the order of those with data is the one claimed" in verdict.numbers
    # what is there can still contradict it
    assert order_verdict(front(point("width", 0.01, 1.6), point("depth", 0.1, 1.2))).verdict == FAILS
    alone = order_verdict(front(CLAIMED[0]))
    assert (alone.verdict, alone.missing) == (NO_DATA, ("dynamic depth", "static width"))


def test_other_families_on_the_frontier_are_named() -> None:
    verdict = order_verdict(front(*CLAIMED, point("semi_structured", 0.15, 1.5)))
    assert verdict.verdict == HOLDS
    assert "also on the frontier: semi_structured" in verdict.numbers


def test_compare() -> None:
    def of(r: SimpleNamespace) -> tuple[float, float, float]:
        return r.x

    own = SimpleNamespace(x=(0.9, 1.0, 1.0))
    assert compare(own, [SimpleNamespace(x=(0.5, 0.6, 0.7))], of) == HOLDS
    assert compare(own, [SimpleNamespace(x=(0.5, 0.8, 0.95))], of) == UNDECIDED
    assert compare(own, [SimpleNamespace(x=(1.1, 1.2, 1.3)), SimpleNamespace(x=(0.1, 0.2, 0.3))], of) == FAILS


def test_bound_claim_speaks_of_memory_bound_inference_only() -> None:
    found = bound_claim("llama-3.1-8b", ["h100"], ["prefill", "decode"], [1])
    assert [v.phase for v in found] == ["prefill", "decode"]
    prefill, decode = found
    assert prefill.verdict == NOT_APPLICABLE
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
        assert verdict.axis == str(axis)
        assert verdict.missing == ("dynamic depth",)
        assert verdict.source


def test_order_claim_with_all_families(tmp_path: Path) -> None:
    """Planted quality that makes the claim true: little depth, more dynamic depth, most width removed."""
    base = QualityRow("a", "depth", "llama-2-7b", 0.0625, "ppl", False, 5.0, 5.1, "p", "s")
    rows = (
        base,
        replace(base, family="dynamic_depth", sparsity=0.4, pruned=5.5),
        replace(base, family="width", sparsity=0.75, pruned=6.0),
    )
    (verdict,) = order_claim("llama-2-7b", ["a100"], QualityTable(rows), base.axis)
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


def test_command_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["claims", "llama-9", "--hardware", "h100"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
