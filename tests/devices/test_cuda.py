"""The CUDA device: its logic on a planted ``torch.cuda`` in simulated time, and the real thing
where there is one."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")


from test_cpu import every_kind  # noqa: E402
from test_telemetry import FakeNvml  # noqa: E402

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


class Event:
    """A point in the simulated time of a planted ``torch.cuda``."""

    def __init__(self, cuda: FakeCuda, enable_timing: bool) -> None:
        assert enable_timing
        self.cuda = cuda

    def record(self) -> None:
        self.at = self.cuda.now
        self.cuda.order.append("event")

    def synchronize(self) -> None:
        self.cuda.synchronize()

    def elapsed_time(self, other: Event) -> float:
        return (other.at - self.at) * 1e3


class Graph:
    """Launches captured by a planted ``torch.cuda``."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.launches = cuda, 0

    def replay(self) -> None:
        self.cuda.replays += 1
        self.cuda.queued += 1
        self.cuda.order.append("replay")
        self.cuda.now += self.launches * self.cuda.kernel_s + self.cuda.gap_s


class FakeCuda:
    """``torch.cuda`` in simulated time: a launch takes ``kernel_s``, a replay as many as were
    captured, plus a gap.

    After ``lost``, every synchronisation raises. What a failed capture leaves:
    ``tests/cli/test_planted_cuda.py``.
    """

    def __init__(self, capability: tuple[int, int] = (9, 0)) -> None:
        self.capability, self.kernel_s, self.gap_s = capability, 1e-5, 0.0
        self.now, self.capturing, self.captured, self.replays = 0.0, False, 0, 0
        self.host_s, self.held = 0.0, []
        self.launch_error: Exception | None = None
        self.lost: Exception | None = None
        self.queued, self.order = 0, list[str]()  # launches since the last synchronisation
        self.Event = lambda enable_timing: Event(self, enable_timing)
        self.CUDAGraph = lambda: Graph(self)
        self.Stream = self.current_stream = lambda: SimpleNamespace(wait_stream=lambda other: None)
        self.stream = nullcontext
        self.is_available = lambda: True
        self.device_count = lambda: 1
        self.set_device = lambda *_: None
        self.mem_get_info = lambda index: (1e9, 1e9)
        self._sleep = self.held.append

    def synchronize(self) -> None:
        self.queued = 0
        if self.lost is not None:
            raise self.lost

    def empty_cache(self) -> None: ...

    def launch(self) -> None:
        if self.launch_error is not None:
            raise self.launch_error
        self.queued += not self.capturing
        time.sleep(self.host_s)
        self.captured += self.capturing
        self.now += 0.0 if self.capturing else self.kernel_s

    @contextmanager
    def graph(self, graph: Graph) -> Iterator[None]:
        self.capturing, self.captured = True, 0
        try:
            yield
        finally:
            self.capturing = False
        graph.launches = self.captured

    def get_device_properties(self, index: int) -> Any:
        major, minor = self.capability
        facts = {
            "name": "Planted GPU",
            "multi_processor_count": 132,
            "L2_cache_size": 1_000_000,
            "uuid": "1234",
        }
        facts |= {"total_memory": 80 * 2**30}
        return SimpleNamespace(major=major, minor=minor, **facts)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """A planted backend whose operators are real tensors on the CPU, each launch counted in
    simulated time."""
    planted = FakeCuda()
    real = module.build

    def build(op: Operator, place: str, arena: Any, library: Any) -> Launches:
        launches = real(op, place, arena, library)

        def launch(i: int) -> Any:
            planted.launch()
            return launches.launch(i)

        return Launches(launch, launches.copies, launches.how)

    monkeypatch.setattr(module, "build", build)
    monkeypatch.setattr(module, "PREHEAT_S", 1e-3)  # the launches are real ones of the CPU
    return planted


def _device(fake: FakeCuda, **options: Any) -> CudaDevice:
    return CudaDevice(0, **{"backend": fake, "torch_device": "cpu", "nvml": None, **options})


GEMM = Operator("gemm", m=4, n=128, k=64)


def test_a_graph_holds_whole_rounds_of_copies_and_is_timed_exactly(fake: FakeCuda) -> None:
    prepared = _device(fake).prepare(GEMM)
    # four times L2: of twice L2, a fifth would still be found there
    copies = 4_000_000 // (128 * 64 * 2) + 1
    assert fake.captured % copies == 0
    assert fake.captured * fake.kernel_s >= 2e-3
    assert prepared.sample(1) == pytest.approx(1e-5)
    assert (
        f"graph of {fake.captured} launches over {copies} rotated copies (4 x L2)"
        in prepared.method
    )


def test_a_graph_of_small_operands_has_a_bounded_number_of_launches(fake: FakeCuda) -> None:
    device = _device(fake)
    device._arena.round_bytes = 200e6  # four times the L2 of an H100: 25,000 copies of 8 kB
    device.prepare(Operator("gemm", m=1, n=64, k=64))
    assert 0 < fake.captured <= module._MOST_LAUNCHES


def test_the_gap_between_replays_is_shared_and_replays_cover_the_loops_asked_for(
    fake: FakeCuda,
) -> None:
    fake.gap_s = 3e-6
    prepared = _device(fake).prepare(replace(GEMM, cold=False))
    length = fake.captured
    fake.order.clear()
    assert prepared.sample(2 * length + 1) == pytest.approx(1e-5, rel=0.02)
    first, last = (i for i, what in enumerate(fake.order) if what == "event")
    assert fake.order[first + 1 : last] == ["replay"] * 3


def test_the_start_event_is_not_recorded_on_an_idle_gpu(fake: FakeCuda) -> None:
    prepared = _device(fake).prepare(GEMM)
    fake.order.clear()
    prepared.sample(1)
    assert fake.order[:4] == ["replay", "event", "replay", "event"]
    # the time of one replay does not count in one of seconds, but would double the run
    fake.kernel_s = 0.1
    prepared = _device(fake).prepare(Operator("gemm", m=4, n=1024, k=2048))
    fake.order.clear()
    prepared.sample(1)
    assert fake.order[:2] == ["event", "replay"]


def test_a_kind_that_cannot_be_captured_is_timed_launch_by_launch_throughout(
    fake: FakeCuda,
) -> None:
    asked: list[Operator] = []

    def probe(op: Operator) -> Probed:
        asked.append(op)
        return Probed(op.kind != "gemm", "not capturable: planted" if op.kind == "gemm" else "")

    device = _device(fake, probe=probe)
    prepared = device.prepare(GEMM)
    assert prepared.sample(130) == pytest.approx(1e-5)
    assert "single launches after a flush of 4 x L2; not capturable: planted" in prepared.method
    assert fake.captured == 0  # nothing was captured in this process
    assert device._timer._flush.numel() == 4_000_000
    device.prepare(replace(GEMM, m=8))
    assert asked == [GEMM]  # one question for a kind and number format
    low_rank = device.prepare(Operator("low_rank", m=4, n=128, k=64, rank=16))
    device.prepare(Operator("gemm", "fp16", m=4, n=128, k=64))
    assert [(op.kind, op.dtype) for op in asked[1:]] == [("low_rank", "bf16"), ("gemm", "fp16")]
    assert low_rank.method.startswith("events around a graph")


def test_what_the_probe_cannot_tell_is_asked_again_and_what_crashes_it_is_refused(
    fake: FakeCuda,
) -> None:
    answers: Any = iter(
        [Probed(), Unsupported("the child ended with status -11"), Probed(reason="no child")]
    )

    def probe(op: Operator) -> Probed:
        answer = next(answers)
        if isinstance(answer, Unsupported):
            raise answer
        return answer

    device = _device(fake, probe=probe)
    assert "graph" in device.prepare(GEMM).method
    for _ in range(2):
        with pytest.raises(Unsupported, match="status -11"):
            device.prepare(GEMM)
    for _ in range(2):  # without a child, a kind is probed once
        assert "graph" in device.prepare(Operator("copy", n=4096)).method
    assert next(answers, None) is None


def test_load_precedes_the_first_measurement_and_follows_a_pause(
    fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = [100.0]
    monkeypatch.setattr(module, "PREHEAT_S", PREHEAT_S)
    monkeypatch.setattr(
        module, "time", SimpleNamespace(monotonic=lambda: times[0], perf_counter=time.perf_counter)
    )
    device = _device(fake)

    def load_s(op: Operator) -> float:
        before = fake.now
        device.prepare(op)
        return fake.now - before

    assert PREHEAT_S == 0.3
    assert load_s(GEMM) >= 0.3
    times[0] += 0.1
    assert load_s(replace(GEMM, m=2)) < 0.1  # the clocks are still those of the load
    times[0] += 2.0  # as after a rest, a probe or a long preparation
    assert load_s(replace(GEMM, m=1)) >= 0.3


class LoadedNvml(FakeNvml):
    """NVML of a GPU that is at its power limit under load, and idle without queued launches."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self.cuda = cuda

    def __getattr__(self, name: str) -> Any:
        busy = self.cuda.queued > 0
        if name == "nvmlDeviceGetClockInfo":
            return lambda handle, kind: (
                (1410 if busy else 210) if kind == self.NVML_CLOCK_SM else 2619
            )
        if name == "nvmlDeviceGetCurrentClocksEventReasons":
            return lambda handle: 0x4 if busy else 0x1
        return super().__getattr__(name)


def _not_capturable(op: Operator) -> Probed:
    return Probed(False, "planted")


@pytest.mark.parametrize("probe", [None, _not_capturable])
def test_telemetry_is_read_while_launches_run(fake: FakeCuda, probe: Any) -> None:
    fake.kernel_s = 1e-3
    device = _device(fake, probe=probe, nvml=LoadedNvml(fake))
    assert device.snapshot().clock_hz == 210e6  # nothing runs yet
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
        assert (reading["clock_hz"], reading["throttle"]) == (1410e6, ["sw_power_cap"])


def test_a_launch_that_takes_the_host_longer_than_the_device_is_held_until_it_is_ready(
    fake: FakeCuda,
) -> None:
    fake.host_s = 2e-3
    prepared = _device(fake, probe=_not_capturable).prepare(GEMM)
    fake.held.clear()
    prepared.sample(4)
    assert len(fake.held) == 4
    assert all(cycles >= 2e-3 * 2.6e9 for cycles in fake.held)  # no GPU's clock is higher
    _device(fake).prepare(GEMM).sample(4)  # a graph needs no host
    assert len(fake.held) == 4


def test_without_graphs(fake: FakeCuda) -> None:
    device = _device(fake, probe=_not_capturable)
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
    fake: FakeCuda,
) -> None:
    device = _device(fake)
    for op in (Operator("launch_eager"), Operator("layer_eager", kv_len=16, cold=False)):
        before = fake.captured
        prepared = device.prepare(op)
        assert prepared.method == "host clock around single launches"
        assert (fake.captured, fake.replays) == (before, 0)
        assert 0 < prepared.sample(10) < 0.1
    assert "layer_eager in fp8" in device.refuses(Operator("layer_eager", "fp8", kv_len=16))


def test_number_formats_by_compute_capability() -> None:
    ampere = {"fp32", "fp16", "bf16", "int8", "tf32"}
    for capability, formats in (
        ((7, 5), {"fp32", "fp16"}),
        ((8, 0), ampere),
        ((8, 9), ampere | {"fp8"}),
    ):
        assert set(_device(FakeCuda(capability)).dtypes()) == formats


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
    device = _device(FakeCuda(capability))
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
    fake: FakeCuda, error: Exception, kind: type[Exception]
) -> None:
    device = _device(fake)
    fake.launch_error = error
    with pytest.raises(kind) as caught:
        device.prepare(GEMM)
    assert "\n" not in str(caught.value)
    fake.launch_error = None
    prepared = _device(fake, probe=_not_capturable).prepare(GEMM)
    fake.launch_error = error
    with pytest.raises(kind):
        prepared.sample(1)


def test_a_device_is_lost_only_if_a_trivial_kernel_fails_too(fake: FakeCuda) -> None:
    device = _device(fake)
    fake.launch_error = LAUNCH_ERROR
    with pytest.raises(Unsupported, match="illegal memory access"):
        device.prepare(GEMM)
    fake.lost = LAUNCH_ERROR  # such an error stays with the process
    for error in (LAUNCH_ERROR, RuntimeError("a message that names no library")):
        fake.launch_error = error
        with pytest.raises(DeviceLost) as caught:
            device.prepare(GEMM)
        assert "\n" not in str(caught.value)


def test_fp8_accumulates_fast_as_in_engines(
    fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(torch, "_scaled_mm", lambda *_, **options: seen.append(options))
    prepared = _device(fake).prepare(Operator("gemm", "fp8", m=16, n=64, k=64))
    assert all(options["use_fast_accum"] for options in seen)
    assert "fast accumulation" in prepared.method


def test_tf32_is_switched_by_number_format(fake: FakeCuda) -> None:
    device = _device(fake)
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
        CudaDevice(3, backend=FakeCuda(), torch_device="cpu", nvml=None)
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
    ops = every_kind("bf16", **attention, m=64, n=1024, k=1024, rank=128, rows=32, block=128)
    ops += [Operator("gemm", dtype, m=64, n=1024, k=1024) for dtype in device.dtypes()]
    ops += [
        Operator("gemm", m=64, n=1001, k=999),
        replace(ops[list(OPERATORS).index("attention_prefill")], q_len=128),
    ]
    for op in ops:
        if not device.refuses(op):
            assert 0 < device.prepare(op).sample(10) < 1.0, op.key
    device.close()
