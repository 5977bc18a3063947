"""Prediction intervals by regime: multipliers from shapes the fit did not see, by m and by what the time is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simulator.kernels.gemm_core import Core, CoreTime

if TYPE_CHECKING:
    from simulator.hardware.parts import Section

F = NDArray[np.floating[Any]]

REGIMES: tuple[str, ...] = tuple(
    f"{m} {part}" for m in ("m<=16", "m<=256", "m>256") for part in ("launch", "mixed", "work")
)
"""By m, and by the share of the fixed time in the prediction: above 1/2, above 1/8, below."""

PAIR_EDGES: tuple[float, ...] = (0.26, 0.51, 1.01, 2.01)
"""Octaves between two shapes (|log2 m ratio| + |log2 n ratio| + |log2 k ratio|) that part the regimes of a ratio of two times."""
PAIR_REGIMES: tuple[str, ...] = ("pair 1/4 octave", "pair 1/2 octave", "pair 1 octave", "pair 2 octaves", "pair far")

DEFAULT_SPREAD = 1.35
"""Factor of the 90 % interval either way without a calibration: 5.5-14.6 % between stacks of one GPU, and constants borrowed from
another."""


@dataclass(frozen=True)
class Bands:
    """Log multipliers of the interval by regime, at one level."""

    low: F
    high: F
    level: float

    def factors(self, m: F, parts: CoreTime, core: Core, level: float, widen: float = 0.0) -> tuple[F, F]:
        """Multipliers of shapes; another level than the calibrated one scales them as a normal distribution would.

        Parameters
        ----------
        m : float array (x,)
        parts, core
            Of these shapes.
        level : float
        widen : float
            Log half-width added either way, for what no fit has seen.

        Returns
        -------
        low, high : arrays (x,)
        """
        scale = (
            1.0
            if level == self.level
            else NormalDist().inv_cdf(0.5 + 0.5 * level) / NormalDist().inv_cdf(0.5 + 0.5 * self.level)
        )
        low, high = (np.exp(v * scale + w).astype(m.dtype) for v, w in ((self.low, -widen), (self.high, widen)))
        regime = regimes(m, parts, core)
        return low.take(regime), high.take(regime)


def regimes(m: F, parts: CoreTime, core: Core) -> NDArray[np.int8]:
    """Index into :data:`REGIMES` of shapes."""
    code = (m > 16.0).astype(np.int8)
    code += m > 256.0
    code *= 3
    code += parts.total_us > 2.0 * core.t0_us
    code += parts.total_us > 8.0 * core.t0_us
    return code


def bands_of(section: Section) -> Bands:
    """Bands of a profile's section; wide ones where it has none."""
    spread = math.log(DEFAULT_SPREAD)
    low, high, level = np.full(len(REGIMES), -spread), np.full(len(REGIMES), spread), 0.9
    for interval in section.intervals:
        if interval.regime in REGIMES:
            at = REGIMES.index(interval.regime)
            low[at], high[at], level = math.log(interval.low), math.log(interval.high), interval.level
    return Bands(low, high, level)


def pair_spread(section: Section, octaves: F) -> F:
    """Log half-width, at the section's level, of a ratio of two GEMM times whose shapes lie that far apart.

    Parameters
    ----------
    section : Section
    octaves : array
        |log2| of the ratios of m, n and k, added up.

    Returns
    -------
    array
        Without a calibration, that of two independent default intervals.
    """
    known = {
        interval.regime: math.log(interval.high) for interval in section.intervals if interval.regime in PAIR_REGIMES
    }
    fallback = max(known.values(), default=math.log(DEFAULT_SPREAD) * math.sqrt(2.0))
    table = np.array([known.get(name, fallback) for name in PAIR_REGIMES])
    return np.asarray(table[np.searchsorted(PAIR_EDGES, np.asarray(octaves), side="left")])
