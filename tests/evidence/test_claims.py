"""Claims of the reference paper: comparisons of two pruned models, outcomes of planted numbers, and the command."""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import simulator
from calibration.evidence.claims import (
    FAILS,
    HOLDS,
    NOT_APPLICABLE,
    SPARSITIES,
    UNDECIDED,
    Comparisons,
    bound_outcome,
    claim_outcomes,
    compare_family,
    decided,
    in_order,
    order_outcome,
)
from simulator.arrays import FloatArray
from simulator.cli import run
from simulator.prediction.pareto import Front, Point, bands, frontier, marked
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


ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ("depth", "width", "dynamic_depth", "low_rank")


def comparisons(family: str = "depth", sparsities: Sequence[float] = (0.25, 0.5)) -> Comparisons:
    model = simulator.load_model("llama-3.1-8b")
    dense = simulator.lower(model, phase="decode", batch=1, seq=1024, engine="reference")
    pruned = [(name, s, simulator.prune(dense, name, s)) for name in FAMILIES for s in sparsities]
    return compare_family(family, dense, pruned, simulator.load_hardware("h100"))


def test_a_family_meets_every_other_at_its_own_sparsity() -> None:
    c = comparisons()
    for i, m in enumerate(c.models):
        own = c.models[c.own[i]]
        assert (own.family, own.sparsity) == ("depth", m.sparsity)
        assert c.competes[i] == (m.family != "depth")
        assert c.difference[0, i] == pytest.approx(np.log(own.speedup.speedup / m.speedup.speedup), abs=1e-12)
        shares = own.share - m.share, own.share - 1.0  # closer than the other, or at its bound
        assert any(c.difference[1, i] == pytest.approx(gap, abs=1e-9) for gap in shares)
    assert np.isinf(c.margin[:, ~c.competes]).all()


def test_what_a_device_cannot_run_is_left_out() -> None:
    dense = simulator.lower(simulator.load_model("llama-3.1-8b"), phase="decode", dtype="fp16", engine="reference")
    families = ("depth", "width", "semi_structured")
    pruned = [(name, 0.5, simulator.prune(dense, name, 0.5)) for name in families]
    found = {name: compare_family("depth", dense, pruned, simulator.load_hardware(name)) for name in ("a100", "v100")}
    assert [m.family for m in found["a100"].models] == list(families)
    assert [m.family for m in found["v100"].models] == ["depth", "width"]


def test_half_width_of_a_difference_of_shares_against_drawn_speedups() -> None:
    """Two logs drawn together, as uncertain as the speedups and their ratio, scatter the difference as far."""
    c, rng = comparisons("width"), np.random.default_rng(0)
    compared = 0
    for i in np.flatnonzero(c.competes):
        own, other = c.models[c.own[i]], c.models[i]
        assert own.share < 1.0, "at its bound no other is closer"
        a, b = (np.log(m.speedup.upper / m.speedup.lower) / 2.0 for m in (own, other))
        covariance = 0.5 * (a * a + b * b - c.half_width[0, i] ** 2)
        logs = rng.multivariate_normal([0.0, 0.0], [[a * a, covariance], [covariance, b * b]], 200_000)
        drawn = [
            (m.speedup.speedup * np.exp(log) - 1.0) / (m.speedup.roofline_bound - 1.0)
            for m, log in zip((own, other), logs.T)
        ]
        assert c.half_width[1, i] == pytest.approx(np.std(drawn[0] - drawn[1]), rel=0.05), other.family
        compared += 1
    assert compared == 6


points = st.lists(
    st.tuples(st.floats(0.01, 1.0), st.integers(-1, 2), st.floats(-0.2, 1.0)), min_size=2, max_size=7,
    unique_by=(lambda p: p[0], lambda p: np.exp(p[2])),  # speedups that differ
).filter(lambda found: any(group >= 0 for _, group, _ in found))  # fmt: skip


def along(loss: FloatArray, group: FloatArray, log: FloatArray) -> bool:
    """Whether groups come in order, each of them, along a frontier: by the rule on arrays."""
    mask = frontier(loss, log)
    found = [g for g in group[mask][np.argsort(loss[mask])] if g >= 0]
    return [g for g, _ in itertools.groupby(found)] == sorted({g for g in group if g >= 0})


@given(points, st.floats(0.01, 0.3), st.randoms(use_true_random=False))
def test_order_margin_against_the_frontier_and_whatever_the_interval_allows(
    found: list[tuple[float, int, float]], reach: float, random: object
) -> None:
    loss, group, log = (np.array(column) for column in zip(*found))
    n = len(loss)
    margin, one, other, difference, half_width = in_order(loss, group.tolist(), np.exp(log), np.full((n, n), reach))
    assert (margin > 0.0) == along(loss, group, log)
    if one != other and np.isfinite(margin):
        assert abs(margin) == pytest.approx(abs(difference) / half_width)
    for _ in range(20):
        moved = log + np.array([random.uniform(-0.499, 0.499) * reach for _ in range(n)])  # type: ignore[attr-defined]
        if abs(margin) >= 1.0:
            assert along(loss, group, moved) == (margin > 0.0)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_what_is_decided_is_what_was_measured(phase: str) -> None:
    """On the CPU, whose pruned decoders were timed: of a 90 % interval one in twenty may decide the wrong way."""
    rows = list(csv.DictReader((ROOT / "docs" / "cpu" / "comparison.csv").read_text(encoding="utf-8").splitlines()))
    timed = {(r["family"], float(r["sparsity"])): float(r["measured"]) for r in rows if r["phase"] == phase}
    ((batch, seq),) = {(int(r["batch"]), int(r["seq"])) for r in rows}
    model, hw = simulator.load_model("smollm2-135m"), simulator.load_hardware("cpu")
    dense = simulator.lower(model, phase=phase, batch=batch, seq=seq, dtype="fp32", engine="reference")
    pruned = [(family, s, simulator.prune(dense, family, s)) for family, s in timed]
    right = wrong = 0
    for family in dict.fromkeys(family for family, _ in timed):
        c = compare_family(family, dense, pruned, hw)
        for i in np.flatnonzero(c.difference[0] >= np.maximum(c.half_width[0], 1e-9)):
            measured = timed[family, c.models[i].sparsity] / timed[c.models[i].family, c.models[i].sparsity]
            right, wrong = right + (measured > 1.0), wrong + (measured < 0.99)  # it repeats within 1 %
    assert right >= 30
    assert wrong <= 0.1 * right
