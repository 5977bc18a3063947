"""Claims of the reference paper: verdicts that follow from planted numbers, their margins, and the command."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from planted_points import WHERE, point, row

from simulator.cli import run
from simulator.errors import InputError
from simulator.predict.claims import (
    FAILS,
    HOLDS,
    NO_DATA,
    NOT_APPLICABLE,
    SPARSITIES,
    UNDECIDED,
    Verdict,
    decided,
    order_verdict,
    verdicts,
)
from simulator.predict.pareto import Front, Point, bands, judge
from simulator.predict.quality import Axis, table_text
from simulator.predict.scenario import Scenario

CLAIMED = (point("depth", 0.02, 1.1), point("dynamic_depth", 0.1, 1.3), point("width", 0.2, 1.6))
REVERSED = (point("width", 0.02, 1.1), point("dynamic_depth", 0.1, 1.3), point("depth", 0.2, 1.6))
PAPER = (
    point("depth", 0.0285, 1.12), point("dynamic_depth", 0.0396, 1.08), point("low_rank", 0.0673, 1.15),
    point("depth", 0.1088, 1.29), point("width", 0.1271, 1.27), point("dynamic_depth", 0.1559, 1.44),
    point("low_rank", 0.2046, 1.43), point("width", 0.264, 1.77), point("depth", 0.3083, 1.88),
)  # fmt: skip
"""The paper's own frontier, of its Table 2 and section 5.2."""


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
        ((CLAIMED[0], CLAIMED[2]), UNDECIDED, HOLDS, ("dynamic depth",), "depth from 2 % to 20 %; width from 20 %"),
        # what is there can contradict it without the rest
        ((point("width", 0.01, 1.6), point("depth", 0.1, 1.2)), FAILS, FAILS, ("dynamic depth",), ""),
        ((CLAIMED[0],), NO_DATA, "", ("dynamic depth", "static width"), "only static depth"),
        ((point("token", 0.1, 1.1),), NO_DATA, "", ("static depth", "dynamic depth", "static width"), "none of the"),
        ((*CLAIMED, point("semi_structured", 0.15, 1.5)), HOLDS, HOLDS, (), "semi_structured from 15 % to 20 %"),
    ],
)  # fmt: skip
def test_order(points: tuple[Point, ...], verdict: str, predicted: str, missing: tuple[str, ...], numbers: str) -> None:
    found = order_verdict(front(*points))
    assert (found.verdict, found.predicted, found.missing) == (verdict, predicted, missing)
    assert numbers in found.numbers
    assert bool(found.needed) == (verdict in (UNDECIDED, NO_DATA))
    assert all(f"quality of {group}" in found.needed or group in found.needed for group in missing if found.needed)


def test_order_hangs_on_the_closest_comparison() -> None:
    """Width at 1.35 against dynamic depth at 1.3: 3.8 % apart, known to 10 %."""
    found = order_verdict(front(*CLAIMED[:2], point("width", 0.2, 1.35, 1.1)))
    assert found.margin == pytest.approx(math.log(1.35 / 1.3) / math.log(1.1))
    assert found.hangs_on == "width 25 % against dynamic_depth 25 %: 1.038 times as fast"
    assert found.needed.startswith("this ratio to +-3.8 % (now +-10 %): measured times of width 25 % and dynamic_depth")
    nearer = order_verdict(front(*CLAIMED[:2], point("width", 0.2, 1.35, 1.03)))
    assert (nearer.verdict, nearer.needed, nearer.hangs_on) == (HOLDS, "", found.hangs_on)


def test_order_in_the_losses_that_the_claim_speaks_of() -> None:
    """Of the paper's own points the order holds as far as it goes; others come between, and depth comes back beyond."""
    found = order_verdict(front(*PAPER), accuracy=True)
    assert (found.verdict, found.missing) == (HOLDS, ())
    assert found.between == ("low_rank 25 % (6.7 % loss)", "depth 25 % (10.9 % loss)")
    assert order_verdict(front(*PAPER)).verdict == FAILS  # of a perplexity, all of it counts
    far = order_verdict(front(*PAPER[:4], point("width", 0.4, 1.9)), accuracy=True)
    assert far.missing == ("static width",)


def test_ratios_that_are_known_better_than_speedups_decide() -> None:
    """What two points have in common is not in doubt between them."""
    points = [replace(p, speedup_lower=p.speedup / 1.4, speedup_upper=p.speedup * 1.4) for p in CLAIMED]
    loose = front(*(replace(p, speedup_lower=max(p.speedup_lower, 1.01)) for p in points))
    assert order_verdict(loose).verdict == UNDECIDED
    below = tuple(map(tuple, np.full((3, 3), 0.05).tolist()))
    assert order_verdict(replace(loose, below=below)).verdict == HOLDS


def test_one_rule_decides() -> None:
    assert [decided(m) for m in (1.0, 0.99, 0.0, -0.99, -1.0)] == [HOLDS, UNDECIDED, UNDECIDED, UNDECIDED, FAILS]


def by_place(found: tuple[Verdict, ...], claim: str = "bound") -> dict[tuple[str, str, str], Verdict]:
    return {(v.hardware, v.engine, v.phase): v for v in found if v.claim == claim}


def test_bound_on_every_device_and_engine() -> None:
    devices, engines = ["a100", "h100"], ["reference", "vllm", "hf"]
    found = verdicts("llama-3.1-8b", devices, engine=engines)
    bound = by_place(found)
    places = set(product(("a100_sxm_80gb", "h100_sxm"), engines, ("prefill", "decode")))
    assert set(bound) == places
    assert set(by_place(found, "order")) == {place for place in places if place[2] == "prefill"}
    for place, v in bound.items():
        assert v.margin is not None
        assert v.margin == pytest.approx(min(m for _, m in v.margins)), place
        assert [s for s, _ in v.margins] == list(SPARSITIES)
        assert v.predicted == (HOLDS if v.margin >= 0 else FAILS)
        assert v.hangs_on.startswith("depth against ")
        expected = decided(v.margin) if v.bottleneck == "memory" else NOT_APPLICABLE
        assert (v.verdict, bool(v.needed)) == (expected, expected == UNDECIDED)
    assert bound["h100_sxm", "hf", "decode"].bottleneck == "host"  # where no pruning of kernels is a memory-bound one
    assert bound["h100_sxm", "vllm", "prefill"].bottleneck == "compute"


def test_bound_is_clearer_with_more_layers_gone_and_with_less_asked_of_the_interval() -> None:
    at: dict[float, dict[float, float]] = {}
    for level in (0.5, 0.9):
        setting = Scenario(engine="reference", level=level)
        (v,) = (v for v in verdicts("llama-2-7b", ["h100"], scenario=setting) if v.phase == "decode")
        at[level] = dict(v.margins)
    for margins in at.values():
        assert 0.0 < margins[0.125] < margins[0.25] < margins[0.5]
    assert all(at[0.5][s] == pytest.approx(at[0.9][s] * 1.645 / 0.6745, rel=1e-3) for s in SPARSITIES)


def test_claims_of_a_model_with_quality_of_some_families(tmp_path: Path) -> None:
    prefill, decode, *order = verdicts("llama-2-7b", ["a100"])
    assert (prefill.phase, prefill.verdict, decode.phase) == ("prefill", NOT_APPLICABLE, "decode")
    assert decode.numbers.count("of its bound's gain") == 3
    assert len({v.axis for v in order}) == len(order) >= 2
    assert all(v.axis and v.source and v.missing == ("dynamic depth",) for v in order)
    # planted quality that makes (b) true: little depth, more dynamic depth, most width removed
    rows = [row("depth", 0.0625, 6.1), row("dynamic_depth", 0.4, 6.6), row("width", 0.75, 7.2)]
    (tmp_path / "q.csv").write_text(table_text(replace(r, model="llama-2-7b") for r in rows))
    assert verdicts("llama-2-7b", ["a100"], tmp_path / "q.csv")[2].verdict == HOLDS
    (tmp_path / "q.csv").write_text(table_text(replace(r, model="llama-2-7b") for r in rows[:1]))
    none = verdicts("llama-2-7b", ["a100"], tmp_path / "q.csv", engine=["vllm", "hf"])[4:]
    assert [(v.verdict, v.missing, v.engine) for v in none] == [
        (NO_DATA, ("dynamic depth", "static width"), engine) for engine in ("vllm", "hf")
    ]
    assert all(v.numbers.endswith("there is quality of: static depth") for v in none)
    assert all(v.needed == "quality of dynamic depth and static width on one axis with the others" for v in none)
    with pytest.raises(InputError, match=r"'llama-3\.1-8b' is unknown"):
        verdicts("llama-3.1-8b", ["a100"], tmp_path / "q.csv")


def test_order_on_the_quality_of_the_paper() -> None:
    """Every family that (b) speaks of has data, so nothing but speed decides."""
    (v,) = (v for v in verdicts("llama-3.1-8b", ["rtx_pro_6000"], engine=["reference"]) if v.claim == "order")
    assert v.verdict in (HOLDS, FAILS, UNDECIDED)
    assert v.verdict == decided(v.margin or 0.0)
    assert not v.missing
    assert "Beyond FLOPs" in v.axis
    assert "reading note" in v.source


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--hardware", "h100,rtx_4090", "--engine", "reference,vllm"]
    assert run(["claims", "llama-3.1-8b", *where, "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    places = product(("bound", "order"), ("h100_sxm", "rtx_4090"), ("reference", "vllm"))
    assert {(r["claim"], r["hardware"], r["engine"]) for r in records} == set(places)
    assert all(r["numbers"] and r["hangs_on"] and math.isfinite(r["margin"]) for r in records)
    assert all(bool(r["needed"]) == (r["verdict"] == UNDECIDED) for r in records)
    assert run(["claims", "llama-2-7b", "--hardware", "h100"]) == 0
    out = capsys.readouterr().out
    assert "(a) in memory-bound inference" in out
    assert "no data: dynamic depth" in out
    assert run(["claims", "llama-9", "--hardware", "h100"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_command_fits_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simulator.cli.render.width", lambda: 100)
    devices = "rtx_pro_6000,a100,h100,rtx_4090"
    assert (
        run(["claims", "llama-3.1-8b", "--hardware", devices, "--engine", "reference,vllm,hf", "--batch", "1,8"]) == 0
    )
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert out.count("does not apply") >= 24  # prefill, everywhere
