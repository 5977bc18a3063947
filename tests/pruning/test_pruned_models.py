"""Families on models with experts, a latent, or layers that differ; remaining tensors are counted
by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from model_shapes import PUBLISHED, expert_tensors, layer_tensors

from simulator.capacity import cache_bytes
from simulator.codes import ROLES, Kind
from simulator.errors import InputError
from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.pruning import FAMILIES, general_families, prune
from simulator.pruning._methods import METHODS
from simulator.workload import Workload, WorkloadBatch

pytestmark = pytest.mark.quick

MODELS = [
    "mixtral-8x7b",
    "deepseek-v3",
    "nemotron-super-49b",
    "qwen1.5-moe-a2.7b",
    "qwen3-next-80b-a3b",
]
# no kernels for experts and latents
DENSE = ["semi_structured", "low_rank", "unstructured", "dynamic_width"]


def layer_parameters(name: str, layer: int) -> int:
    p = PUBLISHED[name]
    dense, expert = (
        sum(math.prod(s) for s in f(p, layer)) for f in (layer_tensors, expert_tensors)
    )
    return dense + p.experts * expert


def shapes(w: Workload, *names: str) -> set[tuple[str, int, int]]:
    return {(ROLES[r], int(n), int(k)) for r, n, k in zip(w.role, w.n, w.k) if ROLES[r] in names}


@pytest.mark.parametrize("engine", ["vllm", "hf"])
@pytest.mark.parametrize("name", MODELS)
def test_work_never_grows(name: str, engine: str) -> None:
    """Only added rows are more work; families without a kernel for experts or latents refuse
    them."""
    routed = PUBLISHED[name].experts > 0
    for phase in ("prefill", "decode", "serve"):
        for devices in (1, 2):
            parallel, steps = "expert" if routed else "tensor", 9 * (phase == "serve")
            request = {"phase": phase, "batch": 3, "seq": 70, "new_tokens": steps, "engine": engine}
            w = lower(load_model(name), **request, devices=devices, parallel=parallel)
            for family in FAMILIES if routed else general_families():
                if routed and family in DENSE:
                    with pytest.raises(
                        InputError,
                        match="routed experts, latent attention and recurrent layers have",
                    ):
                        prune(w, family, 0.5)
                    continue
                kernels = FAMILIES[family].dynamic and "kernel" in FAMILIES[family].options
                pruned = prune(w, family, 0.5, **{"kernel": "gathered"} if kernels else {})
                own = pruned.take(~pruned.overhead)
                assert own == prune(w, family, 0.5, ideal=True)
                for column in ("flops", "bytes"):
                    assert getattr(own, column).sum() <= getattr(w, column).sum() * (1 + 1e-12), (
                        family
                    )
                assert own.parameters <= w.parameters * (1 + 1e-12)
                kept = family in ("dynamic_depth", "sparse_attention", "token", "kv_cache")
                assert not kept or own.parameters == pytest.approx(w.parameters, rel=1e-12)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_whole_layers_vanish(name: str, phase: str) -> None:
    p, w = PUBLISHED[name], lower(load_model(name), phase=phase, batch=2, seq=50)
    many = (p.layers + 1) // 2
    gone = range(p.layers - 1 - many, p.layers - 1)  # the deepest but the last
    left = p.parameters - sum(layer_parameters(name, layer) for layer in gone)
    pruned = prune(w, "depth", 0.5)
    assert pruned.parameters == pytest.approx(left, rel=1e-12)
    assert (pruned.layer + pruned.layers).max() == p.layers - many
    some = prune(w, "depth", layers=[0, 5])
    left = p.parameters - sum(layer_parameters(name, layer) for layer in (0, 5))
    assert some.parameters == pytest.approx(left, rel=1e-12)


@pytest.mark.parametrize(
    "part", ["depth attention", "depth mamba", "width attention", "width mamba_heads"]
)
def test_a_part_of_a_hybrid_is_its_kind_of_sublayer(part: str) -> None:
    (step,) = prune(lower("nemotron-nano-12b-v2", phase="decode"), f"{part}=0.5").meta.applied
    assert step.realised == pytest.approx(step.sparsity, rel=0.1)


def test_narrower_experts_and_heads() -> None:
    pruned = prune(
        lower(load_model("mixtral-8x7b"), phase="prefill", batch=1, seq=64), "width", 0.5
    )
    h, attention = 4096, 4096 * (2048 + 2 * 512) + 2048 * 4096
    layer = attention + 8 * 3 * h * 7168 + 8 * h + 2 * h
    assert pruned.parameters == 32 * layer + 2 * 32000 * h + h
    assert pruned.meta.applied[-1].realised == 0.5
    for phase, inside in (
        ("prefill", {("kv_b", 64 * 256, 512)}),
        ("decode", {("absorb_k", 64 * 512, 128)}),
    ):
        w = prune(lower(load_model("deepseek-v3"), phase=phase, batch=1, seq=64), "width", 0.5)
        own = shapes(w, "qkv_a", "q_b", "kv_b", "absorb_k", "o")
        assert own == {
            ("qkv_a", 2112, 7168),
            ("q_b", 64 * 192, 1536),
            ("o", 7168, 64 * 128),
            *inside,
        }
        attention = w.take(w.is_attention)
        assert set(attention.heads) == {64}
        assert set(attention.latent) == {576}
        assert shapes(w, "experts") == {("experts", 1024, 7168)}


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_delta_nets_lose_key_heads_with_their_value_heads(phase: str) -> None:
    """Half of 16 key heads and 32 value heads of 128 features go, in projections, convolution and
    state."""
    w = lower(load_model("qwen3-next-80b-a3b"), phase=phase, batch=4, seq=64)
    pruned = prune(w, "width", {"attention": 0.5})
    own = shapes(
        pruned, "delta_in", "delta_ba", "delta_net", "gated_norm", "output_gate", "qkv", "o"
    )
    delta = {
        ("delta_in", 6144, 2048),
        ("delta_ba", 32, 2048),
        ("delta_net", 2048, 0),
        ("gated_norm", 2048, 0),
    }
    attention = {("qkv", 4096 + 2 * 256, 2048), ("output_gate", 2048, 0)}
    assert own == delta | attention | {("o", 2048, 2048)}  # 8 of 16 heads of 256, 16 of 32 of 128
    nets = pruned.take(pruned.kind == Kind.DELTA_NET)
    assert (set(nets.heads), set(nets.kv_heads)) == ({16}, {8})
    # channels of the convolution, decays
    assert nets.params.tolist() == [4 * 4096 + 32] * len(nets)
    h, q = 2048, 8 * 256
    attends = h * (2 * q + 2 * 256) + q * h + 2 * 256 + 2 * h
    net = h * (6144 + 32) + 4 * 4096 + 32 + 128 + 2048 * h + 2 * h
    experts = 512 * 3 * h * 512 + 512 * h + 3 * h * 512 + h
    assert pruned.parameters == pytest.approx(
        12 * attends + 36 * net + 48 * experts + 2 * 151936 * h + h, rel=1e-12
    )
    assert cache_bytes(WorkloadBatch.of([pruned]))[0] < 0.51 * cache_bytes(WorkloadBatch.of([w]))[0]


def test_a_smaller_hidden_size_reaches_experts_and_latents() -> None:
    mixtral = lower(load_model("mixtral-8x7b"), phase="prefill", batch=1, seq=64)
    assert prune(mixtral, "width_cross", 0.5).parameters == pytest.approx(
        mixtral.parameters / 2, rel=1e-3
    )
    w = prune(
        lower(load_model("deepseek-v3"), phase="prefill", batch=1, seq=64), "width_cross", 0.5
    )
    inputs = {
        ("qkv_a", 2112, 3584),
        ("gate_up", 36864, 3584),
        ("gate_up", 4096, 3584),
        ("router", 256, 3584),
    }
    outputs = {
        ("o", 3584, 16384),
        ("down", 3584, 18432),
        ("down", 3584, 2048),
        ("experts", 2048, 3584),
    }
    ranks = {("q_b", 24576, 1536), ("kv_b", 32768, 512)}
    roles = ("qkv_a", "gate_up", "router", "o", "down", "experts", "q_b", "kv_b")
    assert shapes(w, *roles) == inputs | outputs | ranks


@pytest.mark.parametrize(
    ("model", "sparsity", "options", "message"),
    [
        ("llama-2-7b", 0.5, {}, "a model with routed experts, got llama-2-7b without them"),
        (
            "llama-2-7b",
            0.5,
            {"layers": [1, 2]},
            "a model with routed experts, got llama-2-7b without them",
        ),
        ("llama-2-7b", [0.25] * 32, {}, "a model with routed experts, got llama-2-7b without them"),
        (
            "llama-2-7b",
            0.5,
            {"fewer": "active"},
            "a model with routed experts, got llama-2-7b without them",
        ),
        (
            "deepseek-v3",
            0.5,
            {"layers": [0, 2]},
            "layers with routed experts, got layers of deepseek-v3 without them",
        ),
    ],
)
def test_experts_of_a_model_or_layers_without_them_are_rejected(
    model: str, sparsity: Any, options: dict[str, Any], message: str
) -> None:
    dense = lower(load_model(model), phase="prefill", batch=1, seq=8)
    with pytest.raises(InputError) as error:
        prune(dense, "experts", sparsity, **options)
    assert str(error.value) == f"family experts: expected {message}"
    zero = prune(dense, "experts", np.multiply(sparsity, 0.0).tolist(), **options)
    assert zero.flops.sum() == pytest.approx(dense.flops.sum(), rel=1e-12)


def test_fewer_experts() -> None:
    w = lower(
        load_model("qwen3-30b-a3b"),
        phase="prefill",
        batch=1,
        seq=4096,
        devices=8,
        parallel="expert",
    )
    pruned = prune(w, "experts", 0.25)
    rows = pruned.take(pruned.kind == Kind.EXPERTS)
    # 96 of 128, eight of them active, on eight
    assert (rows.experts.tolist(), rows.active.tolist()) == ([12], [1.0])
    assert pruned.n[pruned.is_role("router")].tolist() == [96]
    gone = 48 * (32 * 3 * 2048 * 768 / 8 + 32 * 2048)
    assert w.parameters - pruned.parameters == pytest.approx(gone, rel=1e-12)
    tokens = rows.flops.sum() / (2 * 48 * 3 * 2048 * 768)
    assert tokens == 4096  # as many as before, on fewer experts
    less = prune(w, "experts", 0.5, fewer="active")
    assert less.flops[less.kind == Kind.EXPERTS].sum() * 2 == w.flops[w.kind == Kind.EXPERTS].sum()
    assert less.parameters == w.parameters
    with pytest.raises(
        InputError, match=r"90 experts; .* the nearest sizes are 88 and 96: experts 88"
    ):
        prune(w, "experts", 0.3)


QWEN3_CODER_480B = {  # huggingface.co/Qwen/Qwen3-Coder-480B-A35B-Instruct
    "model_type": "qwen3_moe",
    "hidden_size": 6144,
    "intermediate_size": 8192,
    "num_hidden_layers": 62,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 262144,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "num_experts": 160,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2560,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "use_sliding_window": False,
}


def mixtral() -> Workload:
    return lower(load_model("mixtral-8x7b"), phase="decode", batch=16, seq=2048, engine="")


def only(w: Workload, role: str, column: str) -> float:
    (value,) = set(getattr(w, column)[w.is_role(role)])
    return float(value)


def test_reap_has_the_parameters_of_the_published_checkpoints() -> None:
    """Qwen3-Coder-480B-A35B becomes Qwen3-Coder-REAP-363B-A35B at 25 %, and -246B-A35B at 50 %."""
    dense = lower(load_model(QWEN3_CODER_480B), phase="decode", batch=1, seq=128)
    assert round(dense.parameters / 1e9) == 480
    for sparsity, billions, kept in ((0.25, 363, 120), (0.5, 246, 80)):
        pruned = METHODS["reap"].prune(dense, sparsity)
        assert round(pruned.parameters / 1e9) == billions
        assert only(pruned, "router", "n") == only(pruned, "experts", "experts") == kept
        # only the router: a token uses as many experts
        assert pruned.flops.sum() < dense.flops.sum()
        assert only(pruned, "experts", "active") == 8


def test_skipping_halves_the_second_expert() -> None:
    """Half of the tokens skip the second of two experts: 1.5 on average, all weights stay."""
    dense = mixtral()
    pruned = METHODS["naee-skip"].prune(dense, 0.25)
    assert only(pruned, "experts", "active") == 1.5
    assert dense.flops.sum() - pruned.flops.sum() == 32 * 16 * 0.5 * 3 * 2 * 4096 * 14336
    assert pruned.parameters == dense.parameters
    assert pruned.meta.applied[0].realised == 0.25
    # 16 tokens' two weights of 4 bytes, in 32 layers
    rows = pruned.is_role("select")
    assert (only(pruned, "select", "read_bytes"), float(pruned.count[rows].sum())) == (
        16 * 2 * 4,
        32,
    )
    assert not prune(dense, "experts", 0.25, fewer="average", ideal=True).overhead.any()
    rounded = prune(dense, "experts", 0.25, fewer="active")
    assert only(rounded, "experts", "active") == 2  # 1.5 rounds up
    assert only(prune(dense, "experts", 0.9, fewer="average"), "experts", "active") == 1


def test_merged_experts_keep_the_router_wide() -> None:
    dense = mixtral()
    removed, merged = (prune(dense, "experts", 0.5, merged=m) for m in (False, True))
    assert (only(removed, "router", "n"), only(merged, "router", "n")) == (4, 8)
    assert merged.parameters - removed.parameters == 32 * 4 * 4096
    for column in ("experts", "active", "params", "m", "n", "k"):
        assert only(merged, "experts", column) == only(removed, "experts", column)
    # a table maps two choices per token, indices of 4 bytes
    assert (
        only(merged, "select", "write_bytes") == only(merged, "select", "read_bytes") == 16 * 2 * 4
    )
    at = np.flatnonzero(merged.is_role("router", "select", "experts"))
    assert [ROLES[code] for code in merged.role[at]] == ["router", "select", "experts"]
    assert merged.overhead[at].tolist() == [False, True, False]
    bound = prune(dense, "experts", 0.5, merged=True, ideal=True)
    assert merged.take(~merged.overhead) == bound
