"""Will it run: shapes that each stock engine loads, divides and has kernels for, and the gain of an
aligned width."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layouts import folder_of, save, tensors_of
from shaped import changed, cut, resized
from tables import tables_of

import simulator
from simulator.engines import engine as engines
from simulator.engines.engine import FEATURES
from simulator.errors import InputError
from simulator.models.architectures import ARCHITECTURES, NESTED
from simulator.models.model import Model
from simulator.prediction.prunings import Pruning
from simulator.prediction.runnable import Runnable, aligned_up, runnable, runnables, will_run
from simulator.pruning import FAMILIES, prune_model
from simulator.request import Request

pytestmark = pytest.mark.quick

LLAMA = simulator.load_model("llama-2-7b")
H100 = simulator.load_hardware("h100")
SERVERS = ("vllm", "sglang", "trtllm")
STOCK = (*SERVERS, "hf", "compile")
RAMP = [0.1 if layer < 16 else 0.3 for layer in range(32)]


def asked(engine: str, pruning: Pruning, model: str | Model = LLAMA, **fields: Any) -> Runnable:
    return runnable(Request(model=model, engine=engine, phase="decode", **fields), pruning)


def family(name: str, sparsity: Any, **options: Any) -> Pruning:
    return Pruning.of(name, sparsity, options)


def per_layer(engine: str, sparsity: list[float] = RAMP, **options: Any) -> Runnable:
    dense = simulator.lower(LLAMA, phase="decode", engine=engine)
    return will_run(simulator.prune(dense, "width", sparsity, **options))


def sized(**sizes: Any) -> Model:
    return resized(LLAMA, name="pruned", **sizes)


def existing(engine: str, model: Model, **fields: Any) -> Runnable:
    return asked(engine, Pruning.of_model(LLAMA, model), **fields)


@pytest.mark.parametrize(
    ("name", "sparsity", "options", "loading"),
    tables_of("prediction/cases.yaml")["loaded families"],
)
def test_which_stock_engine_loads_which_family(
    name: str, sparsity: Any, options: dict[str, Any], loading: str
) -> None:
    found = {
        engine: asked(engine, family(name, sparsity, **options)) for engine in (*STOCK, "reference")
    }
    assert [engine for engine in STOCK if found[engine].loadable] == loading.split()
    assert found["reference"].loadable  # a benchmark's modules are built for the shapes
    for engine, one in found.items():
        assert one.works == (one.loadable and one.kernels) or one.kernels_reason.endswith(
            "save no time"
        )
        if not one.loadable:
            assert one.sentence.startswith(f"No: stock {engine} does not load ")


def test_widths_by_layer_need_nemotron_nas_and_equal_heads() -> None:
    heads_too = per_layer("vllm")
    assert heads_too.loadable is False
    assert (
        heads_too.load_reason
        == "query heads that differ by layer: it reads one num_attention_heads for all layers"
    )
    dense = simulator.lower(LLAMA, phase="decode", engine="vllm")
    odd = changed(LLAMA, lambda i, one: cut(one, "mlp", inner=8192 if i < 16 else 10008))
    found = {e: existing(e, odd) for e in STOCK}
    assert [e for e in STOCK if found[e].loadable] == ["vllm"]  # 10,008 is no multiple of 256
    assert (
        found["vllm"].load_reason
        == "with intermediate_size in block_configs (model_type nemotron-nas)"
    )
    assert "multiples of 256, not 10,008" in found["sglang"].load_reason
    assert found["hf"].load_reason.startswith(
        "MLP widths that differ by layer: it builds equal layers"
    )
    even = changed(LLAMA, lambda i, one: cut(one, "mlp", inner=8192 if i < 16 else 9984))
    assert all(existing(e, even).loadable for e in SERVERS)
    qwen = simulator.load_model("qwen3-8b")
    pruned = changed(qwen, lambda i, one: cut(one, "mlp", inner=8192 if i else 4096))
    other = asked("vllm", Pruning.of_model(qwen, pruned), qwen)
    assert other.load_reason.endswith("only for model_type llama and nemotron-nas, not for qwen3")
    assert will_run(dense).loadable


def test_query_heads_alone_must_fill_equal_groups() -> None:
    uneven, even = (
        asked("vllm", Pruning.read(f"width heads={s}"), "llama-3.1-8b") for s in (0.2, 0.25)
    )
    assert uneven.load_reason == (  # 26 heads on 8 KV heads
        "query heads that are not a multiple of the key/value heads: its attention asserts equal"
        " groups"
    )
    # 24 heads on 8 in a hidden size of 4,096; Transformers refuses them for Llama
    assert (
        even.load_reason
        == "with head_dim in config.json and with model_type mistral in config.json (sliding_window"
        " null), because the configuration of Llama requires heads that divide the hidden size"
    )
    half = asked("vllm", Pruning.read("width heads=0.5"), "llama-3.1-8b")
    assert half.load_reason == "with head_dim in config.json"  # 16 heads divide it
    refused = asked("vllm", Pruning.read("width heads=0.25"), "gemma-2-9b")
    assert refused.load_reason.startswith("query heads that do not divide the hidden size: ")


@pytest.mark.parametrize(
    ("options", "loads"),
    [("", True), ("fewer=active", True), ("fewer=average", False), ("merged=true", False)],
)
def test_experts_of_a_fixed_number_are_loaded(options: str, loads: bool) -> None:
    found = asked("vllm", Pruning.read(f"experts 0.25 {options}"), "mixtral-8x7b")
    assert found.loadable is loads
    assert loads or found.load_reason.startswith(
        "experts that a map, or a number per token, selects after the router"
    )


@pytest.mark.parametrize("name", simulator.list_models())
def test_every_dense_model_is_one_that_transformers_loads(name: str) -> None:
    found = will_run(simulator.lower(simulator.load_model(name), phase="decode", engine="hf"))
    assert found.works
    assert found.aligned
    if name in ("nemotron-super-49b", "nemotron-3-puzzle-75b-a9b"):
        assert found.load_reason == "with trust_remote_code"
    else:
        assert found.load_reason in (
            "with its shapes in config.json",
            "with head_dim in config.json",
        )


def test_what_an_aligned_width_gains_by_hand() -> None:
    odd, even = sized(inner=8810), sized(inner=8816)
    for engine in ("vllm", "hf"):
        request = Request(model=LLAMA, phase="prefill", engine=engine)
        found = runnable(request, Pruning.of_model(LLAMA, odd), H100)
        # 8,810 is 1,101.25 times the 8 elements of 16 bytes
        assert (found.unaligned_dimension, found.unaligned_width, found.aligned_width) == (
            "MLP width",
            8810,
            8816,
        )
        assert not found.aligned
        assert found.works
        dense = simulator.lower(request)
        seconds = [
            simulator.speedup(
                dense, simulator.lower(model, phase="prefill", engine=engine), H100
            ).pruned_s
            for model in (odd, even)
        ]
        assert found.aligned_gain == pytest.approx(seconds[0] / seconds[1], rel=1e-6)
        assert found.aligned_gain > 1.05
        assert found.aligned_gain_lower
        assert found.aligned_gain_upper
        assert found.aligned_gain_lower < found.aligned_gain < found.aligned_gain_upper
        assert found.sentence.startswith(
            f"Yes, but MLP width 8,810 is not aligned; 8,816 is {found.aligned_gain:.2f}x"
        )
        assert runnable(request, Pruning.of_model(LLAMA, even), H100).aligned
    without = runnable(Request(model=LLAMA), Pruning.of_model(LLAMA, odd))
    assert without.aligned_gain is None
    assert (
        without.sentence
        == "Yes, but MLP width 8,810 is not aligned; the nearest aligned width is 8,816."
    )


@pytest.mark.parametrize(
    ("model", "dimension", "width", "aligned"),
    tables_of("prediction/cases.yaml")["unaligned"],
)
def test_other_widths_that_are_not_aligned(
    model: dict[str, Any], dimension: str, width: int, aligned: int
) -> None:
    found = runnable(
        Request(model=LLAMA, engine="hf"), Pruning.of_model(LLAMA, sized(**model)), H100
    )
    assert (found.unaligned_dimension, found.unaligned_width, found.aligned_width) == (
        dimension,
        width,
        aligned,
    )
    assert (found.aligned_gain is None) == (dimension != "hidden size")  # heads are not padded


def assert_alike(ours: simulator.Workload, theirs: simulator.Workload) -> None:
    for name in ours.SCHEMA:
        np.testing.assert_allclose(
            getattr(ours, name), getattr(theirs, name), rtol=1e-12, err_msg=name
        )


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize(
    ("name", "odd", "even"),
    [
        ("llama-2-7b", {"inner": 8810, "hidden": 4090}, {"inner": 8816, "hidden": 4096}),
        ("qwen3-30b-a3b", {"expert_inner": 700}, {"expert_inner": 704}),
    ],
)
def test_an_aligned_model_is_the_one_lowered_at_those_widths(
    phase: str, name: str, odd: dict[str, int], even: dict[str, int]
) -> None:
    model = resized(simulator.load_model(name), qkv_bias=True, o_bias=True)
    for engine in ("vllm", "hf"):
        ours, theirs = (
            simulator.lower(one, phase=phase, engine=engine)
            for one in (aligned_up(resized(model, **odd), 8), resized(model, **even))
        )
        assert_alike(ours, theirs)


def test_an_aligned_rank_is_that_of_the_family() -> None:
    odd, even = (prune_model(LLAMA, f"low_rank 0.3 align={align}") for align in (1, 16))
    assert odd != even
    assert aligned_up(odd, 16) == even


def test_devices_divide_heads_and_widths_of_the_whole_model() -> None:
    pruned = sized(heads=26, kv_heads=26, inner=8816)
    alone, two, eight = (existing("vllm", pruned, devices=n) for n in (1, 2, 8))
    assert (alone.divisible, two.divisible, eight.divisible) == (True, True, False)
    assert alone.tensor_parallel == (1, 2)
    reason = (
        "26 attention heads; tensor parallel needs a multiple of 8; the nearest sizes are 24 and"
        " 32: width attention=24"
    )
    assert eight.divisible_reason == reason
    assert eight.works is False
    refused = (
        "stock vllm does not load this config.json as it is: its class refuses heads that do not"
        " divide the hidden size; change model_type to mistral and sliding_window to null"
    )
    assert eight.sentence.startswith(f"No: {refused}; it has {reason}.")
    # 8 KV groups become 6
    plan = asked("vllm", family("width", 0.2), "llama-3.1-8b", devices=8)
    assert plan.divisible_reason == (
        "6 key/value heads; tensor parallel needs a multiple or a divisor of 8; the nearest sizes"
        " are 4 and 8: width kv=4"
    )
    for model, text in (("llama-2-7b", "width attention=24"), ("llama-3.1-8b", "width kv=4")):
        assert asked("vllm", Pruning.read(text), model, devices=8).works
    assert asked("vllm", family("width", 0.5), "llama-3.1-8b", devices=8).tensor_parallel == (
        1,
        2,
        4,
        8,
        16,
    )
    long = asked("vllm", family("depth", 0.75), "llama-3.1-8b", devices=16, parallel="pipeline")
    assert long.divisible_reason == "8 layers; a pipeline has at most one device per layer"
    moe = asked("vllm", family("experts", 0.25), "mixtral-8x7b", devices=4, parallel="expert")
    assert not moe.divisible
    assert "6 experts; expert parallel needs a multiple of 4" in moe.divisible_reason
    with pytest.raises(
        InputError, match="expected a model on one device, got a share of 2 devices"
    ):
        will_run(simulator.lower(LLAMA, devices=2))


def test_alignment_is_that_of_the_share_of_each_device() -> None:
    found = existing("vllm", sized(inner=8816), devices=4)  # 2,204 each: not a multiple of 8
    assert (found.unaligned_width, found.aligned_width, found.divisible) == (8816, 8832, True)
    assert "MLP width 8,816 over 4 devices is not aligned" in found.sentence
    assert existing("vllm", sized(inner=8832), devices=4).aligned


def test_kernels_of_formats_and_families() -> None:
    half = family("semi_structured", 0.5)
    assert "2:4" in asked("vllm", half).kernels_reason
    assert not asked("vllm", half).works
    assert asked("hf", half).kernels
    v100 = simulator.load_hardware("v100")
    on_v100 = runnable(Request(model=LLAMA, engine="hf", dtype="fp16", phase="decode"), half, v100)
    assert "no 2:4 sparse tensor cores" in on_v100.kernels_reason
    zeros = asked("vllm", family("unstructured", 0.5))
    assert zeros.works
    assert not zeros.kernels
    assert (
        zeros.sentence
        == "Yes, but dense kernels compute its scattered zeros, so they save no time."
    )
    assert asked("vllm", family("unstructured", 0.5, kernel="spmv")).works is False
    assert asked(
        "hf", Pruning.of_model(LLAMA, LLAMA), weight_dtype="fp8"
    ).kernels_reason.startswith("hf has no kernels")
    narrow = asked("vllm", family("width", 0.2), weight_dtype="int4")
    # Marlin: 69 times 128
    assert (narrow.works, narrow.aligned, narrow.aligned_width) == (True, False, 8832)
    assert narrow.aligned_gain is None  # not modelled
    blocks = asked("vllm", family("width", 0.2), dtype="fp8", weight_dtype="fp8_block")
    assert blocks.works is False
    assert "multiples of 128 per device for fp8_block" in blocks.kernels_reason
    for engine in STOCK:
        for name in ("sparse_attention", "kv_cache", "token", "dynamic_depth", "dynamic_width"):
            has = engine == "trtllm" and name in ("sparse_attention", "kv_cache")
            assert asked(engine, family(name, 0.5)).kernels == has


def checkpoint(at: Path, model: Model, **config: Any) -> Model:
    """A folder with the tensors of a model, and the config.json of the dense model with other
    keys."""
    at.mkdir(exist_ok=True)
    folder = folder_of(at, "llama-2-7b")
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | config))
    save(folder / "model.safetensors", tensors_of(model))
    return simulator.load_model(folder)


NARROW = sized(heads=26, kv_heads=26, inner=8810).layers[0]
LLM_PRUNER = changed(LLAMA, lambda i, one: NARROW if 4 <= i < 30 else one, name="pruned")


def test_a_checkpoint_whose_config_states_other_shapes_is_not_loaded(tmp_path: Path) -> None:
    model = checkpoint(tmp_path, LLM_PRUNER)
    for engine in STOCK:
        found = existing(engine, model)
        assert found.loadable is False
        assert found.load_reason.startswith(
            "tensors that differ from config.json (width in layers 4-29: 26 of 32 heads"
        )
        assert "query heads that differ by layer" in found.load_reason
        assert (found.unaligned_width, found.aligned_width) == (8810, 8816)


def test_equal_layers_only_need_another_config(tmp_path: Path) -> None:
    even = sized(inner=8816)
    stale = checkpoint(tmp_path / "stale", even)
    assert existing("vllm", stale).loadable is False
    assert existing("vllm", stale).load_reason.endswith("; write its shapes into config.json")
    # what one prunes gets a new config.json
    assert asked("vllm", family("depth", 0.25), stale).loadable
    right = checkpoint(tmp_path / "right", even, intermediate_size=8816)
    assert (right.mismatch, right.custom_code) == ("", "")
    assert all(existing(engine, right).loadable for engine in STOCK)


def test_code_in_the_repository_is_for_transformers(tmp_path: Path) -> None:
    code = {"AutoModelForCausalLM": "modeling_pruned.PrunedForCausalLM"}
    model = checkpoint(tmp_path, LLM_PRUNER, auto_map=code)
    assert model.custom_code == "modeling_pruned.PrunedForCausalLM"
    found = {engine: existing(engine, model) for engine in STOCK}
    assert [engine for engine in STOCK if found[engine].loadable] == ["hf"]
    assert found["hf"].load_reason == "with trust_remote_code"
    assert "modelling code in the repository of the model (modeling_pruned.PrunedForCausalLM)" in (
        found["vllm"].load_reason
    )


def test_a_file_of_ones_own_that_states_nothing_is_not_known(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text('schema_version: 1\nname: mine\ntitle: "mine"\nstacks: [vllm]\nsources: {}\n')
    found = asked(str(path), family("depth", 0.25))
    assert (found.loadable, found.works) == (None, None)
    assert (
        found.sentence
        == "Not known: the file of engine mine does not state whether it loads layers of equal"
        " shapes, fewer or narrower than in the dense model."
    )
    # it names no kernels for it
    assert asked(str(path), family("dynamic_depth", 0.25)).works is False


@pytest.mark.parametrize("name", simulator.list_engines())
def test_every_shipped_engine_states_all_features_with_a_source(name: str) -> None:
    engine = engines.load_engine(name)
    assert engine.loads.keys() == FEATURES.keys()
    assert all(FAMILIES[family].dynamic for family in engine.dynamic)
    for one in engine.loads.values():
        assert {*one.model_types} <= {*ARCHITECTURES, *NESTED}
        assert one.source in engine.sources


def test_kernels_of_a_dynamic_family_may_need_an_architecture() -> None:
    pruning, request = (
        Pruning.read("kv_cache 0.5"),
        Request(model=LLAMA, phase="decode", engine="trtllm"),
    )
    hopper, blackwell = (
        runnable(request, pruning, simulator.load_hardware(name)) for name in ("h100", "b200")
    )
    assert (hopper.works, blackwell.works) == (False, True)
    assert (
        "has kernels for kv_cache only on blackwell and blackwell_sm100 (algorithm rocket"
        in hopper.sentence
    )
    assert "loads it with algorithm rocket in sparse_attention_config" in blackwell.sentence
    found = simulator.table(
        LLAMA, ["b200", "h100"], prune="kv_cache 0.5", phase="decode", engine="trtllm"
    )
    hardware = [simulator.load_hardware(name) for name in ("b200", "h100")]
    assert [r.works for r in runnables(found, hardware)] == [True, False]


def test_a_decoder_without_layers_is_not_loaded() -> None:
    answer = asked("vllm", Pruning.read("depth 0.99"))
    assert answer.works is False
    assert answer.sentence == "No: stock vllm does not load a decoder without layers."
