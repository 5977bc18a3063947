"""Mean power of a device while work repeats, by its energy counter or, without one, by samples of
its power.

NVML moves its counters every 20 to 100 ms, and GPUs newer than the A100 report a power averaged
over 1 s (NVIDIA, "NVML API Reference Guide", nvmlDeviceGetPowerUsage; Yang et al., "Part-time Power
Measurements", arXiv 2312.02741). So one launch is too short: the window of all its repeats counts.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any, NamedTuple

from calibration.devices.protocol import Device, Sampler
from calibration.devices.telemetry import UNKNOWN
from calibration.measure.timing import MAX_LOOPS

UPDATE_S = 0.1
"""Longest time between two updates of a counter."""
WINDOW_S = 1.0
"""Shortest window of a mean power: the ends add up to a tenth, 4 % by standard deviation."""
TURN_S = UPDATE_S + WINDOW_S  # time of a mean power by a counter
BUSY = 0.8
"""Least share of a window in which kernels run; the rest are flushes, replays for readings and
launches."""


class MeasuredPower(NamedTuple):
    watts: float
    busy: float  # share of the window in which the work ran
    seconds: float  # per launch or pass


def has_counter(device: Device) -> bool:
    return not isinstance(device.energy_j(), str)


def mean_power(device: Device, sample: Sampler, loops: int) -> MeasuredPower | None:
    """Return the mean power while samples of ``loops`` launches repeat; None if the device reports
    neither energy nor power."""
    # also drops readings of other work
    if device.snapshot().power_w == UNKNOWN and not has_counter(device):
        return None
    _repeat(device, sample, loops, UPDATE_S if has_counter(device) else WINDOW_S)
    device.snapshot()
    before, start = device.energy_j(), device.clock()
    samples = _repeat(device, sample, loops, WINDOW_S)
    after, window_s = device.energy_j(), device.clock() - start
    if isinstance(before, str) or isinstance(after, str):
        watts = device.snapshot().power_w
    else:
        watts = (after - before) / window_s
    busy = sum(samples) * loops / window_s
    return None if isinstance(watts, str) else MeasuredPower(watts, busy, fmean(samples))


def launches(seconds: float) -> int:
    """Return the launches of a sample that is longer than the gap between two samples."""
    return min(max(round(UPDATE_S / seconds), 1), MAX_LOOPS)


def idle_power(device: Device) -> dict[str, Any]:
    """Return the power of the waiting device, W, and the method of all powers, for the header of a
    run; nothing if the device reports none."""

    def wait(_: int) -> float:
        device.rest(UPDATE_S)
        return UPDATE_S

    method = "an energy counter" if has_counter(device) else "samples"
    found = mean_power(device, wait, 1)
    about = f"power: mean of {WINDOW_S:g} s by {method}"
    return {} if found is None else {"idle_w": found.watts, "method": about}


def _repeat(device: Device, sample: Sampler, loops: int, seconds: float) -> list[float]:
    samples, start = list[float](), device.clock()
    while device.clock() - start < seconds:
        samples.append(sample(loops))
    return samples
