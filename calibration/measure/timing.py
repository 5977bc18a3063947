"""Timing as pure functions on number series: warm-up, loop count, interval of the median, stopping rule.

Use :func:`measure` to time anything that offers ``sample(loops) -> seconds per launch``. Nothing here knows a device:
the clock is an argument, so a replayed device is timed by the same code in simulated time.

The interval of the median is distribution-free: for n independent samples the order statistics x(l), x(n+1-l) enclose
the median with probability 1 - 2 P(Binomial(n, 1/2) < l), whatever the noise looks like (H. A. David, H. N. Nagaraja,
"Order Statistics", 3rd edition, section 7.1). No sample is ever trimmed: an outlier is part of what the machine does,
and the median bears it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

OK = "ok"
NOISY = "noisy"

Sample = Callable[[int], float]


class InvalidTiming(ValueError):
    """A device reported a time that cannot be one: not finite, or not above zero."""


@dataclass(frozen=True)
class Protocol:
    """How long and how precisely to measure; see :func:`measure`."""

    min_window_s: float = 2e-3  # shortest span one sample may cover; launches are repeated until it is reached
    precision: float = 0.01  # half width of the interval of the median over the median at which measuring stops
    confidence: float = 0.95  # level of that interval
    min_samples: int = 8  # taken at least; 6 is the fewest for which a 95 % interval of the median exists
    max_samples: int = 400
    time_limit_s: float = 2.0  # then it ends whatever its precision, and is called noisy when the precision was missed
    warm_values: int = 6  # length of the stretch that must look steady before measuring begins
    max_loops: int = 1 << 20  # launches a sample at most

    def __post_init__(self) -> None:
        least = {"min_samples": 2, "max_samples": self.min_samples, "warm_values": 4, "max_loops": 1}
        for name, value in vars(self).items():
            good = value >= least[name] if name in least else value > 0
            if not good or (name == "confidence" and value >= 1):
                raise ValueError(f"protocol {name}: {value!r} is out of range")


@dataclass(frozen=True)
class Timing:
    """The outcome of :func:`measure`: raw samples and what they say, in seconds a launch."""

    samples_s: tuple[float, ...]  # every sample after the warm-up, untrimmed, in order
    warmup_s: tuple[float, ...]  # samples taken before the series looked steady
    loops: int  # launches a sample
    median_s: float
    lower_s: float  # interval of the median
    upper_s: float  # infinite when there are too few samples for one
    status: str  # "ok", or "noisy" when the precision was not reached or the series never looked steady
    reason: str  # why it is noisy; empty otherwise
    elapsed_s: float  # time spent, warm-up included


@lru_cache(maxsize=4096)
def interval_rank(count: int, confidence: float = 0.95) -> int:
    """Rank l (from 1) such that x(l), x(count+1-l) enclose the median at ``confidence``; 0 when no pair does."""
    rank, tail = 0, 0.0
    for below in range(count // 2 + 1):
        # lgamma keeps the binomial weight in range for any count
        log_ways = math.lgamma(count + 1) - math.lgamma(below + 1) - math.lgamma(count - below + 1)
        tail += math.exp(log_ways - count * math.log(2.0))
        if tail > (1.0 - confidence) / 2.0:
            break
        rank = below + 1
    return min(rank, count // 2)


def median_interval(samples: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Median of a series and its distribution-free interval: 0 to infinity when it is too short for one.

    >>> median_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]), median_interval([1.0, 2.0])
    ((4.0, 1.0, 7.0), (1.5, 0.0, inf))
    """
    values = np.sort(np.asarray(samples, dtype=np.float64))
    if values.size == 0:
        raise ValueError("median_interval: expected at least one sample, got none")
    rank = interval_rank(int(values.size), confidence)
    median = float(np.median(values))
    return (median, float(values[rank - 1]), float(values[values.size - rank])) if rank else (median, 0.0, math.inf)


def _noise(values: NDArray[np.float64]) -> float:
    """Standard deviation of a series about its own trend, from the differences of neighbours.

    A trend must not count as noise, or a series that drifts would look merely noisy and hence steady.
    """
    return float(np.std(np.diff(values))) / math.sqrt(2.0)


def is_warm(values: Sequence[float], tolerance: float = 0.01) -> bool:
    """Whether a stretch of samples looks steady: its first value is no outlier, and its halves agree.

    The first value is an outlier when it lies further from the median of the others than five standard deviations of
    their noise and further than ``tolerance``; the halves agree when their medians differ by less than three standard
    errors, or by less than ``tolerance``. Both tests need the tolerance because a quiet clock may repeat one number
    exactly.
    """
    series = np.asarray(values, dtype=np.float64)
    if series.size < 4:
        return False
    first, rest = series[0], series[1:]
    middle = float(np.median(rest))
    slack = tolerance * abs(middle)
    if abs(first - middle) > max(5.0 * _noise(rest), slack):
        return False
    half = series.size // 2
    early, late = series[:half], series[-half:]
    # the median's standard error is 1.2533 s / sqrt(count) for normal noise; the difference of two has sqrt(2) of it
    error = 1.2533 * _noise(series) * math.sqrt(2.0 / half)
    return abs(float(np.median(early)) - float(np.median(late))) <= max(3.0 * error, slack)


def checked(seconds: float) -> float:
    """The time itself when it can be one, else :class:`InvalidTiming`."""
    value = float(seconds)
    if not math.isfinite(value) or value <= 0.0:
        raise InvalidTiming(f"timing: expected a finite number of seconds above zero, got {value!r}")
    return value


def calibrate_loops(sample: Sample, min_window_s: float, max_loops: int = 1 << 20) -> int:
    """Launches a sample needs to cover ``min_window_s``; grows at most tenfold a step, since the first launches are
    slower than those that follow and a count taken from them alone would be too small."""
    loops = 1
    while True:
        each = checked(sample(loops))
        if each * loops >= min_window_s or loops >= max_loops:
            return loops
        needed = math.ceil(min_window_s / each)
        # a hundredth of the window short is close enough; chasing it would double the count
        if needed <= 1.01 * loops:
            return loops
        loops = min(max_loops, needed, 10 * loops)


def next_look(count: int) -> int:
    """Sample count at which the stopping rule is asked next. Growing by a quarter, not by one: each look is another
    chance to stop on a lucky interval, and looking after every sample covers the median less often than its level says.
    """
    return max(count + 1, math.ceil(1.25 * count))


def measure(sample: Sample, protocol: Protocol | None = None, clock: Callable[[], float] = time.monotonic) -> Timing:
    """Time a launch: warm up, find the loop count, sample until the median is known well enough or time is up.

    ``sample(loops)`` launches ``loops`` times and returns seconds per launch; ``clock`` gives monotonic seconds. The
    stretch that first looks steady is kept as the beginning of the samples; what came before is the warm-up. Warming up
    may take half of the time limit; a series that is not steady by then is measured all the same and called noisy.
    InvalidTiming: a sample is not finite or not above zero.

    >>> ticks = iter(range(1000))
    >>> t = measure(lambda loops: 2e-3, clock=lambda: next(ticks) * 1e-3)
    >>> t.median_s, t.status, len(t.samples_s)
    (0.002, 'ok', 8)
    """
    p = protocol or Protocol()
    start = clock()
    checked(sample(1))  # loads libraries, picks kernels, touches memory: no part of any series
    loops = calibrate_loops(sample, p.min_window_s, p.max_loops)
    series: list[float] = []
    begin, warm = 0, False
    while not warm and clock() - start < 0.5 * p.time_limit_s and len(series) < p.max_samples:
        series.append(checked(sample(loops)))
        begin = max(0, len(series) - p.warm_values)
        warm = len(series) >= p.warm_values and is_warm(series[begin:], p.precision)
    warmup, values = series[:begin], series[begin:]
    look = max(p.min_samples, len(values))
    while True:
        in_time = clock() - start < p.time_limit_s
        while len(values) < look and in_time:
            values.append(checked(sample(loops)))
            in_time = clock() - start < p.time_limit_s
        if not values:
            values.append(checked(sample(loops)))
        median, lower, upper = median_interval(values, p.confidence)
        precise = upper - lower <= 2.0 * p.precision * median
        if precise or not in_time or len(values) >= p.max_samples:
            break
        look = min(p.max_samples, next_look(len(values)))
    reasons = [] if warm else [f"not steady within {0.5 * p.time_limit_s:g} s"]
    if not precise:
        width = (upper - lower) / (2.0 * median)
        asked = f"{p.precision:.1%} asked, after {len(values)} samples"
        reasons.append(f"interval of the median is {width:.1%} of it, {asked}")
    status, reason = NOISY if reasons else OK, "; ".join(reasons)
    return Timing(tuple(values), tuple(warmup), loops, median, lower, upper, status, reason, clock() - start)
