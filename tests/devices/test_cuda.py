"""The CUDA device: its logic on a planted ``torch.cuda`` in simulated time, and the real thing
where there is one."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from tables import tables_of

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

from calibration.cli.calibrate import REQUESTS, in_format  # noqa: E402
from calibration.devices import DeviceLost, Operator, OutOfMemory, Unsupported, open_device  # noqa: E402
from calibration.devices import cuda as module  # noqa: E402
from calibration.devices.cuda import PREHEAT_S, CudaDevice  # noqa: E402
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


def test_what_a_graph_cannot_hold_is_unsupported_or_ends_the_run(planted: PlantedCuda) -> None:
    """Before torch 2.12 a failed capture spoils its process. The next process measures the other
    kinds; it does not attempt the kind again."""
    planted.troubles = Troubles(uncapturable=("planted",), stuck=False)
    with pytest.raises(
        Unsupported, match="not capturable: AcceleratorError: CUDA error: operation"
    ):
        _device(planted).prepare(GEMM)
    planted.troubles = Troubles(uncapturable=("planted",))
    others = [Operator("copy", n=n) for n in (4096, 8192)]
    plan = in_order([GEMM, replace(GEMM, m=8), *others], Rates(1e14, 1e12))
    plan = replace(plan, drift_check=Operator("launch_eager"))
    kept: list[Any] = []
    ended = run(plan, _device(planted), kept.append)
    assert ended.stopped.startswith("capture failed: gemm bf16 cold m=4 n=128 k=64: not capturable")
    planted.captures_underway, planted.troubles = False, NO_TROUBLES
    assert run(plan, _device(planted), kept.append, previous=[*kept]).stopped == ""
    shapes = [r["operator"] for r in kept if r["purpose"] != "drift_check"]
    assert [(o["kind"], o["m"]) for o in shapes] == [("gemm", 4), ("copy", 0), ("copy", 0)]


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


def test_telemetry_is_read_while_launches_run(planted: PlantedCuda) -> None:
    _slower(planted, 1e-3)
    planted.troubles = Troubles(power_cap=0.75)
    device = _device(planted, nvml=planted_nvml(planted))
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


@pytest.mark.parametrize("asked", [None, "bf16", "fp32"])
def test_a_gpu_without_bf16_is_named_and_takes_fp16(
    asked: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    t4 = PlantedCuda(GPUS["T4"], NO_TROUBLES)
    for name in ("is_available", "device_count", "get_device_capability", "get_device_name"):
        monkeypatch.setattr(torch.cuda, name, getattr(t4, name))
    taken = in_format(replace(REQUESTS, dtype=asked), "cuda:0").text("dtype")
    said = capsys.readouterr().err
    assert taken == (asked if asked == "fp32" else "fp16")
    stated = "status: Tesla T4 has no bf16 arithmetic; fp16 is used\n"
    assert said == ("" if asked == "fp32" else stated)


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
    ("fields", "capability", "message"), tables_of("devices/mistakes.yaml")["cuda"]
)
def test_what_the_gpu_lacks_is_refused_by_name(
    fields: dict[str, Any], capability: list[int], message: str
) -> None:
    gpu, op = replace(GPU, capability=tuple(capability)), Operator(**fields)
    device = _device(PlantedCuda(gpu, NO_TROUBLES))
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
    prepared = _device(planted).prepare(GEMM)
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
