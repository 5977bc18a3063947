"""Timing as pure functions of number series: warm-up, loop count, interval of the median, stopping rule.

The interval of the median is distribution-free. For n independent samples, the order statistics x(l), x(n+1-l) enclose
the median with probability 1 - 2 P(Binomial(n, 1/2) < l) for any noise (H. A. David, H. N. Nagaraja, "Order
Statistics", 3rd edition, section 7.1). Samples are never trimmed: an outlier is real behaviour of the machine.
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
    """A device reported an invalid time: not finite, or not above zero."""


@dataclass(frozen=True)
class Protocol:
    """Duration and precision of a measurement; see :func:`measure`."""

    min_window_s: float = 2e-3  # minimum duration of one sample; launches are repeated to reach it
    precision: float = 0.01  # relative half-width of the interval of the median at which the measurement stops
    confidence: float = 0.95  # level of that interval
    min_samples: int = 8  # a 95 % interval of the median needs at least 6
    max_samples: int = 400
    time_limit_s: float = 2.0  # the measurement then ends; it is noisy if it missed the precision
    warm_values: int = 6  # length of the steady stretch that ends the warm-up
    max_loops: int = 1 << 20  # maximum launches per sample

    def __post_init__(self) -> None:
        least = {"min_samples": 2, "max_samples": self.min_samples, "warm_values": 4, "max_loops": 1}
        for name, value in vars(self).items():
            good = value >= least[name] if name in least else value > 0
            if not good or (name == "confidence" and value >= 1):
                raise ValueError(f"protocol {name}: {value!r} is out of range")


@dataclass(frozen=True)
class Timing:
    """Result of :func:`measure`: raw samples and their median, in seconds per launch."""

    samples_s: tuple[float, ...]  # every sample after the warm-up, untrimmed, in order
    warmup_s: tuple[float, ...]  # samples before the series was steady
    loops: int  # launches per sample
    median_s: float
    lower_s: float  # interval of the median
    upper_s: float  # infinite if there are too few samples for an interval
    status: str  # "ok"; "noisy" if the precision was not reached or the series was never steady
    reason: str  # why it is noisy; empty otherwise
    elapsed_s: float  # warm-up included


@lru_cache(maxsize=4096)
def interval_rank(count: int, confidence: float = 0.95) -> int:
    """Return the rank l (from 1) at which x(l), x(count+1-l) enclose the median at ``confidence``; 0 if none does."""
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
    """Return the median of a series and its distribution-free interval: 0 to infinity for a short series."""
    values = np.sort(np.asarray(samples, dtype=np.float64))
    if values.size == 0:
        raise ValueError("median_interval: expected at least one sample, got none")
    rank = interval_rank(int(values.size), confidence)
    median = float(np.median(values))
    return (median, float(values[rank - 1]), float(values[values.size - rank])) if rank else (median, 0.0, math.inf)


def _noise(values: NDArray[np.float64]) -> float:
    """Return the standard deviation of a series about its trend, which must not count as noise: a drifting series would
    seem noisy, and therefore steady."""
    return float(np.std(np.diff(values))) / math.sqrt(2.0)


def is_warm(values: Sequence[float], tolerance: float = 0.01) -> bool:
    """Whether a stretch of samples is steady: its first value is not an outlier, and its halves agree.

    The first value is an outlier if its distance from the median of the others exceeds both five standard deviations
    and ``tolerance``. The halves agree if their medians differ by less than three standard errors or ``tolerance``.
    Both tests need the tolerance because a quiet clock may repeat one number exactly.
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
    """Return the time; :class:`InvalidTiming` if it is not finite and positive."""
    value = float(seconds)
    if not math.isfinite(value) or value <= 0.0:
        raise InvalidTiming(f"timing: expected a finite number of seconds above zero, got {value!r}")
    return value


def calibrate_loops(sample: Sample, min_window_s: float, max_loops: int = 1 << 20) -> int:
    """Return the launches per sample that cover ``min_window_s``.

    The count grows at most tenfold per step: the first launches are slower, so a count from them alone is too small.
    """
    loops = 1
    while True:
        each = checked(sample(loops))
        if each * loops >= min_window_s or loops >= max_loops:
            return loops
        needed = math.ceil(min_window_s / each)
        # 1 % short of the window is close enough; another step would double the count
        if needed <= 1.01 * loops:
            return loops
        loops = min(max_loops, needed, 10 * loops)


def next_look(count: int) -> int:
    """Return the sample count at which the stopping rule is applied next. Every check may stop at an interval that is
    narrow by chance, so checks after every sample would lower the coverage."""
    return max(count + 1, math.ceil(1.25 * count))


def measure(sample: Sample, protocol: Protocol | None = None, clock: Callable[[], float] = time.monotonic) -> Timing:
    """Time a launch: warm up, find the loop count, sample until the median is precise or the time is up.

    ``sample(loops)`` launches ``loops`` times and returns seconds per launch; ``clock`` gives monotonic seconds. The
    first steady stretch begins the samples; a series that is not steady in half of the time limit is marked noisy.
    """
    p = protocol or Protocol()
    start = clock()
    checked(sample(1))  # loads libraries, selects kernels, touches memory: not part of any series
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
        reasons.append(f"median known to {width:.1%}, target {p.precision:.1%}, after {len(values)} samples")
    return Timing(
        samples_s=tuple(values),
        warmup_s=tuple(warmup),
        loops=loops,
        median_s=median,
        lower_s=lower,
        upper_s=upper,
        status=NOISY if reasons else OK,
        reason="; ".join(reasons),
        elapsed_s=clock() - start,
    )
