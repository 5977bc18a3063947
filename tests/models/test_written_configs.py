"""Shapes written as a config.json, also per layer in the keys of DeciLM and of ModelOpt, are read
back as the same shapes; a file keeps all that is not a shape."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from shaped import (
    Attention,
    Experts,
    Layer,
    Linear,
    Model,
    Sizes,
    changed,
    cut,
    layer,
    resized,
    sizes_of,
)
from tables import tables_of

from simulator.errors import InputError
from simulator.models.architectures import ARCHITECTURES
from simulator.models.form import SPARSE24, Form
from simulator.models.library import from_hf_config, list_models, load_model
from simulator.models.model import pruned_from
from simulator.models.write import config_content, content_of, write_config
from simulator.pruning import prune_model

pytestmark = pytest.mark.quick


def alike(name: str) -> bool:
    """Whether all layers of a model have grouped-query attention and equal MLPs."""
    model = load_model(name)
    return len(model.runs) == 1 and not model.experts and not model.latent


def changed_keys(content: Any, new: Any) -> dict[str, Any]:
    assert new.keys() >= content.keys() - {"_name_or_path"}
    return {key: value for key, value in new.items() if content.get(key, "") != value}


@pytest.mark.parametrize("name", [*filter(alike, list_models())])
def test_every_architecture_reads_back_what_is_written(name: str, tmp_path: Path) -> None:
    model, content = load_model(name), content_of(name)
    groups = max(1, model.kv_heads // 2)
    changes: list[dict[str, Any]] = [{"layers": 5}, {"inner": 1024}]
    heads = {"kv_heads": groups, "heads": groups * (model.heads // model.kv_heads)}
    if ARCHITECTURES[model.architecture].grouped:  # heads and hidden size change independently
        changes += [heads, {"hidden": model.hidden // 2}]
    else:
        changes += [{"hidden": 4 * model.head_dim, "heads": 4, "kv_heads": 4}]
        with pytest.raises(InputError, match="cannot state these shapes"):
            config_content(content, model, resized(model, heads=groups, kv_heads=groups))
    changes.append({key: value for change in changes for key, value in change.items()})
    for i, change in enumerate(changes):
        new = resized(model, **change)
        written = config_content(content, model, new)
        assert not written.keys() & {"block_configs", "per_layer_config"}
        file = write_config(tmp_path / str(i), written)
        architecture = load_model(file.parent).architecture
        odd = model.architecture == "llama" and new.hidden % new.heads
        assert architecture == ("mistral" if odd else model.architecture)
        assert replace(load_model(file.parent), name=name, architecture=new.architecture) == new
    assert config_content(content, model, model) == content


def test_a_file_keeps_what_is_no_shape_and_its_list_of_layers_is_cut(tmp_path: Path) -> None:
    content = CASES["bases"]["qwen_listed"]
    types = content["layer_types"]
    file = tmp_path / "config.json"
    file.write_text(json.dumps(content))
    assert content_of(file) == content_of(str(tmp_path)) == content
    model = load_model(file)
    for layers, windows in (((0, 1, 2), (0, 32, 0)), ((0, 1, 5), (0, 32, 32))):
        new = model.with_layers((model.layers[i] for i in layers), layers)
        written = write_config(tmp_path / f"to {layers[-1]}", config_content(content, model, new))
        stated = {"num_hidden_layers": 3, "layer_types": [types[i] for i in layers]}
        assert json.loads(written.read_text()) == content | stated
        assert load_model(written).windows == windows


def test_a_quantised_file_keeps_its_format(tmp_path: Path) -> None:
    content = LLAMA | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    file = write_config(tmp_path / "dense", content)
    dense = load_model(file)
    pruned = prune_model(dense, "depth 0.5 + width mlp=0.5")
    written = load_model(write_config(tmp_path / "new", config_content(content, dense, pruned)))
    assert (written.layers, written.weight_dtype) == (pruned.layers, "int4")


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
    assert content_of(resized(load_model("llama-3.2-1b"), inner=4096)) == {}
    assert content_of(LLAMA) == LLAMA
    assert content_of(load_model("opt-13b")) == content_of("facebook/opt-13b")
    assert from_hf_config(content_of("opt-13b"), name="opt-13b") == load_model("opt-13b")


CASES = tables_of("models/cases.yaml")
LLAMA: dict[str, Any] = tables_of("models/configs.yaml")["bases"]["written_llama"]
MOE: dict[str, Any] = CASES["bases"]["written_moe"]
MODELOPT = CASES["modelopt"]
SHAPES = (
    Sizes(8, 2, 1000),
    Sizes(0, 0, 2048),
    Sizes(8, 4, 0),
    Sizes(linear=("attention", "mlp")),
)


def shapes(model: Model) -> tuple[Sizes, ...]:
    return tuple(map(sizes_of, model.layers))


def grouped(name: str) -> bool:
    """Whether all layers of a model have grouped-query attention, or none."""
    attentions = {type(layer.of("attention")) for layer in load_model(name).layers}
    return attentions <= {Attention, Linear, type(None)}


@pytest.mark.parametrize(
    "kind", ["llama", "qwen2", "qwen3", "mistral", "nemotron-nas", "olmo2", "granite", "gemma"]
)
def test_keys_of_modelopt_change_the_layers_of_a_decoder(kind: str) -> None:
    plain = [{"attention": {"num_key_value_heads": 4}, "ffn": {"intermediate_size": 2048}}] * 4
    dense = from_hf_config(LLAMA | {"model_type": kind, "block_configs": plain})
    model = from_hf_config(LLAMA | {"model_type": kind, "block_configs": MODELOPT})
    assert shapes(model) == SHAPES
    assert shapes(dense) == (Sizes(8, 4, 2048),) * 4
    windows = tuple(w if sizes.heads else 0 for w, sizes in zip(dense.windows, SHAPES))
    assert (model.windows, model.head_dim) == (windows, dense.head_dim)
    h, d = 768, model.head_dim
    norms = (2 + 1 + 1 + 2) * (model.pre_norms + model.post_norms) * h
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
    assert shapes(model)[2] == Sizes(8, 4, 0, 2, 1, 32)
    assert shapes(model)[0] == sizes_of(model.usual) == Sizes(8, 4, 0, 8, 4, 64)


def test_a_llama_is_written_as_vllm_loads_it(tmp_path: Path) -> None:
    dense = from_hf_config(LLAMA)
    first, second, third, fourth = from_hf_config(LLAMA | {"block_configs": MODELOPT}).layers
    rounded = dense.with_layers([cut(first, "mlp", inner=1024), second, third, fourth])
    written = config_content(LLAMA, dense, rounded)
    names = ("nemotron-nas", ["DeciLMForCausalLM"])
    assert (written["model_type"], written["architectures"]) == names
    assert (written["rope_theta"], written["max_position_embeddings"]) == (5e5, 2048)
    assert "_name_or_path" not in written
    assert written["num_key_value_heads"] is written["intermediate_size"] is None
    flags = {"no_op": False, "replace_with_linear": False}
    gone, linear = flags | {"no_op": True}, flags | {"replace_with_linear": True}
    assert written["block_configs"] == [
        {"attention": flags | {"n_heads_in_group": 4}, "ffn": flags | {"ffn_mult": 2.0}},
        {"attention": gone, "ffn": flags | {"ffn_mult": 4.0}},
        {"attention": flags | {"n_heads_in_group": 2}, "ffn": gone},
        {"attention": linear, "ffn": linear},
    ]
    assert load_model(write_config(tmp_path / "own", written).parent).layers == rounded.layers
    # a width that DeciLM would round is written in the keys of ModelOpt
    other = config_content(LLAMA, dense, dense.with_layers([first, second, third, fourth]))
    assert other["model_type"] == "llama"
    assert other["block_configs"][0]["ffn"]["intermediate_size"] == 1000
    # sizes of linear sublayers are those that they replaced: ModelOpt requires some
    assert other["block_configs"][3]["attention"]["num_key_value_heads"] == 4


def test_decilm_keeps_the_head_size_of_the_file() -> None:
    content = LLAMA | {"head_dim": 96}
    dense = from_hf_config(content)
    written = config_content(content, dense, prune_model(dense, "depth 0.5 unit=attention"))
    assert (written["model_type"], written["head_dim"]) == ("nemotron-nas", 96)
    fewer = resized(dense, heads=4, kv_heads=4)
    fewer = fewer.with_layers([fewer.layers[0].without("mlp"), *fewer.layers[1:]])
    written = config_content(content, dense, fewer)
    assert (written["num_attention_heads"], written["head_dim"]) == (4, 96)
    assert from_hf_config(written).layers == fewer.layers


def test_removed_layers_leave_usual_keys() -> None:
    dense = from_hf_config(LLAMA)
    written = config_content(LLAMA, dense, prune_model(dense, "depth 0.5"))
    assert changed_keys(LLAMA, written) == {"num_hidden_layers": 2}
    # a layer without both sublayers is a removed layer
    empty = dense.with_layers([dense.layers[0], Layer(()), *dense.layers[2:]])
    assert changed_keys(LLAMA, config_content(LLAMA, dense, empty)) == {"num_hidden_layers": 3}


def test_overrides_of_layers_move_with_their_layers() -> None:
    overrides = {"00": {"intermediate_size": 512}, "03": {"skip": ["attention"]}}
    content = LLAMA | {"per_layer_config": overrides}
    dense = from_hf_config(content)
    pruned = prune_model(dense, "depth layers=1,2")
    written = config_content(content, dense, pruned)
    assert written["per_layer_config"] == {"0": overrides["00"], "1": overrides["03"]}
    assert shapes(from_hf_config(written)) == (Sizes(8, 4, 512), Sizes(0, 0, 2048))


@pytest.mark.parametrize("name", [*filter(grouped, list_models())])
def test_every_architecture_reads_back_its_layers(name: str) -> None:
    dense, content = load_model(name), content_of(name)
    first, second, third, *rest = dense.layers
    narrow = cut(third, "attention", kv_heads=1)
    if isinstance(mlp := third.of("mlp"), Experts):
        narrow = cut(narrow, "mlp", experts=1, active=1.0)
    else:
        narrow = cut(narrow, "mlp", inner=mlp.inner // 2 + 1)
    pruned = dense.with_layers([first.without("attention"), second.without("mlp"), narrow, *rest])
    read = from_hf_config(json.loads(json.dumps(config_content(content, dense, pruned))))
    assert read.layers == pruned.layers
    assert read.parameters == pruned.parameters
    windows = (0, *dense.windows[1:])  # a layer without attention has none
    assert read.windows == windows


MODELS = CASES["written"]["models"]
PRUNINGS = CASES["written"]["prunings"]


def written_and_read(name: str, pruned: Model, refuses: bool) -> tuple[Any, Model] | None:
    """Write the configuration of a pruned model, unless its keys cannot state it, and read it."""
    dense, content = load_model(name), content_of(name)
    if refuses:
        with pytest.raises(InputError, match=f"^{name}: a config.json of .* cannot state"):
            config_content(content, dense, pruned)
        return None
    written = config_content(content, dense, pruned)
    read = from_hf_config(json.loads(json.dumps(written)), name=name)
    assert replace(pruned_from(dense, read), architecture=dense.architecture) == pruned
    assert read.parameters == pruned.parameters < dense.parameters
    assert read.found == dense.found
    return written, read


@pytest.mark.parametrize("pruning", PRUNINGS)
@pytest.mark.parametrize("name", MODELS)
def test_pruned_models_are_read_as_they_are(name: str, pruning: str) -> None:
    pruned = prune_model(load_model(name), pruning)
    written_and_read(name, pruned, name in PRUNINGS[pruning])


@pytest.mark.parametrize("name", [n for n in MODELS if load_model(n).experts])
def test_fewer_experts_are_one_key(name: str) -> None:
    dense, content = load_model(name), content_of(name)
    pruned = prune_model(dense, "experts 0.5")
    written = config_content(content, dense, pruned)
    inside, stated = (one.get("text_config", one) for one in (content, written))
    assert [*changed_keys(inside, stated).values()] == [dense.experts // 2]
    assert pruned_from(dense, from_hf_config(written, name=name)) == pruned
    with pytest.raises(InputError, match="does not state merged experts or a number of experts"):
        config_content(content, dense, prune_model(dense, "experts 0.5 merged=true"))


def test_widths_of_experts_are_usual_keys() -> None:
    dense, content = load_model("qwen3-30b-a3b"), content_of("qwen3-30b-a3b")
    assert changed_keys(
        content, config_content(content, dense, prune_model(dense, "width 0.5"))
    ) == {
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "moe_intermediate_size": 384,
    }
    # first layers without experts are counted anew, and shared experts are as wide as others
    dense, content = load_model("deepseek-v3"), content_of("deepseek-v3")
    pruned = prune_model(dense, "depth layers=0,5 + width mlp=0.5")
    assert changed_keys(content, config_content(content, dense, pruned)) == {
        "num_hidden_layers": 59,
        "first_k_dense_replace": 2,
        "mlp_layer_types": ["dense"] * 2 + ["sparse"] * 57,
        "intermediate_size": 9216,
        "moe_intermediate_size": 1024,
    }


def test_layers_of_a_rule_are_listed_where_some_are_removed() -> None:
    dense, content = load_model("qwen3-next-80b-a3b"), content_of("qwen3-next-80b-a3b")
    written = config_content(content, dense, prune_model(dense, "depth layers=0,1"))
    types = ["linear_attention", "full_attention", *["linear_attention"] * 3, "full_attention"]
    assert written["layer_types"][:6] == types
    dense, content = load_model("smollm3-3b"), content_of("smollm3-3b")
    written = config_content(content, dense, prune_model(dense, "depth layers=0,1"))
    assert written["no_rope_layers"][:6] == [1, 0, 1, 1, 1, 0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda one: cut(one, "mlp", out=64), "tiny: a config.json does not state residual proj"),
        (lambda one: cut(one, "mlp", rotates=True), "tiny: .* does not state residual projections"),
        (
            lambda one: one.each(lambda s: s.with_forms({"o": Form(rank=8), "up": Form(rank=8)})),
            "tiny: a config.json does not state low-rank factors",
        ),
        (
            lambda one: one.each(lambda s: s.with_forms({"o": SPARSE24})),
            "tiny: a config.json does not state zeros in weights",
        ),
        (
            lambda one: cut(one, "attention", rotary=0),
            "tiny: a config.json of llama cannot state these shapes",
        ),
        (
            lambda one: layer(8, 4, 2048, head_dim=96, attention={"qkv_bias": True}),
            "tiny: a config.json of llama cannot state these shapes",
        ),
        (
            lambda one: layer(8, 4, experts={"experts": 4, "active": 2.0, "inner": 8}),
            "tiny: a config.json of llama cannot state these shapes",
        ),
    ],
)
def test_layers_without_keys_are_not_written(change: Callable[[Layer], Layer], reason: str) -> None:
    dense = from_hf_config(LLAMA)
    pruned = changed(dense, lambda i, one: one if i else change(one))
    with pytest.raises(InputError, match=f"^{reason}"):
        config_content(LLAMA, dense, pruned)


def test_a_model_without_a_file_or_of_unknown_layers_is_not_written() -> None:
    dense = from_hf_config(LLAMA)
    with pytest.raises(InputError, match=r"^tiny: has no config\.json"):
        config_content({}, dense, dense)
    unknown, longer = dense.with_layers(dense.layers[:2], (1, 9)), dense.layers * 2
    for pruned in (unknown, dense.with_layers(longer)):
        with pytest.raises(InputError, match="cannot state these shapes"):
            config_content(LLAMA, dense, pruned)


NEW_PRUNINGS = CASES["written_hybrids"]["prunings"]


@pytest.mark.parametrize("pruning", NEW_PRUNINGS)
@pytest.mark.parametrize("name", CASES["written_hybrids"]["models"])
def test_hybrids_and_new_types_are_read_back_and_built(name: str, pruning: str) -> None:
    dense = load_model(name)
    try:
        pruned = prune_model(dense, pruning)
    except InputError:
        pytest.skip("it has no such part")
    if pruned == dense:
        pytest.skip("it has a single key/value head")
    found = written_and_read(name, pruned, name in NEW_PRUNINGS[pruning])
    if found is None:
        return
    written, read = found
    assert not written.keys() & {"block_configs", "per_layer_config"}
    if find_spec("transformers") is not None:
        from simulator.models.traced import trace, transformers_config

        built = trace(transformers_config(written, name), name).parameters
        experts = [s for s in read.sublayers if isinstance(s, Experts)]
        biases = sum(one.routes for one in experts)  # buffers in most classes
        assert built in (read.parameters, read.parameters + biases, read.parameters - biases)


def test_layers_of_hybrids_keep_their_kinds() -> None:
    dense, content = load_model("nemotron-nano-12b-v2"), content_of("nemotron-nano-12b-v2")
    written = config_content(content, dense, prune_model(dense, "depth layers=0,1,7,8"))
    assert changed_keys(content, written) == {
        "num_hidden_layers": 58,
        "hybrid_override_pattern": content["hybrid_override_pattern"][2:7]
        + content["hybrid_override_pattern"][9:],
    }
    dense, content = load_model("lfm2-1.2b"), content_of("lfm2-1.2b")
    written = config_content(content, dense, prune_model(dense, "depth layers=0,2 + width mlp=0.5"))
    assert changed_keys(content, written) == {
        "num_hidden_layers": 14,
        "full_attn_idxs": [3, 6, 8, 10, 12],
        "block_auto_adjust_ff_dim": False,  # 12,288 was adjusted to 8,192
        "block_ff_dim": 4096,
    }
    dense, content = load_model("kimi-linear-48b-a3b"), content_of("kimi-linear-48b-a3b")
    stated = config_content(content, dense, prune_model(dense, "depth layers=0,3"))
    inside = stated["linear_attn_config"]
    assert inside["full_attn_layers"] == [6, 10, 14, 18, 22, 25]  # numbers from 1
    assert (inside["kda_layers"][:4], stated["first_k_dense_replace"]) == ([1, 2, 3, 4], 0)


def test_the_limit_of_time_steps_may_be_infinite(tmp_path: Path) -> None:
    content = {**content_of("nemotron-nano-9b-v2"), "time_step_limit": [0.0, float("inf")]}
    file = write_config(tmp_path, content)
    assert load_model(file.parent).layers == load_model("nemotron-nano-9b-v2").layers


def test_layers_of_puzzle_are_those_of_their_blocks() -> None:
    name = "nemotron-3-puzzle-75b-a9b"
    puzzle, content = load_model(name), content_of(name)
    sizes = [(s.inner, s.active) for s in puzzle.sublayers if isinstance(s, Experts)]
    assert (sizes[0], sizes[11], sizes[-1]) == ((1280, 4.0), (1536, 14.0), (2048, 18.0))
    pruned = prune_model(puzzle, "depth layers=0,1")
    written = config_content(content, puzzle, pruned)
    assert changed_keys(content, written) == {
        key: content[key][2:] for key in ("block_configs", "layers_block_type")
    }
    assert from_hf_config(written, name=name) == pruned
    blocks = [dict(block) for block in content["block_configs"]]
    blocks[1] |= {"n_routed_experts": 256}
    fewer = from_hf_config({**content, "block_configs": blocks})
    # up and down projections of 256 experts, and rows and biases of the router
    assert puzzle.parameters - fewer.parameters == 256 * (2 * 1024 * 1280 + 4096 + 1)
    for key in ("ssm_state_size", "num_key_value_heads"):
        blocks[1] = content["block_configs"][1] | {key: 8}
        with pytest.raises(InputError, match=rf"block_configs\[1\].{key}: is not understood"):
            from_hf_config({**content, "block_configs": blocks})


def test_gpt_oss_has_experts_and_windows_by_layer() -> None:
    content, dense = content_of("gpt-oss-20b"), load_model("gpt-oss-20b")
    blocks = [
        {
            "attention": {"num_key_value_heads": 8, "window_length": 128 * (i % 3 > 0)},
            "ffn": {"moe": {"num_local_experts": 32 if i < 12 else 16}},
        }
        for i in range(24)
    ]
    model = from_hf_config({**content, "block_configs": blocks})
    assert model.windows == (0, 128, 128) * 8
    # an expert has three products of 2,880 x 2,880 with biases, and a row and a bias of the router
    expert = 3 * 2880 * 2880 + 3 * 2880 + 2881
    assert dense.parameters - model.parameters == 12 * 16 * expert
