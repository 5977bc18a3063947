"""Hybrids: states in memory as Transformers allocates them, layers of one sublayer, blocks of shared
weights, loops, and pruning of Mamba."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from tables import tables_of

import simulator
from simulator.errors import InputError
from simulator.models.library import from_hf_config
from simulator.models.lower import lower
from simulator.models.model import Model
from simulator.models.sublayers import Attention, Mamba2
from simulator.pruning import prune_model

CASES = tables_of("models/cases.yaml")
TINY: dict[str, dict[str, Any]] = CASES["hybrids"]
NEMOTRON: dict[str, Any] = {**TINY["nemotron_h"], "model_type": "nemotron_h"}


def model_of(content: dict[str, Any], **changes: Any) -> Model:
    return from_hf_config({**content, **changes})


def tensors_of(cache: Any, torch: Any) -> Iterator[Any]:
    """Yield the tensors of all layers of a cache of Transformers, and its own lists of states."""
    for holder in (cache, *cache.layers):
        for value in vars(holder).values():
            several = value.values() if isinstance(value, dict) else value
            for one in several if isinstance(several, list | type({}.values())) else [several]:
                if isinstance(one, torch.Tensor) and one.dim():
                    yield one


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_memory_of_states_is_what_transformers_allocates(kind: str, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(kind, **{"pad_token_id": 0, **TINY[kind]})
    of_torch = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=of_torch).eval()
    model = from_hf_config(json.loads(json.dumps(config.to_dict())))
    assert model.parameters == sum(p.numel() for p in theirs.parameters())
    with torch.no_grad():
        out = theirs(torch.ones((2, 12), dtype=torch.int64), use_cache=True)
        name = next(k for k in ("past_key_values", "cache_params", "cache") if k in out)
        theirs(torch.ones((2, 1), dtype=torch.int64), use_cache=True, cache=out[name])
    held = sum(one.numel() * one.element_size() for one in tensors_of(out[name], torch))
    w = lower(model, phase="decode", batch=2, seq=12, engine="hf", dtype=dtype)
    assert simulator.memory(w, "cpu").cache_bytes == held


@pytest.mark.quick
def test_a_layer_of_nemotron_h_has_one_sublayer() -> None:
    model = model_of(NEMOTRON)
    kinds = [[sublayer.kind for sublayer in layer.sublayers] for layer in model.layers]
    assert kinds == [["mamba"], ["mlp"], ["attention"], ["mamba"]]
    assert (model.heads, model.inner) == (4, 96)
    names = ["mamba", "mlp", "attention", "mamba"]
    assert model_of(NEMOTRON, hybrid_override_pattern=None, layers_block_type=names) == model


@pytest.mark.quick
def test_a_puzzle_states_experts_by_layer() -> None:
    blocks = [
        {"block_type": "mamba"},
        {"block_type": "moe", "moe_intermediate_size": 32, "num_experts_per_tok": 2},
        {"block_type": "attention"},
        {"block_type": "moe", "moe_intermediate_size": 16, "num_experts_per_tok": 1},
    ]
    sizes = {"n_routed_experts": 8, "moe_shared_expert_intermediate_size": 48}
    model = model_of(NEMOTRON, hybrid_override_pattern=None, block_configs=blocks, **sizes)
    routed = [layer.sublayers[0] for layer in model.layers[1::2]]
    assert [(e.inner, e.active, e.gated) for e in routed] == [(32, 2.0, False), (16, 1.0, False)]


@pytest.mark.quick
def test_blocks_of_shared_weights_count_once_and_run_every_time() -> None:
    model = model_of({**TINY["zamba2"], "model_type": "zamba2"})
    attentions = [s for s in model.sublayers if isinstance(s, Attention)]
    assert [attention.reused for attention in attentions] == [False, False, True]
    w = lower(model, phase="decode", batch=1, seq=8)
    assert w.parameters == model.parameters
    assert w.count[w.is_role("attention")].sum() == 3


@pytest.mark.quick
@pytest.mark.parametrize(("pruning", "sizes"), CASES["mamba_widths"])
def test_width_prunes_heads_channels_and_state_of_mamba(pruning: str, sizes: list[int]) -> None:
    pruned = prune_model(model_of(NEMOTRON), pruning)
    (mixer,) = pruned.layers[0].sublayers
    assert isinstance(mixer, Mamba2)
    heads, channels, state = sizes
    assert [mixer.heads, mixer.channels, mixer.state] == sizes
    inner, shared = heads * channels, 2 * 2 * state
    products = 64 * (2 * inner + shared + heads) + inner * 64
    assert mixer.parameters(64) == products + (inner + shared) * 5 + 3 * heads + inner


@pytest.mark.quick
@pytest.mark.parametrize(
    ("pruning", "kinds"),
    [
        ("depth mamba=0.5", ["mlp", "attention", "mamba"]),
        ("depth attention=0.9", ["mamba", "mlp", "mamba"]),
        ("depth 0.5", ["mamba", "mamba"]),
    ],
)
def test_depth_removes_layers_by_kind(pruning: str, kinds: list[str]) -> None:
    pruned = prune_model(model_of(NEMOTRON), pruning)
    assert [sublayer.kind for sublayer in pruned.sublayers] == kinds


@pytest.mark.quick
def test_depth_removes_one_of_two_sublayers_side_by_side() -> None:
    model = model_of({**TINY["falcon_h1"], "model_type": "falcon_h1", "mamba_d_state": 16})
    pruned = prune_model(model, "depth mamba=0.5")
    counts = [len(layer.sublayers) for layer in pruned.layers]
    # the deepest layers except the last; attention keeps the norm of their input
    assert counts == [3, 2, 2, 3]
    mamba = model.layers[0].sublayers[0].parameters(64)
    assert model.parameters - pruned.parameters == 2 * mamba
    assert lower(pruned, phase="prefill", seq=8).parameters == pruned.parameters


@pytest.mark.quick
def test_mamba_has_heads_of_one_channel() -> None:
    model = model_of({**TINY["mamba"], "model_type": "mamba"})
    pruned = prune_model(model, "width mamba_heads=0.25")
    assert pruned.sizes("Mamba heads") == [96]
    with pytest.raises(InputError, match="each head of Mamba has one channel"):
        prune_model(model, "width mamba_channels=0.25")
