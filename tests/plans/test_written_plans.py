"""Written plans are the plans, and costs have the keys and units of Puzzletron."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from simulator.codes import DTYPES
from simulator.errors import InputError
from simulator.models.library import from_hf_config, load_model
from simulator.models.model import pruned_from
from simulator.models.write import config_content, content_of
from simulator.plans.costs import costs, planned
from simulator.plans.library import Library, generated_library
from simulator.plans.variants import variant
from simulator.plans.write import check_plan, plan_text, stats_args, stats_text

MODEL = load_model("llama-3.2-1b")  # 16 layers of 8 KV heads of 32 query heads, MLPs of 8192


@pytest.mark.parametrize("name", ["llama-3.2-1b", "smollm2-135m", "qwen3-30b-a3b", "gemma-2-9b"])
def test_written_plans_give_the_same_model(name: str) -> None:
    model = load_model(name)
    library, random = generated_library(model), np.random.default_rng(0)
    for _ in range(3):
        pruned = planned(model, [own[int(random.integers(len(own)))] for own in library.layers])
        check_plan(text := plan_text(model, pruned), model, pruned)
    with pytest.raises(InputError, match="cannot state"):
        check_plan(text, model, replace(pruned, vocab=pruned.vocab + 64))


@pytest.mark.quick
@pytest.mark.parametrize(
    "name",
    [
        *("llama-3.1-8b", "smollm2-135m", "qwen2.5-7b", "gemma-2-9b", "olmo-2-7b", "smollm3-3b"),
        *("opt-13b", "mistral-small-3.1-24b", "mixtral-8x7b", "qwen3-30b-a3b", "gpt-oss-20b"),
        *("llama-4-scout", "deepseek-v2-lite", "qwen3-next-80b-a3b", "nemotron-super-49b"),
    ],
)
def test_written_configurations_give_the_same_model(name: str) -> None:
    dense, content = load_model(name), content_of(name)
    library, random = generated_library(dense), np.random.default_rng(0)
    for _ in range(2):
        pruned = planned(dense, [own[int(random.integers(len(own)))] for own in library.layers])
        written = json.loads(json.dumps(config_content(content, dense, pruned)))
        read = pruned_from(dense, from_hf_config(written))
        assert read.layers == tuple(layer for layer in pruned.layers if layer.sublayers)
        assert read.parameters == pruned.parameters


@pytest.mark.quick
def test_shapes_that_a_format_cannot_state_are_named() -> None:
    pruned = planned(MODEL, [variant("mlp", "linear", MODEL.usual), *MODEL.layers[1:]])
    with pytest.raises(InputError, match="no linear sublayers"):
        plan_text(MODEL, pruned)
    library = Library(
        MODEL, tuple((own, variant("attention", "heads=16", own)) for own in MODEL.layers)
    )
    with pytest.raises(InputError, match="expected 32 query heads in each layer, got 16"):
        stats_text(costs(MODEL, "h100", library, phase="generate"))


@pytest.mark.quick
def test_costs_are_written_in_milliseconds_and_mebibytes() -> None:
    dense = MODEL.usual
    few = (dense, variant("mlp", "none", dense), variant("attention", "linear", dense))
    library = Library(MODEL, (few,) * len(MODEL.layers))
    found = costs(
        MODEL,
        "h100",
        library,
        phase="generate",
        batch=8,
        seq=512,
        new_tokens=64,
        dtype="fp8",
        kv_dtype="bf16",
    )
    (content,) = json.loads(stats_text(found))
    assert content["args"] == {
        **{"gpu": "h100_sxm", "batch_size": 8, "prefill_seq_len": 512, "generation_seq_len": 64},
        **{
            "prefill_queue_size": 0,
            "n_embd": 2048,
            "n_head": 32,
            "vocab_size": 128256,
            "runtime_stats": True,
        },
        **{"use_cuda_graph": True, "weights_dtype": "torch.float8_e4m3fn"},
        **{"activations_dtype": "torch.float8_e4m3fn", "kv_cache_dtype": "torch.bfloat16"},
    }
    attention, linear, mlp, none = content["subblocks"][:4]
    row = found.rows[0]
    assert attention == {
        "subblock_config": {"no_op": False, "replace_with_linear": False, "num_key_value_heads": 8},
        **{"subblock_config_class": "AttentionConfig", "parent_layer_index": 0},
        **{"runtime_ms": 1e3 * row["seconds"], "prefill_runtime_ms": 1e3 * row["prefill_s"]},
        **{"decode_runtime_ms": 1e3 * row["decode_s"], "num_params": round(row["parameters"])},
        **{
            "active_params": round(row["parameters"]),
            "kv_cache_memory_mib": row["cache_bytes"] / 2**20,
        },
        "memory_mib": (row["weights_bytes"] + row["cache_bytes"]) / 2**20,
    }
    assert linear["subblock_config"] == {
        "no_op": False,
        "replace_with_linear": True,
        "num_key_value_heads": 8,
    }
    assert mlp["subblock_config"] == {
        "no_op": False,
        "replace_with_linear": False,
        "intermediate_size": 8192,
    }
    assert (mlp["subblock_config_class"], none["runtime_ms"]) == ("FFNConfig", 0.0)
    assert none["subblock_config"] == {"no_op": True, "replace_with_linear": False}
    assert content["subblocks"][4]["parent_layer_index"] == 1
    # the solver adds attention and MLP key by key
    assert len({frozenset(row) for row in content["subblocks"]}) == 1
    assert content["non_block"].keys() < attention.keys()


@pytest.mark.quick
def test_active_parameters_are_those_of_the_experts_that_a_token_uses() -> None:
    model = load_model("qwen3-30b-a3b")
    (content,) = json.loads(stats_text(costs(model, "h100", phase="generate")))
    mlp = next(row for row in content["subblocks"] if row["subblock_config"].get("moe"))
    assert mlp["num_params"] - mlp["active_params"] == (128 - 8) * 3 * 2048 * 768


@pytest.mark.quick
@pytest.mark.parametrize("name", DTYPES)
def test_every_format_has_a_name(name: str) -> None:
    at = costs(MODEL, "h100", Library(MODEL, tuple((own,) for own in MODEL.layers))).settings[0]
    assert stats_args(MODEL, replace(at, request=replace(at.request, kv_dtype=name)))[
        "kv_cache_dtype"
    ]
