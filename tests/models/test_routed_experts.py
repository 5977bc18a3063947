"""Routed experts without a gate projection, with latents, and their routers: numbers by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tables import tables_of

from simulator.codes import Kind
from simulator.errors import InputError
from simulator.models.library import from_hf_config
from simulator.models.lower import lower
from simulator.models.model import Model
from simulator.models.sublayers import Experts
from simulator.models.write import config_content, states
from simulator.pruning import prune

pytestmark = pytest.mark.quick

SHAPE: dict[str, Any] = {"vocab_size": 100, "hidden_size": 64, "num_attention_heads": 4}
SHAPE |= {"num_hidden_layers": 2, "intermediate_size": 96, "num_key_value_heads": 2}
OLMOE = {"model_type": "olmoe", "num_experts": 8, "num_experts_per_tok": 2, **SHAPE}


def with_experts(**fields: Any) -> Model:
    """Return a model of two layers with other experts."""
    model = from_hf_config(OLMOE)
    experts = Experts(experts=8, active=8.0, inner=32, **fields)
    return model.each_layer(lambda layer: layer.with_part("mlp", experts))


@pytest.mark.parametrize(
    ("fields", "expert", "others"), tables_of("models/configs.yaml")["experts"]
)
def test_parameters_products_and_bytes_of_experts(
    fields: dict[str, Any], expert: int, others: int
) -> None:
    model = with_experts(**fields)
    experts = model.layers[0].of("mlp")
    assert experts is not None
    assert experts.parameters(64) == 8 * expert + others
    w = lower(model, phase="prefill", batch=1, seq=5, engine="vllm", skew=0.0)
    assert w.parameters == model.parameters
    features, products = fields.get("latent", 64), 3 if fields.get("gated", True) else 2
    row = w.take(w.kind == Kind.EXPERTS)
    assert row.flops.tolist() == [2 * 5 * 8 * 2 * products * features * 32]
    # all experts are in use; input and output in bf16
    weights = 2 * 8 * products * features * 32
    assert row.bytes.tolist() == [2 * (weights + 2 * 2 * 5 * features)]
    assert row.weight_bytes_each.tolist() == [weights]


def test_latents_are_projected_on_every_device() -> None:
    model = with_experts(gated=False, latent=16)
    w = lower(model, phase="decode", batch=3, devices=2, parallel="expert", engine="vllm")
    latents = w.take(w.is_role("latent_in", "latent_out"))
    assert [*zip(latents.n, latents.k)] == [(16, 64), (64, 16)]
    assert w.experts[w.kind == Kind.EXPERTS].tolist() == [4]


FILES: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    # files with names of their own, and the keys that change without a quarter of experts
    ({"model_type": "aria_text", "moe_num_experts": 8, "moe_topk": 2}, {"moe_num_experts": 6}),
    (
        {
            "model_type": "ernie4_5_moe",
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_intermediate_size": 32,
        },
        {"moe_num_experts": 6},
    ),
    (
        {"model_type": "hunyuan_v1_moe", "num_experts": 8, "moe_topk": [2, 1]},
        {"num_experts": 6},
    ),
    (
        {"model_type": "phimoe", "num_local_experts": 8, "num_experts_per_tok": 2},
        {"num_local_experts": 6},
    ),
)


@pytest.mark.parametrize(("keys", "changed"), FILES)
def test_a_pruned_file_keeps_the_names_of_its_keys(
    keys: dict[str, Any], changed: dict[str, Any]
) -> None:
    data = SHAPE | keys
    dense = from_hf_config(data)
    pruned = prune(lower(dense, phase="decode"), "experts 0.25").meta.config
    content = config_content(data, dense, pruned)
    assert content == data | changed
    assert states(content, pruned)


def test_heads_and_active_experts_can_differ_by_layer() -> None:
    laguna = {"model_type": "laguna", **SHAPE, "head_dim": 16, "num_experts": 8}
    laguna |= {"num_attention_heads_per_layer": [4, 6], "num_experts_per_tok": 2}
    laguna |= {"moe_intermediate_size": 32, "gating": "per-element"}
    model = from_hf_config(laguna)
    # queries, keys, values and outputs, gates of all outputs, norms of heads
    by_hand = [64 * 16 * (2 * heads + 2 * 2) + 64 * heads * 16 + 2 * 16 for heads in (4, 6)]
    attentions = [layer.sublayers[0] for layer in model.layers]
    assert [attention.parameters(64) for attention in attentions] == by_hand
    pruned = prune(lower(model, phase="decode"), "width attention=0.5").meta.config
    content = config_content(laguna, model, pruned)
    assert content["num_attention_heads_per_layer"] == [2, 3]
    with pytest.raises(InputError, match="num_attention_heads_per_layer: expected an integer from"):
        from_hf_config(laguna | {"num_attention_heads_per_layer": [4]})


def test_a_joined_mlp_has_no_norm() -> None:
    cohere: dict[str, Any] = {"model_type": "cohere2_moe", "num_experts": 8, **SHAPE}
    cohere |= {"num_experts_per_tok": 2, "head_dim": 16}
    model = from_hf_config(cohere)
    first = model.layers[0]
    assert model.parameters_of(first) == sum(s.parameters(64) for s in first.sublayers) + 64
    assert from_hf_config(cohere | {"rms_norm_eps": 1e-5}) == replace(model, norm="rms")
