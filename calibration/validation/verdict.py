"""Verdicts on predictions: whether they err less than a datasheet roofline and their intervals hold, in sentences.

Use :func:`verdict_of` for arrays, :func:`verdicts` for the parts of a report, :func:`of_validation`
and :func:`of_calibration` for conclusions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.validation.validate import Part, Report
from simulator.arrays import FloatArray
from simulator.display import few
from simulator.units import percent

if TYPE_CHECKING:
    from calibration.fit.local_update import Updated

COVERAGE = (85.0, 95.0)
"""Target range of the coverage of 90 % intervals, of times and of ratios, %."""


@dataclass(frozen=True)
class Verdict:
    """Errors of predictions and of datasheet rooflines on the same measurements, absolute and relative."""

    name: str
    rows: int
    median: float
    mean: float
    roofline_median: float
    roofline_mean: float
    coverage: float
    level: float

    @property
    def better(self) -> bool:
        """Whether median and mean error are below those of a datasheet roofline."""
        return self.median < self.roofline_median and self.mean < self.roofline_mean

    @property
    def covered(self) -> bool:
        """Whether the coverage reaches its target, within two standard errors of as many rows at the level."""
        deviation = math.sqrt(self.level * (1.0 - self.level) / self.rows)
        return self.coverage >= min(COVERAGE[0] / 100.0, self.level - 2.0 * deviation)

    @property
    def holds(self) -> bool:
        """Whether the predictions are better than a roofline and their intervals hold."""
        return self.better and self.covered

    @property
    def errors(self) -> str:
        """Errors as part of a sentence: the median, unless only the mean is above that of a roofline."""
        if self.median < self.roofline_median and not self.better:
            return f"mean error {percent(self.mean)} (datasheet roofline {percent(self.roofline_mean)})"
        return f"median error {percent(self.median)} (datasheet roofline {percent(self.roofline_median)})"

    @property
    def text(self) -> str:
        """Errors and coverage as part of a sentence."""
        target = "" if self.covered else f", target {COVERAGE[0]:.0f} %"
        return f"{self.errors}, {100.0 * self.coverage:.0f} % in their {percent(self.level)} interval{target}"


def verdict_of(
    name: str, measured: Any, predicted: Any, lower: Any, upper: Any, roofline: Any, level: float = 0.9
) -> Verdict:
    """Return the verdict on predictions with intervals; all arrays have the shape of ``measured``.

    >>> v = verdict_of("gemm bf16", [1.0, 2.0], [1.1, 2.0], [0.9, 1.8], [1.3, 2.2], [0.5, 1.8])
    >>> v.text, v.holds
    ('median error 5 % (datasheet roofline 30 %), 100 % in their 90 % interval', True)
    """
    true = np.asarray(measured, dtype=np.float64)
    error, baseline = (np.abs(np.asarray(x, dtype=np.float64) / true - 1.0) for x in (predicted, roofline))
    inside = (np.asarray(lower) <= true) & (true <= np.asarray(upper))
    middle, mean = (tuple(float(f(x)) for x in (error, baseline)) for f in (np.median, np.mean))
    return Verdict(name, len(true), middle[0], mean[0], middle[1], mean[1], float(inside.mean()), level)


def _of_parts(name: str, parts: Sequence[Part], level: float) -> Verdict:
    def of_all(column: str) -> FloatArray:
        return np.concatenate([getattr(part, column) for part in parts])

    measured, predicted, roofline = of_all("measured_s"), of_all("predicted_s"), of_all("roofline_s")
    return verdict_of(name, measured, predicted, of_all("lower_s"), of_all("upper_s"), roofline, level)


def verdicts(report: Report) -> list[Verdict]:
    """Return the verdict on each part of a report."""
    return [_of_parts(part.name, [part], report.level) for part in report.parts]


def of_validation(report: Report) -> list[str]:
    """Return whether a profile holds on measurements, and where it is worst."""
    found = verdicts(report)
    every = _of_parts("all", report.parts, report.level)
    failed = [v for v in found if not v.holds]
    some = f" for {few(v.name for v in failed)}" if len(failed) < len(found) else ""
    holds = f"does not hold{some}" if failed else "holds"
    out = [f"{report.hardware} {holds} on {every.rows:,} measurements of {report.device}: {every.text}."]
    if len(found) > 1:
        worst = max(failed or found, key=lambda v: v.median)
        out.append(f"Worst: {worst.name}, {worst.text}.")
    if fitted := [part.name for part in report.parts if part.in_fit]:
        out.append(f"The fit of {few(fitted)} used these rows; the errors on held-out shapes are below the table.")
    return out


def of_calibration(report: Report | None, fit: Updated | None, folder: str | Path, hardware: str) -> list[str]:
    """Return whether to use a new profile: its errors on held-out shapes against those of a datasheet roofline, or
    those of a local update (``fit``) against the profile before it, and what to do."""
    profile, longer = Path(folder) / "profile.yaml", "run the command again with a larger --budget"
    if fit is not None and fit.fits:
        whole = fit.fits[-1]  # all rows, or the only operator
        errors = f"mean error {percent(whole.error_after)}, before {percent(whole.error_before)}"
        based = f"of {whole.rows} rows, each predicted from the others"
        if whole.error_after >= whole.error_before:
            return [f"Do not use {profile}: the rows do not improve {hardware} ({errors} {based}); {longer}."]
        if report is None:
            return [f"Use {profile} as --hardware: {errors} {based}."]
    if report is None:
        return [f"Do not rely on {profile} yet: no shapes were held out to validate it; {longer}."]
    found, every = verdicts(report), _of_parts("all", report.parts, report.level)
    on = f"on {every.rows} held-out shapes"
    worse = [v for v in found if not v.better]
    if not every.better or len(worse) == len(found):
        return [f"Do not use {profile}: {on} it errs more than a datasheet roofline, {every.text}; {longer}."]
    if not every.covered:
        narrow = "its intervals are too narrow for its errors"
        return [f"Do not rely on {profile} yet: {on} {narrow}, {every.text}; {longer}."]
    if worse:
        named = "; ".join(f"{v.name}: {v.errors}" for v in worse)
        return [
            f"Use {profile} as --hardware, but not for passes that spend most time in {few(v.name for v in worse)}: "
            f"{on}, {every.text}.",
            f"Worse than a datasheet roofline: {named}; {longer}.",
        ]
    return [f"Use {profile} as --hardware: {on}, {every.text}."]
