"""Claims of the reference paper: outcomes that follow from planted numbers, their margins, and the command."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest

import simulator
from calibration.validation.claims import (
    FAILS,
    HOLDS,
    NOT_APPLICABLE,
    SPARSITIES,
    UNDECIDED,
    bound_outcome,
    claim_outcomes,
    decided,
    order_outcome,
)
from simulator.cli import run
from simulator.prediction.pareto import Front, Point, bands, marked
from simulator.prediction.quality import Axis

WHERE = ("m", "h", "prefill", 1, 1, "vllm")


def point(family: str, loss: float, speedup: float, spread: float = 1.0) -> Point:
    """A point with an interval of a factor ``spread`` to both sides."""
    interval = (speedup, speedup / spread, speedup * spread)
    quality, unjudged = ("acc", "p", 1.0, 1.0 - loss, loss), (False, False, False, "", "compute", True, "s")
    return Point(*WHERE, family, family, 0.25, 0.25, *quality, *interval, *unjudged)


CLAIMED = (point("depth", 0.02, 1.1), point("dynamic_depth", 0.1, 1.3), point("width", 0.2, 1.6))
REVERSED = (point("width", 0.02, 1.1), point("dynamic_depth", 0.1, 1.3), point("depth", 0.2, 1.6))
PAPER = (
    point("depth", 0.0285, 1.12), point("dynamic_depth", 0.0396, 1.08), point("low_rank", 0.0673, 1.15),
    point("depth", 0.1088, 1.29), point("width", 0.1271, 1.27), point("dynamic_depth", 0.1559, 1.44),
    point("low_rank", 0.2046, 1.43), point("width", 0.264, 1.77), point("depth", 0.3083, 1.88),
)  # fmt: skip
"""The paper's own frontier, of its Table 2 and section 5.2."""


def front(*points: Point) -> Front:
    found = marked(points)
    return Front(*WHERE, Axis("acc", "p"), found, bands(found), True, "", 0.0, 0.9)


@pytest.mark.parametrize(
    ("points", "verdict"),
    [
        (CLAIMED, HOLDS),
        (REVERSED, FAILS),
        ((*CLAIMED[:2], point("width", 0.2, 1.2)), FAILS),  # width is never optimal
        ((*CLAIMED[:2], point("width", 0.2, 1.35, 1.1)), UNDECIDED),  # within the intervals
        ((*CLAIMED, point("semi_structured", 0.15, 1.5)), HOLDS),  # other families do not count
        ((*CLAIMED, point("depth", 0.3, 1.9)), HOLDS),  # nor does a larger loss than the claim's
    ],
)
def test_order(points: tuple[Point, ...], verdict: str) -> None:
    found = order_outcome(front(*points))
    assert (found.verdict, bool(found.needed)) == (verdict, verdict == UNDECIDED)


def test_order_is_decided_by_the_closest_comparison() -> None:
    """Width at 1.35 against dynamic depth at 1.3: 3.8 % apart, known to 10 %."""
    found = order_outcome(front(*CLAIMED[:2], point("width", 0.2, 1.35, 1.1)))
    assert found.margin == pytest.approx(math.log(1.35 / 1.3) / math.log(1.1))
    assert found.decided_by == "width 25 % against dynamic_depth 25 %: 1.038 times as fast"
    assert found.needed == ("the interval of the difference reaches -5.6 %; measure both models within 3.8 % to decide")
    nearer = order_outcome(front(*CLAIMED[:2], point("width", 0.2, 1.35, 1.03)))
    assert (nearer.verdict, nearer.needed, nearer.decided_by) == (HOLDS, "", found.decided_by)


def test_order_of_the_papers_own_points() -> None:
    """The order holds as far as it goes; other families stand in between."""
    found = order_outcome(front(*PAPER))
    assert found.verdict == HOLDS
    assert found.elsewhere == ("low_rank 25 % (6.7 % loss)", "depth 25 % (10.9 % loss)")


def test_ratios_that_are_known_better_than_speedups_decide() -> None:
    """What two points have in common cancels between them."""
    points = [replace(p, speedup_lower=p.speedup / 1.4, speedup_upper=p.speedup * 1.4) for p in CLAIMED]
    loose = front(*(replace(p, speedup_lower=max(p.speedup_lower, 1.01)) for p in points))
    assert order_outcome(loose).verdict == UNDECIDED
    below = tuple(map(tuple, np.full((3, 3), 0.05).tolist()))
    assert order_outcome(replace(loose, below=below)).verdict == HOLDS


def test_one_rule_decides() -> None:
    assert [decided(m) for m in (1.0, 0.99, 0.0, -0.99, -1.0)] == [HOLDS, UNDECIDED, UNDECIDED, UNDECIDED, FAILS]


def test_outcomes_on_every_device_and_engine() -> None:
    engines, steps = ["reference", "vllm", "hf"], list[tuple[int, int]]()
    found = claim_outcomes(["a100", "h100"], engines, lambda done, total: steps.append((done, total)))
    assert steps == [(i, 7) for i in range(1, 8)]
    places = {
        claim: [(o.hardware, o.engine, o.phase) for o in found if o.claim == claim] for claim in ("bound", "order")
    }
    assert sorted(places["bound"]) == sorted(product(("a100_sxm_80gb", "h100_sxm"), engines, ("prefill", "decode")))
    assert sorted(places["order"]) == sorted(place for place in places["bound"] if place[2] == "prefill")
    for o in found:
        assert o.margin is not None
        assert o.decided_by
        if o.claim == "order":
            assert o.verdict == decided(o.margin)
            continue
        assert o.margin == pytest.approx(min(m for _, m in o.margins))
        assert [s for s, _ in o.margins] == list(SPARSITIES)
        assert o.decided_by.startswith("depth against ")
        expected = decided(o.margin) if o.bottleneck == "memory" else NOT_APPLICABLE
        assert (o.verdict, bool(o.needed)) == (expected, expected == UNDECIDED)
    bottleneck = {(o.hardware, o.engine, o.phase): o.bottleneck for o in found if o.claim == "bound"}
    assert bottleneck["h100_sxm", "hf", "decode"] == "host"  # pruning kernels does not help there
    assert bottleneck["h100_sxm", "vllm", "prefill"] == "compute"


def test_bound_is_clearer_with_more_layers_gone_and_at_a_lower_level() -> None:
    dense = simulator.lower(simulator.load_model("llama-2-7b"), phase="decode", engine="reference")
    families = ("depth", "width", "width_cross", "low_rank", "dynamic_depth")
    pruned = [(family, s, simulator.prune(dense, family, s)) for family in families for s in SPARSITIES]
    hw = simulator.load_hardware("h100")
    at = {level: dict(bound_outcome(dense, pruned, hw, level).margins) for level in (0.5, 0.9)}
    for margins in at.values():
        assert 0.0 < margins[0.125] < margins[0.25] < margins[0.5]
    assert all(at[0.5][s] == pytest.approx(at[0.9][s] * 1.645 / 0.6745, rel=1e-3) for s in SPARSITIES)


def test_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    where: list[Any] = ["paper", "--claims", "--hardware", "h100", "--engine", "reference,vllm"]
    assert run([*where, "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    places = product(("bound", "order"), ("rtx_pro_6000", "h100_sxm"), ("reference", "vllm"))
    assert {(r["claim"], r["hardware"], r["engine"]) for r in records} == set(places)
    assert all(bool(r["needed"]) == (r["verdict"] == UNDECIDED) for r in records)
    monkeypatch.setattr("simulator.cli.render.width", lambda: 100)
    assert run(where) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert "(a) in memory-bound inference" in out
    assert "(b) along the prefill frontier" in out
    assert out.count("does not apply") == 4  # prefill
    assert run([*where, "--figure", "x.png"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
