"""The times of AMD's tuner: which rows are the best kernel of a shape, and what a fit makes of
them."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from calibration.evidence.measurements.aiter import COPIES, FILE, read_table
from simulator import gemm_time, load_hardware, lower, prune, speedup

pytestmark = pytest.mark.quick

ROWS = """gpu,gfx,cu_num,kind,w_dtype,m,n,k,us,lib
,gfx950,256.0,a8w8_blockscale,,16,2112,7168,21.0,ck
,gfx950,256.0,a8w8_blockscale,,2048,2112,7168,88.3,ck
,gfx950,256.0,a8w8_blockscale,,2049,2112,7168,88.9,ck
,gfx950,256.0,a8w8_blockscale,,4096,2112,7168,65.0,ck
,gfx950,256.0,a8w8_blockscale_bpreshuffle,,16,7168,7168,15.0,asm
,gfx950,256.0,bf16,bfloat16,16,6144,2048,8.9,asm
,gfx950,256.0,bf16,bfloat16,16,6144,2048,7.9,triton
,gfx950,256.0,a8w8,int8,16,6144,2048,7.9,
,gfx942,304.0,a8w8_blockscale,,16,4096,4096,11.8,ck
"""


def test_only_the_best_kernel_of_a_shape_counts(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(gzip.compress(ROWS.encode()))
    records, _, refused = read_table("mi355x/gemm/aiter", tmp_path)
    assert refused == {
        "a kind with under 400 rows": [8],
        # 15 us with more features, 65 with more tokens
        "over 1.3 times the time of a product of more work": [1, 2, 3],
        "weights rearranged for the kernel": [5],
        "timed again, and slower": [6],
    }
    assert records.labels().tolist() == ["bf16", "fp8_block"]
    assert records.seconds.tolist() == pytest.approx([7.9e-6, 65e-6])
    assert records.copies.tolist() == [COPIES] * 2
    assert len(read_table("mi300x/gemm/aiter", tmp_path)[0]) == 1


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
