"""Named models and config.json: counts equal to the published ones, and bad files refused with one line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_shapes import PUBLISHED, Published, layer_tensors, outer_tensors

from simulator.errors import InputError
from simulator.models.config import ModelConfig
from simulator.models.huggingface import ARCHITECTURES, MAX_FILE_BYTES, from_hf_config, read_config
from simulator.models.library import list_models, load_model

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}
OPT = {
    "model_type": "opt",
    "hidden_size": 64,
    "ffn_dim": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}


def test_every_shipped_model_has_published_numbers() -> None:
    assert set(list_models()) == set(PUBLISHED)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_parameters_equal_the_published_count_and_the_tensors(name: str) -> None:
    p, model = PUBLISHED[name], load_model(name)
    in_layers = p.layers * sum(math.prod(s) for s in layer_tensors(p))
    assert in_layers + sum(math.prod(s) for s in outer_tensors(p)) == p.parameters
    assert model.parameters == p.parameters
    assert model.layers * model.layer_parameters == in_layers
    assert (model.hidden, model.layers, model.heads, model.kv_heads) == (p.hidden, p.layers, p.heads, p.kv_heads)
    assert (model.head_dim, model.inner, model.vocab, model.tied) == (p.head_dim, p.inner, p.vocab, p.tied)


@pytest.mark.parametrize(
    ("given_name", "name"),
    [
        ("meta-llama/Llama-3.1-8B", "llama-3.1-8b"),
        ("Meta-Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("LLAMA_3.1_8B", "llama-3.1-8b"),
        ("llama 2 7b", "llama-2-7b"),
        ("meta-llama/Llama-2-70b-hf", "llama-2-70b"),
        ("Qwen/Qwen2.5-7B", "qwen2.5-7b"),
        ("mistralai/Mistral-7B-v0.1", "mistral-7b-v0.1"),
        ("mistral-7b", "mistral-7b-v0.3"),
        ("microsoft/Phi-3-mini-4k-instruct", "phi-3-mini-4k"),
        ("HuggingFaceTB/SmolLM2-135M", "smollm2-135m"),
        ("EleutherAI/pythia-6.9b", "pythia-6.9b"),
        ("huggyllama/llama-7b", "llama-7b"),
    ],
)
def test_names_and_ids(given_name: str, name: str) -> None:
    assert load_model(given_name) is load_model(name)
    assert load_model(name).name == name


@pytest.mark.parametrize(
    "folder", [p.name for p in Path(__file__).parents[2].joinpath("simulator/models").glob("*.json")]
)
def test_every_shipped_file_names_its_source(folder: str) -> None:
    data = json.loads((Path(__file__).parents[2] / "simulator/models" / folder).read_text())
    assert data["_source"].startswith("https://huggingface.co/")


def test_unknown_name_suggests_the_closest() -> None:
    with pytest.raises(InputError, match=r"model 'lama-2-7b' is unknown; did you mean llama-2-7b") as error:
        load_model("lama-2-7b")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["", "  ", "a\0b", "x" * 5000, "no/such/folder/", "./nothing.json"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(InputError) as error:
        load_model(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", [None, 3, ["llama-2-7b"], 1.5])
def test_sources_of_other_types(source: Any) -> None:
    with pytest.raises(InputError, match="expected a name, a path or a configuration"):
        load_model(source)


# -- defaults that transformers fills in ----------------------------------------------------------------------------------------


def test_llama_defaults() -> None:
    model = from_hf_config(LLAMA)
    assert (model.kv_heads, model.head_dim, model.tied, model.qkv_bias, model.mlp_bias, model.rotary_dim) == (
        4,
        16,
        False,
        False,
        False,
        16,
    )
    assert from_hf_config(LLAMA | {"num_key_value_heads": None}).kv_heads == 4
    assert from_hf_config(LLAMA | {"num_key_value_heads": 2}).kv_heads == 2
    assert from_hf_config(LLAMA | {"head_dim": 32}).head_dim == 32
    biased = from_hf_config(LLAMA | {"attention_bias": True, "mlp_bias": True})
    assert biased.layer_parameters - model.layer_parameters == 4 * 64 + 2 * 176 + 64


def test_other_defaults() -> None:
    many = LLAMA | {"num_attention_heads": 32, "hidden_size": 128}
    assert from_hf_config(many | {"model_type": "mistral"}).kv_heads == 8
    assert from_hf_config(many | {"model_type": "mistral"}).windows == (4096, 4096)
    assert from_hf_config(many | {"model_type": "mistral", "sliding_window": None}).windows == (0, 0)
    assert from_hf_config(many | {"model_type": "qwen2"}).qkv_bias
    assert from_hf_config(many | {"model_type": "qwen3"}).head_dim == 128
    assert from_hf_config(many | {"model_type": "qwen3"}).qk_norm
    gemma = from_hf_config(many | {"model_type": "gemma"})
    assert (gemma.tied, gemma.kv_heads, gemma.head_dim, gemma.post_norms) == (True, 16, 256, False)
    gemma2 = from_hf_config(many | {"model_type": "gemma2"})
    assert (gemma2.kv_heads, gemma2.windows, gemma2.post_norms, gemma2.logit_softcap) == (4, (4096, 0), True, True)
    assert not from_hf_config(many | {"model_type": "gemma2", "final_logit_softcapping": None}).logit_softcap
    assert from_hf_config(OPT).tied
    assert from_hf_config(OPT).learned_positions == 2050
    neox = from_hf_config(LLAMA | {"model_type": "gpt_neox"})
    assert (neox.rotary_dim, neox.parallel_residual, neox.gated, neox.tied) == (4, True, False, False)


def test_windows_of_qwen_and_layer_types() -> None:
    qwen = LLAMA | {"model_type": "qwen2", "num_key_value_heads": 4, "sliding_window": 512, "max_window_layers": 1}
    assert from_hf_config(qwen).windows == (0, 0)
    assert from_hf_config(qwen | {"use_sliding_window": True}).windows == (0, 512)
    listed = {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]}
    assert from_hf_config(qwen | listed).windows == (512, 0)
    with pytest.raises(InputError, match="layer_types: expected a list of 2"):
        from_hf_config(qwen | {"use_sliding_window": True, "layer_types": ["full_attention"]})


# -- bad configurations ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [k for k in LLAMA if k != "model_type"])
@pytest.mark.parametrize(
    "value", [None, 0, -1, 10**9, 10**400, 1.5, True, "64", [64], float("nan"), float("inf"), "x" * 10_000]
)
def test_bad_shape_is_named(key: str, value: Any) -> None:
    with pytest.raises(InputError) as error:
        from_hf_config(LLAMA | {key: value}, "some/config.json")
    text = str(error.value)
    assert text.startswith(f"some/config.json: {key}: ")
    assert "expected an integer from 1 to" in text
    assert "\n" not in text
    assert len(text) < 200


@pytest.mark.parametrize("key", [k for k in LLAMA if k != "model_type"])
def test_missing_key_is_named(key: str) -> None:
    with pytest.raises(InputError, match=f"config: {key}: missing"):
        from_hf_config({k: v for k, v in LLAMA.items() if k != key})


@pytest.mark.parametrize("kind", ["bert", "mixtral", "", 3, ["llama"], None, "LLAMA"])
def test_unsupported_architecture_is_named(kind: Any) -> None:
    with pytest.raises(InputError) as error:
        from_hf_config(LLAMA | {"model_type": kind})
    assert all(name in str(error.value) for name in ARCHITECTURES)
    if kind is not None:
        assert repr(kind) in str(error.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_attention_heads": 5}, "num_attention_heads: expected a divisor of hidden_size 64"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of num_attention_heads 4, got 3"),
        ({"num_key_value_heads": 8}, "num_key_value_heads: expected a divisor"),
        ({"attention_bias": 1}, "attention_bias: expected true or false, got 1"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: expected true or false"),
        ({"num_hidden_layers": 100_000}, "num_hidden_layers: expected an integer from 1 to 10000"),
        ({"model_type": "gpt_neox", "rotary_pct": 2}, "rotary_pct: expected a number from 0 to 1, got 2"),
        (
            {"model_type": "gemma2", "attn_logit_softcapping": -1, "num_key_value_heads": 4},
            "attn_logit_softcapping: expected a positive",
        ),
        ({"model_type": "opt"}, "ffn_dim: missing"),
    ],
)
def test_other_bad_values(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError) as error:
        from_hf_config(LLAMA | change)
    assert reason in str(error.value)


def test_opt_with_projected_embeddings_is_refused() -> None:
    with pytest.raises(InputError, match="word_embed_proj_dim: expected hidden_size 64"):
        from_hf_config(OPT | {"word_embed_proj_dim": 32})


@pytest.mark.parametrize("data", [[], "llama", 3, None])
def test_not_a_mapping(data: Any) -> None:
    with pytest.raises(InputError, match="expected a JSON object"):
        from_hf_config(data)


# -- files ----------------------------------------------------------------------------------------------------------------------


def test_file_folder_path_and_dictionary_agree(tmp_path: Path) -> None:
    file = tmp_path / "my-model" / "config.json"
    file.parent.mkdir()
    file.write_text(json.dumps(LLAMA))
    models = [
        load_model(str(file)),
        load_model(file),
        load_model(file.parent),
        load_model(f"{file.parent}/"),
        read_config(file),
    ]
    assert all(m == models[0] for m in models)
    assert models[0].name == "my-model"
    assert load_model(LLAMA).parameters == models[0].parameters
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(LLAMA | {"_name_or_path": "someone/Nice-1B"}).encode())
    assert load_model(file).name == "Nice-1B"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is not JSON"),
        (b'{"model_type": "llama", "hidden_', r"config.json:1:25: is not JSON"),
        (b'{"a": NaN}', "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"hidden_size": ' + b"9" * 10_000 + b"}", "is not JSON"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"[1, 2]", "expected a JSON object"),
        (b'"text"', "expected a JSON object"),
        (b"{}", "model_type: missing"),
        (b" " * (MAX_FILE_BYTES + 1), "is larger than 1 MB"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, reason: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(InputError, match=reason) as error:
        load_model(file)
    assert "\n" not in str(error.value)
    assert "config.json" in str(error.value)


def test_truncation_at_every_byte_is_refused(tmp_path: Path) -> None:
    text, file = json.dumps(LLAMA), tmp_path / "config.json"
    for end in range(len(text)):
        file.write_text(text[:end])
        with pytest.raises(InputError, match=r"config\.json"):
            load_model(file)


def test_folder_without_config_and_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the folder has no config\.json"):
        load_model(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        load_model(tmp_path / "config.json")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(sorted(PUBLISHED)), changes=st.dictionaries(st.integers(0, 30), values, min_size=1, max_size=4)
)
def test_mutated_configurations_load_or_are_refused_in_one_line(name: str, changes: dict[int, Any]) -> None:
    data = json.loads((Path(__file__).parents[2] / "simulator/models" / f"{name}.json").read_text())
    keys = sorted(data)
    data.update({keys[i % len(keys)]: value for i, value in changes.items()})
    model, reason = None, ""
    try:
        model = from_hf_config(data)
    except InputError as error:
        reason = str(error)
    assert "\n" not in reason
    assert (model is None) == bool(reason)
    if model is not None:
        assert isinstance(model, ModelConfig)
        assert model.parameters > 0
        assert hash(model) == hash(from_hf_config(data))


@settings(max_examples=100, deadline=None)
@given(
    heads=st.integers(1, 16),
    group=st.integers(1, 4),
    dim=st.integers(1, 64),
    inner=st.integers(1, 300),
    layers=st.integers(1, 5),
    vocab=st.integers(1, 500),
    tied=st.booleans(),
)
def test_parameters_of_any_llama(
    heads: int, group: int, dim: int, inner: int, layers: int, vocab: int, tied: bool
) -> None:
    shape = Published("llama", heads * group * dim, layers, heads * group, heads, dim, inner, vocab, tied, 0, "drawn")
    model = from_hf_config(
        {
            "model_type": "llama",
            "hidden_size": shape.hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": heads,
            "vocab_size": vocab,
            "tie_word_embeddings": tied,
        }
    )
    assert model.parameters == sum(math.prod(s) for s in layer_tensors(shape) * layers + outer_tensors(shape))
