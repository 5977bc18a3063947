"""A budget in tokens: the sparsity follows from the length; pairs and positions are counted by
hand."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_decoder import GQA, workload

import simulator
from simulator.codes import Kind
from simulator.errors import InputError
from simulator.prediction.explain import explanations
from simulator.prediction.sweep import Grid
from simulator.prediction.table import table
from simulator.pruning import prune
from simulator.workload import Workload

pytestmark = pytest.mark.quick


def density(w: Workload, kind: Kind) -> list[float]:
    found: list[float] = w.density[w.kind == kind].tolist()
    return found


def lengths(w: Workload) -> list[int]:
    found: list[int] = w.kv_len[w.kind == Kind.DECODE_ATTENTION].tolist()
    return found


def test_a_query_sees_at_most_the_budget() -> None:
    """A prompt of 8 positions has 36 pairs; a budget of 3 leaves 1 + 2 + 6 x 3 = 21. A step at 10
    positions sees 3."""
    w = workload(GQA, "generate", 2, 8, 2)
    pruned = prune(w, "sparse_attention", budget=3)
    assert density(pruned, Kind.PREFILL_ATTENTION) == pytest.approx([21 / 36])
    assert density(pruned, Kind.DECODE_ATTENTION) == pytest.approx([3 / 9, 3 / 10])
    realised = 1 - (21 + 3 + 3) / (36 + 9 + 10)
    assert (
        pruned.meta.applied[0].sparsity
        == pruned.meta.applied[0].realised
        == pytest.approx(realised)
    )
    rows = pruned.is_role("select") & (pruned.phase == 0)
    assert pruned.write_bytes[rows] == pytest.approx(pruned.read_bytes[rows] * 21 / 36)
    assert density(prune(w, "sparse_attention", budget=8), Kind.PREFILL_ATTENTION) == [1]


def test_a_sliding_window_within_the_budget_does_not_change() -> None:
    w = simulator.lower(
        simulator.load_model("gemma-2-9b"), phase="prefill", batch=1, seq=16384, engine=""
    )
    pruned = prune(w, "sparse_attention", budget=4096, ideal=True)
    windowed = w.window[w.is_attention] == 4096
    assert windowed.any()
    assert (pruned.density[w.is_attention][windowed] == 1).all()
    pairs = 4096 * 4097 / 2 + (16384 - 4096) * 4096
    assert pruned.density[w.is_attention][~windowed] == pytest.approx(pairs / (16384 * 16385 / 2))


def test_a_rolling_cache_stops_growing() -> None:
    w = workload(GQA, "generate", 2, 48, 3)  # steps see 49, 50 and 51 positions
    assert lengths(prune(w, "kv_cache", budget=50, rolling=True)) == [49, 50, 50]
    assert lengths(prune(w, "kv_cache", budget=50)) == [49, 50, 51]
    pruned = prune(w, "kv_cache", budget=10, rolling=True, observed=0)
    assert lengths(pruned) == [10, 10, 10]
    assert not pruned.is_role("mask", "select").any()  # places, not scores, decide
    assert set(pruned.m[pruned.is_role("gather")]) == {2 * 4 * 10}
    assert lengths(prune(w, "kv_cache", 0.5, rolling=True)) == [24, 24, 24]


def test_each_length_has_its_own_sparsity() -> None:
    found = table(
        ["llama-2-7b"],
        ["h100"],
        method=["snapkv-1024"],
        phase=["decode"],
        seq=[512, 2048, 8192],
        batch=[1, 8],
    )
    rows = [(r.seq, r.sparsity, r.realised_sparsity) for r in found if r.batch == 8]
    assert rows == [(512, 0, 0), (2048, 0.5, 0.5), (8192, 0.875, 0.875)]
    assert [r.speedup for r in found if r.seq == 512] == [1, 1]
    alone = table(
        ["llama-2-7b"],
        ["h100"],
        ["kv_cache"],
        phase=["decode"],
        seq=[8192],
        options={"budget": 1024},
    )
    (same,) = (r for r in found if (r.seq, r.batch) == (8192, 1))
    assert (alone[0].sparsity, alone[0].speedup) == (0.875, same.speedup)
    several = table(
        "llama-2-7b",
        "h100",
        "sparse_attention",
        phase="prefill",
        seq=[1024, 4096],
        options={"budget": 2048},
    )
    assert [r.sparsity for r in several] == [0, pytest.approx(0.25, abs=1e-3)]
    (e,) = explanations("llama-2-7b", ["h100"], seq=8192, method="snapkv-1024")
    assert np.prod([step.factor for step in e.steps]) == pytest.approx(e.result.speedup)
    assert e.result.sparsity == 0.875


def test_a_sparsity_beside_a_budget_is_rejected() -> None:
    for given in (
        {"method": ["quest", "snapkv-1024"]},
        {"family": ["kv_cache"], "options": {"budget": 1024}},
    ):
        with pytest.raises(
            InputError, match=r"expected none for .*: it follows from the length and the budget"
        ):
            table(["llama-2-7b"], ["h100"], sparsity=[0.5], phase=["decode"], **given)  # type: ignore[arg-type]
    grid = Grid(
        ("llama-2-7b",),
        ("h100",),
        (0.25, 0.5),
        ("decode",),
        (1,),
        (128,),
        methods=("snapkv-1024", "h2o"),
    )
    # once, without a sparsity
    assert [p.prune for p in grid.prunings] == ["snapkv-1024", "h2o 0.25", "h2o 0.5"]
    found = table(
        ["llama-2-7b"], ["h100"], method=["minference-7096", "snapkv-1024"], phase=["decode"]
    )
    assert found.notes[0] == "minference-7096: expected --phase prefill, got decode: excluded"
