"""An NVIDIA GPU as a device: CUDA events around replays of a CUDA graph of many launches over rotated operands.

A graph keeps the host out of the time, and going round weights that together exceed twice the L2 makes each of them come from memory.
Where an operator cannot be captured, every launch stands alone between two events, after a buffer of twice the L2 has been
overwritten; the overwriting also gives the host time to have the launch ready. The record says which of the two it was.

The torch module for CUDA is an argument (``backend``), and so is the place where tensors live, so that all that is not a kernel can
be tested where there is no GPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from calibration.devices.operators import Arena, Launches, build, is_out_of_memory
from calibration.devices.protocol import OPERATORS, Description, DeviceLost, Operator, OutOfMemory, Unsupported
from calibration.devices.telemetry import UNKNOWN, NvmlReader, Snapshot
from simulator.errors import InputError

_FEWEST_LAUNCHES = 20  # in a graph, so that the gap between replays is shared by many
_MOST_LAUNCHES = 1 << 13
_GRAPH_SPAN_S = 2e-3
_EVENTS = 128  # event pairs in flight on the path without graphs
_LOST = (
    "CUDA error",
    "uncorrectable ECC",
    "fallen off the bus",
    "device-side assert",
    "unspecified launch failure",
    "no CUDA GPUs",
)


def load_nvml() -> Any | None:
    """The ``pynvml`` module, or None where it is not installed."""
    try:
        import pynvml
    except ImportError:
        return None
    return pynvml


def translate(error: BaseException, what: str) -> Exception | None:
    """Torch's error as one the runner can act on; None when it is none of these.

    >>> type(translate(RuntimeError("CUDA error: unspecified launch failure"), "gemm")).__name__
    'DeviceLost'
    >>> type(translate(RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLtMatmul"), "gemm")).__name__
    'Unsupported'
    """
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


class _Guarded:
    """Samples with torch's errors translated; the three ways of timing differ only in ``run``."""

    def __init__(self, what: str, method: str, run: Callable[[int], float]) -> None:
        self._what, self._run = what, run
        self.method = method

    def sample(self, loops: int) -> float:
        try:
            return self._run(loops)
        except Exception as error:
            known = translate(error, self._what)
            if known is None:
                raise
            raise known from error


class CudaDevice:
    """One CUDA GPU.

    Parameters
    ----------
    index : int
        As torch numbers it.
    graphs : bool
        Time through CUDA graphs; without, every launch is timed alone after an L2 flush.
    memory_limit_bytes : float, optional
        Memory operands may take; nine tenths of what is free unless given.
    backend, place, nvml
        ``torch.cuda``, the torch device of tensors, and the NVML module; arguments for the sake of tests.
    """

    def __init__(
        self,
        index: int = 0,
        *,
        graphs: bool = True,
        memory_limit_bytes: float | None = None,
        backend: Any = None,
        place: str | None = None,
        nvml: Any = UNKNOWN,
    ) -> None:
        self._cuda = torch.cuda if backend is None else backend
        self.name = f"cuda:{index}"
        if not self._cuda.is_available():
            raise InputError(f"device {self.name!r}: torch {torch.__version__} sees no CUDA GPU")
        if index >= self._cuda.device_count():
            raise InputError(f"device {self.name!r}: there are {self._cuda.device_count()} CUDA GPUs, numbered from 0")
        self._cuda.set_device(index)
        self._place = place or self.name
        self._graphs = graphs
        p = self._cuda.get_device_properties(index)
        self._properties = p
        self.capability = (int(p.major), int(p.minor))
        self.cache_bytes = float(getattr(p, "L2_cache_size", 0) or 50 * 2**20)
        self.memory_limit_bytes = (
            0.9 * float(self._cuda.mem_get_info(index)[0]) if memory_limit_bytes is None else memory_limit_bytes
        )
        self._arena = Arena(self._place, self.cache_bytes, 0.5 * self.memory_limit_bytes)
        uuid = str(getattr(p, "uuid", "") or "")
        self._reader = NvmlReader(
            load_nvml() if isinstance(nvml, str) else nvml, f"GPU-{uuid.removeprefix('GPU-')}" if uuid else "", index
        )
        self._flush: Any = None

    # -- what it is ---------------------------------------------------------------------------------------------------------------

    def describe(self) -> Description:
        """GPU name, driver, CUDA, torch and its libraries."""
        sparse = getattr(torch.backends, "cusparselt", None)
        limit = self._reader.power_limit_w()
        stack = {
            "torch": torch.__version__,
            "cuda": str(torch.version.cuda or UNKNOWN),
            "cudnn": str(torch.backends.cudnn.version() or UNKNOWN),
            "cusparselt": str(sparse.version()) if sparse is not None and sparse.is_available() else "none",
            "driver": self._reader.driver(),
            "power_limit_w": limit if isinstance(limit, str) else f"{limit:.0f}",
            "timing": "graph" if self._graphs else "events",
        }
        p = self._properties
        return Description(
            self.name, f"{p.name} ({p.multi_processor_count} SM)", stack, self.memory_limit_bytes, self.cache_bytes
        )

    def dtypes(self) -> tuple[str, ...]:
        """Formats of its tensor cores, by compute capability (8.0 Ampere, 8.9 Ada, 9.0 Hopper)."""
        names = ["fp32", "fp16"]
        if self.capability >= (8, 0):
            names += ["tf32", "bf16", "int8"]
        if self.capability >= (8, 9):
            names.append("fp8")
        return tuple(names)

    def capabilities(self) -> frozenset[str]:
        """All operators; 2:4 from Ampere on."""
        return frozenset(OPERATORS) - (frozenset() if self.capability >= (8, 0) else {"gemm_2to4"})

    def refuses(self, operator: Operator) -> str:
        """Why this GPU cannot run it; empty when it can. Shape rules are those of cublasLt, cuSPARSELt and torch's bindings to them."""
        op = operator
        if op.dtype not in self.dtypes():
            return (
                f"dtype {op.dtype} needs a newer GPU than compute capability {self.capability[0]}.{self.capability[1]}"
            )
        if op.kind == "gemm_2to4":
            if self.capability < (8, 0):
                return "gemm_2to4 needs sparse tensor cores, compute capability 8.0 or above"
            if op.dtype not in ("fp16", "bf16"):
                return f"gemm_2to4 is measured in fp16 and bf16, not in {op.dtype}"
            if op.n % 32 or op.k % 64:
                return f"gemm_2to4 needs n a multiple of 32 and k of 64, got n={op.n} k={op.k}"
        if op.dtype in ("fp8", "int8") and op.kind not in ("gemm", "copy", "launch_eager", "launch_graph"):
            return f"{op.kind} in {op.dtype} has no implementation in torch; only gemm and copy have"
        if op.kind == "gemm" and op.dtype == "fp8" and (op.n % 16 or op.k % 16):
            return f"gemm in fp8 needs n and k to be multiples of 16, got n={op.n} k={op.k}"
        if op.kind == "gemm" and op.dtype == "int8" and (op.m <= 16 or op.n % 8 or op.k % 8):
            return f"gemm in int8 needs m above 16 and n and k multiples of 8, got m={op.m} n={op.n} k={op.k}"
        if op.kind == "attention_block_sparse" and (op.kv_len - op.q_len) % op.block:
            return f"attention_block_sparse needs kv_len - q_len to be a multiple of the block {op.block}"
        return ""

    # -- measuring ----------------------------------------------------------------------------------------------------------------

    def prepare(self, operator: Operator) -> _Guarded:
        """Operands on the GPU and, where possible, a graph of launches recorded."""
        if reason := self.refuses(operator):
            raise Unsupported(reason)
        if operator.footprint_bytes > self.memory_limit_bytes:
            raise OutOfMemory(
                f"{operator.key} takes {operator.footprint_bytes:.3g} bytes, {self.memory_limit_bytes:.3g} are allowed"
            )
        try:
            torch.set_float32_matmul_precision("high" if operator.dtype == "tf32" else "highest")
            return self._prepare(operator)
        except Exception as error:
            known = translate(error, operator.key)
            if isinstance(known, OutOfMemory):
                self._arena.clear()
                self._cuda.empty_cache()
            if known is None:
                raise
            raise known from error

    def _prepare(self, operator: Operator) -> _Guarded:
        launches = build(operator, self._place, self._arena)
        how = f", {launches.how}" if launches.how else ""
        for i in range(3):  # picks kernels and fills workspaces, which a capture must not do
            launches.launch(i)
        self._cuda.synchronize()
        if operator.kind == "launch_eager":
            return _Guarded(
                operator.key, "host clock round launches one by one", lambda loops: self._eager(launches, loops)
            )
        if self._graphs:
            try:
                graph, length = self._capture(launches)
            except RuntimeError as error:
                if is_out_of_memory(error) or operator.kind == "launch_graph":
                    raise
                how += f"; not captured ({type(error).__name__})"
            else:
                method = f"events round a graph of {length} launches over {launches.copies} rotated copies{how}"
                return _Guarded(operator.key, method, lambda loops: self._replay(graph, length, loops))
        elif operator.kind == "launch_graph":
            raise Unsupported("launch_graph needs CUDA graphs, which are switched off")
        flush = operator.cold
        method = f"events round single launches{' after an L2 flush' if flush else ''}{how}"
        return _Guarded(operator.key, method, lambda loops: self._single(launches, loops, flush))

    def _capture(self, launches: Launches) -> tuple[Any, int]:
        """A graph long enough to hide the gap between replays, and a whole number of rounds over the copies."""
        once = self._single(launches, 3, False)
        wanted = max(
            _FEWEST_LAUNCHES if once < _GRAPH_SPAN_S else 1,
            min(_MOST_LAUNCHES, math.ceil(_GRAPH_SPAN_S / max(once, 1e-7))),
        )
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

    def _single(self, launches: Launches, loops: int, flush: bool) -> float:
        if flush and self._flush is None:
            self._flush = torch.empty(int(2 * self.cache_bytes), dtype=torch.int8, device=self._place)
        total_ms, done = 0.0, 0
        while done < loops:
            pairs = []
            for i in range(done, min(loops, done + _EVENTS)):
                if flush:
                    self._flush.zero_()
                start, stop = (self._cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                launches.launch(i)
                stop.record()
                pairs.append((start, stop))
            self._cuda.synchronize()
            total_ms += sum(float(start.elapsed_time(stop)) for start, stop in pairs)
            done += len(pairs)
        return total_ms * 1e-3 / loops

    def _eager(self, launches: Launches, loops: int) -> float:
        self._cuda.synchronize()
        start = time.perf_counter_ns()
        for i in range(loops):
            launches.launch(i)
        self._cuda.synchronize()
        return (time.perf_counter_ns() - start) * 1e-9 / loops

    def snapshot(self) -> Snapshot:
        """NVML's view now."""
        return self._reader.snapshot()

    def clock(self) -> float:
        """Monotonic seconds."""
        return time.monotonic()

    def rest(self, seconds: float) -> None:
        """Sleep."""
        time.sleep(seconds)

    def close(self) -> None:
        """Give memory back."""
        self._arena.clear()
        self._flush = None
        self._cuda.empty_cache()
