"""The CUDA device: its logic on a planted ``torch.cuda`` in simulated time, and the real thing where there is one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from calibration.devices import DeviceLost, Operator, OutOfMemory, Unsupported, open_device  # noqa: E402
from calibration.devices import cuda as module  # noqa: E402
from calibration.devices.cuda import CudaDevice, translate  # noqa: E402
from calibration.devices.operators import Launches  # noqa: E402
from calibration.devices.protocol import OPERATORS  # noqa: E402
from calibration.devices.telemetry import UNKNOWN  # noqa: E402
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

    def synchronize(self) -> None: ...

    def elapsed_time(self, other: Event) -> float:
        return (other.at - self.at) * 1e3


class Graph:
    """Launches captured by a planted ``torch.cuda``."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.launches = cuda, 0

    def replay(self) -> None:
        self.cuda.replays += 1
        self.cuda.now += self.launches * self.cuda.kernel_s + self.cuda.gap_s


class FakeCuda:
    """``torch.cuda`` in simulated time: a launch takes ``kernel_s``, a replay as many as were captured, plus a gap."""

    def __init__(self, capability: tuple[int, int] = (9, 0)) -> None:
        self.capability, self.kernel_s, self.gap_s = capability, 1e-5, 0.0
        self.now, self.capturing, self.captured, self.replays = 0.0, False, 0, 0
        self.host_s, self.held = 0.0, []
        self.capture_error: Exception | None = None
        self.launch_error: Exception | None = None
        self.Event = lambda enable_timing: Event(self, enable_timing)
        self.CUDAGraph = lambda: Graph(self)
        self.Stream = self.current_stream = lambda: SimpleNamespace(wait_stream=lambda other: None)
        self.stream = nullcontext
        self.is_available = lambda: True
        self.device_count = lambda: 1
        self.set_device = self.synchronize = self.empty_cache = lambda *_: None
        self.mem_get_info = lambda index: (1e9, 1e9)
        self._sleep = self.held.append

    def launch(self) -> None:
        if self.launch_error is not None:
            raise self.launch_error
        time.sleep(self.host_s)
        self.captured += self.capturing
        self.now += 0.0 if self.capturing else self.kernel_s

    @contextmanager
    def graph(self, graph: Graph) -> Iterator[None]:
        if self.capture_error is not None:
            raise self.capture_error
        self.capturing, self.captured = True, 0
        yield
        self.capturing, graph.launches = False, self.captured

    def get_device_properties(self, index: int) -> Any:
        major, minor = self.capability
        facts = {"name": "Planted GPU", "multi_processor_count": 132, "L2_cache_size": 1_000_000, "uuid": "1234"}
        facts |= {"total_memory": 80 * 2**30}
        return SimpleNamespace(major=major, minor=minor, **facts)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """A planted backend whose operators are real tensors on the CPU, each launch counted in simulated time."""
    planted = FakeCuda()
    real = module.build

    def build(op: Operator, place: str, arena: Any) -> Launches:
        launches = real(op, place, arena)

        def launch(i: int) -> Any:
            planted.launch()
            return launches.launch(i)

        return Launches(launch, launches.copies, launches.how)

    monkeypatch.setattr(module, "build", build)
    return planted


def _device(fake: FakeCuda, **options: Any) -> CudaDevice:
    return CudaDevice(0, backend=fake, torch_device="cpu", nvml=None, **options)


GEMM = Operator("gemm", m=4, n=128, k=64)


def test_a_graph_holds_whole_rounds_of_copies_and_is_timed_exactly(fake: FakeCuda) -> None:
    prepared = _device(fake).prepare(GEMM)
    copies = 2_000_000 // (128 * 64 * 2) + 1
    assert fake.captured % copies == 0
    assert fake.captured * fake.kernel_s >= 2e-3
    assert prepared.sample(1) == pytest.approx(1e-5)
    assert f"graph of {fake.captured} launches over {copies} rotated copies" in prepared.method


def test_the_gap_between_replays_is_shared_and_replays_cover_the_loops_asked_for(fake: FakeCuda) -> None:
    fake.gap_s = 3e-6
    prepared = _device(fake).prepare(replace(GEMM, cold=False))
    length, before = fake.captured, fake.replays
    assert prepared.sample(2 * length + 1) == pytest.approx(1e-5, rel=0.02)
    assert fake.replays - before == 3


def test_a_long_kernel_does_not_make_a_long_graph(fake: FakeCuda) -> None:
    fake.kernel_s = 0.1
    _device(fake).prepare(Operator("gemm", m=4, n=1024, k=1024))
    assert fake.captured == 1  # a weight of twice the cache needs no copies


def test_what_cannot_be_captured_is_timed_launch_by_launch_after_a_flush(fake: FakeCuda) -> None:
    fake.capture_error = RuntimeError("operation not permitted when stream is capturing")
    device = _device(fake)
    prepared = device.prepare(GEMM)
    assert prepared.sample(300) == pytest.approx(1e-5)
    assert "single launches after an L2 flush" in prepared.method
    assert "not captured" in prepared.method
    assert device._flush.numel() == 2_000_000  # twice the cache


def test_a_launch_that_takes_the_host_longer_than_the_device_is_held_until_it_is_ready(fake: FakeCuda) -> None:
    fake.host_s = 2e-3
    prepared = _device(fake, graphs=False).prepare(GEMM)
    fake.held.clear()
    prepared.sample(4)
    assert len(fake.held) == 4
    assert all(cycles >= 2e-3 * 2.6e9 for cycles in fake.held)  # no GPU's clock is higher
    _device(fake).prepare(GEMM).sample(4)  # a graph needs no host
    assert len(fake.held) == 4


def test_without_graphs(fake: FakeCuda) -> None:
    device = _device(fake, graphs=False)
    hot = device.prepare(replace(GEMM, cold=False))
    assert hot.sample(10) == pytest.approx(1e-5)
    assert "flush" not in hot.method
    assert device._flush is None
    with pytest.raises(Unsupported, match="disabled"):
        device.prepare(Operator("launch_graph"))
    assert device.describe().stack["timing"] == "events"
    eager = device.prepare(Operator("launch_eager"))
    assert eager.sample(10) > 0
    assert "host clock" in eager.method


def test_what_times_the_host_is_not_captured_and_is_timed_by_the_hosts_clock(fake: FakeCuda) -> None:
    device = _device(fake)
    for op in (Operator("launch_eager"), Operator("layer_eager", kv_len=16, cold=False)):
        before = fake.captured
        prepared = device.prepare(op)
        assert prepared.method == "host clock around single launches"
        assert (fake.captured, fake.replays) == (before, 0)
        assert 0 < prepared.sample(10) < 0.1
    assert "layer_eager in fp8" in device.refuses(Operator("layer_eager", "fp8", kv_len=16))


def test_a_run_through_the_fake(fake: FakeCuda) -> None:
    kept: list[Any] = []
    device = _device(fake)
    gemms = [Operator("gemm", m=m, n=n, k=64) for m, n in ((1, 64), (4, 128))]
    plan = replace(in_order(gemms, Rates(1e14, 1e12)), drift_check=GEMM)
    outcome = run(plan, device, kept.append, protocol=Protocol(time_limit_s=1.0, min_window_s=1e-3))
    assert outcome.counts.ok == 2
    assert {round(r["median_s"] * 1e6) for r in kept} == {10}
    assert {r["before"]["throttle"] for r in kept} == {UNKNOWN}


def test_number_formats_by_compute_capability() -> None:
    ampere = {"fp32", "fp16", "bf16", "int8", "tf32"}
    for capability, formats in (((7, 5), {"fp32", "fp16"}), ((8, 0), ampere), ((8, 9), ampere | {"fp8"})):
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
        (Operator("gemm", m=64, n=8192, k=8192), (9, 0), ""),
        (Operator("gemm", "fp8", m=1, n=64, k=64), (9, 0), ""),
        (Operator("gemm", "int8", m=17, n=64, k=64), (9, 0), ""),
        (Operator("gemm_2to4", m=1, n=64, k=64), (9, 0), ""),
    ],
)
def test_what_the_gpu_lacks_is_refused_by_name(op: Operator, capability: tuple[int, int], message: str) -> None:
    device = _device(FakeCuda(capability))
    assert message in device.refuses(op)
    assert bool(message) == bool(device.refuses(op))
    if message:
        with pytest.raises(Unsupported, match=message):
            device.prepare(op)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"), OutOfMemory),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), OutOfMemory),
        (RuntimeError("CUDA error: an illegal memory access was encountered\nsecond line"), DeviceLost),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), DeviceLost),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmul`"), Unsupported),
        (NotImplementedError("no kernel for this format"), Unsupported),
    ],
)
def test_torch_errors_become_ones_the_runner_knows(fake: FakeCuda, error: Exception, kind: type[Exception]) -> None:
    assert type(translate(error, "gemm")) is kind
    device = _device(fake)
    fake.launch_error = error
    with pytest.raises(kind) as caught:
        device.prepare(GEMM)
    assert "\n" not in str(caught.value)
    fake.launch_error = None
    prepared = _device(fake, graphs=False).prepare(GEMM)
    fake.launch_error = error
    with pytest.raises(kind):
        prepared.sample(1)


def test_other_errors_stay_what_they_are_and_what_does_not_fit_is_not_allocated(fake: FakeCuda) -> None:
    assert translate(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "gemm") is None
    fake.launch_error = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError):
        _device(fake).prepare(GEMM)
    with pytest.raises(OutOfMemory, match="bytes, limit"):
        _device(fake, memory_limit_bytes=1e4).prepare(GEMM)


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


def test_the_description_names_the_stack(fake: FakeCuda) -> None:
    described = _device(fake).describe()
    assert (described.device, described.memory_bytes, described.cache_bytes) == ("Planted GPU (132 SM)", 0.9e9, 1e6)
    assert (described.stack["torch"], described.stack["driver"]) == (torch.__version__, UNKNOWN)


def test_a_gpu_that_is_not_there_is_one_line() -> None:
    with pytest.raises(InputError, match="expected cuda:0 to cuda:0"):
        CudaDevice(3, backend=FakeCuda(), torch_device="cpu", nvml=None)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="sees no CUDA GPU"):
            open_device("cuda")


@needs_gpu
def test_every_operator_on_a_real_gpu() -> None:
    device: Any = open_device("cuda")
    attention: dict[str, Any] = {"batch": 1, "q_len": 256, "kv_len": 256, "heads": 8, "kv_heads": 2, "head_dim": 64}
    shape = {**attention, "m": 64, "n": 1024, "k": 1024, "rank": 128, "rows": 32, "block": 128}
    more: dict[str, dict[str, Any]] = {"attention_decode": {"q_len": 1}, "elementwise": {"role": "attention_norm"}}
    more |= {"attention_block_sparse": {"density": 0.5}, "copy": {"n": 1 << 24}}
    more |= {"grouped_gemm": {"density": 0.5, "role": "up"}}
    sizes = {kind: {name: shape[name] for name in names} for kind, names in OPERATORS.items()}
    ops = [Operator(kind, **{**sizes[kind], **more.get(kind, {})}) for kind in OPERATORS]
    ops += [Operator("gemm", dtype, m=64, n=1024, k=1024) for dtype in device.dtypes()]
    ops += [Operator("gemm", m=64, n=1001, k=999), Operator("attention_prefill", **{**attention, "q_len": 128})]
    for op in ops:
        if not device.refuses(op):
            assert 0 < device.prepare(op).sample(10) < 1.0, op.key
    device.close()


@needs_gpu
def test_cold_weights_are_slower_than_hot_ones_on_a_real_gpu() -> None:
    device: Any = open_device("cuda")
    ops = [Operator("gemm", cold=state, m=1, n=4096, k=2048) for state in (True, False)]
    cold, hot = (device.prepare(op).sample(200) for op in ops)
    assert cold > hot
    device.close()
