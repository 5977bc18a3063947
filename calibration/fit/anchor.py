"""Local times of any operators to a profile that they move as a whole, and what they say of this machine.

Use :func:`anchor_profile`. The mechanism is the posterior of the error model
(``simulator.uncertainty.error_model.Posterior``): the profile keeps its constants, and beside them the log errors of
the rows and what those errors depend on. An anchor replaces the one a profile had, whose rows may be of another driver.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.devices.protocol import HOST_KINDS
from calibration.fit.base_profile import shipped_name
from calibration.fit.predict import SECTIONS, UNTIMED, parts_of, predict, without_gpu
from calibration.fit.profile import provenance_of
from calibration.measure.shapes import spread_order
from calibration.records.exact_shapes import with_exact, without_exact
from calibration.records.screening import too_fast
from calibration.records.timing_table import PURPOSES, Flag, Records
from simulator.arrays import FloatArray
from simulator.errors import InputError
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import OTHER_STACK, Anchor, HardwareProfile
from simulator.uncertainty.error_model import (
    COVERAGE_FACTOR,
    ERROR_FACTORS,
    FACTOR_INDEX,
    MOST_LOG,
    Posterior,
    Uncertainty,
    posterior_of,
)

LEAST_ROWS, FEW_ROWS, MOST_ROWS = 3, 20, 400
"""Rows an anchor needs, rows below which it says little, rows it keeps at most."""

MOST_FACTOR, MOST_TOO_FAST, MOST_SPREADS = 2.5, 0.1, 4.0
"""Median factor between measured and predicted times that no stack explains; share of rows faster than physics allows
above which none is believed; effect, in prior deviations, that is flagged."""

TOLD = 0.2
"""An effect is told where its mean has moved by this share of its prior deviation, or that has shrunk by it."""


@dataclass(frozen=True)
class Effect:
    """What the rows say of one column of the error model, an operator's together with the machine's; log units."""

    name: str
    prior_sd: float
    mean: float
    sd: float
    meaning: str


@dataclass(frozen=True)
class Fit:
    """How well the rows of one operator are predicted: as the profile was, and, each from the others, anchored."""

    name: str
    rows: int
    error_before: float  # mean absolute error, relative
    error_after: float
    half_before: float  # median half-width of the 90 % interval, relative
    half_after: float
    inside_before: float  # share of the rows in it
    inside_after: float
    z: float  # root mean square of error over expected deviation, after


@dataclass(frozen=True)
class Anchored:
    """An anchored profile, what its rows say, and what else is worth knowing."""

    profile: HardwareProfile
    rows: int
    effects: tuple[Effect, ...]
    fits: tuple[Fit, ...]  # by operator and number format, then all
    notes: tuple[str, ...]


def anchor_profile(hw: HardwareProfile, records: Records, *, dtype: str | None = None, date: str = "") -> Anchored:
    """Move a profile to this machine and software by 20 to 400 measured rows of any operators (3 at least).

    Rows without a time that can be one, throttled, held out or repeated for drift, and operators that the profile does
    not predict, are left out and counted. Of more than 400 rows those are kept that lie farthest apart in size, time
    and operator. ``dtype`` keeps one number format, ``date`` (ISO 8601) is that of the provenance.

    InputError, one line: fewer than 3 usable rows; rows of another GPU; a tenth of them faster than physics allows; an
    operator whose times differ by a factor of 2.5 or more in the median.
    """
    base = replace(hw, anchor=None, same_stack=False)
    notes = ["the profile's earlier anchor is replaced"] if hw.anchor is not None else []
    rows = _usable(records if dtype is None else records.select(records.labels().astype(str) == dtype), notes)
    _refuse_other_device(hw, rows, notes)
    rows, of_part, names, log_ratio, uncertainties = _compared(base, rows, notes)
    unique = len(
        np.unique(np.column_stack([uncertainties["place"], uncertainties["kind"], uncertainties["shared"]]), axis=0)
    )
    kernels = [name for name in names if _section(name)[0] != "runtime"]
    uncalibrated = [name for name in kernels if base.section(*_section(name)).status == "default"]
    if uncalibrated:
        notes.append(f"{', '.join(uncalibrated)}: not calibrated, the defaults are moved; a fit of its own says more")
    if not kernels:
        notes.append("rows of the host alone: kernels are predicted as before")
    elif unique == 1:
        notes.append("one shape: only what its time stands on moves; measure others for the rest")
    elif len(rows) < FEW_ROWS:
        notes.append(f"{len(rows)} rows are few: {FEW_ROWS} to {MOST_ROWS} of several operators say more")
    arrays = {name: np.asarray(values) for name, values in uncertainties.items()} | {"log_ratio": log_ratio}
    used = np.flatnonzero(arrays["shared"].any(axis=0))
    columns = tuple(name for name, i in FACTOR_INDEX.items() if i in used)
    arrays["shared"] = arrays["shared"][:, used]
    anchor = Anchor(provenance_of(rows, date), columns, MappingProxyType(arrays))
    # exact shapes it had would stand beside what moves: they are of before
    profile = with_exact(without_exact(replace(hw, anchor=anchor, path=None)), records)
    posterior = posterior_of(profile)
    assert posterior is not None
    before = np.sqrt((uncertainties["shared"] ** 2).sum(axis=1) + uncertainties["local"] ** 2 + uncertainties["own"])
    fits = [_fit(name, of_part == i, log_ratio, before, posterior) for i, name in enumerate(names)]
    fits += [_fit("all", of_part >= 0, log_ratio, before, posterior)] if len(names) > 1 else []
    told = effects(posterior)
    odd = max(told, key=lambda e: abs(e.mean) / e.prior_sd, default=None)
    if odd is not None and (times := abs(odd.mean) / odd.prior_sd) > MOST_SPREADS:
        notes.append(f"{odd.meaning}: {times:.0f} times what stacks differ by; are the rows of this GPU?")
    return Anchored(profile, len(rows), told, tuple(fits), tuple(notes))


def _section(part: str) -> tuple[str, str]:
    """Section that predicts a part by its name."""
    operator, label = part.split()
    return SECTIONS[operator], label.removesuffix("_wo")


def _usable(records: Records, notes: list[str]) -> Records:
    """Rows to anchor to; what is left out is counted."""
    apart = np.isin(records.purpose, [PURPOSES.index(name) for name in ("holdout", "drift_check")])
    throttled = (records.flags & int(Flag.THROTTLED)) != 0
    for left_out, reason in (
        (~records.timed, UNTIMED),
        (throttled, "measured under throttling"),
        (apart, "kept to judge the result, or repeated to see drift"),
    ):
        if count := int(left_out.sum()):
            notes.append(f"{count} rows left out: {reason}")
    kept = records.select(records.timed & ~throttled & ~apart)
    if len(kept) < LEAST_ROWS:
        reasons = f" ({'; '.join(notes)})" if notes else ""
        raise InputError(
            f"anchor: expected at least {LEAST_ROWS} usable rows, repeats counted once, got {len(kept)}{reasons}"
        )
    return kept


def _refuse_other_device(hw: HardwareProfile, records: Records, notes: list[str]) -> None:
    """Refuse rows of another device; of a CPU, rows that time the host are taken for a GPU's profile."""
    away = without_gpu(records, hw)
    if away.any():
        cpu = records.sources[int(records.source[away][0])].device
        if not records.select(away).is_operator(*HOST_KINDS).all():
            taken = "of a CPU only rows that time its launches say anything of a GPU's host"
            raise InputError(f"anchor: rows were measured on {cpu}, the profile is of {hw.title}; {taken}")
        notes.append(f"the host is {cpu}, timed without a GPU, whose driver adds to each launch: the interval is wider")
    for source in records.tidy().sources:
        if name := shipped_name(source.device):
            other = load_hardware(name)
            if (other.sm_count, other.bandwidth_bytes_per_s) != (hw.sm_count, hw.bandwidth_bytes_per_s):
                right = f"take --hardware {name}, or rows of this GPU"
                raise InputError(
                    f"anchor: rows were measured on {source.device}, the profile is of {hw.title}; {right}"
                )


def _compared(
    base: HardwareProfile, rows: Records, notes: list[str]
) -> tuple[Records, NDArray[np.intp], list[str], FloatArray, dict[str, FloatArray]]:
    """Rows to keep, the part of each and the names of the parts, log(measured / predicted), and arrays of the doubt."""
    skipped: dict[str, int] = {}
    names: list[str] = []
    index, found = [], []
    fast = np.logical_or(*too_fast(rows, base))
    for operator, label, at in parts_of(rows, base, skipped):
        own = rows.select(at)
        time = predict(own, base).time
        if time.uncertainty is None:
            notes.append(f"{len(at)} rows left out: {operator} is no single operator of the model")
            continue
        ratio = np.log(own.seconds / time.seconds)
        most = MOST_LOG if SECTIONS[operator] == "runtime" else math.log(MOST_FACTOR)
        _refuse_factor(f"{operator} {label}", float(np.median(ratio)), most)
        codes = {"kind": time.uncertainty.kind, "part": len(names)}
        found.append(
            time.uncertainty.columns() | {"log_ratio": ratio} | {n: np.full(len(at), c) for n, c in codes.items()}
        )
        index.append(at)
        names.append(f"{operator} {label}")
    notes += [f"{count} rows left out: {reason}" for reason, count in skipped.items()]
    if fast.mean() > MOST_TOO_FAST:
        share = f"{int(fast.sum())} of {len(fast)} rows are faster than {base.title} can be"
        raise InputError(f"anchor: {share}: rows of another GPU, or a wrong unit?")
    if fast.any():
        notes.append(f"{int(fast.sum())} rows left out: faster than {base.title} can be")
    order = np.concatenate(index) if index else np.zeros(0, dtype=np.intp)
    kept = np.flatnonzero(~fast[order])
    if len(kept) < LEAST_ROWS:
        raise InputError(f"anchor: expected at least {LEAST_ROWS} usable rows, got {len(kept)}: {'; '.join(notes)}")
    columns = {name: np.concatenate([f[name] for f in found]) for name in found[0]}
    if len(kept) > MOST_ROWS:
        notes.append(f"of {len(kept)} rows the {MOST_ROWS} that lie farthest apart are kept")
        sizes = columns["place"], np.log2(rows.seconds[order]), 16.0 * columns["part"]
        kept = np.sort(kept[spread_order(np.column_stack(sizes)[kept], MOST_ROWS)])
    columns = {name: values[kept] for name, values in columns.items()}
    return rows.select(order[kept]), columns.pop("part"), names, columns.pop("log_ratio"), columns


def _refuse_factor(what: str, median: float, most: float) -> None:
    """Refuse times that no stack explains."""
    if abs(median) <= most:
        return
    thousands = round(median / math.log(1000.0))
    unit = thousands and abs(median - thousands * math.log(1000.0)) <= math.log(MOST_FACTOR)
    hint = f"unit? they look {1000 ** abs(thousands)} times too {'large' if median > 0 else 'small'}" if unit else ""
    said = f"{what}: measured times are {math.exp(median):.3g} times the predicted ones in the median"
    hint = hint or "rows of another GPU, or launched one by one? a fit without --anchor takes any"
    raise InputError(f"anchor: {said}; {hint}")


def _fit(name: str, at: NDArray[np.bool_], log_ratio: FloatArray, before: FloatArray, posterior: Posterior) -> Fit:
    y, sd = log_ratio[at], before[at]
    rest, after = posterior.left_out[:, at]
    half = float(np.median(sd)) * COVERAGE_FACTOR, float(np.median(after)) * posterior.coverage_factor
    inside = np.abs(y) <= COVERAGE_FACTOR * sd, np.abs(rest) <= posterior.coverage_factor * after
    return Fit(
        name,
        int(at.sum()),
        float(np.abs(np.expm1(-y)).mean()),
        float(np.abs(np.expm1(-rest)).mean()),
        math.expm1(half[0]),
        math.expm1(half[1]),
        float(inside[0].mean()),
        float(inside[1].mean()),
        float(np.sqrt(np.mean((rest / after) ** 2))),
    )


def effects(posterior: Posterior) -> tuple[Effect, ...]:
    """What a posterior says of each column that it moved or narrowed. Of an operator's own column and the machine's the
    rows of one operator tell the sum alone: that is what is said of the operator."""
    names = [name for name in ERROR_FACTORS if name != "machine"]
    weight = np.zeros((len(names), len(ERROR_FACTORS)))
    for row, name in zip(weight, names, strict=True):
        for part in (name, f"machine {name.split()[-1]}"):
            if part in ERROR_FACTORS:
                row[FACTOR_INDEX[part]] = ERROR_FACTORS[part] * (1.0 if part == "host" else OTHER_STACK)
    nothing = np.zeros(len(names))
    asked = Uncertainty(tuple(ERROR_FACTORS), weight.T, nothing, nothing, np.zeros((len(names), 3)), kind=-1)
    mean, variance = posterior.at(asked)
    prior, sd = np.sqrt(asked.variance), np.sqrt(variance)
    told = (np.abs(mean) > TOLD * prior) | (sd < (1.0 - TOLD) * prior)
    rows = zip(names, prior.tolist(), mean.tolist(), sd.tolist(), strict=True)
    return tuple(Effect(*row, meaning(*row)) for row, tell in zip(rows, told.tolist(), strict=True) if tell)


# of a column, or of the last word or two of its name: what differs, and how a longer and a shorter time are called
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
    "latency": ("{operator} steps that wait take {}", "longer", "shorter"),
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
    """An effect in words.

    >>> meaning("machine compute", 0.06, 0.083, 0.02), meaning("gemm memory", 0.03, -0.001, 0.004)
    ("this machine's clocks are 8 % lower", 'GEMM reads memory as fitted')
    """
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


def as_row(done: Anchored) -> dict[str, Any]:
    """The result as plain data."""
    return {
        "rows": done.rows,
        "effects": [vars(effect) for effect in done.effects],
        "operators": [vars(fit) for fit in done.fits],
        "notes": list(done.notes),
    }
