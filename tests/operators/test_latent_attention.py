"""Multi-head latent attention: work by hand, physics, sections, limits, what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_times import decode, decode_time, errors_of, prefill_time

from simulator.hardware.library import load_hardware
from simulator.operators.attention import Geometry, decode_work, prefill_work

pytestmark = pytest.mark.quick

DEVICES = ("a100_sxm_80gb", "h100_sxm", "l40s", "rtx_pro_6000", "b200_sxm", "h20", "a6000")
PROMPT: dict[str, Any] = {"head_dim": 192, "value_dim": 128}
DECODE: dict[str, Any] = {"kv_heads": 1, "head_dim": 576, "value_dim": 512, "latent": True}


def sizes(*values: float) -> list[Any]:
    return [np.array(float(v)) for v in values]


def test_work_of_a_prompt_and_of_a_decode_by_hand() -> None:
    known = {"value_dim": np.array(128.0)}
    prompt = prefill_work(Geometry(*sizes(2, 128, 128, 16, 16, 192), **known), {"pads": 1.0, "packs": 0.0})
    assert float(prompt.flops) == 2 * (192 + 128) * 2 * 16 * (128 * 129 // 2)
    assert float(prompt.moved_bytes) == pytest.approx(2 * 2 * 128 * 16 * 2 * (192 + 128))
    decode = decode_work(Geometry(*sizes(8, 1, 4096, 128, 1, 576), value_dim=np.array(512.0), latent=True))
    assert float(decode.flops) == pytest.approx(2 * (576 + 512) * 8 * 128 * 4096)
    assert float(decode.cache_bytes) == 8 * 4096 * 576 * 2  # the latent once, whatever the heads
    assert float(decode.io_bytes) == pytest.approx(8 * 128 * (576 + 512) * 2)


@given(
    st.sampled_from(DEVICES), st.integers(1, 256), st.integers(2, 16384), st.integers(1, 128),
    st.sampled_from(["bf16", "fp8"]),
)  # fmt: skip
@settings(max_examples=120, deadline=None)
def test_no_time_beats_arithmetic_or_a_cold_latent_cache(
    name: str, batch: int, kv: int, heads: int, cache: str
) -> None:
    hw = load_hardware(name)
    rates = [hw.peak_flop_per_s(dtype) for dtype in ("bf16", cache) if dtype in hw.rates]
    prompt = prefill_time(batch, kv, kv, heads, heads, hw=hw, kv_dtype=cache, **PROMPT)
    decode = decode_time(batch, kv, heads, hw=hw, kv_dtype=cache, **DECODE)
    pairs, size = kv * (kv + 1) / 2, 1 if cache == "fp8" else 2
    fastest = max(rates) * hw.clock_headroom * (1 + 1e-12)
    assert prompt.lower >= 2 * 320 * batch * heads * pairs / fastest
    assert decode.lower >= 2 * 1088 * batch * heads * kv / fastest
    assert decode.lower >= batch * kv * 576 * size / hw.bandwidth_bytes_per_s * (1 - 1e-12)
    for t in (prompt, decode):
        assert np.isfinite(t.seconds)
        assert t.lower <= t.seconds <= t.upper


def test_sections_of_their_own_and_wide_where_nothing_was_fitted() -> None:
    hw = load_hardware("h100@sglang")
    status = [hw.section(operator, "bf16").status for operator in ("mla_decode", "mla_prefill", "attention_decode")]
    assert status == ["calibrated", "inherited", "calibrated"]  # SGLang's prompts are not in the tables
    widths = []
    for name in ("h100@trtllm", "h20", "l40s", "a6000"):  # fitted; fitted, but other stacks differ; nothing there
        t = decode_time(8, 8192, 128, hw=load_hardware(name), **DECODE)
        widths.append(float(t.upper / t.seconds))
    assert widths[0] < 1.4
    assert widths[2] > 4.0
    assert widths[3] > widths[2]
    vllm = load_hardware("l40s").serving(("vllm", "sglang", "trtllm"))  # Triton runs there, as for SGLang
    t = decode_time(8, 8192, 128, hw=vllm, **DECODE)
    assert t.upper < 1.5 * t.seconds
    hopper = (load_hardware("h200").serving((stack, "sglang")) for stack in ("sglang", "vllm"))
    wide, other = (decode_time(8, 8192, 128, hw=hw, kv_dtype="fp8", **DECODE) for hw in hopper)
    assert wide.upper / wide.seconds > 4.0 > other.upper / other.seconds  # SGLang converts fp8 caches there
    generic = errors_of(decode, 8, 8192, 128, hw=load_hardware("t4"), dtype="fp16", **DECODE)
    assert "mla_decode generic" in generic.factors
