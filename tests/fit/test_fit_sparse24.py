"""Constants of 2:4 kernels from published ratios of one device."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from calibration.fit.kernels import fit_sparse24
from calibration.measurements import published
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import HardwareProfile, with_section
from simulator.hardware.sections import Fitted
from simulator.uncertainty.operators import gemm_time

ROWS = [r for r in published("gemm_ratios") if r["what"] == "2:4" and r["gpu"] == "H100-class"]
FEW = np.array([float(r["m"]) for r in ROWS]) <= 256


def errors(hw: HardwareProfile) -> np.ndarray:
    """Return the log errors of the ratios of an H100 in fp8."""
    m, n, k, dense, pruned = (np.array([float(r[c]) for r in ROWS]) for c in ("m", "n", "k", "dense_us", "pruned_us"))
    times = [gemm_time(m, n, k, hw, dtype="fp8", kernel=name, cold=False).seconds for name in ("dense", "sparse24")]
    return np.asarray(np.log(times[0] / times[1] / (dense / pruned)))


def test_ratios_of_few_tokens_tell_how_compressed_weights_arrive() -> None:
    hw = load_hardware("h100")
    start = {**hw.sections["gemm", "fp8"].constants}
    start |= {"sparse_step": Fitted(0.65, status="default"), "sparse_load": Fitted(0.66, status="default")}
    unfitted = with_section(hw, "fp8", replace(hw.sections["gemm", "fp8"], constants=start))
    fitted = fit_sparse24(unfitted, "fp8")
    assert fitted.constants["sparse_load"].status == fitted.constants["sparse_step"].status == "fitted"
    before, after = (np.abs(errors(h)) for h in (unfitted, with_section(hw, "fp8", fitted)))
    assert before[FEW].min() > 0.15
    assert np.median(after[FEW]) <= 0.10
    assert fitted.accuracy["median_2to4"] <= 0.10


@pytest.mark.parametrize(("gpu", "dtype"), [("a100", "bf16"), ("l40s", "bf16")])
def test_without_few_tokens_or_rows_the_load_stays(gpu: str, dtype: str) -> None:
    """Ratios of an A100 start at 2,048 tokens; an L40S has none."""
    hw = load_hardware(gpu)
    fitted = fit_sparse24(hw, dtype)
    assert fitted.constants["sparse_load"] == hw.sections["gemm", dtype].constants["sparse_load"]
    assert fitted.constants["sparse_step"].status == ("fitted" if gpu == "a100" else "default")
