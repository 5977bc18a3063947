"""The measured tables of the RTX 4090: rows, roles, launches and refusals."""

from __future__ import annotations

from pathlib import Path

from calibration.evidence.measurements.rtx4090 import read_table
from calibration.evidence.measurements.wheel import datasheet
from calibration.records.importers import ImportResult, finish
from calibration.records.timing_table import LAUNCHES
from simulator.codes import ROLES


def imported(path: Path) -> ImportResult:
    return finish(read_table(path), label=path.name, hw=datasheet("rtx_4090"))


def test_the_rtx_4090_tables(shared_data: Path) -> None:
    gemm = imported(shared_data / "rtx4090_gemm.csv")
    assert (len(gemm.records), gemm.refusals) == (344, {})
    assert {ROLES[r] for r in gemm.records.role} == {"qkv", "down", "lm_head"}
    assert gemm.records.cold.all()
    assert {LAUNCHES[c] for c in gemm.records.launch} == {"excluded"}
    assert not gemm.records.copies.any()
    attention = imported(shared_data / "rtx4090_attention.csv")
    refused = {
        "attn_prefill_noncausal: operator is not modelled": 1,
        "faster than memory, L2 or link allow": 1,  # one sequence of 16,384 keys, partly from L2
    }
    assert (
        len(attention.records),
        {reason: len(rows) for reason, rows in attention.refusals.items()},
    ) == (97, refused)
    decode = attention.records.is_operator("attention_decode")
    # a running model's cache comes from memory
    assert attention.records.cold.tolist() == decode.tolist()
    others = imported(shared_data / "rtx4090_other_ops.csv")
    roles = "activation embedding attention_norm final_norm rotary"
    assert {ROLES[r] for r in others.records.role} == set(roles.split())
