"""Readings, and what stands in for them when they cannot be had."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from calibration.devices.telemetry import UNKNOWN, CpuReader, NvmlReader, Snapshot, throttle_reasons, throttled, waited


class FakeNvml:
    """NVML with planted answers; names in ``broken`` raise as a driver does that does not support them."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, broken: tuple[str, ...] = (), reasons: int = 0) -> None:
        self.broken, self.reasons, self.asked = broken, reasons, []

    def __getattr__(self, name: str) -> Any:
        answers = {
            "nvmlInit": lambda: None,
            "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
            "nvmlDeviceGetClockInfo": lambda handle, kind: self.asked.append(handle) or {1: 1980, 2: 2619}[kind],
            "nvmlDeviceGetPowerUsage": lambda handle: 437_250,
            "nvmlDeviceGetTemperature": lambda handle, sensor: 61,
            "nvmlDeviceGetUtilizationRates": lambda handle: SimpleNamespace(gpu=97),
            "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: self.reasons,
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda handle: self.reasons,
            "nvmlSystemGetDriverVersion": lambda: "580.1",
            "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 700_000,
        }
        if name in self.broken:
            raise RuntimeError(f"{name}: Not Supported")
        return answers[name]


def test_readings_are_in_si() -> None:
    nvml = FakeNvml(reasons=0x4)
    reader = NvmlReader(nvml, "GPU-abc")
    assert reader.snapshot() == Snapshot(1.98e9, 2.619e9, 437.25, 61.0, 0.97, ("sw_power_cap",))
    assert reader.driver() == "580.1"
    assert reader.power_limit_w() == 700.0
    assert set(nvml.asked) == {"GPU-abc"}  # the card by its UUID, since NVML's numbers ignore CUDA_VISIBLE_DEVICES


def test_without_nvml_everything_is_unknown() -> None:
    reader = NvmlReader(None)
    assert reader.snapshot() == Snapshot()
    assert reader.driver() == UNKNOWN
    assert reader.power_limit_w() == UNKNOWN


@pytest.mark.parametrize("broken", ["nvmlInit", "nvmlDeviceGetHandleByUUID"])
def test_nvml_that_does_not_start_is_unknown(broken: str) -> None:
    assert NvmlReader(FakeNvml((broken,)), "GPU-abc").snapshot() == Snapshot()


@pytest.mark.parametrize(
    ("broken", "field"),
    [
        ("nvmlDeviceGetPowerUsage", "power_w"),
        ("nvmlDeviceGetTemperature", "temperature_c"),
        ("nvmlDeviceGetClockInfo", "clock_hz"),
        ("nvmlDeviceGetUtilizationRates", "load"),
    ],
)
def test_one_reading_that_fails_leaves_the_others(broken: str, field: str) -> None:
    snapshot = NvmlReader(FakeNvml((broken,)), "GPU-abc").snapshot()
    assert getattr(snapshot, field) == UNKNOWN
    assert snapshot.throttle == ()


def test_throttle_reasons_under_their_older_name() -> None:
    nvml = FakeNvml(("nvmlDeviceGetCurrentClocksEventReasons",), reasons=0x40)
    assert NvmlReader(nvml, "GPU-abc").snapshot().throttle == ("hw_thermal_slowdown",)
    both = FakeNvml(("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"))
    assert NvmlReader(both, "GPU-abc").snapshot().throttle == UNKNOWN


def test_a_bit_without_a_name_is_not_lost() -> None:
    assert throttle_reasons(0x1001) == ("gpu_idle", "bit_0x1000")


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((), (), ()),
        (("sw_power_cap",), ("sw_power_cap", "gpu_idle"), ()),  # the power limit belongs to what is measured
        ((), ("sw_thermal_slowdown",), ("sw_thermal_slowdown",)),
        (("hw_slowdown",), (), ("hw_slowdown",)),
        (UNKNOWN, (), ()),
        (UNKNOWN, UNKNOWN, UNKNOWN),
    ],
)
def test_what_counts_as_throttled(before: Any, after: Any, expected: Any) -> None:
    assert throttled(Snapshot(throttle=before), Snapshot(throttle=after)) == expected


def test_a_counter_that_rises_is_throttling() -> None:
    assert throttled(Snapshot(throttle_events=3.0), Snapshot(throttle_events=3.0)) == ()
    assert throttled(Snapshot(throttle_events=3.0), Snapshot(throttle_events=4.0)) == ("cpu_thermal",)
    assert throttled(Snapshot(throttle_events=3.0), Snapshot()) == UNKNOWN


def test_waiting_needs_both_readings() -> None:
    assert waited(Snapshot(), Snapshot(waited_s=1.0), 1.0) == UNKNOWN
    assert (
        waited(Snapshot(waited_s=2.0), Snapshot(waited_s=1.0), 1.0) == 0.0
    )  # a thread that ended took its count along
    assert waited(Snapshot(waited_s=1.0), Snapshot(waited_s=2.0), 0.0) == UNKNOWN


def _plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_cpu_readings(tmp_path: Path) -> None:
    cpu = "sys/devices/system/cpu/cpu"
    root = _plant(
        tmp_path,
        {
            f"{cpu}0/cpufreq/scaling_cur_freq": "3000000\n",
            f"{cpu}1/cpufreq/scaling_cur_freq": "2000000\n",
            f"{cpu}0/thermal_throttle/core_throttle_count": "4\n",
            "sys/class/thermal/thermal_zone0/temp": "45000\n",
            "sys/class/thermal/thermal_zone1/temp": "62500\n",
            "proc/loadavg": "1.50 1.0 0.9 1/100 42\n",
            "proc/self/task/10/schedstat": "5 1500000000 7\n",
            "proc/self/task/11/schedstat": "5 500000000 7\n",
        },
    )
    assert CpuReader((1, 0), root).snapshot() == Snapshot(2.5e9, UNKNOWN, UNKNOWN, 62.5, 1.5, UNKNOWN, 4.0, 2.0)


def test_cpu_clock_from_cpuinfo_where_there_is_no_cpufreq(tmp_path: Path) -> None:
    root = _plant(
        tmp_path, {"proc/cpuinfo": "processor\t: 0\ncpu MHz\t\t: 2600.000\n\nprocessor\t: 1\ncpu MHz\t\t: bad\n"}
    )
    assert CpuReader((0,), root).snapshot().clock_hz == 2.6e9
    assert CpuReader((1,), root).snapshot().clock_hz == UNKNOWN


def test_a_system_that_shows_nothing_is_unknown(tmp_path: Path) -> None:
    assert CpuReader((0,), tmp_path).snapshot() == Snapshot()
