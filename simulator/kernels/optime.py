"""What every operator cost model returns: times with an interval, the roofline, and the limit that holds each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BOUNDS: tuple[str, ...] = ("compute", "memory", "l2", "latency", "launch", "host", "link")
"""Limits an operator can sit on; the index is the code in ``OpTime.bound``."""


@dataclass(frozen=True)
class OpTime:
    """Times of operators, arrays of one shape.

    Attributes
    ----------
    seconds : float64 array, s
        Predicted kernel time, launch overhead inside a CUDA graph included.
    lower, upper : float64 array, s
        Interval of that prediction at the level asked for.
    roofline_s : float64 array, s
        max(FLOP / datasheet peak, bytes / datasheet bandwidth): what a FLOP-and-byte count alone would say.
    bound : int8 array
        Index into :data:`BOUNDS`.
    """

    seconds: NDArray[np.float64]
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    roofline_s: NDArray[np.float64]
    bound: NDArray[Any]

    @property
    def limits(self) -> NDArray[np.str_]:
        """Names of the limits."""
        out: NDArray[np.str_] = np.array(BOUNDS)[self.bound]
        return out
