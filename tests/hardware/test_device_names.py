"""Real names of GPUs, with their SMs, capability and memory: each finds its profile, or none."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from calibration.devices.protocol import Description, Gpu
from calibration.devices.replay import ReplayDevice, roofline_timings
from calibration.devices.telemetry import UNKNOWN, Snapshot
from calibration.fit.base_profile import architecture_of, base_profile, device_names, shipped_name
from simulator.hardware.library import list_hardware, load_hardware

with open(Path(__file__).parent / "device_names.csv", encoding="utf-8") as file:
    ROWS = list(csv.DictReader(file))


def gpu_of(row: dict[str, str], **changes: Any) -> Gpu:
    major, minor = map(int, row["capability"].split("."))
    gpu = Gpu(
        int(row["sm_count"]), (major, minor), float(row["memory_gib"]) * 2**30, row["mig"] == "1"
    )
    return replace(gpu, **changes)


@pytest.mark.quick
@pytest.mark.parametrize("row", ROWS, ids=[row["name"] for row in ROWS])
def test_each_gpu_finds_its_profile_or_none(row: dict[str, str]) -> None:
    name = row["name"]
    assert shipped_name(name, gpu_of(row)) == row["profile"]
    assert shipped_name(f"{name} ({row['sm_count']} SM)", gpu_of(row)) == row["profile"]
    assert row["source"]
    if row["profile"]:
        hw = load_hardware(row["profile"])
        assert architecture_of(gpu_of(row).capability) == hw.architecture


@pytest.mark.quick
def test_the_table_has_every_nvidia_profile_and_those_that_have_none() -> None:
    assert len(ROWS) >= 60
    found = {row["profile"] for row in ROWS}
    nvidia = {name for name in list_hardware() if load_hardware(name).vendor == "NVIDIA"}
    assert found == nvidia | {""} == set(device_names().values()) | {""}


@pytest.mark.quick
def test_the_facts_count_beside_the_name() -> None:
    """A slice, a part of the SMs, or another memory under the full name is not the GPU of the
    profile."""
    row = next(row for row in ROWS if row["profile"] == "h100_sxm")
    name, gpu = row["name"], gpu_of(row)
    for changes in (
        {"mig": True},
        {"sm_count": 60},
        {"memory_bytes": 4e10},
        {"capability": (8, 0)},
    ):
        assert shipped_name(name, replace(gpu, **changes)) == ""
    assert shipped_name(f"{name} (60 SM)") == ""
    assert shipped_name(f"{name} (132 SM)") == shipped_name(name) == "h100_sxm"


class Idle(ReplayDevice):
    """A GPU without a profile that is idle: its clock and power are far below its limits."""

    def snapshot(self) -> Snapshot:
        return Snapshot(clock_hz=2.1e8, power_w=12.0)


def profile(name: str, **changes: Any) -> Any:
    row = next(row for row in ROWS if row["name"] == name)
    limits: dict[str, Any] = {"max_clock_hz": 2.565e9, "power_limit_w": 300.0}
    gpu = gpu_of(row, **{**limits, **changes})
    about = Description(
        "cuda:0", f"{name} ({gpu.sm_count} SM)", {"torch": "2.13"}, gpu.memory_bytes, 9.6e7, gpu
    )
    return base_profile(Idle(roofline_timings(1e14, 8e11), description=about), "bf16")


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("NVIDIA A16", "ampere"),
        ("NVIDIA L40", "ada"),
        ("NVIDIA H200 NVL", "hopper"),
        ("NVIDIA GB200", "blackwell_sm100"),
        ("NVIDIA GeForce RTX 5070 Ti", "blackwell"),
        ("Quadro RTX 8000", "turing"),
        ("NVIDIA TITAN V", "volta"),
    ],
)
def test_a_gpu_without_a_profile_has_its_limits_and_its_architecture(
    name: str, architecture: str
) -> None:
    hw = profile(name)
    assert (hw.architecture, hw.vendor) == (architecture, "NVIDIA")
    assert (hw.boost_clock_hz, hw.max_clock_hz, hw.power_w) == (2.565e9, 2.565e9, 300.0)
    assert hw.sm_count == gpu_of(next(row for row in ROWS if row["name"] == name)).sm_count


def test_unknown_limits_are_placeholders_not_those_of_an_idle_device() -> None:
    hw = profile("NVIDIA A16", max_clock_hz=UNKNOWN, power_limit_w=UNKNOWN)
    assert hw.boost_clock_hz > 1e9
    assert hw.power_w > 50.0
    assert all("unknown" in hw.sources[name] for name in ("boost_clock", "power"))
