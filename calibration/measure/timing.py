"""Timing as pure functions of number series: warm-up, loop count, interval of the median, stopping
rule.

The interval of the median is distribution-free. For n independent samples, the order statistics
x(l), x(n+1-l) enclose the median with probability 1 - 2 P(Binomial(n, 1/2) < l) for any noise (H.
A. David, H. N. Nagaraja, "Order Statistics", 3rd edition, section 7.1). Samples are never trimmed,
because an outlier is real behaviour of the machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.stats import binom

from calibration.devices.protocol import Description, Sampler
from calibration.records.store import STATUSES
from simulator.arrays import FloatArray

OK, NOISY, *_ = STATUSES
WARM_VALUES = 6  # length of the steady stretch that ends the warm-up
MAX_LOOPS = 1 << 20  # maximum launches per sample


class InvalidTiming(ValueError):
    """A device reported an invalid time: not finite, or not above zero."""


@dataclass(frozen=True)
class Protocol:
    min_window_s: float = 2e-3  # minimum duration of one sample; launches are repeated to reach it
    # relative half-width of the 95 % interval of the median at which the measurement stops
    precision: float = 0.01
    min_samples: int = 8  # the interval needs at least 6
    max_samples: int = 400
    time_limit_s: float = 2.0  # the measurement then ends; it is noisy if it missed the precision


def default_protocol(description: Description, budget_s: float) -> Protocol:
    """Return the protocol for a device; a short budget gives each shape less time, to measure
    enough for a fit."""
    limit = min(2.0, max(0.25, budget_s / 400.0))
    return Protocol(time_limit_s=limit / default_visits(description))


def default_visits(description: Description) -> int:
    """Return the number of visits per item: CPUs are often shared with other processes, GPUs are
    not."""
    return 3 if description.name == "cpu" else 1


@dataclass(frozen=True)
class Timing:
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
def interval_rank(count: int) -> int:
    """Return the rank l (from 1) at which x(l), x(count+1-l) enclose the median at 95 %; 0 if none
    does."""
    return int(binom.ppf(0.025, count, 0.5))


def median_interval(samples: Sequence[float]) -> tuple[float, float, float]:
    values = np.sort(np.asarray(samples, dtype=np.float64))
    if values.size == 0:
        raise ValueError("median_interval: expected at least one sample, got none")
    rank = interval_rank(int(values.size))
    median = float(np.median(values))
    return (
        (median, float(values[rank - 1]), float(values[values.size - rank]))
        if rank
        else (median, 0.0, math.inf)
    )


def _noise(values: FloatArray) -> float:
    """Return the standard deviation of a series about its trend: with the trend as noise, drift
    would seem steady."""
    return float(np.std(np.diff(values))) / math.sqrt(2.0)


def is_warm(values: Sequence[float], tolerance: float) -> bool:
    """Return whether a stretch of samples is steady. Its first value is no outlier: its distance
    from the median of the others is below five standard deviations or ``tolerance``. The medians of
    its halves differ by less than three standard errors or ``tolerance``. A quiet clock may repeat
    one number exactly, hence the tolerance."""
    series = np.asarray(values, dtype=np.float64)
    first, rest = series[0], series[1:]
    middle = float(np.median(rest))
    slack = tolerance * abs(middle)
    if abs(first - middle) > max(5.0 * _noise(rest), slack):
        return False
    half = series.size // 2
    early, late = series[:half], series[-half:]
    # the median's standard error is 1.2533 s / sqrt(count) for normal noise; the difference of two
    # has sqrt(2) of it
    error = 1.2533 * _noise(series) * math.sqrt(2.0 / half)
    return abs(float(np.median(early)) - float(np.median(late))) <= max(3.0 * error, slack)


def checked(seconds: float) -> float:
    value = float(seconds)
    if not math.isfinite(value) or value <= 0.0:
        raise InvalidTiming(
            f"timing: expected a finite number of seconds above zero, got {value!r}"
        )
    return value


def calibrate_loops(sample: Sampler, min_window_s: float) -> int:
    """Return the launches per sample that cover ``min_window_s``. The count grows at most tenfold
    per step: the first launches are slower, so a count from them alone is too small."""
    loops = 1
    while True:
        each = checked(sample(loops))
        if each * loops >= min_window_s or loops >= MAX_LOOPS:
            return loops
        needed = math.ceil(min_window_s / each)
        # 1 % short of the window is close enough; another step would double the count
        if needed <= 1.01 * loops:
            return loops
        loops = min(MAX_LOOPS, needed, 10 * loops)


def measure(sample: Sampler, protocol: Protocol, clock: Callable[[], float]) -> Timing:
    """Time a launch: warm up, find the loop count, sample until the median is precise or the time
    is up. ``sample(loops)`` launches ``loops`` times and returns seconds per launch. The first
    steady stretch begins the samples; a series that is not steady in half of the time limit is
    marked noisy."""
    start = clock()
    checked(sample(1))  # loads libraries, selects kernels, touches memory: not part of any series
    loops = calibrate_loops(sample, protocol.min_window_s)
    series: list[float] = []
    begin, warm = 0, False
    while (
        not warm
        and clock() - start < 0.5 * protocol.time_limit_s
        and len(series) < protocol.max_samples
    ):
        series.append(checked(sample(loops)))
        begin = max(0, len(series) - WARM_VALUES)
        warm = len(series) >= WARM_VALUES and is_warm(series[begin:], protocol.precision)
    warmup, values = series[:begin], series[begin:]
    look = max(protocol.min_samples, len(values))
    while True:
        in_time = clock() - start < protocol.time_limit_s
        while len(values) < look and in_time:
            values.append(checked(sample(loops)))
            in_time = clock() - start < protocol.time_limit_s
        if not values:
            values.append(checked(sample(loops)))
        median, lower, upper = median_interval(values)
        precise = upper - lower <= 2.0 * protocol.precision * median
        if precise or not in_time or len(values) >= protocol.max_samples:
            break
        # an interval may be narrow by chance, so looks after every sample would lower the coverage
        look = min(protocol.max_samples, max(len(values) + 1, math.ceil(1.25 * len(values))))
    reasons = [] if warm else [f"not steady within {0.5 * protocol.time_limit_s:g} s"]
    if not precise:
        width = (upper - lower) / (2.0 * median)
        reasons.append(
            f"median known to {width:.1%}, target {protocol.precision:.1%}, after {len(values)}"
            " samples"
        )
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
