"""Local update: adapt a whole profile to this machine and software with measured times of any
operators.

The method is the posterior of the error model (:mod:`simulator.uncertainty.factors`): the profile
keeps its constants and stores the log errors of the rows with their loadings. A local update
replaces an earlier one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import yaml

from calibration.devices.protocol import HOST_KINDS
from calibration.fit.base_profile import shipped_name
from calibration.fit.predict import SECTIONS, parts_of, predict, without_gpu
from calibration.fit.profile import provenance_of, usable_rows
from calibration.measure.plan import spread_order
from calibration.records.screening import one_method, too_fast, with_exact, without_exact
from calibration.records.timing_table import Records
from simulator.arrays import Array, BoolArray, FloatArray, IndexArray
from simulator.errors import InputError
from simulator.hardware.arrays import clipped
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import HardwareProfile, LocalUpdate
from simulator.operators.base import OTHER_STACK
from simulator.uncertainty.factors import (
    COVERAGE_FACTOR,
    ERROR_FACTORS,
    FACTOR_INDEX,
    MOST_LOG,
    Posterior,
    Uncertainty,
    posterior_of,
)

# rows that an update needs, that it should have, that it stores at most
LEAST_ROWS, FEW_ROWS, MOST_ROWS = 3, 20, 400
# largest factor between measured and predicted times, in the median, that a stack explains
MOST_FACTOR = 2.5
MOST_ROW_FACTOR = 100.0  # the same for a single row
# if a larger share of the rows is faster than physics allows, the update is rejected
MOST_TOO_FAST = 0.1
# standard deviations of an effect or error that is flagged; rows that notes name
MOST_SDS, MOST_NAMED = 4.0, 3
# an effect is reported if its mean or its standard deviation has changed by this share of the prior
# sd
REPORTED = 0.2


@dataclass(frozen=True)
class Effect:
    name: str
    prior_sd: float
    mean: float
    sd: float
    meaning: str

    @property
    def prior_sds(self) -> float:
        return abs(self.mean) / self.prior_sd


@dataclass(frozen=True)
class UpdateErrors:
    """Errors of the rows of one operator before the update, and after it with each row predicted
    from the others."""

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
    profile: HardwareProfile
    rows: int
    effects: tuple[Effect, ...]
    fits: tuple[UpdateErrors, ...]  # by operator and number format, then all
    notes: tuple[str, ...]


def update_profile(hw: HardwareProfile, records: Records, *, dtype: str | None = None) -> Updated:
    """Adapt a profile to this machine and software with 20 to 400 measured rows of any operators
    (at least 3). Notes count the excluded rows by reason, and name rows whose time is far from the
    time that the other rows predict. InputError for too few rows, and for times that no difference
    between software stacks explains."""
    base = replace(hw, local_update=None, same_stack=False)
    records, methods = one_method(records)
    notes = list(methods)
    if hw.local_update is not None:
        notes.insert(0, "the profile's earlier local update is replaced")
    if dtype is not None:
        records = records.select(records.labels().astype(str) == dtype)
    rows, excluded = usable_rows(records, ("holdout", "drift_check"))
    if len(rows) < LEAST_ROWS:
        why = f"{len(rows)} ({'; '.join(excluded)})" if excluded else f"{len(rows)}"
        raise InputError(
            f"local update: expected at least {LEAST_ROWS} usable rows, repeats counted once, got"
            f" {why}"
        )
    _reject_other_device(hw, rows, notes)
    compared = _compared(base, rows, notes, excluded)
    notes += _advice(base, compared)
    # shapes that were measured earlier would contradict the update
    plain = without_exact(replace(hw, local_update=_update(compared), path=None))
    profile = with_exact(plain, records)
    posterior = posterior_of(profile)
    assert posterior is not None
    changes = effects(posterior)
    notes += _odd_rows(compared, posterior)
    odd = max(changes, key=lambda e: e.prior_sds, default=None)
    if odd is not None and odd.prior_sds > MOST_SDS:
        usual = f"{odd.prior_sds:.0f} times the usual difference between stacks"
        notes.append(f"{odd.meaning}: {usual}; check that the rows are from this GPU")
    fits = _fits(compared, posterior)
    return Updated(profile, len(compared.rows), changes, fits, (*notes, *excluded))


@dataclass(frozen=True, eq=False)
class _Compared:
    """Plausible rows next to their predictions."""

    rows: Records
    part: IndexArray  # number of each row's operator and number format
    names: list[str]  # names of the parts
    arrays: dict[str, Array]  # arrays of an update

    def select(self, rows: IndexArray) -> _Compared:
        arrays = {name: values[rows] for name, values in self.arrays.items()}
        return _Compared(self.rows.select(rows), self.part[rows], self.names, arrays)


def _advice(base: HardwareProfile, compared: _Compared) -> list[str]:
    kernels = [name for name in compared.names if _section(name)[0] != "runtime"]
    notes = []
    if uncalibrated := [
        name for name in kernels if base.section(*_section(name)).status == "default"
    ]:
        advice = "the update applies to the defaults; a fit would be more accurate"
        notes.append(f"{', '.join(uncalibrated)}: not calibrated; {advice}")
    shapes = [compared.arrays[name] for name in ("coordinates", "kind", "systematic")]
    if not kernels:
        advice = "predictions of kernels do not change; to measure kernels, calibrate --quick"
        notes.append(f"only rows of the host: {advice}")
    elif len(np.unique(np.column_stack(shapes), axis=0)) == 1:
        notes.append(
            "one shape: only the parts of its time change; measure other shapes for the rest"
        )
    elif len(compared.rows) < FEW_ROWS:
        advice = f"measure {FEW_ROWS} to {MOST_ROWS} of several operators"
        notes.append(f"only {len(compared.rows)} rows, so intervals stay wide; {advice}")
    return notes


def _update(compared: _Compared) -> LocalUpdate:
    systematic = compared.arrays["systematic"]
    used = np.flatnonzero(systematic.any(axis=0))
    arrays = {**compared.arrays, "systematic": systematic[:, used]}
    columns = tuple(name for name, i in FACTOR_INDEX.items() if i in used)
    return LocalUpdate(provenance_of(compared.rows), columns, clipped(MappingProxyType(arrays)))


def _fits(compared: _Compared, posterior: Posterior) -> tuple[UpdateErrors, ...]:
    arrays = compared.arrays
    before = np.sqrt(
        (arrays["systematic"] ** 2).sum(axis=1) + arrays["correlated"] ** 2 + arrays["independent"]
    )
    parts = {name: compared.part == i for i, name in enumerate(compared.names)}
    if len(parts) > 1:
        parts["all"] = compared.part >= 0
    return tuple(
        _fit(name, rows, arrays["log_ratio"], before, posterior) for name, rows in parts.items()
    )


def _section(part: str) -> tuple[str, str]:
    operator, label = part.split()
    return SECTIONS[operator], label.removesuffix("_wo")


def _reject_other_device(hw: HardwareProfile, records: Records, notes: list[str]) -> None:
    """Reject rows of another device; a GPU's profile accepts rows of a CPU that time the host."""
    away = without_gpu(records, hw)
    if away.any():
        cpu = records.sources[int(records.source[away][0])].device
        if not records.select(away).is_operator(*HOST_KINDS).all():
            taken = "from a CPU, only rows that time launches apply to a GPU's host"
            raise InputError(
                f"local update: rows were measured on {cpu}, but the profile is of {hw.title};"
                f" {taken}"
            )
        driver = "whose driver adds to each launch; intervals are wider; measure with the GPU"
        notes.append(f"the host {cpu} was timed without a GPU, {driver}")
    for device in (source.device for source in records.tidy().sources):
        if name := shipped_name(device):
            other = load_hardware(name)
            if (other.sm_count, other.bandwidth_bytes_per_s) != (
                hw.sm_count,
                hw.bandwidth_bytes_per_s,
            ):
                right = f"use --hardware {name}, or rows from this GPU"
                what = f"rows were measured on {device}, but the profile is of {hw.title}"
                raise InputError(f"local update: {what}; {right}")


def _compared(
    base: HardwareProfile, rows: Records, notes: list[str], left_out: list[str]
) -> _Compared:
    """Return the plausible rows that are predicted, at most :data:`MOST_ROWS`."""
    parts = _predicted(base, rows, left_out)
    fast = np.logical_or(*too_fast(rows, base))
    if fast.mean() > MOST_TOO_FAST:
        share = f"{int(fast.sum())} of {len(fast)} rows are faster than {base.title} can be"
        raise InputError(
            f"local update: {share}; check that they are from this GPU and in the right unit"
        )
    if fast.any():
        notes.append(f"{int(fast.sum())} rows excluded: faster than {base.title} can be")
    kept = np.flatnonzero(~np.concatenate([fast[:0], *(fast[part.rows] for part in parts)]))
    if len(kept) < LEAST_ROWS:
        why = f"{len(kept)}: {'; '.join(left_out + notes)}"
        raise InputError(f"local update: expected at least {LEAST_ROWS} usable rows, got {why}")
    compared = _joined(rows, parts).select(kept)
    if len(compared.rows) > MOST_ROWS:
        notes.append(
            f"of {len(compared.rows)} rows the {MOST_ROWS} that lie farthest apart are kept"
        )
        size = np.log2(compared.rows.seconds)
        places = np.column_stack([compared.arrays["coordinates"], size, 16.0 * compared.part])
        compared = compared.select(np.sort(spread_order(places, MOST_ROWS)))
    return compared


@dataclass(frozen=True, eq=False)
class _Part:
    name: str  # operator and number format
    rows: IndexArray
    log_ratio: FloatArray
    error: Uncertainty


def _predicted(base: HardwareProfile, rows: Records, left_out: list[str]) -> list[_Part]:
    skipped, parts = dict[str, int](), list[_Part]()
    for operator, label, numbers in parts_of(rows, base, skipped):
        of_part = rows.select(numbers)
        prediction = predict(of_part, base)
        if prediction.uncertainty is None:
            left_out.append(
                f"{len(numbers)} rows excluded: {operator} is not a single operator of the model"
            )
            continue
        name, log_ratio = f"{operator} {label}", np.log(of_part.seconds / prediction.time.seconds)
        most = MOST_LOG if SECTIONS[operator] == "runtime" else math.log(MOST_FACTOR)
        _reject_factor(name, log_ratio, most, of_part)
        parts.append(_Part(name, numbers, log_ratio, prediction.uncertainty))
    left_out += [f"{count} rows excluded: {reason}" for reason, count in skipped.items()]
    return parts


def _joined(rows: Records, parts: list[_Part]) -> _Compared:
    error, sizes = Uncertainty.joined([p.error for p in parts]), [len(p.rows) for p in parts]
    arrays = {
        "systematic": error.wide(),
        "correlated": error.correlated,
        "independent": error.independent,
        "coordinates": error.coordinates,
        "kind": np.repeat([p.error.kind for p in parts], sizes),
        "log_ratio": np.concatenate([p.log_ratio for p in parts]),
    }
    numbers = np.repeat(np.arange(len(parts)), sizes)
    ordered = rows.select(np.concatenate([p.rows for p in parts]))
    return _Compared(ordered, numbers, [p.name for p in parts], arrays)


def _odd_rows(compared: _Compared, posterior: Posterior) -> list[str]:
    rest, sd = posterior.left_out
    log_ratio = compared.arrays["log_ratio"]
    rest = rest + log_ratio - np.clip(log_ratio, -MOST_LOG, MOST_LOG)  # the posterior clips them
    far = np.flatnonzero((np.abs(rest) > math.log(MOST_FACTOR)) & (np.abs(rest) > MOST_SDS * sd))
    far = far[np.argsort(-np.abs(rest[far]), kind="stable")]
    advice = "the row counts less; measure it again, or remove it"
    notes = [
        f"{compared.rows.place(i)}: the time is {math.exp(rest[i]):.3g} times that predicted from"
        f" the other rows; {advice}"
        for i in far[:MOST_NAMED].tolist()
    ]
    return notes + [f"{len(far) - MOST_NAMED} more rows have such times"] * (len(far) > MOST_NAMED)


def _reject_factor(what: str, log_ratio: FloatArray, most: float, rows: Records) -> None:
    median, worst = float(np.median(log_ratio)), int(np.abs(log_ratio).argmax())
    place = rows.place(worst)
    if abs(median) <= most:
        if log_ratio[worst] > math.log(MOST_ROW_FACTOR):  # rows that are too fast are excluded
            fact = f"the time is {math.exp(log_ratio[worst]):.3g} times the predicted one"
            raise InputError(f"local update: {place}: {fact}; measure it again, or remove the row")
        return
    thousands = round(median / math.log(1000.0))
    unit = thousands and abs(median - thousands * math.log(1000.0)) <= math.log(MOST_FACTOR)
    hint = (
        "check that they are from this GPU and not launched one by one; a fit without --anchor"
        " accepts any"
    )
    if unit:
        hint = (
            f"check the unit: they look {1000 ** abs(thousands)} times too"
            f" {'large' if median > 0 else 'small'}"
        )
    fact = (
        f"{what}: measured times are {math.exp(median):.3g} times the predicted ones in the median,"
        f" as in {place}"
    )
    raise InputError(f"local update: {fact}; {hint}")


def _fit(
    name: str,
    rows: BoolArray,
    log_ratio: FloatArray,
    before: FloatArray,
    posterior: Posterior,
) -> UpdateErrors:
    y, half_before = log_ratio[rows], COVERAGE_FACTOR * before[rows]
    rest, after = posterior.left_out[:, rows]
    half_after = after * posterior.coverage_factors[posterior.kind[rows]]
    return UpdateErrors(
        name=name,
        rows=int(rows.sum()),
        error_before=float(np.abs(np.expm1(-y)).mean()),
        error_after=float(np.abs(np.expm1(-rest)).mean()),
        half_before=math.expm1(np.median(half_before)),
        half_after=math.expm1(np.median(half_after)),
        inside_before=float((np.abs(y) <= half_before).mean()),
        inside_after=float((np.abs(rest) <= half_after).mean()),
        z=float(np.sqrt(np.mean((rest / after) ** 2))),
    )


def effects(posterior: Posterior) -> tuple[Effect, ...]:
    """Return the error factors that a posterior shifts or narrows. Rows of one operator identify
    only the sum of its factor and the machine's factor: the operator is reported with this sum."""
    names = [name for name in ERROR_FACTORS if name != "machine"]
    nothing = np.zeros(len(names))
    weights = np.array([_weights(name) for name in names])
    every = Uncertainty(
        tuple(ERROR_FACTORS), weights.T, nothing, nothing, np.zeros((len(names), 3)), kind=-1
    )
    mean, variance = posterior.at(every)
    prior, sd = np.sqrt(every.variance), np.sqrt(variance)
    reported = (np.abs(mean) > REPORTED * prior) | (sd < (1.0 - REPORTED) * prior)
    rows = zip(names, prior.tolist(), mean.tolist(), sd.tolist(), reported, strict=True)
    return tuple(Effect(name, p, m, s, meaning(name, m, s)) for name, p, m, s, kept in rows if kept)


def _weights(name: str) -> FloatArray:
    """Return the weight of each error factor in the effect of one."""
    weights = np.zeros(len(ERROR_FACTORS))
    for part in (name, f"machine {name.split()[-1]}"):
        if part in ERROR_FACTORS:
            weights[FACTOR_INDEX[part]] = ERROR_FACTORS[part] * (
                1.0 if part == "host" else OTHER_STACK
            )
    return weights


_SENTENCES: Mapping[str, Any] = yaml.safe_load(
    Path(__file__).with_suffix(".yaml").read_text("utf-8")
)


def meaning(name: str, mean: float, sd: float) -> str:
    operator, _, cause = name.partition(" ")
    first, *size = (cause or name).split()
    words, operators = _SENTENCES["words"], _SENTENCES["operators"]
    text, longer, shorter = words.get(name) or words.get(first, words["other"])
    share = -math.expm1(-mean) if name == "machine compute" else math.expm1(mean)
    if abs(share) < 0.005 or abs(mean) < 0.25 * sd:
        how = "as fitted"
        text = text.replace(" than the defaults", "")
    else:
        how = f"{100 * abs(share):.0f} % {longer if share > 0 else shorter}"
    named = {"operator": operators.get(operator, operator), "cause": " ".join(size) or cause}
    return str(text).format(how, **named)


def as_row(done: Updated) -> dict[str, Any]:
    return {
        "rows": done.rows,
        "effects": [vars(effect) for effect in done.effects],
        "operators": [vars(fit) for fit in done.fits],
        "notes": list(done.notes),
    }
