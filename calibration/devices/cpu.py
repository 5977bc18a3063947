"""The CPU as a device: torch operators, pinned threads, operands rotated past the last-level cache.

Three settings of the process matter as much as the hardware; the stack of a run names them. Each
thread is pinned to one CPU: OpenMP does so when it is loaded (``OMP_PROC_BIND``), so the setting
comes before the import of torch. The allocator keeps large blocks, so the time of a GEMM does not
include the page faults of its result. Blocks lie in huge pages: where small pages lie makes equal
models up to 1.18 times as fast in decode (Qwen3-0.6B's shape, fp32, one thread of an AMD EPYC).
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from calibration.devices.protocol import Sampler


def _affinity() -> list[int]:
    return (
        sorted(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else list(range(os.cpu_count() or 1))
    )


def default_threads(cpus: int) -> int:
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return min(int(first), cpus) if first.isdecimal() and int(first) else cpus


def _set_affinity(cpus: Iterable[int]) -> bool:
    try:
        os.sched_setaffinity(0, cpus)
    except (OSError, AttributeError):
        return False
    return True


_ALLOWED = _affinity()
_BOUND = "torch" not in sys.modules and os.environ.setdefault(
    "OMP_PROC_BIND", "true"
).lower() not in ("false", "0")


def _huge_pages() -> bool:
    """Return whether the kernel gives huge pages to a process that asks for them."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.is_file() and "[never]" not in setting.read_text("ascii")


# torch reads the variable once, before its first large block
_HUGE = (
    "torch" not in sys.modules
    and os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1") == "1"
    and _huge_pages()
)

import torch  # noqa: E402

if _BOUND:  # undo a side effect of the import: OpenMP has bound this thread to the first CPU
    _set_affinity(_ALLOWED)

from calibration.devices.operators import (  # noqa: E402
    TorchDevice,
    build,
    host_loop,
    is_out_of_memory,
)
from calibration.devices.protocol import (  # noqa: E402
    HOST_KINDS,
    Description,
    Operator,
    OutOfMemory,
    unknown_device,
)
from calibration.devices.telemetry import CpuReader, Reading, Snapshot, cpuinfo  # noqa: E402
from simulator.errors import InputError  # noqa: E402

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h


def _read_text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def last_level_cache_bytes() -> float:
    """Return the size of the largest cache of the first CPU in bytes; 32 MiB if Linux does not
    report it."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = _read_text(path)
        digits = text.rstrip("KMG")
        if digits.isdecimal():
            sizes.append(
                float(digits) * {"K": 2.0**10, "M": 2.0**20, "G": 2.0**30}.get(text[-1:], 1.0)
            )
    return max(sizes, default=32.0 * 2**20)


def available_memory_bytes() -> float:
    for line in _read_text("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return 1024.0 * float(line.split()[1])
    return 4.0 * 2**30


def keep_blocks() -> bool:
    """Make glibc take large blocks from the heap and never shrink it; return False without
    glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def one_thread(run: Sampler) -> Sampler:
    def alone(loops: int) -> float:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return run(loops)
        finally:
            torch.set_num_threads(threads)

    return alone


_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # names in /proc/cpuinfo; the last of Arm
_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")  # oneDNN's limits on instructions


def lacks_bf16() -> str:
    """Return the name of a CPU without bf16 instructions and why it has none; "" if torch can use
    such instructions. Limits that the environment sets on torch and oneDNN count."""
    about = cpuinfo_of(_ALLOWED[0])
    flags = {*about.get("flags", "").split(), *about.get("Features", "").split()}
    capability = str(torch.backends.cpu.get_cpu_capability())
    limit = next((os.environ[name].upper() for name in _LIMITS if name in os.environ), "")
    limited = limit and not re.search("BF16|FP16|AMX|AVX10|ALL|DEFAULT", limit)
    if flags & _BF16_FLAGS and capability not in ("DEFAULT", "AVX2") and not limited:
        return ""
    return f"{about.get('model name') or platform.processor() or platform.machine()} ({capability})"


def cpuinfo_of(cpu: int) -> dict[str, str]:
    try:
        return cpuinfo(_read_text("/proc/cpuinfo"), cpu)
    except KeyError:
        return {}


class CpuDevice(TorchDevice):
    """CPUs of this process's affinity mask, with one pinned torch thread each. Operands take at
    most ``memory_limit_bytes`` (default: half of the available memory); rotated operands exceed
    ``cache_bytes`` twice (default: the size that Linux reports)."""

    name = "cpu"

    def __init__(
        self,
        threads: int | None = None,
        memory_limit_bytes: float | None = None,
        cache_bytes: float | None = None,
    ) -> None:
        allowed = _affinity()
        self.threads = default_threads(len(allowed)) if threads is None else threads
        if not 1 <= self.threads <= len(allowed):
            raise InputError(
                f"threads: expected 1 to {len(allowed)} (CPUs of this process), got {threads}"
            )
        self.allowed = tuple(allowed)  # CPUs of this process before it is pinned
        self._threads_before = torch.get_num_threads()
        self.cpus: tuple[int, ...] = tuple(allowed[: self.threads])
        # OpenMP binds its workers, but not the calling thread, which takes the first CPU; else all
        # share one mask
        self._pinned = _set_affinity(self.cpus[:1] if _BOUND else self.cpus)
        torch.set_num_threads(self.threads)
        self._kept = keep_blocks()
        self._reader = CpuReader(self.cpus)
        cache_bytes = last_level_cache_bytes() if cache_bytes is None else cache_bytes
        limit_bytes = (
            0.5 * available_memory_bytes() if memory_limit_bytes is None else memory_limit_bytes
        )
        super().__init__("cpu", cache_bytes, limit_bytes)

    def describe(self) -> Description:
        known = cpuinfo_of(self.cpus[0]).get("model name")
        model = known or platform.processor() or platform.machine()
        pinning = "one thread each" if _BOUND else "shared by all threads"
        stack = {
            "oneDNN": "on" if torch.backends.mkldnn.is_available() else "off",
            "isa": str(torch.backends.cpu.get_cpu_capability()),
            "threads": str(self.threads),
            "pinned": (
                f"to cpus {' '.join(map(str, self.cpus))}, {pinning}" if self._pinned else "no"
            ),
            "allocator": ("keeps blocks" if self._kept else "default")
            + (" in huge pages" if _HUGE else ""),
            "system": f"{platform.system()} {platform.release()}",
        }
        return self.description(f"{model} ({self.threads} threads)", stack)

    def dtypes(self) -> tuple[str, ...]:
        # without instructions for them, bf16 and fp16 are emulated slowly
        return ("fp32", "bf16", "fp16", "int8")

    def refuses(self, operator: Operator) -> str:
        if operator.kind == "gemm_2to4":
            return "gemm_2to4 needs sparse tensor cores; a CPU has none"
        if operator.kind == "launch_graph":
            return "launch_graph needs recorded graphs; torch has none on a CPU"
        if operator.dtype not in self.dtypes():
            return (
                f"dtype {operator.dtype} has no GEMM on this CPU; supported:"
                f" {', '.join(self.dtypes())}"
            )
        return super().refuses(operator)

    def _bind(self, operator: Operator) -> tuple[str, Sampler]:
        launches = build(operator, "cpu", self._arena)
        method = (
            f"perf_counter_ns around a loop over {launches.copies} rotated copies{launches.how}"
        )
        run = host_loop(launches)
        if operator.kind in HOST_KINDS:  # a host launches from one thread
            return f"{method}, one thread", one_thread(run)
        return method, run

    def _translate(self, error: BaseException, operator: Operator) -> Exception | None:
        return OutOfMemory(str(error)) if is_out_of_memory(error) else None

    def snapshot(self) -> Snapshot:
        return self._reader.snapshot()

    def energy_j(self) -> Reading:
        return self._reader.energy_j()

    def close(self) -> None:
        super().close()
        torch.set_num_threads(self._threads_before)
        if self._pinned:
            _set_affinity(self.allowed)


def open_named(rest: str, **options: Any) -> CpuDevice:
    if rest:
        raise unknown_device(f"cpu:{rest}")
    return CpuDevice(**options)
