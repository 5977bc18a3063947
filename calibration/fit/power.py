"""Fit the power of a device to measured powers and the work that took them."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import numpy as np
from scipy.optimize import least_squares

from calibration.fit.solver import HUBER, ConstantsFit, FittedPart, soft_l1
from calibration.records.screening import peaks, work
from calibration.records.timing_table import Records
from simulator.arrays import FloatArray
from simulator.hardware.profile import (
    Fitted,
    HardwareProfile,
    Provenance,
    Section,
    default_section,
)
from simulator.operators.base import POWER_ERRORS, SAME_STACK
from simulator.power import PARTS, Work

NOISE_LOG_SD = 0.06
"""Log standard deviation of one measured power around the four parts."""
PRIOR_LOG_SD = {"idle": 0.3, "active": 1.0, "memory": 1.0, "compute": 1.0}
"""Log standard deviations of the defaults as a prior; no measured row is idle, so only the prior
knows the idle power well."""
FURTHER = 0.5
"""Prior of the power, as a share of the limit, of kernels outside the model."""
FEWEST = 4  # measured powers of a fit, which the prior supports
NEAR_LIMIT = 0.93
"""Share of the power limit from which a device may have lowered its clocks; such rows are left
out."""


def fit_measured_power(records: Records, hw: HardwareProfile) -> FittedPart:
    """Return the section ``power`` fitted to the measured powers of operators that repeat without
    pauses, and of the idle device. The prior is the section of ``hw``, if it was fitted. ValueError
    for too few rows."""
    known = _known_work(records, hw)
    limits = [source.stack.get("power_limit_w", "") for source in records.sources]
    limit = np.array([float(w) if w.isdecimal() else hw.power_w for w in limits])[records.source]
    shares = known.memory[:, 0] <= known.time[:, 0]  # else the bytes came from a cache
    used = shares & (records.watts < NEAR_LIMIT * np.minimum(limit, hw.power_w))
    if used.sum() < FEWEST:
        raise ValueError(f"{used.sum()} rows below the power limit; a fit needs {FEWEST}")
    found = hw.section("power", "*")
    prior = None if found.status == "default" else found
    taken = Work(*(part[used] for part in known))
    section, _ = fit_power(hw, taken, records.watts[used], prior=prior)
    own = replace(section, section_scale=SAME_STACK)
    return FittedPart(own, ConstantsFit({}, {}, {}), int(used.sum()))


def _known_work(records: Records, hw: HardwareProfile) -> Work:
    """Return what rows do in their times (W, 1); operators of unknown work have infinite bytes."""
    flops, weights, others = work(records)
    idle, moved = records.is_operator("idle"), weights + others
    moved = np.where(idle | (moved > 0.0), moved, np.inf)
    busy = np.where(idle, 0.0, records.seconds)
    memory, compute = moved / hw.bandwidth_bytes_per_s, flops / peaks(records, hw)
    parts = records.seconds, busy, 0.0 * busy, memory, compute
    return Work(*(part[:, None] for part in parts))


def fit_power(
    hw: HardwareProfile,
    work: Work,
    watts: FloatArray,
    provenance: Provenance | None = None,
    further: FloatArray | None = None,
    prior: Section | None = None,
) -> tuple[Section, float]:
    """Return the section ``power`` fitted to mean powers (W,), and the power, as a share of the
    limit, of kernels outside the model that run for the shares ``further`` (W,) of the time. The
    ``prior`` is the section of such a device, else the defaults."""
    section = prior or default_section("power", hw.architecture)
    sizes = PRIOR_LOG_SD if prior is None else POWER_ERRORS.factors
    beside = np.zeros(len(watts)) if further is None else further
    share = np.column_stack([_shares(work), beside])
    used = watts < NEAR_LIMIT * hw.power_w
    start = np.log([*(section[name] for name in PARTS), FURTHER])
    wide = np.array([*(sizes[name] for name in PARTS), 1.0])

    def residuals(logs: FloatArray) -> FloatArray:
        error = np.log(share @ np.exp(logs) * hw.power_w / watts)[used] / NOISE_LOG_SD
        # heavy tails: a host that stalls is no error of the power
        return np.concatenate([soft_l1(HUBER * error) / HUBER, (logs - start) / wide])

    found = least_squares(residuals, start)
    values = np.exp(found.x)
    deviation = np.sqrt(np.diag(np.linalg.inv(found.jac.T @ found.jac)))
    constants = {
        name: Fitted(float(value), float(value * sd), "fitted")
        for name, value, sd in zip(PARTS, values, deviation)
    }
    fitted = Section(
        MappingProxyType(constants), status="calibrated", provenance=provenance, stack=""
    )
    return fitted, float(values[-1])


def _shares(work: Work) -> FloatArray:
    """Return the parts (W, 4) of passes per time; all phases of a pass together draw its mean
    power."""
    parts = np.stack([work.time, work.busy, work.memory, work.compute]).sum(axis=2)
    return np.asarray((parts / np.maximum(parts[0], 1e-300)).T)
