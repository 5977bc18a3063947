"""Readings, and what stands in for them when they cannot be had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fakes.gpu import GPUS, NO_TROUBLES, UUID, Kernel, PlantedCuda, Troubles, planted_nvml

from calibration.devices.telemetry import (
    UNKNOWN,
    CpuReader,
    NvmlReader,
    Snapshot,
    throttled,
    waited,
)

pytestmark = pytest.mark.quick


def nvml_of(troubles: Troubles = NO_TROUBLES, broken: tuple[str, ...] = ()) -> Any:
    """NVML of a planted H100 under load."""
    cuda = PlantedCuda(GPUS["H100"], troubles)
    cuda.submit({Kernel("gemm", 1.0, 0.0): 1})
    return planted_nvml(cuda, broken)


def test_readings_are_in_si() -> None:
    reader = NvmlReader(nvml_of(Troubles(power_cap=0.75)), UUID)
    assert reader.snapshot() == Snapshot(1.485e9, 2.6e9, 679.0, 61.0, 1.0, ("sw_power_cap",))
    assert reader.driver() == "580.65.06"
    assert reader.power_limit_w() == 700.0


def test_energy_is_a_counter_in_joules_where_the_gpu_has_one() -> None:
    cuda = PlantedCuda(GPUS["H100"], NO_TROUBLES)
    reader = NvmlReader(planted_nvml(cuda), UUID)
    first = reader.energy_j()
    cuda.rest(10.0)
    assert (first, reader.energy_j()) == (0.0, pytest.approx(0.2 * 700.0 * 10.0, rel=1e-3))
    old = planted_nvml(cuda, ("nvmlDeviceGetTotalEnergyConsumption",))
    assert NvmlReader(old, UUID).energy_j() == UNKNOWN
    assert NvmlReader(None).energy_j() == UNKNOWN


def test_the_card_is_found_by_its_uuid_since_numbers_ignore_cuda_visible_devices() -> None:
    assert NvmlReader(nvml_of(), f"GPU-{UUID}").snapshot().clock_hz == 1.98e9
    assert NvmlReader(nvml_of(), "GPU-other").snapshot() == Snapshot()


def test_without_nvml_everything_is_unknown() -> None:
    reader = NvmlReader(None)
    assert reader.snapshot() == Snapshot()
    assert reader.driver() == UNKNOWN
    assert reader.power_limit_w() == UNKNOWN


def test_nvml_that_does_not_start_is_unknown_and_one_reading_that_fails_leaves_the_others() -> None:
    for broken in ("nvmlInit", "nvmlDeviceGetHandleByUUID"):
        assert NvmlReader(nvml_of(broken=(broken,)), UUID).snapshot() == Snapshot()
    names = {"PowerUsage": "power_w", "Temperature": "temperature_c", "ClockInfo": "clock_hz"}
    for broken, field in names.items():
        snapshot = NvmlReader(nvml_of(broken=(f"nvmlDeviceGet{broken}",)), UUID).snapshot()
        assert getattr(snapshot, field) == UNKNOWN
        assert snapshot.throttle == ()


def test_throttle_reasons_under_their_older_name() -> None:
    new = "nvmlDeviceGetCurrentClocksEventReasons"
    old = "nvmlDeviceGetCurrentClocksThrottleReasons"
    hot = Troubles(throttle=(0.0, 1.0))
    reader = NvmlReader(nvml_of(hot, (new,)), UUID)
    assert reader.snapshot().throttle == ("hw_thermal_slowdown",)
    assert NvmlReader(nvml_of(hot, (new, old)), UUID).snapshot().throttle == UNKNOWN


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


def test_energy_of_cpus_is_that_of_their_packages_and_counters_wrap_around(tmp_path: Path) -> None:
    rapl = "sys/class/powercap/intel-rapl:"
    zones = {"0": "package-0", "0:0": "core", "1": "package-1", "2": "psys"}
    files = {f"{rapl}{zone}/name": f"{name}\n" for zone, name in zones.items()}
    files |= {f"{rapl}{zone}/max_energy_range_uj": "262000000\n" for zone in zones}
    files |= {f"{rapl}{zone}/energy_uj": "200000000\n" for zone in zones}
    reader = CpuReader((0,), _plant(tmp_path, files))
    first = reader.energy_j()
    # 12 J in one package; 65 J in the other, past the end of its counter
    later = {"0": "212000000", "1": "3000000", "2": "250000000"}
    _plant(tmp_path, {f"{rapl}{zone}/energy_uj": text for zone, text in later.items()})
    second = reader.energy_j()
    assert isinstance(first, float)
    assert isinstance(second, float)
    assert second - first == pytest.approx(77.0)
    (tmp_path / f"{rapl}1/energy_uj").unlink()  # as a counter that only root may read
    assert reader.energy_j() == UNKNOWN
    assert CpuReader((0,), tmp_path / "none").energy_j() == UNKNOWN


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
