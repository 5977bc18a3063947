"""What fits make of the times of AMD's tuner."""

from __future__ import annotations

import numpy as np
import pytest

from simulator import gemm_time, load_hardware, lower, prune, speedup

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("name", "formats"), [("mi300x", ["fp8_block"]), ("mi355x", ["bf16", "fp8", "fp8_block"])]
)
def test_fitted_products_serve_engines_and_never_beat_the_datasheet(
    name: str, formats: list[str]
) -> None:
    hw = load_hardware(name)
    assert list(hw.stacks) == ["aiter"]
    assert sorted(dtype for _, dtype in hw.sections) == formats
    m, n, k = (
        2.0 ** x.ravel() for x in np.meshgrid(np.arange(0, 17), np.arange(7, 17), np.arange(7, 17))
    )
    for label in formats:
        dtype, weight = ("fp8", label) if label == "fp8_block" else (label, label)
        time = gemm_time(m, n, k, hw, dtype=dtype, weight_dtype=weight)
        assert (time.seconds >= 2.0 * m * n * k / hw.peak_flop_per_s(dtype)).all()
        assert (
            time.seconds >= n * k * (2.0 if label == "bf16" else 1.0) / hw.bandwidth_bytes_per_s
        ).all()
    dense = lower("qwen3-8b", phase="prefill", dtype="fp8", weight_dtype="fp8_block", engine="vllm")
    assert 1.5 < speedup(dense, prune(dense, "width", 0.5), name).speedup < 2.0
