"""How sure a pass of many operators is, and a ratio of two: sums of :class:`Doubt` by share of the time.

Use :class:`PassDoubt` for whole passes, :func:`ratio_half` for single operators at two shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.kernels.spread import MULTIPLIER, Doubt, F, Posterior, level_scale, near

_CHUNK = 512


@dataclass(frozen=True)
class PassDoubt:
    """What the logs of W total times are unsure of; each is a sum over G groups of operators that have one error. All
    but ``kind`` are weighted by share of the time; ``local`` and ``own`` with the posterior's factors on them."""

    shared: F  # (W, c) of COLUMNS
    local: F  # (W, G)
    own: F  # (W, G) standard deviations
    whole: F  # (W, G) standard deviations of all of a group's error
    place: F  # (W, G, 3)
    kind: NDArray[np.intp]  # (G,)
    posterior: Posterior | None = None

    @cached_property
    def _scale(self) -> Any:
        return 1.0 if self.posterior is None else self.posterior.scale

    def _alike(self, a: Any, b: Any) -> F:
        """(W,) covariance of the local errors of some passes with others."""
        out = np.zeros(len(self.local[a]))
        for kind in np.unique(self.kind[self.local.any(axis=0)]):
            at = np.flatnonzero(self.kind == kind)
            for first in range(0, len(out), _CHUNK):
                i, j = a[first : first + _CHUNK, None], b[first : first + _CHUNK, None]
                together = near(self.place[i, at], self.place[j, at])
                out[first : first + _CHUNK] += np.einsum("wg,wgh,wh->w", self.local[i, at], together, self.local[j, at])
        return out

    @cached_property
    def _local_variance(self) -> F:
        every = np.arange(len(self.local))
        return self._alike(every, every)

    def covariance(self, shared: F, local: F, place: F, kind: NDArray[np.intp]) -> F:
        """(W, n) with the errors of n times of operators, as :class:`Doubt` has them, of kinds (n,)."""
        out = self.shared @ shared.T
        for group, own in enumerate(self.kind):
            alike = local * (kind == own)
            if self.local[:, group].any() and alike.any():
                out += near(self.place[:, group], place) * self.local[:, group, None] * alike
        return np.asarray(out)

    @cached_property
    def _measured(self) -> F:
        """(W, n) covariance with the measured times."""
        if self.posterior is None:
            return np.zeros((len(self.shared), 0))
        p = self.posterior
        return self.covariance(p.shared * p.scale, p.local * np.sqrt(p.noise[p.kind]), p.place, p.kind)

    def _less_measured(self, variance: F, c: F) -> F:
        if self.posterior is None:
            return variance
        return np.asarray(np.maximum(variance - np.einsum("ij,ij->i", c @ self.posterior.inverse, c), 0.0))

    def variance(self) -> F:
        """(W,) of the log of each time."""
        local = self._local_variance + (self.own * self.own).sum(axis=1)
        return self._less_measured((self.shared * self.shared * self._scale).sum(axis=1) + local, self._measured)

    def ratio_variance(self, other: NDArray[np.intp], same: F) -> F:
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

    def half(self, variance: F, level: float) -> F:
        """Log half-width of an interval at a level."""
        multiplier = MULTIPLIER if self.posterior is None else self.posterior.multiplier
        return np.asarray(multiplier * level_scale(level) * np.sqrt(variance))


def ratio_half(a: Doubt, b: Doubt, level: float = 0.9, posterior: Posterior | None = None) -> F:
    """Log half-width (n,) of the intervals of ratios of times, row by row, of one kind of operator at other shapes."""
    own, whole = (np.sqrt(np.concatenate(v))[:, None] for v in ([a.own, b.own], [a.variance, b.variance]))
    shared, local, place = (np.concatenate(v) for v in ([a.wide(), b.wide()], [a.local, b.local], [a.place, b.place]))
    both = PassDoubt(shared, local[:, None], own, whole, place[:, None], np.array([a.kind]), posterior)
    other = np.roll(np.arange(len(shared)), len(a.own))
    return both.half(both.ratio_variance(other, np.zeros((len(shared), 1)))[: len(a.own)], level)
