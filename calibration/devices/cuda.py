"""An NVIDIA GPU as a device: CUDA events around replays of a CUDA graph with many launches over rotated operands.

A graph excludes host time. The rotated weights exceed L2 twice, so each weight comes from memory. If an operator cannot
be captured, every launch is timed alone between two events, after a buffer of twice L2 was overwritten and while the
device waits for the host to prepare the launch (2:4 launches take the host longer than the device). The record names
the method.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch

from calibration.devices.operators import Launches, build, is_out_of_memory
from calibration.devices.protocol import HOST_KINDS, Description, DeviceLost, Gpu, Operator, OutOfMemory, Unsupported
from calibration.devices.telemetry import UNKNOWN, NvmlReader, Snapshot
from calibration.devices.torch_device import TorchDevice, host_loop
from simulator.errors import InputError

_FEWEST_LAUNCHES = 20  # per graph, so many launches share the gap between replays
_MOST_LAUNCHES = 1 << 13
_GRAPH_SPAN_S = 2e-3
_EVENTS = 128  # event pairs in flight without graphs
_CYCLES_PER_S = 3e9  # at least the clock of any GPU, so the device waits long enough
_LONGEST_HOLD_S = 0.01
_LOST = (
    "CUDA error",
    "uncorrectable ECC",
    "fallen off the bus",
    "device-side assert",
    "unspecified launch failure",
    "no CUDA GPUs",
)


def translate(error: BaseException, what: str) -> Exception | None:
    """Return torch's error as an error that the runner handles, or None."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, OutOfMemory | Unsupported | DeviceLost):
        return error
    if is_out_of_memory(error) or "ALLOC_FAILED" in text:
        return OutOfMemory(f"{what}: {text}")
    if "NOT_SUPPORTED" in text or isinstance(error, NotImplementedError):
        return Unsupported(f"{what}: {text}")
    if type(error).__name__ == "AcceleratorError" or any(sign in text for sign in _LOST):
        return DeviceLost(f"{what}: {text}")
    return None


class CudaDevice(TorchDevice):
    """One CUDA GPU, by torch's number.

    Without ``graphs`` every launch is timed alone after an L2 flush. Operands take at most ``memory_limit_bytes``
    (default: 90 % of the free memory). ``backend`` (``torch.cuda``), ``torch_device`` (of tensors) and ``nvml`` (the
    module) are arguments for tests without a GPU.
    """

    eight_bit = ("gemm", "copy", "launch_eager", "launch_graph")

    def __init__(
        self,
        index: int = 0,
        *,
        graphs: bool = True,
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
            raise InputError(f"device: expected cuda:0 to cuda:{last}, the CUDA GPUs of this machine, got {self.name}")
        self._cuda.set_device(index)
        self._torch_device = torch_device or self.name
        self._graphs = graphs
        self._properties = p = self._cuda.get_device_properties(index)
        self.capability = (int(p.major), int(p.minor))
        free = 0.9 * float(self._cuda.mem_get_info(index)[0]) if memory_limit_bytes is None else memory_limit_bytes
        super().__init__(self._torch_device, float(getattr(p, "L2_cache_size", 0) or 50 * 2**20), free)
        uuid = str(getattr(p, "uuid", "") or "")
        uuid = f"GPU-{uuid.removeprefix('GPU-')}" if uuid else ""
        if nvml == UNKNOWN:
            try:
                nvml = import_module("pynvml")
            except ImportError:
                nvml = None
        self._reader = NvmlReader(nvml, uuid, index)
        self._flush: Any = None

    def identity(self) -> tuple[str, Mapping[str, str]]:
        """Return GPU name, driver, CUDA, libraries of torch, power limit and timing method."""
        sparse = getattr(torch.backends, "cusparselt", None)
        limit = self._reader.power_limit_w()
        return f"{self._properties.name} ({self._properties.multi_processor_count} SM)", {
            "cuda": str(torch.version.cuda or UNKNOWN),
            "cudnn": str(torch.backends.cudnn.version() or UNKNOWN),
            "cusparselt": str(sparse.version()) if sparse is not None and sparse.is_available() else "none",
            "driver": self._reader.driver(),
            "power_limit_w": limit if isinstance(limit, str) else f"{limit:.0f}",
            "timing": "graph" if self._graphs else "events",
        }

    def dtypes(self) -> tuple[str, ...]:
        """Return the formats of its tensor cores by compute capability (8.0 Ampere, 8.9 Ada, 9.0 Hopper)."""
        ampere = ("tf32", "bf16", "int8") if self.capability >= (8, 0) else ()
        return ("fp32", "fp16", *ampere, *(("fp8",) if self.capability >= (8, 9) else ()))

    def refuses(self, operator: Operator) -> str:
        """Return why this GPU cannot run an operator, by the rules of cublasLt, cuSPARSELt and torch, or ""."""
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
            return f"gemm in int8 needs m above 16 and n and k multiples of 8, got m={op.m} n={op.n} k={op.k}"
        return super().refuses(op)

    def _bind(self, operator: Operator) -> tuple[str, Callable[[int], float]]:
        """Make operands on the GPU and, if possible, record a graph of launches."""
        torch.set_float32_matmul_precision("high" if operator.dtype == "tf32" else "highest")
        launches = build(operator, self._torch_device, self._arena)
        for i in range(3):  # selects kernels and fills workspaces, which a capture must not do
            launches.launch(i)
        self._cuda.synchronize()
        if operator.kind in HOST_KINDS:
            return "host clock around single launches", host_loop(launches, self._cuda.synchronize)
        lost = ""
        if self._graphs:
            try:
                graph, length = self._capture(launches)
            except RuntimeError as error:
                if is_out_of_memory(error) or operator.kind == "launch_graph":
                    raise
                lost = f"; not captured ({type(error).__name__})"
            else:
                copies = f"{launches.copies} rotated copies{launches.how}"
                method = f"events around a graph of {length} launches over {copies}"
                return method, lambda loops: self._replay(graph, length, loops)
        elif operator.kind == "launch_graph":
            raise Unsupported("launch_graph needs CUDA graphs, which are disabled")
        flush = operator.cold
        method = f"events around single launches{' after an L2 flush' if flush else ''}{launches.how}{lost}"
        hold = self._hold(launches)
        return method, lambda loops: self._single(launches, loops, flush, hold)

    def _translate(self, error: BaseException, operator: Operator) -> Exception | None:
        known = translate(error, operator.key)
        if isinstance(known, OutOfMemory):
            self._arena.clear()
            self._cuda.empty_cache()
        return known

    def _capture(self, launches: Launches) -> tuple[Any, int]:
        """Record a graph that is long enough to hide the gap between replays, with whole rounds over the copies."""
        once = self._single(launches, 3, False)
        fewest = _FEWEST_LAUNCHES if once < _GRAPH_SPAN_S else 1
        wanted = max(fewest, min(_MOST_LAUNCHES, math.ceil(_GRAPH_SPAN_S / max(once, 1e-7))))
        length = math.ceil(wanted / launches.copies) * launches.copies
        stream = self._cuda.Stream()
        stream.wait_stream(self._cuda.current_stream())
        with self._cuda.stream(stream):
            for i in range(min(3, length)):
                launches.launch(i)
        self._cuda.current_stream().wait_stream(stream)
        graph = self._cuda.CUDAGraph()
        with self._cuda.graph(graph):
            for i in range(length):
                launches.launch(i)
        graph.replay()
        self._cuda.synchronize()
        return graph, length

    def _replay(self, graph: Any, length: int, loops: int) -> float:
        replays = math.ceil(loops / length)
        start, stop = (self._cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(replays):
            graph.replay()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) * 1e-3 / (replays * length)

    def _hold(self, launches: Launches) -> int:
        """Return the cycles that the device waits before a launch: twice the host's time for a launch."""
        took = []
        for i in range(3):
            self._cuda.synchronize()
            start = time.perf_counter()
            launches.launch(i)
            took.append(time.perf_counter() - start)
        return int(min(2.0 * min(took), _LONGEST_HOLD_S) * _CYCLES_PER_S)

    def _single(self, launches: Launches, loops: int, flush: bool, hold: int = 0) -> float:
        if flush and self._flush is None:
            self._flush = torch.empty(int(2 * self.cache_bytes), dtype=torch.int8, device=self._torch_device)
        total_ms, done = 0.0, 0
        while done < loops:
            pairs = []
            for i in range(done, min(loops, done + _EVENTS)):
                if flush:
                    self._flush.zero_()
                if hold:
                    self._cuda._sleep(hold)
                start, stop = (self._cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                launches.launch(i)
                stop.record()
                pairs.append((start, stop))
            self._cuda.synchronize()
            total_ms += sum(float(start.elapsed_time(stop)) for start, stop in pairs)
            done += len(pairs)
        return total_ms * 1e-3 / loops

    def snapshot(self) -> Snapshot:
        """Return the current NVML readings."""
        return self._reader.snapshot()

    def describe(self) -> Description:
        """Return hardware and software, with the facts that distinguish GPUs of similar names."""
        p, reader = self._properties, self._reader
        gpu = Gpu(
            sm_count=int(p.multi_processor_count),
            capability=self.capability,
            memory_bytes=float(p.total_memory),
            mig=reader.sliced() or " MIG " in p.name,
            max_clock_hz=reader.max_clock_hz(),
            power_limit_w=reader.default_power_limit_w(),
        )
        return replace(super().describe(), gpu=gpu)

    def close(self) -> None:
        """Free memory."""
        super().close()
        self._flush = None
        self._cuda.empty_cache()


def open_named(rest: str, **options: Any) -> CudaDevice:
    """Open the device ``cuda`` (the first GPU) or ``cuda:INDEX``."""
    if rest and not rest.isdecimal():
        raise InputError(f"device: expected cuda or cuda:INDEX with a whole number, got 'cuda:{rest}'")
    return CudaDevice(int(rest or 0), **options)
