"""Constants of a planted device are found again in its measured powers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from calibration.fit.power import NEAR_LIMIT, fit_power
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import Provenance
from simulator.power import PARTS, Power, Work

ABOUT = Provenance("planted", "", "2026-12-02", "", "", "", 0)
RUNS = 120


def planted(
    seed: int, noise: float = 0.03, truth: tuple[float, ...] = (0.2, 0.08, 0.6, 0.9)
) -> tuple[Work, NDArray[np.float64], tuple[float, ...]]:
    """Return the work of runs, their powers as shares of the limit, and the true constants."""
    random = np.random.default_rng(seed)
    busy, memory, compute = random.uniform([0.1, 0.05, 0.01], [1.0, 0.9, 0.7], (RUNS, 3)).T
    work = Work(*(part[:, None] for part in (np.ones(RUNS), busy, busy, memory, compute)))
    shares = np.stack([np.ones(RUNS), busy, memory, compute], axis=1) @ np.array(truth)
    return work, np.minimum(shares, 1.0) * np.exp(noise * random.standard_normal(RUNS)), truth


@pytest.mark.parametrize("seed", range(10, 16))
def test_the_constants_of_a_planted_device_are_found_again(seed: int) -> None:
    hw = load_hardware("h100")
    work, shares, truth = planted(seed)
    section, _ = fit_power(hw, work, shares * hw.power_w, ABOUT)
    found = np.array([section[name] for name in PARTS])
    errors = np.array([section.constants[name].std_error for name in PARTS])
    assert found == pytest.approx(np.array(truth), abs=0.06)
    assert (np.abs(found - truth) <= 3.0 * errors).all()
    known = replace(hw, sections={**hw.sections, ("power", "*"): section})
    joules = Power.of(known).joules(work).sum(axis=(0, 2))
    inside = shares < NEAR_LIMIT
    assert joules[inside] / hw.power_w == pytest.approx(shares[inside], rel=0.15)


def test_runs_at_the_power_limit_do_not_lower_the_constants() -> None:
    hw = load_hardware("h100")
    work, shares, truth = planted(20, truth=(0.2, 0.08, 0.9, 1.6))
    assert (shares > NEAR_LIMIT).mean() > 0.3
    section, _ = fit_power(hw, work, shares * hw.power_w, ABOUT)
    assert section["compute"] == pytest.approx(truth[3], rel=0.1)


def test_powers_of_a_few_seconds_keep_what_they_do_not_show() -> None:
    """A device that was only measured busy has the idle power of the prior."""
    hw = load_hardware("h100")
    work, shares, _ = planted(30)
    few = Work(*(part[:3] for part in work))
    section, _ = fit_power(hw, few, shares[:3] * hw.power_w, ABOUT)
    error = section.constants["idle"].std_error
    assert error is not None
    assert error > 0.1 * section["idle"]
