"""The local update: the posterior of the error model given y = log(measured / predicted) of n measured times.

s are factors on the variance of an error factor, g on the other variances by kind of operator; both are learned.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from simulator.arrays import Array
from simulator.codes import Kind
from simulator.hardware.profile import HardwareProfile
from simulator.operators import MOST_CODES
from simulator.uncertainty.factors import COVERAGE_FACTOR, ERROR_FACTORS, FACTOR_INDEX, Uncertainty, correlation

MOST_LOG = 1.5
"""Log of measured over predicted beyond which a measured time counts no further: attention of two stacks differs by
up to a factor of 3."""

HOST_KIND = int(Kind.HOST)
"""Kind of rows that time the host: their scatter is no evidence about kernels."""

PRIOR_FACTORS, PRIOR_NOISE, PRIOR_ROWS = 4.0, 20.0, 30
"""Weight of the prior: in error factors for s, in rows for g, in rows for the coverage factor."""

_ROUNDS = 9


def _coverage_factor(z: Array) -> float:
    """Return the coverage factor from z-scores, shrunk to the prior's by :data:`PRIOR_ROWS` rows."""
    count = len(z)
    if not count:
        return COVERAGE_FACTOR
    at = min(count - 1, int(np.ceil(0.9 * (count + 1))) - 1)
    return float((count * np.sort(z)[at] + PRIOR_ROWS * COVERAGE_FACTOR) / (count + PRIOR_ROWS))


def _causes() -> NDArray[np.intp]:
    """Return the number of the cause of each error factor: those of one share the variance that the data give them."""
    causes = [" ".join(name.split()[:2]) for name in ERROR_FACTORS]
    return np.array([causes.index(cause) for cause in causes])


@dataclass(frozen=True)
class Posterior:
    """The error model after n times were measured."""

    scale: Array  # (c,) variance of the error of each of ERROR_FACTORS, the prior's being 1
    noise: Array  # factor on correlated and independent variance, by kind of operator
    coverage_factors: Array  # half-width of a 90 % interval over the standard deviation, by kind of operator; last: all
    systematic: Array  # (n, c) of the measured times
    correlated: Array  # (n,)
    coordinates: Array  # (n, 3)
    kind: NDArray[np.intp]  # (n,)
    weights: Array  # (n,) inverse covariance times log(measured / predicted)
    inverse: Array  # (n, n) inverse covariance
    left_out: Array  # (2, n) log error of each measured time predicted from the others, and its standard deviation

    @classmethod
    def of(
        cls,
        systematic: Array,
        correlated: Array,
        independent: Array,
        coordinates: Array,
        kind: NDArray[np.intp],
        log_ratio: Array,
    ) -> Posterior:
        """Return the posterior given n measured times: rows of :class:`Uncertainty` (``systematic`` (n, c) of all error
        factors) and log(measured / predicted). Outliers count less (Student's t of 4 degrees). Expectation-maximisation
        also estimates how far this stack differs (the variance of each error factor; the prior counts as
        :data:`PRIOR_FACTORS` factors) and how noisy each kind of operator is (the prior counts as :data:`PRIOR_NOISE`
        rows). Z-scores of each row, predicted from the others, give the coverage factor of its kind, shrunk to the
        prior's by :data:`PRIOR_ROWS` rows: rows of one kind of operator say nothing about the tails of another."""
        y, n, factors = np.clip(log_ratio, -MOST_LOG, MOST_LOG), len(log_ratio), systematic.shape[1]
        s, w, g = np.ones(factors), np.ones(n), np.ones(MOST_CODES)
        similar = correlation(coordinates, coordinates) * np.outer(correlated, correlated) * (kind[:, None] == kind)
        e, cause = np.maximum(independent, 1e-6), _causes()
        for i in range(_ROUNDS + 1):
            of_row = g[kind]
            noise = of_row * e / w
            # rows are correlated within one kind
            inverse = np.linalg.inv((systematic * s) @ systematic.T + of_row * similar + np.diag(noise))
            a = inverse @ y
            if i == _ROUNDS:
                break
            rest = noise * a  # what is left of each row
            w = np.clip(5.0 / (4.0 + rest * rest / (of_row * e)), 1e-3, 1.0)
            if 2 <= i < _ROUNDS - 3:
                explained = np.einsum("ij,ij->j", systematic, inverse @ systematic)
                square = (s * (systematic.T @ a)) ** 2 + s - s * s * explained
                total, members = np.bincount(cause, square), np.bincount(cause)
                s = ((PRIOR_FACTORS + total) / (PRIOR_FACTORS + members))[cause]
                left = np.bincount(kind, w * (rest * rest + noise - noise * noise * np.diag(inverse)) / e, len(g))
                g = (PRIOR_NOISE + left) / (PRIOR_NOISE + np.bincount(kind, minlength=len(g)))
        precision = np.diag(inverse)
        left_out = np.stack([a / precision, np.sqrt(np.maximum(1.0 / precision - noise + noise * w, 1e-12))])
        z = np.abs(left_out[0]) / left_out[1]
        chosen = [kind == k for k in range(len(g))] + [kind != HOST_KIND]
        coverage = np.array([_coverage_factor(z[rows]) for rows in chosen])
        return cls(s, g, coverage, systematic, correlated, coordinates, kind, a, inverse, left_out)

    @property
    def coverage_factor(self) -> float:
        """Half-width of a 90 % interval over the standard deviation, from the rows of all operators."""
        return float(self.coverage_factors[-1])

    def covariance(self, systematic: Array, correlated: Array, coordinates: Array, kind: int) -> Array:
        """Return (m, n), the covariance of m times of one kind with the measured ones."""
        near = correlation(coordinates, self.coordinates)
        similar = near * correlated[:, None] * (self.correlated * (self.kind == kind))
        return np.asarray((systematic * self.scale) @ self.systematic.T + self.noise[kind] * similar)

    def at(self, uncertainty: Uncertainty) -> tuple[Array, Array]:
        """Return the mean (m,) and the variance of the log error of times."""
        systematic, u = uncertainty.wide(), uncertainty
        c = self.covariance(systematic, u.correlated, u.coordinates, u.kind)
        prior = (systematic * systematic) @ self.scale + self.noise[u.kind] * (u.correlated**2 + u.independent)
        return c @ self.weights, np.maximum(prior - np.einsum("ij,ij->i", c @ self.inverse, c), 1e-8)

    @property
    def factors(self) -> tuple[Array, Array]:
        """Mean (c,) and standard deviation of each error factor, log units."""
        c = self.scale[:, None] * self.systematic.T
        variance = self.scale - np.einsum("ij,ij->i", c @ self.inverse, c)
        sd = np.array(list(ERROR_FACTORS.values()))
        return sd * (c @ self.weights), sd * np.sqrt(np.maximum(variance, 0.0))

    def factor(self, name: str) -> tuple[float, float]:
        """Mean and standard deviation of one error factor, log units."""
        mean, sd = self.factors
        return float(mean[FACTOR_INDEX[name]]), float(sd[FACTOR_INDEX[name]])


@lru_cache(maxsize=16)
def posterior_of(hw: HardwareProfile) -> Posterior | None:
    """Return the posterior of a profile's local update, None without one."""
    if hw.local_update is None:
        return None
    arrays = {name: np.asarray(values) for name, values in hw.local_update.arrays.items()}
    systematic = np.zeros((len(arrays["log_ratio"]), len(ERROR_FACTORS)))
    for name, column in zip(hw.local_update.factors, arrays["systematic"].astype(np.float64).T, strict=True):
        if name in FACTOR_INDEX:  # a later version may know more factors
            systematic[:, FACTOR_INDEX[name]] = column
    correlated, independent, coordinates, log_ratio = (
        arrays[name].astype(np.float64) for name in ("correlated", "independent", "coordinates", "log_ratio")
    )
    return Posterior.of(systematic, correlated, independent, coordinates, arrays["kind"].astype(np.intp), log_ratio)
