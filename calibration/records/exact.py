"""Records of exact shapes to the arrays that a profile keeps of them, and how certain each is.

Use :func:`with_exact` to give a profile what was measured with purpose ``exact``; :func:`exact_arrays` makes the arrays alone. The form
is that of :mod:`simulator.kernels.exact`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.records.records import PURPOSES, Flag, Records
from simulator.hardware.constants import EXACT_NAMES as NAMES
from simulator.hardware.profile import HardwareProfile
from simulator.workload import DTYPES

F = NDArray[np.float64]

UNKNOWN_REPEAT = 0.02
"""Standard deviation of a repeated measurement where nothing was repeated: drift below it is not flagged (``calibration.measure.run``)."""

_Z90, _Z95 = 1.6449, 1.9600


def repeatability(records: Records) -> float:
    """Standard deviation of the log time of one shape measured again and again: that of the anchors, by shape.

    Parameters
    ----------
    records : Records
        Of one run or several, anchors among them.

    Returns
    -------
    float
        :data:`UNKNOWN_REPEAT` with fewer than three anchors; from the median absolute deviation, so that one burst of load does not rule.

    Examples
    --------
    >>> from calibration.records.records import Source
    >>> r = Records.from_columns([Source("d")], m=8, n=8, k=8, seconds=[1.0, 1.1, 0.9, 1.0, 1.05], purpose="anchor")
    >>> round(repeatability(r), 3)
    0.072
    """
    anchors = records.select((records.purpose == PURPOSES.index("anchor")) & _timed(records))
    group = anchors.groups()
    off = [
        np.log(anchors.seconds[group == g]) - np.median(np.log(anchors.seconds[group == g])) for g in np.unique(group)
    ]
    deviations = np.concatenate([o for o in off if len(o) >= 3] or [np.zeros(0)])
    return float(1.4826 * np.median(np.abs(deviations))) if len(deviations) else UNKNOWN_REPEAT


def exact_arrays(records: Records, dtype: str, purposes: Sequence[str] = ("exact",)) -> dict[str, NDArray[Any]]:
    """Measured cold dense GEMMs as the arrays of a profile's section.

    A shape measured several times has the median, and an interval no narrower than what lies between its times.

    Parameters
    ----------
    records : Records
        Anchors among them say how well the device repeats itself.
    dtype : str
        Number format, of activations and weights alike.
    purposes : sequence of str
        Rows to take.

    Returns
    -------
    dict of str to array
        Empty when there is no such row; rows that were throttled are left out.

    Examples
    --------
    >>> from calibration.records.records import Source
    >>> r = Records.from_columns([Source("d")], m=[8, 8], n=64, k=32, seconds=[1e-6, 1.02e-6], spread=0.01, purpose="exact")
    >>> {name: a.round(9).tolist() for name, a in exact_arrays(r, "bf16").items()}["exact_s"]
    [1.01e-06]
    """
    code = DTYPES.index(dtype)
    keep = (
        records.is_operator("gemm")
        & (records.dtype == code)
        & (records.weight_dtype == code)
        & records.cold
        & (records.copies == 0)
    )
    keep &= (
        np.isin(records.purpose, [PURPOSES.index(p) for p in purposes])
        & _timed(records)
        & ((records.flags & Flag.THROTTLED) == 0)
    )
    rows = records.select(keep)
    if not len(rows):
        return {}
    again = repeatability(records)
    group = rows.groups("n", "k", "m")
    out: dict[str, list[float]] = {name: [] for name in NAMES}
    for g in range(int(group.max()) + 1):
        at = np.flatnonzero(group == g)
        times, first = rows.seconds[at], int(at[0])
        spread = float(np.median(_spread(rows.spread[at])))
        between = 0.5 * float(np.log(times.max() / times.min()))
        sigma = math.hypot(spread / _Z95, again)
        values = (rows.m[first], rows.n[first], rows.k[first], float(np.median(times)), max(_Z90 * sigma, between))
        for name, value in zip(NAMES, values, strict=True):
            out[name].append(float(value))
    return {name: np.array(values, dtype=np.float64 if name in NAMES[3:] else np.int64) for name, values in out.items()}


def with_exact(profile: HardwareProfile, records: Records, purposes: Sequence[str] = ("exact",)) -> HardwareProfile:
    """A profile that uses what was measured of exact shapes; the same profile where there is nothing.

    Only calibrated GEMM sections take them, each of its own number format: a profile's provenance must name the stack they are from.
    """
    sections = dict(profile.sections)
    for (operator, dtype), section in profile.sections.items():
        if operator != "gemm" or section.status != "calibrated" or dtype not in DTYPES:
            continue
        arrays = _allowed(exact_arrays(records, dtype, purposes), profile, dtype)
        if arrays:
            kept = {name: a for name, a in section.arrays.items() if name not in NAMES}
            sections["gemm", dtype] = replace(section, arrays=MappingProxyType({**kept, **arrays}))
    return replace(profile, sections=MappingProxyType(sections)) if sections != profile.sections else profile


def without_exact(profile: HardwareProfile) -> HardwareProfile:
    """The same profile as the model alone would predict it."""
    sections = {
        key: replace(s, arrays=MappingProxyType({name: a for name, a in s.arrays.items() if name not in NAMES}))
        if "exact_m" in s.arrays
        else s
        for key, s in profile.sections.items()
    }
    return replace(profile, sections=MappingProxyType(sections))


def _allowed(arrays: dict[str, NDArray[Any]], profile: HardwareProfile, dtype: str) -> Mapping[str, NDArray[Any]]:
    """Without times that beat the datasheet's arithmetic at the highest clock: such a time is a broken measurement."""
    if not arrays or dtype not in profile.rates:
        return {}
    flops = 2.0 * arrays["exact_m"] * arrays["exact_n"] * arrays["exact_k"]
    good = arrays["exact_s"] >= flops / (profile.peak_flop_per_s(dtype) * max(1.0, profile.clock_headroom))
    return {name: a[good] for name, a in arrays.items()} if good.any() else {}


def _timed(records: Records) -> NDArray[np.bool_]:
    return np.asarray(np.isfinite(records.seconds) & (records.seconds > 0))


def _spread(spread: F) -> F:
    """Half widths of the 95 % interval over the median; one that is not known or has no end counts as the limit of drift."""
    return np.where(np.isfinite(spread), spread, _Z95 * UNKNOWN_REPEAT)
