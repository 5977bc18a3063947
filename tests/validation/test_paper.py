"""The taxonomy paper: its numbers next to predictions, its claims on planted numbers, and the
commands."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from planted_points import WHERE, point

import simulator
from calibration.validation.paper import (
    BATCHES,
    FAILS,
    HOLDS,
    NOT_APPLICABLE,
    SPARSITIES,
    UNDECIDED,
    Comparisons,
    claim_outcomes,
    compare_family,
    decided,
    in_order,
    order_outcome,
    table_2,
)
from simulator.arrays import FloatArray
from simulator.prediction.pareto import Front, Point, frontier, judged
from simulator.prediction.quality import Axis

CLAIMED = (point("depth", 0.02, 1.1), point("dynamic_depth", 0.1, 1.3), point("width", 0.2, 1.6))
REVERSED = (point("width", 0.02, 1.1), point("dynamic_depth", 0.1, 1.3), point("depth", 0.2, 1.6))


def front(*points: Point) -> Front:
    return Front(*WHERE, Axis("ppl", "p"), *judged(points), True, "", 0.0, 0.9)


@pytest.mark.parametrize(
    ("points", "verdict"),
    [
        (CLAIMED, HOLDS),
        (REVERSED, FAILS),
        ((*CLAIMED[:2], point("width", 0.2, 1.2)), FAILS),  # width is never optimal
        ((*CLAIMED[:2], point("width", 0.2, 1.35, 1.1)), UNDECIDED),  # within the intervals
        ((*CLAIMED, point("semi_structured", 0.15, 1.5)), HOLDS),  # other families do not count
        # a larger loss than the claim's does not count
        ((*CLAIMED, point("depth", 0.3, 1.9)), HOLDS),
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
    assert (
        found.needed
        == "the interval of the difference reaches -5.6 %; measure both models within 3.8 % to"
        " decide"
    )
    nearer = order_outcome(front(*CLAIMED[:2], point("width", 0.2, 1.35, 1.03)))
    assert (nearer.verdict, nearer.needed, nearer.decided_by) == (HOLDS, "", found.decided_by)


def test_outcomes_on_every_device_and_engine() -> None:
    engines, steps = ["reference", "vllm", "hf"], list[tuple[int, int]]()
    found = claim_outcomes(
        ["a100", "h100"], engines, lambda done, total: steps.append((done, total))
    )
    assert steps == [(i, 7) for i in range(1, 8)]
    places = {(o.claim, o.hardware, o.engine, o.phase) for o in found}
    devices, phases = ("a100_sxm_80gb", "h100_sxm"), ("prefill", "decode")
    every = {("bound", *place) for place in product(devices, engines, phases)}
    assert places == every | {("order", *place) for place in product(devices, engines, phases[:1])}
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
    bottleneck = {
        (o.hardware, o.engine, o.phase): o.bottleneck for o in found if o.claim == "bound"
    }
    assert bottleneck["h100_sxm", "hf", "decode"] == "host"  # pruning kernels does not help there
    assert bottleneck["h100_sxm", "vllm", "prefill"] == "compute"


def test_command(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "paper --claims --hardware h100 --engine reference,vllm"
    records = cli.json(line)
    places = product(("bound", "order"), ("rtx_pro_6000", "h100_sxm"), ("reference", "vllm"))
    assert {(r["claim"], r["hardware"], r["engine"]) for r in records} == set(places)
    assert all(bool(r["needed"]) == (r["verdict"] == UNDECIDED) for r in records)
    monkeypatch.setattr("simulator.cli.render.width", lambda: 100)
    out = cli.out(line)
    assert max(map(len, out.splitlines())) <= 100
    assert "(a) in memory-bound inference" in out
    assert "(b) along the prefill frontier" in out
    assert out.count("does not apply") == 4  # prefill
    assert "--figure" in cli.refused(f"{line} --figure x.png")


ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ("depth", "width", "dynamic_depth", "low_rank")


def comparisons(family: str = "depth", sparsities: Sequence[float] = (0.25, 0.5)) -> Comparisons:
    model = simulator.load_model("llama-3.1-8b")
    dense = simulator.lower(model, phase="decode", batch=1, seq=1024, engine="reference")
    pruned = [(name, s, simulator.prune(dense, name, s)) for name in FAMILIES for s in sparsities]
    return compare_family(family, dense, pruned, simulator.load_hardware("h100"))


def test_a_family_meets_every_other_at_its_own_sparsity() -> None:
    c = comparisons()
    for i, (family, sparsity) in enumerate(c.models):
        own = c.own[i]
        assert c.models[own] == ("depth", sparsity)
        assert c.competes[i] == (family != "depth")
        assert c.difference[0, i] == pytest.approx(
            np.log(c.speedups[own].speedup / c.speedups[i].speedup), abs=1e-12
        )
        # closer than the other, or at its bound
        shares = c.share[own] - c.share[i], c.share[own] - 1.0
        assert any(c.difference[1, i] == pytest.approx(gap, abs=1e-9) for gap in shares)
    assert np.isinf(c.margin[:, ~c.competes]).all()


points = st.lists(
    st.tuples(st.floats(0.01, 1.0), st.integers(-1, 2), st.floats(-0.2, 1.0)),
    min_size=2,
    max_size=7,
    unique_by=(lambda p: p[0], lambda p: np.exp(p[2])),  # speedups that differ
).filter(lambda found: any(group >= 0 for _, group, _ in found))


def along(loss: FloatArray, group: FloatArray, log: FloatArray) -> bool:
    """Whether all groups come in order along a frontier, computed from arrays."""
    mask = frontier(loss, log)
    found = [g for g in group[mask][np.argsort(loss[mask])] if g >= 0]
    return [g for g, _ in itertools.groupby(found)] == sorted({g for g in group if g >= 0})


@given(points, st.floats(0.01, 0.3), st.randoms(use_true_random=False))
def test_order_margin_against_the_frontier_and_whatever_the_interval_allows(
    found: list[tuple[float, int, float]], reach: float, random: object
) -> None:
    loss, group, log = (np.array(column) for column in zip(*found))
    n = len(loss)
    margin, one, other, difference, half_width = in_order(
        loss, group.tolist(), np.exp(log), np.full((n, n), reach)
    )
    assert (margin > 0.0) == along(loss, group, log)
    if one != other and np.isfinite(margin):
        assert abs(margin) == pytest.approx(abs(difference) / half_width)
    for _ in range(20):
        moved = log + np.array([random.uniform(-0.499, 0.499) * reach for _ in range(n)])  # type: ignore[attr-defined]
        if abs(margin) >= 1.0:
            assert along(loss, group, moved) == (margin > 0.0)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_what_is_decided_is_what_was_measured(phase: str) -> None:
    """Decided comparisons on the CPU, whose pruned decoders were timed: a 90 % interval errs once
    in twenty."""
    rows = list(
        csv.DictReader(
            (ROOT / "docs" / "cpu" / "comparison.csv").read_text(encoding="utf-8").splitlines()
        )
    )
    timed = {
        (r["family"], float(r["sparsity"])): float(r["measured"])
        for r in rows
        if r["phase"] == phase
    }
    ((batch, seq),) = {(int(r["batch"]), int(r["seq"])) for r in rows}
    model, hw = simulator.load_model("smollm2-135m"), simulator.load_hardware("cpu")
    dense = simulator.lower(
        model, phase=phase, batch=batch, seq=seq, dtype="fp32", engine="reference"
    )
    pruned = [(family, s, simulator.prune(dense, family, s)) for family, s in timed]
    right = wrong = 0
    for family in dict.fromkeys(family for family, _ in timed):
        c = compare_family(family, dense, pruned, hw)
        for i in np.flatnonzero(c.difference[0] >= np.maximum(c.half_width[0], 1e-9)):
            measured = timed[family, c.models[i][1]] / timed[c.models[i]]
            # it repeats within 1 %
            right, wrong = right + (measured > 1.0), wrong + (measured < 0.99)
    assert right >= 30
    assert wrong <= 0.1 * right


def test_every_cell_of_the_table_is_met() -> None:
    cells = table_2()
    assert len(cells) == 20
    for c in cells:
        assert abs(c.error) < (0.10 if c.family == "dynamic_depth" else 0.08), (
            c.family,
            c.sparsity,
            c.phase,
            c.error,
        )
        assert len(c.by_batch) == len(BATCHES)
        assert c.lower <= c.predicted <= c.upper
    assert sum(c.inside for c in cells) >= 17


def test_families_come_in_the_published_order_where_it_is_clear() -> None:
    for a, b in itertools.permutations(table_2(), 2):
        same = (a.phase, a.sparsity) == (b.phase, b.sparsity)
        if same and a.published > 1.06 * b.published:  # intervals do not order closer speedups
            assert a.predicted > b.predicted, (a, b)


def test_the_table_is_printed_and_drawn(cli: Any, tmp_path: Path) -> None:
    file = tmp_path / "table.png"
    shown = cli.out(f"paper --hardware a100 --engine vllm --figure {file} --width 5.5in")
    conclusion, _, tables = shown.partition("\n\n")
    assert max(map(len, conclusion.splitlines())) <= 120  # sentences fill the width of a pipe
    assert max(map(len, tables.splitlines())) <= 100
    assert "of 20 published speedups lie in the 90 % interval" in shown
    with Image.open(file) as picture:
        assert picture.width == 1650  # 300 dots per inch
    records = cli.json("paper --hardware a100 --engine vllm")
    count = {
        what: sum(r["what"] == what for r in records)
        for what in dict.fromkeys(r["what"] for r in records)
    }
    assert count["table 2"] == count["elsewhere"] == 20
    assert all(r["published"] is None for r in records if r["what"] == "elsewhere")
    assert "no_such_gpu" in cli.refused("paper --hardware no_such_gpu")
