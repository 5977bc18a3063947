"""How sure a time is: one error model for operators, passes, ratios and re-anchoring (docs/model.md, "How sure").

log(true / predicted) = shared + local + own. *Shared* errors are what differs between stacks and labs: one number for
each of :data:`ERROR_FACTORS`, of a prior spread; every time of a stack has it in proportion to its share of it. *Local*
errors are alike for sizes that are alike. A shape's *own* error is nobody else's. So a time, a ratio of times and a
pass are rows of one linear model: what two times have in common cancels in their ratio exactly as far as it is common,
and measured times (:class:`Posterior`) move and narrow all others.

Use :meth:`Uncertainty.of` in a cost model, :func:`with_intervals` to turn predictions into times with intervals,
:class:`PassUncertainty` for sums of operators.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from statistics import NormalDist
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simulator.arguments import LEVEL, number
from simulator.arrays import Array
from simulator.display import Displayed, table_html
from simulator.units import seconds, seconds_between
from simulator.workload import Kind

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile

Spread = tuple[float, float]

BOTTLENECKS: tuple[str, ...] = ("compute", "memory", "l2", "latency", "launch", "host", "link")
"""Limits an operator can sit on; the index is the code in ``OperatorTimes.bound``."""

# fmt: off
ERROR_FACTORS: Mapping[str, float] = MappingProxyType({
    # of the machine: launches, clocks and memory of this very device, in all its operators
    "machine launch": 0.10, "machine compute": 0.04, "machine memory": 0.015,
    # of one operator's kernels; with those of the machine: launch .20, compute .06, memory .034
    "gemm launch": 0.17, "gemm compute": 0.045, "gemm memory": 0.03, "gemm l2": 0.60, "gemm latency": 0.10,
    "gemm feed": 0.09, "gemm idle 128x256": 0.10, "gemm idle 128x128": 0.10, "gemm idle 64x128": 0.10,
    "gemm alignment": 0.25, "gemm sparse24": 0.10, "gemm blocks": 0.10, "gemm quantised": 0.25, "gemm spmv": 0.04,
    "gemm default": 0.20, "gemm generic": 0.30,
    "prefill launch": 0.42, "prefill compute": 0.19, "prefill memory": 0.44, "prefill latency": 0.48,
    "prefill occupancy": 0.5, "prefill sparse": 0.15, "prefill default": 0.20,
    "prefill generic": 0.20, "prefill kernel": 0.12,
    "decode launch": 0.21, "decode memory": 0.12, "decode latency": 0.3, "decode merge": 0.5, "decode sparse": 0.10,
    "decode default": 0.20, "decode generic": 0.20, "decode kernel": 0.12,
    "mla_decode launch": 0.08, "mla_decode memory": 0.03, "mla_decode latency": 0.12, "mla_decode compute": 0.08,
    "mla_decode merge": 0.2, "mla_decode sparse": 0.10,
    "mla_decode default": 0.20, "mla_decode generic": 0.20, "mla_decode kernel": 0.12,
    "elementwise launch": 0.15, "elementwise memory": 0.10, "elementwise l2": 0.20, "elementwise default": 0.28,
    "elementwise added": 0.30,
    "collective launch": 0.24, "collective link": 0.08, "collective step": 0.33, "collective pcie": 0.4,
    "collective topology": 0.5,
    "experts launch": 0.35, "experts compute": 0.38, "experts memory": 0.07, "experts io": 0.5, "experts padding": 0.25,
    "experts skew": 0.05, "experts alignment": 0.4, "experts quantised": 0.25, "experts scaled": 0.2,
    "experts default": 0.2, "experts generic": 0.3,
    "host": 0.43,
})
# fmt: on
"""Ways in which stacks differ -> prior standard deviation of the log of what they change; from leaving stacks out."""

FACTOR_INDEX: Mapping[str, int] = MappingProxyType({name: i for i, name in enumerate(ERROR_FACTORS)})
_SD = np.array(list(ERROR_FACTORS.values()))
# columns of one cause share the variance that the data give them
_CAUSES = [" ".join(name.split()[:2]) for name in ERROR_FACTORS]
_GROUP = np.array([_CAUSES.index(cause) for cause in _CAUSES])

COVERAGE_FACTOR = 1.75
"""Half-width of a 90 % interval over the standard deviation: tails are heavier than a normal's 1.645."""

LENGTH_SCALE_OCTAVES = 1.5
"""Distance at which the correlation of local errors has fallen to 1/e."""

MOST_LOG = 1.5
"""Log of measured over predicted beyond which a measured time counts no further: attention of two stacks differs by
up to a factor of 3."""

BEYOND_PER_OCTAVE = 0.06
"""Log standard deviation that an octave outside the measured sizes adds."""

HOST_KIND = int(Kind.HOST)
"""In place of a kind of operator: rows that time the host. How they scatter says nothing of any kernel."""


@dataclass(frozen=True, repr=False)
class OperatorTimes(Displayed):
    """Times of operators, arrays of one shape, s."""

    seconds: NDArray[np.float64]  # predicted kernel time, launch overhead inside a CUDA graph included
    lower: NDArray[np.float64]  # interval of that prediction at the level asked for
    upper: NDArray[np.float64]
    roofline_s: NDArray[np.float64]  # max(FLOP / datasheet peak, bytes / datasheet bandwidth)
    bound: NDArray[Any]  # int8: index into BOUNDS
    uncertainty: Uncertainty | None = field(default=None, kw_only=True, repr=False)  # where it was asked for

    @property
    def bottlenecks(self) -> NDArray[np.str_]:
        """Names of the limits."""
        out: NDArray[np.str_] = np.array(BOTTLENECKS)[self.bound]
        return out

    def _title(self) -> str:
        times, many = self.seconds, np.size(self.seconds)
        if many != 1:
            ends = f", {seconds(float(times.min()))} to {seconds(float(times.max()))}" if many else ""
            return f"{' x '.join(map(str, times.shape))} times{ends}"
        one = seconds_between(times.item(), self.lower.item(), self.upper.item())
        return f"{one}, {self.bottlenecks.item()}-bound"

    def _columns(self) -> Mapping[str, Any]:
        """The arrays that were filled in, flat, limits by their names."""
        held = {f.name: getattr(self, f.name) for f in fields(self) if f.repr} | {"bound": self.bottlenecks}
        return {name: np.ravel(values) for name, values in held.items() if np.shape(values) == self.seconds.shape}

    def _html(self) -> str:
        ends = {"lower": "lower_s", "upper": "upper_s"}
        return table_html({ends.get(name, name): values for name, values in self._columns().items()})

    def to_dict(self) -> dict[str, Any]:
        """The arrays that were filled in as lists, s, limits by their names, and what holds for all."""
        held = super().to_dict() | {"bound": self.bottlenecks.tolist()}
        return {name: values for name, values in held.items() if values != []}


@dataclass(frozen=True)
class Uncertainty:
    """What the logs of n times are unsure of, in units of one standard deviation of each cause."""

    names: tuple[str, ...]  # of COLUMNS, c of them
    shared: Array  # (c, n) of each column, its prior spread multiplied in
    local: Array  # (n,) of the local error
    own: Array  # (n,) variance of each one's own error
    place: Array  # (n, 3) log2 of sizes, octaves
    kind: int = 0  # local errors are alike within one kind of operator

    @classmethod
    def of(
        cls,
        operator: str,
        shares: Mapping[str, Any],
        *,
        spread: Spread,
        local: Any,
        own: Any,
        place: Array,
        kind: int = 0,
    ) -> Uncertainty:
        """The doubt of an operator's times, ``shares`` (n,) of which are due to each of its columns.

        ``spread`` has the factors on the prior (``HardwareProfile.error_scales``). Shares "launch", "compute" and
        "memory" also count for the machine's.
        """
        names = [f"machine {name}" for name in shares if f"machine {name}" in ERROR_FACTORS]
        values = [shares[name.removeprefix("machine ")] for name in names]
        names += [f"{operator} {name}" for name in shares]
        values += shares.values()
        size = place.shape[0]
        shared = np.empty((len(names), size), dtype=place.dtype)
        for row, name, value in zip(shared, names, values, strict=True):
            row[:] = value if np.ndim(value) == 0 else np.ravel(value)
            row *= spread[0] * ERROR_FACTORS[name]
        local, own = (np.broadcast_to(np.asarray(v, dtype=place.dtype).ravel(), (size,)) for v in (local, own))
        return cls(tuple(names), shared, local * spread[1], own * spread[1] ** 2, place, kind)

    @property
    def variance(self) -> Array:
        """(n,) of the logs."""
        out = self.local * self.local + self.own
        for column in self.shared:  # in this order whatever n is, so that no chunk rounds another way
            out = out + column * column
        return np.asarray(out)

    def wide(self) -> Array:
        """(n, len(COLUMNS)): ``shared`` with a column for each of :data:`ERROR_FACTORS`."""
        out = np.zeros((self.shared.shape[1], len(ERROR_FACTORS)))
        out[:, [FACTOR_INDEX[name] for name in self.names]] = self.shared.T
        return out

    def take(self, rows: Any) -> Uncertainty:
        """Of some of the times."""
        return Uncertainty(
            self.names, self.shared[:, rows], self.local[rows], self.own[rows], self.place[rows], self.kind
        )

    def columns(self) -> dict[str, Array]:
        """Its arrays by name, a row a time, ``shared`` :meth:`wide`."""
        arrays = {"local": self.local, "own": self.own, "place": self.place}
        return {"shared": self.wide(), **{name: np.asarray(a, dtype=np.float64) for name, a in arrays.items()}}

    @classmethod
    def from_columns(cls, columns: Mapping[str, Array], kind: int) -> Uncertainty:
        """What :meth:`columns` gave."""
        shared, local, own, place = (columns[name] for name in ("shared", "local", "own", "place"))
        return cls(tuple(ERROR_FACTORS), shared.T, local, own, place, kind)


def level_scale(level: float, known: float = 0.9) -> float:
    """Half-width of an interval at a level over that at a known level, as of a normal distribution; InputError for a
    level outside (0, 1).

    >>> level_scale(0.9), round(level_scale(0.99), 3)
    (1.0, 1.566)
    """
    return _level_scale(number("level", level, LEVEL), known)


@lru_cache(maxsize=64)
def _level_scale(level: float, known: float) -> float:
    normal = NormalDist()
    return normal.inv_cdf(0.5 + 0.5 * level) / normal.inv_cdf(0.5 + 0.5 * known)


def correlation(a: Array, b: Array) -> Array:
    """Correlation (..., len(a), len(b)) of local errors at places (..., n, 3)."""
    far = sum(np.abs(a[..., :, None, axis] - b[..., None, :, axis]) for axis in range(a.shape[-1]))
    return np.asarray(np.exp(far * (-1.0 / LENGTH_SCALE_OCTAVES)))


def octaves_outside(sizes: Array, low: Array, high: Array) -> Array:
    """Octaves (n,) by which sizes (n, 3), log2, lie outside a measured range, added up over the axes."""
    return np.asarray((np.maximum(low - sizes, 0.0) + np.maximum(sizes - high, 0.0)).sum(axis=1))


def with_intervals(
    seconds: Array, floor: Any, uncertainty: Uncertainty, level: float, posterior: Posterior | None = None
) -> tuple[Array, Array, Array]:
    """Times of any shape, lower and upper ends at a level, none below the ``floor`` of physics; n rows of doubt."""
    variance, half = uncertainty.variance, COVERAGE_FACTOR * level_scale(level)
    if posterior is not None:
        shift, variance = posterior.at(uncertainty)
        seconds, half = seconds * np.exp(shift).reshape(seconds.shape), posterior.coverage_factor * level_scale(level)
    width = np.exp(half * np.sqrt(variance)).astype(seconds.dtype).reshape(seconds.shape)
    seconds = np.maximum(seconds, floor)
    return seconds, np.maximum(seconds / width, floor), seconds * width


@dataclass(frozen=True)
class Posterior:
    """The error model after some times were measured; what :meth:`of` finds, ready to be asked."""

    scale: Array  # (c,) variance of the error of each of COLUMNS, the prior's being 1
    noise: Array  # factor on local and own variance, by kind of operator
    coverage_factor: float  # half-width of a 90 % interval over the standard deviation
    shared: Array  # (n, c) of the measured times
    local: Array  # (n,)
    place: Array  # (n, 3)
    kind: NDArray[np.intp]  # (n,)
    weights: Array  # (n,) inverse covariance times log(measured / predicted)
    inverse: Array  # (n, n) inverse covariance
    left_out: Array  # (2, n) log error of each measured time as the others predict it, and the deviation they expect

    @classmethod
    def of(
        cls, shared: Array, local: Array, own: Array, place: Array, kind: NDArray[np.intp], log_ratio: Array
    ) -> Posterior:
        """From n measured times: rows of :class:`Uncertainty` (``shared`` (n, c) of all COLUMNS), log(measured /
        predicted).

        Outliers count less (Student's t of 4 degrees). By expectation-maximisation the data also say how much this
        stack differs (the variance of each column, the prior worth :data:`PRIOR_COLUMNS` columns) and how noisy each
        kind of operator is (the prior worth :data:`PRIOR_NOISE` rows); z-scores of each row left out give the
        multiplier, shrunk to the prior's by :data:`PRIOR_ROWS` rows.
        """
        y, n, columns = np.clip(log_ratio, -MOST_LOG, MOST_LOG), len(log_ratio), shared.shape[1]
        s, w, factor = np.ones(columns), np.ones(n), np.ones(max(Kind) + 1)
        alike = correlation(place, place) * np.outer(local, local) * (kind[:, None] == kind)
        e = np.maximum(own, 1e-6)
        for i in range(_ROUNDS + 1):
            g = factor[kind]
            noise = g * e / w
            inverse = np.linalg.inv((shared * s) @ shared.T + g * alike + np.diag(noise))  # alike: rows of one kind
            a = inverse @ y
            if i == _ROUNDS:
                break
            r = noise * a  # what is left of each row
            w = np.clip(5.0 / (4.0 + r * r / (g * e)), 1e-3, 1.0)
            if 2 <= i < _ROUNDS - 3:
                square = (s * (shared.T @ a)) ** 2 + s - s * s * np.einsum("ij,ij->j", shared, inverse @ shared)
                total, count = np.bincount(_GROUP, square), np.bincount(_GROUP)
                s = ((PRIOR_COLUMNS + total) / (PRIOR_COLUMNS + count))[_GROUP]
                left = np.bincount(kind, w * (r * r + noise - noise * noise * np.diag(inverse)) / e, len(factor))
                factor = (PRIOR_NOISE + left) / (PRIOR_NOISE + np.bincount(kind, minlength=len(factor)))
        precision = np.diag(inverse)
        left_out = np.stack([a / precision, np.sqrt(np.maximum(1.0 / precision - noise + noise * w, 1e-12))])
        z = np.sort((np.abs(left_out[0]) / left_out[1])[kind != HOST_KIND])
        n, coverage_factor = len(z), COVERAGE_FACTOR
        if n:
            at = min(n - 1, int(np.ceil(0.9 * (n + 1))) - 1)
            coverage_factor = float((n * z[at] + PRIOR_ROWS * COVERAGE_FACTOR) / (n + PRIOR_ROWS))
        return cls(s, factor, coverage_factor, shared, local, place, kind, a, inverse, left_out)

    def covariance(self, shared: Array, local: Array, place: Array, kind: int) -> Array:
        """(m, n) of m times with the measured ones."""
        alike = correlation(place, self.place) * local[:, None] * (self.local * (self.kind == kind))
        return np.asarray((shared * self.scale) @ self.shared.T + self.noise[kind] * alike)

    def at(self, uncertainty: Uncertainty) -> tuple[Array, Array]:
        """Mean (m,) and variance of the log error of times."""
        shared = uncertainty.wide()
        c = self.covariance(shared, uncertainty.local, uncertainty.place, uncertainty.kind)
        prior = (shared * shared) @ self.scale + self.noise[uncertainty.kind] * (uncertainty.local**2 + uncertainty.own)
        return c @ self.weights, np.maximum(prior - np.einsum("ij,ij->i", c @ self.inverse, c), 1e-8)

    @property
    def columns(self) -> tuple[Array, Array]:
        """Mean (c,) and standard deviation of the error of each column, log units."""
        c = self.scale[:, None] * self.shared.T
        variance = self.scale - np.einsum("ij,ij->i", c @ self.inverse, c)
        return _SD * (c @ self.weights), _SD * np.sqrt(np.maximum(variance, 0.0))


PRIOR_COLUMNS, PRIOR_NOISE, PRIOR_ROWS, _ROUNDS = 4.0, 20.0, 30, 9


@lru_cache(maxsize=16)
def posterior_of(hw: HardwareProfile) -> Posterior | None:
    """The error model of a profile that local times were anchored to, else None."""
    if hw.local_update is None:
        return None
    a = hw.local_update.arrays
    shared = np.zeros((len(a["log_ratio"]), len(ERROR_FACTORS)))
    for name, column in zip(hw.local_update.factors, np.asarray(a["systematic"], dtype=np.float64).T, strict=True):
        if name in FACTOR_INDEX:
            shared[:, FACTOR_INDEX[name]] = column
    local, own, place, ratio = (
        np.asarray(a[name], dtype=np.float64) for name in ("correlated", "independent", "coordinates", "log_ratio")
    )
    return Posterior.of(shared, local, own, place, np.asarray(a["kind"], dtype=np.intp), ratio)
