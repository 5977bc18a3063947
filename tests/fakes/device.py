"""Planted devices in simulated time, without torch: with faults, with powers, and the GPUs of
:mod:`fakes.gpu`."""

from __future__ import annotations

import math
import signal
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fakes.gpu import Gpu

from calibration.devices import protocol
from calibration.devices.protocol import Description, DeviceLost, Operator, OutOfMemory
from calibration.devices.replay import ReplayDevice, Seconds
from calibration.devices.telemetry import UNKNOWN, Reading, Snapshot

_SLOWDOWN = 1.6  # factor on times under throttling


@dataclass(frozen=True)
class Faults:
    """Faults to plant. Numbers count the calls of ``prepare`` from 0, including drift checks and
    repeats."""

    # preparations with thermal throttling: slower, and reported by the telemetry
    throttle: Collection[int] = ()
    noisy: Collection[int] = ()  # preparations with a relative standard deviation of 0.5
    nan: Collection[int] = ()  # preparations whose third sample is not a number
    out_of_memory_bytes: float = math.inf  # operators with a larger footprint run out of memory
    lost_at: int | None = None  # preparation during which the device stops to respond, permanently
    drift_per_s: float = 0.0  # relative slowdown per second of simulated time
    nvml: bool = True  # whether telemetry works; otherwise every reading is "unknown"
    # preparations at the power cap, at half of the clock; None: the cap is not reached
    capped: Collection[int] | None = None
    raises: Collection[int] = ()  # preparations that raise an error of a kernel
    wait: float = 0.0  # share of the time in which other processes have the CPU
    waits: Mapping[int, float] = field(default_factory=dict)  # the same during some preparations
    # in the last 0.4 of each simulated second, times are 1.4 times as long
    shared: bool = False


@dataclass(eq=False)
class PoweredDevice(ReplayDevice):
    """A device with planted powers, W: idle, further in each kernel, and at the rates of
    ``peaks``, bytes/s and FLOP/s. Its energy counter moves every ``update_s``."""

    idle_w: float = field(default=100.0, kw_only=True)
    active_w: float = field(default=50.0, kw_only=True)
    memory_w: float = field(default=420.0, kw_only=True)
    compute_w: float = field(default=600.0, kw_only=True)
    peaks: tuple[float, float] = field(default=(3.35e12, 989.4e12), kw_only=True)
    limit_w: float = field(default=math.inf, kw_only=True)
    update_s: float = field(default=0.1, kw_only=True)
    scatter: float = field(default=0.0, kw_only=True)  # scatter of the power of an operator, log
    counts: bool = field(default=True, kw_only=True)  # else it reports only its present power
    _now_w: float = field(default=math.nan, kw_only=True)
    _work_j: float = field(default=0.0, kw_only=True)
    _counter: tuple[float, float] = field(default=(-1.0, 0.0), kw_only=True)

    def prepare(self, operator: Operator) -> Any:
        self._factor = math.exp(self.scatter * self._rng.standard_normal())
        return super().prepare(operator)

    def watts(self, operator: Operator, seconds: float) -> float:
        moved, computed = operator.bytes / self.peaks[0], operator.flops / self.peaks[1]
        work_j = self.memory_w * moved + self.compute_w * computed
        return min(self._factor * (self.idle_w + self.active_w + work_j / seconds), self.limit_w)

    def play(self, operator: Operator, loops: int) -> float:
        seconds = super().play(operator, loops)
        self._now_w = self.watts(operator, seconds)
        self._work_j += loops * seconds * (self._now_w - self.idle_w)
        return seconds

    def rest(self, seconds: float) -> None:
        self._now_w = self.idle_w
        super().rest(seconds)

    def snapshot(self) -> Snapshot:
        return replace(super().snapshot(), power_w=self._now_w)

    def energy_j(self) -> Reading:
        if not self.counts:
            return UNKNOWN
        if self.clock() - self._counter[0] >= self.update_s:
            self._counter = self.clock(), self.idle_w * self.clock() + self._work_j
        return self._counter[1]


@dataclass(eq=False)
class FaultyDevice(ReplayDevice):
    faults: Faults = field(default_factory=Faults, kw_only=True)
    samples: int = field(default=0, kw_only=True)  # samples of the last preparation
    lost: bool = field(default=False, kw_only=True)
    waited_s: float = field(default=0.0, kw_only=True)
    read_at_s: float = field(default=0.0, kw_only=True)

    @property
    def number(self) -> int:
        """Number of the last preparation."""
        return len(self.prepared) - 1

    def prepare(self, operator: Operator) -> Any:
        if self.lost:
            raise DeviceLost("the device was lost before")
        self.samples = 0
        prepared = super().prepare(operator)
        if operator.footprint_bytes > self.faults.out_of_memory_bytes:
            raise OutOfMemory(f"{operator.footprint_bytes:.3g} bytes requested")
        if self.number in self.faults.raises:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied\nlong trace")
        return prepared

    def play(self, operator: Operator, loops: int) -> float:
        f = self.faults
        self.samples += 1
        self.lost |= f.lost_at is not None and self.number >= f.lost_at and self.samples > 2
        if self.lost:
            raise DeviceLost("planted: the device has fallen off the bus")
        value = (1.0 + f.drift_per_s * self.clock()) * super().play(operator, loops)
        value *= _SLOWDOWN if self.number in f.throttle else 1.0
        value *= 1.4 if f.shared and self.clock() % 1.0 > 0.6 else 1.0
        value *= math.exp(0.5 * self._rng.standard_normal()) if self.number in f.noisy else 1.0
        return math.nan if self.number in f.nan and self.samples == 3 else value

    def snapshot(self) -> Snapshot:
        f = self.faults
        if not f.nvml:
            return Snapshot()
        if self.number in f.throttle:
            return Snapshot(1.98e9 / _SLOWDOWN, 2.6e9, UNKNOWN, 91.0, 1.0, ("hw_thermal_slowdown",))
        if f.capped is not None:
            clock_hz = 0.99e9 if self.number in f.capped else 1.98e9
            return Snapshot(clock_hz, throttle=("sw_power_cap",))
        self.waited_s += f.waits.get(self.number, f.wait) * (self.clock() - self.read_at_s)
        self.read_at_s = self.clock()
        return replace(super().snapshot(), waited_s=self.waited_s)


@dataclass(eq=False)
class GpuDevice(ReplayDevice):
    """A GPU with a driver; Ctrl-C comes at ``interrupt_s`` of simulated time."""

    throttle: Any = field(default=(), kw_only=True)
    load: float = field(default=0.0, kw_only=True)
    interrupt_s: float = field(default=math.inf, kw_only=True)

    def snapshot(self) -> Snapshot:
        return Snapshot(1.5e9, 2.6e9, UNKNOWN, 61.0, self.load, self.throttle)

    def play(self, operator: Operator, loops: int) -> float:
        if self.clock() >= self.interrupt_s:
            self.interrupt_s = math.inf
            signal.raise_signal(signal.SIGINT)
        return super().play(operator, loops)


def gpu_device(gpu: Gpu, seconds: Seconds, limit_w: float, seed: int) -> GpuDevice:
    """Return a planted GPU with the times of a function and a power limit that was set."""
    about = protocol.Gpu(gpu.sms, gpu.capability, gpu.memory_bytes, power_limit_w=gpu.power_w)
    stack = {"torch": "2.9", "driver": "580", "power_limit_w": f"{limit_w:.0f}"}
    name, free = f"{gpu.name} ({gpu.sms} SM)", 0.9 * 0.98 * gpu.memory_bytes
    old = gpu.capability < (8, 0)
    return GpuDevice(
        seconds,
        noise=0.01,
        seed=seed,
        description=Description("cuda:0", name, stack, free, 4e7, about),
        setup_s=0.03,
        refused={"gemm_2to4": "no sparse tensor cores"} if old else {},
        formats=("fp16", "fp32") if old else ("bf16", "fp32"),
        throttle=("sw_thermal_slowdown",) if gpu.throttled else (),
        load=0.4 if gpu.laptop else 0.0,
    )
