"""Local update: adapt a whole profile to this machine and software with measured times of any operators.

Use :func:`update_profile`. The method is the posterior of the error model
(:class:`simulator.uncertainty.posterior.Posterior`): the profile keeps its constants and stores the log errors of the
rows with their loadings. A local update replaces an earlier one, whose rows may be of another driver.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.devices.protocol import HOST_KINDS
from calibration.fit.device_names import shipped_name
from calibration.fit.predict import SECTIONS, UNTIMED, parts_of, predict, without_gpu
from calibration.fit.profile import provenance_of
from calibration.measure.shapes import spread_order
from calibration.records.exact_shapes import with_exact, without_exact
from calibration.records.screening import one_method, too_fast
from calibration.records.timing_table import PURPOSES, Flag, Records
from simulator.arrays import FloatArray
from simulator.errors import InputError
from simulator.hardware.arrays import clipped
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import HardwareProfile
from simulator.hardware.sections import LocalUpdate
from simulator.operators.base import OTHER_STACK
from simulator.uncertainty.factors import COVERAGE_FACTOR, ERROR_FACTORS, FACTOR_INDEX, Uncertainty
from simulator.uncertainty.posterior import MOST_LOG, Posterior, posterior_of

LEAST_ROWS, FEW_ROWS, MOST_ROWS = 3, 20, 400
"""Rows that a local update needs, rows that it should have, rows that it stores at most."""

MOST_FACTOR, MOST_ROW_FACTOR, MOST_TOO_FAST, MOST_SDS, MOST_NAMED = 2.5, 100.0, 0.1, 4.0, 3
"""Median factor between measured and predicted times, also of a row against the others, that no stack explains; factor
of a single row that no measurement explains; share of rows faster than physics allows above which all are rejected;
effect or error, in standard deviations, that is flagged; most rows that notes name."""

REPORTED = 0.2
"""An effect is reported if its mean or its standard deviation has changed by this share of the prior sd."""


@dataclass(frozen=True)
class Effect:
    """The effect of the rows on one error factor, the sum of an operator's and the machine's factor; log units."""

    name: str
    prior_sd: float
    mean: float
    sd: float
    meaning: str


@dataclass(frozen=True)
class UpdateErrors:
    """Errors of the rows of one operator: before the update, and after it, each row predicted from the others."""

    name: str
    rows: int
    error_before: float  # mean absolute error, relative
    error_after: float
    half_before: float  # median half-width of the 90 % interval, relative
    half_after: float
    inside_before: float  # coverage of the interval
    inside_after: float
    z: float  # root mean square of error over expected deviation, after


@dataclass(frozen=True)
class Updated:
    """A profile with a local update, the effects of its rows, and notes."""

    profile: HardwareProfile
    rows: int
    effects: tuple[Effect, ...]
    fits: tuple[UpdateErrors, ...]  # by operator and number format, then all
    notes: tuple[str, ...]


def update_profile(hw: HardwareProfile, records: Records, *, dtype: str | None = None, date: str = "") -> Updated:
    """Adapt a profile to this machine and software with 20 to 400 measured rows of any operators (at least 3).

    Rows without a valid time, throttled, held-out or drift-check rows, and operators that the profile does not predict
    are excluded and counted. Of more than 400 rows, the farthest apart in size, time and operator are kept. ``dtype``
    selects one number format, ``date`` (ISO 8601) is the date of the provenance.

    Notes name rows that take 2.5 times the time predicted from the other rows, or more.

    InputError, one line: fewer than 3 usable rows; rows of another GPU; a tenth of them faster than physics allows; an
    operator whose times differ by a factor of 2.5 or more in the median; a row that takes 100 times the predicted time.
    """
    base = replace(hw, local_update=None, same_stack=False)
    notes = ["the profile's earlier local update is replaced"] if hw.local_update is not None else []
    records, methods = one_method(records)
    notes += methods
    excluded: list[str] = []
    rows = _usable(records if dtype is None else records.select(records.labels().astype(str) == dtype), excluded)
    _reject_other_device(hw, rows, notes)
    compared = _compared(base, rows, notes, excluded)
    rows, of_part, names, log_ratio = compared.rows, compared.part, compared.names, compared.log_ratio
    unique = len(np.unique(np.column_stack([compared.coordinates, compared.kind, compared.systematic]), axis=0))
    kernels = [name for name in names if _section(name)[0] != "runtime"]
    uncalibrated = [name for name in kernels if base.section(*_section(name)).status == "default"]
    if uncalibrated:
        advice = "the update applies to the defaults; a fit would be more accurate"
        notes.append(f"{', '.join(uncalibrated)}: not calibrated; {advice}")
    if not kernels:
        notes.append(
            "only rows of the host: predictions of kernels do not change; to measure kernels, calibrate --quick"
        )
    elif unique == 1:
        notes.append("one shape: only the parts of its time change; measure other shapes for the rest")
    elif len(rows) < FEW_ROWS:
        notes.append(
            f"only {len(rows)} rows, so intervals stay wide; measure {FEW_ROWS} to {MOST_ROWS} of several operators"
        )
    used = np.flatnonzero(compared.systematic.any(axis=0))
    arrays = {
        "systematic": compared.systematic[:, used],
        "correlated": compared.correlated,
        "independent": compared.independent,
        "coordinates": compared.coordinates,
        "kind": compared.kind,
        "log_ratio": log_ratio,
    }
    columns = tuple(name for name, i in FACTOR_INDEX.items() if i in used)
    update = LocalUpdate(provenance_of(rows, date), columns, clipped(MappingProxyType(arrays)))
    # earlier measured shapes would contradict the update
    profile = with_exact(without_exact(replace(hw, local_update=update, path=None)), records)
    posterior = posterior_of(profile)
    assert posterior is not None
    before = np.sqrt((compared.systematic**2).sum(axis=1) + compared.correlated**2 + compared.independent)
    fits = [_fit(name, of_part == i, log_ratio, before, posterior) for i, name in enumerate(names)]
    fits += [_fit("all", of_part >= 0, log_ratio, before, posterior)] if len(names) > 1 else []
    changes = effects(posterior)
    notes += _odd_rows(rows, log_ratio, posterior)
    odd = max(changes, key=lambda e: abs(e.mean) / e.prior_sd, default=None)
    if odd is not None and (times := abs(odd.mean) / odd.prior_sd) > MOST_SDS:
        notes.append(
            f"{odd.meaning}: {times:.0f} times the usual difference between stacks; check that the rows are from this "
            f"GPU"
        )
    return Updated(profile, len(rows), changes, tuple(fits), (*notes, *excluded))


def _section(part: str) -> tuple[str, str]:
    """Return the section that predicts a part, by its name."""
    operator, label = part.split()
    return SECTIONS[operator], label.removesuffix("_wo")


def _usable(records: Records, left_out: list[str]) -> Records:
    """Return the rows for the update; excluded rows are counted in ``left_out``."""
    apart = np.isin(records.purpose, [PURPOSES.index(name) for name in ("holdout", "drift_check")])
    throttled = (records.flags & int(Flag.THROTTLED)) != 0
    for excluded, reason in (
        (~records.timed, UNTIMED),
        (throttled, "measured under throttling"),
        (apart, "held out, or drift checks"),
    ):
        if count := int(excluded.sum()):
            left_out.append(f"{count} rows excluded: {reason}")
    kept = records.select(records.timed & ~throttled & ~apart)
    if len(kept) < LEAST_ROWS:
        reasons = f" ({'; '.join(left_out)})" if left_out else ""
        raise InputError(
            f"local update: expected at least {LEAST_ROWS} usable rows, repeats counted once, got {len(kept)}{reasons}"
        )
    return kept


def _reject_other_device(hw: HardwareProfile, records: Records, notes: list[str]) -> None:
    """Reject rows of another device; a GPU's profile accepts rows of a CPU that time the host."""
    away = without_gpu(records, hw)
    if away.any():
        cpu = records.sources[int(records.source[away][0])].device
        if not records.select(away).is_operator(*HOST_KINDS).all():
            taken = "from a CPU, only rows that time launches apply to a GPU's host"
            raise InputError(f"local update: rows were measured on {cpu}, but the profile is of {hw.title}; {taken}")
        notes.append(
            f"the host {cpu} was timed without a GPU, whose driver adds to each launch; intervals are wider; measure "
            "with the GPU"
        )
    for source in records.tidy().sources:
        if name := shipped_name(source.device):
            other = load_hardware(name)
            if (other.sm_count, other.bandwidth_bytes_per_s) != (hw.sm_count, hw.bandwidth_bytes_per_s):
                right = f"use --hardware {name}, or rows from this GPU"
                raise InputError(
                    f"local update: rows were measured on {source.device}, but the profile is of {hw.title}; {right}"
                )


@dataclass(frozen=True)
class _Compared:
    """Measured rows next to their prediction."""

    rows: Records
    part: NDArray[np.intp]  # of each row, index into ``names``
    names: list[str]
    log_ratio: FloatArray  # log(measured / predicted)
    systematic: FloatArray  # (n, c) of all error factors
    correlated: FloatArray
    independent: FloatArray
    coordinates: FloatArray  # (n, 3)
    kind: NDArray[np.intp]


def _compared(base: HardwareProfile, rows: Records, notes: list[str], left_out: list[str]) -> _Compared:
    """Predict the rows, and exclude those that are not predicted or faster than the device can be."""
    skipped: dict[str, int] = {}
    names: list[str] = []
    index, parts = list[NDArray[np.intp]](), list[NDArray[np.intp]]()
    found: list[tuple[FloatArray, Uncertainty]] = []
    fast = np.logical_or(*too_fast(rows, base))
    for operator, label, at in parts_of(rows, base, skipped):
        own = rows.select(at)
        found_part = predict(own, base)
        if found_part.uncertainty is None:
            left_out.append(f"{len(at)} rows excluded: {operator} is not a single operator of the model")
            continue
        ratio = np.log(own.seconds / found_part.time.seconds)
        most = MOST_LOG if SECTIONS[operator] == "runtime" else math.log(MOST_FACTOR)
        _reject_factor(f"{operator} {label}", ratio, most, own)
        error = found_part.uncertainty
        found.append((ratio, error))
        parts.append(np.full(len(at), len(names)))
        index.append(at)
        names.append(f"{operator} {label}")
    left_out += [f"{count} rows excluded: {reason}" for reason, count in skipped.items()]
    if fast.mean() > MOST_TOO_FAST:
        share = f"{int(fast.sum())} of {len(fast)} rows are faster than {base.title} can be"
        raise InputError(f"local update: {share}; check that they are from this GPU and in the right unit")
    if fast.any():
        notes.append(f"{int(fast.sum())} rows excluded: faster than {base.title} can be")
    order = np.concatenate(index) if index else np.zeros(0, dtype=np.intp)
    kept = np.flatnonzero(~fast[order])
    if len(kept) < LEAST_ROWS:
        raise InputError(
            f"local update: expected at least {LEAST_ROWS} usable rows, got {len(kept)}: {'; '.join(left_out + notes)}"
        )
    part, log_ratio = np.concatenate(parts), np.concatenate([ratio for ratio, _ in found])
    coordinates = np.concatenate([error.coordinates for _, error in found]).astype(np.float64)
    if len(kept) > MOST_ROWS:
        notes.append(f"of {len(kept)} rows the {MOST_ROWS} that lie farthest apart are kept")
        sizes = coordinates, np.log2(rows.seconds[order]), 16.0 * part
        kept = np.sort(kept[spread_order(np.column_stack(sizes)[kept], MOST_ROWS)])
    return _Compared(
        rows=rows.select(order[kept]),
        part=part[kept],
        names=names,
        log_ratio=log_ratio[kept],
        systematic=np.concatenate([error.wide() for _, error in found])[kept],
        correlated=np.concatenate([error.correlated for _, error in found]).astype(np.float64)[kept],
        independent=np.concatenate([error.independent for _, error in found]).astype(np.float64)[kept],
        coordinates=coordinates[kept],
        kind=np.concatenate([np.full(len(ratio), error.kind) for ratio, error in found])[kept],
    )


def _odd_rows(rows: Records, log_ratio: FloatArray, posterior: Posterior) -> list[str]:
    """Return notes on the rows whose times are far from those that the other rows predict, the farthest first."""
    rest, sd = posterior.left_out
    rest = rest + log_ratio - np.clip(log_ratio, -MOST_LOG, MOST_LOG)  # the posterior clips them
    far = np.flatnonzero((np.abs(rest) > math.log(MOST_FACTOR)) & (np.abs(rest) > MOST_SDS * sd))
    far = far[np.argsort(-np.abs(rest[far]), kind="stable")]
    advice = "the row counts less; measure it again, or remove it"
    notes = [
        f"{rows.place(i)}: the time is {math.exp(rest[i]):.3g} times that predicted from the other rows; {advice}"
        for i in far[:MOST_NAMED].tolist()
    ]
    return notes + [f"{len(far) - MOST_NAMED} more rows have such times"] * (len(far) > MOST_NAMED)


def _reject_factor(what: str, log_ratio: FloatArray, most: float, rows: Records) -> None:
    """Reject times that no difference between stacks explains: in the median of an operator, or a single one."""
    median, worst = float(np.median(log_ratio)), int(np.abs(log_ratio).argmax())
    place = rows.place(worst)
    if abs(median) <= most:
        if log_ratio[worst] > math.log(MOST_ROW_FACTOR):  # rows that are too fast are excluded
            fact = f"the time is {math.exp(log_ratio[worst]):.3g} times the predicted one"
            raise InputError(f"local update: {place}: {fact}; measure it again, or remove the row")
        return
    thousands = round(median / math.log(1000.0))
    unit = thousands and abs(median - thousands * math.log(1000.0)) <= math.log(MOST_FACTOR)
    hint = "check that they are from this GPU and not launched one by one; a fit without --anchor accepts any"
    if unit:
        hint = f"check the unit: they look {1000 ** abs(thousands)} times too {'large' if median > 0 else 'small'}"
    fact = f"{what}: measured times are {math.exp(median):.3g} times the predicted ones in the median, as in {place}"
    raise InputError(f"local update: {fact}; {hint}")


def _fit(
    name: str, at: NDArray[np.bool_], log_ratio: FloatArray, before: FloatArray, posterior: Posterior
) -> UpdateErrors:
    """Return the errors of the rows ``at`` before and after the update."""
    y, sd = log_ratio[at], before[at]
    rest, after = posterior.left_out[:, at]
    half_after = after * posterior.coverage_factors[posterior.kind[at]]
    half = float(np.median(sd)) * COVERAGE_FACTOR, float(np.median(half_after))
    inside = np.abs(y) <= COVERAGE_FACTOR * sd, np.abs(rest) <= half_after
    return UpdateErrors(
        name=name,
        rows=int(at.sum()),
        error_before=float(np.abs(np.expm1(-y)).mean()),
        error_after=float(np.abs(np.expm1(-rest)).mean()),
        half_before=math.expm1(half[0]),
        half_after=math.expm1(half[1]),
        inside_before=float(inside[0].mean()),
        inside_after=float(inside[1].mean()),
        z=float(np.sqrt(np.mean((rest / after) ** 2))),
    )


def effects(posterior: Posterior) -> tuple[Effect, ...]:
    """Return the error factors that a posterior shifts or narrows.

    Rows of one operator identify only the sum of the operator's and the machine's factor, which is reported for the
    operator.
    """
    names = [name for name in ERROR_FACTORS if name != "machine"]
    weight = np.zeros((len(names), len(ERROR_FACTORS)))
    for row, name in zip(weight, names, strict=True):
        for part in (name, f"machine {name.split()[-1]}"):
            if part in ERROR_FACTORS:
                row[FACTOR_INDEX[part]] = ERROR_FACTORS[part] * (1.0 if part == "host" else OTHER_STACK)
    nothing = np.zeros(len(names))
    every = Uncertainty(tuple(ERROR_FACTORS), weight.T, nothing, nothing, np.zeros((len(names), 3)), kind=-1)
    mean, variance = posterior.at(every)
    prior, sd = np.sqrt(every.variance), np.sqrt(variance)
    reported = (np.abs(mean) > REPORTED * prior) | (sd < (1.0 - REPORTED) * prior)
    rows = zip(names, prior.tolist(), mean.tolist(), sd.tolist(), reported.tolist(), strict=True)
    return tuple(Effect(name, p, m, s, meaning(name, p, m, s)) for name, p, m, s, kept in rows if kept)


# error factor, or the end of its name -> sentence, and the words for a longer and a shorter time
_WORDS: dict[str, tuple[str, str, str]] = {
    "machine launch": ("launches take {}", "longer", "shorter"),
    "machine compute": ("this machine's clocks are {}", "lower", "higher"),
    "machine memory": ("memory is {}", "slower", "faster"),
    "host": ("the host launches {}", "slower", "faster"),
    "launch": ("{operator} launches take {}", "longer", "shorter"),
    "compute": ("{operator} arithmetic is {}", "slower", "faster"),
    "memory": ("{operator} reads memory {}", "slower", "faster"),
    "l2": ("{operator} reads L2 {}", "slower", "faster"),
    "link": ("{operator} uses the link {}", "slower", "faster"),
    "latency": ("{operator} waiting steps take {}", "longer", "shorter"),
    "feed": ("{operator} steps fed by L2 take {}", "longer", "shorter"),
    "idle": ("idle SMs of {cause} waves cost {}", "more", "less"),
    "default": ("{operator} is {} than the defaults", "slower", "faster"),
}
_OPERATORS = {
    "gemm": "GEMM",
    "prefill": "prefill attention",
    "decode": "decode attention",
    "mla_decode": "latent decode",
}


def meaning(name: str, prior_sd: float, mean: float, sd: float) -> str:
    """Return a sentence that describes an effect."""
    operator, _, cause = name.partition(" ")
    first, *size = (cause or name).split()
    text, longer, shorter = _WORDS.get(name) or _WORDS.get(first, ("{operator}: {cause} costs {}", "more", "less"))
    share = -math.expm1(-mean) if name == "machine compute" else math.expm1(mean)
    if abs(share) < 0.005 or abs(mean) < 0.25 * sd:
        how = "as fitted"
        text = text.replace(" than the defaults", "")
    else:
        how = f"{100 * abs(share):.0f} % {longer if share > 0 else shorter}"
    return text.format(how, operator=_OPERATORS.get(operator, operator), cause=" ".join(size) or cause)


def as_row(done: Updated) -> dict[str, Any]:
    """Return the result as plain data."""
    return {
        "rows": done.rows,
        "effects": [vars(effect) for effect in done.effects],
        "operators": [vars(fit) for fit in done.fits],
        "notes": list(done.notes),
    }
