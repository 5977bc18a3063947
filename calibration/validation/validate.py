"""A profile against measurements: every predicted time beside the measured one.

Use :func:`validate` with a profile and records: it returns a :class:`Report` of arrays.
:mod:`calibration.validation.scores` makes numbers of it, :mod:`calibration.validation.report` a text,
:mod:`calibration.validation.report_figures` figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from calibration.fit.predict import SECTIONS, parts_of, predict
from calibration.records.screening import work
from calibration.records.timing_table import Records
from simulator.arrays import FloatArray
from simulator.errors import InputError
from simulator.hardware.profile import HardwareProfile
from simulator.workload import DTYPES

SIMPLE_SHARE, SIMPLE_FLOOR_S = 0.8, 3e-6
"""Share of the datasheet bandwidth and fixed time of the rule of thumb max(FLOP / peak, bytes / (0.8 bandwidth)) + 3
us."""


@dataclass(frozen=True, eq=False)
class Part:
    """One operator in one number format ("int8_wo": int8 weights under 16-bit activations), a row a measurement."""

    operator: str
    dtype: str
    sizes: Mapping[str, FloatArray]  # dimensions that errors are shown against and that pairs may differ in
    measured_s: FloatArray
    predicted_s: FloatArray
    lower_s: FloatArray
    upper_s: FloatArray
    roofline_s: FloatArray  # max(FLOP / peak, bytes / bandwidth)
    simple_s: FloatArray  # the same with 0.8 of the bandwidth, plus 3 us
    bottleneck: NDArray[np.str_]  # that holds the predicted time
    status: str = "default"  # of the profile's section: "calibrated", "inherited" or "default"
    seen: bool = False  # whether that was fitted on these very rows

    def __len__(self) -> int:
        return len(self.measured_s)

    @property
    def name(self) -> str:
        """Operator and format, as headings and files name the part."""
        return f"{self.operator} {self.dtype}"

    @property
    def error(self) -> FloatArray:
        """Predicted over measured time, less 1."""
        return self.predicted_s / self.measured_s - 1.0


@dataclass(frozen=True)
class Report:
    """A validation: the profile, its parts, and the rows no part took with the reason."""

    hardware: str
    device: str
    software: str
    level: float
    parts: tuple[Part, ...]
    skipped: Mapping[str, int] = field(default_factory=dict)
    accuracy: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def validate(hw: HardwareProfile, records: Records, *, dtype: str | None = None, level: float = 0.9) -> Report:
    """Predict every record, of one number format (as :meth:`Records.labels` names it) or of all, and compare.

    Rows without a time that can be one, or that are no operator of the model or of the device, are counted in
    ``skipped``. InputError, with the reasons, when no row can be predicted.
    """
    skipped: dict[str, int] = {}
    if dtype is not None:
        records = records.select(records.labels().astype(str) == dtype)
    found = parts_of(records, hw, skipped)
    parts = [_part(operator, label, records.select(rows), hw, level) for operator, label, rows in found]
    if not parts:
        reasons = "; ".join(f"{count} rows: {reason}" for reason, count in skipped.items())
        raise InputError(f"nothing to validate{f': {reasons}' if reasons else ''}{f' in {dtype}' if dtype else ''}")
    device = ", ".join(dict.fromkeys(s.device for s in records.sources if s.device)) or "unknown"
    software = ", ".join(dict.fromkeys(s.software for s in records.sources if s.software)) or "unknown"
    held_out = {f"{o} {d}": dict(s.accuracy) for (o, d), s in hw.sections.items() if s.accuracy}
    return Report(hw.name, device, software, level, tuple(parts), MappingProxyType(skipped), MappingProxyType(held_out))


def _part(operator: str, label: str, r: Records, hw: HardwareProfile, level: float) -> Part:
    """Rows of one operator and format beside their prediction and two rooflines."""
    dtype, found = DTYPES[int(r.dtype[0])], predict(r, hw, level)
    time = found.time
    flops, weights, others = work(r)
    compute, moved = flops / hw.peak_flop_per_s(dtype), (weights + others) / hw.bandwidth_bytes_per_s
    if operator == "collective":
        moved = time.roofline_s
    fitted = hw.section(SECTIONS[operator], dtype)
    origin = fitted.provenance
    return Part(
        operator,
        label,
        MappingProxyType({name: np.asarray(v, dtype=np.float64) for name, v in found.sizes.items()}),
        r.seconds.astype(np.float64),
        time.seconds,
        time.lower,
        time.upper,
        np.maximum(compute, moved),
        np.maximum(compute, moved / SIMPLE_SHARE) + SIMPLE_FLOOR_S,
        time.bottlenecks,
        fitted.status,
        origin is not None and origin.rows == len(r) and origin.digest == r.tidy().digest(),
    )
