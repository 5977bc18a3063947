"""Times by operator: parts add up, and causes are named."""

from __future__ import annotations

import math
from typing import Any

import pytest
from tables import tables_of

from simulator.prediction.by_operator import OperatorSpeedup, by_operator
from simulator.prediction.explain import Explanation, explanations

CASES = tables_of("prediction/cases.yaml")["operators"]


def explained(model: str, device: str = "a100", **settings: Any) -> Explanation:
    (found,) = explanations(model, [device], **settings)
    return found


def operators(*case: Any, **settings: Any) -> dict[str, OperatorSpeedup]:
    return {one.name: one for one in by_operator(explained(*case, **settings))}


@pytest.mark.parametrize(("model", "settings"), CASES)
def test_the_times_of_operators_add_up(model: str, settings: dict[str, Any]) -> None:
    e = explained(model, **settings)
    found = by_operator(e)
    assert math.fsum(one.dense_s for one in found) == pytest.approx(e.result.dense_s)
    assert math.fsum(one.pruned_s for one in found) == pytest.approx(e.result.pruned_s)
    assert len({one.name for one in found}) == len(found)


def test_the_operators_of_a_model_with_experts_on_two_devices() -> None:
    found = operators("qwen3-30b-a3b", prune=["experts 0.5"], devices=2, batch=8)
    assert {"qkv", "attention", "o", "experts", "head", "collectives", "host"} <= found.keys()
    assert found["attention"].cause == found["head"].cause == "not pruned"
    assert found["experts"].dense_s / found["experts"].pruned_s < found["experts"].bound


def test_22_heads_fill_an_a100_worse_than_32_at_batch_16_alone() -> None:
    gains = {}
    for batch in (8, 16, 32):
        one = operators("llama-2-7b", prune=["width 0.3"], batch=batch)["attention"]
        gains[batch] = one.dense_s / one.pruned_s / one.bound
        if batch == 16:
            assert one.cause == "fills 81.5 % of 4 waves (dense: 94.8 % of 5 waves)"
    assert gains[16] < 0.92 < gains[32] < gains[8]


def test_misaligned_widths_are_named() -> None:
    found = operators("llama-3.1-8b", prune=["width mlp=9211"], phase="prefill", engine="trtllm")
    assert "multiples of 8" in found["MLP"].cause


def test_memory_and_not_waves_explains_an_operator_that_is_bound_by_memory() -> None:
    """Products of few tokens wait for their weights, however their tiles fill the SMs."""
    for batch in (1, 8):
        found = operators("llama-2-7b", prune=["width mlp=0.3"], batch=batch)
        for name in ("qkv", "o", "MLP", "head"):
            cause = found[name].cause
            assert cause in ("", "not pruned") or "memory" in cause
