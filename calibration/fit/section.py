"""Fit a section of a profile by the common method: constants, residual, held-out errors and section
scale. The fit of an operator is a subclass of :class:`Fit`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import numpy as np
from scipy.stats import t as student

from calibration.fit import solver
from calibration.fit.residual import Regularisation, fit_grid
from calibration.fit.solver import ConstantsFit, FittedPart, Minimum
from simulator.arrays import Array, FloatArray, IndexArray
from simulator.hardware.profile import Section
from simulator.operators import CONSTANTS
from simulator.operators.base import Calls, Constant, ResidualGrid, Values
from simulator.uncertainty.factors import (
    COVERAGE_FACTOR,
    Uncertainty,
    same_stack_scales,
    uncertainty_of,
)

FOLDS = 5
LEVEL = 0.9  # level of intervals

FitT = TypeVar("FitT", bound="Fit")


@dataclass(frozen=True)
class Fit(ABC):
    """Measured rows of one operator of one device and stack, the search for constants, and the
    blank residual."""

    calls: Calls
    seconds: FloatArray

    FEWEST: ClassVar[int] = 20  # usable rows that a fit needs
    REGULARISATION: ClassVar[Regularisation]
    ROUNDS: ClassVar[int] = 3  # solutions of the residual, with robust weights renewed between them

    def __len__(self) -> int:
        return len(self.seconds)

    @property
    def registry(self) -> Mapping[str, Constant]:
        return CONSTANTS[self.calls.operator]

    def defaults(self, architecture: str) -> dict[str, float]:
        return {name: constant.default(architecture) for name, constant in self.registry.items()}

    def take(self: FitT, rows: Array) -> FitT:
        return replace(self, calls=self.calls.take(rows), seconds=self.seconds[rows])

    def sample(self: FitT, count: int, seed: int = 0) -> FitT:
        if len(self) <= count:
            return self
        return self.take(
            np.sort(np.random.default_rng(seed).choice(len(self), count, replace=False))
        )

    @abstractmethod
    def groups(self, by: str = "") -> IndexArray:
        """Return the number of the group of each row: folds hold out whole groups."""

    @abstractmethod
    def constants(self, start: Values | None = None) -> ConstantsFit:
        pass

    @abstractmethod
    def blank(self) -> ResidualGrid:
        pass

    def usable(self: FitT) -> FitT:
        return self

    def log_residual(self, values: Values) -> FloatArray:
        return np.asarray(np.log(self.calls.seconds(values)) - np.log(self.seconds))

    def log_error(self, values: Values, residual: ResidualGrid) -> FloatArray:
        return self.log_residual(values) + residual(self.calls.estimate(values).position)

    def residual(self, values: Values) -> ResidualGrid:
        position = self.calls.estimate(values).position
        return fit_grid(
            self.blank(), position, -self.log_residual(values), self.REGULARISATION, self.ROUNDS
        )

    def search(
        self,
        start: Values,
        ranges: Mapping[str, Constant],
        prior: float,
        **options: Any,
    ) -> ConstantsFit:
        """Fit constants with a prior, a log standard deviation, around ``start``."""

        def covariance(minimum: Minimum, values: Values) -> tuple[FloatArray, float]:
            raw = solver.slopes(self.log_residual, values, minimum.names, 1e-4)
            every = np.concatenate([raw, solver.HUBER / prior * np.eye(len(minimum.names))])
            freedom = max(len(self) - len(minimum.names), 1)
            squares = np.minimum(minimum.rows**2, (3 * solver.HUBER) ** 2)
            residual_sd = float(np.sqrt(np.sum(squares) / freedom))
            return solver.gauss_newton(every, residual_sd), residual_sd

        return solver.fit_logs(self.log_residual, start, ranges, covariance, prior=prior, **options)

    def arrays(self, residual: ResidualGrid) -> dict[str, Array]:
        return residual.arrays()

    def accuracy(self, errors: FloatArray, values: Values) -> dict[str, float]:
        return accuracy_of(np.expm1(errors))

    def scale(self, errors: FloatArray, values: Values) -> float:
        """Return the section scale: the factor on correlated and independent errors that covers
        held-out rows."""
        e = replace(self.calls.estimate(values), edge=None)  # no scale applies to edges
        return section_scale(errors, uncertainty_of(e, same_stack_scales(e.operator)))


def floats(records: Any, *names: str) -> list[FloatArray]:
    """Return columns of records (an object with columns of these names) as float64."""
    return [np.asarray(getattr(records, name), dtype=np.float64) for name in names]


def blank_grid(position: Sequence[FloatArray], steps: Sequence[float]) -> ResidualGrid:
    """Return a residual of zeros over all positions, with nodes at multiples of the steps."""
    ends, step = np.array([(np.min(x), np.max(x)) for x in position]), np.array(steps)
    start = np.floor(ends[:, 0] / step) * step
    shape = np.ceil((ends[:, 1] - start) / step - 1e-9).astype(int) + 1
    return ResidualGrid(tuple(start.tolist()), tuple(steps), np.zeros(shape))


def held_out(fit: Fit, start: Values, seed: int) -> FloatArray:
    errors = np.zeros(len(fit))
    for train, test in solver.folds(fit.groups(), FOLDS, np.random.default_rng(seed)):
        rest, held = fit.take(train), fit.take(test)
        values = rest.constants(start).values
        errors[test] = held.log_error(values, rest.residual(values))
    return errors


def fit_section(fit: Fit, *, seed: int = 0) -> FittedPart:
    """Fit the section of one operator; ValueError for too few rows."""
    rows = fit.usable()
    if len(rows) < fit.FEWEST:
        few = f"expected at least {fit.FEWEST} usable rows, got {len(rows)} of {len(fit)}"
        raise ValueError(f"{fit.calls.operator}: {few}")
    constants = rows.constants()
    values = constants.values
    errors = held_out(rows, values, seed)
    arrays, scale = rows.arrays(rows.residual(values)), rows.scale(errors, values)
    accuracy = rows.accuracy(errors, values)
    section = Section(constants.fitted(), arrays, scale, accuracy, status="calibrated")
    return FittedPart(section, constants, len(rows))


def accuracy_of(error: FloatArray) -> dict[str, float]:
    """Return the mean ("mape"), "median" and "p95" of absolute relative errors, and their signed
    mean "bias"."""
    size = np.abs(error)
    scores = {
        "mape": size.mean(),
        "median": np.median(size),
        "p95": np.quantile(size, 0.95),
        "bias": error.mean(),
    }
    return {name: float(v) for name, v in scores.items()}


def few_groups(count: int) -> float:
    """Return the factor that widens intervals fitted on few (n, k) pairs, since errors within a
    pair are similar: Student's quantile with one degree of freedom per pair, over the normal
    quantile."""
    tail = 0.5 + 0.5 * LEVEL
    return float(student.ppf(tail, max(count, 1)) / student.ppf(tail, np.inf))


def section_scale(log_ratio: FloatArray, uncertainty: Uncertainty) -> float:
    """Return the factor in [0.2, 5] on correlated and independent errors at which 90 % intervals
    cover nine in ten held-out rows. ``log_ratio`` is log predicted over measured; ``uncertainty``
    has a section scale of 1."""
    systematic = np.einsum("cn,cn->n", uncertainty.systematic, uncertainty.systematic)
    scaled = np.maximum(uncertainty.variance - systematic, 1e-12)
    needed = ((log_ratio / COVERAGE_FACTOR) ** 2 - systematic) / scaled
    return float(np.sqrt(np.clip(np.quantile(needed, LEVEL), 0.2**2, 5.0**2)))


def neighbours(sizes: Sequence[FloatArray]) -> IndexArray:
    """Return pairs (smaller, larger) of rows that differ in exactly one of several sizes, by a
    ratio in [0.25, 1)."""
    return np.concatenate(
        [pairs_along(s, [*sizes[:i], *sizes[i + 1 :]]) for i, s in enumerate(sizes)]
    )


def pairs_along(size: FloatArray, others: Sequence[FloatArray]) -> IndexArray:
    """Return pairs of rows that differ in ``size`` by a ratio in [0.25, 1) and are equal in
    ``others``."""
    key = solver.numbered(*others) if len(others) else np.zeros(len(size), dtype=np.intp)
    order = np.lexsort((size, key))
    key, size = key[order], size[order]
    found = [np.zeros((0, 2), dtype=np.intp)]
    for gap in range(1, len(key)):
        same = key[gap:] == key[:-gap]
        if not same.any():
            break
        ratio = size[:-gap] / np.where(size[gap:] > 0, size[gap:], 1.0)
        at = np.flatnonzero(same & (ratio >= 0.25) & (ratio < 1.0))
        found.append(np.stack([at, at + gap], axis=1))
    return order[np.concatenate(found)]
