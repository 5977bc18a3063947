"""Convert records of exact shapes to the arrays of a profile (:mod:`simulator.operators.measured_shapes`)."""

from __future__ import annotations

import math
from dataclasses import replace
from types import MappingProxyType

import numpy as np

from calibration.records.timing_table import PURPOSES, Flag, Records
from simulator.arrays import Array
from simulator.codes import DTYPES
from simulator.hardware.profile import HardwareProfile
from simulator.operators.measured_shapes import EXACT_NAMES as NAMES

UNKNOWN_REPEAT = 0.02  # assumed standard deviation of a repeated measurement: smaller drift is not flagged

_Z90, _Z95 = 1.6449, 1.9600


def repeatability(records: Records) -> float:
    """Return the standard deviation of the log time of a repeated measurement, from three or more drift checks."""
    checks = records.select((records.purpose == PURPOSES.index("drift_check")) & records.timed)
    group, times = checks.groups(), np.log(checks.seconds)
    same_shape = [times[group == g] for g in np.unique(group)]
    deviations = [d for found in same_shape if len(found) >= 3 for d in np.abs(found - np.median(found))]
    # the median absolute deviation, which one burst of load does not change
    return float(1.4826 * np.median(deviations)) if deviations else UNKNOWN_REPEAT


def exact_arrays(records: Records, dtype: str) -> dict[str, Array]:
    """Return measured cold dense GEMMs of one number format, without throttled rows, as arrays of a section. A shape
    that was measured several times has the median, and an interval that contains its times."""
    r, code = records, DTYPES.index(dtype)
    cold_gemm = r.is_operator("gemm") & (r.dtype == code) & (r.weight_dtype == code) & r.cold & (r.copies == 0)
    exact = r.purpose == PURPOSES.index("exact")
    rows = r.select(cold_gemm & exact & r.timed & ((r.flags & Flag.THROTTLED) == 0))
    if not len(rows):
        return {}
    again = repeatability(records)
    # an unknown or infinite interval counts as the limit of drift
    spreads = np.where(np.isfinite(rows.spread), rows.spread, _Z95 * UNKNOWN_REPEAT)
    group = rows.groups("n", "k", "m")
    found = []
    for g in range(int(group.max()) + 1):
        at = np.flatnonzero(group == g)
        times, first = rows.seconds[at], at[0]
        between = 0.5 * float(np.log(times.max() / times.min()))
        sigma = math.hypot(float(np.median(spreads[at])) / _Z95, again)
        shape = rows.m[first], rows.n[first], rows.k[first]
        found.append((*shape, np.median(times), max(_Z90 * sigma, between)))
    m, n, k, seconds, halves = map(np.array, zip(*found, strict=True))
    return dict(zip(NAMES, (m, n, k, seconds, halves), strict=True))


def with_exact(profile: HardwareProfile, records: Records) -> HardwareProfile:
    sections = dict(profile.sections)
    for (operator, dtype), section in profile.sections.items():
        fitted = operator == "gemm" and section.status == "calibrated" and dtype in DTYPES
        if fitted and (arrays := _allowed(exact_arrays(records, dtype), profile, dtype)):
            sections["gemm", dtype] = replace(section, arrays=MappingProxyType({**section.arrays, **arrays}))
    return replace(profile, sections=MappingProxyType(sections)) if sections != profile.sections else profile


def without_exact(profile: HardwareProfile) -> HardwareProfile:
    sections = dict(profile.sections)
    for key, section in sections.items():
        if "exact_m" in section.arrays:
            others = {name: values for name, values in section.arrays.items() if name not in NAMES}
            sections[key] = replace(section, arrays=MappingProxyType(others))
    return replace(profile, sections=MappingProxyType(sections))


def _allowed(arrays: dict[str, Array], profile: HardwareProfile, dtype: str) -> dict[str, Array]:
    """Exclude times below the datasheet's arithmetic limit at the highest clock, because they are invalid."""
    if not arrays or dtype not in profile.rates:
        return {}
    flops = 2.0 * arrays["exact_m"] * arrays["exact_n"] * arrays["exact_k"]
    good = arrays["exact_s"] >= flops / (profile.peak_flop_per_s(dtype) * max(1.0, profile.clock_headroom))
    return {name: values[good] for name, values in arrays.items()} if good.any() else {}
