"""The interface of prune: choices of sparsity, records of applied steps, and one line per invalid
argument."""

from __future__ import annotations

import numpy as np
import pytest
from tables import tables_of
from tiny_decoder import FUSED, GQA, MHA, workload

from simulator.codes import PHASES, ROLES
from simulator.errors import InputError
from simulator.pruning import FAMILIES, prune
from simulator.request import Applied

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("phase", PHASES)
def test_zero_is_the_identity(family: str, phase: str) -> None:
    w = workload(GQA, phase)
    zeros = [0, 0.0, np.float64(0)] + [[0.0] * 6] * (FAMILIES[family].layers == "each")
    for zero in zeros + [{"mlp": 0.0}] * bool(FAMILIES[family].targets):
        pruned = prune(w, family, zero)
        assert pruned.meta.applied == (Applied(family, 0.0, 0.0),)
        assert pruned.replace(meta=w.meta) == w


def test_what_was_applied_is_recorded() -> None:
    w = workload(GQA)
    pruned = prune(prune(w, "depth", 0.3), "width", 0.5)
    first, second = pruned.meta.applied
    assert (first.family, first.sparsity, first.realised) == ("depth", 0.3, pytest.approx(2 / 6))
    dense = 128 * 64 * 2 + 2 * 64 * 64 + 3 * 176 * 64
    thin = 64 * 64 * 2 + 2 * 32 * 64 + 3 * 96 * 64
    assert (second.family, second.sparsity, second.realised) == (
        "width",
        0.5,
        pytest.approx(1 - thin / dense),
    )
    assert w.meta.applied == ()


def test_layers_differ_and_runs_merge() -> None:
    w = workload(GQA)
    pruned = prune(w, "width", [0.0, 0.0, 0.5, 0.5, 0.5, 0.75])
    rows = pruned.is_role("q")
    assert pruned.n[rows].tolist() == [128, 64, 32]
    assert pruned.layer[rows].tolist() == [0, 2, 5]
    assert pruned.layers[rows].tolist() == pruned.count[rows].tolist() == [2, 3, 1]
    assert pruned.meta.applied[-1].sparsity == pytest.approx(2.25 / 6)
    again = prune(pruned, "width", 0.5)
    assert again.n[again.is_role("q")].tolist() == [64, 32, 32]
    assert set(again.kv_heads[again.is_role("attention")]) == {2, 1}
    cache = prune(workload(GQA, "decode", 2, 100), "kv_cache", [0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert cache.kv_len[cache.is_role("attention")].tolist() == [101, 91, 81, 71, 61, 51]
    tokens = prune(w, "token", [0, 0, 0.25, 0.25, 0.5, 0.5])
    assert tokens.m[tokens.is_role("q")].tolist() == [96, 72, 48]
    assert tokens.is_role("select").sum() == 2
    half = prune(w, "semi_structured", [0, 0.5, 0.5, 0, 0, 0])
    assert half.density[half.is_role("down")].tolist() == [1, 0.5, 1]
    assert half.meta.applied[0].realised == pytest.approx(1 / 6)


def test_groups_mean_their_members_in_every_engine() -> None:
    for decoder in (GQA, FUSED):
        pruned = prune(workload(decoder), "unstructured", {"qkv": 0.5, "gate_up": 0.25})
        apart = {"q": 0.5, "k": 0.5, "v": 0.5, "gate": 0.25, "up": 0.25}
        assert pruned.meta.config == prune(workload(GQA), "unstructured", apart).meta.config
    # an engine fuses projections that are stored alike
    alone = prune(workload(FUSED), "semi_structured", {"q": 0.5})
    inputs = alone.is_role("q", "k", "v", "qkv")
    assert [ROLES[role] for role in alone.role[inputs]] == ["q", "k", "v"]
    assert alone.density[inputs].tolist() == [0.5, 1.0, 1.0]
    with pytest.raises(InputError, match="sparsity of gate: this model has no such projection"):
        prune(workload(MHA), "unstructured", {"gate": 0.5})


def test_a_mapping_is_weighed_by_parameters() -> None:
    w = workload(GQA)
    applied = prune(w, "unstructured", {"mlp": 0.5, "q": 0.25}).meta.applied[0]
    total = 128 * 64 * 2 + 2 * 64 * 64 + 3 * 176 * 64
    assert (
        applied.sparsity
        == applied.realised
        == pytest.approx((0.5 * 3 * 176 * 64 + 0.25 * 128 * 64) / total)
    )
    depth = prune(w, "depth", {"attention": 0.5})
    # the last layer keeps its attention
    assert depth.count[depth.is_role("o")].tolist() == [2, 1]
    assert depth.count[depth.is_role("down")].sum() == 6


@pytest.mark.parametrize(
    ("family", "sparsity", "options", "message"), tables_of("pruning/mistakes.yaml")["arguments"]
)
def test_bad_input_is_one_clear_line(
    family: str, sparsity: object, options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        prune(workload(GQA), family, sparsity, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
