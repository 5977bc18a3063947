"""Keys of single layers are read or refused; no key that could change a layer is ignored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from shaped import Sizes, sizes_of, value_of

from simulator.errors import InputError
from simulator.models.library import from_hf_config, load_model
from simulator.models.lower import lower

pytestmark = pytest.mark.quick

SHAPE = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 100}
LLAMA = {"model_type": "llama", "intermediate_size": 176, "num_key_value_heads": 2, **SHAPE}
MOE = LLAMA | {
    **{"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 32, "head_dim": 16},
}
LATENT = {
    **{"model_type": "deepseek_v3", "intermediate_size": 96, "num_key_value_heads": 4, **SHAPE},
    **{"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    **{"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
}
GEMMA = LLAMA | {"model_type": "gemma3_text", "head_dim": 16, "sliding_window": 32}


@pytest.mark.parametrize(
    ("content", "overrides", "sizes"),
    [
        (LLAMA, {}, (Sizes(4, 2, 176),) * 3),
        (LLAMA, {"1": {}}, (Sizes(4, 2, 176),) * 3),
        (
            LLAMA,
            {"0": {"intermediate_size": 88}, "2": {"num_key_value_heads": 1}},
            (Sizes(4, 2, 88), Sizes(4, 2, 176), Sizes(4, 1, 176)),
        ),
        (  # Transformers fills numbers up with zeros
            LLAMA,
            {"00": {"skip": ["attention"]}, "02": {"skip": ["mlp"], "num_key_value_heads": 4}},
            (Sizes(0, 0, 176), Sizes(4, 2, 176), Sizes(4, 4)),
        ),
        (
            LLAMA,
            {"1": {"skip": ["self_attn", "feed_forward"]}},
            (Sizes(4, 2, 176), Sizes(), Sizes(4, 2, 176)),
        ),
        (
            LLAMA,
            {"1": {"num_attention_heads": 2, "head_dim": 16}},
            (Sizes(4, 2, 176), Sizes(2, 2, 176), Sizes(4, 2, 176)),
        ),
        (
            MOE,
            {"1": {"num_experts": 4, "moe_intermediate_size": 16}, "2": {"num_experts_per_tok": 1}},
            (Sizes(4, 2, 0, 8, 2, 32), Sizes(4, 2, 0, 4, 2, 16), Sizes(4, 2, 0, 8, 1, 32)),
        ),
        (
            LATENT,
            {"2": {"num_attention_heads": 2, "num_key_value_heads": 2}},
            (Sizes(4, 4, 96), Sizes(4, 4, 96), Sizes(2, 2, 96)),
        ),
    ],
)
def test_keys_of_single_layers_are_read(
    content: dict[str, Any], overrides: dict[str, Any], sizes: tuple[Sizes, ...]
) -> None:
    model = from_hf_config({**content, "per_layer_config": overrides})
    assert tuple(map(sizes_of, model.layers)) == sizes
    whole = from_hf_config(content)
    changed = {int(number) for number, override in overrides.items() if override}
    for number, (layer, dense) in enumerate(zip(model.layers, whole.layers)):
        assert (layer == dense) is (number not in changed)
    assert lower(model, phase="prefill", seq=8).parameters == model.parameters


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
    ("overrides", "reason"),
    [
        ([{}], "per_layer_config: expected an object by layer numbers, got"),
        ({"3": {}}, "per_layer_config.3: expected layer numbers from 0 to 2"),
        ({"-1": {}}, "per_layer_config.-1: expected layer numbers"),
        ({"1.0": {}}, "per_layer_config.1.0: expected layer numbers"),
        ({"\u0661": {}}, "per_layer_config.+: expected layer numbers"),
        ({"9" * 5000: {}}, "per_layer_config.9+.*: expected layer numbers"),
        ({"1": [3]}, r"per_layer_config.1: expected an object of keys, got \[3\]"),
        ({"1": {"skip": "mlp"}}, "per_layer_config.1.skip: expected a list of names, got 'mlp'"),
        ({"1": {"skip": ["mamba"]}}, "per_layer_config.1.skip: 'mamba' is unknown; expected some"),
        ({"1": {"intermediate_size": 0}}, "per_layer_config.1.intermediate_size: expected an int"),
        ({"1": {"num_key_value_heads": 3}}, "1.num_key_value_heads: expected a divisor of num_att"),
        ({"1": {"num_key_value_head": 1}}, "per_layer_config.1.num_key_value_head: is not unders"),
        ({"1": {"conv_size": 8}}, "per_layer_config.1.conv_size: is not understood"),
        (
            {"1": {"hidden_size": 128}},
            "per_layer_config.1.hidden: expected the value of all layers",
        ),
        ({"1": {"vocab_size": 90}}, "per_layer_config.1.vocab: expected the value of all layers"),
        ({"1": {"num_hidden_layers": 2}}, "1.num_hidden_layers: expected the value of all layers"),
        (
            {"1": {"per_layer_config": {"1": {}}}},
            "1.per_layer_config: expected none: it states sev",
        ),
        ({"1": {"block_configs": [{}] * 3}}, "1.block_configs: expected none: it states several"),
    ],
)
def test_wrong_keys_of_single_layers_are_named(overrides: Any, reason: str) -> None:
    with pytest.raises(InputError, match=f"^own.json: .*{reason}") as error:
        from_hf_config({**LLAMA, "per_layer_config": overrides}, "own.json")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("intermediate_size_per_layer", [176, 88, 88]),
        ("pruned_heads", {"1": [0, 2]}),
        ("layers_to_skip", [1]),
        ("mlp_width", 88),
        ("num_experts", 8),  # of an architecture without experts
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


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("num_key_value_head", 2, "is not understood, and it could change the layers"),
        ("attention_biases", True, "is unknown; did you mean attention_bias?"),
        ("tie_word_embedding", True, "is unknown; did you mean tie_word_embeddings?"),
        ("sliding_windows", 32, "is unknown; did you mean sliding_window?"),
    ],
)
def test_misspelt_keys_are_refused(key: str, value: Any, reason: str) -> None:
    with pytest.raises(InputError) as error:
        from_hf_config({**GEMMA, key: value})
    assert str(error.value).startswith(f"config: {key}: {reason}")


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
