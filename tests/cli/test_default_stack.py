"""The kernels of a device when nobody names an engine or a stack are those of the default
engine."""

from __future__ import annotations

from typing import Any

import pytest

import simulator
from simulator.engines.engine import load_engine


@pytest.mark.parametrize("name", ["rtx_pro_6000", "h100", "a100", "l40s", "b200"])
def test_a_device_alone_has_the_kernels_of_the_default_engine(name: str) -> None:
    alone, served = (
        simulator.load_hardware(name),
        simulator.load_hardware(name).serving(load_engine("vllm").stacks),
    )
    assert simulator.Request().engine == "vllm"
    assert {key: s.stack for key, s in alone.sections.items()} == {
        key: s.stack for key, s in served.sections.items()
    }
    assert alone.section("attention_decode", "bf16").stack == "vllm"


def test_gemm_names_the_stack_whose_kernels_it_times(cli: Any) -> None:
    rows = cli.json(
        "gemm 64 4096 4096 --hardware rtx_pro_6000,rtx_pro_6000@trtllm,t4,cpu --dtype fp32"
    )
    assert [(r["stack"], r["status"]) for r in rows] == [
        ("", "default"),
        ("", "default"),
        ("", "default"),
        ("", "calibrated"),
    ]
    # GEMMs were timed on random inputs for SGLang, not for vLLM
    rows = cli.json("gemm 64 4096 4096 --hardware a100,a100@vllm,a100@trtllm")
    assert [r["stack"] for r in rows] == ["sglang", "vllm", "trtllm"]
    # a format that vLLM's tables lack is another stack's, unless its kernels are known to differ
    fp8 = "--dtype fp8 --weight-dtype fp8_block"
    (stood_in,) = cli.json(f"gemm 64 4096 4096 --hardware h100@vllm {fp8}")
    assert (stood_in["stack"], stood_in["status"]) == ("sglang", "inherited")
    (marlin,) = cli.json("gemm 64 4096 4096 --hardware a100 --weight-dtype int4")
    assert (marlin["stack"], marlin["status"]) == ("", "default")
    assert "not fitted" in cli.out("gemm 64 4096 4096 --hardware t4 --dtype fp16")
    assert " own " in cli.out("gemm 64 4096 4096 --hardware cpu --dtype fp32")
