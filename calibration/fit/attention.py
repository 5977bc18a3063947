"""Calibration of attention: constants, residual lattice and intervals from measured times.

Use :func:`fit_attention` with plain columns and a :class:`Device`; it returns what a section of a profile holds. One call fits one phase of
one kernel path: constants belong to a stack (the same shape differs by 9-34 % between stacks), so tables of several must not be mixed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from calibration.fit.attention_columns import Columns, core_of, residual_coordinates, usable, work_of
from calibration.fit.attention_lattice import ROBUST, Smoothing, fit_lattice
from simulator.hardware.constants import DECODE_CONSTANTS, PREFILL_CONSTANTS
from simulator.hardware.parts import Fitted, Interval, Provenance, Section
from simulator.kernels.attention import REGIMES, regime_of
from simulator.kernels.attention_core import Device, decode_parts
from simulator.kernels.attention_residual import Lattice

F = NDArray[np.float64]

STRUCTURE: Mapping[str, tuple[str, ...]] = {
    "prefill": ("packs", "pads", "sparse_block"),
    "decode": ("rows", "units_per_sm", "split_keys", "long_keys"),
}
"""Constants that choose the form of the model rather than scale it: never fitted, taken from the registry."""

MINIMUM_ROWS = 20
FEW_ROWS = 100  # below these the lattice stays only if rows left out are predicted better with it
INFORMING_ROWS = 8  # rows a constant must move, to be fitted at all

LONE: Mapping[str, tuple[str, ...]] = {
    "prefill": ("exp_per_s", "sequence_s", "e_io", "l2_gain", "l2_share"),
    "decode": ("wide_s", "l2_gain", "l2_share", "merge_s"),
}
"""Constants that rows of a single head configuration cannot tell from the others; they keep their start, that of the architecture."""


@dataclass(frozen=True)
class AttentionFit:
    """A fitted phase: what a profile's section holds, and what a report of the fit needs.

    Attributes
    ----------
    constants : mapping of str to Fitted
        With standard errors; status "fitted", or "fixed" where named in ``fixed``.
    arrays : mapping of str to array
        The residual lattice.
    intervals : tuple of Interval
        Split-conformal, by regime, from folds over groups of shapes.
    accuracy : mapping of str to float
        Errors on the rows each fold left out ("mape", "median", "p95", "bias", fractions) and of the core alone ("core_mape", all rows).
    fixed : mapping of str to str
        Constants that were not fitted, and why.
    correlations : mapping of (str, str) to float
        Of the fitted constants' logarithms.
    dropped : mapping of str to int
        Rows refused, by reason.
    rows : int
        Rows used.
    """

    constants: Mapping[str, Fitted]
    arrays: Mapping[str, NDArray[Any]]
    intervals: tuple[Interval, ...]
    accuracy: Mapping[str, float]
    fixed: Mapping[str, str]
    correlations: Mapping[tuple[str, str], float]
    dropped: Mapping[str, int]
    rows: int
    phase: str = "prefill"

    @property
    def values(self) -> dict[str, float]:
        """Values of the constants by name."""
        return {name: constant.value for name, constant in self.constants.items()}

    def section(self, provenance: Provenance | None = None) -> Section:
        """The section of a profile this fit makes, for operator ``attention_prefill`` or ``attention_decode``."""
        return Section(self.constants, self.arrays, self.intervals, self.accuracy, provenance, "calibrated")


def registry(phase: str) -> Mapping[str, Any]:
    """Constants of a phase, "prefill" or "decode"."""
    return PREFILL_CONSTANTS if phase == "prefill" else DECODE_CONSTANTS


@dataclass(frozen=True)
class _Constants:
    values: dict[str, float]
    errors: dict[str, float]  # standard errors of the logarithms
    fixed: dict[str, str]
    correlations: dict[tuple[str, str], float]
    cost: float


def _solve(
    phase: str,
    work: Any,
    log_time: F,
    device: Device,
    start: Mapping[str, float],
    free: Sequence[str],
    evaluations: int = 60,
) -> tuple[dict[str, float], Any]:
    known = registry(phase)
    if not free:
        return dict(start), None
    low = np.log([max(known[n].low, 1e-12) for n in free])
    high = np.log([known[n].high for n in free])
    values = dict(start)

    def residual(x: F) -> F:
        values.update(zip(free, np.exp(x).tolist(), strict=True))
        return np.asarray(np.log(core_of(phase, work, device, values)) - log_time)

    first = np.clip(np.log([start[n] for n in free]), low + 1e-3, high - 1e-3)
    found = least_squares(
        residual, first, bounds=(low, high), loss="soft_l1", f_scale=ROBUST, max_nfev=evaluations, ftol=1e-6, xtol=1e-6
    )
    return {**start, **dict(zip(free, np.exp(found.x).tolist(), strict=True))}, found


def _spread(found: Any, free: Sequence[str]) -> tuple[dict[str, float], dict[tuple[str, str], float]]:
    """Standard errors and correlations of the logarithms, by the sandwich formula of a robust fit."""
    # least_squares scales jac and fun by the loss at the solution; undo that for the residuals, keep raw derivatives
    residual = found.fun / ROBUST
    psi = found.fun / np.sqrt(1.0 + residual**2)
    slope = (1.0 + residual**2) ** -1.5
    raw = found.raw_jac
    bread = np.linalg.pinv((raw * slope[:, None]).T @ raw)
    meat = (raw * (psi**2)[:, None]).T @ raw * len(psi) / max(len(psi) - len(free), 1)
    cov = bread @ meat @ bread
    sigma = np.sqrt(np.maximum(np.diag(cov), 0.0))
    scale = np.where(sigma > 0, sigma, 1.0)
    corr = cov / np.outer(scale, scale)
    pairs = {(free[i], free[j]): float(corr[i, j]) for i in range(len(free)) for j in range(i + 1, len(free))}
    return dict(zip(free, sigma.tolist(), strict=True)), pairs


def _raw_jacobian(phase: str, work: Any, device: Device, values: Mapping[str, float], free: Sequence[str]) -> F:
    """Derivatives of log core time by the logarithms of the constants, central differences."""
    step = 1e-3
    columns = []
    for name in free:
        up = np.log(core_of(phase, work, device, {**values, name: values[name] * np.exp(step)}))
        down = np.log(core_of(phase, work, device, {**values, name: values[name] * np.exp(-step)}))
        columns.append((up - down) / (2 * step))
    return np.stack(columns, axis=1)


def fit_constants(
    phase: str, c: Columns, device: Device, start: Mapping[str, float], keep: Mapping[str, str] | None = None
) -> _Constants:
    """Constants of a phase by robust least squares on log time.

    A constant that ends on its bound, or whose standard error exceeds its value, is fixed (there; at its start) and named.
    """
    known = registry(phase)
    work = work_of(phase, c, start)
    log_time = np.log(c.seconds)
    fixed: dict[str, str] = dict.fromkeys(STRUCTURE[phase], "structure")
    fixed.update(keep or {})
    values = dict(start)
    for name in known.keys() - fixed.keys():
        # a constant few rows know of would wander: what would its whole range change?
        ends = [
            np.log(core_of(phase, work, device, {**values, name: end})) for end in (known[name].low, known[name].high)
        ]
        if np.count_nonzero(np.abs(ends[1] - ends[0]) > 0.02) < INFORMING_ROWS:
            fixed[name] = "not identified by these rows"
    while True:
        free = [n for n in known if n not in fixed]
        if not free:
            core = core_of(phase, work, device, values)
            return _Constants(values, {}, fixed, {}, float(np.sum(np.log(core / c.seconds) ** 2)))
        values, found = _solve(phase, work, log_time, device, values, free)
        stuck = [n for n in free if values[n] < known[n].low * 1.01 + 1e-12 or values[n] > known[n].high * 0.99]
        if stuck:
            for name in stuck:
                at_low = values[name] < known[name].low * 1.01 + 1e-12
                values[name] = known[name].low if at_low else known[name].high
                fixed[name] = "on its lower bound" if at_low else "on its upper bound"
            if "l2_gain" in stuck and values["l2_gain"] <= known["l2_gain"].low:
                values["l2_share"], fixed["l2_share"] = start["l2_share"], "without meaning where L2 gains nothing"
            continue
        found.raw_jac = _raw_jacobian(phase, work, device, values, free)
        errors, correlations = _spread(found, free)
        weak = [n for n in free if errors[n] > 1.0]
        if not weak:
            return _Constants(values, errors, fixed, correlations, float(found.cost))
        for name in weak:
            values[name] = start[name]  # where a few rows drove it may be absurd
            fixed[name] = "not identified by these rows"


def predict(
    phase: str, c: Columns, device: Device, values: Mapping[str, float], lattice: Lattice | None
) -> tuple[F, NDArray[np.intp]]:
    """Predicted time, as it was measured (warm or cold), and interval regime of each row."""
    work = work_of(phase, c, values)
    core = core_of(phase, work, device, values)
    if lattice is not None:
        core = core * np.exp(lattice(residual_coordinates(phase, c)))
    fixed: Any = values["t0_s"]
    if phase == "decode":
        fixed = fixed + decode_parts(work, device, values)[2]
    return core, regime_of(fixed / core)


def groups_of(c: Columns, kind: str, phase: str) -> NDArray[np.intp]:
    """Group number of each row: rows of a group are left out together. ``kind``: "heads" (heads, KV heads, features) or "lengths"."""
    length = c.q_len if phase == "prefill" else c.kv_len
    key = np.stack([c.heads, c.kv_heads, c.head_dim] if kind == "heads" else [length], axis=1)
    return np.asarray(np.unique(key, axis=0, return_inverse=True)[1]).reshape(-1)


def conformal(log_ratio: F, regime: NDArray[np.intp], level: float = 0.9) -> tuple[Interval, ...]:
    """Intervals from log(measured / predicted) of unseen rows: finite-sample quantiles by regime; under 20 rows, those of all regimes.

    An interval always holds the prediction itself, also where a biased fit puts all its errors on one side.
    """
    out = []
    for i, name in enumerate(REGIMES):
        mine = log_ratio[regime == i]
        used = mine if len(mine) >= 20 else log_ratio
        n = len(used)
        tail = 0.5 * (1.0 - level)
        low = np.quantile(used, max(tail - tail / n, 0.0), method="lower")
        high = np.quantile(used, min(1.0 - tail + (1.0 - tail) / n, 1.0), method="higher")
        out.append(Interval(name, float(np.exp(min(low, 0.0))), float(np.exp(max(high, 0.0))), level, len(mine)))
    return tuple(out)


def fit_core_and_lattice(
    phase: str,
    c: Columns,
    device: Device,
    start: Mapping[str, float],
    s: Smoothing,
    keep: Mapping[str, str] | None = None,
) -> tuple[_Constants, Lattice]:
    """Constants, then the lattice on what they leave."""
    constants = fit_constants(phase, c, device, start, keep)
    core = core_of(phase, work_of(phase, c, constants.values), device, constants.values)
    return constants, fit_lattice(residual_coordinates(phase, c), np.log(c.seconds / core), s)


def fit_attention(
    phase: str,
    columns: Columns,
    device: Device,
    architecture: str,
    *,
    smoothing: Smoothing | None = None,
    folds: int = 5,
    fold_by: Sequence[str] = ("heads", "lengths"),
    seed: int = 0,
    start: Mapping[str, float] | None = None,
    keep: Mapping[str, str] | None = None,
) -> AttentionFit:
    """Fit one phase of attention.

    Parameters
    ----------
    phase : {"prefill", "decode"}
    columns : Columns
        Measured calls of one kernel path.
    device : Device
        Datasheet facts.
    architecture : str
        For the starting values: the defaults of the registry.
    smoothing : Smoothing
        Of the lattice; by default the phase's own.
    folds : int
        Folds over groups of shapes, for intervals and accuracy; each refits everything.
    fold_by : sequence of {"heads", "lengths"}
        What a fold leaves out; the residuals of several are pooled.
    seed : int
        Of the folds.
    start, keep : mappings
        Starting values other than the defaults (a sibling's), and constants to keep there with the reason.

    Returns
    -------
    AttentionFit

    Raises
    ------
    ValueError
        With fewer than 20 usable rows.
    """
    good, dropped = usable(phase, columns, device)
    c = columns.take(good)
    if len(c) < MINIMUM_ROWS:
        raise ValueError(
            f"{phase} attention: expected at least {MINIMUM_ROWS} usable rows, got {len(c)} ({dropped or 'none refused'})"
        )
    s = smoothing or Smoothing()
    first = {n: k.default(architecture) for n, k in registry(phase).items()} | dict(start or {})
    keep = dict(keep or {})
    if phase == "decode" and architecture != "cpu":
        keep["regroup"] = "the work of a CPU alone"
    if groups_of(c, "heads", phase).max() == 0:
        keep = {**dict.fromkeys(LONE[phase], "rows of a single head configuration cannot tell it"), **keep}
    constants, lattice = fit_core_and_lattice(phase, c, device, first, s, keep)
    core = core_of(phase, work_of(phase, c, constants.values), device, constants.values)
    residual = np.log(c.seconds / core)
    rng = np.random.default_rng(seed)
    ratios, plain, regimes = [], [], []
    for kind in fold_by:
        group = groups_of(c, kind, phase)
        if group.max() == 0:
            group = np.arange(len(c))  # nothing to leave out as a group: leave out rows
        fold = rng.permutation(group.max() + 1)[group] % folds
        for f in range(folds):
            out = fold == f
            if not out.any() or out.all():
                continue
            # from the solution on: a refit moves little, but what it moves is part of the error of an unseen shape
            rest = c.take(~out)
            free = [n for n in registry(phase) if n not in constants.fixed]
            values, _ = _solve(
                phase, work_of(phase, rest, constants.values), np.log(rest.seconds), device, constants.values, free, 6
            )
            core = core_of(phase, work_of(phase, rest, values), device, values)
            part = fit_lattice(residual_coordinates(phase, rest), np.log(rest.seconds / core), s)
            left = c.take(out)
            predicted, regime = predict(phase, left, device, values, part)
            ratios.append(np.log(c.seconds[out] / predicted))
            plain.append(np.log(c.seconds[out] / core_of(phase, work_of(phase, left, values), device, values)))
            regimes.append(regime)
    log_ratio, regime = np.concatenate(ratios), np.concatenate(regimes)
    arrays = lattice.arrays()
    if len(c) < FEW_ROWS and np.abs(np.concatenate(plain)).mean() < np.abs(log_ratio).mean():
        log_ratio, arrays = np.concatenate(plain), {}
    error = np.expm1(-log_ratio)
    accuracy = {
        "mape": float(np.mean(np.abs(error))),
        "median": float(np.median(np.abs(error))),
        "p95": float(np.quantile(np.abs(error), 0.95)),
        "bias": float(np.mean(error)),
        "core_mape": float(np.mean(np.abs(np.expm1(-residual)))),
    }
    fitted = {
        n: Fitted(
            v, v * constants.errors[n] if n in constants.errors else None, "fixed" if n in constants.fixed else "fitted"
        )
        for n, v in constants.values.items()
    }
    return AttentionFit(
        fitted,
        arrays,
        conformal(log_ratio, regime),
        accuracy,
        constants.fixed,
        constants.correlations,
        dropped,
        len(c),
        phase,
    )
