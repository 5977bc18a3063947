"""Names that requests, files and codes share; this module imports no NumPy, because every command
needs it."""

from __future__ import annotations

import re

PHASES: tuple[str, ...] = ("prefill", "decode", "generate", "serve")
"""Phases that :func:`simulator.lower` accepts."""

CONNECTIONS: tuple[str, ...] = ("nvswitch", "xgmi", "bridge", "pcie", "pcie-host")
"""Connections between devices (docs/model.md describes them); PCIe may have a generation and lanes
(:data:`PCIE`)."""

PCIE = re.compile(r"pcie(?P<generation>[3-6])?(x(?P<lanes>4|8|16))?(?P<host>-host)?")

PARALLEL: tuple[str, ...] = ("tensor", "expert", "pipeline")
"""Ways to divide a model among devices."""

BENCHMARKS = "vllm bench, SGLang, trtllm-bench, genai-perf or AIPerf"
"""Tools whose result files :mod:`simulator.prediction.benchmarks` reads, as the help names them."""

STACKS: tuple[str, ...] = ("vllm", "sglang", "trtllm", "torch", "flashinfer", "aiter")
"""Software stacks that sections are fitted on, in the order of the default engine, which counts if
none is named."""

DTYPES: tuple[str, ...] = (
    "fp32",
    "tf32",
    "fp16",
    "bf16",
    "fp8",
    "int8",
    "int4",
    "fp8_block",
    "nvfp4",
    "mxfp4",
    "mxfp6",
)
"""Names of number formats; the index is the code in the columns ``dtype`` and ``weight_dtype``.

fp8_block is a format of weights for fp8 arithmetic, with one scale per 128 x 128 weights. mxfp4
weights with 16-bit activations are those of routed experts only."""
