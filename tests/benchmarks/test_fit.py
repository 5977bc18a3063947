"""Time to fit a profile's GEMM section from the measurements that ship."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

Floor = Callable[..., None]


@pytest.mark.parametrize("rows", [100, 400, 4000])
def test_fit_of_gemms(benchmark: Any, rows: int, floor: Floor) -> None:
    from calibration.fit.core import machine_of, shapes
    from calibration.fit.gemm import fit_gemm
    from calibration.measurements import load_measurements
    from simulator.hardware.library import load_hardware

    records = load_measurements("h100_sxm/gemm/trtllm", "bf16")
    at = np.random.default_rng(0).permutation(len(records))[:rows]
    m, n, k, seconds = (np.asarray(getattr(records, name), dtype=np.float64)[at] for name in ("m", "n", "k", "seconds"))
    hw = load_hardware("h100_sxm")
    benchmark.pedantic(lambda: fit_gemm(shapes(m, n, k, seconds, machine_of(hw, "bf16")), hw), rounds=1)
    floor(f"seconds to fit {rows} rows", benchmark.stats["min"], 60.0, False)
