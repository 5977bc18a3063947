"""One pruned model against others: half-widths of differences, and groups along a frontier."""

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
from calibration.validation.comparisons import TOLERANCE, Comparisons, compare_family, in_order
from simulator.arrays import FloatArray
from simulator.prediction.pareto import frontier

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


def test_a_family_without_a_model_at_a_sparsity_is_not_compared_there() -> None:
    dense = simulator.lower(simulator.load_model("llama-3.1-8b"), phase="decode", engine="reference")
    pruned = [
        ("width", 0.25, simulator.prune(dense, "width", 0.25)),
        ("depth", 0.5, simulator.prune(dense, "depth", 0.5)),
    ]
    assert not compare_family("depth", dense, pruned, simulator.load_hardware("h100")).competes.any()


def test_what_a_device_cannot_run_is_left_out() -> None:
    dense = simulator.lower(simulator.load_model("llama-3.1-8b"), phase="decode", dtype="fp16", engine="reference")
    families = ("depth", "width", "semi_structured")
    pruned = [(name, 0.5, simulator.prune(dense, name, 0.5)) for name in families]
    found = {name: compare_family("depth", dense, pruned, simulator.load_hardware(name)) for name in ("a100", "v100")}
    assert [m.family for m in found["a100"].models] == list(families)
    assert [m.family for m in found["v100"].models] == ["depth", "width"]


def test_two_families_see_each_other_from_both_sides() -> None:
    depth, width = comparisons("depth"), comparisons("width")
    i, j = (next(k for k, m in enumerate(c.models) if m.family == f) for c, f in ((depth, "width"), (width, "depth")))
    assert depth.difference[0, i] == pytest.approx(-width.difference[0, j])
    assert depth.half_width[0, i] == pytest.approx(width.half_width[0, j])
    assert (depth.margin[0, i] > 1.0) == (width.margin[0, j] - 2 * TOLERANCE / width.half_width[0, j] < -1.0)


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
    step = in_order(loss, group.tolist(), np.exp(log), np.full((n, n), reach))
    assert (step.margin > 0.0) == along(loss, group, log)
    if step.point != step.competitor and np.isfinite(step.margin):
        assert abs(step.margin) == pytest.approx(abs(step.difference) / step.half_width)
    for _ in range(20):
        moved = log + np.array([random.uniform(-0.499, 0.499) * reach for _ in range(n)])  # type: ignore[attr-defined]
        if abs(step.margin) >= 1.0:
            assert along(loss, group, moved) == (step.margin > 0.0)


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
