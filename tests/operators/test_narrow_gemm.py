"""GEMMs below 16 bits, and with weights alone in fewer bits: without a fit, and where arithmetic takes long."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from simulator import gemm_time, load_hardware
from simulator.hardware.profile import HardwareProfile
from simulator.operators.gemm import UNLIMITED, clocked


def bare(name: str) -> HardwareProfile:
    """The datasheet alone."""
    return replace(load_hardware(name), sections={}, stacks={}, stack="")


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("name", ["a100", "h100", "l40s", "rtx_4090", "mi300x", "h20", "b200"])
def test_weights_alone_save_no_arithmetic(name: str, weights: str) -> None:
    hw = load_hardware(name)
    n, k = np.array([(4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (8192, 8192)], dtype=float).T
    dense, narrow = (gemm_time(8192, n, k, hw, weight_dtype=w).seconds for w in (None, weights))
    assert (narrow > 0.93 * dense).all()
    few = [gemm_time(1, n, k, hw, weight_dtype=w).seconds for w in (None, weights)]
    assert (few[1] < few[0] + 10e-6).all()
    assert few[1].sum() < 0.95 * few[0].sum()


def test_the_clock_follows_the_power_per_flop() -> None:
    h100 = load_hardware("h100_sxm")
    assert clocked(0.8, h100) == pytest.approx(0.8, rel=0.01)
    assert clocked(0.8, replace(h100, power_w=h100.power_w / 4)) == pytest.approx(0.4, rel=0.01)
    assert clocked(0.8, replace(h100, power_w=100 * h100.power_w)) == UNLIMITED
    assert clocked(0.8, load_hardware("mi300x")) == 0.8
    # more power is never slower
    hw = bare("h20")
    times = [gemm_time(4096, 4096, 4096, replace(hw, power_w=p), dtype="fp8").seconds for p in (25.0, 50.0, 400.0)]
    assert times[0] > times[1] > times[2]
