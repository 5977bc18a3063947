"""The error model of operator times: error factors, correlated errors, independent errors (docs/model.md, "How sure").

log(true / predicted) is a sum of three errors. A *systematic* error belongs to an error factor, such as the launch time
of GEMMs: it is one number per software stack and laboratory, and a time has it in proportion to its loading. A
*correlated* error is similar for operators of similar sizes. An *independent* error belongs to one shape. A time, a
ratio of times and a forward pass are therefore rows of one linear model: common errors cancel in a ratio exactly as far
as they are common, and measured times (:class:`simulator.uncertainty.posterior.Posterior`) correct all others.

Use :func:`uncertainty_of` for the errors of a cost model's estimate.

Symbols
-------
phi : prior standard deviation of an error factor times its loading
r : standard deviation of the correlated error
e : variance of the independent error
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from statistics import NormalDist
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from simulator.arguments import LEVEL, number
from simulator.arrays import Array
from simulator.cost.base import Estimate
from simulator.hardware.profile import ENGINE_STACK, SAME_STACK, HardwareProfile

# fmt: off
_FACTORS: dict[str, float] = {
    # of the machine: launches, clocks and memory of this very device, in all its operators
    "machine launch": 0.10, "machine compute": 0.04, "machine memory": 0.015,
    # of one operator's kernels; with those of the machine: launch .20, compute .06, memory .034
    "gemm launch": 0.17, "gemm compute": 0.045, "gemm memory": 0.03, "gemm l2": 0.60, "gemm latency": 0.10,
    "gemm feed": 0.09, "gemm idle 128x256": 0.10, "gemm idle 128x128": 0.10, "gemm idle 64x128": 0.10,
    "gemm alignment": 0.25, "gemm sparse24": 0.10, "gemm sparse24 default": 0.28, "gemm serial": 0.35,
    "gemm blocks": 0.10, "gemm quantised": 0.25, "gemm spmv": 0.04, "gemm default": 0.12, "gemm generic": 0.30,
    "prefill launch": 0.42, "prefill compute": 0.19, "prefill memory": 0.44, "prefill latency": 0.48,
    "prefill occupancy": 0.5, "prefill sparse": 0.15, "prefill default": 0.12,
    "prefill generic": 0.20, "prefill kernel": 0.12,
    "decode launch": 0.21, "decode memory": 0.12, "decode latency": 0.3, "decode merge": 0.5, "decode sparse": 0.10,
    "decode compute": 0.12,
    "decode default": 0.12, "decode generic": 0.20, "decode kernel": 0.12,
    "mla_decode launch": 0.08, "mla_decode memory": 0.03, "mla_decode latency": 0.12, "mla_decode compute": 0.08,
    "mla_decode merge": 0.2, "mla_decode sparse": 0.10,
    "mla_decode default": 0.20, "mla_decode generic": 0.20, "mla_decode kernel": 0.12,
    "elementwise launch": 0.15, "elementwise memory": 0.10, "elementwise l2": 0.20, "elementwise default": 0.28,
    "elementwise added": 0.30,
    "collective launch": 0.24, "collective link": 0.08, "collective step": 0.33, "collective pcie": 0.4,
    "collective topology": 0.6, "collective unstated": 0.35, "collective default": 0.3,
    "experts launch": 0.35, "experts compute": 0.38, "experts memory": 0.07, "experts io": 0.5, "experts padding": 0.25,
    "experts skew": 0.05, "experts balance": 0.2, "experts alignment": 0.6, "experts quantised": 0.25,
    "experts scaled": 0.2, "experts default": 0.1, "experts generic": 0.15,
    "delta_net launch": 0.4, "delta_net compute": 0.35, "delta_net memory": 0.22, "delta_net latency": 0.5,
    "host": 0.43,
}
# fmt: on
ERROR_FACTORS: Mapping[str, float] = MappingProxyType(_FACTORS)
"""Error factor -> prior standard deviation of the log of the part it changes, from held-out software stacks."""

_INDEX: dict[str, int] = {name: i for i, name in enumerate(ERROR_FACTORS)}
FACTOR_INDEX: Mapping[str, int] = MappingProxyType(_INDEX)

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
class ErrorSize:
    """Errors of one operator that no error factor explains, log units."""

    correlated: float  # standard deviation
    independent: float  # least standard deviation
    by_share: Mapping[str, float] = field(default_factory=dict)  # share of the time -> standard deviation it adds
    scales: Mapping[float, float] = field(default_factory=dict)  # scale of a profile -> scale of this operator
    engine_scale: float = 1.0  # of the errors that are not systematic, where the fit is of the engine's own kernels


# attention differs by 10 to 100 % between stacks, by 11 % in the median between two collections of one kernel (vLLM's
# Triton kernel on a B200, releases 0.22 and 0.24), by 2 to 6 % from its own fit
_SAME_KERNELS = {SAME_STACK: 0.1, ENGINE_STACK: 0.45}

_SIZES: dict[str, ErrorSize] = {
    "gemm": ErrorSize(0.045, 0.065, {"launch": 0.08, "idle": 0.12}),
    "prefill": ErrorSize(0.10, 0.03, {"launch": 0.014}, _SAME_KERNELS, 0.6),
    "decode": ErrorSize(0.16, 0.045, {"launch": 0.017}, _SAME_KERNELS, 0.6),
    "mla_decode": ErrorSize(0.05, 0.045, {"launch": 0.017}, _SAME_KERNELS, 0.6),
    "elementwise": ErrorSize(0.08, 0.08),
    "collective": ErrorSize(0.10, 0.08),
    # stacks differ by 5 to 40 % in the median, two versions of SGLang and of vLLM on Hopper by 2 to 7 %
    # no rows of a second GPU or stack: priors as wide as those of a prompt's attention
    "delta_net": ErrorSize(0.10, 0.05),
    "experts": ErrorSize(0.085, 0.035, {"compute": 0.03}, {SAME_STACK: 0.15, ENGINE_STACK: 0.5}),
}
ERROR_SIZES: Mapping[str, ErrorSize] = MappingProxyType(_SIZES)
"""Errors by operator; between stacks, attention kernels step apart by their choice of kernel."""


def add_errors(operator: str, factors: Mapping[str, float], size: ErrorSize) -> None:
    """Add the errors of an operator whose cost model is defined elsewhere, before anything is predicted.

    ``factors`` are the prior standard deviations by loading, as in :data:`ERROR_FACTORS` without the operator's name.
    ValueError for an operator that is known.
    """
    if operator in ERROR_SIZES:
        raise ValueError(f"the errors of {operator!r} are known already")
    _SIZES[operator] = size
    _FACTORS.update({f"{operator} {name}": sd for name, sd in factors.items()})
    _INDEX.update({name: i for i, name in enumerate(_FACTORS)})


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
    """Return the errors of an estimate's n times; ``scales`` are those of :func:`error_scales`.

    Loadings "launch", "compute" and "memory" also count for the machine's error factors.
    """
    scale, shape, dtype = scales.others, np.shape(e.time), e.coordinates.dtype
    sizes = ERROR_SIZES[e.operator]
    names = [f"machine {name}" for name in e.loadings if f"machine {name}" in ERROR_FACTORS]
    loadings = [e.loadings[name.removeprefix("machine ")] for name in names]
    factors = [scales.machine] * len(names) + [scales.kernels] * len(e.loadings)
    names += [f"{e.operator} {name}" for name in e.loadings]
    loadings += e.loadings.values()
    systematic = np.empty((len(names), *shape), dtype=dtype)
    for i, loading in enumerate(loadings):
        systematic[i] = loading
    systematic = systematic.reshape(len(names), -1)
    sds = [factor * ERROR_FACTORS[name] for factor, name in zip(factors, names, strict=True)]
    systematic *= np.array(sds, dtype=dtype)[:, None]
    shares = {**e.loadings, **e.noise}
    independent: Any = sizes.independent**2
    for name, sd in sizes.by_share.items():
        independent = independent + (sd * shares[name]) ** 2
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
    return Uncertainty(tuple(names), systematic, correlated, independent, e.coordinates, e.kind)


def _column(value: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    """Return a number, or an array of a shape, as a flat array of its own."""
    out = np.empty(shape, dtype=dtype)
    out[...] = value
    return out.reshape(-1)


def level_scale(level: float) -> float:
    """Return the half-width of an interval at a level over that of a 90 % interval, as of a normal distribution;
    InputError for a level outside (0, 1).
    """
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
