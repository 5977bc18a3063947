"""Energy and power of passes, with intervals.

Errors of the power's constants are shared by dense and pruned: in their ratio, only the difference
of their shares remains. Errors of times matter for the power that is paid while time passes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simulator.arrays import Array, FloatArray, IndexArray
from simulator.power import PARTS, Power
from simulator.uncertainty.factors import level_scale
from simulator.uncertainty.forward import PredictedPass
from simulator.uncertainty.intervals import PredictionIntervals

REASONS = (*PARTS, "limit", "equal")
"""Why the share of energy that a pruning saves differs from that of the time: the part of the
energy with the largest effect, the power limit, or no difference."""

NORMAL_90 = 1.645  # half-width of a 90 % interval over the standard deviation
EQUAL = 0.005  # difference of two shares that counts as none
_WITH_TIME = 2  # of PARTS, the first are paid while time passes


@dataclass(frozen=True)
class PassEnergy:
    """Energy of W passes on all devices together."""

    parts: FloatArray  # (4, W) J of PARTS
    seconds: FloatArray
    devices: int
    power: Power
    with_time: FloatArray  # (W,) share of the energy that follows the time
    sure: FloatArray  # (W,) share of the energy at the limit, whose power is known

    @classmethod
    def of(cls, p: PredictedPass, seconds: FloatArray) -> PassEnergy:
        meta = p.workloads.rows.meta
        power = Power.of(p.hw, meta.asked.power_limit)
        work = p.work._replace(time=p.work.time * (seconds / p.total_s)[:, None])
        stages = meta.parallel == "pipeline"
        if stages:  # the rows are those of all devices
            work = work._replace(time=work.time * meta.devices)
        joules = power.joules(work)
        capped = joules.sum(axis=0) * power.at_limit(work)
        parts = joules.sum(axis=2) * (1 if stages else meta.devices)
        share = capped.sum(axis=1) / joules.sum(axis=(0, 2))
        static = joules[:_WITH_TIME].sum(axis=(0, 2)) / joules.sum(axis=(0, 2))
        return cls(
            parts=parts,
            seconds=seconds,
            devices=meta.devices,
            power=power,
            with_time=share + (1.0 - share) * static,
            sure=share,
        )

    @property
    def joules(self) -> FloatArray:
        return np.asarray(self.parts.sum(axis=0))

    @property
    def watts(self) -> FloatArray:
        """Mean power of one device."""
        return self.joules / (self.seconds * self.devices)

    @property
    def loadings(self) -> FloatArray:
        """Standard deviations (4, W) of the logs of the energy by the error of each part."""
        share = self.parts / self.joules * (1.0 - self.sure)
        return np.asarray(share * self.power.log_sd[:, None])


def energy_columns(
    p: PredictedPass, times: PredictionIntervals, level: float, dense: IndexArray
) -> dict[str, Array]:
    """Return the columns of a result about the energy of a pass on all devices."""
    found = PassEnergy.of(p, times.seconds)
    joules, loadings = found.joules, found.loadings
    half = NORMAL_90 * level_scale(level)
    of_power = half * np.sqrt(np.square(loadings).sum(axis=0))
    lower, upper = (
        joules * np.exp(side * np.hypot(of_power, found.with_time * np.log(end / times.seconds)))
        for side, end in ((-1.0, times.lower), (1.0, times.upper))
    )
    # the clip keeps an interval inside what the limit allows
    most = found.power.limit * found.devices * times.upper
    upper = np.minimum(upper, np.maximum(most, joules))
    ratio = joules / joules[dense]
    between = half * np.sqrt(np.square(loadings - loadings[:, dense]).sum(axis=0))
    follows = 0.5 * (found.with_time + found.with_time[dense])
    ends = (
        ratio * np.exp(side * np.hypot(between, follows * np.log(end / times.ratio)))
        for side, end in ((1.0, times.ratio_lower), (-1.0, times.ratio_upper))
    )
    least, most_saved = (1.0 - end for end in ends)
    own = {
        "watts": found.watts,
        "joules": joules,
        "joules_lower": lower,
        "joules_upper": upper,
    }
    return {
        **{f"dense_{name}": column[dense] for name, column in own.items()},
        **{f"pruned_{name}": column for name, column in own.items()},
        "energy_saved": 1.0 - ratio,
        "energy_saved_lower": least,
        "energy_saved_upper": most_saved,
        "energy_reason": _reason(found, dense),
    }


def _reason(found: PassEnergy, dense: IndexArray) -> IndexArray:
    """Return the indices in :data:`REASONS`. The parts that remain, less what remains of the time,
    sum to the difference of the two savings."""
    time = found.seconds / found.seconds[dense]
    more = (found.parts - time * found.parts[:, dense]) / found.joules[dense]
    total = more.sum(axis=0)
    part = 1 + (more[1:] * np.sign(total)).argmax(axis=0)
    equal, change = np.abs(total) < EQUAL, np.abs(found.sure - found.sure[dense])
    part = np.where(equal, REASONS.index("equal"), part)
    capped = np.where(equal, found.sure, change) > 0.5
    return np.where(capped, REASONS.index("limit"), part)
