"""A run that times attention in torch and in the library of an engine, and its fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.devices.protocol import Operator
from calibration.devices.replay import ReplayDevice, roofline_timings
from calibration.records.screening import one_method
from calibration.records.store import content_records, read_store
from calibration.runners.runs import RunOptions, fit_run, measure_into
from simulator.hardware.library import load_hardware
from simulator.hardware.save import save_hardware
from simulator.operators.attention import Geometry, prefill
from simulator.uncertainty.operators import operator_time

FASTER = 1.6  # FlashAttention-3 over FlashAttention-2 on Hopper, about


class InVllm(ReplayDevice):
    """A planted GPU with vLLM, whose attention is faster than torch's."""

    def refuses(self, operator: Operator) -> str:
        plain = replace(operator, library="") if operator.library == "vllm" else operator
        return super().refuses(plain)


def _seconds(op: Operator) -> float:
    slower = FASTER if op.attention and not op.library else 1.0
    return slower * roofline_timings()(op)


def test_a_fit_takes_the_attention_of_the_installed_engine(tmp_path: Path) -> None:
    opened = InVllm(_seconds)
    opened.description = replace(opened.description, stack={"torch": "2.13"})
    measure_into(tmp_path, opened, RunOptions(95.0))
    both = content_records(read_store(tmp_path / "records.jsonl"))
    kernels = np.array([source.kernel for source in both.sources])[both.source]
    attention = both.is_operator("attention_prefill", "attention_decode")
    assert set(kernels[attention]) == {"", "vllm"}
    assert set(kernels[~attention]) == {""}
    used, _ = one_method(both)
    sources = np.array([source.kernel for source in used.sources])[used.source]
    assert set(sources[used.is_operator("attention_prefill")]) == {"vllm"}
    profile = fit_run(tmp_path).fit.profile
    save_hardware(profile, tmp_path / "profile.yaml")
    hw = load_hardware(tmp_path / "profile.yaml")
    sizes: dict[str, Any] = {
        "batch": 4,
        "q_len": 2048,
        "kv_len": 2048,
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
    }
    op = Operator("attention_prefill", "bf16", **sizes, cold=False, library="vllm")
    section = hw.section("attention_prefill", "bf16")
    assert section.stack == "vllm"
    assert hw.section("gemm", "bf16").stack == "torch"
    predicted = operator_time(prefill(Geometry.of(*sizes.values()), hw, "bf16"), hw)
    assert float(predicted.seconds) == pytest.approx(_seconds(op), rel=0.1)
