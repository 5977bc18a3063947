"""Claims of the reference paper: verdicts that follow from planted numbers, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from planted_points import WHERE, point, row

from simulator.cli import run
from simulator.errors import InputError
from simulator.predict.claims import FAILS, HOLDS, NO_DATA, NOT_APPLICABLE, UNDECIDED, compare, order_verdict, verdicts
from simulator.predict.pareto import Front, Point, bands, judge
from simulator.predict.quality import Axis, table_text

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


def test_claims_of_a_model_with_quality_of_some_families(tmp_path: Path) -> None:
    found = verdicts("llama-2-7b", ["a100"])
    prefill, decode, *order = found
    assert (prefill.phase, prefill.verdict, decode.phase) == ("prefill", NOT_APPLICABLE, "decode")
    assert "bound by compute" in prefill.numbers
    assert decode.verdict in (HOLDS, UNDECIDED)  # depth itself loses nothing in decode under a graph
    assert decode.predicted == HOLDS
    assert decode.numbers.count("of its bound") == 3
    assert len({v.axis for v in order}) == len(order) >= 3
    assert all(v.axis and v.source and v.missing == ("dynamic depth",) for v in order)
    # planted quality that makes (b) true: little depth, more dynamic depth, most width removed
    rows = [row("depth", 0.0625, 6.1), row("dynamic_depth", 0.4, 6.6), row("width", 0.75, 7.2)]
    (tmp_path / "q.csv").write_text(table_text(replace(r, model="llama-2-7b") for r in rows))
    assert verdicts("llama-2-7b", ["a100"], tmp_path / "q.csv")[2].verdict == HOLDS
    (tmp_path / "q.csv").write_text(table_text(replace(r, model="llama-2-7b") for r in rows[:1]))
    (none,) = verdicts("llama-2-7b", ["a100"], tmp_path / "q.csv")[2:]
    assert (none.verdict, none.missing) == (NO_DATA, ("dynamic depth", "static width"))
    assert none.numbers.endswith("there is quality of: static depth")
    with pytest.raises(InputError, match=r"'llama-3\.1-8b' is unknown"):
        verdicts("llama-3.1-8b", ["a100"], tmp_path / "q.csv")


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["claims", "llama-3.1-8b", "--hardware", "h100,rtx_4090", "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert {(r["claim"], r["hardware"]) for r in records} == {*product(("bound", "order"), ("h100_sxm", "rtx_4090"))}
    assert all(r["numbers"] for r in records)
    no_depth = [r for r in records if r["claim"] == "order"]
    assert all(r["verdict"] == NO_DATA and "static depth" in r["missing"] for r in no_depth)
    assert run(["claims", "llama-2-7b", "--hardware", "h100"]) == 0
    out = capsys.readouterr().out
    assert "(a) in memory-bound inference" in out
    assert "no data for dynamic depth" in out
    assert run(["claims", "llama-9", "--hardware", "h100"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
