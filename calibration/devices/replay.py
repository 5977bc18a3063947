"""A device that replays recorded times, or planted times of known mean and noise, with planted faults, for tests.

It runs in simulated time: a sample of L launches of t seconds advances its clock by L t, so a plan of ten minutes runs
in milliseconds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import numpy as np

from calibration.devices.protocol import Description, DeviceLost, Operator, OutOfMemory, Unsupported
from calibration.devices.telemetry import Snapshot
from simulator.errors import InputError
from simulator.files.read import read_bounded

Seconds = Callable[[Operator], float]

_SLOWDOWN = 1.6  # factor on times under throttling
_PLANTED = Description("replay", "planted device", {"replay": "1"}, 80e9, 50e6)


@dataclass(frozen=True)
class Faults:
    """Faults to plant. Numbers count the calls of ``prepare`` from 0, including drift checks and repeats."""

    throttle: Collection[int] = ()  # preparations with thermal throttling: slower, and reported by the telemetry
    noisy: Collection[int] = ()  # preparations with noise ``noise`` instead of the device's noise
    noise: float = 0.3  # relative standard deviation of noisy preparations
    nan: Collection[int] = ()  # preparations whose third sample is not a number
    out_of_memory_bytes: float = math.inf  # operators with a larger footprint run out of memory
    lost_at: int | None = None  # preparation during which the device stops to respond, permanently
    drift_per_s: float = 0.0  # relative slowdown per second of simulated time
    nvml: bool = True  # whether telemetry works; otherwise every reading is "unknown"


def roofline_timings(flop_per_s: float = 100e12, bytes_per_s: float = 1.5e12, floor_s: float = 3e-6) -> Seconds:
    """Return the times of a simple device: a floor per launch, plus the 3-norm of arithmetic and memory time."""

    def seconds(op: Operator) -> float:
        return floor_s * op.launches + float(np.cbrt((op.flops / flop_per_s) ** 3 + (op.bytes / bytes_per_s) ** 3))

    return seconds


@dataclass
class _ReplayPrepared:
    device: ReplayDevice
    operator: Operator
    number: int  # number of the preparation
    samples: int = 0
    method: str = "replayed"

    def sample(self, loops: int) -> float:
        self.samples += 1
        return self.device.play(self.operator, self.number, self.samples, loops)


@dataclass(eq=False)
class ReplayDevice:
    """Planted or recorded timings as a device."""

    timings: Seconds | Mapping[str, float] = field(default_factory=roofline_timings)  # a mapping is by operator key
    _: KW_ONLY
    noise: float = 0.0  # relative standard deviation of a sample (log-normal, so times stay positive)
    seed: int = 0
    faults: Faults = field(default_factory=Faults)
    description: Description = _PLANTED
    setup_s: float = 0.05  # simulated time of a preparation
    refused: Mapping[str, str] = field(default_factory=dict)  # unsupported kinds of operators, with reasons
    formats: tuple[str, ...] = ("bf16", "fp16", "fp32")
    prepared: list[Operator] = field(default_factory=list)
    _now: float = 0.0
    _lost: bool = False

    def __post_init__(self) -> None:
        self.name = self.description.name
        self._rng = np.random.default_rng(self.seed)

    def describe(self) -> Description:
        return self.description

    def dtypes(self) -> tuple[str, ...]:
        return self.formats

    def refuses(self, operator: Operator) -> str:
        recorded = not isinstance(self.timings, Mapping) or operator.key in self.timings
        return self.refused.get(operator.kind, "" if recorded else f"no recording of {operator.key}")

    def prepare(self, operator: Operator) -> _ReplayPrepared:
        number = len(self.prepared)
        self.prepared.append(operator)
        if self._lost:
            raise DeviceLost("the device was lost before")
        if reason := self.refuses(operator):
            raise Unsupported(reason)
        if operator.footprint_bytes > self.faults.out_of_memory_bytes:
            available = f"{self.faults.out_of_memory_bytes:.3g} available"
            raise OutOfMemory(f"{operator.footprint_bytes:.3g} bytes requested, {available}")
        self._now += self.setup_s
        return _ReplayPrepared(self, operator, number)

    def play(self, operator: Operator, number: int, sample: int, loops: int) -> float:
        f = self.faults
        if f.lost_at is not None and number >= f.lost_at and sample > 2:
            self._lost = True
        if self._lost:
            raise DeviceLost("planted: the device has fallen off the bus")
        noise = f.noise if number in f.noisy else self.noise
        value = self.timings[operator.key] if isinstance(self.timings, Mapping) else self.timings(operator)
        value *= 1.0 + f.drift_per_s * self._now
        value *= _SLOWDOWN if number in f.throttle else 1.0
        value *= math.exp(noise * self._rng.standard_normal()) if noise else 1.0
        self._now += value * loops
        return math.nan if number in f.nan and sample == 3 else value

    def snapshot(self) -> Snapshot:
        if not self.faults.nvml:
            return Snapshot()
        if len(self.prepared) - 1 in self.faults.throttle:
            return Snapshot(1.98e9 / _SLOWDOWN, 2.6e9, 450.0, 91.0, 1.0, ("hw_thermal_slowdown",))
        return Snapshot(1.98e9, 2.6e9, 450.0, 61.0, 1.0, ())

    def clock(self) -> float:
        return self._now

    def rest(self, seconds: float) -> None:
        self._now += seconds

    def close(self) -> None:
        """Do nothing: there is nothing to free."""


def open_named(path: str, **options: Any) -> ReplayDevice:
    """Open a device with the medians of a file of JSON lines, or (``planted``) with :func:`roofline_timings`. Operators
    without a record are unsupported. Lines without ``operator`` and ``median_s`` are ignored."""
    if not path:
        raise InputError("device: expected replay:FILE or replay:planted, got replay")
    if path == "planted":
        return ReplayDevice(refused={"gemm_2to4": "a planted device has no sparse tensor cores"}, **options)
    try:
        lines = read_bounded(path).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"device replay:{path}: {error}") from None
    medians: dict[str, float] = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{number}: not a JSON record: {error}") from None
        if isinstance(record, dict) and record.get("operator") and record.get("median_s"):
            try:
                key, median = Operator.from_record(record["operator"]).key, float(record["median_s"])
            except (TypeError, ValueError, OverflowError, RecursionError) as error:
                raise InputError(f"{path}:{number}: not a measurement of an operator: {error}") from None
            if not 0.0 < median < math.inf:
                raise InputError(f"{path}:{number}: median_s: expected a time above zero, got {median}")
            medians[key] = median
    if not medians:
        raise InputError(f"device replay:{path}: the file contains no measurement of an operator")
    return ReplayDevice(medians, **options)
