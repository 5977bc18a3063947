"""Models with different layers, routed experts or latent attention: rows against numbers computed
by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from shaped import Sizes, sizes_of
from tables import tables_of

from simulator.capacity import cache_bytes
from simulator.codes import ROLES, Kind
from simulator.models.library import from_hf_config, load_model
from simulator.models.lower import lower
from simulator.models.sublayers import LatentAttention
from simulator.workload import Workload, WorkloadBatch

pytestmark = pytest.mark.quick

BASES = tables_of("models/configs.yaml")["bases"]
PUZZLE, DEEPSEEK = BASES["layers_puzzle"], BASES["layers_deepseek"]


def one(w: Workload, role: str) -> dict[str, Any]:
    (at,) = np.flatnonzero(w.is_role(role))
    return {name: getattr(w, name)[at].item() for name in ("m", "n", "k", "count", "params")}


def test_experts_of_mixtral() -> None:
    model, tokens = load_model("mixtral-8x7b"), 512
    w = lower(model, phase="prefill", batch=1, seq=tokens, skew=0)
    row = w.take(w.kind == Kind.EXPERTS)
    weights = 3 * 4096 * 14336  # one expert has gate, up and down projections
    assert row.flops.tolist() == [32 * 2 * (2 * tokens) * weights]  # a token uses two
    assert row.params.tolist() == [8 * weights]
    assert one(w, "router") == {"m": tokens, "n": 8, "k": 4096, "count": 32, "params": 8 * 4096}
    # three tokens of a decode, each at two of eight: a fourth of 8 idle with probability (3/4)^3
    few = lower(model, phase="decode", batch=3, seq=100, skew=0, engine="")
    few = few.take(few.kind == Kind.EXPERTS)
    touched = 8 * (1 - 0.75**3)
    assert few.weight_bytes_each.tolist() == pytest.approx([2 * weights * touched])
    assert row.weight_bytes_each.tolist() == pytest.approx([2 * weights * 8])


@pytest.mark.parametrize("parallel", ["tensor", "expert"])
def test_mixtral_on_eight(parallel: str) -> None:
    """Each device has an eighth of every expert, or a whole expert; router and norms are on every
    device."""
    model = load_model("mixtral-8x7b")
    one, part = (
        lower(model, phase="prefill", batch=2, seq=64, devices=n, parallel=parallel) for n in (1, 8)
    )
    for kind in (Kind.EXPERTS, Kind.PREFILL_ATTENTION):
        assert part.flops[part.kind == kind].sum() * 8 == one.flops[one.kind == kind].sum()
    held = part.take(part.kind == Kind.EXPERTS)
    shapes = (held.experts[0], held.active[0], held.n[0])
    assert shapes == ((8, 2, 1792) if parallel == "tensor" else (1, 0.25, 14336))
    whole = 32 * (8 * 4096 + 2 * 4096) + 4096
    assert part.parameters == (46_702_792_704 - whole) / 8 + whole
    assert part.is_role("all_reduce").sum() == 3


def test_biases_of_latent_attention() -> None:
    plain, biased = (from_hf_config(DEEPSEEK | {"attention_bias": flag}) for flag in (False, True))
    # of the projections to both ranks and of the output, in 4 layers
    assert biased.parameters - plain.parameters == 4 * (1536 + (32 + 8) + 768)
    w = lower(biased, phase="decode", batch=1, seq=10, engine="vllm")
    assert w.parameters == biased.parameters


def test_latent_attention_of_deepseek() -> None:
    model, batch, seq = load_model("deepseek-v3"), 2, 999
    assert model.latent == LatentAttention(
        heads=128, query_rank=1536, rank=512, rotary=64, plain=128, value=128
    )
    w = lower(model, phase="decode", batch=batch, seq=seq)
    attention = w.take(w.is_attention)
    queries = 61 * batch * 128 * (576 + 512) * 2  # queries and outputs of every head
    assert attention.bytes.sum() == 61 * 576 * 2 * (seq + 1) * batch + queries
    assert attention.flops.sum() == 61 * 2 * batch * 128 * (576 + 512) * (seq + 1)
    stored = -(-(seq + 1) // 16) * 16  # whole blocks of vLLM
    assert cache_bytes(WorkloadBatch.of([w])).tolist() == [61 * 576 * 2 * stored * batch]
    first = w.take(w.layer == 0)
    shapes = {ROLES[r]: (int(n), int(k)) for r, n, k in zip(first.role, first.n, first.k) if k}
    latent = {"qkv_a": (1536 + 576, 7168), "q_b": (128 * 192, 1536), "absorb_k": (128 * 512, 128)}
    rest = {
        "absorb_v": (128 * 128, 512),
        "o": (7168, 128 * 128),
        "gate_up": (2 * 18432, 7168),
        "down": (7168, 18432),
    }
    assert shapes == latent | rest
    prompt = lower(model, phase="prefill", batch=batch, seq=seq)
    attention = prompt.take(prompt.is_attention)
    assert attention.flops.sum() == 61 * 2 * batch * 128 * (192 + 128) * seq * (seq + 1) / 2
    # Transformers caches the keys and values of every head
    eager = lower(model, phase="decode", batch=batch, seq=seq, engine="hf")
    assert cache_bytes(WorkloadBatch.of([eager])).tolist() == [
        61 * 128 * (192 + 128) * 2 * (seq + 1) * batch
    ]
    assert eager.is_role("kv_b").any()
    # every device keeps the latent whole
    part = lower(model, phase="decode", batch=batch, seq=seq, devices=8, parallel="expert")
    assert cache_bytes(WorkloadBatch.of([part])).tolist() == [61 * 576 * 2 * stored * batch]
    assert (part.n[part.is_role("q_b")] == 16 * 192).all()


def test_layers_of_a_search() -> None:
    """Groups have 4 and 8 heads; MLPs have 512 and 768 (563 rounded up to 256); one product
    replaces a sublayer."""
    model = from_hf_config(PUZZLE)
    layers = (Sizes(8, 2, 512), Sizes(0, 0, 768), Sizes(0, 0, 0, linear=("attention",)))
    assert tuple(map(sizes_of, model.layers)) == (*layers, Sizes(8, 1, 0, linear=("mlp",)))
    assert model.windows == (0, 0, 0, 64)
    h = 768
    attention = 2 * h * h + 2 * h * 2 * 96 + h, 0, h * h + h, 2 * h * h + 2 * h * 96 + h
    mlp = 3 * h * 512 + h, 3 * h * 768 + h, 0, h * h + h
    assert [model.parameters_of(layer) for layer in model.layers] == [
        a + b for a, b in zip(attention, mlp)
    ]
    for phase in ("prefill", "decode"):
        for engine in ("", "vllm", "hf"):
            w = lower(model, phase=phase, batch=2, seq=100, engine=engine)
            assert w.parameters == model.parameters == sum(attention) + sum(mlp) + 2 * 100 * h + h
    assert sorted(w.layer[w.is_role("attention")].tolist()) == [0, 3]
    assert w.window[w.is_role("attention")].tolist() == [0, 64]
    part = lower(model, phase="prefill", devices=2)
    assert part.k[part.is_role("linear")].tolist() == [h // 2] * 2  # inputs shared out
    assert part.kv_heads[part.is_role("attention")].tolist() == [1, 1]
