"""Embeddings per layer, shared caches, attention experts and convolved attention: numbers of small
models as Transformers 5.24 builds and runs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tables import tables_of

from simulator.capacity import cache_bytes
from simulator.codes import Kind
from simulator.errors import InputError
from simulator.models.checkpoint import Tensor, from_tensors
from simulator.models.library import from_hf_config
from simulator.models.lower import lower
from simulator.models.model import Model
from simulator.models.sublayers import Experts, SharedCacheAttention
from simulator.models.write import config_content, states
from simulator.pruning import prune
from simulator.workload import Workload, WorkloadBatch

pytestmark = pytest.mark.quick

BASES = tables_of("models/configs.yaml")["bases"]
CASES = tables_of("models/cases.yaml")
GEMMA3N, SHARING = BASES["caches_gemma3n"], BASES["caches_sharing"]
MIXED, JETMOE, ZAYA = (CASES["bases"][name] for name in ("mixed", "jetmoe", "zaya"))


def held(w: Workload) -> float:
    return float(cache_bytes(WorkloadBatch.of([w]))[0])


@pytest.mark.parametrize(
    ("data", "parameters", "cache", "flops"),
    [
        # parameters of the class; bytes of its cache (bf16) and FLOPs of its products (torch's
        # FlopCounterMode; without the weighted sums of AltUp) for two prompts of 8 tokens
        (GEMMA3N, 353_840, 12_288, 10_652_928),
        (SHARING, 408_072, 16_384, 8_286_208),  # layers that share run for the last token alone
        (MIXED, 546_416, 20_480, 16_728_064),
        (JETMOE, 145_728, 6_144, 4_407_296),
        (ZAYA, 136_357, 8_640, None),
    ],
)
def test_parameters_cache_and_products_are_those_of_transformers(
    data: dict[str, Any], parameters: int, cache: int, flops: int | None
) -> None:
    model = from_hf_config(data)
    w = lower(model, phase="prefill", batch=2, seq=8, engine="hf")
    assert (model.parameters, w.parameters) == (parameters, parameters)
    assert held(w) == cache
    products = np.isin(w.kind, (Kind.GEMM, Kind.EXPERTS))
    assert flops in (None, w.flops[products].sum())
    assert held(lower(model, phase="decode", batch=2, seq=7, engine="hf")) == cache


def test_layers_that_share_a_cache_read_it_and_write_none() -> None:
    w = lower(from_hf_config(SHARING), phase="decode", batch=2, seq=99, engine="vllm").expand()
    own, shared = (w.layer[w.is_role(role)] for role in ("attention", "shared_attention"))
    assert (own.tolist(), shared.tolist()) == ([*range(7)], [7, 8, 9])
    assert w.layer[w.is_role("cache_write")].tolist() == [*range(7)]
    # each sequence reads 16 positions of the window, and 100 in the last layer: two heads of 16 or
    # 32 keys and values, beside queries and outputs of four heads, in bf16
    by_hand = [2 * 2 * (2 * 2 * 16 * 16 + 2 * 4 * 16)] * 2 + [
        2 * 2 * (2 * 2 * 32 * 100 + 2 * 4 * 32)
    ]
    assert w.bytes[w.is_role("shared_attention")].tolist() == by_hand
    # queries alone are normed and rotated, although vLLM's product makes keys and values too
    last = w.layer == 9
    assert w.n[w.is_role("rotary") & last].tolist() == [4 * 32]
    assert w.n[w.is_role("qkv") & last].tolist() == [(4 + 2 * 2) * 32]


def test_inputs_of_all_layers_are_made_at_once() -> None:
    w = lower(from_hf_config(GEMMA3N), phase="decode", batch=3, seq=9, engine="vllm")
    rows = w.take(w.is_role("layer_inputs"))
    assert rows.n.tolist() == [80, 80, 80]  # 8 features of 10 layers
    assert rows.flops.sum() == 2 * 3 * 80 * 64
    # a token reads its embeddings, not the tables; projections and embeddings are added
    assert rows.read_bytes.tolist() == [3 * 80 * 2, 0, 3 * 160 * 2]
    assert rows.params.tolist() == [128 * 80, 80 * 64, 0]
    gates = w.is_role("layer_gate", "layer_output")
    assert w.flops[gates].sum() == 2 * 10 * 2 * 3 * 64 * 8
    assert w.flops[w.is_role("laurel_in", "laurel_out")].sum() == 2 * 10 * 2 * 3 * 64 * 4


def test_devices_do_not_add_what_each_computes_whole() -> None:
    w = lower(from_hf_config(GEMMA3N), phase="decode", devices=2, engine="vllm").expand()
    assert np.bincount(w.layer[w.is_role("all_reduce") & (w.layer >= 0)]).tolist() == [2] * 10


def stated_again(data: dict[str, Any], pruning: str) -> tuple[Model, dict[str, Any]]:
    """Return the pruned model and its configuration, which states the same layers."""
    dense = from_hf_config(data)
    pruned = prune(lower(dense, phase="decode", engine="hf"), pruning).meta.config
    content = config_content(data, dense, pruned)
    assert states(content, pruned)
    assert from_hf_config(content).parameters == pruned.parameters
    return pruned, content


def test_fewer_layers_have_fewer_tables_and_share_one_cache() -> None:
    pruned, content = stated_again(SHARING, "depth 0.2")
    assert content["num_kv_shared_layers"] == 1
    tables = 2 * 8 * (3 * 64 + 128)
    layers = from_hf_config(SHARING).parameters - pruned.parameters - tables
    sharing = 2 * (64 * 4 * 16 + 16 + 4 * 16 * 64 + 3 * 64 * 192 + 5 * 64)
    assert layers == sharing
    attentions = [layer.of("attention") for layer in pruned.layers]
    assert [isinstance(a, SharedCacheAttention) and a.reads_cache for a in attentions].count(
        True
    ) == 1


def test_experts_beside_an_mlp_are_pruned_alone() -> None:
    pruned, content = stated_again(MIXED | {"top_k_experts": 2}, "experts 0.5")
    assert content["num_experts"] == 2
    experts = pruned.layers[0].of("mlp")
    assert isinstance(experts, Experts)
    assert (experts.experts, experts.shared_inner) == (2, 96)


def test_a_list_of_widths_stays_a_list() -> None:
    widths = [96] * 5 + [128] * 5
    _, content = stated_again(GEMMA3N | {"intermediate_size": widths}, "width mlp=0.5")
    assert content["intermediate_size"] == [48] * 5 + [64] * 5


@pytest.mark.parametrize("data", [GEMMA3N, SHARING, MIXED, JETMOE, ZAYA])
def test_a_checkpoint_of_transformers_is_that_of_its_config(data: dict[str, Any]) -> None:
    transformers, torch = map(pytest.importorskip, ("transformers", "torch"))
    config = transformers.AutoConfig.for_model(**data)
    with torch.device("meta"):
        built = transformers.AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(value.shape) for name, value in built.state_dict().items()}
    tensors = {name: Tensor("BF16", shape) for name, shape in shapes.items()}
    model = from_hf_config(data)
    assert from_tensors(model, tensors, Path("x")).layers == model.layers
    if data["model_type"] == "gemma3n_text":  # released files hold keys and values of all layers
        unused = {"model.layers.9.self_attn.k_proj.weight": Tensor("BF16", (32, 64))}
        assert from_tensors(model, tensors | unused, Path("x")).layers == model.layers
        with pytest.raises(InputError, match="layer 1: expected"):
            from_tensors(
                model, tensors | {"model.layers.1.x.weight": Tensor("BF16", (2,))}, Path("x")
            )
