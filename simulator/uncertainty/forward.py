"""How sure a pass of many operators is, and a ratio of two: sums of :class:`Uncertainty` by share of the time.

Use :class:`PassUncertainty` for whole passes, :func:`ratio_half` for single operators at two shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.arrays import Array
from simulator.uncertainty.error_model import COVERAGE_FACTOR, Posterior, Uncertainty, correlation, level_scale

_CHUNK = 512


@dataclass(frozen=True)
class PassUncertainty:
    """What the logs of W total times are unsure of; each is a sum over G groups of operators that have one error. All
    but ``kind`` are weighted by share of the time; ``local`` and ``own`` with the posterior's factors on them."""

    shared: Array  # (W, c) of COLUMNS
    local: Array  # (W, G)
    own: Array  # (W, G) standard deviations
    whole: Array  # (W, G) standard deviations of all of a group's error
    place: Array  # (W, G, 3)
    kind: NDArray[np.intp]  # (G,)
    posterior: Posterior | None = None

    @cached_property
    def _scale(self) -> Any:
        return 1.0 if self.posterior is None else self.posterior.scale

    def _alike(self, a: Any, b: Any) -> Array:
        """(W,) covariance of the local errors of some passes with others."""
        out = np.zeros(len(self.local[a]))
        for kind in np.unique(self.kind[self.local.any(axis=0)]):
            at = np.flatnonzero(self.kind == kind)
            for first in range(0, len(out), _CHUNK):
                i, j = a[first : first + _CHUNK, None], b[first : first + _CHUNK, None]
                together = correlation(self.place[i, at], self.place[j, at])
                out[first : first + _CHUNK] += np.einsum("wg,wgh,wh->w", self.local[i, at], together, self.local[j, at])
        return out

    @cached_property
    def _local_variance(self) -> Array:
        every = np.arange(len(self.local))
        return self._alike(every, every)

    def covariance(self, shared: Array, local: Array, place: Array, kind: NDArray[np.intp]) -> Array:
        """(W, n) with the errors of n times of operators, as :class:`Uncertainty` has them, of kinds (n,)."""
        out = self.shared @ shared.T
        for group, own in enumerate(self.kind):
            alike = local * (kind == own)
            if self.local[:, group].any() and alike.any():
                out += correlation(self.place[:, group], place) * self.local[:, group, None] * alike
        return np.asarray(out)

    @cached_property
    def _measured(self) -> Array:
        """(W, n) covariance with the measured times."""
        if self.posterior is None:
            return np.zeros((len(self.shared), 0))
        p = self.posterior
        return self.covariance(p.shared * p.scale, p.local * np.sqrt(p.noise[p.kind]), p.place, p.kind)

    def _less_measured(self, variance: Array, c: Array) -> Array:
        if self.posterior is None:
            return variance
        return np.asarray(np.maximum(variance - np.einsum("ij,ij->i", c @ self.posterior.inverse, c), 0.0))

    def variance(self) -> Array:
        """(W,) of the log of each time."""
        local = self._local_variance + (self.own * self.own).sum(axis=1)
        return self._less_measured((self.shared * self.shared * self._scale).sum(axis=1) + local, self._measured)

    def ratio_variance(self, other: NDArray[np.intp], same: Array) -> Array:
        """(W,) of the log of the ratio of each time to that of pass ``other`` (W,).

        ``same`` (W, G): 1 where a group is the same in both; less where only its number changed, by which all its
        errors differ; 0 where its shape did, so that its own error is another.
        """
        shared = self.shared[other] - self.shared
        local = self._local_variance[other] + self._local_variance
        local = np.maximum(local - 2.0 * self._alike(other, np.arange(len(other))), 0.0)
        dense, covered = self.own[other], same > 0.0
        own = dense * dense + self.own * self.own - 2.0 * covered * dense * self.own
        apart = 2.0 * np.where(covered, 1.0 - same, 0.0) * self.whole[other] * self.whole
        variance = (shared * shared * self._scale).sum(axis=1) + local + np.maximum(own, 0.0).sum(axis=1)
        return self._less_measured(variance + apart.sum(axis=1), self._measured[other] - self._measured)

    def half(self, variance: Array, level: float) -> Array:
        """Log half-width of an interval at a level."""
        coverage_factor = COVERAGE_FACTOR if self.posterior is None else self.posterior.coverage_factor
        return np.asarray(coverage_factor * level_scale(level) * np.sqrt(variance))


def ratio_half(a: Uncertainty, b: Uncertainty, level: float = 0.9, posterior: Posterior | None = None) -> Array:
    """Log half-width (n,) of the intervals of ratios of times, row by row, of one kind of operator at other shapes."""
    own, whole = (np.sqrt(np.concatenate(v))[:, None] for v in ([a.own, b.own], [a.variance, b.variance]))
    shared, local, place = (np.concatenate(v) for v in ([a.wide(), b.wide()], [a.local, b.local], [a.place, b.place]))
    both = PassUncertainty(shared, local[:, None], own, whole, place[:, None], np.array([a.kind]), posterior)
    other = np.roll(np.arange(len(shared)), len(a.own))
    return both.half(both.ratio_variance(other, np.zeros((len(shared), 1)))[: len(a.own)], level)
