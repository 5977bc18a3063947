"""Shapes written as a config.json, also per layer in the keys of DeciLM and of ModelOpt, are read
back as the same shapes; a file keeps all that is not a shape."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from simulator.errors import InputError
from simulator.models.architectures import ARCHITECTURES
from simulator.models.changes import changed_keys, config_of, content_of, write_config
from simulator.models.config import Block
from simulator.models.library import from_hf_config, list_models, load_model

pytestmark = pytest.mark.quick

PLAIN = [n for n in list_models() if not ((m := load_model(n)).blocks or m.experts or m.latent)]


@pytest.mark.parametrize("name", PLAIN)
def test_every_architecture_reads_back_what_is_written(name: str, tmp_path: Path) -> None:
    model, content = load_model(name), content_of(name)
    groups = max(1, model.kv_heads // 2)
    changes: list[dict[str, Any]] = [{"layers": 5, "windows": model.windows[:5]}, {"inner": 1024}]
    heads = {"kv_heads": groups, "heads": groups * (model.heads // model.kv_heads)}
    if ARCHITECTURES[model.architecture].grouped:  # heads and hidden size change independently
        changes += [heads, {"hidden": model.hidden // 2}]
    else:
        changes += [{"hidden": 4 * model.head_dim, "heads": 4, "kv_heads": 4}]
        with pytest.raises(InputError, match="cannot state num_attention_heads"):
            changed_keys(model, replace(model, heads=groups, kv_heads=groups), content)
    changes.append({key: value for change in changes for key, value in change.items()})
    for i, change in enumerate(changes):
        new = replace(model, **change)
        file = write_config(tmp_path / str(i), {**content, **changed_keys(model, new, content)})
        assert replace(load_model(file.parent), name=name) == new
    assert changed_keys(model, model, content) == {}


def test_a_file_keeps_what_is_no_shape_and_its_list_of_layers_is_cut(tmp_path: Path) -> None:
    types = ["full_attention", "sliding_attention"] * 3
    content = {
        **{
            "model_type": "qwen2",
            "vocab_size": 100,
            "hidden_size": 64,
            "intermediate_size": 128,
            "rope_theta": 1e6,
        },
        **{
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "layer_types": types,
        },
        **{"use_sliding_window": True, "sliding_window": 32, "architectures": ["Qwen2ForCausalLM"]},
    }
    file = tmp_path / "config.json"
    file.write_text(json.dumps(content))
    assert content_of(file) == content_of(str(tmp_path)) == content
    model = load_model(file)
    new = replace(model, layers=3, windows=model.windows[:3])
    assert changed_keys(model, new, content) == {"num_hidden_layers": 3, "layer_types": types[:3]}
    written = write_config(tmp_path / "new", {**content, **changed_keys(model, new, content)})
    assert json.loads(written.read_text()) == {
        **content,
        "num_hidden_layers": 3,
        "layer_types": types[:3],
    }
    assert load_model(written).windows == (0, 32, 0)


def test_no_file_of_other_content_is_written_over(tmp_path: Path) -> None:
    content = dict(content_of("llama-3.2-1b"))
    file = write_config(tmp_path, content)
    assert write_config(tmp_path, content) == file
    before = file.read_bytes()
    with pytest.raises(InputError, match="exists with different content"):
        write_config(tmp_path, {**content, "num_hidden_layers": 3})
    assert file.read_bytes() == before
    (tmp_path / "link").mkdir()
    (tmp_path / "link/config.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(InputError):
        write_config(tmp_path / "link", content)
    assert not (tmp_path / "elsewhere.json").exists()
    with pytest.raises(InputError, match="expected a folder"):
        write_config(file / "below", content)
    with pytest.raises(InputError, match="cannot hold"):
        write_config(tmp_path / "infinite", {**content, "rope_theta": float("inf")})


def test_shapes_made_in_python_have_no_file() -> None:
    assert content_of(replace(load_model("llama-3.2-1b"), inner=4096)) == {}
    tiny = {
        "model_type": "llama",
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
    }
    tiny |= {"num_attention_heads": 2, "vocab_size": 10}
    assert content_of(tiny) == tiny
    assert content_of(load_model("opt-13b")) == content_of("facebook/opt-13b")
    assert from_hf_config(content_of("opt-13b"), name="opt-13b") == load_model("opt-13b")


LLAMA: dict[str, Any] = {
    **{
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "_name_or_path": "own/tiny",
        "rope_theta": 5e5,
    },
    **{
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
    },
    **{"num_key_value_heads": 4, "vocab_size": 100},
}
MOE: dict[str, Any] = {
    **LLAMA,
    **{
        "model_type": "qwen3_moe",
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 64,
    },
    **{"head_dim": 96},
}
MODELOPT = [
    {
        "attention": {"num_key_value_heads": 2, "no_op": False},
        "ffn": {"intermediate_size": 1000, "moe": None},
    },
    {"attention": {"no_op": True, "num_key_value_heads": None}, "ffn": {"intermediate_size": 2048}},
    {"attention": {"num_key_value_heads": 4}, "ffn": {"no_op": True, "intermediate_size": None}},
    {
        "attention": {"replace_with_linear": True},
        "ffn": {"replace_with_linear": True, "intermediate_size": 2048},
    },
]
SHAPES = (
    Block(8, 2, 1000),
    Block(0, 0, 2048),
    Block(8, 4, 0),
    Block(0, 0, 0, linear=("attention", "mlp")),
)
# architectures whose layers have key/value heads
GROUPED = [n for n in list_models() if not ((m := load_model(n)).latent or m.delta)]


@pytest.mark.parametrize(
    "kind", ["llama", "qwen2", "qwen3", "mistral", "nemotron-nas", "olmo2", "granite", "gemma"]
)
def test_keys_of_modelopt_change_the_layers_of_a_decoder(kind: str) -> None:
    plain = [{"attention": {"num_key_value_heads": 4}, "ffn": {"intermediate_size": 2048}}] * 4
    dense = from_hf_config(LLAMA | {"model_type": kind, "block_configs": plain})
    model = from_hf_config(LLAMA | {"model_type": kind, "block_configs": MODELOPT})
    assert model.layout == SHAPES
    assert dense.layout == (Block(8, 4, 2048),) * 4
    assert (model.windows, model.head_dim) == (dense.windows, dense.head_dim)
    h, d = 768, model.head_dim
    norms = sum(b.sublayers for b in SHAPES) * (model.pre_norms + model.post_norms) * h
    linear, mlps = 2 * h * h, 3 * h * (1000 + 2048)
    attention = sum(h * (2 * 8 + 2 * g) * d for g in (2, 4))
    extra = {
        "qwen2": (2 * 8 + 2 * 2 + 2 * 4) * d,
        "qwen3": 2 * 2 * d,
        "olmo2": (2 * 8 + 2 + 4) * d,
    }.get(kind, 0)
    assert model.layer_parameters == norms + linear + mlps + attention + extra


def test_keys_of_modelopt_change_experts() -> None:
    plain = {"attention": {"num_key_value_heads": 4}, "ffn": {"moe": {"num_local_experts": 8}}}
    small = {"num_local_experts": 2, "num_experts_per_tok": 1, "expert_intermediate_dim": 32}
    # the width of shared experts is a default of ModelOpt; this architecture has none
    other = plain | {"ffn": {"moe": small | {"shared_expert_intermediate_dim": 8192}}}
    model = from_hf_config(MOE | {"block_configs": [plain, plain, other, plain]})
    assert model.layout[2] == Block(8, 4, 0, 2, 1, 32)
    assert model.layout[0] == model.usual == Block(8, 4, 0, 8, 4, 64)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"attention": {"num_key_value_heads": 3}},
            r"attention.num_key_value_heads: expected a divisor of 8 query",
        ),
        (
            {"attention": {"num_key_value_heads": 2, "n_heads_in_group": 2}},
            r"attention.n_heads_in_group: expected 4",
        ),
        (
            {"attention": {"n_heads_in_group": 3}},
            "attention.n_heads_in_group: expected a divisor of .* 8, got 3",
        ),
        (
            {"attention": {}},
            r"attention.n_heads_in_group: missing; expected an integer, here or in num_key_value",
        ),
        (
            {"attention": {"mamba": {"state_dim": 4}}},
            r"attention.mamba: expected null: state-space layers",
        ),
        ({"ffn": {}}, r"ffn.ffn_mult: missing; expected a number, here or in intermediate_size"),
        ({"ffn": {"ffn_mult": -1}}, "ffn.ffn_mult: expected a number from 0 to 1000, got -1"),
        ({"ffn": {"intermediate_size": 0}}, r"ffn.intermediate_size: expected an integer from 1"),
        (
            {"ffn": {"moe": {"num_local_experts": 4}}},
            r"ffn.moe: expected null, as the dense layer has no routed",
        ),
        (
            {"ffn": {"intermediate_size": 4, "sparsify": ["2:4"]}},
            r"ffn.sparsify: expected null: sparsity per layer",
        ),
        (
            {"parallel_blocks": [{}]},
            r"parallel_blocks: expected null: parallel blocks are not supported",
        ),
    ],
)
def test_wrong_layers_are_rejected(change: dict[str, Any], reason: str) -> None:
    configs = [*MODELOPT[:2], MODELOPT[0] | change, MODELOPT[3]]
    with pytest.raises(InputError, match=rf"^own.json: block_configs\[2\].{reason}") as error:
        from_hf_config(LLAMA | {"block_configs": configs}, "own.json")
    assert "\n" not in str(error.value)


def test_a_llama_is_written_as_vllm_loads_it(tmp_path: Path) -> None:
    dense = from_hf_config(LLAMA)
    blocks = (replace(SHAPES[0], inner=1024), *SHAPES[1:])
    found = config_of(LLAMA, dense, replace(dense, blocks=blocks))
    assert (found["model_type"], found["architectures"]) == ("nemotron-nas", ["DeciLMForCausalLM"])
    assert (found["rope_theta"], found["max_position_embeddings"]) == (5e5, 2048)
    assert "_name_or_path" not in found
    assert found["num_key_value_heads"] is found["intermediate_size"] is None
    flags = {"no_op": False, "replace_with_linear": False}
    gone, linear = flags | {"no_op": True}, flags | {"replace_with_linear": True}
    assert found["block_configs"] == [
        {"attention": flags | {"n_heads_in_group": 4}, "ffn": flags | {"ffn_mult": 2.0}},
        {"attention": gone, "ffn": flags | {"ffn_mult": 4.0}},
        {"attention": flags | {"n_heads_in_group": 2}, "ffn": gone},
        {"attention": linear, "ffn": linear},
    ]
    assert load_model(write_config(tmp_path / "own", found).parent).layout == blocks
    # a width that DeciLM would round is written in the keys of ModelOpt
    other = config_of(LLAMA, dense, replace(dense, blocks=SHAPES))
    assert (other["model_type"], other["block_configs"][0]["ffn"]["intermediate_size"]) == (
        "llama",
        1000,
    )
    # sizes of linear sublayers are those that they replaced: ModelOpt requires some
    assert other["block_configs"][3]["attention"]["num_key_value_heads"] == 4


@pytest.mark.parametrize("name", GROUPED)
def test_every_architecture_reads_back_its_layers(name: str) -> None:
    dense, content = load_model(name), content_of(name)
    first, second, third, *rest = dense.layout
    fewer = {"experts": 1, "active": 1.0} if third.experts else {"inner": third.inner // 2 + 1}
    blocks = (
        replace(first, heads=0, kv_heads=0),
        replace(second, inner=0, experts=0, active=0.0, expert_inner=0),
        replace(third, kv_heads=third.kv_heads and 1, **fewer),
        *rest,
    )
    found = json.loads(json.dumps(config_of(content, dense, replace(dense, blocks=blocks))))
    back = from_hf_config(found)
    assert back.layout == blocks
    assert back.parameters == replace(dense, blocks=blocks).parameters
    assert back.windows == dense.windows


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"heads": 4}, r"block_configs: expected 8 query heads in each layer, got 4"),
        (
            {"ranks": (("q", 8),)},
            r"block_configs: expected layers of attention and MLP, got factors",
        ),
        (
            {"out": 64},
            r"block_configs: expected layers of attention and MLP, got other hidden sizes",
        ),
        ({"delta": True}, r"block_configs: expected layers of attention and MLP, got delta nets"),
        ({"rotary": False}, r"tiny: a config.json of llama cannot state the widths of its layers"),
        (
            {"experts": 4, "active": 1.5},
            r"block_configs: expected a whole number of active experts, got 1.5",
        ),
    ],
)
def test_layers_without_keys_are_not_written(change: dict[str, Any], reason: str) -> None:
    dense = from_hf_config(LLAMA)
    with pytest.raises(InputError, match=f"^{reason}"):
        config_of(
            LLAMA, dense, replace(dense, blocks=(replace(dense.usual, **change), *dense.layout[1:]))
        )


def test_a_model_without_a_file_or_of_other_depth_is_not_written() -> None:
    dense = from_hf_config(LLAMA)
    with pytest.raises(InputError, match=r"^tiny: has no config\.json"):
        config_of({}, dense, dense)
    with pytest.raises(InputError, match=r"^tiny: expected 4 layers, as tiny, got 3"):
        config_of(LLAMA, dense, replace(dense, layers=3, windows=dense.windows[:3]))
