"""Solve for constants: robust least squares of log time in the logarithms of constants, with
standard errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from simulator.arrays import FloatArray, IndexArray
from simulator.hardware.profile import Fitted, Section
from simulator.operators.base import Values

# log of predicted over measured time of each row, from all constants by name
LogResidual = Callable[[Values], FloatArray]

# covariance of the logs of the free constants at a minimum, and the residual sd that it assumes
Covariance = Callable[["Minimum", Values], tuple[FloatArray, float]]

# log residual from which a row has a lower weight: kernel choice makes steps of 5-15 %
HUBER = 0.05
ON_BOUND = 1e-2  # a constant is on its bound if the log distance to an end of its range is smaller
ROOT_EPSILON = float(np.finfo(np.float64).eps ** 0.5)  # relative step of derivatives
ABSENT = "no rows of its class"
# for ``moot`` of fit_logs
NO_GAIN = {"l2_gain": ("l2_share", "without meaning where L2 gains nothing")}


def numbered(*columns: FloatArray) -> IndexArray:
    return np.unique(np.stack(columns, axis=1), axis=0, return_inverse=True)[1].reshape(-1)


def folds(groups: IndexArray, count: int, rng: np.random.Generator) -> Iterator[tuple[Any, Any]]:
    part = rng.permutation(groups.max() + 1)[groups] % count
    for i in np.unique(part):
        if not (part == i).all():
            yield np.flatnonzero(part != i), np.flatnonzero(part == i)


@dataclass(frozen=True)
class ConstantsFit:
    """Constants of an operator, SI, and their errors."""

    values: Values  # all constants
    std_errors: Values  # only fitted constants
    fixed: Mapping[str, str]  # constants that were not fitted -> why
    # logs of the fitted constants
    correlation: FloatArray = field(default_factory=lambda: np.zeros((0, 0)))
    residual_sd: float = 0.0  # standard deviation of the log residuals that the errors assume

    def fitted(self) -> dict[str, Fitted]:
        kept = {name: "default" if why == ABSENT else "fixed" for name, why in self.fixed.items()}
        status = (
            dict.fromkeys(self.values, "default") | kept | dict.fromkeys(self.std_errors, "fitted")
        )
        return {
            n: Fitted(float(v), self.std_errors.get(n), status[n]) for n, v in self.values.items()
        }


@dataclass(frozen=True)
class FittedPart:
    section: Section
    constants: ConstantsFit
    rows: int  # in the fit
    operator: str = ""
    dtype: str = ""

    @property
    def fixed(self) -> Mapping[str, str]:
        return self.constants.fixed

    @property
    def correlations(self) -> dict[tuple[str, str], float]:
        names, matrix = list(self.constants.std_errors), self.constants.correlation
        return {
            (a, b): float(matrix[i, j])
            for i, a in enumerate(names)
            for j, b in enumerate(names)
            if i < j
        }


@dataclass(frozen=True)
class Minimum:
    values: Values
    on_bound: Mapping[str, str]  # constants on an end of their range -> "lower" or "upper"
    rows: FloatArray  # residuals
    slopes: FloatArray  # derivatives of the residuals by the logs of the constants

    @property
    def names(self) -> list[str]:
        return list(self.values)


def minimise(
    log_residual: LogResidual,
    start: Values,
    ranges: Mapping[str, Any],
    *,
    prior: float | None = None,
    center: Values | None = None,
    data_only: bool = False,
    step: float | None = None,
    together: Callable[[Sequence[Values]], FloatArray] | None = None,
    **search: Any,
) -> Minimum:
    """Search the constants of ``ranges`` with the soft-L1 loss; the other constants keep the values
    of ``start``. ``prior`` is the log standard deviation of a prior around ``center`` (by default
    the start): one residual per constant. With ``data_only`` the loss applies only to the data.
    ``step`` is the log step of derivatives where residuals have single precision. ``together``
    returns the residuals of several sets of constants, (sets, rows). ``search`` has further options
    of :func:`scipy.optimize.least_squares`."""
    names = list(ranges)
    low = np.log([ends.low or 1e-9 for ends in ranges.values()])
    high = np.log([ends.high for ends in ranges.values()])
    middle = np.log([max((center or start)[n], 1e-12) for n in names])
    first = np.clip(np.log([max(start[n], 1e-12) for n in names]), low + 1e-3, high - 1e-3)

    def constants(x: FloatArray) -> dict[str, float]:
        return {**start, **dict(zip(names, np.exp(x).tolist(), strict=True))}

    def with_prior(x: FloatArray, out: FloatArray) -> FloatArray:
        if data_only:
            out = soft_l1(out)
        return (
            out if prior is None else np.concatenate([out, HUBER / prior * (x - middle)], axis=-1)
        )

    def rows(x: FloatArray) -> FloatArray:
        return with_prior(x, log_residual(constants(x)))

    if together is not None:
        search["jac"] = _forward(
            lambda places: with_prior(places, together([constants(x) for x in places])), low, high
        )
    if step is not None:
        ways = step * np.eye(len(names))
        search["jac"] = lambda x: np.stack(
            [(rows(x + way) - rows(x - way)) / (2.0 * step) for way in ways], axis=1
        )
    loss: dict[str, Any] = {} if data_only else {"loss": "soft_l1", "f_scale": HUBER}
    best = least_squares(rows, first, bounds=(low, high), **loss, **search)
    values = dict(zip(names, np.exp(best.x).tolist(), strict=True))
    on_bound = _on_bound(names, best.x - low, high - best.x)
    return Minimum(values, on_bound, best.fun, np.asarray(best.jac))


def _forward(
    residuals: Callable[[FloatArray], FloatArray], low: FloatArray, high: FloatArray
) -> Callable[[FloatArray], FloatArray]:
    """Return a function with the derivatives that least_squares computes by default; ``residuals``
    are those of several places, (places, rows)."""

    def derivatives(x: FloatArray) -> FloatArray:
        steps = ROOT_EPSILON * np.where(x >= 0, 1.0, -1.0) * np.maximum(1.0, np.abs(x))
        steps = np.where((x + steps < low) | (x + steps > high), -steps, steps)
        here, *moved = residuals(x + np.concatenate([np.zeros((1, len(x))), np.diag(steps)]))
        return np.asarray(((np.array(moved) - here) / ((x + steps) - x)[:, None]).T)

    return derivatives


def _on_bound(names: Sequence[str], below: FloatArray, above: FloatArray) -> dict[str, str]:
    return {
        name: "lower" if to_low < to_high else "upper"
        for name, to_low, to_high in zip(names, below, above, strict=True)
        if min(to_low, to_high) < ON_BOUND
    }


def fit_logs(
    log_residual: LogResidual,
    start: Values,
    ranges: Mapping[str, Any],
    covariance: Covariance,
    *,
    fixed: Mapping[str, str] | None = None,
    weak: float = np.inf,
    moot: Mapping[str, tuple[str, str]] | None = None,
    **search: Any,
) -> ConstantsFit:
    """Repeat the search (:func:`minimise`) until no free constant is on its bound and the data
    identify every constant. ``fixed`` maps constants that are not free to the reason. A constant
    with a log standard error above ``weak`` returns to ``center``; a constant on its bound stays
    there. ``moot`` maps a constant to a second constant with a reason: the second is fixed when the
    first is on its lower bound."""
    search = {"center": start, **search}
    values, kept = dict(start), dict(fixed or {})
    while free := {name: ranges[name] for name in ranges if name not in kept}:
        minimum = minimise(log_residual, values, free, **search)
        values = {**values, **minimum.values}
        gone: dict[str, str] = {}
        for name, side in minimum.on_bound.items():
            gone[name] = f"at its {side} bound"
            values[name] = getattr(ranges[name], "low" if side == "lower" else "high")
        if not gone:
            matrix, residual_sd = covariance(minimum, values)
            errors = dict(zip(free, np.sqrt(np.maximum(np.diag(matrix), 0.0)), strict=True))
            gone = {name: "not identified by these rows" for name in free if errors[name] > weak}
            # a few rows may have moved it far away
            values |= {name: search["center"][name] for name in gone}
            if not gone:
                known = {name: float(values[name] * error) for name, error in errors.items()}
                return ConstantsFit(values, known, kept, _correlation(matrix), residual_sd)
        kept |= gone
        for name, (other, why) in (moot or {}).items():
            if minimum.on_bound.get(name) == "lower":
                values[other], kept[other] = search["center"][other], why
    return ConstantsFit(values, {}, kept)


def _correlation(matrix: FloatArray) -> FloatArray:
    errors = np.sqrt(np.maximum(np.diag(matrix), 0.0))
    scale = np.where(errors > 0, errors, 1.0)
    return np.asarray(matrix / np.outer(scale, scale))


def soft_l1(log_residual: FloatArray) -> FloatArray:
    z = (log_residual / HUBER) ** 2
    return np.sign(log_residual) * HUBER * np.sqrt(2.0 * (np.sqrt(1.0 + z) - 1.0))


def loss(log_residual: FloatArray) -> float:
    """Return the sum of the soft-L1 losses of rows."""
    return float(np.sum(np.sqrt(1.0 + (log_residual / HUBER) ** 2) - 1.0))


def slopes(
    log_residual: LogResidual, values: Values, names: Sequence[str], step: float
) -> FloatArray:
    """Return derivatives by the logarithms of constants, (rows, names), by central differences."""

    def moved(name: str, by: float) -> FloatArray:
        return log_residual({**values, name: values[name] * np.exp(by)})

    return np.stack(
        [(moved(name, step) - moved(name, -step)) / (2.0 * step) for name in names], axis=1
    )


def gauss_newton(slopes: FloatArray, residual_sd: float) -> FloatArray:
    return np.asarray(np.linalg.pinv(slopes.T @ slopes) * residual_sd**2)


def sandwich(log_residual: FloatArray, slopes: FloatArray) -> FloatArray:
    z = (log_residual / HUBER) ** 2
    psi = log_residual / np.sqrt(1.0 + z)
    bread = np.linalg.pinv((slopes * ((1.0 + z) ** -1.5)[:, None]).T @ slopes)
    freedom = len(psi) / max(len(psi) - slopes.shape[1], 1)
    return np.asarray(bread @ ((slopes * (psi**2)[:, None]).T @ slopes * freedom) @ bread)
