"""Keys of single layers are read or refused; no key that could change a layer is ignored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from shaped import sizes_of, value_of
from tables import tables_of

from simulator.errors import InputError
from simulator.models.library import from_hf_config, load_model

pytestmark = pytest.mark.quick

BASES = tables_of("models/configs.yaml")["bases"]
LLAMA, MOE, LATENT, GEMMA = (
    BASES[f"architectures_{name}"] for name in ("llama", "moe", "latent", "gemma")
)


def test_windows_of_single_layers_are_read() -> None:
    dense = from_hf_config(GEMMA)
    overrides = {"0": {"sliding_window": 8}, "2": {"skip": ["attention"]}}
    model = from_hf_config({**GEMMA, "per_layer_config": overrides})
    assert (dense.windows, model.windows) == ((32, 32, 32), (8, 32, 0))


def test_halved_mlps_are_counted() -> None:
    halved = {str(i): {"intermediate_size": 7168} for i in (3, 30)}
    file = Path(__file__).parents[2] / "simulator/models/llama-3.1-8b.json"
    model = from_hf_config({**json.loads(file.read_text()), "per_layer_config": halved})
    gone = 2 * 3 * 4096 * 7168
    assert model.parameters == load_model("llama-3.1-8b").parameters - gone
    assert [i for i, layer in enumerate(model.layers) if sizes_of(layer).inner == 7168] == [3, 30]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("intermediate_size_per_layer", [176, 88, 88]),
        ("pruned_heads", {"1": [0, 2]}),
        ("layers_to_skip", [1]),
        ("mlp_width", 88),
        ("num_experts", 8),  # its architecture has no experts
    ],
)
def test_keys_that_could_change_layers_are_refused(key: str, value: Any) -> None:
    reason = f"^own.json: {key}: is not understood, and it could change the layers"
    with pytest.raises(InputError, match=reason):
        from_hf_config({**LLAMA, key: value}, "own.json")
    nested = {"model_type": "mistral3", "text_config": {**LLAMA, key: value}}
    with pytest.raises(InputError, match=f"text_config.{key}: is not understood"):
        from_hf_config(nested)
    for nothing in (None, [], {}, 0):
        assert from_hf_config({**LLAMA, key: nothing}) == from_hf_config(LLAMA)
    # the other parts of a multimodal model have sizes of their own
    inside = {"vision_config": {key: value}, "text_config": LLAMA}
    assert from_hf_config({"model_type": "mistral3", **inside}).layers


def test_other_keys_are_allowed() -> None:
    others = {"rope_theta": 1e4, "rope_scaling": {"factor": 8.0}, "torch_dtype": "bfloat16"}
    others |= {"bos_token_id": 1, "hidden_act": "silu", "my_note": "pruned by hand", "seed": 3}
    assert from_hf_config({**LLAMA, **others}) == from_hf_config(LLAMA)


def test_latent_attention_ignores_the_keys_of_grouped_heads() -> None:
    model = from_hf_config(LATENT | {"num_key_value_heads": 128, "head_dim": 64})
    assert model.layers == from_hf_config(LATENT).layers


def test_qwen_experts_are_counted_under_both_names() -> None:
    renamed = {key: value for key, value in MOE.items() if key != "num_experts"}
    assert from_hf_config({**renamed, "num_local_experts": 8}) == from_hf_config(MOE)
    assert value_of(from_hf_config(MOE), "mlp.experts") == 8
