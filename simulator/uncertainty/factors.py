"""The error model of operator times: error factors, correlated errors, independent errors (docs/model.md, "How sure").

log(true / predicted) is a sum of three errors. A *systematic* error belongs to an error factor, such as the launch time
of GEMMs: it is one number per software stack and laboratory, and a time has it in proportion to its loading. A
*correlated* error is similar for operators of similar sizes. An *independent* error belongs to one shape. A time, a
ratio of times and a forward pass are therefore rows of one linear model: common errors cancel in a ratio exactly as far
as they are common, and measured times (:class:`simulator.uncertainty.posterior.Posterior`) correct all others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from simulator.arguments import LEVEL, number
from simulator.arrays import Array
from simulator.hardware.profile import HardwareProfile
from simulator.operators import OPERATORS
from simulator.operators.base import ENGINE_STACK, SAME_STACK, ErrorSize, Estimate

ERROR_SIZES: Mapping[str, ErrorSize] = MappingProxyType(
    {name: size for operator in OPERATORS for name, size in operator.errors.items()}
)
"""Errors by operator; between stacks, attention kernels step apart by their choice of kernel."""

ERROR_FACTORS: Mapping[str, float] = MappingProxyType(
    # of the machine: launches, clocks and memory of this very device, in all its operators. With those of a GEMM's
    # kernels: launch .20, compute .06, memory .034
    {"machine launch": 0.10, "machine compute": 0.04, "machine memory": 0.015}
    | {f"{name} {part}": sd for name, size in ERROR_SIZES.items() for part, sd in size.factors.items()}
    | {"host": 0.43}
)
"""Error factor -> prior standard deviation of the log of the part it changes, from held-out software stacks."""

FACTOR_INDEX: Mapping[str, int] = MappingProxyType({name: i for i, name in enumerate(ERROR_FACTORS)})

COVERAGE_FACTOR = 1.75
"""Half-width of a 90 % interval over the standard deviation: tails are heavier than a normal's 1.645."""

LENGTH_SCALE_OCTAVES = 1.5
"""Distance at which the correlation of two errors has fallen to 1/e."""

OUTSIDE_PER_OCTAVE = 0.06
"""Log standard deviation that an octave outside the measured sizes adds."""

UNLIKE_LOG_SD = 1.5
"""Log standard deviation, correlated, of decode over a latent cache where no kernel was written for it, in another
stack than the fitted one: on all GPUs except those of data centres from Hopper on. Kernels there split a cache or do
not, and differ by up to 30 times."""


@dataclass(frozen=True)
class Uncertainty:
    """The errors of the logs of n times of one kind of operator."""

    factors: tuple[str, ...]  # c of ERROR_FACTORS
    systematic: Array  # (c, n) prior standard deviation of each factor times the loading
    correlated: Array  # (n,) standard deviation
    independent: Array  # (n,) variance
    coordinates: Array  # (n, 3) log2 of sizes, octaves
    kind: int = 0  # errors are correlated within one kind of operator

    @property
    def variance(self) -> Array:
        """(n,) of the logs."""
        out = self.correlated * self.correlated + self.independent
        for row in self.systematic:  # in this order whatever n is, so that chunks do not differ in rounding
            out = out + row * row
        return np.asarray(out)

    def wide(self) -> Array:
        """(n, len(ERROR_FACTORS)): ``systematic`` with a column for each of :data:`ERROR_FACTORS`."""
        out = np.zeros((self.systematic.shape[1], len(ERROR_FACTORS)))
        out[:, [FACTOR_INDEX[name] for name in self.factors]] = self.systematic.T
        return out

    def take(self, rows: Any) -> Uncertainty:
        """Return the errors of some of the times."""
        return Uncertainty(
            self.factors,
            self.systematic[:, rows],
            self.correlated[rows],
            self.independent[rows],
            self.coordinates[rows],
            self.kind,
        )

    @classmethod
    def joined(cls, parts: list[Uncertainty], order: Any = slice(None)) -> Uncertainty:
        """Return the errors of several sets of times of one kind, one set after the other, then put in an order."""
        first = parts[0]
        if all(part.factors == first.factors for part in parts):
            names, systematic = first.factors, np.concatenate([part.systematic for part in parts], axis=1)
        else:
            names, systematic = tuple(ERROR_FACTORS), np.concatenate([part.wide() for part in parts]).T
        correlated, independent, coordinates = (
            np.concatenate([np.asarray(getattr(part, name), dtype=np.float64) for part in parts])
            for name in ("correlated", "independent", "coordinates")
        )
        return cls(names, systematic, correlated, independent, coordinates, first.kind).take(order)


def in_order(errors: Sequence[tuple[Any, Uncertainty]], size: int) -> Uncertainty:
    """Return the errors of some rows at a time as one, in the order of the rows."""
    at = np.concatenate([np.arange(size)[rows] for rows, _ in errors])
    return Uncertainty.joined([error for _, error in errors], np.argsort(at))


class Scales(NamedTuple):
    """Factors on the prior of an estimate's errors."""

    machine: float = 1.0  # on the error factors of the machine
    kernels: float = 1.0  # on those of the operator's kernels
    others: float = 1.0  # on correlated and independent errors


def error_scales(e: Estimate, hw: HardwareProfile) -> Scales:
    """Return the factors on the prior of an estimate's errors, by what its section was fitted on."""
    if e.section is None:
        return Scales()
    stack, others = hw.error_scales(e.section)
    if stack == SAME_STACK:  # the same kernels on the same machine
        return same_stack_scales(e.operator)._replace(others=others)
    size = ERROR_SIZES[e.operator]
    others = others * size.engine_scale if stack == ENGINE_STACK else others
    return Scales(stack, size.scales.get(stack, stack), others)


def same_stack_scales(operator: str) -> Scales:
    """Return the factors for times on the very stack that was fitted, in another run."""
    scale = ERROR_SIZES[operator].scales.get(SAME_STACK, SAME_STACK)
    return Scales(scale, scale)


def uncertainty_of(e: Estimate, scales: Scales) -> Uncertainty:
    """Return the errors of an estimate's n times; ``scales`` are those of :func:`error_scales`. Loadings "launch",
    "compute" and "memory" also count for the machine's error factors."""
    scale, shape, dtype = scales.others, np.shape(e.time), e.coordinates.dtype
    sizes, (names, loading, sds) = ERROR_SIZES[e.operator], _factors(e.operator, tuple(e.loadings), scales)
    systematic = np.empty((len(names), *shape), dtype=dtype)
    for i, name in enumerate(loading):
        systematic[i] = e.loadings[name]
    systematic = systematic.reshape(len(names), -1)
    systematic *= sds.astype(dtype)[:, None]
    independent: Any = sizes.independent**2
    for name, sd in sizes.by_share.items():
        independent = independent + (sd * (e.noise if name in e.noise else e.loadings)[name]) ** 2
    if e.outside is not None:
        independent = independent + (OUTSIDE_PER_OCTAVE * e.outside) ** 2
    correlated: Any = sizes.correlated
    if e.unlike is not None:
        correlated = np.hypot(correlated, UNLIKE_LOG_SD / scale * e.unlike)
    if e.active is not None:
        correlated, independent = correlated * e.active, independent * e.active
    correlated, independent = (_column(v, shape, dtype) for v in (correlated, independent))
    correlated *= scale
    independent *= scale**2
    if e.measured is not None:  # in a pass its surroundings still count, as a correlated error
        at = e.measured.rows.ravel()
        systematic[:, at], independent[at] = 0.0, (e.measured.log_half / COVERAGE_FACTOR) ** 2
    return Uncertainty(names, systematic, correlated, independent, e.coordinates, e.kind)


@lru_cache(maxsize=512)
def _factors(operator: str, loadings: tuple[str, ...], scales: Scales) -> tuple[tuple[str, ...], list[str], Array]:
    """Return the error factors of an operator with some loadings, the loading and the standard deviation of each."""
    machine = [name for name in loadings if f"machine {name}" in ERROR_FACTORS]
    names = (*(f"machine {name}" for name in machine), *(f"{operator} {name}" for name in loadings))
    factors = [scales.machine] * len(machine) + [scales.kernels] * len(loadings)
    return names, [*machine, *loadings], np.array([f * ERROR_FACTORS[name] for f, name in zip(factors, names)])


def _column(value: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    """Return a number, or an array of a shape, as a flat array of its own."""
    out = np.empty(shape, dtype=dtype)
    out[...] = value
    return out.reshape(-1)


def level_scale(level: float) -> float:
    """Return the half-width of an interval at a level over that of a 90 % interval, as of a normal distribution;
    InputError for a level outside (0, 1)."""
    return _level_scale(number("level", level, LEVEL))


@lru_cache(maxsize=64)
def _level_scale(level: float) -> float:
    normal = NormalDist()
    return normal.inv_cdf(0.5 + 0.5 * level) / normal.inv_cdf(0.95)


def correlation(a: Array, b: Array) -> Array:
    """Return the correlation (..., len(a), len(b)) of errors at coordinates (..., n, 3)."""
    distance = np.abs(a[..., :, None, 0] - b[..., None, :, 0])
    for axis in range(1, a.shape[-1]):
        apart = a[..., :, None, axis] - b[..., None, :, axis]
        distance += np.abs(apart, out=apart)
    distance *= -1.0 / LENGTH_SCALE_OCTAVES
    return np.asarray(np.exp(distance, out=distance))
