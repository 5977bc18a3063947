"""Frontiers: the rule against its definition, bands without gaps, measured speedups, and the
command."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted_points import point, row
from tables import tables_of

import simulator
from simulator.errors import InputError
from simulator.prediction.batch import batch_with
from simulator.prediction.compare import against
from simulator.prediction.pareto import (
    DENSE,
    Band,
    Point,
    frontier,
    fronts,
    independent,
    judged,
    read_measured,
)
from simulator.prediction.quality import QualityTable, choose_axis, load_quality

few = st.tuples(st.sampled_from([0.0, 0.1, 0.2, 0.3]), st.sampled_from([0.9, 1.0, 1.2, 1.5]))
planted = st.tuples(
    st.sampled_from(["depth", "width", "token"]), st.floats(-0.1, 2.0), st.floats(0.5, 3.0)
)


@given(st.lists(few, min_size=1, max_size=12))
def test_frontier_against_the_definition(points: list[tuple[float, float]]) -> None:
    loss, speedup = np.array(points).T
    for (x, y), found in zip(points, frontier(loss, speedup)):
        beaten = any(a <= x and b >= y and (a < x or b > y) for a, b in points)
        assert found == (not beaten)


def test_dense_model_takes_part() -> None:
    (slow, fast), _ = judged([point("depth", 0.1, 0.95), point("width", 0.2, 1.5)])
    assert (slow.optimal, slow.beaten_by) == (False, "the dense model")
    assert fast.optimal


@given(st.lists(planted, min_size=1, max_size=10))
def test_bands_cover_every_budget_once(found: list[tuple[str, float, float]]) -> None:
    points, out = judged([point(*p) for p in found])
    assert (out[0].low, out[-1].high) == (0.0, math.inf)
    for a, b in itertools.pairwise(out):
        assert a.high == b.low
        assert a.family != b.family
        assert a.speedup_high < b.speedup_low
    for budget in (0.0, 0.05, 0.5, 3.0):
        affordable = [p.speedup for p in points if p.loss <= budget] + [1.0]
        (band,) = [b for b in out if b.low <= budget < b.high]
        assert band.speedup_low - 1e-12 <= max(affordable) <= band.speedup_high + 1e-12


def test_fronts_cite_and_do_not_mix() -> None:
    table = load_quality().of_model("llama-2-7b")
    axis = choose_axis(table, "zero-shot", "SLEB")
    found, _ = fronts(
        "llama-2-7b",
        ["h100", "h100_sxm", "rtx_4090"],
        table,
        axis,
        phase=["prefill", "decode"],
        engine="reference",
    )
    assert [(f.phase, f.hardware) for f in found] == [
        *itertools.product(("prefill", "decode"), ("h100_sxm", "rtx_4090"))
    ]
    for front in found:
        assert all(
            (p.metric, p.protocol) == (axis.metric, axis.protocol) and p.source
            for p in front.points
        )
        assert [p.loss for p in front.points] == sorted(p.loss for p in front.points)
        (sleb,) = [p for p in front.points if p.method == "SLEB" and p.sparsity == 0.2]
        assert sleb.speedup_lower <= sleb.speedup <= sleb.speedup_upper
        assert sleb.speedup == pytest.approx(1 / (1 - 6 / 32), rel=0.03)
        assert all(p.beaten_by for p in front.points if not p.optimal)


def test_unsupported_rows_are_noted_and_an_empty_frontier_refused() -> None:
    table = QualityTable((row("depth", 0.25, 7.0), row("semi_structured", 0.25, 7.0)))
    (front,), notes = fronts("llama-3.1-8b", ["h100"], table, table.axes()[0])
    assert [p.family for p in front.points] == ["depth"]
    assert len(notes) == 1
    with pytest.raises(InputError, match="empty frontier"):
        fronts("llama-3.1-8b", ["h100"], QualityTable(table.rows[1:]), table.axes()[0])


def check_every_pair(points: Sequence[Point], out: Sequence[Band], half: Any) -> None:
    """Compare marks and bands with their definition; ``half`` (n, n) is the half-width of the log
    of the ratio of two speedups."""
    log = np.log([p.speedup for p in points])
    ahead = log[:, None] - log >= np.maximum(half, 1e-12)

    def certain(i: int, rivals: list[int]) -> bool:
        return all(ahead[i, j] for j in rivals if points[j].family != points[i].family)

    for i, p in enumerate(points):
        rivals = [j for j, q in enumerate(points) if q.loss <= p.loss]
        gains = p.speedup_lower > 1.0 or p.loss < 0.0
        assert p.sure == (p.optimal and gains and certain(i, rivals))
        fastest = max((points[j] for j in rivals if j != i), key=lambda q: q.speedup, default=None)
        beaten = fastest is not None and fastest.speedup >= max(p.speedup, 1.0)
        winner = fastest.name if fastest and beaten else "the dense model"
        assert p.beaten_by == ("" if p.optimal else winner)
    best = [i for i, p in enumerate(points) if p.optimal and p.speedup > 1.0]
    ends = zip(best, [*(points[i].loss for i in best[1:]), math.inf])
    sure = {}
    for i, end in ends:
        if (place := max(points[i].loss, 0.0)) < end:
            rivals = [j for j, q in enumerate(points) if q.loss < end]
            sure[place] = points[i].speedup_lower > 1.0 and certain(i, rivals)
    for band in out:
        inside = [known for place, known in sure.items() if band.low <= place < band.high]
        assert band.family == DENSE or band.sure == all(inside)


alike = st.tuples(
    st.sampled_from(["depth", "width", "token"]),
    st.sampled_from([-0.1, 0.0, 0.1, 0.2, 0.3]),
    st.sampled_from([0.9, 1.0, 1.1, 1.2, 1.5]),
    st.sampled_from([1.0, 1.01, 1.05, 1.2]),
)


@given(st.lists(alike, min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_marks_and_bands_are_those_of_every_pair(found: list[Any], random: Any) -> None:
    given_points = [point(*p) for p in found]
    shared = np.array([[random.uniform(0.0, 0.3) for _ in found] for _ in found])
    for below in (None, lambda some, others: shared[some, others]):
        points, out = judged(given_points, below)
        half = (below or independent(points))(np.arange(len(points)), slice(None))
        check_every_pair(points, out, half)


def test_half_widths_are_those_of_every_pair_in_pieces_too(monkeypatch: Any) -> None:
    table = QualityTable(tuple(row("width", i / 20, 7.0 + i) for i in range(1, 9)))
    asked: Any = ("llama-3.1-8b", ["h100"], table, table.axes()[0])
    (whole,), _ = fronts(*asked)
    monkeypatch.setattr("simulator.prediction.pareto.OPERATOR_ROWS", 100)
    (parts,), _ = fronts(*asked)
    assert parts == whole
    dense = simulator.lower("llama-3.1-8b")
    pruned = [simulator.prune(dense, "width", p.sparsity) for p in whole.points]
    batch, every = batch_with(dense, pruned), np.arange(len(pruned))
    others = [np.full(len(batch), 1 + i) for i in every]
    _, together, _ = against(batch, simulator.load_hardware("h100"), others)
    for front in (whole, parts):
        assert front.below is not None
        assert front.below(every, slice(None)) == pytest.approx(together.T[1:], rel=1e-9, abs=1e-12)


@pytest.mark.slow
def test_many_rows_open(cli: Any, tmp_path: Path) -> None:
    """Losses rise with the sparsity, so the frontier has many points; comparing every pair of rows
    would take more memory than a machine has."""
    path = tmp_path / "many.csv"
    with path.open("w") as file:
        file.write(
            "method,family,model,sparsity,metric,higher_is_better,dense,pruned,protocol,source\n"
        )
        for i in range(100_000):
            family, sparsity = ("depth", "width")[i % 2], i // 2 % 180 / 200
            pruned = 6.0 + 9.0 * sparsity + i * 1e-5
            file.write(f"m{i},{family},m,{sparsity:g},ppl,0,6,{pruned:.6f},p,s\n")
    line = f"pareto llama-3.2-1b --hardware h100 --quality {path} --quality-model m"
    out = cli.out(line)
    assert "100,000 models, shown on the frontier" in out
    assert "fastest family by quality budget" in out


def test_measured_speedups_are_used_where_they_fit(tmp_path: Path) -> None:
    path = tmp_path / "speed.csv"
    header = "hardware,phase,family,sparsity,speedup,speedup_lower"
    path.write_text(
        f"{header}\nh100_sxm,prefill,depth,0.25,1.29,1.28\n,,width,0.2,1.21,\n", encoding="utf-8"
    )
    table = QualityTable((row("depth", 0.25, 7.0), row("width", 0.25, 7.5), row("width", 0.2, 7.1)))
    measured, axis = read_measured(path), table.axes()[0]
    found, _ = fronts(
        "llama-3.1-8b", ["h100"], table, axis, phase=["prefill", "decode"], measured=measured
    )
    by = {(p.phase, p.family, p.sparsity): p for f in found for p in f.points}
    depth = by["prefill", "depth", 0.25]
    assert (depth.measured, depth.speedup, depth.speedup_lower, depth.speedup_upper) == (
        True,
        1.29,
        1.28,
        1.29,
    )
    assert not by["decode", "depth", 0.25].measured
    assert not by["prefill", "width", 0.25].measured
    assert by["decode", "width", 0.2].speedup == 1.21


@pytest.mark.parametrize(
    ("content", "expected"),
    tables_of("prediction/mistakes.yaml")["measured speedups"],
)
def test_bad_measured_speedups(content: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "speed.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError) as error:
        read_measured(path)
    assert expected in str(error.value)


def test_command(cli: Any) -> None:
    line = "pareto llama-2-7b --hardware"
    (record,) = cli.json(f"{line} h100 --metric zero-shot --protocol SLEB")
    assert record["bands"][-1]["high"] is None
    wanted = {"method", "family", "loss", "speedup", "speedup_lower", "optimal", "source"}
    assert wanted <= record["points"][0].keys()
    out = cli.out(f"{line} h100,rtx_4090")
    assert max(map(len, out.split("\n")[:12])) <= 120
    assert "fastest family by quality budget" in out
    assert out.count("SLEB (arXiv 2402.09025)") >= 2


def test_command_takes_the_quality_of_another_model_and_says_so(cli: Any) -> None:
    out, err = cli("pareto llama-3.1-8b --hardware h100 --quality-model llama-2-7b --csv -")
    assert out.startswith("model,hardware,phase")
    assert "quality: measured on llama-2-7b; speed: predicted for llama-3.1-8b" in err


@pytest.mark.parametrize(
    ("options", "expected"),
    tables_of("prediction/mistakes.yaml")["frontiers"],
)
def test_command_refuses(options: str, expected: str, cli: Any) -> None:
    assert expected in cli.refused(f"pareto llama-2-7b --hardware h100 {options}")


def test_options_of_a_method_reach_the_family_and_speed_is_that_of_the_model_asked() -> None:
    sliced = row("width_cross", 0.25, 7.0, method="b", options=(("residual_projections", True),))
    table = QualityTable((row("width_cross", 0.25, 7.0), sliced))
    (front,), _ = fronts("llama-3.2-1b", ["h100"], table, table.axes()[0])
    speed = {p.method: p.speedup for p in front.points}
    assert speed["b"] < speed["my width_cross"]
    assert {p.model for p in front.points} == {"llama-3.2-1b"}
