"""Written plans are the plans."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from simulator.errors import InputError
from simulator.models.library import from_hf_config, load_model
from simulator.models.model import pruned_from
from simulator.models.write import config_content, content_of
from simulator.plans.costs import planned
from simulator.plans.library import generated_library
from simulator.plans.variants import variant
from simulator.plans.write import check_plan, plan_text

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
