"""Intervals of times and ratios with uncertain hosts or a measured time follow Bayes and cover
planted values."""

from __future__ import annotations

from dataclasses import replace
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import simulator
from simulator.codes import Kind, Part, Phase
from simulator.engines.engine import list_engines
from simulator.prediction.batch import batch_with
from simulator.prediction.compare import compare
from simulator.pruning import general_families, prune
from simulator.request import Lowered
from simulator.uncertainty.factors import (
    COVERAGE_FACTOR,
    Uncertainty,
    correlation,
    in_order,
    level_scale,
)
from simulator.uncertainty.forward import PredictedPass, forward_passes
from simulator.uncertainty.intervals import (
    CONSISTENT_SD,
    MEASURED_LOG_SD,
    MIXED_LOG_SD,
    REPEATED_LOG_SD,
    SAME_SHAPE,
    intervals,
    workload_time,
)
from simulator.workload import Workload, WorkloadBatch

H100 = simulator.load_hardware("h100")


def lowered(
    engine: str, phase: str = "decode", batch: int = 1, seq: int = 512, **more: Any
) -> Workload:
    options = {"phase": phase, "batch": batch, "seq": seq, "engine": engine, **more}
    if phase in ("generate", "serve"):
        options.setdefault("new_tokens", 8)
    return simulator.lower("llama-3.1-8b", **options)


def compared(
    dense: Workload, *pruned: Workload, dense_s: float | None = None, level: float = 0.9
) -> tuple[SimpleNamespace, Any]:
    batch = WorkloadBatch.of([dense, *pruned])
    columns, inferred = compare(replace(batch, dense=0 * batch.dense), H100, level, dense_s)
    return SimpleNamespace(**columns), inferred


def width(c: SimpleNamespace, i: int) -> tuple[float, float, float]:
    """Log widths of the intervals of the dense time, of a pruned time and of their ratio."""
    ends = (
        (c.dense_lower, c.dense_upper),
        (c.pruned_lower, c.pruned_upper),
        (c.speedup_lower, c.speedup_upper),
    )
    dense, own, ratio = (float(np.log(upper[i] / lower[i])) for lower, upper in ends)
    return dense, own, ratio


CASES = [
    ("", "decode", 1),
    ("vllm", "decode", 64),
    ("vllm", "prefill", 1),
    ("hf", "decode", 1),
    ("hf", "prefill", 4),
]
CASES += [("sglang", "serve", 32), ("vllm", "generate", 2), ("reference", "prefill", 2)]


@pytest.mark.quick
@pytest.mark.parametrize(("engine", "phase", "batch"), CASES)
def test_a_higher_level_is_wider_around_the_same_numbers(
    engine: str, phase: str, batch: int
) -> None:
    dense = lowered(engine, phase, batch)
    pruned = [prune(dense, family, 0.4) for family in ("depth", "width", "low_rank")]
    for dense_s in (None, 1.1 * workload_time(dense, H100).total_s):
        found = [
            compared(dense, *pruned, dense_s=dense_s, level=level)[0] for level in (0.5, 0.9, 0.99)
        ]
        for i in (1, 2, 3):
            widths = np.array([width(c, i) for c in found])
            assert (np.diff(widths[:, :2], axis=0) > 0.0).all()
            # a ratio may be 1 for sure: the host sets the pace of both
            assert (np.diff(widths[:, 2]) >= 0.0).all()
        for c in found:
            if dense_s is None:
                np.testing.assert_array_equal(c.pruned_s, found[0].pruned_s)
            assert (c.pruned_lower < c.pruned_s).all()
            assert (c.pruned_s < c.pruned_upper).all()
    kernels = lowered("")  # where there is no host, widths go as those of a normal distribution
    p = forward_passes(WorkloadBatch.of([kernels]), H100)
    at = [np.log(np.divide(*intervals(p, level)[::-1]))[0] for level in (0.5, 0.9)]
    assert at[0] / at[1] == pytest.approx(level_scale(0.5), rel=1e-9)


@pytest.mark.quick
@pytest.mark.parametrize("engine", ["", *list_engines()])
@pytest.mark.parametrize("phase", ["prefill", "decode", "generate", "serve"])
def test_the_ratio_of_a_workload_to_itself_is_one_for_sure(engine: str, phase: str) -> None:
    dense = lowered(engine, phase, batch=3)
    for dense_s in (None, 2e-2):
        c, _ = compared(dense, dense, dense_s=dense_s)
        assert c.speedup.tolist() == [1.0, 1.0]
        assert np.concatenate([c.speedup_lower, c.speedup_upper]) == pytest.approx(
            np.ones(4), abs=1e-9
        )


@pytest.mark.quick
def test_what_an_engine_says_of_whole_passes_widens_ratios(tmp_path: Path) -> None:
    text = (
        resources.files("simulator.engines").joinpath("reference.yaml").read_text(encoding="utf-8")
    )

    def square(family: str, **values: float) -> float:
        """Variance of the logarithm of a speedup, from its interval."""
        path = tmp_path / f"{'-'.join(values) or 'as_it_is'}.yaml"
        path.write_text(
            text + "".join(f"{name}: {{value: {x}, source: paper}}\n" for name, x in values.items())
        )
        dense = lowered(str(path), "prefill", dtype="fp16")
        c, _ = compared(dense, prune(dense, family, 0.5))
        assert (c.speedup_lower[0], c.speedup_upper[0]) == (1.0, 1.0)  # a pass beside itself
        return float(np.log(c.speedup_upper[1] / c.speedup_lower[1]) / 2.0 / COVERAGE_FACTOR) ** 2

    families = ("unstructured", "depth", "width", "dynamic_depth")
    usual = {family: square(family) for family in families}
    assert usual["unstructured"] == 0.0  # the same kernels
    for family, before in usual.items():
        repeated = REPEATED_LOG_SD**2 if before else 0.0
        wider = before - repeated + 2 * 0.02**2
        assert square(family, apart_log_sd=0.02) == pytest.approx(wider, rel=1e-9)
        assert before >= repeated  # also of depth, whose errors cancel
    put_together = {
        family: square(family, composed_log_sd=0.1) - usual[family] for family in families
    }
    assert [family for family, more in put_together.items() if more > 1e-9] == ["dynamic_depth"]


@pytest.mark.quick
@pytest.mark.parametrize(("engine", "phase", "batch"), CASES)
@pytest.mark.parametrize("factor", [0.9, 0.97, 1.0, 1.1, 1.2])
def test_a_measured_time_is_taken_over_and_narrows_intervals(
    engine: str, phase: str, batch: int, factor: float
) -> None:
    dense = lowered(engine, phase, batch)
    pruned = [
        prune(dense, family, 0.5) for family in general_families() if family != "semi_structured"
    ]
    before, none = compared(dense, *pruned)
    assert none is None
    dense_s = factor * float(before.dense_s[0])
    after, inferred = compared(dense, *pruned, dense_s=dense_s)
    assert inferred.consistent == (inferred.deviation <= CONSISTENT_SD)
    if not inferred.consistent:
        assert factor > 1.15
        return
    assert after.dense_s[0] == pytest.approx(dense_s, rel=0.02)
    assert after.dense_lower[0] <= dense_s <= after.dense_upper[0]
    for i in range(1, 1 + len(pruned)):
        assert width(after, i)[0] < 0.5 * width(before, i)[0]
        assert width(after, i)[1] < width(before, i)[1]
        # the pruned time moves in the direction of the dense time and not farther: it has no more
        # slow kernels, unless pruning adds kernels, which wait for launch and host more than those
        # of the dense model do
        moved = after.pruned_s[i] - before.pruned_s[i]
        share = 1.15 if pruned[i - 1].overhead.any() else 1.05
        most = (
            share * max(1.0, before.pruned_s[i] / before.dense_s[0]) * (dense_s - before.dense_s[0])
        )
        # the median of a host time of wide spread is not that of its posterior
        slack = 0.01 * before.dense_s[0]
        assert min(most, 0.0) - slack <= moved <= max(most, 0.0) + slack
    assert inferred.predicted_s == pytest.approx(before.dense_s[0], rel=1e-9)
    assert (inferred.deviation < 0.1) == (factor == 1.0)


def test_a_time_that_no_host_and_no_kernel_explains_is_ignored() -> None:
    dense = lowered("vllm", "prefill", batch=4, seq=2048)
    plain = workload_time(dense, H100)
    for factor in (0.2, 5.0):
        c, inferred = compared(dense, dense_s=factor * plain.total_s)
        assert inferred.deviation > CONSISTENT_SD
        assert not inferred.consistent
        unmoved, _ = compared(dense)
        for name in ("dense_s", "dense_lower", "dense_upper"):
            assert getattr(c, name).tolist() == getattr(unmoved, name).tolist()


@pytest.mark.quick
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_slow_host_explains_a_long_step(engine: str) -> None:
    dense = lowered(engine, "decode", batch=1)
    pruned = prune(dense, "depth", 0.25)
    usual, _ = compared(dense, pruned)
    c, inferred = compared(dense, pruned, dense_s=0.03)
    assert inferred.consistent
    assert inferred.host_bound
    assert 10.0 < inferred.host < 200.0
    assert c.dense_lower[0] < 0.03 < c.dense_upper[0]
    # the scheduler does not run faster for fewer layers: the same seconds are gained
    gained = c.dense_s[1] - c.pruned_s[1]
    assert gained == pytest.approx(usual.dense_s[1] - usual.pruned_s[1], rel=0.1)
    assert c.speedup_lower[1] < 1.0 < c.speedup[1] < 1.1
    # no host is 300 times slower than the typical one
    assert not compared(dense, pruned, dense_s=0.3)[1].consistent


@pytest.mark.quick
@pytest.mark.parametrize("engine", ["", "vllm", "hf", "reference"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("sparsity", [0.25, 0.5])
def test_depth_stays_near_what_it_promises_when_a_time_is_measured(
    engine: str, phase: str, sparsity: float
) -> None:
    dense = lowered(engine, phase)
    pruned = prune(dense, "depth", sparsity)
    plain, _ = compared(dense, pruned)
    for factor in (0.9, 1.0, 1.1):
        c, _ = compared(dense, pruned, dense_s=factor * float(plain.dense_s[0]))
        assert 1.0 + 0.65 * (1 / (1 - sparsity) - 1.0) < c.speedup[1] < 1.02 / (1 - sparsity)
        assert width(c, 1)[2] < {"hf": 0.45, "vllm": 0.2}.get(engine, 0.12)


# -- planted ---------------------------------------------------------------------------------------

ENGINE = """\
schema_version: 1
name: planted
title: "planted"
stacks: [vllm]
sources: {here: "this test"}
graph: [GRAPH]
host:
  pass: {value: PASS ms, log_sd: 0.43, source: here}
  correlation: {value: CORRELATION, source: here}
log_sd: {value: 0.05, source: here}
"""


def two_operators(engine: str, m: int, count: float, wide: int) -> Workload:
    """A GEMM of the layers, and a head that no pruning changes."""
    layer = {
        "role": "up",
        "part": Part.MLP,
        "phase": Phase.DECODE,
        "layer": 0,
        "layers": 32,
        "count": count,
    }
    head = {
        "role": "lm_head",
        "part": Part.HEAD,
        "phase": Phase.DECODE,
        "m": m,
        "n": 32000,
        "k": 4096,
    }
    start = {
        "kind": Kind.ELEMENTWISE,
        "role": "embedding",
        "part": Part.EMBEDDING,
        "phase": Phase.DECODE,
        "m": m,
    }
    rows = [start, layer | {"m": m, "n": wide, "k": 4096}, head]
    return Workload.from_rows(rows, Lowered(phase="decode", batch=m, engine=engine))


def of_rows(p: PredictedPass) -> Uncertainty:
    """Errors of the time of each row of a pass; rows of one shape have one."""
    return in_order(p.errors, len(p.workloads.shapes[0])).take(p.workloads.shapes[1])


@pytest.mark.parametrize(
    ("graph", "pass_ms", "m", "wide", "alike", "most"),
    [
        ("decode", 0.6, 16, 8192, 1, 0.97),  # a scheduler beside kernels under a graph
        ("decode", 0.0001, 512, 8192, 1, 0.97),  # kernels alone
        # launches set the pace, or did: wider than need be where either explains a total
        ("", 0.05, 1, 1024, 1, 1.0),
        ("", 0.3, 1, 8192, 1, 0.97),  # either may
        ("", 0.2, 64, 14336, 1, 0.97),  # the device sets it
        ("", 0.6, 1, 1024, 0.3, 1.0),  # launches and passes, whose sum a measured time determines
        ("", 0.6, 1, 1024, 0, 1.0),
    ],
    ids=["scheduler", "kernels", "launches", "either", "device", "split", "independent"],
)
def test_intervals_cover_planted_hosts_and_kernels(
    tmp_path: Path, graph: str, pass_ms: float, m: int, wide: int, alike: float, most: float
) -> None:
    """Hosts and errors of kernels are drawn from the prior and conditioned on a noisy total;
    intervals contain the truth."""
    path = tmp_path / "planted.yaml"
    text = ENGINE.replace("GRAPH", graph).replace("PASS", str(pass_ms))
    path.write_text(text.replace("CORRELATION", str(alike)))
    dense = two_operators(str(path), m, 32, wide)
    others = two_operators(str(path), m, 16, wide), two_operators(str(path), m, 32, wide // 2)
    batch = batch_with(dense, others)
    p = forward_passes(batch, H100)
    uncertainty, rng, groups = of_rows(p), np.random.default_rng(7), p.workloads.groups
    columns = uncertainty.systematic[uncertainty.systematic.any(axis=1)]
    # the fourth is the narrower layer; depth has the shapes of dense
    shape = np.array([0, 1, 2, 0, 1, 2, 0, 3, 2])
    similar = correlation(uncertainty.coordinates, uncertainty.coordinates)
    root = np.linalg.cholesky(
        similar * np.outer(uncertainty.correlated, uncertainty.correlated) + 1e-12 * np.eye(9)
    )
    rows = np.flatnonzero(np.isin(np.arange(9) % 3, (1, 2)))  # the embedding moves nothing
    again = np.random.default_rng(8)  # measures a speedup
    inside = []
    for _ in range(160):
        systematic, correlated, own, apart = rng.normal(size=(4, max(9, len(columns))))
        error = columns.T @ systematic[: len(columns)] + root @ correlated[:9]
        error = error + np.sqrt(uncertainty.independent) * own[shape]
        error = error + np.sqrt(2.0 * (1.0 - SAME_SHAPE) * uncertainty.variance) * apart[:9] * (
            np.arange(9) == 4
        )
        device = p.group_s + groups.sums(
            np.where(np.isin(np.arange(9), rows), p.row_s * np.expm1(error), 0.0)
        )
        z, whole, other_mix, split = rng.normal(size=4)
        work, passes = p.host.speeds(z, split)
        total = p.host.total(device, groups.segment, work, passes)[0].sum(axis=1)
        mixed = MIXED_LOG_SD / 0.43 * other_mix  # the host of fewer launches
        total[1] = p.host.total(device, groups.segment, work + mixed, passes + mixed)[0].sum(
            axis=1
        )[1]
        total = total * np.exp(p.engine.log_sd.value * whole)
        c = SimpleNamespace(
            **compare(batch, H100, dense_s=total[0] * np.exp(MEASURED_LOG_SD * rng.normal()))[0]
        )
        ratio = total[0] / total * np.exp(REPEATED_LOG_SD * again.normal(size=3))
        seen = (c.dense_lower <= total[0]) & (total[0] <= c.dense_upper)
        own_seen = (c.pruned_lower <= total) & (total <= c.pruned_upper)
        both = (c.speedup_lower <= ratio) & (ratio <= c.speedup_upper)
        inside.append([seen[0], *own_seen[1:], *both[1:]])
    share = dict(
        zip(
            ("dense", "depth", "width", "depth ratio", "width ratio"),
            np.mean(inside, axis=0),
            strict=True,
        )
    )
    assert all(0.85 <= value <= most for value in share.values()), share


def test_unconditioned_intervals_cover_planted_hosts(tmp_path: Path) -> None:
    path = tmp_path / "planted.yaml"
    path.write_text(
        ENGINE.replace("GRAPH", "").replace("PASS", "0.3").replace("CORRELATION", "0.3")
    )
    p = forward_passes(WorkloadBatch.of([two_operators(str(path), 1, 32, 4096)]), H100)
    (lower,), (upper,) = intervals(p, 0.9)
    rng = np.random.default_rng(3)
    variance = p.uncertainty.variance()[0]
    seen = []
    for _ in range(2000):
        device = p.group_s * np.exp(np.sqrt(variance) * rng.normal())
        seen.append(
            p.host.total(device, p.workloads.groups.segment, *p.host.speeds(*rng.normal(size=2)))[
                0
            ].sum()
        )
    assert 0.85 <= np.mean((lower <= np.array(seen)) & (np.array(seen) <= upper)) <= 0.97
    assert workload_time(p.workloads.rows, H100).total_lower_s == pytest.approx(lower)
