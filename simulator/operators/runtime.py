"""Constants of what runs operators: launches, gaps and clocks of a device and its software, section "runtime"."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from simulator.operators.base import Constant, row

# fmt: off
_GRAPH = ("0: operator times are fitted on CUDA-graph replays and hold the gap; a profile fitted on bare kernel times "
    "sets it")
_EAGER = ("geometric mean of two hosts, 10.1 us (H20) and 27.1 us (L4), of which published_dense.csv has eager "
    "Transformers at batch 1 among the rows fitted on")
_LOADED = ("ampere: published prefill times on an A100 among the rows fitted on (MInference, TriangleMix; "
    "published_dense.csv); others: no sign of it (RTX PRO 6000, H100)")

RUNTIME_CONSTANTS: Mapping[str, Constant] = MappingProxyType({
    "graph_gap_s": row("s", 0.0, 2e-5, _GRAPH,
        "idle time between two kernels of a CUDA graph that the times of kernels exclude", other=0.0),
    "host_op_s": row("s", 1e-7, 1e-3, _EAGER,
        "host time to launch one kernel in an eager framework (interpreter, dispatcher, driver)",
        other=16.5e-6, cpu=5e-6),
    "sustained": row("1", 1.0, 2.0, _LOADED,
        "time of compute-bound GEMMs in a pass over their time in a short benchmark, as clocks drop under load",
        other=1.0, ampere=1.12),
})
# fmt: on
