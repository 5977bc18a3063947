"""Energy and power of passes, with intervals.

Errors of the power's constants are shared by dense and pruned: in their ratio, the difference of
their shares remains, and an error in proportion to the change. Errors of times matter for the power
that is paid while time passes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from simulator.arrays import Array, FloatArray, IndexArray
from simulator.power import PARTS, Power, Work
from simulator.uncertainty.factors import level_scale
from simulator.uncertainty.forward import PredictedPass
from simulator.uncertainty.intervals import PredictionIntervals

REASONS = (*PARTS, "limit", "equal")
"""Why the share of energy that a pruning saves differs from that of the time: the part of the
energy with the largest effect, the power limit, or no difference."""

RATIO_SD = 0.15
"""Standard deviation of the log of a ratio of two energies at measured times, as a share of this
log: its median error between neighbouring batches of one model is 0.10 (B200) and 0.09 (H100) in
ML.ENERGY's runs, held out by model."""
EQUAL = 0.005  # difference of two shares that counts as none
NORMAL_90 = 1.645  # half-width of a 90 % interval over the standard deviation


@dataclass(frozen=True)
class PassEnergy:
    """Energy of W passes on all devices together."""

    work: Work  # work of one device
    power: Power
    devices: int  # on which each pass does this work
    all_devices: int

    @classmethod
    def of(cls, p: PredictedPass, seconds: FloatArray) -> PassEnergy:
        """Return the energy of passes that take ``seconds``."""
        meta = p.workloads.rows.meta
        power = Power.of(p.hw, meta.asked.power_limit)
        found = cls(p.work, power, meta.devices, meta.devices)
        if meta.parallel == "pipeline":  # the rows are those of all devices
            work = p.work._replace(time=p.work.time * meta.devices)
            found = cls(work, power, 1, meta.devices)
        return found.at(seconds / p.total_s)

    def at(self, slower: FloatArray) -> PassEnergy:
        """Return the energy of passes that take ``slower`` (W,) times as long for the same work."""
        return replace(self, work=self.work._replace(time=self.work.time * slower[:, None]))

    def total(self, factor: Any = 1.0) -> FloatArray:
        """Return joules (W,), if each part demands ``factor`` (W,) times as much."""
        return np.asarray(self.devices * self.power.joules(self.work, factor).sum(axis=(0, 2)))

    @property
    def parts(self) -> FloatArray:
        """Joules (4, W) of :data:`simulator.power.PARTS`."""
        return np.asarray(self.devices * self.power.joules(self.work).sum(axis=2))

    @property
    def watts(self) -> FloatArray:
        """Mean power of one device."""
        seconds = self.work.time.sum(axis=1) * self.devices / self.all_devices
        return np.asarray(self.total() / (seconds * self.all_devices))

    @property
    def errors(self) -> FloatArray:
        """Deviations (4, W) of the logs of the energy by the error of each part."""
        share = self.parts / self.total()
        return np.asarray(share * self.power.log_sd[:, None])

    def ratio_sd(self, other: IndexArray) -> FloatArray:
        """Return the deviations (W,) of the logs of the ratios to the energies of passes
        ``other``."""
        errors, joules = self.errors, self.total()
        changed = RATIO_SD * np.log(joules / joules[other])
        alike = np.square(errors - errors[:, other]).sum(axis=0)
        return np.asarray(np.sqrt(alike + np.square(changed)))


def energy_columns(
    p: PredictedPass, times: PredictionIntervals, level: float, dense: IndexArray
) -> dict[str, Array]:
    """Return the columns of a result about the energy of a pass on all devices."""
    found = PassEnergy.of(p, times.seconds)
    joules = found.total()
    half = NORMAL_90 * level_scale(level)
    of_power = half * np.sqrt(np.square(found.errors).sum(axis=0))
    between = half * found.ratio_sd(dense)
    lower, upper = (
        _end(found, side * of_power, end / times.seconds)
        for side, end in ((-1.0, times.lower), (1.0, times.upper))
    )
    # the pruned pass at the ends of the speedup
    least, most = (
        _end(found, side * between, times.ratio / end)
        for side, end in ((-1.0, times.ratio_upper), (1.0, times.ratio_lower))
    )
    each = {
        "watts": found.watts,
        "joules": joules,
        "joules_lower": lower,
        "joules_upper": upper,
    }
    return {
        **{f"dense_{name}": column[dense] for name, column in each.items()},
        **{f"pruned_{name}": column for name, column in each.items()},
        "energy_saved": 1.0 - joules / joules[dense],
        "energy_saved_lower": 1.0 - most / joules[dense],
        "energy_saved_upper": 1.0 - least / joules[dense],
        "energy_reason": _reason(found, dense),
    }


def _reason(found: PassEnergy, dense: IndexArray) -> IndexArray:
    """Return the indices in :data:`REASONS`. The parts that remain, less what remains of the time,
    sum to the difference of the two savings."""
    parts, seconds = found.parts, found.work.time.sum(axis=1)
    more = (parts - seconds / seconds[dense] * parts[:, dense]) / found.total()[dense]
    total = more.sum(axis=0)
    part, equal = 1 + (more[1:] * np.sign(total)).argmax(axis=0), np.abs(total) < EQUAL
    part = np.where(equal, REASONS.index("equal"), part)
    capped = found.watts > 0.99 * found.power.limit
    capped = np.where(equal, capped, capped != capped[dense])
    return np.where(capped, REASONS.index("limit"), part)


def _end(found: PassEnergy, of_power: FloatArray, slower: FloatArray) -> FloatArray:
    """Return an end of the interval of energies: the errors of power and of time combine as a root
    of sum of squares of logs."""
    joules = found.total()
    logs = np.log([found.total(np.exp(of_power)) / joules, found.at(slower).total() / joules])
    return np.asarray(joules * np.exp(np.sign(logs.sum(axis=0)) * np.hypot(*logs)))
