"""A profile next to measurements: :func:`validate` predicts every record, :func:`summary` returns all scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.evidence.scoring import errors, m_ranges, speedups
from calibration.fit.errors import LEVEL, accuracy_of, neighbours
from calibration.fit.predict import SECTIONS, parts_of, predict
from calibration.records.screening import work
from calibration.records.timing_table import Records
from simulator.arrays import FloatArray
from simulator.codes import DTYPES
from simulator.errors import InputError
from simulator.hardware.profile import HardwareProfile

SIMPLE_SHARE, SIMPLE_FLOOR_S = 0.8, 3e-6
"""Share of the datasheet bandwidth and fixed time of the rule of thumb max(FLOP / peak, bytes / (0.8 bandwidth)) + 3
us."""
PAIRS = 200_000  # most pairs of rows for the speedups of a report; of more pairs, a random sample counts


@dataclass(frozen=True, eq=False)
class ReportPart:
    """One operator in one number format ("int8_wo": int8 weights, 16-bit activations); one row per measurement."""

    operator: str
    dtype: str
    sizes: Mapping[str, FloatArray]  # for errors by size and for pairs that differ in one size
    measured_s: FloatArray
    predicted_s: FloatArray
    lower_s: FloatArray
    upper_s: FloatArray
    roofline_s: FloatArray  # max(FLOP / peak, bytes / bandwidth)
    simple_s: FloatArray  # the roofline with 0.8 of the bandwidth, plus 3 us
    bottleneck: NDArray[np.str_]  # of the predicted time
    status: str = "default"  # of the profile's section: "calibrated", "inherited" or "default"
    in_fit: bool = False  # whether the section was fitted on exactly these rows

    def __len__(self) -> int:
        return len(self.measured_s)

    @property
    def name(self) -> str:
        """Operator and format, used in headings and file names."""
        return f"{self.operator} {self.dtype}"

    @property
    def error(self) -> FloatArray:
        """Predicted over measured time, less 1."""
        return self.predicted_s / self.measured_s - 1.0


@dataclass(frozen=True)
class Report:
    """A validation: the profile, its parts, and the number of excluded rows by reason."""

    hardware: str
    device: str
    software: str
    level: float
    parts: tuple[ReportPart, ...]
    skipped: Mapping[str, int] = field(default_factory=dict)
    accuracy: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def validate(hw: HardwareProfile, records: Records, *, dtype: str | None = None) -> Report:
    """Predict every record of one number format (as :meth:`Records.labels` names it) or of all, and compare.

    Rows without a valid time, or of an operator that the cost models or the device do not support, are counted in
    ``skipped``. InputError, with the reasons, when no row can be predicted.
    """
    skipped: dict[str, int] = {}
    if dtype is not None:
        records = records.select(records.labels().astype(str) == dtype)
    split = parts_of(records, hw, skipped)
    parts = [_part(operator, label, records.select(rows), hw) for operator, label, rows in split]
    if not parts:
        reasons = "; ".join(f"{count} rows: {reason}" for reason, count in skipped.items())
        raise InputError(f"nothing to validate{f': {reasons}' if reasons else ''}{f' in {dtype}' if dtype else ''}")
    device = ", ".join(dict.fromkeys(s.device for s in records.sources if s.device)) or "unknown"
    software = ", ".join(dict.fromkeys(s.software for s in records.sources if s.software)) or "unknown"
    held_out = {f"{o} {d}": dict(s.accuracy) for (o, d), s in hw.sections.items() if s.accuracy}
    return Report(hw.name, device, software, LEVEL, tuple(parts), MappingProxyType(skipped), MappingProxyType(held_out))


def _part(operator: str, label: str, r: Records, hw: HardwareProfile) -> ReportPart:
    """Return rows of one operator and format with their prediction and two rooflines."""
    dtype, predicted = DTYPES[int(r.dtype[0])], predict(r, hw, LEVEL)
    time = predicted.time
    flops, weights, others = work(r)
    compute, moved = flops / hw.peak_flop_per_s(dtype), (weights + others) / hw.bandwidth_bytes_per_s
    if operator == "collective":
        moved = time.roofline_s
    of_format = (SECTIONS[operator], label) in hw.sections  # weights narrower than the arithmetic, or with scales
    section = hw.section(SECTIONS[operator], label if of_format else dtype)
    origin = section.provenance
    return ReportPart(
        operator=operator,
        dtype=label,
        sizes=MappingProxyType({name: np.asarray(v, dtype=np.float64) for name, v in predicted.sizes.items()}),
        measured_s=r.seconds.astype(np.float64),
        predicted_s=time.seconds,
        lower_s=time.lower,
        upper_s=time.upper,
        roofline_s=np.maximum(compute, moved),
        simple_s=np.maximum(compute, moved / SIMPLE_SHARE) + SIMPLE_FLOOR_S,
        bottleneck=time.bottlenecks,
        status=section.status,
        in_fit=origin is not None and origin.rows == len(r) and origin.digest == r.tidy().digest(),
    )


def part_speedups(part: ReportPart) -> dict[str, float]:
    """Return :func:`speedups` of the rows of a part that differ in one size."""
    at = neighbours([size for name, size in part.sizes.items() if name != "role"])
    if len(at) > PAIRS:
        at = at[np.sort(np.random.default_rng(0).choice(len(at), PAIRS, replace=False))]
    return speedups(part.predicted_s, part.measured_s, at)


def coverage(part: ReportPart) -> list[dict[str, Any]]:
    """Return the coverage of measured times and the geometric half-width of their intervals (a factor less 1): "all",
    then by bottleneck."""
    inside = (part.measured_s >= part.lower_s) & (part.measured_s <= part.upper_s)
    half, out = 0.5 * np.log(part.upper_s / part.lower_s), []
    for bottleneck in ["all", *sorted(set(part.bottleneck.tolist()))]:
        rows = np.full(len(part), bottleneck == "all") | (part.bottleneck == bottleneck)
        share, width = float(inside[rows].mean()), float(np.expm1(half[rows].mean()))
        out.append({"bottleneck": bottleneck, "rows": int(rows.sum()), "coverage": share, "width": width})
    return out


def part_summary(part: ReportPart) -> dict[str, Any]:
    """Return all scores of one part as plain data."""
    out: dict[str, Any] = {
        "operator": part.operator,
        "dtype": part.dtype,
        "rows": len(part),
        "status": part.status,
        "fitted_on_these_rows": part.in_fit,
        "errors": accuracy_of(part.error),
        "roofline": errors(part.roofline_s, part.measured_s),
        "simple": errors(part.simple_s, part.measured_s),
        "speedup": part_speedups(part),
        "coverage": coverage(part),
    }
    if "m" in part.sizes:
        ranges = m_ranges(part.sizes["m"])
        out["by_m"] = {title: {"rows": int(rows.sum()), **accuracy_of(part.error[rows])} for title, _, rows in ranges}
    return out


def summary(report: Report) -> dict[str, Any]:
    """Return a report as plain data, the output of ``prunesim validate --json``."""
    return {
        "hardware": report.hardware,
        "measured_on": report.device,
        "software": report.software,
        "level": report.level,
        "held_out_when_fitted": {name: dict(values) for name, values in report.accuracy.items()},
        "skipped": dict(report.skipped),
        "parts": [part_summary(part) for part in report.parts],
    }
