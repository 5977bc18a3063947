"""Published methods: each changes shapes as its paper states, and refuses other sparsities and
phases."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import simulator
from simulator.errors import InputError
from simulator.pruning import FAMILIES
from simulator.pruning._methods import METHODS
from simulator.workload import Workload

pytestmark = pytest.mark.quick


def dense(model: str = "llama-2-7b", phase: str = "decode", seq: int = 2048) -> Workload:
    return simulator.lower(simulator.load_model(model), phase=phase, batch=1, seq=seq)


def of_layer(w: Workload, layer: int, *roles: str) -> Workload:
    return w.take(
        np.flatnonzero((w.layer <= layer) & (w.layer + w.layers > layer) & w.is_role(*roles))
    )


def layers_with(w: Workload, role: str) -> int:
    return int(w.layers[w.is_role(role) & (w.layer >= 0)].sum())


def request(name: str, seq: int = 2048) -> Workload:
    """Return a dense request of a model and phase that the method prunes."""
    m = METHODS[name]
    # 2 of 8 experts per token
    routed = "qwen3-30b-a3b" if max(m.sparsities, default=0.0) > 0.5 else "mixtral-8x7b"
    model = simulator.load_model(routed if m.family == "experts" else "llama-2-7b")
    if m.family == "kv_cache":
        return simulator.lower(model, phase="generate", batch=1, seq=seq, new_tokens=2)
    return simulator.lower(
        model, phase="prefill" if "prefill" in m.phases else "decode", batch=1, seq=seq
    )


@pytest.mark.parametrize("name", METHODS)
def test_every_method_names_families_options_and_paper(name: str) -> None:
    m = METHODS[name]
    families = m.family.split("+")
    assert set(families) <= FAMILIES.keys()
    assert m.options.keys() <= {
        option for family in families for option in FAMILIES[family].options
    }
    assert re.fullmatch(r"\d{4}\.\d{5}", m.arxiv)
    assert bool(m.sparsities) == (m.budget is None)


@pytest.mark.parametrize(
    "name", [name for name, method in METHODS.items() if method.budget is None]
)
def test_every_method_removes_what_is_asked_of_the_whole_model(name: str) -> None:
    m, whole = METHODS[name], request(name)
    families = m.family.split("+")
    assert m.prune(whole, 0.0).flops.sum() == whole.flops.sum()
    for sparsity in m.sparsities:
        steps = m.prune(whole, sparsity).meta.applied
        assert [step.family for step in steps] == families
        asked, realised = (
            1.0 - np.prod([1.0 - getattr(s, key) for s in steps])
            for key in ("sparsity", "realised")
        )
        assert asked == pytest.approx(sparsity, abs=1e-9)
        assert realised == pytest.approx(sparsity, abs=0.02)


@pytest.mark.parametrize(
    "name", [name for name, method in METHODS.items() if method.budget is not None]
)
def test_a_budget_sets_the_sparsity_of_each_length(name: str) -> None:
    m = METHODS[name]
    assert m.budget is not None
    found = []
    for seq in (m.budget // 2, 2 * m.budget, 8 * m.budget):
        whole = request(name, seq)
        (step,) = m.prune(whole).meta.applied
        assert step.sparsity == step.realised
        found.append(step.realised)
        assert (m.prune(whole).bytes.sum() == whole.bytes.sum()) == (seq < m.budget)
    # pairs are a triangle
    share = {"kv_cache": [0, 1 / 2, 7 / 8]}.get(m.family, [0, 1 / 4, (7 / 8) ** 2])
    assert found == pytest.approx(share, abs=1e-3)
    with pytest.raises(
        InputError, match=f"{name}: expected no sparsity, as it keeps {m.budget:,} tokens; got 0.5"
    ):
        m.prune(whole, 0.5)


def test_llm_pruner_leaves_the_outer_layers_and_has_the_papers_parameters() -> None:
    """Its recipe for 20 %: a quarter of the heads and channels of layers 4 to 29, LLaMA-7B to 5.4
    B."""
    whole = dense("llama-7b")
    pruned = METHODS["llm-pruner"].prune(whole, 0.2)
    for layer in range(32):
        (before,), (after,) = (of_layer(w, layer, "down").k for w in (whole, pruned))
        (heads,) = of_layer(pruned, layer, "attention").heads
        outer = layer < 4 or layer >= 30
        assert (after == before) == outer
        assert heads == (32 if outer else 24)
    assert pruned.parameters == pytest.approx(5.42e9, rel=0.006)


def test_depth_methods_remove_whole_layers_or_attention_alone() -> None:
    short = METHODS["shortgpt"].prune(dense(), 0.27)
    # Llama-2-7B loses 9 of 32
    assert [layers_with(short, role) for role in ("attention", "o", "down")] == [23] * 3
    attention = METHODS["attention-drop"].prune(dense(), 0.5)
    assert [layers_with(attention, role) for role in ("attention", "o", "down")] == [16, 16, 32]


def test_widths_across_layers_come_near_published_models() -> None:
    """Sheared-LLaMA-2.7B: hidden 2560, 20 heads, inner 6912. Llama-3.1-Minitron-4B-Width: all
    heads, 4.5 B."""
    sheared = METHODS["sheared-llama"].prune(dense(), 0.61)
    down, attention = (of_layer(sheared, 7, role) for role in ("down", "attention"))
    assert (down.n[0], attention.heads[0]) == (2560, 20)
    assert down.k[0] == pytest.approx(6912, rel=0.01)
    assert sheared.parameters == pytest.approx(2.7e9, rel=0.02)
    whole = dense("llama-3.1-8b")
    minitron = METHODS["minitron-width"].prune(whole, 0.47)
    before, after = (of_layer(w, 3, "down") for w in (whole, minitron))
    assert after.n[0] / before.n[0] == pytest.approx(after.k[0] / before.k[0], abs=0.005)
    assert set(of_layer(minitron, 3, "attention").heads) == {32}
    assert set(of_layer(minitron, 3, "attention").kv_heads) == {8}
    assert minitron.parameters == pytest.approx(4.5e9, rel=0.03)
    routed = METHODS["minitron-width"].prune(dense("mixtral-8x7b"), 0.5).meta.applied
    assert 1.0 - np.prod([1.0 - step.realised for step in routed]) == pytest.approx(0.5, abs=0.01)


def test_pyramiddrop_halves_the_tokens_after_each_quarter() -> None:
    w = METHODS["pyramiddrop"].prune(dense(phase="prefill"), 0.53125)
    assert [set(of_layer(w, i, "down").m) for i in (0, 8, 16, 31)] == [{2048}, {1024}, {512}, {256}]


@pytest.mark.parametrize(
    ("method", "sparsity", "phase", "reason"),
    [
        (
            "llm-pruner",
            0.82,
            "decode",
            r"0.82: s \* layers / \(layers - 6\) 1.00923: expected a fraction",
        ),
        ("pyramiddrop", 0.8, "prefill", "expected less than 0.75, as the first layers keep all"),
        ("minference", 0.9, "decode", "minference: expected --phase prefill, got decode"),
        ("wanda-2:4", 0.25, "decode", "as 2:4 removes half"),
        ("flap", {"mlp": 0.2}, "decode", "expected a fraction"),
        ("flap", None, "decode", "expected a fraction"),
        (
            "calm",
            0.98,
            "decode",
            "expected less than 0.969, as the first layers keep all",
        ),
    ],
)
def test_refusals(method: str, sparsity: Any, phase: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        METHODS[method].prune(dense(phase=phase), sparsity)
