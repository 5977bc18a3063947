"""Rows that convert activations for products below 16 bits: which engines have them, and how
pruning changes them."""

from __future__ import annotations

from typing import Any

import pytest

from simulator import load_engine, load_hardware, lower, memory, prune, table, workload_time
from simulator.engines.engine import INPUTS
from simulator.errors import InputError
from simulator.workload import Workload

MODEL, HIDDEN, INNER = "llama-3.1-8b", 4096, 14336
CONVERTED = ("quantize", "quantize_heads", "quantize_inner")


def conversions(w: Workload) -> dict[str, tuple[float, float]]:
    """Role -> executions, and bytes of all of them."""
    found = {}
    for name in CONVERTED:
        rows = w.is_role(name)
        if rows.any():
            found[name] = (
                float(w.count[rows].sum()),
                float(((w.read_bytes + w.write_bytes) * w.count)[rows].sum()),
            )
    return found


def test_an_engine_converts_what_it_does_not_fuse() -> None:
    each = 3.0 * 7 * 32  # bytes of an element read and written, tokens, layers
    every = {"quantize": (64, 2 * HIDDEN * each), "quantize_heads": (32, HIDDEN * each)}
    every["quantize_inner"] = (32, INNER * each)
    for engine in ("sglang", "hf", "reference", "", "vllm@v0"):
        assert conversions(lower(MODEL, batch=7, seq=1, dtype="fp8", engine=engine)) == every, (
            engine
        )
    found = conversions(lower(MODEL, batch=7, seq=1, dtype="fp8", engine="vllm"))
    assert found == {"quantize_heads": every["quantize_heads"]}
    found = conversions(lower(MODEL, batch=7, seq=1, dtype="fp8", engine="trtllm"))
    assert found == {"quantize": every["quantize"]}
    assert load_engine("").quantize.inputs == INPUTS


def test_a_format_of_16_bits_and_weights_alone_convert_nothing() -> None:
    for formats in ({}, {"dtype": "fp16"}, {"weight_dtype": "int8"}, {"weight_dtype": "int4"}):
        assert conversions(lower(MODEL, engine="sglang", **formats)) == {}
    narrow = conversions(lower(MODEL, batch=1, seq=1, dtype="nvfp4", engine="sglang"))
    assert narrow["quantize_heads"][1] == 32 * HIDDEN * 2.5625


def test_mxfp4_and_mxfp6_are_arithmetic_where_a_gpu_has_their_rates() -> None:
    seconds, weights = {}, {}
    for name in ("fp8", "mxfp6", "mxfp4"):
        request = {"dtype": name, "phase": "prefill", "seq": 8192}
        (r,) = table("llama-3.1-8b", "mi355x", "depth", 0.25, **request)
        w = lower("llama-3.1-8b", **request)
        seconds[name] = (r.dense_lower, r.dense_s, r.dense_upper)
        weights[name] = memory(w, "mi355x").weights_bytes / 1e9
    # the projections of all layers; embedding and head have 16 bits
    projections, rest = 6.98, 2.10
    expected = {"fp8": 1.0, "mxfp6": 0.75 + 1 / 32, "mxfp4": 0.5 + 1 / 32}
    assert weights == {
        name: pytest.approx(size * projections + rest, rel=0.01) for name, size in expected.items()
    }
    assert seconds["mxfp4"][1] < seconds["mxfp6"][1] < seconds["fp8"][1]
    # no table of their kernels
    assert seconds["mxfp4"][2] / seconds["mxfp4"][0] > seconds["fp8"][2] / seconds["fp8"][0]
    with pytest.raises(InputError, match="b200_sxm has no mxfp4 arithmetic"):
        table("llama-3.1-8b", "b200", "depth", 0.25, dtype="mxfp4")


@pytest.mark.parametrize(
    ("family", "sparsity", "left"),
    [
        ("depth", 0.5, {name: (0.5, 0.5) for name in CONVERTED}),
        ("width", {"attention": 0.25}, {"quantize_heads": (1.0, 0.75)}),
        ("width", {"heads": 0.5}, {"quantize_heads": (1.0, 0.5)}),
        ("width", {"mlp": 0.5}, {"quantize_inner": (1.0, 0.5)}),
        ("width_cross", 0.25, {"quantize": (1.0, 0.75)}),
    ],
)
def test_conversions_shrink_with_what_they_convert(
    family: str, sparsity: Any, left: dict[str, tuple[float, float]]
) -> None:
    w = lower(MODEL, phase="decode", batch=4, seq=100, dtype="fp8", engine="sglang")
    before, after = conversions(w), conversions(prune(w, family, sparsity))
    for name in CONVERTED:
        executions, bytes_ = left.get(name, (1.0, 1.0))
        assert after[name] == pytest.approx(
            (before[name][0] * executions, before[name][1] * bytes_)
        ), name


@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm"])
@pytest.mark.parametrize(
    "name", ["h100", "h200", "l40s", "rtx_4090", "rtx_pro_6000", "b200", "h20", "l4", "mi300x"]
)
def test_fp8_is_faster_than_bf16_where_arithmetic_takes_the_time(name: str, engine: str) -> None:
    hw = load_hardware(name)
    times = [
        workload_time(lower(MODEL, seq=2048, dtype=dtype, engine=engine), hw).total_s
        for dtype in ("bf16", "fp8")
    ]
    assert times[1] < 0.95 * times[0]
