"""Records of exact shapes to the arrays that a profile keeps of them, and how certain each is.

Use :func:`with_exact` to give a profile what was measured with purpose ``exact``; :func:`exact_arrays` makes the arrays
alone. The form is that of :mod:`simulator.cost.measured_shapes`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import numpy as np

from calibration.records.table import PURPOSES, Flag, Records
from simulator.arrays import Array
from simulator.hardware.constants import EXACT_NAMES as NAMES
from simulator.hardware.profile import HardwareProfile
from simulator.workload import DTYPES

# standard deviation of a repeated measurement where nothing was repeated: drift below it is not flagged
UNKNOWN_REPEAT = 0.02

_Z90, _Z95 = 1.6449, 1.9600


def repeatability(records: Records) -> float:
    """Standard deviation of the log time of one shape measured again and again: that of the anchors, by shape.

    :data:`UNKNOWN_REPEAT` with fewer than three anchors; from the median absolute deviation, so that one burst of load
    does not rule.
    """
    anchors = records.select((records.purpose == PURPOSES.index("anchor")) & records.timed)
    group = anchors.groups()
    deviations: list[float] = []
    for g in np.unique(group):
        times = np.log(anchors.seconds[group == g])
        if len(times) >= 3:
            deviations.extend(np.abs(times - np.median(times)))
    return float(1.4826 * np.median(deviations)) if deviations else UNKNOWN_REPEAT


def exact_arrays(records: Records, dtype: str, purposes: Sequence[str] = ("exact",)) -> dict[str, Array]:
    """Measured cold dense GEMMs of one number format (activations and weights) as the arrays of a profile's section.

    A shape measured several times has the median, and an interval no narrower than what lies between its times; rows
    that were throttled are left out. Anchors among the records say how well the device repeats itself. Empty when there
    is no such row.

    >>> from calibration.records.table import Source
    >>> times = {"seconds": [1e-6, 1.02e-6], "spread": 0.01, "purpose": "exact"}
    >>> r = Records.from_columns([Source("d")], m=[8, 8], n=64, k=32, **times)
    >>> exact_arrays(r, "bf16")["exact_s"].round(9).tolist()
    [1.01e-06]
    """
    r, code = records, DTYPES.index(dtype)
    cold_gemm = r.is_operator("gemm") & (r.dtype == code) & (r.weight_dtype == code) & r.cold & (r.copies == 0)
    wanted = np.isin(r.purpose, [PURPOSES.index(p) for p in purposes])
    rows = r.select(cold_gemm & wanted & r.timed & ((r.flags & Flag.THROTTLED) == 0))
    if not len(rows):
        return {}
    again = repeatability(records)
    # one that is not known or has no end counts as the limit of drift
    spreads = np.where(np.isfinite(rows.spread), rows.spread, _Z95 * UNKNOWN_REPEAT)
    group = rows.groups("n", "k", "m")
    shapes, seconds, halves = [], [], []
    for g in range(int(group.max()) + 1):
        at = np.flatnonzero(group == g)
        times, first = rows.seconds[at], at[0]
        between = 0.5 * float(np.log(times.max() / times.min()))
        sigma = math.hypot(float(np.median(spreads[at])) / _Z95, again)
        shapes.append((rows.m[first], rows.n[first], rows.k[first]))
        seconds.append(np.median(times))
        halves.append(max(_Z90 * sigma, between))
    return dict(zip(NAMES, (*np.array(shapes, dtype=np.int64).T, np.array(seconds), np.array(halves)), strict=True))


def with_exact(profile: HardwareProfile, records: Records, purposes: Sequence[str] = ("exact",)) -> HardwareProfile:
    """A profile that uses what was measured of exact shapes; the same profile where there is nothing.

    Only calibrated GEMM sections take them, each of its own number format: a profile's provenance must name the stack
    they are from.
    """
    sections = dict(profile.sections)
    for (operator, dtype), section in profile.sections.items():
        fitted = operator == "gemm" and section.status == "calibrated" and dtype in DTYPES
        if fitted and (arrays := _allowed(exact_arrays(records, dtype, purposes), profile, dtype)):
            sections["gemm", dtype] = replace(section, arrays=MappingProxyType({**_others(section.arrays), **arrays}))
    return replace(profile, sections=MappingProxyType(sections)) if sections != profile.sections else profile


def without_exact(profile: HardwareProfile) -> HardwareProfile:
    """The same profile as the model alone would predict it."""
    sections = dict(profile.sections)
    for key, section in sections.items():
        if "exact_m" in section.arrays:
            sections[key] = replace(section, arrays=MappingProxyType(_others(section.arrays)))
    return replace(profile, sections=MappingProxyType(sections))


def _others(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """The arrays of a section that are not of exact shapes."""
    return {name: values for name, values in arrays.items() if name not in NAMES}


def _allowed(arrays: dict[str, Array], profile: HardwareProfile, dtype: str) -> dict[str, Array]:
    """Without times that beat the datasheet's arithmetic at the highest clock: those are broken measurements."""
    if not arrays or dtype not in profile.rates:
        return {}
    flops = 2.0 * arrays["exact_m"] * arrays["exact_n"] * arrays["exact_k"]
    good = arrays["exact_s"] >= flops / (profile.peak_flop_per_s(dtype) * max(1.0, profile.clock_headroom))
    return {name: values[good] for name, values in arrays.items()} if good.any() else {}
