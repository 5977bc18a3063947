"""Warm-up, loop count, interval and stopping rule on planted series."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from calibration.measure.timing import (
    NOISY,
    OK,
    InvalidTiming,
    Protocol,
    Timing,
    calibrate_loops,
    interval_rank,
    measure,
)

pytestmark = pytest.mark.quick


class Planted:
    """A kernel of 0.1 ms with planted noise, slow first samples and drift, in simulated seconds."""

    def __init__(
        self,
        noise: float = 0.0,
        seed: int = 0,
        slow_first: int = 0,
        drift: float = 0.0,
        mean: float = 1e-4,
    ) -> None:
        self.mean, self.noise, self.slow_first, self.drift = mean, noise, slow_first, drift
        self.rng = np.random.default_rng(seed)
        self.now, self.calls = 0.0, 0

    def __call__(self, loops: int) -> float:
        self.calls += 1
        value = (
            self.mean
            * (1 + self.noise * self.rng.standard_normal())
            * (1 + self.drift * self.calls)
        )
        if self.calls <= self.slow_first:
            value *= 3.0 - 2.0 * self.calls / (self.slow_first + 1)
        self.now += value * loops
        return value

    def measured(self, **protocol: Any) -> Timing:
        return measure(self, Protocol(**protocol), lambda: self.now)


@pytest.mark.parametrize("noise", [0.001, 0.01, 0.03])
def test_the_median_of_a_planted_kernel_is_found(noise: float) -> None:
    timing = Planted(noise, seed=3).measured(time_limit_s=5.0)
    assert timing.status == OK
    assert timing.median_s == pytest.approx(1e-4, rel=0.01)
    assert timing.upper_s - timing.lower_s <= 0.02 * timing.median_s


def test_the_interval_covers_the_true_median_as_often_as_it_says() -> None:
    """Of 400 measurements that stop by the rule, 90 % cover the median; 95 % hold for a single look
    at the samples."""
    timings = [Planted(0.02, seed).measured(time_limit_s=5.0) for seed in range(400)]
    assert sum(t.lower_s <= 1e-4 <= t.upper_s for t in timings) >= 360


def test_ranks_are_those_of_the_sign_test() -> None:
    """l: the two-sided 5 % critical value plus one (Conover, "Practical Nonparametric Statistics",
    table A3)."""
    assert [interval_rank(count) for count in (1, 5, 6, 9, 10, 12, 25, 100)] == [
        0,
        0,
        1,
        2,
        2,
        3,
        8,
        40,
    ]
    for count in range(6, 60):
        rank = interval_rank(count)
        tail = [sum(math.comb(count, i) for i in range(r)) / 2**count for r in (rank, rank + 1)]
        assert tail[0] <= 0.025 < tail[1]


def test_slow_first_samples_are_warm_up_and_kept_apart() -> None:
    timing = Planted(0.002, seed=1, slow_first=12).measured()
    assert len(timing.warmup_s) >= 5
    assert min(timing.warmup_s) > 1.05e-4
    assert timing.median_s == pytest.approx(1e-4, rel=0.005)
    assert Planted(0.002, seed=1).measured().warmup_s == ()  # steady at once


def test_steady_drift_is_never_called_warm() -> None:
    timing = Planted(drift=0.05).measured(time_limit_s=1.0)
    assert timing.status == NOISY
    assert "not steady" in timing.reason


def test_noise_beyond_reach_is_called_noisy_at_the_time_limit() -> None:
    timing = Planted(0.3, seed=2).measured(time_limit_s=0.5, max_samples=10_000)
    assert timing.status == NOISY
    assert "median known to" in timing.reason
    assert timing.elapsed_s == pytest.approx(0.5, rel=0.1)


def test_no_sample_is_trimmed() -> None:
    values = iter([1e-3] * 9 + [5e-3] + [1e-3] * 200)
    seen: list[float] = []

    def sample(loops: int) -> float:
        seen.append(next(values))
        return seen[-1]

    timing = measure(sample, Protocol(min_window_s=1e-4), clock=lambda: 0.0)
    assert 5e-3 in timing.samples_s
    # after the first launch and the loop calibration
    assert [*timing.warmup_s, *timing.samples_s] == seen[2:]


@pytest.mark.parametrize("each", [1e-7, 3.3e-6, 1e-4, 1e-2])
def test_loops_cover_the_window(each: float) -> None:
    loops = calibrate_loops(lambda n: each, 2e-3)
    assert loops * each >= 0.99 * 2e-3
    assert loops == 1 or (loops - 1) * each <= 1.01 * 2e-3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0, -1e-6])
@pytest.mark.parametrize("at", [0, 1, 4, 9])
def test_a_time_that_cannot_be_one_is_refused(bad: float, at: int) -> None:
    values = iter([1e-3] * at + [bad] + [1e-3] * 100)
    with pytest.raises(InvalidTiming, match="finite number of seconds above zero"):
        measure(lambda loops: next(values), Protocol(min_window_s=1e-4), clock=lambda: 0.0)
