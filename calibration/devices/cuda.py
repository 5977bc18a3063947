"""An NVIDIA GPU as a device: CUDA events around replays of a CUDA graph with many launches over
rotated operands.

A graph excludes host time. Rotated weights exceed L2 four times, so each weight comes from memory:
L2 replaces its lines almost at random, and a fifth of weights of twice its size would still be
found there. Where a graph cannot hold that many weights, L2 is overwritten before each replay. A
kind of operator that cannot be captured is unsupported: launches that are timed one by one take 8
to 12 % longer. The record names the method and the engine's attention library.

- Before the first measurement, and after a pause, launches run for :data:`PREHEAT_S`, so clocks are
  steady.
- A replay is queued before the start event: an idle GPU would record the event while the host still
  launches.
- Clocks, power and throttle reasons are read while launches run, never between them.
- A failed capture may spoil the process: before torch 2.12 ``CUDAGraph::capture_end`` skips its
  cleanup after an error, and every later capture fails. Such a failure ends the run, which a new
  process resumes without operators of this kind.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch

from calibration.devices.attention import engine_library
from calibration.devices.operators import (
    MAX_COPIES,
    MOST_PACKED,
    Launches,
    TorchDevice,
    build,
    host_loop,
    is_out_of_memory,
)
from calibration.devices.protocol import (
    HOST_KINDS,
    NOT_CAPTURABLE,
    CaptureFailed,
    Description,
    DeviceLost,
    Gpu,
    Operator,
    OutOfMemory,
    Sampler,
    Unsupported,
)
from calibration.devices.telemetry import UNKNOWN, NvmlReader, Reading, Snapshot, under_load
from simulator.errors import InputError

# Version of the measuring protocol. It is part of the stack, so a run has one version. Version 1
# (not recorded) rotated over twice L2, without load before a measurement, with torch's choice of
# attention backend and slow fp8 sums. Version 2 left small weights in a large L2.
PROTOCOL = "3"
_REFUSED = ("CUDA error", "CUBLAS_STATUS", "CUSPARSE_STATUS", "CUDNN_STATUS")
PREHEAT_S = 0.3  # load before the first measurement and after a pause
_PAUSE_S = 0.5  # a GPU lowers its clocks after a longer pause
_READ_EVERY_S = 0.05
_READING_S = 0.01  # work queued for one reading: at least the time of the reading
_MOST_LAUNCHES = 1 << 13  # most launches of a graph
_GRAPH_SPAN_S = 2e-3  # least time of a graph: its launches share the gap between replays
# a longer graph needs no queued replay: the start of its first launch does not count
_LONGEST_LEAD_S = 0.02
_MOST_QUEUED = 128  # replays queued for a reading


@dataclass(frozen=True)
class Graph:
    replay: Callable[[], Any]
    length: int  # launches
    span_s: float  # time of a replay, about
    flush: bool  # whether the cache holds all copies, so it is overwritten before each replay


class GpuTimer:
    """Timer of launches through ``torch.cuda``, with telemetry by ``read``; a flush writes
    ``flush_bytes`` bytes."""

    def __init__(
        self, cuda: Any, device: str, flush_bytes: float, read: Callable[[], Snapshot]
    ) -> None:
        self._cuda = cuda
        self._device = device
        self._read = read
        self._flush_bytes = int(flush_bytes)
        self._flush: Any = None
        self._readings: list[Snapshot] = []
        self._last_reading_s = self._last_load_s = -math.inf

    def snapshot(self) -> Snapshot:
        readings = self._readings
        self._readings = []
        self._last_reading_s = -math.inf
        return under_load(readings) if readings else self._read()

    def clear(self) -> None:
        self._flush = None

    def preheat(self, run: Sampler) -> None:
        """Run launches: for :data:`PREHEAT_S` if the GPU had no work for a while, else once."""
        start = time.monotonic()
        needed_s = PREHEAT_S if start - self._last_load_s >= _PAUSE_S else 0.0
        each = busy_s = run(1)
        while busy_s < needed_s and time.monotonic() - start < 2.0 * PREHEAT_S:
            span_s = min(_READING_S, needed_s - busy_s)
            loops = min(_MOST_LAUNCHES, math.ceil(span_s / each)) if each > 0 else _MOST_LAUNCHES
            each = run(loops)
            busy_s += each * loops

    def capture(self, launches: Launches, flush: bool = False) -> Graph:
        """Capture a graph of whole rounds over the copies (``flush``: one) that is long enough to
        hide the gap between replays."""
        once = self._launch_s(launches)
        wanted = min(_MOST_LAUNCHES, math.ceil(_GRAPH_SPAN_S / max(once, 1e-7)))
        rounds = 1 if flush else math.ceil(wanted / launches.copies)
        length = rounds * launches.copies
        stream = self._cuda.Stream()
        stream.wait_stream(self._cuda.current_stream())
        with self._cuda.stream(stream):
            for i in range(min(3, length)):
                launches.launch(i)
        self._cuda.current_stream().wait_stream(stream)
        graph = self._cuda.CUDAGraph()
        try:
            # a failed capture does not restore the current stream by itself
            with self._cuda.stream(self._cuda.current_stream()), self._cuda.graph(graph):
                for i in range(length):
                    launches.launch(i)
        except Exception as error:
            first = error.__context__ or error  # the end of a failed capture raises another error
            reason = f"{NOT_CAPTURABLE}: {type(first).__name__}: {first}".splitlines()[0]
            if not self._captures():
                raise CaptureFailed(reason) from error
            if is_out_of_memory(first):
                raise OutOfMemory(reason) from error
            raise Unsupported(reason) from error
        graph.replay()
        self._cuda.synchronize()
        return Graph(graph.replay, length, length * once, flush)

    def _launch_s(self, launches: Launches) -> float:
        """Return the time of a launch, about."""
        pairs = [[self._cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(3)]
        for i, (start, stop) in enumerate(pairs):
            start.record()
            launches.launch(i)
            stop.record()
        self._cuda.synchronize()
        return 1e-3 * statistics.fmean(start.elapsed_time(stop) for start, stop in pairs)

    def _captures(self) -> bool:
        try:
            value = torch.zeros(1, device=self._device).add_(1.0)
            with self._cuda.graph(self._cuda.CUDAGraph()):
                value.add_(1.0)
            self._cuda.synchronize()
        except RuntimeError:
            return False
        return True

    def replays(self, graph: Graph, loops: int) -> float:
        replays = math.ceil(loops / graph.length)
        spans = []
        for each in [1] * replays if graph.flush else [replays]:
            start, stop = (self._cuda.Event(enable_timing=True) for _ in range(2))
            if graph.flush:
                self._overwrite()
            elif graph.span_s < _LONGEST_LEAD_S:
                graph.replay()
            start.record()
            for _ in range(each):
                graph.replay()
            stop.record()
            spans.append((start, stop))
        self._take_reading(graph.replay, graph.span_s)
        stop.synchronize()
        self._last_load_s = time.monotonic()
        total_ms = sum(float(start.elapsed_time(stop)) for start, stop in spans)
        return total_ms * 1e-3 / (replays * graph.length)

    def _overwrite(self) -> None:
        """Overwrite the cache."""
        if self._flush is None:
            self._flush = torch.empty(self._flush_bytes, dtype=torch.int8, device=self._device)
        self._flush.zero_()

    def _take_reading(self, more: Callable[[], Any], each_s: float) -> None:
        """Read the telemetry if the last reading is old, while queued work runs; ``more`` queues
        further work."""
        now = time.monotonic()
        if now - self._last_reading_s >= _READ_EVERY_S:
            for _ in range(min(_MOST_QUEUED, int(_READING_S / max(each_s, 1e-7)))):
                more()
            self._readings.append(self._read())
            self._last_reading_s = now


class CudaDevice(TorchDevice):
    """Operands take at most ``memory_limit_bytes`` (default: 90 % of the free memory).
    ``backend`` (``torch.cuda``), ``torch_device`` (of tensors) and ``nvml`` (the module) are
    arguments for tests without a GPU."""

    rotation = 4.0
    eight_bit = ("gemm", "copy", "launch_eager", "launch_graph")

    def __init__(
        self,
        index: int = 0,
        *,
        memory_limit_bytes: float | None = None,
        backend: Any = None,
        torch_device: str | None = None,
        nvml: Any = UNKNOWN,
    ) -> None:
        self._cuda = torch.cuda if backend is None else backend
        self.name = f"cuda:{index}"
        if not self._cuda.is_available():
            raise InputError(f"device {self.name!r}: torch {torch.__version__} sees no CUDA GPU")
        if index >= self._cuda.device_count():
            last = self._cuda.device_count() - 1
            raise InputError(
                f"device: expected cuda:0 to cuda:{last}, the CUDA GPUs of this machine, got"
                f" {self.name}"
            )
        self._cuda.set_device(index)
        self._torch_device = torch_device or self.name
        self._properties = p = self._cuda.get_device_properties(index)
        self.capability = (int(p.major), int(p.minor))
        free = (
            0.9 * float(self._cuda.mem_get_info(index)[0])
            if memory_limit_bytes is None
            else memory_limit_bytes
        )
        super().__init__(
            self._torch_device, float(getattr(p, "L2_cache_size", 0) or 50 * 2**20), free
        )
        if nvml == UNKNOWN:
            try:
                nvml = import_module("pynvml")
            except ImportError:
                nvml = None
        self._reader = NvmlReader(nvml, str(getattr(p, "uuid", "") or ""), index)
        flush_bytes = self.rotation * self.cache_bytes
        self._timer = GpuTimer(self._cuda, self._torch_device, flush_bytes, self._reader.snapshot)
        self.engine = engine_library()

    def describe(self) -> Description:
        sparse = getattr(torch.backends, "cusparselt", None)
        p = self._properties
        reader = self._reader
        limit = reader.power_limit_w()
        stack = {
            "cuda": str(torch.version.cuda or UNKNOWN),
            "cudnn": str(torch.backends.cudnn.version() or UNKNOWN),
            "cusparselt": (
                str(sparse.version()) if sparse is not None and sparse.is_available() else "none"
            ),
            "driver": reader.driver(),
            "power_limit_w": limit if isinstance(limit, str) else f"{limit:.0f}",
            "timing": "graph",
            "engine_attention": self.engine.version if self.engine else "none",
            "protocol": PROTOCOL,
        }
        gpu = Gpu(
            sm_count=int(p.multi_processor_count),
            capability=self.capability,
            memory_bytes=float(p.total_memory),
            mig=reader.sliced() or " MIG " in p.name,
            max_clock_hz=reader.max_clock_hz(),
            power_limit_w=reader.power_limit_w(default=True),
        )
        return self.description(f"{p.name} ({p.multi_processor_count} SM)", stack, gpu)

    def dtypes(self) -> tuple[str, ...]:
        """Return the number formats by compute capability (8.0 Ampere, 8.9 Ada, 9.0 Hopper)."""
        ampere = ("tf32", "bf16", "int8") if self.capability >= (8, 0) else ()
        return ("fp32", "fp16", *ampere, *(("fp8",) if self.capability >= (8, 9) else ()))

    def refuses(self, operator: Operator) -> str:
        """Return why this GPU cannot run an operator, by the rules of cublasLt, cuSPARSELt and
        torch, or ""."""
        op = operator
        if op.dtype not in self.dtypes():
            capability = ".".join(map(str, self.capability))
            return f"dtype {op.dtype} needs a newer GPU than compute capability {capability}"
        if op.kind == "gemm_2to4":
            if self.capability < (8, 0):
                return "gemm_2to4 needs sparse tensor cores, compute capability 8.0 or above"
            if op.dtype not in ("fp16", "bf16"):
                return f"gemm_2to4: expected fp16 or bf16, got {op.dtype}"
            if op.n % 32 or op.k % 64:
                return f"gemm_2to4 needs n a multiple of 32 and k of 64, got n={op.n} k={op.k}"
        if op.kind == "gemm" and op.dtype == "fp8" and (op.n % 16 or op.k % 16):
            return f"gemm in fp8 needs n and k to be multiples of 16, got n={op.n} k={op.k}"
        if op.kind == "gemm" and op.dtype == "int8" and (op.m <= 16 or op.n % 8 or op.k % 8):
            return (
                f"gemm in int8 needs m above 16 and n and k multiples of 8, got m={op.m} n={op.n}"
                f" k={op.k}"
            )
        return super().refuses(op)

    def _bind(self, operator: Operator) -> tuple[str, Sampler]:
        torch.set_float32_matmul_precision("high" if operator.dtype == "tf32" else "highest")
        host = operator.kind in HOST_KINDS
        timer = self._timer
        library = self.engine if operator.library else None
        launches = build(operator, self._torch_device, self._arena, library)
        for i in range(3):  # selects kernels and fills workspaces, which a capture must not do
            launches.launch(i)
        self._cuda.synchronize()
        if host:
            return "host clock around single launches", host_loop(launches, self._cuda.synchronize)
        most = MOST_PACKED if operator.kind == "gemm_2to4" else MAX_COPIES
        few = operator.cold and launches.copies == most
        graph = timer.capture(launches, flush=few)
        copies = f"{launches.copies} rotated copies" + (
            f" ({'after a flush of ' * few}{self.rotation:g} x L2)" if operator.cold else ""
        )
        method = f"events around a graph of {graph.length} launches over {copies}{launches.how}"
        timed = partial(timer.replays, graph)
        timer.preheat(timed)
        return method, timed

    def _translate(self, error: BaseException, operator: Operator) -> Exception | None:
        text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        about = f"{operator.key}: {text}"
        if isinstance(error, DeviceLost):
            return type(error)(about)
        if isinstance(error, Unsupported):
            return error
        if is_out_of_memory(error) or "ALLOC_FAILED" in text:
            self._arena.clear()
            self._cuda.empty_cache()
            return error if isinstance(error, OutOfMemory) else OutOfMemory(about)
        if not self._responds():  # else only the operator is refused
            return DeviceLost(about)
        library = type(error).__name__ == "AcceleratorError" or any(
            sign in text for sign in _REFUSED
        )
        return Unsupported(about) if library or isinstance(error, NotImplementedError) else None

    def _responds(self) -> bool:
        try:
            torch.zeros(1, device=self._torch_device).add_(1.0)
            self._cuda.synchronize()
        except RuntimeError:
            return False
        return True

    def snapshot(self) -> Snapshot:
        return self._timer.snapshot()

    def energy_j(self) -> Reading:
        return self._reader.energy_j()

    def close(self) -> None:
        super().close()
        self._timer.clear()
        with suppress(RuntimeError):  # a spoiled process cannot free its memory
            self._cuda.empty_cache()


def lacks_bf16(name: str) -> str:
    """Return the name of the GPU that a device name such as cuda:1 opens if it has no bf16
    arithmetic (before Ampere), else ""."""
    index = name.partition(":")[2]
    number = int(index) if index.isdecimal() else 0
    if not torch.cuda.is_available() or number >= torch.cuda.device_count():
        return ""
    older = torch.cuda.get_device_capability(number) < (8, 0)
    return torch.cuda.get_device_name(number) if older else ""


def open_named(rest: str, **options: Any) -> CudaDevice:
    if rest and not rest.isdecimal():
        raise InputError(
            f"device: expected cuda or cuda:INDEX with a whole number, got cuda:{rest}"
        )
    return CudaDevice(int(rest or 0), **options)
