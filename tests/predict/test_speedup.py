"""Dense and pruned workloads to speedups: bounds by hand, exact waterfalls, intervals that cancel where they should."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import simulator
from simulator.pruning import FAMILIES
from simulator.workload import Workload


def _dense(model: str = "llama-3.1-8b", **setting: object) -> Workload:
    return simulator.lower(simulator.load_model(model), **setting)  # type: ignore[arg-type]


def _sparsity(family: str) -> float:
    return 0.5 if family == "semi_structured" else 0.25


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("runtime", ["cuda_graph", "eager"])
def test_waterfall_multiplies_exactly_to_the_prediction(family: str, phase: str, runtime: str) -> None:
    hw = simulator.load_hardware("h100")
    dense = _dense(phase=phase, batch=2, seq=1024)
    pruned = simulator.prune(dense, family, sparsity=_sparsity(family))
    steps = simulator.waterfall(dense, pruned, hw, runtime)
    s = simulator.speedup(dense, pruned, hw, runtime)
    assert steps[0].speedup == pytest.approx(1 / (1 - _sparsity(family)))
    assert math.prod(step.factor for step in steps) == pytest.approx(s.speedup, rel=1e-12)
    assert steps[-1].speedup == pytest.approx(s.speedup, rel=1e-12)
    by_name = {step.name: step.speedup for step in steps}
    assert by_name["parts not pruned"] == pytest.approx(s.flop_bound)
    assert by_name["memory-bound operators"] == pytest.approx(s.roofline_bound)


@given(
    family=st.sampled_from(sorted(FAMILIES)),
    gpu=st.sampled_from(["a100", "h100", "4090"]),
    phase=st.sampled_from(["prefill", "decode", "generate"]),
    batch=st.integers(1, 64),
    seq=st.integers(1, 4096),
)
@settings(max_examples=60, deadline=None)
def test_sparsity_zero_is_the_identity(family: str, gpu: str, phase: str, batch: int, seq: int) -> None:
    dense = _dense(phase=phase, batch=batch, seq=seq, new_tokens=3 if phase == "generate" else 0)
    s = simulator.speedup(dense, simulator.prune(dense, family, sparsity=0.0), simulator.load_hardware(gpu))
    for value in (s.speedup, s.lower, s.upper, s.flop_bound, s.byte_bound, s.roofline_bound):
        assert value == pytest.approx(1.0, abs=1e-9)


def test_bounds_of_depth_by_hand() -> None:
    dense = _dense(phase="decode", batch=1, seq=2048)
    s = simulator.speedup(dense, simulator.prune(dense, "depth", sparsity=0.25), simulator.load_hardware("a100"))
    hidden, inner, kv, vocab = 4096, 14336, 1024, 128256
    layer = 2 * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner) + 4 * hidden * 2049
    head = 2 * hidden * vocab
    assert s.flop_bound == pytest.approx((32 * layer + head) / (24 * layer + head))
    assert s.realised_sparsity == 0.25


def test_the_interval_holds_the_speedup_and_is_tight_where_shapes_did_not_change() -> None:
    hw = simulator.load_hardware("h100")
    dense = _dense(phase="prefill", batch=1, seq=2048)
    depth, width = (simulator.speedup(dense, simulator.prune(dense, f, sparsity=0.25), hw) for f in ("depth", "width"))
    for s in (depth, width):
        assert s.lower < s.speedup < s.upper
    assert math.log(depth.upper / depth.lower) < 0.2 * math.log(width.upper / width.lower)


def test_a_wider_level_gives_a_wider_interval() -> None:
    hw = simulator.load_hardware("a100")
    dense = _dense(phase="prefill", batch=1, seq=512)
    pruned = simulator.prune(dense, "width", sparsity=0.3)
    narrow, wide = (simulator.speedup(dense, pruned, hw, level=level) for level in (0.5, 0.95))
    assert wide.lower < narrow.lower < narrow.speedup == wide.speedup < narrow.upper < wide.upper


@pytest.mark.parametrize("gpu", ["a100", "h100", "4090"])
@pytest.mark.parametrize(("phase", "batch"), [("prefill", 1), ("decode", 1)])
def test_an_odd_width_is_slower_than_its_aligned_neighbour_and_the_waterfall_says_so(
    gpu: str, phase: str, batch: int
) -> None:
    hw = simulator.load_hardware(gpu)
    dense = _dense("llama-2-7b", phase=phase, batch=batch, seq=2048)
    odd, even = (
        simulator.prune(dense, "width", sparsity={"mlp": 1 - inner / 11008}, inner=inner) for inner in (8810, 8816)
    )
    slow, fast = (simulator.speedup(dense, w, hw) for w in (odd, even))
    assert slow.speedup < fast.speedup
    step = {s.name: s.factor for s in simulator.waterfall(dense, odd, hw)}
    assert step["alignment"] < 0.99
    assert {s.name: s.factor for s in simulator.waterfall(dense, even, hw)}["alignment"] == pytest.approx(1.0)


def test_eager_decode_gains_by_depth_not_by_width() -> None:
    hw = simulator.load_hardware("h100")
    dense = _dense(phase="decode", batch=1, seq=256)
    depth, width = (
        simulator.speedup(dense, simulator.prune(dense, f, sparsity=0.25), hw, "eager") for f in ("depth", "width")
    )
    assert depth.limit == width.limit == "host"
    assert width.speedup == pytest.approx(1.0, abs=0.02)
    assert depth.speedup > 1.25


def test_unstructured_zeros_have_bounds_but_no_speedup() -> None:
    dense = _dense(phase="prefill", batch=1, seq=2048)
    s = simulator.speedup(dense, simulator.prune(dense, "unstructured", sparsity=0.5), simulator.load_hardware("a100"))
    assert s.flop_bound > 1.8
    assert s.speedup == pytest.approx(1.0)
    assert 0.0 <= s.efficiency < 1e-9 or s.efficiency == pytest.approx(0.0, abs=1e-9)


def test_families_compose_and_the_speedup_knows_all_of_them() -> None:
    dense = _dense(phase="decode", batch=8, seq=2048)
    both = simulator.prune(simulator.prune(dense, "depth", sparsity=0.25), "width", sparsity=0.25)
    s = simulator.speedup(dense, both, simulator.load_hardware("a100"))
    assert s.family == "depth+width"
    assert s.sparsity == pytest.approx(1 - 0.75 * 0.75)
    alone = [
        simulator.speedup(dense, simulator.prune(dense, f, sparsity=0.25), simulator.load_hardware("a100")).speedup
        for f in ("depth", "width")
    ]
    assert s.speedup > max(alone)


def test_many_speedups_at_once_equal_each_alone() -> None:
    hw = simulator.load_hardware("4090")
    dense = _dense(phase="decode", batch=16, seq=777)
    pruned = [simulator.prune(dense, family, sparsity=_sparsity(family)) for family in FAMILIES]
    for together, w in zip(simulator.speedups(dense, pruned, hw), pruned, strict=True):
        alone = simulator.speedup(dense, w, hw)
        got = [together.speedup, together.lower, together.upper, together.roofline_bound]
        np.testing.assert_allclose(got, [alone.speedup, alone.lower, alone.upper, alone.roofline_bound], rtol=1e-12)
        assert together.limit == alone.limit
