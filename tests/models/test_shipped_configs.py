"""Files of the shipped models have the keys that change what a model computes, so weights under a
written ``config.json`` give the right results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from simulator.models.library import list_models, load_model
from simulator.models.model import Model
from simulator.models.sublayers import Attention, LatentAttention
from simulator.models.write import config_content, content_of
from simulator.pruning import prune_model

ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "mlp_hidden_act")
EPSILONS = ("rms_norm_eps", "layer_norm_eps", "norm_eps")
BASES = ("rope_theta", "rotary_emb_base")

EXTENDED = {"kimi_k2": "deepseek_v3", "nemotron-nas": "llama", "nemotron_h_puzzle": "nemotron_h"}
"""Model type that Transformers does not have -> the one whose configuration its code extends."""

CONVERTED = {
    *("architectures", "model_type", "torch_dtype", "rope_scaling"),
    *("no_rope_layers", "sliding_window"),  # an empty or unused value becomes another
    *("layer_types", "layers_block_type"),  # types have other names in Transformers 5
}
"""Keys that Transformers keeps under another name, in another form or in the whole model's
configuration."""


def _decoder(content: Mapping[str, Any]) -> Mapping[str, Any]:
    nested: Mapping[str, Any] = content.get("text_config", content)
    return nested


def _stated(content: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    """Return the value of the first key that the content has, else None."""
    return next((content[key] for key in keys if key in content), None)


def _parameters(decoder: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the stated rotary parameters, of layers without windows if those differ."""
    stated: Mapping[str, Any] = decoder.get("rope_parameters", {})
    return stated.get("full_attention", stated)


def _base(decoder: Mapping[str, Any]) -> Any:
    """Return the base of the rotary positions."""
    return _stated(decoder, BASES) or _parameters(decoder).get("rope_theta")


def _rotates(model: Model) -> bool:
    grouped = any(s.rotary for s in model.sublayers if isinstance(s, Attention))
    latent = (s for s in model.sublayers if isinstance(s, LatentAttention))
    return grouped or any(s.rotary and s.rotates_positions for s in latent)


@pytest.mark.quick
@pytest.mark.parametrize("name", list_models())
def test_files_state_class_activation_positions_and_norms(name: str) -> None:
    content, model = content_of(name), load_model(name)
    decoder = _decoder(content)
    assert content["architectures"]
    # the activation of LFM2 is no key
    assert _stated(decoder, ACTIVATIONS) or model.architecture in ("lfm2", "lfm2_moe")
    assert _base(decoder) or not _rotates(model)
    # OPT uses the constant of torch
    assert bool(_stated(decoder, EPSILONS)) == (model.architecture != "opt")


def _config(content: Mapping[str, Any]) -> Any:
    """Return the configuration of the decoder that Transformers makes of a content."""
    transformers = pytest.importorskip("transformers")
    keys = dict(content)
    kind = keys.pop("model_type")
    return transformers.AutoConfig.for_model(EXTENDED.get(kind, kind), **keys).get_text_config()


def _rope(config: Any) -> Mapping[str, Any]:
    """Return the rotary parameters, of Gemma 3 those of its layers without windows."""
    rope: Mapping[str, Any] = config.rope_parameters
    return rope.get("full_attention", rope)


@pytest.mark.parametrize("name", list_models())
def test_values_reach_the_configuration_of_transformers(name: str) -> None:
    decoder, config = _decoder(content_of(name)), _config(content_of(name))
    values = config.to_dict()
    read = {key for key in {*decoder} - CONVERTED if key in values}
    assert {key: values[key] for key in read} == {key: decoder[key] for key in read}
    for keys in (ACTIVATIONS, EPSILONS):
        # the class has such a key, and the file states it
        assert {key for key in keys if hasattr(type(config), key)} <= {*decoder}
    if _rotates(load_model(name)):
        scaling = decoder.get("rope_scaling", _parameters(decoder))
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        expected = {
            **scaling,
            "rope_theta": _base(decoder),
            "rope_type": "default" if kind == "mrope" else kind,
        }
        assert expected.items() <= _rope(config).items()


@pytest.mark.parametrize(
    ("name", "theta", "kind", "factor"),
    [
        *((f"llama-3.1-{size}", 5e5, "llama3", 8) for size in ("8b", "70b")),
        *((f"llama-3.2-{size}", 5e5, "llama3", 32) for size in ("1b", "3b")),
        ("deepseek-v3", 1e4, "yarn", 40),
        ("gpt-oss-20b", 1.5e5, "yarn", 32),
        ("gemma-3-12b", 1e6, "linear", 8),
    ],
)
def test_scaled_positions_are_the_published_ones(
    name: str, theta: float, kind: str, factor: float
) -> None:
    rope = _rope(_config(content_of(name)))
    assert (rope["rope_theta"], rope["rope_type"], rope["factor"]) == (theta, kind, factor)


@pytest.mark.quick
@pytest.mark.parametrize("name", ["llama-3.1-8b", "gpt-oss-20b", "mistral-small-3.1-24b"])
@pytest.mark.parametrize("text", ["depth 0.25", "width kv=0.5"])
def test_files_of_pruned_models_keep_them(name: str, text: str) -> None:
    dense = load_model(name)
    written = config_content(content_of(name), dense, prune_model(dense, text))
    kept = ("rope_theta", "rope_scaling", *EPSILONS, *ACTIVATIONS, "swiglu_limit")
    before, after = _decoder(content_of(name)), _decoder(written)
    assert {key: after.get(key) for key in kept} == {key: before.get(key) for key in kept}
