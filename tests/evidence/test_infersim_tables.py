"""InferSim's files: the rows that are times of kernels, and what the others are refused for."""

from __future__ import annotations

from pathlib import Path

import pytest

from calibration.evidence.measurements.infersim import read_table
from simulator.codes import DTYPES

pytestmark = pytest.mark.quick

HEAD = "heads,kv_heads,head_dim,dtype,kv_dtype,batch_size,kv_len,latency_us"


def decode(folder: Path, *rows: str) -> Path:
    (folder / "attention_decode.csv").write_text("\n".join([HEAD, *rows]) + "\n")
    return folder


def test_times_of_calls_and_disturbed_rows_are_refused(tmp_path: Path) -> None:
    timed_calls = [
        f"32,4,128,bf16,bf16,{b},8192,{t}"
        for b, t in ((1.0, 28.1), (16.0, 100.4), (32.0, 188.0), (8.0, 130.0))
    ]
    kernels = [
        f"32,8,128,bf16,{kv},1,{n},{t}"
        for kv in ("bf16", "fp8")
        for n, t in ((1024, 9.9), (16384, 33.9))
    ]
    records, _, refused = read_table(
        "h20/attention_decode/flashinfer", decode(tmp_path, *timed_calls, *kernels, "64,2,128,,,,,")
    )
    assert {reason: len(rows) for reason, rows in refused.items()} == {
        "the file has no time": 1,
        # not of the layout that has 9.9 us
        "shorter than 40 us, where calls take the host that long": 1,
        "over 1.15 times the time of a call of more work": 1,  # 8 sequences in 130 us, 16 in 100
    }
    assert sorted(1e6 * records.seconds) == pytest.approx([9.9, 9.9, 33.9, 33.9, 100.4, 188.0])
    assert sorted(DTYPES[d] for d in records.weight_dtype) == ["bf16"] * 4 + ["fp8"] * 2
    assert not records.cold.any()  # calls repeat one cache


def test_products_have_scales_by_block_and_cold_weights(tmp_path: Path) -> None:
    rows = ["m,n,k,latency_us", "16,6144,2048,10.63", "64,24576,4096,50", "64,24576,4096,52"]
    (tmp_path / "gemm_fp8.csv").write_text("\n".join(rows) + "\n")
    records, _, refused = read_table("h20/gemm/sglang", tmp_path)
    assert (records.labels().tolist(), len(refused)) == (["fp8_block"] * 2, 0)
    # a repeated shape has its median
    assert records.seconds.tolist() == pytest.approx([10.63e-6, 51e-6])
    assert records.cold.all()
