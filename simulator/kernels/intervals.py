"""What cost models return, :class:`OpTime`, and its intervals by regime: multipliers from shapes that no fit saw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simulator.kernels.gemm_core import Core, CoreTime

if TYPE_CHECKING:
    from simulator.hardware.profile import Interval, Section

F = NDArray[np.floating[Any]]

BOUNDS: tuple[str, ...] = ("compute", "memory", "l2", "latency", "launch", "host", "link")
"""Limits an operator can sit on; the index is the code in ``OpTime.bound``."""

REGIMES: tuple[str, ...] = tuple(
    f"{m} {part}" for m in ("m<=16", "m<=256", "m>256") for part in ("launch", "mixed", "work")
)
"""Of GEMMs: by m, and by the share of the fixed time in the prediction: above 1/2, above 1/8, below."""

PAIR_EDGES: tuple[float, ...] = (0.26, 0.51, 1.01, 2.01)
"""Octaves (|log2| of the ratios of m, n and k, added up) that part the regimes of a ratio of two times."""
PAIR_REGIMES: tuple[str, ...] = ("pair 1/4 octave", "pair 1/2 octave", "pair 1 octave", "pair 2 octaves", "pair far")

DEFAULT_SPREAD = 1.35
"""Factor of the 90 % interval either way without a calibration: GEMMs differ by 5.5-14.6 % between stacks of one GPU,
attention by 9-34 %, and constants are borrowed from another."""


@dataclass(frozen=True)
class OpTime:
    """Times of operators, arrays of one shape, s."""

    seconds: NDArray[np.float64]  # predicted kernel time, launch overhead inside a CUDA graph included
    lower: NDArray[np.float64]  # interval of that prediction at the level asked for
    upper: NDArray[np.float64]
    roofline_s: NDArray[np.float64]  # max(FLOP / datasheet peak, bytes / datasheet bandwidth)
    bound: NDArray[Any]  # int8: index into BOUNDS

    @property
    def limits(self) -> NDArray[np.str_]:
        """Names of the limits."""
        out: NDArray[np.str_] = np.array(BOUNDS)[self.bound]
        return out


@lru_cache(maxsize=64)
def level_scale(level: float, known: float) -> float:
    """Half-width of an interval at a level over that at a known level, as of a normal distribution.

    >>> level_scale(0.9, 0.9), round(level_scale(0.99, 0.9), 3)
    (1.0, 1.566)
    """
    normal = NormalDist()
    return normal.inv_cdf(0.5 + 0.5 * level) / normal.inv_cdf(0.5 + 0.5 * known)


@dataclass(frozen=True)
class Bands:
    """Log multipliers of the interval by regime, at one level."""

    low: F
    high: F
    level: float

    def factors(self, regime: NDArray[Any], level: float, widen: float, dtype: Any) -> tuple[F, F]:
        """Low and high multipliers at a level, wider by ``widen`` (log half-width) for what no fit has seen."""
        scale = level_scale(level, self.level)
        low, high = (np.exp(v * scale + w).astype(dtype) for v, w in ((self.low, -widen), (self.high, widen)))
        return low.take(regime), high.take(regime)


def bands_of(section: Section, names: Sequence[str] = REGIMES) -> Bands:
    """Bands of a profile's section by the regimes of its operator; wide ones where it has none."""
    known, level = _known(section, names)
    wide = math.log(DEFAULT_SPREAD)
    low = [math.log(known[name].low) if name in known else -wide for name in names]
    high = [math.log(known[name].high) if name in known else wide for name in names]
    return Bands(np.array(low), np.array(high), level)


def _known(section: Section, names: Sequence[str]) -> tuple[dict[str, Interval], float]:
    """Intervals of a section by regime, of some regimes, and their level."""
    known = {interval.regime: interval for interval in section.intervals if interval.regime in names}
    return known, next(iter(known.values())).level if known else 0.9


def regimes(m: F, parts: CoreTime, core: Core) -> NDArray[np.int8]:
    """Index into :data:`REGIMES` of GEMM shapes."""
    rows = (m > 16.0).astype(np.int8) + (m > 256.0)
    work = (parts.total_us > 2.0 * core.t0_us).astype(np.int8) + (parts.total_us > 8.0 * core.t0_us)
    return np.asarray(3 * rows + work, dtype=np.int8)


def pair_spread(section: Section, octaves: F, level: float) -> NDArray[np.float64]:
    """Log half-width at a level of a ratio of two GEMM times so many octaves apart (see :data:`PAIR_EDGES`); without a
    calibration, that of two independent default intervals."""
    known, of_known = _known(section, PAIR_REGIMES)
    half = {name: math.log(interval.high) for name, interval in known.items()}
    fallback = max(half.values(), default=math.log(DEFAULT_SPREAD) * math.sqrt(2.0))
    table = np.array([half.get(name, fallback) for name in PAIR_REGIMES])
    return np.asarray(table[np.searchsorted(PAIR_EDGES, octaves, side="left")] * level_scale(level, of_known))
