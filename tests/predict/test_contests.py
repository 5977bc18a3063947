"""One pruned model against another: intervals of ratios, of shares of bounds, and groups along a frontier."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import simulator
from simulator.arrays import FloatArray
from simulator.predict.choices import choices_of
from simulator.predict.compare import Pairs, against, compare
from simulator.predict.contests import CLOSE, Contests, contests_of, in_order
from simulator.predict.pareto import frontier, margins
from simulator.predict.rows import Piece, work_of
from simulator.predict.settings import Setting
from simulator.workload_batch import WorkloadBatch

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ("depth", "width", "dynamic_depth", "low_rank")


def stack_of(engine: str, *pruned: tuple[str, float]) -> WorkloadBatch:
    """A dense decode and its pruned versions."""
    dense = simulator.lower(simulator.load_model("llama-3.1-8b"), phase="decode", batch=1, seq=1024, engine=engine)
    return WorkloadBatch.of([dense, *(simulator.prune(dense, family, sparsity=s) for family, s in pruned)])


def refused(_choice: int | None, reason: str, _device: str) -> None:
    raise AssertionError(reason)


@pytest.mark.parametrize("engine", ["reference", "vllm", "hf"])
def test_against_the_dense_model_is_the_speedup_and_turned_round_the_interval_is(engine: str) -> None:
    workloads, hw = stack_of(engine, *((family, 0.25) for family in FAMILIES)), simulator.load_hardware("a100")
    c, _ = compare(Pairs(workloads, np.zeros(len(workloads), dtype=np.intp)), hw)
    others = [np.full(len(workloads), i) for i in range(len(workloads))]
    log, below, above = against(workloads, hw, others)
    np.testing.assert_allclose(log[0], np.log(c.speedup), atol=1e-12)
    np.testing.assert_allclose(log[0] - below[0], np.log(c.lower), atol=1e-12)
    np.testing.assert_allclose(log[0] + above[0], np.log(c.upper), atol=1e-12)
    np.testing.assert_allclose(log, -log.T, atol=1e-12)
    np.testing.assert_allclose(below, above.T, atol=1e-9)
    np.testing.assert_allclose(np.diag(below), 0.0, atol=1e-9)


def test_what_two_pruned_models_have_in_common_cancels() -> None:
    """Under a scheduler that no pruning touches both speedups are unsure together."""
    workloads, hw = stack_of("vllm", ("depth", 0.5), ("width", 0.5)), simulator.load_hardware("h100")
    _, below, above = against(workloads, hw, [np.zeros(3, dtype=np.intp), np.array([0, 1, 1])])
    assert max(below[1, 2], above[1, 2]) < 0.7 * np.hypot(below[0, 1], above[0, 2])


def contests(family: str = "depth", engine: str = "reference", sparsities: Sequence[float] = (0.25, 0.5)) -> Contests:
    model = simulator.load_model("llama-3.1-8b")
    choices = choices_of([model], FAMILIES, sparsity=sparsities)
    work = work_of(Piece(model, Setting(engine=engine), "decode", ((1, 1024), (8, 1024)), choices), refused)
    found = contests_of(work, simulator.load_hardware("h100"), family, refused)
    assert [{(r.batch, r.seq) for r in c.records} for c in found] == [{(1, 1024)}, {(8, 1024)}]
    return found[0]


def test_a_family_meets_every_other_at_its_own_sparsity() -> None:
    c = contests()
    for i, r in enumerate(c.records):
        own = c.records[c.own[i]]
        assert (own.family, own.sparsity) == ("depth", r.sparsity)
        assert c.rival[i] == (r.family != "depth")
        assert c.ahead[0, i] == pytest.approx(np.log(own.speedup / r.speedup), abs=1e-12)
        shares = own.efficiency - r.efficiency, own.efficiency - 1.0  # closer than the rival, or at its bound
        assert any(c.ahead[1, i] == pytest.approx(gap, abs=1e-9) for gap in shares)
    assert np.isinf(c.margin[:, ~c.rival]).all()


def test_two_families_see_each_other_from_both_sides() -> None:
    depth, width = contests("depth"), contests("width")
    i, j = (next(k for k, r in enumerate(c.records) if r.family == f) for c, f in ((depth, "width"), (width, "depth")))
    assert depth.ahead[0, i] == pytest.approx(-width.ahead[0, j])
    assert depth.reach[0, i] == pytest.approx(width.reach[0, j])
    assert (depth.margin[0, i] > 1.0) == (width.margin[0, j] - 2 * CLOSE / width.reach[0, j] < -1.0)


def test_reach_of_a_difference_of_shares_against_drawn_speedups() -> None:
    """Two logs drawn together, as unsure as the speedups and their ratio are, scatter the difference as far."""
    c, rng = contests("width"), np.random.default_rng(0)
    compared = 0
    for i in np.flatnonzero(c.rival):
        own, rival = c.records[c.own[i]], c.records[i]
        assert own.efficiency < 1.0, "at its bound nobody is closer"
        a, b = (np.log(r.speedup_upper / r.speedup_lower) / 2.0 for r in (own, rival))
        covariance = 0.5 * (a * a + b * b - c.reach[0, i] ** 2)
        logs = rng.multivariate_normal([0.0, 0.0], [[a * a, covariance], [covariance, b * b]], 200_000)
        drawn = [(r.speedup * np.exp(log) - 1.0) / (r.roofline_bound - 1.0) for r, log in zip((own, rival), logs.T)]
        assert c.reach[1, i] == pytest.approx(np.std(drawn[0] - drawn[1]), rel=0.05), rival.family
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
    step = in_order(loss, group.tolist(), np.exp(log), np.full((n, n), reach))
    assert (step.margin > 0.0) == along(loss, group, log)
    if step.point != step.rival and np.isfinite(step.margin):
        assert abs(step.margin) == pytest.approx(abs(step.ahead) / step.reach)
    for _ in range(20):
        moved = log + np.array([random.uniform(-0.499, 0.499) * reach for _ in range(n)])  # type: ignore[attr-defined]
        if abs(step.margin) >= 1.0:
            assert along(loss, group, moved) == (step.margin > 0.0)


def test_margins_turn_round() -> None:
    below = np.array([[0.0, 0.2, 0.1], [0.05, 0.0, 0.1], [0.1, 0.1, 0.0]])
    found = margins([1.0, 1.1, 1.3], below)
    np.testing.assert_allclose(found, -found.T)
    assert found[1, 0] == pytest.approx(np.log(1.1) / 0.05)  # down to 0 it is 0.05, not 0.2


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_what_is_decided_is_what_was_measured(phase: str) -> None:
    """On the CPU, whose pruned decoders were timed: of a 90 % interval one in twenty may decide the wrong way."""
    rows = list(csv.DictReader((ROOT / "docs" / "cpu" / "comparison.csv").read_text(encoding="utf-8").splitlines()))
    timed = {(r["family"], float(r["sparsity"])): float(r["measured"]) for r in rows if r["phase"] == phase}
    (shape,) = {(int(r["batch"]), int(r["seq"])) for r in rows}
    model, hw = simulator.load_model("smollm2-135m"), simulator.load_hardware("cpu")
    families, sparsities = (list(dict.fromkeys(column)) for column in zip(*timed))
    choices = choices_of([model], families, sparsity=sparsities)
    work = work_of(Piece(model, Setting(engine="reference", dtype="fp32"), phase, (shape,), choices), refused)
    right = wrong = 0
    for family in families:
        (c,) = contests_of(work, hw, family, refused)
        for i in np.flatnonzero(c.ahead[0] >= np.maximum(c.reach[0], 1e-9)):
            measured = timed[family, c.records[i].sparsity] / timed[c.records[i].family, c.records[i].sparsity]
            right, wrong = right + (measured > 1.0), wrong + (measured < 0.99)  # it repeats within 1 %
    assert right >= 30
    assert wrong <= 0.1 * right
