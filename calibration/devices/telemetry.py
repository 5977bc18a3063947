"""State of the device during a measurement: clocks, power, temperature, throttle reasons.

An unavailable reading (no NVML, a virtual machine, a driver that refuses) is the string
``"unknown"``, never 0.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

Unknown = Literal["unknown"]
UNKNOWN: Unknown = "unknown"
Reading = float | Unknown

# bits of nvmlClocksEventReasons from the lowest (NVIDIA, "NVML API Reference Guide", group
# nvmlClocksEventReasons)
NVML_REASONS = (
    "gpu_idle",
    "applications_clocks_setting",
    "sw_power_cap",
    "hw_slowdown",
    "sync_boost",
    "sw_thermal_slowdown",
    "hw_thermal_slowdown",
    "hw_power_brake_slowdown",
    "display_clock_setting",
)

POWER_CAP = "sw_power_cap"

# Reasons to repeat a sample. The power cap is not among them: a data-centre GPU is at its power
# limit in every long GEMM, also in a repeat. Rows that the cap slowed down have a flag.
THROTTLING = frozenset(
    {
        "hw_slowdown",
        "sw_thermal_slowdown",
        "hw_thermal_slowdown",
        "hw_power_brake_slowdown",
        "cpu_thermal",
    }
)


@dataclass(frozen=True)
class Snapshot:
    clock_hz: Reading = UNKNOWN  # SM clock of a GPU, mean core clock of a CPU
    memory_clock_hz: Reading = UNKNOWN
    power_w: Reading = UNKNOWN
    temperature_c: Reading = UNKNOWN  # degrees Celsius
    load: Reading = UNKNOWN  # GPU utilisation in 0..1; one-minute load average of a CPU
    # reported reasons for reduced clocks; may be empty
    throttle: tuple[str, ...] | Unknown = UNKNOWN
    # growing counter, for devices that count events instead of reporting a state
    throttle_events: Reading = UNKNOWN
    # growing counter: time that threads of this process waited for a CPU
    waited_s: Reading = UNKNOWN

    def as_record(self) -> dict[str, Any]:
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in vars(self).items()
        }


def throttle_reasons(bits: int) -> tuple[str, ...]:
    """Return the names of NVML's clock event reasons; bits without a name become ``bit_0x...``."""
    names = [name for bit, name in enumerate(NVML_REASONS) if bits >> bit & 1]
    rest = bits >> len(NVML_REASONS) << len(NVML_REASONS)
    return tuple(names + ([f"bit_{rest:#x}"] if rest else []))


def throttled(before: Snapshot, after: Snapshot) -> tuple[str, ...] | Unknown:
    """Return the reasons to repeat a measurement between two snapshots; "unknown" if neither has a
    reading."""
    states = [
        snapshot.throttle for snapshot in (before, after) if not isinstance(snapshot.throttle, str)
    ]
    reasons = {reason for state in states for reason in state}
    events = _known((before.throttle_events, after.throttle_events))
    counted = len(events) == 2
    if counted and events[1] > events[0]:
        reasons.add("cpu_thermal")
    return tuple(sorted(reasons & THROTTLING)) if states or counted else UNKNOWN


def waited(before: Snapshot, after: Snapshot, elapsed_s: float, threads: int = 1) -> Reading:
    """Return the share of time that threads waited for a CPU, 0..1; "unknown" if the system does
    not count it."""
    if isinstance(before.waited_s, str) or isinstance(after.waited_s, str) or elapsed_s <= 0:
        return UNKNOWN
    return max(0.0, after.waited_s - before.waited_s) / (elapsed_s * max(threads, 1))


def under_load(readings: Sequence[Snapshot]) -> Snapshot:
    """Return several readings as one: the median of each number, and the throttle reasons of all
    readings."""
    numbers: dict[str, Any] = {}
    for name in (field.name for field in fields(Snapshot) if field.name != "throttle"):
        known = _known(getattr(reading, name) for reading in readings)
        numbers[name] = statistics.median(known) if known else UNKNOWN
    states = [reading.throttle for reading in readings if not isinstance(reading.throttle, str)]
    reasons = tuple(dict.fromkeys(reason for state in states for reason in state))
    return Snapshot(**numbers, throttle=reasons if states else UNKNOWN)


def _read(reader: Callable[[], Any], scale: float = 1.0) -> Reading:
    """Return a number, or "unknown" after any error: a reading must never stop a measurement."""
    try:
        return float(reader()) * scale
    except Exception:
        return UNKNOWN


class NvmlReader:
    """Snapshots of one NVIDIA GPU by the ``pynvml`` module; without it (None) every reading is
    "unknown". The UUID identifies the GPU, because NVML's numbers ignore
    ``CUDA_VISIBLE_DEVICES``."""

    def __init__(self, nvml: Any, uuid: str = "", index: int = 0) -> None:
        self._nvml = nvml
        self._handle: Any = None
        if nvml is not None:
            with suppress(Exception):  # NVML's errors have no public base class
                nvml.nvmlInit()
                by_uuid = nvml.nvmlDeviceGetHandleByUUID
                by_index = nvml.nvmlDeviceGetHandleByIndex
                self._handle = (
                    by_uuid(f"GPU-{uuid.removeprefix('GPU-')}") if uuid else by_index(index)
                )

    def snapshot(self) -> Snapshot:
        nvml = self._nvml
        handle = self._handle
        if handle is None:
            return Snapshot()
        clock_hz = _read(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM), 1e6)
        throttle = self._throttle()  # before slower readings, since the load may be short
        return Snapshot(
            clock_hz=clock_hz,
            memory_clock_hz=_read(
                lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM), 1e6
            ),
            power_w=_read(lambda: nvml.nvmlDeviceGetPowerUsage(handle), 1e-3),
            temperature_c=_read(
                lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
            ),
            load=_read(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu, 0.01),
            throttle=throttle,
        )

    def _throttle(self) -> tuple[str, ...] | Unknown:
        # renamed in driver 535; older modules have only the second name
        for name in (
            "nvmlDeviceGetCurrentClocksEventReasons",
            "nvmlDeviceGetCurrentClocksThrottleReasons",
        ):
            try:
                return throttle_reasons(int(getattr(self._nvml, name)(self._handle)))
            except Exception:
                continue
        return UNKNOWN

    def energy_j(self) -> Reading:
        """Return the growing energy counter of the GPU, J (Volta and newer)."""
        return _read(lambda: self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle), 1e-3)

    def driver(self) -> str:
        try:
            version = self._nvml.nvmlSystemGetDriverVersion()
        except Exception:
            return UNKNOWN
        return version.decode() if isinstance(version, bytes) else str(version)

    def power_limit_w(self, default: bool = False) -> Reading:
        """Return the limit that was set, or (``default``, or of a laptop, which has no other) that
        of delivery. The enforced limit of a laptop moves, so it identifies no run."""
        nvml, handle = self._nvml, self._handle
        limit = _read(lambda: nvml.nvmlDeviceGetPowerManagementDefaultLimit(handle), 1e-3)
        if default and limit != UNKNOWN:
            return limit
        set_w = _read(lambda: nvml.nvmlDeviceGetPowerManagementLimit(handle), 1e-3)
        return limit if set_w == UNKNOWN else set_w

    def max_clock_hz(self) -> Reading:
        return _read(
            lambda: self._nvml.nvmlDeviceGetMaxClockInfo(self._handle, self._nvml.NVML_CLOCK_SM),
            1e6,
        )

    def sliced(self) -> bool:
        return _read(lambda: self._nvml.nvmlDeviceGetMigMode(self._handle)[0]) == 1.0


class CpuReader:
    """Snapshots of CPUs by number, from Linux's ``/proc`` and ``/sys`` under ``root``; "unknown" on
    other systems."""

    def __init__(self, cpus: Iterable[int], root: Path = Path("/")) -> None:
        self.cpus = tuple(sorted(cpus))
        self._root = root
        names = sorted(root.glob("sys/class/powercap/*-rapl:*/name"))
        packages = (name.parent for name in names if self._text(name).startswith("package"))
        # last reading of each package, and the energy of all packages, J
        self._packages = dict.fromkeys(packages, 0.0)
        self._energy_j = 0.0

    def energy_j(self) -> Reading:
        """Return the growing energy of all packages, J, by RAPL (Linux,
        Documentation/power/powercap/powercap.rst), whose counters wrap around; "unknown" where a
        counter is not readable."""
        for zone, last in self._packages.items():
            now = self._read(zone / "energy_uj", scale=1e-6)
            wrap = self._read(zone / "max_energy_range_uj", scale=1e-6)
            if isinstance(now, str) or isinstance(wrap, str):
                return UNKNOWN
            self._energy_j += now - last + (wrap if now < last else 0.0)
            self._packages[zone] = now
        return self._energy_j if self._packages else UNKNOWN

    def snapshot(self) -> Snapshot:
        cpu = "sys/devices/system/cpu/cpu"
        clocks = _known(self._clock_hz(number) for number in self.cpus)
        events = _known(
            self._read(f"{cpu}{number}/thermal_throttle/core_throttle_count")
            for number in self.cpus
        )
        zones = (self._root / "sys/class/thermal").glob("thermal_zone*/temp")
        temperatures = _known(self._read(zone, scale=1e-3) for zone in zones)
        # second field: nanoseconds on a run queue (Linux, Documentation/scheduler/sched-stats.rst)
        # of live threads
        tasks = (self._root / "proc/self/task").glob("*/schedstat")
        waits = _known(self._read(task, field=1, scale=1e-9) for task in tasks)
        return Snapshot(
            clock_hz=sum(clocks) / len(clocks) if clocks else UNKNOWN,
            temperature_c=max(temperatures, default=UNKNOWN),
            load=_read(lambda: os.getloadavg()[0])
            if self._root == Path("/")
            else self._read("proc/loadavg"),
            throttle_events=sum(events) if events else UNKNOWN,
            waited_s=sum(waits) if waits else UNKNOWN,
        )

    def _text(self, path: str | Path) -> str:
        return (self._root / path).read_text(encoding="utf-8", errors="replace")

    def _read(self, path: str | Path, field: int = 0, scale: float = 1.0) -> Reading:
        return _read(lambda: self._text(path).split()[field], scale)

    def _clock_hz(self, cpu: int) -> Reading:
        clock = self._read(f"sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_cur_freq", scale=1e3)
        return (
            _read(lambda: cpuinfo(self._text("proc/cpuinfo"), cpu)["cpu MHz"], 1e6)
            if clock == UNKNOWN
            else clock
        )


def _known(readings: Iterable[Reading]) -> list[float]:
    return [reading for reading in readings if not isinstance(reading, str)]


def cpuinfo(text: str, cpu: int = 0) -> dict[str, str]:
    for block in text.split("\n\n"):
        entry = {
            key.strip(): value.strip()
            for key, _, value in (line.partition(":") for line in block.splitlines())
        }
        if entry.get("processor") == str(cpu):
            return entry
    raise KeyError(f"processor {cpu}")
