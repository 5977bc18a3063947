"""Power and energy of passes on one device.

    joules = idle x time + active x busy time + memory x memory time + compute x arithmetic time

The four constants are shares of the power limit. The memory time is that of all bytes at the
datasheet bandwidth, the arithmetic time that of all executed FLOPs at the datasheet rates, so a
tensor core at its full rate draws the same power in every format (assumed). Host, cooling and the
other parts of a server are excluded.

Under a power limit, clocks fall until the mean power of a phase keeps it. Arithmetic then takes
longer; memory keeps its speed as long as the chip can use it. Everything but the idle power and the
DRAM takes less energy at a lower clock. W are workloads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from simulator.arrays import FloatArray
from simulator.codes import COLLECTIVE
from simulator.errors import InputError
from simulator.hardware.profile import HardwareProfile
from simulator.operators.base import BOTTLENECKS, POWER_ERRORS
from simulator.workload import WorkloadBatch, sums

PARTS = ("idle", "active", "memory", "compute")
"""What draws power: the constants of the section ``power`` of a profile."""

LOWEST_CLOCK = 0.25
"""Lowest clock under a power limit, as a share of the highest (assumed)."""
VOLTAGE = 2.0
"""Exponent of the clock in the energy of work, as voltage falls with the clock (assumed)."""
SATURATES = 0.6
"""Clock that saturates the memory, as a share of the highest (assumed): the L2 of an H100 delivers
4.4 to 5.7 TB/s (its profile), its memory 3.35."""
DRAM = 0.25
"""Share of the energy of moved bytes that the DRAM takes, at any clock: 3.9 pJ/bit in HBM2
(O'Connor et al., MICRO 2017), of 17 fitted on an H100."""

CAP_LOG_SD = 0.085
"""Standard deviation of the log of a time under a power limit: 15 % at 90 % (assumed)."""

_BISECTIONS = 30
_COMPUTE = BOTTLENECKS.index("compute")


def datasheet_times(workloads: WorkloadBatch, hw: HardwareProfile) -> tuple[FloatArray, FloatArray]:
    """Return the times of each row's bytes and executed FLOPs at the datasheet rates, s."""
    rows = workloads.rows
    moved = np.where(rows.kind == COLLECTIVE, 0.0, workloads.bytes)
    executed = rows.each(lambda operator, rows: operator.executed_flops(rows))
    flop_s = rows.density * rows.count * hw.flop_s[rows.dtype]
    return moved / hw.bandwidth_bytes_per_s, executed * flop_s


class Work(NamedTuple):
    """What W passes do in both phases (W, 2) on one device, s."""

    time: FloatArray
    busy: FloatArray  # time of all kernels
    bound: FloatArray  # time of kernels that wait for arithmetic, which follow the clock
    memory: FloatArray  # time of all bytes at the datasheet bandwidth
    compute: FloatArray  # time of all executed FLOPs at the datasheet rates

    @classmethod
    def of(
        cls,
        workloads: WorkloadBatch,
        hw: HardwareProfile,
        row_s: FloatArray,
        bottleneck: Any,
        time: FloatArray,
    ) -> Work:
        """Return the work of passes whose rows take ``row_s`` and whose phases take ``time``."""
        cell = workloads.owner * 2 + workloads.rows.phase
        bound = np.where(bottleneck == _COMPUTE, row_s, 0.0)
        parts = row_s, bound, *datasheet_times(workloads, hw)
        return cls(time, *(sums(cell, part, time.shape) for part in parts))


@dataclass(frozen=True)
class Power:
    """The power of a device, and the standard deviations of the logs of its parts."""

    limit: float  # W
    watts: FloatArray  # (4,) of PARTS at a share of 1 of their time
    log_sd: FloatArray  # (4,)

    @classmethod
    def of(cls, hw: HardwareProfile, limit: float | None = None) -> Power:
        """Return the power of a device, under a ``limit`` below that of the datasheet. InputError
        for a limit that the device cannot keep."""
        section = hw.section("power", "*")
        log_sd = np.array([POWER_ERRORS.factors[name] for name in PARTS])
        if section.status == "calibrated":
            log_sd = log_sd * section.section_scale
        else:
            log_sd = np.hypot(log_sd, POWER_ERRORS.independent)
        watts = hw.power_w * np.array([section[name] for name in PARTS])
        lowest = watts[0] + LOWEST_CLOCK * (hw.power_w - watts[0])
        if limit is not None and not lowest <= limit <= hw.power_w:
            raise InputError(
                f"power_limit: expected {lowest:.0f} to {hw.power_w:.0f} W for {hw.name},"
                f" got {limit:g} W"
            )
        return cls(limit or hw.power_w, watts, log_sd)

    def joules(self, work: Work, factor: Any = 1.0) -> FloatArray:
        """Return the energy (4, W, 2) of the parts, if they demand ``factor`` (W,) times as much.
        Where they exceed the limit, they shrink alike, as kernels are timed at clocks that keep
        it."""
        return self._within(self._demanded(work) * np.asarray(factor)[..., None], work, self.limit)

    def slowed(self, work: Work, usual: float) -> tuple[FloatArray, FloatArray]:
        """Return the factors (W, 2) on the times of kernels that wait for arithmetic, and of other
        kernels, under the limit; kernels were timed under a ``usual`` limit."""
        parts = self._within(self._demanded(work), work, usual)
        low, high = np.full(work.time.shape, LOWEST_CLOCK), np.ones(work.time.shape)
        for _ in range(_BISECTIONS):
            middle = 0.5 * (low + high)
            keeps = self._average(parts, work, middle) <= self.limit
            low, high = np.where(keeps, middle, low), np.where(keeps, high, middle)
        clock = np.where(self._average(parts, work, high) <= self.limit, high, low)
        # at the lowest clock, all kernels wait for the power
        over = np.maximum(self._average(parts, work, clock) / self.limit, 1.0)
        return over / clock, over * np.maximum(SATURATES / clock, 1.0)

    def _demanded(self, work: Work) -> FloatArray:
        used = (work.time, work.busy, work.memory, work.compute)
        return np.stack([watts * part for watts, part in zip(self.watts, used)])

    @staticmethod
    def _within(parts: FloatArray, work: Work, limit: float) -> FloatArray:
        allowed = limit * work.time / np.maximum(parts.sum(axis=0), 1e-300)
        return np.asarray(parts * np.minimum(allowed, 1.0))

    def _average(self, parts: FloatArray, work: Work, clock: FloatArray) -> FloatArray:
        """Return the mean power (W, 2) at clocks below those of the kernels' times."""
        others = np.maximum(SATURATES / clock, 1.0) - 1.0
        later = work.bound * (1.0 / clock - 1.0) + (work.busy - work.bound) * others
        on_chip = parts[1] + later * self.watts[1] + (1.0 - DRAM) * parts[2] + parts[3]
        joules = parts.sum(axis=0) + later * self.watts[:2].sum()
        joules = joules - on_chip * (1.0 - clock**VOLTAGE)
        return np.asarray(joules / np.maximum(work.time + later, 1e-300))
