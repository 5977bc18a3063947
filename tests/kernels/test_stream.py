"""Kernels on a stream: a pass is its rows, a graph adds gaps, eager mode is the slower of host and device."""

from __future__ import annotations

import numpy as np
import pytest

import simulator
from simulator.errors import InputError
from simulator.kernels.stack import EAGER_KERNELS, Stack
from simulator.kernels.stream import cost, operator_times, passes
from simulator.workload import Kind, Workload


@pytest.fixture(scope="module")
def hw() -> simulator.HardwareProfile:
    return simulator.load_hardware("a100")


def _lower(**setting: object) -> Workload:
    return simulator.lower(simulator.load_model("llama-3.1-8b"), **setting)  # type: ignore[arg-type]


@pytest.mark.parametrize("runtime", ["cuda_graph", "eager"])
def test_a_pass_of_several_workloads_is_that_of_each(hw: simulator.HardwareProfile, runtime: str) -> None:
    settings = {"seq": 300}, {"phase": "decode", "batch": 7, "seq": 900}, {"phase": "decode", "dtype": "fp16"}
    stack = Stack.of([_lower(**setting) for setting in settings])
    (p,) = passes(stack, hw, (runtime,))
    np.testing.assert_allclose(p.row_s, p.time.seconds * stack.rows.count, rtol=1e-12)
    np.testing.assert_allclose(stack.total(p.row_s), p.device_s, rtol=1e-12)
    np.testing.assert_allclose(stack.total(p.share), 1.0, rtol=1e-12)
    for i, start in enumerate(stack.starts):
        rows = slice(start, start + stack.lengths[i])
        alone = cost(stack.rows.take(np.arange(rows.start, rows.stop)), hw, runtime)
        np.testing.assert_allclose(p.time.upper[rows], alone.upper, rtol=1e-12)
        for name in ("total_s", "device_s", "gap_s", "host_s", "host_bound"):
            assert getattr(p, name)[i] == pytest.approx(getattr(alone, name), rel=1e-12)
    if runtime == "cuda_graph":
        launches = stack.total(stack.rows.count)
        np.testing.assert_allclose(p.gap_s, hw.section("runtime", "*")["graph_gap_s"] * launches, rtol=1e-12)
        np.testing.assert_allclose(p.total_s, p.device_s + p.gap_s, rtol=1e-12)
        assert not p.host_s.any()


def test_eager_is_host_bound_in_small_decode_and_device_bound_in_prefill() -> None:
    fast = simulator.load_hardware("h100")
    decode, prefill = _lower(phase="decode", batch=1, seq=128), _lower(phase="prefill", batch=4, seq=2048)
    eager, graph = cost(decode, fast, "eager"), cost(decode, fast)
    groups = Stack.of([decode]).groups
    assert eager.host_bound
    assert eager.host_s == pytest.approx(groups.count[0] @ groups.kernels * fast.section("runtime", "*")["host_op_s"])
    assert eager.total_s >= max(eager.host_s, graph.total_s)
    long = cost(prefill, fast, "eager")
    assert not long.host_bound
    # the host runs ahead: only the first launches are waited for
    assert long.total_s == pytest.approx(long.device_s, rel=0.01)


def test_eager_counts_the_kernels_of_unfused_operators() -> None:
    w = _lower(phase="decode", batch=1, seq=128)
    groups = Stack.of([w]).groups
    kernels = groups.kernels[groups.of_row]
    assert set(kernels[w.is_role("mlp_norm")]) == {EAGER_KERNELS["mlp_norm"]}
    assert set(kernels[w.kind == Kind.GEMM]) == {1.0}


def test_ideal_roofline_is_the_larger_of_flops_and_bytes(hw: simulator.HardwareProfile) -> None:
    gemm = {"role": "q", "m": 1, "n": 4096, "k": 4096}
    (p,) = passes(Stack.of([Workload.from_rows([gemm, gemm | {"m": 4096, "count": 3}])]), hw)
    small, large = p.ideal_s
    assert small == pytest.approx(2 * (4096 * 4096 + 2 * 4096) / hw.bandwidth_bytes_per_s)
    assert large == pytest.approx(3 * 2 * 4096**3 / hw.peak_flop_per_s("bf16"))


def test_two_formats_in_one_workload_are_timed_each_in_its_own(hw: simulator.HardwareProfile) -> None:
    rows = [{"role": "q", "m": 512, "n": 4096, "k": 4096, "dtype": code, "weight_dtype": code} for code in (0, 3)]
    both = operator_times(Workload.from_rows(rows), hw).seconds
    alone = [operator_times(Workload.from_rows([row]), hw).seconds[0] for row in rows]
    assert both.tolist() == alone
    assert both[0] > both[1]


def test_an_unknown_runtime_is_refused(hw: simulator.HardwareProfile) -> None:
    with pytest.raises(InputError, match="runtime 'jit' is unknown; expected cuda_graph or eager"):
        cost(_lower(phase="decode"), hw, "jit")
