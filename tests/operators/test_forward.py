"""The time of a pass is that of its rows and of the gaps between them, in the engine that its
workloads name."""

from __future__ import annotations

from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

import simulator
from simulator.codes import ROLES, Kind, dtype_code
from simulator.engines.engine import load_engine
from simulator.errors import InputError
from simulator.uncertainty.forward import forward_passes, operator_times
from simulator.uncertainty.intervals import workload_time
from simulator.workload import Workload, WorkloadBatch

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def hw() -> simulator.HardwareProfile:
    return simulator.load_hardware("a100")


def _lower(**setting: object) -> Workload:
    return simulator.lower("llama-3.1-8b", **{"engine": "", **setting})  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ["", "reference", "vllm", "hf"])
def test_a_pass_of_several_workloads_is_that_of_each(
    hw: simulator.HardwareProfile, engine: str
) -> None:
    settings = (
        {"seq": 300},
        {"phase": "decode", "batch": 7, "seq": 900},
        {"phase": "decode", "dtype": "fp16"},
    )
    workloads = WorkloadBatch.of([_lower(**setting, engine=engine) for setting in settings])
    p = forward_passes(workloads, hw)
    np.testing.assert_allclose(p.row_s, p.time.seconds * workloads.rows.count, rtol=1e-12)
    np.testing.assert_allclose(workloads.total(p.row_s) + p.gap_s, p.device_s, rtol=1e-12)
    np.testing.assert_allclose(workloads.total(p.share) + p.gap_s / p.device_s, 1.0, rtol=1e-12)
    for i, start in enumerate(workloads.starts):
        rows = slice(start, start + workloads.lengths[i])
        alone = workload_time(workloads.rows.take(np.arange(rows.start, rows.stop)), hw)
        np.testing.assert_allclose(p.time.upper[rows], alone.upper, rtol=1e-12)
        for name in ("total_s", "device_s", "gap_s", "host_s", "host_bound"):
            assert getattr(p, name)[i] == pytest.approx(getattr(alone, name), rel=1e-12)
    if engine != "hf":
        launches = workloads.total(
            workloads.rows.count * load_engine(engine).kernels[workloads.rows.role]
        )
        gap = hw.section("runtime", "*")["graph_gap_s"] + load_engine(engine).gap.value
        np.testing.assert_allclose(p.gap_s, gap * launches, rtol=1e-12)
        np.testing.assert_allclose(p.total_s, p.device_s + p.host_s, rtol=1e-12)
        assert p.host_s.any() == (engine == "vllm")


def test_eager_is_host_bound_in_small_decode_and_device_bound_in_prefill() -> None:
    fast = simulator.load_hardware("h100")
    decode, prefill = (
        {"phase": "decode", "batch": 1, "seq": 128},
        {"phase": "prefill", "batch": 4, "seq": 2048},
    )
    eager, graph = (
        workload_time(_lower(**decode, engine="hf"), fast),
        workload_time(_lower(**decode), fast),
    )
    groups, hf = WorkloadBatch.of([_lower(**decode)]).groups, load_engine("hf")
    assert eager.host_bound
    launches = groups.count[0] @ hf.kernels[groups.role]
    assert eager.host_s == pytest.approx(
        launches * fast.section("runtime", "*")["host_op_s"] + hf.each_pass.value
    )
    assert eager.total_s >= max(eager.host_s, graph.total_s) * (1 - 1e-12)
    long = workload_time(_lower(**prefill, engine="hf"), fast)
    assert not long.host_bound
    # the host runs ahead: only the first launches are waited for
    assert long.total_s == pytest.approx(long.device_s, rel=0.01)


def test_eager_streams_the_data_of_every_kernel_of_an_unfused_operator(
    hw: simulator.HardwareProfile,
) -> None:
    workloads = WorkloadBatch.of([_lower(phase="decode", batch=1, seq=128, engine="hf")])
    w, p, launches = workloads.rows, forward_passes(workloads, hw), load_engine("hf").launches
    assert launches["mlp_norm"] > 1
    assert set(p.streams[w.is_role("mlp_norm")]) == {launches["mlp_norm"]}
    assert set(p.streams[w.kind != Kind.ELEMENTWISE]) == {1.0}  # one of them does the work
    assert p.gap_s.tolist() == [0.0]
    # each launched, whether it streams or not
    kernels = sum(
        launches.get(ROLES[role], 1) * count for role, count in zip(w.role, w.count, strict=True)
    )
    assert p.host.launch.sum() == pytest.approx(
        kernels * hw.section("runtime", "*")["host_op_s"], rel=1e-12
    )


def test_a_cpu_waits_after_every_kernel_and_launches_those_beside_itself(tmp_path: Path) -> None:
    hf = resources.files("simulator.engines").joinpath("hf.yaml").read_text(encoding="utf-8")
    mine = tmp_path / "mine.yaml"
    mine.write_text(hf.replace("launches:\n", "launches:\n  router: 4\n"))
    cpu, fp32 = simulator.load_hardware("cpu"), dtype_code("fp32")
    rows = [{"role": "router", "m": 1, "n": 64, "k": 64, "count": 3}]
    rows.append({"kind": Kind.ELEMENTWISE, "role": "activation", "read_bytes": 4096, "count": 5})
    w = Workload.from_rows([row | {"dtype": fp32, "weight_dtype": fp32} for row in rows])
    p = forward_passes(WorkloadBatch.of([w.replace(meta=replace(w.meta, engine=str(mine)))]), cpu)
    runtime, (router, activation) = cpu.section("runtime", "*"), operator_times(w, cpu).seconds
    # an activation is two kernels, which were timed as one
    waits, beside = 3 * 4 + 5 * 2, 3 * 3 + 5
    assert p.row_s == pytest.approx([3 * router, 5 * activation], rel=1e-12)
    assert p.gap_s[0] == pytest.approx(
        waits * runtime["graph_gap_s"] + beside * runtime["host_op_s"], rel=1e-12
    )


def test_ideal_roofline_is_the_larger_of_flops_and_bytes(hw: simulator.HardwareProfile) -> None:
    gemm = {"role": "q", "m": 1, "n": 4096, "k": 4096}
    p = forward_passes(
        WorkloadBatch.of([Workload.from_rows([gemm, gemm | {"m": 4096, "count": 3}])]), hw
    )
    small, large = p.ideal_s
    assert small == pytest.approx(2 * (4096 * 4096 + 2 * 4096) / hw.bandwidth_bytes_per_s)
    assert large == pytest.approx(3 * 2 * 4096**3 / hw.peak_flop_per_s("bf16"))


def test_an_engine_prefers_the_kernels_of_its_stack_and_a_stack_asked_for_stays() -> None:
    h100 = simulator.load_hardware("h100")
    for engine in ("vllm", "sglang", "trtllm"):
        workloads = WorkloadBatch.of([_lower(phase="decode", engine=engine)])
        first = next(name for name in load_engine(engine).stacks if name in h100.stacks)
        assert forward_passes(workloads, h100).hw.stack == first
        assert forward_passes(workloads, h100.on("trtllm")).hw.stack == "trtllm"
    assert forward_passes(WorkloadBatch.of([_lower(phase="decode")]), h100).hw is h100


def test_kernels_that_an_engine_lacks_are_refused(hw: simulator.HardwareProfile) -> None:
    half = simulator.prune(_lower(phase="decode", engine="vllm"), "semi_structured", 0.5)
    with pytest.raises(
        InputError,
        match="vllm has no 2:4 kernels; these engines have: compile, hf, reference, trtllm",
    ):
        workload_time(half, hw)
    eight = simulator.prune(
        _lower(phase="decode", engine="hf", dtype="fp8"), "semi_structured", 0.5
    )
    with pytest.raises(
        InputError,
        match="hf has no fp8 2:4 kernels; these engines have: compile, reference, trtllm",
    ):
        workload_time(eight, simulator.load_hardware("h100"))
    narrow = simulator.prune(
        _lower(phase="decode", engine="vllm", weight_dtype="fp8"), "semi_structured", 0.5
    )
    with pytest.raises(InputError, match="vllm has no fp8 2:4 kernels; these engines have: none"):
        workload_time(narrow, hw)
    with pytest.raises(
        InputError, match="hf has no kernels for fp8 weights alone; it has: int8, int4"
    ):
        workload_time(_lower(phase="decode", engine="hf", weight_dtype="fp8"), hw)
    for engine in ("", "reference"):
        half = simulator.prune(_lower(phase="decode", engine=engine), "semi_structured", 0.5)
        assert workload_time(half, hw).total_s > 0.0
