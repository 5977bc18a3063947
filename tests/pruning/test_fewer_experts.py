"""Experts: removed, merged, or used by fewer tokens; numbers that papers state, and counts by hand."""

from __future__ import annotations

import numpy as np
import pytest

import simulator
from simulator.codes import ROLES
from simulator.pruning import prune
from simulator.pruning._methods import METHODS
from simulator.workload import Workload

pytestmark = pytest.mark.quick

QWEN3_CODER_480B = {  # huggingface.co/Qwen/Qwen3-Coder-480B-A35B-Instruct
    "model_type": "qwen3_moe", "hidden_size": 6144, "intermediate_size": 8192, "num_hidden_layers": 62,
    "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "max_position_embeddings": 262144, "tie_word_embeddings": False, "attention_bias": False, "num_experts": 160,
    "num_experts_per_tok": 8, "moe_intermediate_size": 2560, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "use_sliding_window": False,
}  # fmt: skip


def mixtral(batch: int = 16, **more: object) -> Workload:
    model = simulator.load_model("mixtral-8x7b")
    return simulator.lower(model, phase="decode", batch=batch, seq=2048, engine="", **more)  # type: ignore[arg-type]


def only(w: Workload, role: str, column: str) -> float:
    (value,) = set(getattr(w, column)[w.is_role(role)])
    return float(value)


def test_reap_has_the_parameters_of_the_published_checkpoints() -> None:
    """Qwen3-Coder-480B-A35B becomes Qwen3-Coder-REAP-363B-A35B at 25 %, and -246B-A35B at 50 %."""
    dense = simulator.lower(simulator.load_model(QWEN3_CODER_480B), phase="decode", batch=1, seq=128)
    assert round(dense.parameters / 1e9) == 480
    for sparsity, billions, kept in ((0.25, 363, 120), (0.5, 246, 80)):
        pruned = METHODS["reap"].prune(dense, sparsity)
        assert round(pruned.parameters / 1e9) == billions
        assert only(pruned, "router", "n") == only(pruned, "experts", "experts") == kept
        assert pruned.flops.sum() < dense.flops.sum()  # of the router alone: a token uses as many experts
        assert only(pruned, "experts", "active") == 8


def test_naee_removes_the_share_of_parameters_of_the_paper() -> None:
    """Mixtral 8x7B: 24 % of the parameters with 6 experts, 48 % with 4."""
    for sparsity, share in ((0.25, 0.24), (0.5, 0.48)):
        pruned = METHODS["naee"].prune(mixtral(), sparsity)
        assert 1 - pruned.parameters / mixtral().parameters == pytest.approx(share, abs=0.005)


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
    assert (only(pruned, "select", "read_bytes"), float(pruned.count[rows].sum())) == (16 * 2 * 4, 32)
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
    assert only(merged, "select", "write_bytes") == only(merged, "select", "read_bytes") == 16 * 2 * 4
    at = np.flatnonzero(merged.is_role("router", "select", "experts"))
    assert [ROLES[code] for code in merged.role[at]] == ["router", "select", "experts"]
    assert merged.overhead[at].tolist() == [False, True, False]
    bound = prune(dense, "experts", 0.5, merged=True, ideal=True)
    assert merged.take(~merged.overhead) == bound
