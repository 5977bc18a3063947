"""GEMMs below 16 bits, and with weights alone in fewer bits: without a fit, and where arithmetic takes long."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from simulator import gemm_time, load_hardware
from simulator.cost.gemm_kernel import UNLIMITED, clocked
from simulator.errors import InputError
from simulator.hardware.profile import HardwareProfile


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


def test_tiles_of_few_tokens_take_64_rows_or_64_columns() -> None:
    hw = bare("h20")
    few, more = (gemm_time(m, 24576, 4096, hw, dtype="fp8", detail=True) for m in (16, 64))
    assert few.seconds == pytest.approx(more.seconds, rel=0.02)
    assert few.details["tile_m"] == 64
    narrow = gemm_time(64, 576, 2048, hw, dtype="fp8", detail=True)
    assert (narrow.details["tile_m"], narrow.details["tile_n"]) == (64, 16)  # enough tiles for the device
    alone = gemm_time(16, 24576, 4096, hw, weight_dtype="int8", detail=True)
    assert alone.details["tile_m"] == 16  # smaller instructions


def test_fp8_on_an_h20_by_its_datasheet(shared_data: Path) -> None:
    path = shared_data / "h20" / "gemm_fp8.csv"
    if not path.is_file():
        pytest.skip("the H20 tables are not at hand; set PRUNESIM_SHARED_DATA to their folder")
    m, n, k, latency = np.loadtxt(path, delimiter=",", skiprows=1).T
    t = gemm_time(m, n, k, bare("h20"), dtype="fp8")
    assert np.abs(t.seconds * 1e6 / latency - 1.0).mean() < 0.15
    assert ((latency * 1e-6 > t.lower) & (latency * 1e-6 < t.upper)).mean() > 0.85
    # widths of the same tokens and inputs
    errors = []
    for size in np.unique(np.stack([m, k]), axis=1).T:
        at = np.flatnonzero((m == size[0]) & (k == size[1]))
        least = at[n[at].argmin()]
        if n[least] <= 1024:
            wider = at[n[at] > n[least]]
            errors += ((t.seconds[wider] / t.seconds[least]) / (latency[wider] / latency[least]) - 1.0).tolist()
    assert len(errors) > 50
    assert np.abs(errors).mean() < 0.08


def test_a_format_that_a_device_lacks_is_refused() -> None:
    with pytest.raises(InputError, match="has no fp8 arithmetic"):
        gemm_time(1, 4096, 4096, load_hardware("a100"), dtype="fp8")
