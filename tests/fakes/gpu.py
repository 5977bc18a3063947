"""Planted GPUs in simulated time: a host with a clock, a stream of kernels, graphs, NVML, and
faults. Nothing here needs torch until a fault raises its errors.

A kernel takes ``floor + ((arithmetic / clock)^3 + memory^3)^(1/3)`` with the constants of a
:class:`Gpu`, so the result of a calibration can be compared with the truth. :mod:`fakes.torch_cuda`
installs a planted GPU as torch's.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

ILLEGAL = (
    "CUDA error: an illegal memory access was encountered\n"
    "CUDA kernel errors might be asynchronously reported at some other API call."
)
CAPTURING = (
    "CUDA error: operation not permitted when stream is capturing\n"
    "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."
)
UNDERWAY = (
    "captures_underway.empty() INTERNAL ASSERT FAILED at"
    ' "/pytorch/c10/cuda/CUDACachingAllocator.cpp":2873, please report a bug to PyTorch.'
)
REFUSED = (
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(handle, opa, opb, m, n,"
    " k, ...)`"
)


@dataclass(frozen=True)
class Gpu:
    """A planted GPU. Rates are those that its kernels achieve, not those of a datasheet."""

    name: str
    sms: int
    capability: tuple[int, int]
    memory_bytes: float
    clock_hz: float  # highest clock
    power_w: float  # power limit
    flop_per_s: float  # bf16 and fp16, dense
    bytes_per_s: float
    floor_s: float = 2e-6  # device time of an empty kernel
    launch_s: float = 4e-6  # host time of a launch
    mig: bool = False
    throttled: bool = False  # always: its cooling is passive
    laptop: bool = False  # its enforced power limit moves, and no limit can be set


UUID = "1234"
L2_BYTES = 4 * 2**20
"""L2 of all planted GPUs: operands are rotated past it, so a small one needs few copies and little
real time."""

GPUS: Mapping[str, Gpu] = {
    "H100": Gpu("NVIDIA H100 80GB HBM3", 132, (9, 0), 85e9, 1.98e9, 700.0, 690e12, 3.0e12),
    "RTX 4090": Gpu("NVIDIA GeForce RTX 4090", 128, (8, 9), 25e9, 3.1e9, 450.0, 150e12, 0.93e12),
    "A100 3g.40gb": Gpu(
        "NVIDIA A100-SXM4-80GB MIG 3g.40gb",
        42,
        (8, 0),
        42e9,
        1.41e9,
        400.0,
        100e12,
        0.87e12,
        mig=True,
    ),
    "T4": Gpu("Tesla T4", 40, (7, 5), 16e9, 1.59e9, 70.0, 40e12, 0.25e12, throttled=True),
    "RTX 4090 laptop": Gpu(
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        76,
        (8, 9),
        17e9,
        2.04e9,
        150.0,
        70e12,
        0.53e12,
        laptop=True,
    ),
    "B200": Gpu("NVIDIA B200", 148, (10, 0), 190e9, 1.965e9, 1000.0, 1700e12, 7.0e12),
}


POWER: Mapping[str, float] = {"idle": 0.2, "active": 0.1, "memory": 0.55, "compute": 0.6}
"""Shares of the power limit that all planted GPUs draw: idle, further in kernels, and at the rates
that kernels achieve."""
MOST_POWER = 0.97  # share of the limit that a GPU draws whose clock the power cap lowers
UPDATE_S = 0.1  # time between two updates of the energy counter


@dataclass(frozen=True)
class Troubles:
    """Faults of the device. Times are simulated seconds since the device was opened."""

    noise: float = 0.0  # relative standard deviation of a sample
    drift_per_s: float = 0.0  # share of the clock that is lost per second
    # share of the clock that is left to kernels bound by arithmetic, with its reason
    power_cap: float = 1.0
    # from, until: thermal throttling to 60 % of the clock
    throttle: tuple[float, float] = (math.inf, math.inf)
    lost_at_s: float = math.inf  # an illegal memory access; every later call fails
    refused: tuple[int, int] = (0, 0)  # (n, k) of weights on which cuBLAS fails
    uncapturable: tuple[str, ...] = ()  # calls of torch that a graph cannot hold
    capture_fails_at_s: float = math.inf  # captures fail from then on
    stuck: bool = True  # a failed capture leaves the allocator in capture, as before torch 2.12
    memory_bytes: float = math.inf  # the largest allocation
    error: Exception | None = None  # error of every launch, which does not lose the device
    nvml: bool = True
    launch_s: float | None = None  # host time of a launch, if it is not that of the GPU


NO_TROUBLES = Troubles()


def accelerator_error(text: str) -> Exception:
    """Return the error of torch for a message of CUDA."""
    import torch

    return torch.AcceleratorError(text)


@dataclass(frozen=True)
class Kernel:
    """Work of one kernel: seconds of arithmetic at the highest clock, and of memory."""

    name: str
    arithmetic_s: float
    memory_s: float
    rate: float = 1.0  # arithmetic rate, relative to GEMMs: its power follows its FLOPs

    def seconds(self, clock: float) -> float:
        """Return the time above the floor at a share of the highest clock."""
        return math.pow((self.arithmetic_s / clock) ** 3 + self.memory_s**3, 1 / 3)


@dataclass
class Graph:
    """Captured kernels and their number."""

    cuda: PlantedCuda
    kernels: Counter[Kernel] = field(default_factory=Counter)

    def replay(self) -> None:
        self.cuda.log.append("replay")
        self.cuda.submit(self.kernels)


@dataclass
class Event:
    """A point of the stream's time."""

    cuda: PlantedCuda
    at: float = math.nan

    def record(self, stream: Any = None) -> None:
        self.cuda.alive()
        self.cuda.log.append("event")
        self.cuda.draw()
        self.at = max(self.cuda.free, self.cuda.now)

    def query(self) -> bool:
        return self.cuda.now >= self.at

    def synchronize(self) -> None:
        self.cuda.alive()
        self.cuda.now = max(self.cuda.now, self.at)

    def elapsed_time(self, other: Event) -> float:
        return (other.at - self.at) * 1e3


@dataclass
class Stream:
    """The only stream."""

    cuda: PlantedCuda

    def wait_stream(self, other: Any) -> None: ...

    def synchronize(self) -> None:
        self.cuda.synchronize()


def _bound(kind: type, cuda: PlantedCuda) -> type:
    """Return a class of a GPU's events, graphs or streams; options of torch are ignored."""
    return type(
        kind.__name__, (kind,), {"__init__": lambda self, *_, **__: kind.__init__(self, cuda)}
    )


class PlantedCuda:
    """``torch.cuda`` of one planted GPU: a host clock ``now``, and the time ``free`` when the
    stream will be idle."""

    AHEAD_S = 5e-3  # the host waits when the queue is longer

    def __init__(self, gpu: Gpu, troubles: Troubles) -> None:
        self.gpu, self.troubles = gpu, troubles
        self.launch_s = gpu.launch_s if troubles.launch_s is None else troubles.launch_s
        self.now = self.free = 0.0
        self.work_j = self.load_w = 0.0  # energy and power of kernels, above those of an idle GPU
        self.counted = 0.0, 0.0  # time of the last update of the energy counter, and its value
        self.lost = self.hot = False
        self.captures_underway = False
        self.capturing: Graph | None = None
        self.captured = 0  # kernels in the last graph
        self.log: list[str] = []  # events and replays in the order of the stream
        self.rng, self.factor = np.random.default_rng(0), 1.0
        self.record: list[Mapping[Kernel, int]] | None = None
        # classes, because libraries name them in annotations
        self.Event = _bound(Event, self)
        self.CUDAGraph = _bound(Graph, self)
        self.Stream = _bound(Stream, self)

    # time
    def read(self) -> float:
        """Return the host's clock, which moves at every reading."""
        self.now += 1e-7
        return self.now

    def rest(self, seconds: float) -> None:
        self.now += seconds

    @property
    def throttled(self) -> bool:
        start, stop = self.troubles.throttle
        return self.gpu.throttled or start <= self.now < stop

    @property
    def clock_share(self) -> float:
        """Share of the highest clock at which kernels run now."""
        t = self.troubles
        cap = t.power_cap if self.hot else 1.0
        return max(0.3, cap * (1.0 - t.drift_per_s * self.now)) * (0.6 if self.throttled else 1.0)

    def draw(self) -> None:
        """Draw the noise of the next sample."""
        if self.troubles.noise:
            self.factor = math.exp(self.troubles.noise * self.rng.standard_normal())

    # kernels
    def alive(self) -> None:
        """Raise the sticky error of a lost device."""
        self.lost = self.lost or self.now >= self.troubles.lost_at_s
        if self.lost:
            raise accelerator_error(ILLEGAL)

    def submit(self, kernels: Mapping[Kernel, int]) -> None:
        """Launch kernels as one call of the host."""
        if self.troubles.error is not None:
            raise self.troubles.error
        self.alive()
        if self.record is not None:
            self.record.append(dict(kernels))
        if self.capturing is not None:
            late = self.now >= self.troubles.capture_fails_at_s
            if late or any(kernel.name in self.troubles.uncapturable for kernel in kernels):
                raise accelerator_error(CAPTURING)
            self.capturing.kernels.update(kernels)
            return
        self.now = max(self.now + self.launch_s, self.free - self.AHEAD_S)
        self.hot = sum(k.arithmetic_s for k in kernels) > sum(k.memory_s for k in kernels)
        share = self.clock_share
        took = sum(
            count * (self.gpu.floor_s + kernel.seconds(share)) for kernel, count in kernels.items()
        )
        self.free = max(self.free, self.now) + took * self.factor
        self.load_w = self.gpu.power_w * self._load(kernels, took)
        self.work_j += self.load_w * took * self.factor

    def _load(self, kernels: Mapping[Kernel, int], took: float) -> float:
        """Return the share of the power limit that kernels draw above an idle GPU."""
        if self.hot and self.troubles.power_cap < 1.0:
            return MOST_POWER - POWER["idle"]
        arithmetic_s = sum(count * k.rate * k.arithmetic_s for k, count in kernels.items())
        memory_s = sum(count * kernel.memory_s for kernel, count in kernels.items())
        used = POWER["memory"] * memory_s + POWER["compute"] * arithmetic_s
        return min(POWER["active"] + used / took, MOST_POWER - POWER["idle"])

    @property
    def energy_j(self) -> float:
        """The counter of NVML, which moves every :data:`UPDATE_S`."""
        if self.now - self.counted[0] >= UPDATE_S:
            self.counted = self.now, POWER["idle"] * self.gpu.power_w * self.now + self.work_j
        return self.counted[1]

    @contextmanager
    def watched(self) -> Iterator[list[Mapping[Kernel, int]]]:
        """Yield a list that receives the calls of a block."""
        self.record = []
        try:
            yield self.record
        finally:
            self.record = None

    @contextmanager
    def graph(self, graph: Graph, **_: Any) -> Iterator[None]:
        self.synchronize()
        self.empty_cache()
        self.capturing = graph
        try:
            yield
        except BaseException:
            self.captures_underway = self.troubles.stuck
            raise
        finally:
            self.capturing = None
        self.captured = graph.kernels.total()

    # the rest of torch.cuda
    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def set_device(self, device: Any) -> None: ...

    def synchronize(self, device: Any = None) -> None:
        self.alive()
        if self.capturing is not None:
            raise accelerator_error(CAPTURING)
        self.draw()
        self.now = max(self.now, self.free)

    def empty_cache(self) -> None:
        if self.captures_underway:
            raise RuntimeError(UNDERWAY)

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return int(0.98 * self.gpu.memory_bytes), int(self.gpu.memory_bytes)

    def get_device_properties(self, device: Any = None) -> Any:
        g = self.gpu
        return SimpleNamespace(
            name=g.name,
            major=g.capability[0],
            minor=g.capability[1],
            multi_processor_count=g.sms,
            total_memory=int(g.memory_bytes),
            L2_cache_size=L2_BYTES,
            uuid=f"MIG-{UUID}" if g.mig else UUID,
        )

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        return self.gpu.capability

    def get_device_name(self, device: Any = None) -> str:
        return self.gpu.name

    def current_device(self) -> int:
        return 0

    def current_stream(self, device: Any = None) -> Stream:
        return Stream(self)

    def stream(self, stream: Any) -> Any:
        return nullcontext()


def planted_nvml(cuda: PlantedCuda, broken: Collection[str] = ()) -> ModuleType:
    """Return a module ``pynvml`` for a planted GPU. It reads the GPU of the moment; a MIG slice has
    no readings, and functions in ``broken`` raise, as in a driver that does not support them."""
    gpu = cuda.gpu
    handle = SimpleNamespace(gpu=gpu.name)

    def unsupported(*_: Any) -> Any:
        raise RuntimeError("Not Supported")

    def reading(value: Callable[[], Any]) -> Callable[..., Any]:
        return unsupported if gpu.mig else lambda *_: value()

    def loaded() -> bool:
        return cuda.free > cuda.now

    def clock_mhz(handle: Any, kind: int) -> int:
        return (
            round(gpu.clock_hz * (cuda.clock_share if loaded() else 1.0) / 1e6)
            if kind < 2
            else 2600
        )

    def limit() -> int:
        return int(1e3 * gpu.power_w)

    def reasons() -> int:
        capped = 0x4 if loaded() and cuda.hot and cuda.troubles.power_cap < 1.0 else 0
        return (capped | (0x40 if cuda.throttled else 0)) or (0 if loaded() else 0x1)

    def by_uuid(uuid: str) -> Any:
        if gpu.mig or uuid != f"GPU-{UUID}":
            raise RuntimeError("Not Found")
        return handle

    module = ModuleType("pynvml")
    module.__dict__.update(
        NVML_CLOCK_GRAPHICS=0,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlSystemGetDriverVersion=lambda: "580.65.06",
        nvmlDeviceGetHandleByIndex=lambda index: handle,
        nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlDeviceGetName=lambda handle: gpu.name,
        nvmlDeviceGetClockInfo=lambda handle, kind: reading(lambda: clock_mhz(handle, kind))(),
        nvmlDeviceGetMaxClockInfo=lambda handle, kind: reading(lambda: round(gpu.clock_hz / 1e6))(),
        nvmlDeviceGetPowerUsage=reading(
            lambda: round(1e3 * (POWER["idle"] * gpu.power_w + loaded() * cuda.load_w))
        ),
        nvmlDeviceGetTotalEnergyConsumption=reading(lambda: round(1e3 * cuda.energy_j)),
        nvmlDeviceGetPowerManagementLimit=unsupported if gpu.laptop else reading(limit),
        nvmlDeviceGetPowerManagementDefaultLimit=reading(limit),
        nvmlDeviceGetEnforcedPowerLimit=reading(
            lambda: limit() - 5000 * gpu.laptop * (1 + int(cuda.now) % 3)
        ),
        nvmlDeviceGetTemperature=reading(lambda: 91 if cuda.throttled else 61),
        nvmlDeviceGetUtilizationRates=reading(lambda: SimpleNamespace(gpu=100 if loaded() else 0)),
        nvmlDeviceGetCurrentClocksEventReasons=reading(reasons),
        nvmlDeviceGetCurrentClocksThrottleReasons=reading(reasons),
        nvmlDeviceGetMigMode=lambda handle: (int(gpu.mig), int(gpu.mig)),
    )
    module.__dict__.update(dict.fromkeys(broken, unsupported))
    return module
