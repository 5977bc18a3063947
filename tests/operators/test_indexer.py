"""Indexers and attention to the positions that they select: work, bytes and cache counted by
hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from operator_times import indexer_time

from simulator.capacity import cache_bytes
from simulator.codes import Kind
from simulator.hardware.library import load_hardware
from simulator.models.library import from_hf_config, load_model
from simulator.models.lower import lower
from simulator.models.sublayers import LatentAttention, Sublayer
from simulator.models.sublayers.indexer import Indexer
from simulator.prediction.table import speedup
from simulator.pruning import prune
from simulator.workload import Workload, WorkloadBatch

pytestmark = pytest.mark.quick

# 64 index heads of 128 features, 2,048 positions: DeepSeek-V3.2
LATENT: dict[str, Any] = {
    **{"hidden_size": 512, "num_attention_heads": 8, "vocab_size": 1000, "num_hidden_layers": 2},
    **{"intermediate_size": 256, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 64, "n_shared_experts": 1, "q_lora_rank": 96, "kv_lora_rank": 64},
    **{"qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 48},
    **{"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048},
}
DEEPSEEK = from_hf_config({"model_type": "deepseek_v32", **LATENT}, "deepseek")
# the second layer attends to the positions that the first selected
SHARED = from_hf_config(
    {"model_type": "glm_moe_dsa", "indexer_types": ["full", "shared"], **LATENT}, "shared"
)
COMPRESSED = from_hf_config(
    {
        **{"model_type": "deepseek_v4", "hidden_size": 512, "num_attention_heads": 8},
        **{"vocab_size": 1000, "num_hidden_layers": 3, "q_lora_rank": 96, "head_dim": 64},
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
        **{"o_groups": 2, "o_lora_rank": 32, "sliding_window": 128, "index_topk": 512},
        **{"index_n_heads": 64, "index_head_dim": 128, "compress_ratios": [0, 4, 128]},
    },
    "compressed",
)


def rows_of(w: Workload, role: str) -> Workload:
    return w.take(w.is_role(role))


def cached(w: Workload) -> float:
    return float(cache_bytes(WorkloadBatch.of([w]))[0])


@pytest.mark.parametrize(
    ("phase", "batch", "seq", "pairs", "selected"),
    [
        # pairs of queries and scored keys; pairs of queries and keys that attention computes
        ("decode", 8, 9999, 10_000, 2048),
        ("prefill", 1, 4096, 4096 * 4097 // 2, 2048 * 2049 // 2 + 2048 * 2048),
        ("prefill", 2, 1000, 1000 * 1001 // 2, 1000 * 1001 // 2),
    ],
)
def test_work_and_bytes_by_hand(
    phase: str, batch: int, seq: int, pairs: int, selected: int
) -> None:
    w = lower(DEEPSEEK, phase=phase, batch=batch, seq=seq, engine="vllm")
    decodes = phase == "decode"
    queries, positions = (1, seq + 1) if decodes else (seq, seq)
    layers = 2
    index = rows_of(w, "indexer")
    assert index.flops.sum() == layers * batch * 2 * 64 * 128 * pairs
    # fp8 queries and keys, fp32 weights of heads, fp32 scale of a key, int32 positions
    query, key = 64 * (128 + 4) + 4 * min(2048, positions), 128 + 4
    assert index.bytes.sum() == layers * batch * (queries * query + positions * key)
    attention = rows_of(w, "attention")
    absorbs = seq > 2048  # shorter prompts have keys and values of every head
    width = (64 + 16) + 64 if absorbs else (32 + 16) + 48
    assert attention.flops.sum() == layers * batch * 2 * 8 * width * selected
    if decodes:
        # selected latent vectors, queries and outputs in 16 bits
        moved = 2 * (2048 * (64 + 16) + 8 * ((64 + 16) + 64))
        assert attention.bytes.sum() == layers * batch * moved
    # the cache keeps all positions: latent vectors in 16 bits, and keys of the indexer
    stored = -(-positions // 16) * 16  # whole blocks of vLLM
    assert cached(w) == layers * batch * stored * (2 * (64 + 16) + key)


def test_compressed_caches_by_hand() -> None:
    """Entries of 4 positions, of which an indexer selects 512, and of 128 positions."""
    w = lower(COMPRESSED, phase="decode", batch=2, seq=9999, engine="vllm")
    # window; window and selected entries; window and all entries
    seen = [128, 128 + 512, 128 + 10_000 // 128]
    attention = rows_of(w, "attention")
    assert attention.flops.tolist() == [2 * 2 * 8 * (64 + 64) * many for many in seen]
    vector = 2 * 64
    assert attention.bytes.tolist() == [2 * vector * (many + 2 * 8) for many in seen]
    index = rows_of(w, "indexer")
    assert index.flops.sum() == 2 * 2 * 64 * 128 * 2500
    stored = [128, 128 + 2500, 128 + 78]
    assert cached(w) == 2 * (vector * sum(stored) + 2500 * (128 + 4))
    prompt = rows_of(
        lower(COMPRESSED, phase="prefill", batch=1, seq=3000, engine="vllm"), "attention"
    )
    positions = np.arange(1, 3001)
    near = np.minimum(positions, 128)
    by_hand = [near, near + np.minimum(positions // 4, 512), near + positions // 128]
    assert prompt.flops.tolist() == [2 * 8 * (64 + 64) * pairs.sum() for pairs in by_hand]


def test_layers_that_share_a_selection_have_no_indexer() -> None:
    w = lower(SHARED, phase="decode", batch=1, seq=8191, engine="vllm")
    assert rows_of(w, "indexer").count.sum() == 1
    assert (
        rows_of(w, "attention").bytes.sum()
        == rows_of(
            lower(DEEPSEEK, phase="decode", batch=1, seq=8191, engine="vllm"), "attention"
        ).bytes.sum()
    )
    assert cached(w) == 8192 * (2 * 2 * (64 + 16) + 128 + 4)


def test_transformers_masks_and_computes_all_positions() -> None:
    masked, sparse = (
        rows_of(lower(DEEPSEEK, phase="decode", batch=1, seq=8191, engine=engine), "attention")
        for engine in ("hf", "vllm")
    )
    assert masked.pairs[0] == 8192
    assert sparse.pairs[0] == 2048


def test_a_quarter_as_many_keys_take_less_time() -> None:
    for q_len in (1, 4096):
        sizes = [8, q_len, 65536, 64, 128]
        whole, quarter = (
            indexer_time(*sizes, *keys, load_hardware("h100")).seconds
            for keys in ((2048, 1, 128), (512, 4, 32))
        )
        assert quarter < whole


def test_selection_pays_for_long_contexts() -> None:
    dense, hw = load_model("deepseek-v3"), load_hardware("h200")
    indexer = Indexer(heads=64, features=128, rank=1536)

    def selecting(sublayer: Sublayer) -> Sublayer:
        latent = isinstance(sublayer, LatentAttention)
        return replace(sublayer, topk=2048, indexer=indexer) if latent else sublayer

    sparse = replace(dense, layers=tuple(layer.each(selecting) for layer in dense.layers))

    def gain(seq: int) -> float:
        request = {"phase": "decode", "batch": 64, "seq": seq, "engine": "vllm"}
        return float(speedup(lower(dense, **request), lower(sparse, **request), hw).speedup)

    assert gain(1000) < 1.0 < gain(130_000)


def test_indexers_stay_with_their_attention_when_pruned() -> None:
    w = lower(DEEPSEEK, phase="decode", batch=1, seq=8191, engine="vllm")
    assert not prune(w, "depth attention=0.99").is_role("indexer", "index_q", "attention").any()
    narrow = prune(w, "width heads=0.5")
    assert rows_of(narrow, "attention").heads.tolist() == [4]
    assert rows_of(narrow, "indexer").heads.tolist() == [64]
    assert (narrow.kind == Kind.INDEXER).sum() == 1


def test_dropped_positions_are_not_scored() -> None:
    request = {"phase": "generate", "batch": 1, "seq": 8000, "new_tokens": 8, "engine": "vllm"}
    w = lower(DEEPSEEK, **request)
    for family, share in (("token start=0", 0.5), ("kv_cache", 0.25)):
        name, *options = family.split()
        pruned = prune(w, f"{name} {share}" + "".join(f" {option}" for option in options))
        for role in ("indexer", "attention"):
            rows = rows_of(pruned, role)
            decode = rows.phase == 1
            assert (rows.kv_len[decode] - 8000 * (1 - share)).max() == 8
            prefill = rows.kv_len[~decode]
            assert (prefill == (4000 if name == "token" else 8000)).all()
