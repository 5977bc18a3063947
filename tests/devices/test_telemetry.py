"""Readings, and what stands in for them when they cannot be had."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from calibration.devices.telemetry import (
    UNKNOWN,
    CpuReader,
    NvmlReader,
    Snapshot,
    throttled,
    waited,
)

pytestmark = pytest.mark.quick


class FakeNvml:
    """NVML with planted answers; names in ``broken`` raise as a driver does that does not support
    them."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, broken: tuple[str, ...] = (), reasons: int = 0) -> None:
        self.broken, self.reasons, self.asked = broken, reasons, []

    def __getattr__(self, name: str) -> Any:
        if name in self.broken:
            raise RuntimeError(f"{name}: Not Supported")
        if name == "nvmlDeviceGetHandleByUUID":
            return lambda uuid: uuid
        if name == "nvmlDeviceGetClockInfo":
            return lambda handle, kind: self.asked.append(handle) or {1: 1980, 2: 2619}[kind]
        facts = {
            "Init": None,
            "PowerUsage": 437_250,
            "Temperature": 61,
            "UtilizationRates": SimpleNamespace(gpu=97),
        }
        facts |= dict.fromkeys(
            ("CurrentClocksEventReasons", "CurrentClocksThrottleReasons"), self.reasons
        )
        facts |= {"SystemGetDriverVersion": "580.1", "EnforcedPowerLimit": 700_000}
        return lambda *_: facts[name.removeprefix("nvml").removeprefix("DeviceGet")]


def test_readings_are_in_si() -> None:
    nvml = FakeNvml(reasons=0x4)
    reader = NvmlReader(nvml, "GPU-abc")
    assert reader.snapshot() == Snapshot(1.98e9, 2.619e9, 437.25, 61.0, 0.97, ("sw_power_cap",))
    assert reader.driver() == "580.1"
    assert reader.power_limit_w() == 700.0
    # the card by its UUID, since NVML's numbers ignore CUDA_VISIBLE_DEVICES
    assert set(nvml.asked) == {"GPU-abc"}


def test_without_nvml_everything_is_unknown() -> None:
    reader = NvmlReader(None)
    assert reader.snapshot() == Snapshot()
    assert reader.driver() == UNKNOWN
    assert reader.power_limit_w() == UNKNOWN


def test_nvml_that_does_not_start_is_unknown_and_one_reading_that_fails_leaves_the_others() -> None:
    for broken in ("nvmlInit", "nvmlDeviceGetHandleByUUID"):
        assert NvmlReader(FakeNvml((broken,)), "GPU-abc").snapshot() == Snapshot()
    names = {"PowerUsage": "power_w", "Temperature": "temperature_c", "ClockInfo": "clock_hz"}
    for broken, field in names.items():
        snapshot = NvmlReader(FakeNvml((f"nvmlDeviceGet{broken}",)), "GPU-abc").snapshot()
        assert getattr(snapshot, field) == UNKNOWN
        assert snapshot.throttle == ()


def test_throttle_reasons_under_their_older_name() -> None:
    nvml = FakeNvml(("nvmlDeviceGetCurrentClocksEventReasons",), reasons=0x40)
    assert NvmlReader(nvml, "GPU-abc").snapshot().throttle == ("hw_thermal_slowdown",)
    both = FakeNvml(
        ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")
    )
    assert NvmlReader(both, "GPU-abc").snapshot().throttle == UNKNOWN


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((), (), ()),
        # the power limit belongs to what is measured
        (("sw_power_cap",), ("sw_power_cap", "gpu_idle"), ()),
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
    assert throttled(Snapshot(throttle_events=3.0), Snapshot(throttle_events=4.0)) == (
        "cpu_thermal",
    )
    assert throttled(Snapshot(throttle_events=3.0), Snapshot()) == UNKNOWN


def test_waiting_needs_both_readings() -> None:
    assert waited(Snapshot(), Snapshot(waited_s=1.0), 1.0) == UNKNOWN
    # a thread took its count along
    ended = waited(Snapshot(waited_s=2.0), Snapshot(waited_s=1.0), 1.0)
    assert (ended, waited(Snapshot(waited_s=1.0), Snapshot(waited_s=1.5), 1.0, threads=2)) == (
        0.0,
        0.25,
    )
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
    assert CpuReader((1, 0), root).snapshot() == Snapshot(
        2.5e9, UNKNOWN, UNKNOWN, 62.5, 1.5, UNKNOWN, 4.0, 2.0
    )
