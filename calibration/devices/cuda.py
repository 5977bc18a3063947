"""An NVIDIA GPU as a device: CUDA events around replays of a CUDA graph with many launches over rotated operands.

A graph excludes host time. Rotated weights exceed L2 four times, so each weight comes from memory: L2 replaces its
lines almost at random, and a fifth of weights of twice its size would still be found there. If a child process finds
that a kind of operator cannot be captured, each launch is timed between two events, after a buffer of four times L2
was overwritten. The device waits until the host has prepared the launch: a 2:4 launch takes the host longer than the
device. The record names the method, the attention backend and the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import import_module
from typing import Any, Literal

import torch

from calibration.devices.attention import PAGES, find_library
from calibration.devices.cuda_timing import CaptureProbe, GpuTimer, Probed, kernel_names
from calibration.devices.operators import TorchDevice, build, host_loop, is_out_of_memory
from calibration.devices.protocol import (
    HOST_KINDS,
    CaptureFailed,
    Description,
    DeviceLost,
    Gpu,
    Operator,
    OutOfMemory,
    Unsupported,
)
from calibration.devices.telemetry import UNKNOWN, NvmlReader, Snapshot
from simulator.errors import InputError

# Version of the measuring protocol. It is part of the stack, so a run has one version. Version 1 (not recorded) rotated
# over twice L2, without load before a measurement, with torch's choice of attention backend and slow fp8 sums.
PROTOCOL = "2"
_REFUSED = ("CUDA error", "CUBLAS_STATUS", "CUSPARSE_STATUS", "CUDNN_STATUS")


class CudaDevice(TorchDevice):
    """One CUDA GPU, by torch's number.

    ``attention`` is the library of prefill and decode attention: torch, flashinfer or flash_attn. Operands take at most
    ``memory_limit_bytes`` (default: 90 % of the free memory). ``probe`` finds out what can be captured ("child": in a
    child process; None: no probe, a failed capture ends the process). ``backend`` (``torch.cuda``), ``torch_device``
    (of tensors) and ``nvml`` (the module) are arguments for tests without a GPU.
    """

    rotation = 4.0
    eight_bit = ("gemm", "copy", "launch_eager", "launch_graph")

    def __init__(
        self,
        index: int = 0,
        *,
        attention: str = "torch",
        probe: Callable[[Operator], Probed] | Literal["child"] | None = "child",
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
        flush_bytes = self.rotation * self.cache_bytes
        self._timer = GpuTimer(self._cuda, self._torch_device, flush_bytes, self._reader.snapshot)
        self._library = find_library(attention)
        child = None if backend is not None else CaptureProbe.of_gpu(index, attention)  # a child has no such backend
        self._probe = child if probe == "child" else probe
        self._probed: dict[tuple[str, str], Probed | Unsupported] = {}

    def describe(self) -> Description:
        sparse = getattr(torch.backends, "cusparselt", None)
        p, reader = self._properties, self._reader
        limit = reader.power_limit_w()
        stack = {
            "cuda": str(torch.version.cuda or UNKNOWN),
            "cudnn": str(torch.backends.cudnn.version() or UNKNOWN),
            "cusparselt": str(sparse.version()) if sparse is not None and sparse.is_available() else "none",
            "driver": reader.driver(),
            "power_limit_w": limit if isinstance(limit, str) else f"{limit:.0f}",
            "timing": "graph",
            "attention": self._library.version if self._library else "torch",
            "protocol": PROTOCOL,
        }
        gpu = Gpu(
            sm_count=int(p.multi_processor_count),
            capability=self.capability,
            memory_bytes=float(p.total_memory),
            mig=reader.sliced() or " MIG " in p.name,
            max_clock_hz=reader.max_clock_hz(),
            power_limit_w=reader.default_power_limit_w(),
        )
        return self.description(f"{p.name} ({p.multi_processor_count} SM)", stack, gpu)

    def dtypes(self) -> tuple[str, ...]:
        """Return the number formats by compute capability (8.0 Ampere, 8.9 Ada, 9.0 Hopper)."""
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
        torch.set_float32_matmul_precision("high" if operator.dtype == "tf32" else "highest")
        host, timer = operator.kind in HOST_KINDS, self._timer
        probed = Probed() if host else self._capturable(operator)
        launches = build(operator, self._torch_device, self._arena, self._library)
        for i in range(3):  # selects kernels and fills workspaces, which a capture must not do
            launches.launch(i)
        self._cuda.synchronize()
        if host:
            return "host clock around single launches", host_loop(launches, self._cuda.synchronize)
        names = f"; kernels of the first {operator.kind}: {', '.join(probed.kernels)}" if probed.kernels else ""
        if probed.captured is not False:
            try:
                graph = timer.capture(launches)
            except CaptureFailed as error:
                raise CaptureFailed(f"{operator.key}: not capturable: {error}") from error
            copies = f"{launches.copies} rotated copies" + (f" ({self.rotation:g} x L2)" if operator.cold else "")
            method = f"events around a graph of {graph.length} launches over {copies}{launches.how}{names}"
            timed: Callable[[int], float] = partial(timer.replays, graph)
        elif operator.kind == "launch_graph":
            raise Unsupported(f"launch_graph needs CUDA graphs; {probed.reason}")
        else:
            flush = operator.cold
            after = f" after a flush of {self.rotation:g} x L2" if flush else ""
            lost = f"; {probed.reason}" if probed.reason else ""
            method = f"events around single launches{after}{launches.how}{lost}{names}"
            timed = partial(timer.single, launches, flush=flush, hold=timer.hold(launches))
        timer.preheat(timed)
        return method, timed

    def _capturable(self, operator: Operator) -> Probed:
        """Return whether operators of this kind and number format can be captured, by a probe of the first operator.
        Methods must not differ within a kind: launches that are timed one by one take 8 to 12 % longer."""
        if self._probe is None:
            return Probed()
        key = operator.kind, operator.dtype
        if key not in self._probed:
            self._arena.clear()  # room for the operands of the child
            self._cuda.empty_cache()
            try:
                found: Probed | Unsupported = self._probe(operator)
            except Unsupported as error:
                found = error
            if found == Probed():  # this operator does not run; the next one may
                return found
            self._probed[key] = found
        known = self._probed[key]
        if isinstance(known, Unsupported):
            raise Unsupported(str(known))
        return known

    def kernels(self, operator: Operator) -> tuple[str, ...]:
        launches = build(operator, self._torch_device, self._arena, self._library)
        return kernel_names(lambda: launches.launch(0), self._cuda.synchronize)

    def _translate(self, error: BaseException, operator: Operator) -> Exception | None:
        text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        about = f"{operator.key}: {text}"
        if isinstance(error, Unsupported | DeviceLost):
            return error
        if is_out_of_memory(error) or "ALLOC_FAILED" in text:
            self._arena.clear()
            self._cuda.empty_cache()
            return error if isinstance(error, OutOfMemory) else OutOfMemory(about)
        if not self._responds():  # else only the operator is refused
            return DeviceLost(about)
        library = type(error).__name__ == "AcceleratorError" or any(sign in text for sign in _REFUSED)
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

    def close(self) -> None:
        super().close()
        self._timer.clear()
        if isinstance(self._probe, CaptureProbe):
            self._probe.close()
        with suppress(RuntimeError):  # a spoiled process cannot free its memory
            self._cuda.empty_cache()


def open_named(rest: str, **options: Any) -> CudaDevice:
    """Open ``cuda`` (the first GPU) or ``cuda:INDEX``, with the attention of torch or of ``:LIBRARY``."""
    parts = rest.split(":") if rest else []
    index = int(parts.pop(0)) if parts and parts[0].isdecimal() else 0
    if parts and parts[0] in PAGES:
        options["attention"] = parts.pop(0)
    if parts:
        right = f"expected cuda or cuda:INDEX with a whole number, then :{' or :'.join(PAGES)}"
        raise InputError(f"device: {right} for their attention, got 'cuda:{rest}'")
    return CudaDevice(index, **options)
