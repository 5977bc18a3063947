"""Kernels on a stream: batching changes nothing, a graph adds gaps, eager mode is the slower of host and device."""

from __future__ import annotations

import numpy as np
import pytest

import simulator
from simulator.errors import InputError
from simulator.kernels.stream import EAGER_KERNELS, cost, cost_batch, host_kernels, ideal_roofline, operator_times
from simulator.workload import DTYPE_BYTES, Kind, Workload

MODEL = "llama-3.1-8b"


@pytest.fixture(scope="module")
def hw() -> simulator.HardwareProfile:
    return simulator.load_hardware("a100")


def _lower(**setting: object) -> Workload:
    return simulator.lower(simulator.load_model(MODEL), **setting)  # type: ignore[arg-type]


def test_a_batch_of_workloads_costs_what_each_costs_alone(hw: simulator.HardwareProfile) -> None:
    workloads = [
        _lower(phase="prefill", seq=300),
        _lower(phase="decode", batch=7, seq=900),
        _lower(phase="decode", dtype="fp16", batch=2),
    ]
    for together, w in zip(cost_batch(workloads, hw), workloads, strict=True):
        alone = cost(w, hw)
        assert together.total_s == pytest.approx(alone.total_s, rel=1e-12)
        np.testing.assert_allclose(together.seconds, alone.seconds, rtol=1e-12)


def test_the_rows_add_up_to_the_pass(hw: simulator.HardwareProfile) -> None:
    w = _lower(phase="decode", batch=4, seq=1000)
    c = cost(w, hw)
    gap = hw.section("runtime", "*")["graph_gap_s"] * w.count.sum()
    assert c.total_s == pytest.approx(float((c.seconds * w.count).sum()) + gap)
    assert not c.host_bound
    assert c.host_s == 0.0


def test_eager_is_host_bound_in_small_decode_and_device_bound_in_prefill() -> None:
    fast = simulator.load_hardware("h100")
    decode, prefill = _lower(phase="decode", batch=1, seq=128), _lower(phase="prefill", batch=4, seq=2048)
    eager, graph = cost(decode, fast, "eager"), cost(decode, fast)
    launches = float((host_kernels(decode) * decode.count).sum())
    host_op_s = fast.section("runtime", "*")["host_op_s"]
    assert eager.host_bound
    assert eager.host_s == pytest.approx(launches * host_op_s)
    assert eager.total_s >= max(eager.host_s, graph.total_s)
    long = cost(prefill, fast, "eager")
    assert not long.host_bound
    assert long.total_s == pytest.approx(
        long.device_s, rel=0.01
    )  # the host runs ahead: only the first launches are waited for


def test_eager_counts_the_kernels_of_unfused_operators() -> None:
    w = _lower(phase="decode", batch=1, seq=128)
    norms = w.is_role("mlp_norm")
    assert host_kernels(w)[norms].tolist() == [EAGER_KERNELS["mlp_norm"]] * int(norms.sum())
    assert (host_kernels(w)[w.kind == Kind.GEMM] == 1).all()


def test_ideal_roofline_is_the_larger_of_flops_and_bytes(hw: simulator.HardwareProfile) -> None:
    w = Workload.from_rows(
        [{"role": "q", "m": 1, "n": 4096, "k": 4096}, {"role": "q", "m": 4096, "n": 4096, "k": 4096, "count": 3}]
    )
    small, large = ideal_roofline(w, hw)
    assert small == pytest.approx(2 * (4096 * 4096 + 2 * 4096) / hw.bandwidth_bytes_per_s)
    assert large == pytest.approx(2 * 4096**3 / hw.peak_flop_per_s("bf16"))
    assert DTYPE_BYTES[w.dtype[0]] == 2


def test_two_formats_in_one_workload_are_timed_each_in_its_own(hw: simulator.HardwareProfile) -> None:
    rows = [{"role": "q", "m": 512, "n": 4096, "k": 4096, "dtype": code, "weight_dtype": code} for code in (0, 3)]
    both = operator_times(Workload.from_rows(rows), hw).seconds
    alone = [operator_times(Workload.from_rows([row]), hw).seconds[0] for row in rows]
    assert both.tolist() == alone
    assert both[0] > both[1]


def test_an_unknown_runtime_is_refused(hw: simulator.HardwareProfile) -> None:
    with pytest.raises(InputError, match="runtime 'jit' is unknown; expected cuda_graph or eager"):
        cost(_lower(phase="decode"), hw, "jit")
