"""A profile next to measurements: predictions of every record, their scores, and the verdict
whether to use it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from calibration.fit.predict import SECTIONS, parts_of, predict
from calibration.fit.section import LEVEL, accuracy_of, neighbours
from calibration.records.screening import work
from calibration.records.timing_table import PURPOSES, Flag, Records, Row
from calibration.validation.scoring import errors, m_ranges, speedups, table
from simulator.arrays import FloatArray
from simulator.codes import DTYPES
from simulator.display import few, markdown_text
from simulator.errors import InputError
from simulator.files.write import check_target, write_whole
from simulator.hardware.profile import HardwareProfile
from simulator.units import percent

if TYPE_CHECKING:
    from calibration.fit.profile import ProfileFit

# rule of thumb: max(FLOP / peak, bytes / (0.8 bandwidth)) + 3 us
SIMPLE_SHARE, SIMPLE_FLOOR_S = 0.8, 3e-6
PAIRS = 200_000  # most pairs of rows for the speedups of a report: a random sample
ENOUGH_TO_DRAW = 10  # rows that an operator needs for a figure
ERRORS = ("mape", "median", "p95", "bias")
ERROR_TITLES = ("MAPE %", "median %", "p95 %", "bias %")
# do_not_use: the exit status of a command is 1
USE, PARTLY, DO_NOT_USE = "use", "partly", "do_not_use"
TELLING_ROWS = 3  # rows of an operator below which a miss may be one of the expected 10 %
LEAST_ROWS = 10  # held-out rows below which a profile is not recommended
# shares above which a profile is for use with care, and not for use
DISTURBED_PARTLY, DISTURBED_MOST = 0.2, 0.5
# relative half-width of the 95 % interval of a measured time above which the row is disturbed
WIDE_INTERVAL = 0.1
COVERAGE = (85.0, 95.0)  # target range, %, of the coverage of 90 % intervals of times and of ratios
_COMPOSED = ("low_rank", "gather_gemm", "grouped_gemm")  # predicted as sums of other operators
IDLE, LONGER = "measure again on an idle machine", "run the command again with a larger --budget"


@dataclass(frozen=True, eq=False)
class ReportPart:
    """Measurements of one operator in one number format, with their predictions."""

    operator: str
    dtype: str  # a label such as "int8_wo": int8 weights, 16-bit activations
    sizes: Mapping[str, FloatArray]  # for errors by size and for pairs that differ in one size
    measured_s: FloatArray
    predicted_s: FloatArray
    lower_s: FloatArray
    upper_s: FloatArray
    roofline_s: FloatArray  # max(FLOP / peak, bytes / bandwidth)
    simple_s: FloatArray  # the roofline with 0.8 of the bandwidth, plus 3 us
    bottleneck: NDArray[np.str_]
    # relative half-width of the interval of each measured time; 0 where none is known
    spread: FloatArray | float = 0.0
    status: str = "default"  # section of the profile: "calibrated", "inherited" or "default"
    in_fit: bool = False  # whether the section was fitted on exactly these rows

    def __len__(self) -> int:
        return len(self.measured_s)

    @property
    def name(self) -> str:
        return f"{self.operator} {self.dtype}"

    @property
    def error(self) -> FloatArray:
        return self.predicted_s / self.measured_s - 1.0


@dataclass(frozen=True)
class Report:
    hardware: str
    device: str
    software: str
    parts: tuple[ReportPart, ...]
    skipped: Mapping[str, int] = field(default_factory=dict)  # number of excluded rows by reason
    # errors on shapes held out of the fit
    accuracy: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def validate(hw: HardwareProfile, records: Records, *, dtype: str | None = None) -> Report:
    """Predict every record, or those of one number format (a label); InputError if no row can be
    predicted."""
    skipped: dict[str, int] = {}
    if dtype is not None:
        records = records.select(records.labels().astype(str) == dtype)
    parts = [
        _part(operator, label, records.select(rows), hw)
        for operator, label, rows in parts_of(records, hw, skipped)
    ]
    if not parts:
        reasons = "; ".join(f"{count} rows: {reason}" for reason, count in skipped.items())
        why = f": {reasons}" if reasons else ""
        raise InputError(f"nothing to validate{why}{f' in {dtype}' if dtype else ''}")
    held_out = {f"{o} {d}": dict(s.accuracy) for (o, d), s in hw.sections.items() if s.accuracy}
    return Report(
        hardware=hw.name,
        device=_listed(source.device for source in records.sources),
        software=_listed(source.software for source in records.sources),
        parts=tuple(parts),
        skipped=skipped,
        accuracy=held_out,
    )


def _listed(texts: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(filter(None, texts))) or "unknown"


def _part(operator: str, label: str, r: Records, hw: HardwareProfile) -> ReportPart:
    dtype, predicted = DTYPES[int(r.dtype[0])], predict(r, hw)
    time = predicted.time
    flops, weights, others = work(r)
    compute = flops / hw.peak_flop_per_s(dtype)
    moved = (weights + others) / hw.bandwidth_bytes_per_s
    if operator == "collective":
        moved = time.roofline_s
    # weights narrower than the arithmetic, or with scales
    own = (SECTIONS[operator], label) in hw.sections
    section = hw.section(SECTIONS[operator], label if own else dtype)
    origin = section.provenance
    return ReportPart(
        operator=operator,
        dtype=label,
        sizes={name: np.asarray(v, dtype=np.float64) for name, v in predicted.sizes.items()},
        measured_s=r.seconds.astype(np.float64),
        predicted_s=time.seconds,
        lower_s=time.lower,
        upper_s=time.upper,
        roofline_s=np.maximum(compute, moved),
        simple_s=np.maximum(compute, moved / SIMPLE_SHARE) + SIMPLE_FLOOR_S,
        bottleneck=time.bottlenecks,
        # too few samples have no interval; imported tables state none
        spread=np.where(np.isnan(r.spread), np.where(r.sample_count > 0, np.inf, 0.0), r.spread),
        status=section.status,
        in_fit=origin is not None and origin.rows == len(r) and origin.digest == r.tidy().digest(),
    )


def part_speedups(part: ReportPart) -> dict[str, float]:
    pairs = neighbours([size for name, size in part.sizes.items() if name != "role"])
    if len(pairs) > PAIRS:
        pairs = pairs[np.sort(np.random.default_rng(0).choice(len(pairs), PAIRS, replace=False))]
    return speedups(part.predicted_s, part.measured_s, pairs)


def coverage(part: ReportPart) -> list[Row]:
    """Return coverage and geometric half-width of the intervals (a factor less 1), of all rows,
    then by bottleneck."""
    inside = (part.measured_s >= part.lower_s) & (part.measured_s <= part.upper_s)
    half, out = 0.5 * np.log(part.upper_s / part.lower_s), []
    for bottleneck in ["all", *sorted(set(part.bottleneck.tolist()))]:
        rows = np.full(len(part), bottleneck == "all") | (part.bottleneck == bottleneck)
        share, width = float(inside[rows].mean()), float(np.expm1(half[rows].mean()))
        out.append(
            {"bottleneck": bottleneck, "rows": int(rows.sum()), "coverage": share, "width": width}
        )
    return out


def part_summary(part: ReportPart) -> Row:
    out: Row = {
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
        out["by_m"] = {
            name: {"rows": int(rows.sum()), **accuracy_of(part.error[rows])}
            for name, rows in ranges
        }
    return out


def summary(report: Report) -> Row:
    """Return the output of ``prunesim validate --json``."""
    return {
        "hardware": report.hardware,
        "measured_on": report.device,
        "software": report.software,
        "level": LEVEL,
        "held_out_when_fitted": {name: dict(values) for name, values in report.accuracy.items()},
        "skipped": dict(report.skipped),
        "parts": [part_summary(part) for part in report.parts],
    }


def number(value: Any, digits: int = 1) -> str:
    """Return a fraction in percent for a table; a dash for none."""
    return "-" if value is None or value != value else f"{100 * value:.{digits}f}"


def _accuracy_table(parts: Sequence[Mapping[str, Any]]) -> str:
    header = ["operator", "rows", *ERROR_TITLES, "roofline MAPE %", "0.8 bw + 3 us MAPE %"]
    header += ["speedup median / p95 %", "Spearman", "coverage"]
    rows = []
    for p in parts:
        e, s = p["errors"], p["speedup"]
        status = "" if p["status"] == "calibrated" else f" ({p['status']})"
        rank = s.get("spearman", math.nan)
        mark = " *" if p["fitted_on_these_rows"] else ""
        line = [f"{p['operator']} {p['dtype']}{status}{mark}", f"{p['rows']:,}"]
        line += [number(e[name], 1 if name == "p95" else 2) for name in ERRORS]
        line += [number(p["roofline"]["mape"]), number(p["simple"]["mape"])]
        line.append(f"{number(s.get('median'), 2)} / {number(s.get('p95'))}")
        line.append("-" if math.isnan(rank) else f"{rank:.3f}")
        rows.append([*line, f"{number(p['coverage'][0]['coverage'])} %"])
    return table(header, rows)


def markdown(report: Report, figures: Mapping[str, str] | None = None, title: str = "") -> str:
    """Return the report as Markdown; ``figures`` are the addresses of images by name of the
    part."""

    def errors(values: Mapping[str, Any]) -> list[str]:
        return [number(values.get(name), 2) for name in ERRORS]

    data = summary(report)
    about = markdown_text(f"Measured on {report.device}; software: {report.software}.")
    lines = [f"# {markdown_text(title or f'Accuracy of {report.hardware}')}", ""]
    lines += [f"{about} Errors are predicted over measured time less one, in percent.", ""]
    lines += [_accuracy_table(data["parts"]), ""]
    if any(p["fitted_on_these_rows"] for p in data["parts"]):
        lines += ["\\* fitted on these rows; the errors on held-out shapes are below.", ""]
    for reason, count in data["skipped"].items():
        lines.append(f"- {count} rows excluded: {markdown_text(reason)}")
    lines += [""] * bool(data["skipped"])
    if held_out := data["held_out_when_fitted"]:
        rows = [[name, *errors(values)] for name, values in held_out.items()]
        lines += ["## Held-out shapes of the fit", "", table(["section", *ERROR_TITLES], rows), ""]
    covered = f"coverage of the {100 * LEVEL:.0f} % interval, %"
    for p in data["parts"]:
        name = f"{p['operator']} {p['dtype']}"
        lines += [f"## {name}", ""]
        if "by_m" in p:
            rows = [[m, f"{v['rows']:,}", *errors(v)] for m, v in p["by_m"].items()]
            lines += [table(["m", "rows", *ERROR_TITLES], rows), ""]
        rows = [
            [c["bottleneck"], f"{c['rows']:,}", number(c["coverage"]), number(c["width"])]
            for c in p["coverage"]
        ]
        lines += [table(["bottleneck", "rows", covered, "half-width %"], rows), ""]
        if address := (figures or {}).get(name):
            lines += [f"![{name}: predicted]({address})", ""]
            lines += ["Predicted against measured time, and their ratio.", ""]
    return "\n".join(lines).rstrip() + "\n"


def write_markdown(report: Report, path: str | Path, title: str = "") -> tuple[Path, ...]:
    """Write FILE.md and figures of its larger parts (PNG) in the same folder; return all files, the
    text last."""
    from simulator.figures.measured import Cloud, scatter_figure
    from simulator.figures.style import save_figure

    target, written = check_target(path), dict[str, Path]()
    for part in report.parts:
        if len(part) >= ENOUGH_TO_DRAW:
            file = f"{target.stem}_{part.name.replace(' ', '_')}_predicted.png"
            written[part.name] = target.with_name(file)
            cloud = Cloud(part.name, part.measured_s, part.predicted_s, what="rows")
            save_figure(scatter_figure([cloud]), written[part.name])
    figures = {name: path.name for name, path in written.items()}
    write_whole(target, markdown(report, figures, title).encode())
    return (*written.values(), target)


@dataclass(frozen=True)
class Judgement:
    verdict: str  # USE, PARTLY or DO_NOT_USE
    sentences: tuple[str, ...]  # the conclusion
    reasons: tuple[str, ...] = ()  # reasons against the profile, a few words each

    @property
    def status(self) -> int:
        return int(self.verdict == DO_NOT_USE)

    def as_row(self) -> Row:
        return {"verdict": self.verdict, "reasons": list(self.reasons)}


@dataclass(frozen=True)
class Verdict:
    """Absolute relative errors of predictions, and of datasheet rooflines on the same
    measurements."""

    name: str
    rows: int
    median: float
    mean: float
    roofline_median: float
    roofline_mean: float
    coverage: float  # coverage of the rows that are measured precisely enough to tell
    unclear: int = 0  # number of rows whose measured interval is wider than the predicted one

    @property
    def clear(self) -> int:
        return self.rows - self.unclear

    @property
    def better(self) -> bool:
        return self.median < self.roofline_median and self.mean < self.roofline_mean

    @property
    def covered(self) -> bool:
        """Whether the coverage reaches its target, within two standard errors for this number of
        rows."""
        deviation = math.sqrt(LEVEL * (1.0 - LEVEL) / max(self.clear, 1))
        return self.coverage >= min(COVERAGE[0] / 100.0, LEVEL - 2.0 * deviation)

    @property
    def holds(self) -> bool:
        return self.better and self.covered

    @property
    def errors(self) -> str:
        """The median error in words, or the mean error if only the mean exceeds that of a
        roofline."""
        name, error, roofline = "median", self.median, self.roofline_median
        if error < roofline and not self.better:
            name, error, roofline = "mean", self.mean, self.roofline_mean
        return f"{name} error {percent(error)} (datasheet roofline {percent(roofline)})"

    @property
    def text(self) -> str:
        target = "" if self.covered else f", target {COVERAGE[0]:.0f} %"
        unclear = f" ({self.unclear} measured too roughly to tell)" if self.unclear else ""
        return (
            f"{self.errors}, {100.0 * self.coverage:.0f} % in their {percent(LEVEL)}"
            f" interval{target}{unclear}"
        )


def verdict_of(
    name: str,
    measured: Any,
    predicted: Any,
    lower: Any,
    upper: Any,
    roofline: Any,
    spread: Any = 0.0,
) -> Verdict:
    """Return the verdict on predictions with intervals; all values are arrays or sequences of one
    length. ``spread`` is the relative half-width of the interval of each measured value: a
    prediction misses only if both intervals are apart, and a row whose measured interval is wider
    than the predicted one does not count."""
    true, found, low, high, bound = np.array(
        [measured, predicted, lower, upper, roofline], dtype=np.float64
    )
    errors = np.abs(np.array([found, bound]) / true - 1.0)
    medians, means = np.median(errors, axis=1).tolist(), errors.mean(axis=1).tolist()
    least, most = true / (1.0 + np.asarray(spread)), true * (1.0 + np.asarray(spread))
    apart = (high < least) | (most < low)
    clear = apart | (most * low <= high * least)
    coverage = 1.0 - float(apart[clear].mean()) if clear.any() else 1.0
    unclear = int((~clear).sum())
    ours, of_roofline = zip(medians, means, strict=True)
    return Verdict(name, len(true), *ours, *of_roofline, coverage, unclear)


def _of_parts(name: str, parts: Sequence[ReportPart]) -> Verdict:
    columns = ("measured_s", "predicted_s", "lower_s", "upper_s", "roofline_s", "spread")
    values = (
        np.concatenate([np.broadcast_to(getattr(part, column), len(part)) for part in parts])
        for column in columns
    )
    return verdict_of(name, *values)


def verdicts(report: Report) -> list[Verdict]:
    return [_of_parts(part.name, [part]) for part in report.parts]


def _whole(report: Report) -> Verdict:
    """Return the verdict on operators that have a fit; a few rows of others must not decide on a
    profile."""
    fitted = [part for part in report.parts if part.operator not in _COMPOSED]
    return _of_parts("all", fitted or report.parts)


def disturbed_share(records: Records) -> float:
    """Return the share of measured times, without drift checks, during which the process waited for
    a CPU or the device throttled, or whose interval is wide or, with few samples, unknown."""
    kept = records.timed & (records.purpose != PURPOSES.index("drift_check"))
    if not kept.any():
        return 0.0
    flagged = (records.flags & int(Flag.WAITED | Flag.THROTTLED)) != 0
    unknown = np.isnan(records.spread) & (records.sample_count > 0)
    return float((flagged | unknown | (records.spread > WIDE_INTERVAL))[kept].mean())


def of_validation(report: Report) -> Judgement:
    parts = verdicts(report)
    failed = [v for v in parts if not v.holds]
    every = _of_parts("all", report.parts)
    some = f" for {few(v.name for v in failed)}" if len(failed) < len(parts) else ""
    holds = f"does not hold{some}" if failed else "holds"
    out = [
        f"{report.hardware} {holds} on {every.rows:,} measurements of {report.device}:"
        f" {every.text}."
    ]
    if len(parts) > 1:
        worst = max(failed or parts, key=lambda v: v.median)
        out.append(f"Worst: {worst.name}, {worst.text}.")
    if fitted := [part.name for part in report.parts if part.in_fit]:
        out.append(
            f"The fit of {few(fitted)} used these rows; the errors on held-out shapes are below the"
            " table."
        )
    reasons = _reasons(failed, every.rows)
    useless = not _whole(report).better or not any(v.better for v in parts)
    verdict = DO_NOT_USE if useless else PARTLY if reasons else USE
    return Judgement(verdict, tuple(out), tuple(reasons))


def _reasons(failed: Sequence[Verdict], rows: int) -> list[str]:
    causes = {
        "worse than a datasheet roofline": [v.name for v in failed if not v.better],
        "intervals too narrow": [v.name for v in failed if not v.covered],
    }
    reasons = [f"{cause}: {few(names)}" for cause, names in causes.items() if names]
    if rows < LEAST_ROWS:
        reasons.append(f"few rows: {rows}, expected at least {LEAST_ROWS}")
    return reasons


def _judged(
    profile: object,
    fact: str,
    worse: Sequence[str],
    remedy: str,
    useless: bool,
    narrow: Sequence[str] = (),
) -> Judgement:
    """Judge a new profile: ``worse`` are its parts that err more than a datasheet roofline,
    ``narrow`` those whose intervals are too narrow for their errors."""
    roofline = "worse than a datasheet roofline"
    reasons: tuple[str, ...] = (
        (f"{roofline}: {few(worse)}",) if worse else (roofline,) if useless else ()
    )
    if useless:
        text = f"Do not use {profile}: it errs more than a datasheet roofline, {fact}; {remedy}."
        return Judgement(DO_NOT_USE, (text,), reasons)
    buts = []
    if worse:
        where = f"not for passes that spend most time in {few(worse)}"
        buts.append(f"{where}, where it errs more than a datasheet roofline")
    if narrow:
        where = f"do not rely on its intervals of {few(narrow)}"
        buts.append(f"{where}, which are too narrow for the errors")
        reasons += (f"intervals too narrow: {few(narrow)}",)
    but = f", but {'; '.join(buts)}" if buts else ""
    return Judgement(
        PARTLY if buts else USE, (f"Use {profile} as --hardware{but}: {fact}.",), reasons
    )


def of_calibration(
    report: Report | None,
    folder: Path,
    disturbed: float = 0.0,
    remedy: str = LONGER,
) -> Judgement:
    """Judge a new profile by its errors on held-out shapes."""
    profile = folder / "profile.yaml"
    if report is None:
        text = f"Do not rely on {profile} yet: no shapes were held out to validate it; {remedy}."
        return Judgement(DO_NOT_USE, (text,), ("no held-out shapes",))
    found, every = verdicts(report), _whole(report)
    worse = [v.name for v in found if not v.better]
    fact = f"on {every.rows} held-out shapes, {every.text}"
    useless = not every.better or len(worse) == len(found)
    if every.rows < LEAST_ROWS and not useless:
        text = f"Do not rely on {profile} yet: {fact}; at least {LEAST_ROWS} are needed, {remedy}."
        return Judgement(DO_NOT_USE, (text,), (f"few held-out shapes: {every.rows}",))
    if every.clear < LEAST_ROWS and not useless:
        text = f"Do not rely on {profile} yet: {fact}; {IDLE}."
        rough = f"{every.unclear} of {every.rows} held-out shapes measured too roughly"
        return Judgement(DO_NOT_USE, (text,), (f"machine busy: {rough}",))
    narrow = [v.name for v in found if not v.covered and v.clear >= TELLING_ROWS]
    narrow = narrow or ["all operators"] * (not every.covered)
    judged = _judged(profile, fact, worse, remedy, useless, narrow)
    return with_disturbed(judged, profile, disturbed)


def with_disturbed(judged: Judgement, profile: str | Path, share: float) -> Judgement:
    """Return the judgement, or a worse one if a large share of the times was disturbed."""
    if judged.status or share <= DISTURBED_PARTLY:
        return judged
    fact = f"{percent(share)} of the times were disturbed by other processes or throttling"
    reasons = (*judged.reasons, f"machine busy: {fact}")
    if share > DISTURBED_MOST:
        return Judgement(DO_NOT_USE, (f"Do not use {profile}: {fact}; {IDLE}.",), reasons)
    return Judgement(PARTLY, (*judged.sentences, f"Use it with care: {fact}; {IDLE}."), reasons)


def _ends(errors: Mapping[str, float]) -> str:
    """Return the smallest and the largest error with their names."""
    names = sorted(errors, key=lambda name: errors[name])
    ends = dict.fromkeys((names[0], names[-1]))
    return " to ".join(f"{percent(errors[name])} ({name})" for name in ends)


def of_fit(fit: ProfileFit, report: Report, output: str, disturbed: float = 0.0) -> Judgement:
    """Judge a fit by the errors of its sections on held-out shapes; ``report`` has those of
    datasheet rooflines."""
    many = f"{len(fit.parts)} section{'s' if len(fit.parts) > 1 else ''}"
    rows = sum(part.rows for part in fit.parts)
    about = f"{many} of {fit.profile.name} fitted on {rows:,} rows"
    known = {
        f"{p.operator} {p.dtype}": p.section.accuracy["mape"]
        for p in fit.parts
        if "mape" in p.section.accuracy
    }
    if not known:
        text = f"Do not rely on {output} yet: {about}, too few for held-out shapes; fit more rows."
        return Judgement(DO_NOT_USE, (text,), ("no held-out shapes",))
    fact = f"{about}; mean error on held-out shapes {_ends(known)}"
    roofline = {v.name: v.roofline_mean for v in verdicts(report)}
    worse = [name for name, error in known.items() if error >= roofline.get(name, math.inf)]
    judged = _judged(output, fact, worse, "fit more rows", useless=len(worse) == len(known))
    return with_disturbed(judged, output, disturbed)
