"""Early exit: tokens, or all of them, leave after some layer; counted by hand from the shapes of a small decoder."""

from __future__ import annotations

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
