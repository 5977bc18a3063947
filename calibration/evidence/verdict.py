"""Verdicts: whether predictions err less than a datasheet roofline and their intervals hold, and so whether to use a
profile, as sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.evidence.validate import Report, ReportPart
from calibration.records.timing_table import PURPOSES, Flag, Records
from simulator.display import few
from simulator.units import percent

if TYPE_CHECKING:
    from calibration.fit.local_update import Updated
    from calibration.fit.profile import ProfileFit

USE, PARTLY, DO_NOT_USE = "use", "partly", "do_not_use"
"""Verdicts on a profile; a command that ends in the last one has the exit status 1."""
LEAST_ROWS = 10  # held-out rows below which a profile is not recommended
DISTURBED_PARTLY, DISTURBED_MOST = 0.2, 0.5  # shares above which a profile is for use with care, and not for use
WIDE_INTERVAL = 0.1  # relative half-width of the 95 % interval of a measured time above which the row is disturbed
COVERAGE = (85.0, 95.0)  # target range of the coverage of 90 % intervals, of times and of ratios, %
_COMPOSED = ("low_rank", "gather_gemm", "grouped_gemm")  # predicted as sums of other operators
_LONGER, _IDLE = "run the command again with a larger --budget", "measure again on an idle machine"


@dataclass(frozen=True)
class Judgement:
    """Whether to use a profile, the reasons against it in a few words, and the sentences of the conclusion."""

    verdict: str  # USE, PARTLY or DO_NOT_USE
    sentences: tuple[str, ...]
    reasons: tuple[str, ...] = ()

    @property
    def status(self) -> int:
        return int(self.verdict == DO_NOT_USE)

    def as_row(self) -> dict[str, Any]:
        return {"verdict": self.verdict, "reasons": list(self.reasons)}


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
        return self.median < self.roofline_median and self.mean < self.roofline_mean

    @property
    def covered(self) -> bool:
        """Whether the coverage reaches its target, within two standard errors of as many rows at the level."""
        deviation = math.sqrt(self.level * (1.0 - self.level) / self.rows)
        return self.coverage >= min(COVERAGE[0] / 100.0, self.level - 2.0 * deviation)

    @property
    def holds(self) -> bool:
        return self.better and self.covered

    @property
    def errors(self) -> str:
        """The median error in words, unless only the mean is above that of a roofline."""
        if self.median < self.roofline_median and not self.better:
            return f"mean error {percent(self.mean)} (datasheet roofline {percent(self.roofline_mean)})"
        return f"median error {percent(self.median)} (datasheet roofline {percent(self.roofline_median)})"

    @property
    def text(self) -> str:
        target = "" if self.covered else f", target {COVERAGE[0]:.0f} %"
        return f"{self.errors}, {100.0 * self.coverage:.0f} % in their {percent(self.level)} interval{target}"


def verdict_of(
    name: str, measured: Any, predicted: Any, lower: Any, upper: Any, roofline: Any, level: float = 0.9
) -> Verdict:
    """Return the verdict on predictions with intervals; all arrays have the shape of ``measured``."""
    true = np.asarray(measured, dtype=np.float64)
    error, baseline = (np.abs(np.asarray(x, dtype=np.float64) / true - 1.0) for x in (predicted, roofline))
    inside = (np.asarray(lower) <= true) & (true <= np.asarray(upper))
    middle, mean = (tuple(float(f(x)) for x in (error, baseline)) for f in (np.median, np.mean))
    return Verdict(name, len(true), middle[0], mean[0], middle[1], mean[1], float(inside.mean()), level)


def _of_parts(name: str, parts: Sequence[ReportPart], level: float) -> Verdict:
    columns = ("measured_s", "predicted_s", "lower_s", "upper_s", "roofline_s")
    values = {column[:-2]: np.concatenate([getattr(part, column) for part in parts]) for column in columns}
    return verdict_of(name, **values, level=level)


def verdicts(report: Report) -> list[Verdict]:
    """Return the verdict on each part of a report."""
    return [_of_parts(part.name, [part], report.level) for part in report.parts]


def _whole(report: Report) -> Verdict:
    """Return the verdict on operators with a fit of their own; a few rows of others must not decide on a profile."""
    own = [part for part in report.parts if part.operator not in _COMPOSED]
    return _of_parts("all", own or report.parts, report.level)


def disturbed_share(records: Records) -> float:
    """Return the share of measured times, except drift checks, that are disturbed: the process waited for a CPU, the
    device throttled, or the interval is wider than :data:`WIDE_INTERVAL` (rows of tables have none)."""
    kept = records.timed & (records.purpose != PURPOSES.index("drift_check"))
    if not kept.any():
        return 0.0
    flagged = (records.flags & int(Flag.WAITED | Flag.THROTTLED)) != 0
    return float((flagged | (records.spread > WIDE_INTERVAL))[kept].mean())


def of_validation(report: Report) -> Judgement:
    """Judge a profile by measurements: whether it holds on them, and where it is worst."""
    found = verdicts(report)
    every, whole = _of_parts("all", report.parts, report.level), _whole(report)
    failed = [v for v in found if not v.holds]
    some = f" for {few(v.name for v in failed)}" if len(failed) < len(found) else ""
    holds = f"does not hold{some}" if failed else "holds"
    out = [f"{report.hardware} {holds} on {every.rows:,} measurements of {report.device}: {every.text}."]
    if len(found) > 1:
        worst = max(failed or found, key=lambda v: v.median)
        out.append(f"Worst: {worst.name}, {worst.text}.")
    if fitted := [part.name for part in report.parts if part.in_fit]:
        out.append(f"The fit of {few(fitted)} used these rows; the errors on held-out shapes are below the table.")
    reasons = []
    if any(not v.better for v in failed):
        reasons.append(f"worse than a datasheet roofline: {few(v.name for v in failed if not v.better)}")
    if any(not v.covered for v in failed):
        reasons.append(f"intervals too narrow: {few(v.name for v in failed if not v.covered)}")
    if every.rows < LEAST_ROWS:
        reasons.append(f"few rows: {every.rows}, expected at least {LEAST_ROWS}")
    useless = not whole.better or not any(v.better for v in found)
    verdict = DO_NOT_USE if useless else PARTLY if reasons else USE
    return Judgement(verdict, tuple(out), tuple(reasons))


def of_calibration(
    report: Report | None, fit: Updated | None, folder: str | Path, hardware: str, disturbed: float = 0.0
) -> Judgement:
    """Judge a new profile by its errors on held-out shapes against those of a datasheet roofline, or a local update
    (``fit``) against the profile before it; ``disturbed`` is that of :func:`disturbed_share`."""
    profile = Path(folder) / "profile.yaml"
    if fit is not None and fit.fits:
        update = of_update(fit, profile, hardware, _LONGER)
        if update.status or report is None:
            return with_disturbed(update, profile, disturbed)
    if report is None:
        text = f"Do not rely on {profile} yet: no shapes were held out to validate it; {_LONGER}."
        return Judgement(DO_NOT_USE, (text,), ("no held-out shapes",))
    found, every = verdicts(report), _whole(report)
    on = f"on {every.rows} held-out shapes"
    worse = [v for v in found if not v.better]
    if not every.better or len(worse) == len(found):
        text = f"Do not use {profile}: {on} it errs more than a datasheet roofline, {every.text}; {_LONGER}."
        return Judgement(DO_NOT_USE, (text,), ("worse than a datasheet roofline",))
    if every.rows < LEAST_ROWS:
        text = f"Do not rely on {profile} yet: {on}, fewer than {LEAST_ROWS}, {every.text}; {_LONGER}."
        return Judgement(DO_NOT_USE, (text,), (f"few held-out shapes: {every.rows}",))
    buts, reasons, more = [], [], []
    if worse:
        names = few(v.name for v in worse)
        buts.append(f"not for passes that spend most time in {names}")
        reasons.append(f"worse than a datasheet roofline: {names}")
        more.append(f"Worse than a datasheet roofline: {'; '.join(f'{v.name}: {v.errors}' for v in worse)}; {_LONGER}.")
    if not every.covered:
        buts.append("do not rely on its intervals, which are too narrow for its errors")
        reasons.append("intervals too narrow")
    but = f", but {'; '.join(buts)}" if buts else ""
    text = f"Use {profile} as --hardware{but}: {on}, {every.text}."
    judged = Judgement(PARTLY if buts else USE, (text, *more), tuple(reasons))
    return with_disturbed(judged, profile, disturbed)


def with_disturbed(judged: Judgement, profile: str | Path, share: float) -> Judgement:
    """Return a judgement that takes into account the share of disturbed times."""
    if judged.status or share <= DISTURBED_PARTLY:
        return judged
    fact = f"{percent(share)} of the times were disturbed by other processes or throttling"
    reasons = (*judged.reasons, f"machine busy: {fact}")
    if share > DISTURBED_MOST:
        return Judgement(DO_NOT_USE, (f"Do not use {profile}: {fact}; {_IDLE}.",), reasons)
    return Judgement(PARTLY, (*judged.sentences, f"Use it with care: {fact}; {_IDLE}."), reasons)


def of_update(fit: Updated, profile: str | Path, hardware: str, remedy: str = "measure more rows") -> Judgement:
    """Judge a local update: the errors of its rows, each predicted from the others, against those before it."""
    whole = fit.fits[-1]  # all rows, or the only operator
    errors = f"mean error {percent(whole.error_after)}, before {percent(whole.error_before)}"
    based = f"of {whole.rows} rows, each predicted from the others"
    if whole.error_after >= whole.error_before:
        text = f"Do not use {profile}: the rows do not improve {hardware} ({errors} {based}); {remedy}."
        return Judgement(DO_NOT_USE, (text,), ("the rows do not improve the profile",))
    inside = f"{percent(whole.inside_after)} in their 90 % interval"
    return Judgement(USE, (f"Use {profile} as --hardware: {errors} {based}; {inside}.",))


def of_fit(fit: ProfileFit, report: Report, output: str, disturbed: float = 0.0) -> Judgement:
    """Judge a fit by the errors of its sections on held-out shapes against those of a datasheet roofline, which
    ``report`` has. If no section has enough rows for held-out shapes, the profile is not for use."""
    rows = sum(part.rows for part in fit.parts)
    many = "1 section" if len(fit.parts) == 1 else f"{len(fit.parts)} sections"
    about = f"{many} of {fit.profile.name} fitted on {rows:,} rows"
    known = {f"{p.operator} {p.dtype}": p.section.accuracy["mape"] for p in fit.parts if "mape" in p.section.accuracy}
    if not known:
        text = f"Do not rely on {output} yet: {about}, too few for held-out shapes; fit more rows."
        return Judgement(DO_NOT_USE, (text,), ("no held-out shapes",))
    best, worst = min(known, key=lambda name: known[name]), max(known, key=lambda name: known[name])
    ends = " to ".join(f"{percent(known[name])} ({name})" for name in dict.fromkeys((best, worst)))
    text = f"{about}; mean error on held-out shapes {ends}"
    roofline = {part.name: float(np.abs(part.roofline_s / part.measured_s - 1.0).mean()) for part in report.parts}
    worse = [name for name, error in known.items() if name in roofline and error >= roofline[name]]
    reason = (f"worse than a datasheet roofline: {few(worse)}",) if worse else ()
    if len(worse) == len(known):
        text = f"Do not use {output}: {text}, which is more than that of a datasheet roofline; fit more rows."
        return Judgement(DO_NOT_USE, (text,), reason)
    judged = Judgement(USE, (f"Use {output} as --hardware: {text}.",))
    if worse:
        but = f"not for passes that spend most time in {few(worse)}, which is worse than a datasheet roofline"
        judged = Judgement(PARTLY, (f"Use {output} as --hardware, but {but}: {text}.",), reason)
    return with_disturbed(judged, output, disturbed)
