"""The CUDA device: its logic on a planted ``torch.cuda`` in simulated time, and the real thing
where there is one."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")


from every_kind import every_kind  # noqa: E402
from fakes.gpu import (  # noqa: E402
    GPUS,
    L2_BYTES,
    NO_TROUBLES,
    Gpu,
    Kernel,
    PlantedCuda,
    Troubles,
    planted_nvml,
)

from calibration.devices import DeviceLost, Operator, OutOfMemory, Unsupported, open_device  # noqa: E402
from calibration.devices import cuda as module  # noqa: E402
from calibration.devices.cuda import PREHEAT_S, CaptureProbe, CudaDevice, Probed  # noqa: E402
from calibration.devices.operators import Launches  # noqa: E402
from calibration.devices.protocol import OPERATORS  # noqa: E402
from calibration.measure.plan import Rates, in_order  # noqa: E402
from calibration.measure.run import run  # noqa: E402
from calibration.measure.timing import Protocol  # noqa: E402
from simulator.errors import InputError  # noqa: E402

pytestmark = pytest.mark.quick

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")


GPU = Gpu("Planted GPU", 132, (9, 0), 80e9, 1.98e9, 700.0, 1e15, 1e12, floor_s=1e-5, launch_s=0.0)
LAUNCH = {Kernel("planted", 1e-12, 0.0): 1}
"""A kernel that takes the time of an empty one, ``floor_s``."""


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> PlantedCuda:
    """A planted GPU whose operators are real tensors on the CPU, each launch counted in simulated
    time."""
    cuda = PlantedCuda(GPU, NO_TROUBLES)
    real = module.build

    def build(op: Operator, place: str, arena: Any, library: Any) -> Launches:
        launches = real(op, place, arena, library)

        def launch(i: int) -> Any:
            cuda.submit(LAUNCH)
            return launches.launch(i)

        return Launches(launch, launches.copies, launches.how)

    monkeypatch.setattr(module, "build", build)
    clock = SimpleNamespace(monotonic=cuda.read, perf_counter=cuda.read)
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(module, "PREHEAT_S", 1e-3)  # the launches are real ones of the CPU
    return cuda


def _device(cuda: PlantedCuda, **options: Any) -> CudaDevice:
    return CudaDevice(0, **{"backend": cuda, "torch_device": "cpu", "nvml": None, **options})


def _slower(cuda: PlantedCuda, kernel_s: float) -> None:
    cuda.gpu = replace(cuda.gpu, floor_s=kernel_s)


def _failing(cuda: PlantedCuda, error: Exception | None) -> None:
    cuda.troubles = Troubles(error=error)


GEMM = Operator("gemm", m=4, n=128, k=64)


def test_a_graph_holds_whole_rounds_of_copies_and_is_timed_exactly(planted: PlantedCuda) -> None:
    prepared = _device(planted).prepare(GEMM)
    # four times L2: of twice L2, a fifth would still be found there
    copies = 4 * L2_BYTES // (128 * 64 * 2)
    assert planted.captured % copies == 0
    assert planted.captured * GPU.floor_s >= 2e-3
    assert prepared.sample(1) == pytest.approx(1e-5)
    assert (
        f"graph of {planted.captured} launches over {copies} rotated copies (4 x L2)"
        in prepared.method
    )


def test_small_operands_that_a_graph_cannot_rotate_are_flushed(
    planted: PlantedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = _device(planted)
    device._arena.round_bytes = 288e6  # four times the L2 of an RTX 4090: 36,000 copies of 8 kB
    prepared = device.prepare(Operator("gemm", m=1, n=64, k=64))
    assert planted.captured == module.MAX_COPIES  # 67 MB, which L2 would hold
    assert "8192 rotated copies (after a flush of 4 x L2)" in prepared.method
    flushes = Mock(side_effect=lambda: planted.log.append("flush"))
    monkeypatch.setattr(device._timer, "_overwrite", flushes)
    planted.log.clear()
    assert prepared.sample(2 * module.MAX_COPIES) == pytest.approx(1e-5)
    assert planted.log[:8] == ["flush", "event", "replay", "event"] * 2


def test_a_compiled_operator_is_not_compiled_in_a_child_too(planted: PlantedCuda) -> None:
    probe = Mock(return_value=Probed(True))
    sizes = {"batch": 1, "q_len": 64, "kv_len": 64, "heads": 4, "kv_heads": 2, "head_dim": 16}
    device = _device(planted, probe=probe)
    for kind, more in (("attention_prefill", {}), ("attention_block_sparse", {"block": 32})):
        device._capturable(Operator(kind, **sizes, **more))
    assert [call.args[0].kind for call in probe.call_args_list] == ["attention_prefill"]


def test_a_moving_power_limit_resumes_a_run() -> None:
    """The enforced limit of a laptop follows its processor's power and its supply."""
    for name, limit in (("RTX 4090 laptop", "150"), ("H100", "700")):
        cuda = PlantedCuda(GPUS[name], NO_TROUBLES)
        nvml = planted_nvml(cuda)
        device = _device(cuda, nvml=nvml)
        limits = set()
        for _ in range(3):
            cuda.rest(1.0)
            limits.add(nvml.nvmlDeviceGetEnforcedPowerLimit(None))
            assert device.describe().stack["power_limit_w"] == limit
        assert (len(limits) > 1) == GPUS[name].laptop


def test_replays_cover_the_loops_asked_for(planted: PlantedCuda) -> None:
    prepared = _device(planted).prepare(replace(GEMM, cold=False))
    length = planted.captured
    planted.log.clear()
    assert prepared.sample(2 * length + 1) == pytest.approx(1e-5)
    first, last = (i for i, what in enumerate(planted.log) if what == "event")
    assert planted.log[first + 1 : last] == ["replay"] * 3


def test_the_start_event_is_not_recorded_on_an_idle_gpu(planted: PlantedCuda) -> None:
    prepared = _device(planted).prepare(GEMM)
    planted.log.clear()
    prepared.sample(1)
    assert planted.log[:4] == ["replay", "event", "replay", "event"]
    # the time of one replay does not count in one of seconds, but would double the run
    _slower(planted, 0.1)
    prepared = _device(planted).prepare(Operator("gemm", m=4, n=1024, k=2048))
    planted.log.clear()
    prepared.sample(1)
    assert planted.log[:2] == ["event", "replay"]


def test_a_kind_that_cannot_be_captured_is_timed_launch_by_launch_throughout(
    planted: PlantedCuda,
) -> None:
    asked: list[Operator] = []

    def probe(op: Operator) -> Probed:
        asked.append(op)
        return Probed(op.kind != "gemm", "not capturable: planted" if op.kind == "gemm" else "")

    device = _device(planted, probe=probe)
    prepared = device.prepare(GEMM)
    assert prepared.sample(130) == pytest.approx(1e-5)
    assert "single launches after a flush of 4 x L2; not capturable: planted" in prepared.method
    assert planted.captured == 0  # nothing was captured in this process
    assert device._timer._flush.numel() == 4 * L2_BYTES
    device.prepare(replace(GEMM, m=8))
    assert asked == [GEMM]  # one question for a kind and number format
    low_rank = device.prepare(Operator("low_rank", m=4, n=128, k=64, rank=16))
    device.prepare(Operator("gemm", "fp16", m=4, n=128, k=64))
    assert [(op.kind, op.dtype) for op in asked[1:]] == [("low_rank", "bf16"), ("gemm", "fp16")]
    assert low_rank.method.startswith("events around a graph")


def test_what_the_probe_cannot_tell_is_asked_again_and_what_crashes_it_is_refused(
    planted: PlantedCuda,
) -> None:
    answers: Any = iter(
        [Probed(), Unsupported("the child ended with status -11"), Probed(reason="no child")]
    )

    def probe(op: Operator) -> Probed:
        answer = next(answers)
        if isinstance(answer, Unsupported):
            raise answer
        return answer

    device = _device(planted, probe=probe)
    assert "graph" in device.prepare(GEMM).method
    for _ in range(2):
        with pytest.raises(Unsupported, match="status -11"):
            device.prepare(GEMM)
    for _ in range(2):  # without a child, a kind is probed once
        assert "graph" in device.prepare(Operator("copy", n=4096)).method
    assert next(answers, None) is None


def test_load_precedes_the_first_measurement_and_follows_a_pause(
    planted: PlantedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PREHEAT_S", PREHEAT_S)
    device = _device(planted)

    def load_s(op: Operator) -> float:
        before = planted.now
        device.prepare(op)
        return planted.now - before

    assert PREHEAT_S == 0.3
    assert load_s(GEMM) >= 0.3
    planted.rest(0.1)
    assert load_s(replace(GEMM, m=2)) < 0.1  # the clocks are still those of the load
    planted.rest(2.0)  # as after a probe or a long preparation
    assert load_s(replace(GEMM, m=1)) >= 0.3


def _not_capturable(op: Operator) -> Probed:
    return Probed(False, "planted")


@pytest.mark.parametrize("probe", [None, _not_capturable])
def test_telemetry_is_read_while_launches_run(planted: PlantedCuda, probe: Any) -> None:
    _slower(planted, 1e-3)
    planted.troubles = Troubles(power_cap=0.75)
    device = _device(planted, probe=probe, nvml=planted_nvml(planted))
    assert device.snapshot().throttle == ("gpu_idle",)  # nothing runs yet
    kept: list[Any] = []
    plan = replace(in_order([replace(GEMM, m=8)], Rates(1e14, 1e12)), drift_check=GEMM)
    run(
        plan,
        device,
        kept.append,
        protocol=Protocol(time_limit_s=1.0, min_window_s=0.02, max_samples=40),
    )
    assert len(kept) == 3
    for reading in (record[name] for record in kept for name in ("before", "after")):
        assert (reading["clock_hz"], reading["throttle"]) == (0.75 * GPU.clock_hz, ["sw_power_cap"])


def test_a_launch_that_takes_the_host_longer_than_the_device_is_held_until_it_is_ready(
    planted: PlantedCuda,
) -> None:
    planted.launch_s = 2e-3
    device = _device(planted, probe=_not_capturable)
    assert device.prepare(replace(GEMM, cold=False)).sample(4) == pytest.approx(1e-5)
    assert "sleep" in planted.log
    planted.log.clear()
    # a graph needs no host but for its replay
    assert _device(planted).prepare(GEMM).sample(4) < 1e-5 + 2e-3 / 1000
    assert "sleep" not in planted.log


def test_without_graphs(planted: PlantedCuda) -> None:
    device = _device(planted, probe=_not_capturable)
    hot = device.prepare(replace(GEMM, cold=False))
    assert hot.sample(10) == pytest.approx(1e-5)
    assert "flush" not in hot.method
    assert device._timer._flush is None
    with pytest.raises(Unsupported, match="launch_graph needs CUDA graphs; planted"):
        device.prepare(Operator("launch_graph"))
    eager = device.prepare(Operator("launch_eager"))
    assert eager.sample(10) > 0
    assert "host clock" in eager.method


def test_what_times_the_host_is_not_captured_and_is_timed_by_the_hosts_clock(
    planted: PlantedCuda,
) -> None:
    device = _device(planted)
    for op in (Operator("launch_eager"), Operator("layer_eager", kv_len=16, cold=False)):
        planted.log.clear()
        prepared = device.prepare(op)
        assert prepared.method == "host clock around single launches"
        assert (planted.captured, planted.log.count("replay")) == (0, 0)
        assert 0 < prepared.sample(10) < 0.1
    assert "layer_eager in fp8" in device.refuses(Operator("layer_eager", "fp8", kv_len=16))


def test_number_formats_by_compute_capability() -> None:
    ampere = {"fp32", "fp16", "bf16", "int8", "tf32"}
    for capability, formats in (
        ((7, 5), {"fp32", "fp16"}),
        ((8, 0), ampere),
        ((8, 9), ampere | {"fp8"}),
    ):
        assert (
            set(_device(PlantedCuda(replace(GPU, capability=capability), NO_TROUBLES)).dtypes())
            == formats
        )


@pytest.mark.parametrize(
    ("op", "capability", "message"),
    [
        (Operator("gemm_2to4", m=16, n=64, k=64), (7, 5), "dtype bf16 needs a newer GPU"),
        (Operator("gemm_2to4", "fp16", m=16, n=64, k=64), (7, 5), "sparse tensor cores"),
        (Operator("gemm_2to4", "fp32", m=16, n=64, k=64), (9, 0), "expected fp16 or bf16"),
        (Operator("gemm_2to4", m=16, n=48, k=64), (9, 0), "n a multiple of 32"),
        (Operator("gemm", "fp8", m=16, n=24, k=64), (9, 0), "multiples of 16"),
        (Operator("gemm", "fp8", m=16, n=32, k=64), (8, 0), "newer GPU"),
        (Operator("gemm", "int8", m=16, n=32, k=64), (9, 0), "m above 16"),
        (Operator("gemm", "int8", m=32, n=33, k=64), (9, 0), "multiples of 8"),
        (Operator("low_rank", "fp8", m=32, n=32, k=64, rank=16), (9, 0), "low_rank in fp8"),
        (Operator("gemm", "fp8", m=1, n=64, k=64), (9, 0), ""),
        (Operator("gemm", "int8", m=17, n=64, k=64), (9, 0), ""),
        (Operator("gemm_2to4", m=1, n=64, k=64), (9, 0), ""),
    ],
)
def test_what_the_gpu_lacks_is_refused_by_name(
    op: Operator, capability: tuple[int, int], message: str
) -> None:
    device = _device(PlantedCuda(replace(GPU, capability=capability), NO_TROUBLES))
    assert message in device.refuses(op)
    assert bool(message) == bool(device.refuses(op))
    if message:
        with pytest.raises(Unsupported, match=message):
            device.prepare(op)


LAUNCH_ERROR = RuntimeError("CUDA error: an illegal memory access was encountered\nsecond line")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"), OutOfMemory),
        (
            RuntimeError(
                "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"
            ),
            OutOfMemory,
        ),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmul`"),
            Unsupported,
        ),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
            Unsupported,
        ),
        (RuntimeError("CUDA error: invalid configuration argument\nsecond line"), Unsupported),
        (NotImplementedError("no kernel for this format"), Unsupported),
    ],
)
def test_torch_errors_become_ones_the_runner_knows(
    planted: PlantedCuda, error: Exception, kind: type[Exception]
) -> None:
    device = _device(planted)
    _failing(planted, error)
    with pytest.raises(kind) as caught:
        device.prepare(GEMM)
    assert "\n" not in str(caught.value)
    _failing(planted, None)
    prepared = _device(planted, probe=_not_capturable).prepare(GEMM)
    _failing(planted, error)
    with pytest.raises(kind):
        prepared.sample(1)


def test_a_device_is_lost_only_if_a_trivial_kernel_fails_too(planted: PlantedCuda) -> None:
    device = _device(planted)
    _failing(planted, LAUNCH_ERROR)
    with pytest.raises(Unsupported, match="illegal memory access"):
        device.prepare(GEMM)
    planted.lost = True  # such an error stays with the process
    for error in (LAUNCH_ERROR, RuntimeError("a message that names no library")):
        _failing(planted, error)
        with pytest.raises(DeviceLost) as caught:
            device.prepare(GEMM)
        assert "\n" not in str(caught.value)


def test_fp8_accumulates_fast_as_in_engines(
    planted: PlantedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(torch, "_scaled_mm", lambda *_, **options: seen.append(options))
    prepared = _device(planted).prepare(Operator("gemm", "fp8", m=16, n=64, k=64))
    assert all(options["use_fast_accum"] for options in seen)
    assert "fast accumulation" in prepared.method


def test_tf32_is_switched_by_number_format(planted: PlantedCuda) -> None:
    device = _device(planted)
    before = torch.get_float32_matmul_precision()
    try:
        device.prepare(Operator("gemm", "tf32", m=4, n=64, k=64))
        assert torch.get_float32_matmul_precision() == "high"
        device.prepare(Operator("gemm", "fp32", m=4, n=64, k=64))
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_gpu_that_is_not_there_is_one_line() -> None:
    with pytest.raises(InputError, match="expected cuda:0 to cuda:0"):
        CudaDevice(3, backend=PlantedCuda(GPU, NO_TROUBLES), torch_device="cpu", nvml=None)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="sees no CUDA GPU"):
            open_device("cuda")


# -- the child process that captures an operator first

NO_CHILD = Probed(reason="no child process can open the GPU")
CHILD = """
import json, os, sys, time
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    m = json.loads(line)["m"]
    if m == 1:
        os._exit(3)
    if m == 2:
        time.sleep(60)
    answer = {"captured": m > 3, "reason": "" if m > 3 else "not capturable"}
    print(json.dumps(answer), flush=True)
    if m == 3:
        break
"""


def _gemm(m: int) -> Operator:
    return Operator("gemm", m=m, n=128, k=64)


def _probe(code: str, limit_s: float = 20.0) -> CaptureProbe:
    return CaptureProbe([sys.executable, "-c", code], limit_s)


def test_one_child_answers_until_a_failed_capture_ends_it() -> None:
    probe = _probe(CHILD)
    assert probe(_gemm(4)) == Probed(True)
    first = probe._child
    assert probe(_gemm(5)) == Probed(True)
    assert probe._child is first
    assert probe(_gemm(3)).captured is False
    assert probe(_gemm(4)).captured  # by another child
    assert probe._child is not first
    probe.close()


def test_a_child_that_crashes_or_hangs_costs_its_operator() -> None:
    probe = _probe(CHILD)
    with pytest.raises(Unsupported, match="a child process that captured it ended with status 3"):
        probe(_gemm(1))
    assert probe(_gemm(4)).captured
    probe.close()
    hasty = _probe(CHILD, limit_s=1.0)
    with pytest.raises(Unsupported, match="gave no answer within 1 s"):
        hasty(_gemm(2))


def test_where_no_child_can_open_the_gpu_nothing_is_known_and_none_is_started_again() -> None:
    probe = _probe("raise SystemExit(1)")
    assert probe(GEMM) == NO_CHILD
    probe._command = ("no such program",)
    assert probe(GEMM) == NO_CHILD


@needs_gpu
def test_every_operator_on_a_real_gpu() -> None:
    device: Any = open_device("cuda")
    attention = {"batch": 1, "q_len": 256, "kv_len": 256, "heads": 8, "kv_heads": 2, "head_dim": 64}
    sizes = {"m": 64, "n": 1024, "k": 1024, "rank": 128, "rows": 32, "block": 128, "window": 4}
    ops = every_kind("bf16", **attention, **sizes)
    ops += [Operator("gemm", dtype, m=64, n=1024, k=1024) for dtype in device.dtypes()]
    ops += [
        Operator("gemm", m=64, n=1001, k=999),
        replace(ops[list(OPERATORS).index("attention_prefill")], q_len=128),
    ]
    for op in ops:
        if not device.refuses(op):
            assert 0 < device.prepare(op).sample(10) < 1.0, op.key
    device.close()
