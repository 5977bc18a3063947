"""FLOPs and parameters of every family equal a count made from shapes in plain Python."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_decoder import DECODERS, Decoder, expected, workload

import simulator
from simulator.pruning import FAMILIES, prune
from simulator.workload import Workload

SPARSITIES = (0.1, 0.25, 0.5, 0.7)
SHAPES = {**DECODERS, "llama-3.1-8b": Decoder(4096, 32, 32, 8, 128, 14336, 128256)}


def counts(w: Workload) -> tuple[float, float]:
    own = ~w.overhead
    return float(w.flops[own].sum()), float((w.params * w.count)[own].sum())


OPTIONS = [
    *((family, {}) for family in FAMILIES),
    ("dynamic_depth", {"prune_kv": True}),
    *(("width", {"align": align}) for align in (1, 8)),
    ("token", {"start": 0}),
    ("token", {"start": 4, "mode": "static"}),
]


@pytest.mark.parametrize(("family", "options"), OPTIONS)
@pytest.mark.parametrize("phase", ["prefill", "decode", "generate"])
@pytest.mark.parametrize("name", SHAPES)
def test_flops_and_parameters(family: str, options: dict[str, object], phase: str, name: str) -> None:
    d = SHAPES[name]
    for s in SPARSITIES if family != "semi_structured" else (0.5,):
        for batch in (1, 3, 16, 40, 600):
            dense = workload(d, phase, batch)
            want = pytest.approx(expected(d, phase, batch, 48, 3, family, s, **options), rel=1e-12)
            assert counts(prune(dense, family, s, ideal=True, **options)) == want, (s, batch)
            assert counts(prune(dense, family, s, **options)) == want, (s, batch)


def test_parameters_of_llama_2_7b_at_width() -> None:
    """LLaMA-2-7B at 20 %: 26 of 32 heads (25.6) and an inner width of 8816, from the published shapes."""
    dense = simulator.lower(simulator.load_model("llama-2-7b"), phase="prefill", batch=1, seq=128)
    pruned = prune(dense, "width", 0.2)
    layer = 4 * 4096 * 26 * 128 + 3 * 4096 * 8816 + 2 * 4096
    assert pruned.parameters == 32 * layer + 2 * 32000 * 4096 + 4096
    realised = 1 - (4 * 26 * 128 + 3 * 8816) / (4 * 4096 + 3 * 11008)
    assert pruned.meta.applied[-1].realised == pytest.approx(realised, rel=1e-12)
    odd = prune(dense, "width", 0.2, inner=8810)
    assert set(odd.n[odd.is_role("gate", "up")]) == {8810} == set(odd.k[odd.is_role("down")])
    assert set(odd.k[odd.is_role("o")]) == {26 * 128}


def test_overhead_flops_are_those_of_router_and_projection() -> None:
    d = DECODERS["gqa"]
    for phase, tokens in (("prefill", 96), ("decode", 2)):
        dense = workload(d, phase, 2)
        for family, options, extra in (
            ("dynamic_depth", {}, 2 * 2 * tokens * 2 * 64),
            ("dynamic_depth", {"router": 1}, 2 * 2 * tokens * 64),
            ("dynamic_width", {"channel_groups": 11}, 2 * tokens * (4 + 11) * 64),
            ("width_cross", {"residual_projections": True}, 2 * 2 * tokens * 48 * 48),
        ):
            full, bound = (prune(dense, family, 0.25, ideal=ideal, **options) for ideal in (False, True))
            assert full.flops.sum() - bound.flops.sum() == pytest.approx(6 * extra)
            assert not bound.overhead.any()
            assert full.parameters - bound.parameters == pytest.approx(6 * extra / 2 / tokens)
            assert np.isclose(full.flops[full.overhead].sum(), 6 * extra)


def test_devices_prune_their_own_share() -> None:
    model = simulator.load_model("llama-3.1-8b")
    dense = simulator.lower(model, phase="decode", batch=4, seq=512, devices=2)
    pruned = prune(dense, "width", 0.4)
    # each device: 4 KV groups -> 2.4 -> 2, an inner width of 7168 -> 4300.8 -> 4304
    assert set(pruned.kv_heads[pruned.is_role("attention")]) == {2}
    assert set(pruned.n[pruned.is_role("q")]) == {2 * 4 * 128}
    assert set(pruned.k[pruned.is_role("down")]) == {4304}
    explicit = prune(dense, "width", 0.4, inner=8600)
    assert set(explicit.k[explicit.is_role("down")]) == {4300}
    # tokens that skip a sublayer are not reduced over the devices either
    reduced = prune(dense, "dynamic_depth", 0.5)
    inside = reduced.is_role("all_reduce") & (reduced.layer >= 0)
    assert float((reduced.read_bytes * reduced.count)[inside].sum()) == pytest.approx(2 * 32 * 2 * 4096 * 2)


def test_overheads_of_an_8_bit_model_move_its_16_bit_stream() -> None:
    dense = simulator.lower(simulator.load_model("llama-3.1-8b"), phase="prefill", batch=1, seq=1024, dtype="fp8")
    pruned = prune(dense, "dynamic_depth", 0.5)
    gather = pruned.is_role("gather")
    assert pruned.write_bytes[gather].tolist() == [512 * 4096 * 2] * 2
    assert set(pruned.dtype[pruned.overhead]) == set(dense.dtype[dense.is_role("attention_norm")])
