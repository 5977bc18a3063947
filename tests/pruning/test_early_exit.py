"""Early exit: tokens, or all of them, leave after some layer; counted by hand from the shapes of a small decoder."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_decoder import GQA, workload

import simulator
from simulator.pruning import prune
from simulator.pruning._methods import METHODS
from simulator.workload import Workload

pytestmark = pytest.mark.quick

LEFT = [0.0, 0.0, 0.0, 0.5, 0.5, 0.5]
"""Half of the tokens exit after three of six layers."""
OPTIONS = {"unit": "layer", "router": 1, "kernel": "gathered"}


def total(w: Workload, role: str, column: str = "count") -> float:
    rows = w.is_role(role) & (w.layer >= 0)
    return float((getattr(w, column) * (1.0 if column == "count" else w.count))[rows].sum())


def test_half_of_the_tokens_exit_and_all_leave_keys_and_values() -> None:
    w = workload(GQA, "decode", 1, 48)
    pruned = prune(w, "dynamic_depth", LEFT, **OPTIONS)
    # 64 features, 8 heads of 16, inner width 176, 49 cached positions
    skipped = 2 * 64 * 128 * 2 + 2 * 3 * 64 * 176 + 2 * 8 * 2 * 16 * 49
    classifiers = 3 * 2 * 64  # one before each layer that some tokens skip
    assert w.flops.sum() - pruned.flops.sum() == pytest.approx(3 * 0.5 * skipped - classifiers)
    for role in ("k", "v"):
        assert total(pruned, role) == total(w, role) == 6
    for role in ("q", "o", "attention", "gate", "up", "down", "mlp_norm"):
        assert total(pruned, role) == pytest.approx(3 + 3 * 0.5)
    assert total(pruned, "router") == 3
    assert pruned.meta.applied[0].sparsity == pruned.meta.applied[0].realised == 0.25


def test_tokens_are_copied_once_per_layer_or_once_per_sublayer() -> None:
    w = workload(GQA, "decode", 2)
    each = 1 * (2 * 64 * 2 + 4)  # one of two tokens on average: 64 features read and written, and an index
    for unit, times in (("layer", 3), ("sublayer", 6)):
        pruned = prune(w, "dynamic_depth", LEFT, **{**OPTIONS, "unit": unit})
        for role in ("gather", "scatter"):
            moved = total(pruned, role, "read_bytes") + total(pruned, role, "write_bytes")
            assert moved == pytest.approx(times * each)
        assert total(pruned, "router") == times
    masked = prune(w, "dynamic_depth", LEFT, unit="layer")
    assert (total(masked, "select"), total(masked, "sort")) == (2 * 3, 2 * 3)


def test_layers_without_attention_still_have_one_router() -> None:
    """Llama-3.3-Nemotron-Super-49B: 31 of its 80 layers have no attention, one has neither."""
    model = simulator.load_model("nemotron-super-49b")
    w = simulator.lower(model, phase="decode", batch=4, seq=64, engine="")
    pruned = prune(w, "dynamic_depth", 0.5, **OPTIONS)
    has = np.zeros(model.layers, dtype=bool)
    for first, many in zip(w.layer[w.layer >= 0], w.layers[w.layer >= 0]):
        has[first : first + many] = True
    assert total(pruned, "router") == has.sum() < total(prune(w, "dynamic_depth", 0.5, kernel="gathered"), "router")
    gathered, scattered = (total(pruned, role, "write_bytes") for role in ("gather", "scatter"))
    assert gathered == pytest.approx(scattered)


def test_calm_lets_equal_shares_exit_after_every_layer() -> None:
    model = simulator.load_model("llama-2-7b")
    w = simulator.lower(model, phase="decode", batch=1, seq=2048, engine="")
    pruned = METHODS["calm"].prune(w, 0.67)
    rows = np.flatnonzero(pruned.is_role("down"))
    computed = pruned.count[rows][np.argsort(pruned.layer[rows])]  # at batch 1, the share of steps with the layer
    assert len(computed) == 32
    assert computed[0] == 1.0
    assert computed.mean() == pytest.approx(0.33)
    assert computed[1:] / computed[:-1] == pytest.approx(np.full(31, computed[1]))
    assert (total(pruned, "k"), total(pruned, "router")) == (32, 31)


def test_layerskip_keeps_the_first_layers_with_their_windows() -> None:
    w = simulator.lower(simulator.load_model("gemma-2-9b"), phase="decode", batch=1, seq=8192, engine="")
    first = w.expand()
    first = first.take(first.is_attention & (first.layer < 21))
    exited = METHODS["layerskip"].prune(w, 0.5).expand()
    exited = exited.take(exited.is_attention)
    assert exited.window.tolist() == first.window.tolist()
    assert exited.layer.tolist() == list(range(21))
    deepest_but_one = prune(w, "depth", 0.5).expand()
    assert deepest_but_one.window[deepest_but_one.is_attention].tolist() != first.window.tolist()
