"""Prices and plans are written in the keys and units of Puzzletron."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from simulator.plans.puzzletron import read_json
from simulator.plans.subblock_stats import (
    Price,
    Priced,
    PricedSublayer,
    SubblockRequest,
    solutions,
    stats_args,
    subblock_stats,
)

from simulator.errors import InputError
from simulator.models.block import Block
from simulator.models.huggingface import from_hf_config
from simulator.workload import DTYPES

pytestmark = pytest.mark.quick

MODEL = from_hf_config(
    {
        **{"model_type": "llama", "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 2},
        **{"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 100},
    }
)
DENSE = MODEL.usual
SETTING = SubblockRequest("h100_sxm", batch=8, seq=1024, new_tokens=128, weights="fp8", activations="fp8", cache="bf16")
ATTENTION = Price(0.25, 0.0625, 0.1875, 1000, 1000, 3 * 2.0**20, 2.0**20)
MLP = Price(0.5, 0.125, 0.375, 4000, 2000, 8 * 2.0**20)
OUTSIDE = Price(0.125, 0.0625, 0.0625, 153600, 76800, 0.5 * 2.0**20)
NOTHING = Price(0.0, 0.0, 0.0, 0, 0, 0.0)


def test_prices_are_in_milliseconds_and_mebibytes() -> None:
    none, linear = replace(DENSE, inner=0), Block(0, 0, 2048, linear=("attention",))
    sublayers = (
        PricedSublayer(0, "attention", DENSE, ATTENTION),
        PricedSublayer(0, "mlp", DENSE, MLP),
        PricedSublayer(
            0, "attention", replace(DENSE, inner=512), NOTHING
        ),  # the same attention again: the first counts
        PricedSublayer(1, "mlp", none, NOTHING),
        PricedSublayer(1, "attention", linear, ATTENTION),
    )
    (found,) = subblock_stats(MODEL, [Priced(SETTING, OUTSIDE, sublayers)])
    assert found["args"] == {
        **{"gpu": "h100_sxm", "batch_size": 8, "prefill_seq_len": 1024, "generation_seq_len": 128},
        **{"prefill_queue_size": 0, "n_embd": 768, "n_head": 8, "vocab_size": 100, "runtime_stats": True},
        **{"use_cuda_graph": True, "weights_dtype": "torch.float8_e4m3fn"},
        **{"activations_dtype": "torch.float8_e4m3fn", "kv_cache_dtype": "torch.bfloat16"},
    }
    times = {"runtime_ms": 125.0, "prefill_runtime_ms": 62.5, "decode_runtime_ms": 62.5}
    assert found["non_block"] == {**times, "memory_mib": 0.5, "num_params": 153600}
    first, second, third, fourth = found["subblocks"]
    assert first == {
        "subblock_config": {"no_op": False, "replace_with_linear": False, "num_key_value_heads": 4},
        **{"subblock_config_class": "AttentionConfig", "parent_layer_index": 0},
        **{"runtime_ms": 250.0, "prefill_runtime_ms": 62.5, "decode_runtime_ms": 187.5},
        **{"num_params": 1000, "active_params": 1000, "memory_mib": 3.0, "kv_cache_memory_mib": 1.0},
    }
    assert second["subblock_config"] == {"no_op": False, "replace_with_linear": False, "intermediate_size": 2048}
    assert (second["subblock_config_class"], second["active_params"]) == ("FFNConfig", 2000)
    assert (third["subblock_config"], third["parent_layer_index"]) == ({"no_op": True, "replace_with_linear": False}, 1)
    assert fourth["subblock_config"] == {"no_op": False, "replace_with_linear": True, "num_key_value_heads": 4}
    # the solver adds attention and MLP key by key
    assert len({frozenset(row) for row in found["subblocks"]}) == 1
    json.dumps(found, allow_nan=False)


def test_every_format_has_a_name() -> None:
    for name in DTYPES:
        assert stats_args(MODEL, replace(SETTING, cache=name))["kv_cache_dtype"]


def test_a_plan_is_read_back_with_its_files(tmp_path: Path) -> None:
    plan = [replace(DENSE, kv_heads=2, inner=0), DENSE]
    paths = {(0, plan[0]): ("/ckpts/own/block_0_attention.safetensors",)}
    costs = {"stats.runtime_ms": 512.0}
    content = solutions(MODEL, plan, "metrics.kl_div", 0.5, costs, SETTING, paths)
    (found,) = content
    assert found["total_value"] == {"metrics.kl_div": 0.5}
    assert found["total_costs"] == {"stats.runtime_ms": 512.0, "throughput": 1000 * 8 * 128 / 512}
    assert found["subblock_stats"] == stats_args(MODEL, SETTING)
    assert found["solution_repr"] == (
        "block_0:   attention  kv_heads_2  ffn  no_op \nblock_1:   attention  kv_heads_4  ffn  intermediate_2048\n"
    )
    first, second = found["chosen_replacements"]
    assert first["layer_replacement"]["weight_paths"] == ["/ckpts/own/block_0_attention.safetensors"]
    assert (first["is_teacher"], second["is_teacher"]) == (False, True)
    # its replacements are a library of one variant per layer
    rows = json.dumps(found["chosen_replacements"]).encode()
    assert [(e.layer, e.block) for e in read_json(rows, "own", MODEL)] == list(enumerate(plan))


def test_experts_and_linear_sublayers_have_words() -> None:
    routed = replace(MODEL, inner=0, experts=8, active=2.0, expert_inner=512)
    plan = [replace(routed.usual, experts=4), replace(routed.usual, heads=0, kv_heads=0, linear=("attention",))]
    (found,) = solutions(routed, plan, "metrics.kl_div", 0.5, {})
    shapes = "expert_intermediate_dim_512  shared_expert_intermediate_dim_0  num_experts_per_tok_2"
    assert found["solution_repr"].splitlines() == [
        f"block_0:   attention  kv_heads_4  moe  num_experts_4  {shapes}",
        f"block_1:   attention  linear  moe  num_experts_8  {shapes}",
    ]


def test_other_prices_and_plans_are_rejected() -> None:
    for sublayer, reason in (
        (PricedSublayer(2, "mlp", DENSE, MLP), "layer: expected numbers from 0 to 1, got 2"),
        (PricedSublayer(0, "norm", DENSE, MLP), "sublayer 'norm' is unknown"),
        (PricedSublayer(0, "attention", replace(DENSE, heads=4), MLP), "expected 8 query heads in each layer, got 4"),
    ):
        with pytest.raises(InputError, match=reason):
            subblock_stats(MODEL, [Priced(SETTING, OUTSIDE, (sublayer,))])
    with pytest.raises(InputError, match="plan: expected 2 layers, as llama, got 1"):
        solutions(MODEL, [DENSE], "metrics.kl_div", 0.0, {})
    with pytest.raises(InputError, match="dtype 'fp9' is unknown"):
        stats_args(MODEL, replace(SETTING, weights="fp9"))
