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

CASES = tables_of("models/cases.yaml")
OLMOE, LAGUNA, COHERE = (CASES["bases"][name] for name in ("olmoe", "laguna", "cohere"))


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


@pytest.mark.parametrize(("keys", "changed"), CASES["names_of_experts"])
def test_a_pruned_file_keeps_the_names_of_its_keys(
    keys: dict[str, Any], changed: dict[str, Any]
) -> None:
    data = {key: OLMOE[key] for key in OLMOE if "expert" not in key} | keys
    dense = from_hf_config(data)
    pruned = prune(lower(dense, phase="decode"), "experts 0.25").meta.config
    content = config_content(data, dense, pruned)
    assert content == data | changed
    assert states(content, pruned)


def test_heads_and_active_experts_can_differ_by_layer() -> None:
    model = from_hf_config(LAGUNA)
    # queries, keys, values and outputs, gates of all outputs, norms of heads
    by_hand = [64 * 16 * (2 * heads + 2 * 2) + 64 * heads * 16 + 2 * 16 for heads in (4, 6)]
    attentions = [layer.sublayers[0] for layer in model.layers]
    assert [attention.parameters(64) for attention in attentions] == by_hand
    pruned = prune(lower(model, phase="decode"), "width attention=0.5").meta.config
    content = config_content(LAGUNA, model, pruned)
    assert content["num_attention_heads_per_layer"] == [2, 3]
    with pytest.raises(InputError, match="num_attention_heads_per_layer: expected an integer from"):
        from_hf_config(LAGUNA | {"num_attention_heads_per_layer": [4]})


def test_a_joined_mlp_has_no_norm() -> None:
    model = from_hf_config(COHERE)
    first = model.layers[0]
    assert model.parameters_of(first) == sum(s.parameters(64) for s in first.sublayers) + 64
    assert from_hf_config(COHERE | {"rms_norm_eps": 1e-5}) == replace(model, norm="rms")
