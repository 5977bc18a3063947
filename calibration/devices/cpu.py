"""The CPU as a device: torch operators, threads pinned and recorded, operands rotated past the last-level cache.

Two settings of the process matter as much as the silicon and are therefore made here and recorded. Threads are pinned,
one a CPU, so that they do not migrate in the middle of a sample; OpenMP pins its own when it is loaded
(``OMP_PROC_BIND``), so this module asks for it before it imports torch. And the allocator is told to keep large blocks
instead of handing them back to the kernel after every operator: otherwise each result would be paged in again, four
kilobytes at a time, and a GEMM would be timed together with its page faults.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any


def _affinity() -> list[int]:
    """Numbers of the CPUs this thread may run on."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def _set_affinity(cpus: Iterable[int]) -> bool:
    try:
        os.sched_setaffinity(0, cpus)
    except (OSError, AttributeError):
        return False
    return True


_ALLOWED = _affinity()
_BOUND = "torch" not in sys.modules and os.environ.setdefault("OMP_PROC_BIND", "true").lower() not in ("false", "0")

import torch  # noqa: E402

if _BOUND:  # loading OpenMP has bound this thread to the first CPU; importing a module must not do that
    _set_affinity(_ALLOWED)

from calibration.devices.operators import build, is_out_of_memory  # noqa: E402
from calibration.devices.protocol import HOST_KINDS, Operator, OutOfMemory, Unsupported, unknown_device  # noqa: E402
from calibration.devices.telemetry import CpuReader, Snapshot, cpuinfo  # noqa: E402
from calibration.devices.torch_device import TorchDevice, host_loop  # noqa: E402

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h


def _read_text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def last_level_cache_bytes(root: str = "/sys/devices/system/cpu/cpu0/cache") -> float:
    """Size of the largest cache of the first CPU, in bytes; 32 MiB where Linux does not say."""
    sizes = []
    for path in Path(root).glob("index*/size"):
        text = _read_text(path)
        digits = text.rstrip("KMG")
        if digits.isdecimal():
            sizes.append(float(digits) * {"K": 2.0**10, "M": 2.0**20, "G": 2.0**30}.get(text[-1:], 1.0))
    return max(sizes, default=32.0 * 2**20)


def available_memory_bytes(text: str | None = None) -> float:
    """Memory that can be taken without swapping, from ``/proc/meminfo``; 4 GiB where it does not say."""
    for line in (_read_text("/proc/meminfo") if text is None else text).splitlines():
        if line.startswith("MemAvailable:"):
            return 1024.0 * float(line.split()[1])
    return 4.0 * 2**30


def keep_blocks() -> bool:
    """Tell glibc to serve large blocks from the heap and never to shrink it; False where there is no glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def one_thread(run: Callable[[int], float]) -> Callable[[int], float]:
    """A function that times launches, with torch's operators on one thread meanwhile."""

    def alone(loops: int) -> float:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return run(loops)
        finally:
            torch.set_num_threads(threads)

    return alone


class CpuDevice(TorchDevice):
    """The CPUs this process may use: as many threads of torch as its affinity mask has CPUs unless given, each pinned.

    Operands may take ``memory_limit_bytes``, half of what is available unless given; rotation exceeds ``cache_bytes``
    twice, which Linux is asked for.
    """

    name = "cpu"

    def __init__(
        self, threads: int | None = None, memory_limit_bytes: float | None = None, cache_bytes: float | None = None
    ) -> None:
        allowed = _affinity()
        self.threads = len(allowed) if threads is None else threads
        if not 1 <= self.threads <= len(allowed):
            raise Unsupported(f"threads: expected 1 to {len(allowed)} (the CPUs this process may use), got {threads}")
        self._restore = (torch.get_num_threads(), allowed)
        self.cpus: tuple[int, ...] = tuple(allowed[: self.threads])
        # where OpenMP binds its workers the calling thread takes the first CPU; otherwise all share a mask as wide as
        # they are many
        self._pinned = _set_affinity(self.cpus[:1] if _BOUND else self.cpus)
        torch.set_num_threads(self.threads)
        self._kept = keep_blocks()
        self._reader = CpuReader(self.cpus)
        cache_bytes = last_level_cache_bytes() if cache_bytes is None else cache_bytes
        limit_bytes = 0.5 * available_memory_bytes() if memory_limit_bytes is None else memory_limit_bytes
        super().__init__("cpu", cache_bytes, limit_bytes)

    def identity(self) -> tuple[str, Mapping[str, str]]:
        """CPU model, threads, pinning, libraries of torch."""
        try:
            model = cpuinfo(_read_text("/proc/cpuinfo"), self.cpus[0])["model name"]
        except KeyError:
            model = platform.processor() or platform.machine()
        how = "one thread each" if _BOUND else "shared by all threads"
        return f"{model} ({self.threads} threads)", {
            "oneDNN": "on" if torch.backends.mkldnn.is_available() else "off",
            "isa": str(torch.backends.cpu.get_cpu_capability()),
            "threads": str(self.threads),
            "pinned": f"to cpus {' '.join(map(str, self.cpus))}, {how}" if self._pinned else "no",
            "allocator": "keeps blocks" if self._kept else "default",
            "system": f"{platform.system()} {platform.release()}",
        }

    def dtypes(self) -> tuple[str, ...]:
        """fp32; bf16 and fp16 (emulated where the CPU lacks them, and slow then); int8."""
        return ("fp32", "bf16", "fp16", "int8")

    def refuses(self, operator: Operator) -> str:
        """Why the CPU cannot run it; empty when it can."""
        if operator.kind == "gemm_2to4":
            return "gemm_2to4 needs sparse tensor cores; a CPU has none"
        if operator.kind == "launch_graph":
            return "launch_graph needs recorded graphs; torch has none on a CPU"
        if operator.dtype not in self.dtypes():
            return f"dtype {operator.dtype} has no GEMM on this CPU; it runs {', '.join(self.dtypes())}"
        return super().refuses(operator)

    def _bind(self, operator: Operator) -> tuple[str, Callable[[int], float]]:
        launches = build(operator, "cpu", self._arena)
        method, run = (
            f"perf_counter_ns round a loop over {launches.copies} rotated copies{launches.how}",
            host_loop(launches),
        )
        if operator.kind in HOST_KINDS:  # a host launches from one thread; tiny operators would only wait for others
            return f"{method}, one thread", one_thread(run)
        return method, run

    def _translate(self, error: BaseException, operator: Operator) -> Exception | None:
        return OutOfMemory(str(error)) if is_out_of_memory(error) else None

    def snapshot(self) -> Snapshot:
        """Clock, temperature, load and thermal events of the CPUs used, as far as Linux shows them."""
        return self._reader.snapshot()

    def close(self) -> None:
        """Give operands back, and the process its threads and CPUs."""
        super().close()
        threads, cpus = self._restore
        torch.set_num_threads(threads)
        if self._pinned:
            _set_affinity(cpus)


def open_named(rest: str, **options: Any) -> CpuDevice:
    """The device ``cpu``, of which there is one."""
    if rest:
        raise unknown_device(f"cpu:{rest}")
    return CpuDevice(**options)
