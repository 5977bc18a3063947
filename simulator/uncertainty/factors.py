"""The error model of operator times: error factors, correlated and independent errors
(docs/model.md, "Uncertainty").

log(true / predicted) is a sum of three errors. A *systematic* error belongs to an error factor,
such as the launch time of GEMMs. It is one number per software stack and laboratory, multiplied by
the loading of each time. A *correlated* error is similar for operators of similar sizes. An
*independent* error belongs to one shape. Times, ratios of times and forward passes are rows of one
linear model, so common errors cancel in a ratio.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from simulator.arguments import LEVEL, number
from simulator.arrays import Array
from simulator.hardware.profile import HardwareProfile
from simulator.operators import OPERATORS
from simulator.operators.base import (
    ENGINE_STACK,
    SAME_STACK,
    ErrorSize,
    Estimate,
    FittedValues,
)

ERROR_SIZES: Mapping[str, ErrorSize] = {
    name: size for operator in OPERATORS for name, size in operator.errors.items()
}
"""Errors by operator. Stacks choose different attention kernels, so their times differ by steps."""

ERROR_FACTORS: Mapping[str, float] = (
    # the machine's launches, clocks and memory are common to all operators; together with a GEMM's
    # own factors, the standard deviations are launch .20, compute .06, memory .034
    {"machine launch": 0.10, "machine compute": 0.04, "machine memory": 0.015}
    | {
        f"{name} {part}": sd
        for name, size in ERROR_SIZES.items()
        for part, sd in size.factors.items()
    }
    | {f"{name} gpus": 1.0 for name, size in ERROR_SIZES.items() if size.gpus}
    | {"host": 0.43}
)
"""Error factor -> prior standard deviation of the log of the part that it changes, from held-out
software stacks."""

FACTOR_INDEX: Mapping[str, int] = {name: i for i, name in enumerate(ERROR_FACTORS)}

COVERAGE_FACTOR = 1.75
"""Half-width of a 90 % interval over the standard deviation. The tails are heavier than those of a
normal (1.645)."""

LENGTH_SCALE_OCTAVES = 1.5
"""Distance at which the correlation of two errors has fallen to 1/e."""

OUTSIDE_PER_OCTAVE = 0.06
"""Log standard deviation that an octave outside the measured sizes adds."""

UNLIKE_LOG_SD = 1.5
"""Correlated log standard deviation of decode over a latent cache in another stack than the fitted
one, on GPUs without a kernel of its own (all but data-centre GPUs from Hopper on). Some kernels
there split a cache and others do not, so times differ by up to 30 times."""


EDGE_LOG_SD = 0.24
"""Independent log standard deviation of products just past the edge of a tile. Libraries choose
other kernels there: on Hopper and the B200, 2 to 20 % of the products of 513, 769 ... 4353 tokens
take over 1.25 times the time of one token less, of which the model explains a part only for some
kernels that are not cuBLAS's."""


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
        """Variance of the logs (n,)."""
        out = self.correlated * self.correlated + self.independent
        for row in self.systematic:  # a fixed order, for equal rounding in chunks of any size
            out = out + row * row
        return out

    def wide(self) -> Array:
        """Return ``systematic`` transposed, with a column for each of :data:`ERROR_FACTORS`."""
        out = np.zeros((self.systematic.shape[1], len(ERROR_FACTORS)))
        out[:, [FACTOR_INDEX[name] for name in self.factors]] = self.systematic.T
        return out

    def take(self, rows: Any) -> Uncertainty:
        taken = {
            name: getattr(self, name)[rows] for name in ("correlated", "independent", "coordinates")
        }
        return replace(self, systematic=self.systematic[:, rows], **taken)

    @classmethod
    def joined(cls, parts: list[Uncertainty], order: Any = slice(None)) -> Uncertainty:
        """Concatenate the errors of several sets of times, then put them in an order; the kind is
        that of the first."""
        names = tuple(dict.fromkeys(name for part in parts for name in part.factors))
        systematic = [np.zeros((len(names), len(part.correlated))) for part in parts]
        for part, whole in zip(parts, systematic):
            whole[[names.index(name) for name in part.factors]] = part.systematic
        correlated, independent, coordinates = (
            np.concatenate([np.asarray(getattr(part, name), dtype=np.float64) for part in parts])
            for name in ("correlated", "independent", "coordinates")
        )
        every = np.concatenate(systematic, axis=1)
        kind = parts[0].kind
        return cls(names, every, correlated, independent, coordinates, kind).take(order)


def in_order(errors: Sequence[tuple[Any, Uncertainty]], size: int) -> Uncertainty:
    """Return the errors of all rows, in their order, from errors of parts of the rows."""
    index = np.concatenate([np.arange(size)[rows] for rows, _ in errors])
    return Uncertainty.joined([error for _, error in errors], np.argsort(index))


class Scales(NamedTuple):
    """Factors on the prior of an estimate's errors."""

    machine: float = 1.0  # on the error factors of the machine
    kernels: float = 1.0  # on the error factors of the operator's kernels
    others: float = 1.0  # on correlated and independent errors
    gpus: float = 0.0  # log standard deviation that kernels of another GPU add


def error_scales(e: Estimate, hw: HardwareProfile) -> Scales:
    if e.section is None:
        return Scales()
    stack, others = hw.error_scales(e.section)
    if stack == SAME_STACK:
        return same_stack_scales(e.operator)._replace(others=others)
    size = ERROR_SIZES[e.operator]
    others = others * size.engine_scale if stack == ENGINE_STACK else others
    return Scales(stack, size.scales.get(stack, stack), others, _between_gpus(e.section, size, hw))


def _between_gpus(section: FittedValues, size: ErrorSize, hw: HardwareProfile) -> float:
    if not size.gpus or not hw.fitted_on(section):
        return 0.0
    label = next((key[1] for key, own in hw.sections.items() if own is section), "*")
    return size.gpus.get(label, size.gpus.get("*", 0.0))


def same_stack_scales(operator: str) -> Scales:
    """Return the factors for times on the fitted stack, in another run."""
    scale = ERROR_SIZES[operator].scales.get(SAME_STACK, SAME_STACK)
    return Scales(scale, scale)


def uncertainty_of(e: Estimate, scales: Scales) -> Uncertainty:
    """Return the errors of an estimate's n times. Loadings "launch", "compute" and "memory" also
    count for the error factors of the machine."""
    scale = scales.others
    shape = np.shape(e.time)
    dtype = e.coordinates.dtype
    sizes, (names, loading, sds) = (
        ERROR_SIZES[e.operator],
        _factors(e.operator, tuple(e.loadings), scales),
    )
    systematic = np.empty((len(names), *shape), dtype=dtype)
    for i, name in enumerate(loading):
        systematic[i] = e.loadings[name]
    systematic = systematic.reshape(len(names), -1)
    systematic *= sds.astype(dtype)[:, None]
    if scales.gpus:
        names = (*names, f"{e.operator} gpus")
        systematic = np.pad(systematic, ((0, 1), (0, 0)), constant_values=scales.gpus)
    independent: Any = sizes.independent**2
    for name, sd in sizes.by_share.items():
        independent = independent + (sd * (e.noise if name in e.noise else e.loadings)[name]) ** 2
    if e.outside is not None:
        independent = independent + (OUTSIDE_PER_OCTAVE * e.outside) ** 2
    if e.edge is not None:  # equal for all stacks
        independent = independent + (EDGE_LOG_SD / scale * e.edge) ** 2
    correlated: Any = sizes.correlated
    if e.unlike is not None:
        correlated = np.hypot(correlated, UNLIKE_LOG_SD / scale * e.unlike)
    if e.active is not None:
        correlated = correlated * e.active
        independent = independent * e.active
    correlated, independent = (np.full(shape, v, dtype).ravel() for v in (correlated, independent))
    correlated *= scale
    independent *= scale**2
    # the correlated error stays: in a pass, other operators affect the time
    if e.measured is not None:
        rows = e.measured.rows.ravel()
        systematic[:, rows], independent[rows] = 0.0, (e.measured.log_half / COVERAGE_FACTOR) ** 2
    return Uncertainty(names, systematic, correlated, independent, e.coordinates, e.kind)


@lru_cache(maxsize=512)
def _factors(
    operator: str, loadings: tuple[str, ...], scales: Scales
) -> tuple[tuple[str, ...], list[str], Array]:
    """Return the error factors of an operator, and the loading and standard deviation of each."""
    machine = [name for name in loadings if f"machine {name}" in ERROR_FACTORS]
    names = (*(f"machine {name}" for name in machine), *(f"{operator} {name}" for name in loadings))
    factors = [scales.machine] * len(machine) + [scales.kernels] * len(loadings)
    return (
        names,
        [*machine, *loadings],
        np.array([f * ERROR_FACTORS[name] for f, name in zip(factors, names)]),
    )


def level_scale(level: float) -> float:
    """Return a normal interval's half-width over that of a 90 % interval; InputError for a level
    outside (0, 1)."""
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
