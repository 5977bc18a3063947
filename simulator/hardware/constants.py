"""Define the constants of every cost model: unit, range, meaning, default by architecture, and its source."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from simulator.hardware.attention_constants import (
    DECODE_CONSTANTS,
    MLA_DECODE_CONSTANTS,
    MLA_PREFILL_CONSTANTS,
    PREFILL_CONSTANTS,
)
from simulator.hardware.constant import AIC, Constant, joined, row

# fmt: off
# sources of defaults
_TABLES = f"fit to the bf16 GEMM tables of {AIC} (a100_sxm, h100_sxm, l40s, rtx_pro_6000_server)"
_NARROW = (f"fp8 and bf16 sections fitted to {AIC} (H100, H200, L40S, RTX PRO 6000, B200; TensorRT-LLM and SGLang): "
    "geometric mean of ten ratios")
_GUIDE = ("uncalibrated: shape of the effect from NVIDIA, Matrix Multiplication Background User's Guide, section on "
    "alignment; size assumed")
_OFF_16 = ("ampere: NIRVANA's table 8 (A100, Llama-3.1-8B, 4096 tokens: 0.45 s with an inner width of 11468, 0.33 s "
    "with 11472; the MLP's GEMMs are 0.14 s of that, so 0.12 s more is 0.85 of them for one halving); blackwell: up to "
    "35 % of the gain lost (arXiv 2606.09080, appendix C, RTX PRO 6000: half a width takes 0.5 + 0.35 x 0.5 of the "
    "time, 0.35 more for three halvings); others: least squares of the log times of both, half to twice it")
_OFF_16_NARROW = "arXiv 2606.09080, appendix C (RTX PRO 6000): fp8 off 16 bytes runs at 11 % of the aligned rate"
_SPARSE = ("ratios of 2:4 to dense times; ampere: least squares, A100 (SliceGPT, arXiv 2401.15024, table 12; PyTorch "
    "pull requests 90119 and 96147) and RTX 3060 (torchao issue 174); hopper: between fp8 of torchao's CUTLASS kernels "
    "(arXiv 2503.16672) and one fp16 GEMM (PyTorch pull request 177866); blackwell: least squares, RTX 5090 from 4,096 "
    "tokens on (ZhuYe0729/fake); others: assumed, the geometric mean of these")
_COMPRESSED = ("blackwell: RTX 5090 to 64 tokens (ZhuYe0729/fake); others: assumed, the geometric mean share of the "
    "saved bytes that two kernels gain at few tokens: 0.50 (RTX 5090: 0.7x to 1.1x of 1.78x) and 0.87 (fp8 on Hopper: "
    "1.39x of 1.6x)")
_PLAN = ("blackwell: RTX 5090 (ZhuYe0729/fake), least squares to 64 tokens, whatever n; others: assumed, the geometric "
    "mean of that and of a dense step")
_DELTA = "assumed from similar kernels, not fitted; compared with alibaba/InferSim's H20 rows in docs/model.md"
_STEPS = "slope of alibaba/InferSim's decode steps on an H20, 64 to 1,024 sequences: 1.86 us for the 4.2 MB of each"
_PACKING = ("the effect: Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication, ACM TOMS 34(3), "
    "2008; the size: fp32 GEMMs measured by prunesim on two cores of a Xeon")
_ASSUMED = "uncalibrated: assumed"
_QUANTISED = (f"where a profile has no section int8_wo or int4_wo: fit to those rows of {AIC}, a100_sxm trtllm, with "
    "the dense constants as they are, tau and b_l2 by bytes (m <= 16: 17-20 %, no bias); of the 9.5 us they start "
    "later, 4.7 are TensorRT's layer profiler, which its int8 kernels show too")
_STUDY = ("study of kernel tables (A100, H100): floors 1.6-3.8 us, 0.36-1.05 of the datasheet bandwidth; "
    "uncalibrated on this device")
_RTX = f"fit on rtx4090_other_ops.csv (RTX 4090); elsewhere: {_STUDY}"
_SCALED = (f"fits on the quantisation tables of {AIC}, scale_matrix of vLLM (static_scaled_fp8_quant) and "
    "TensorRT-LLM (L40S, H100, H200, RTX PRO 6000, B200); geometric mean over stacks, median error 4 to 15 %")
_GRAPH = ("0: operator times are fitted on CUDA-graph replays and hold the gap; a profile fitted on bare kernel times "
    "sets it")
_EAGER = ("geometric mean of two hosts, 10.1 us (H20) and 27.1 us (L4), of which published_dense.csv has eager "
    "Transformers at batch 1 among the rows fitted on")
_LOADED = ("ampere: published prefill times on an A100 among the rows fitted on (MInference, TriangleMix; "
    "published_dense.csv); others: no sign of it (RTX PRO 6000, H100)")
_NCCL = (f"NCCL and engine all-reduce tables of {AIC} (a100_sxm, h100_sxm, h200_sxm, b200_sxm, l40s, "
    "rtx_pro_6000_server; 2, 4 and 8 devices)")

_HOST_MEMORY = ("NVIDIA/nccl issue 1639, https://github.com/NVIDIA/nccl/issues/1639 (RTX 5090 over PCIe 5 on two Xeon "
    "8480+: 35 GB/s with 4 devices, 28 GB/s with 8)")
_PEERS = ("vLLM's all-reduce needs peer access, vllm/distributed/device_communicators/custom_all_reduce.py")
_MOE = (f"joint fit to the MoE tables of {AIC} (all formats, tensor parallel alone) and to grouped products of an H20 "
    "(alibaba/InferSim@f2293da), by architecture around a fit to all GPUs")
_MOE_E_TC = f"{_MOE}; the H20, whose SMs are the H100's at a quarter of the tensor rate, separates it from b_sm"
_H20 = "grouped products of an H20, alone (alibaba/InferSim@f2293da, DeepGEMM, kernel times)"

# unit, range, source, meaning, default by architecture

GEMM_CONSTANTS: Mapping[str, Constant] = MappingProxyType({
    "t0": row("s", 1e-7, 5e-5, _TABLES,
        "fixed time of a kernel in a CUDA graph",
        ampere=3.0e-6, ada=1.95e-6, hopper=2.7e-6, blackwell=1.95e-6, cpu=5e-6, other=2.7e-6),
    "e_tc": row("1", 0.05, 1.3, _TABLES, "share of the datasheet rate that the main loop achieves",
        ampere=1.0, ada=0.64, hopper=0.81, blackwell=0.97, blackwell_sm100=0.7, cpu=0.8, other=0.8),
    "tau": row("s", 1e-9, 5e-6, _TABLES, "shortest main-loop step (128 bytes of k)",
        ampere=3.0e-7, ada=2.23e-7, hopper=8.6e-8, blackwell=2.0e-7, cpu=1e-8, other=2e-7),
    "b_e": row("B/s", 1e8, 1e13, _TABLES, "rate at which one SM stores its finished tile",
        ampere=3.0e10, ada=3.0e10, hopper=3.0e10, blackwell=3.0e10, cpu=1e10, other=3.0e10),
    "b_l2": row("B/s", 1e10, 1e15, _TABLES, "rate at which L2 feeds operands to all SMs",
        ampere=5.6e12, ada=7.1e12, hopper=5.0e13, blackwell=1.0e13, cpu=1e12, other=7e12),
    "e_d": row("1", 0.1, 1.0, _TABLES, "share of the datasheet bandwidth that DRAM achieves",
        ampere=0.76, ada=0.78, hopper=0.81, blackwell=0.8, cpu=0.7, other=0.78),
    "b_hit": row("B/s", 1e10, 1e15, _TABLES, "rate of operands in L2",
        ampere=2.0e12, ada=3.0e12, hopper=6.0e12, blackwell=5.0e12, cpu=2e11, other=4e12),
    "c_l2": row("1", 0.05, 1.0, _TABLES, "footprint, as a share of L2, of which half stays in L2",
        ampere=0.8, ada=1.0, hopper=0.75, blackwell=0.8, cpu=0.8, other=0.8),
    "l2_power": row("1", 0.5, 16.0, _TABLES, "sharpness of that transition", ampere=4.0, other=16.0),
    "t_s": row("s", 0.0, 1e-4, _TABLES, "fixed time of summing the parts of a split-K",
        ampere=2.5e-6, ada=2.6e-6, hopper=2.9e-6, blackwell=2.6e-6, cpu=2e-6, other=2.6e-6),
    "b_s": row("B/s", 1e9, 1e15, _TABLES, "rate at which these parts are written and read",
        ampere=2.0e12, ada=2.0e12, hopper=3.0e12, blackwell=2.0e12, cpu=1e11, other=2e12),
    "narrow_step": row("1", 0.05, 1.3, _NARROW,
        "e_tc of formats below 16 bits without their own fit over that of 16 bits", cpu=0.6, other=0.93),
    "align_step": row("1", 0.0, 3.0, _OFF_16,
        "main-loop time added if the alignment of n or k is half of 16 bytes; sqrt(2) and sqrt(3) times that at a "
        "quarter and an eighth",
        ampere=0.85, blackwell=0.20, cpu=0.02, other=0.38),
    "align_step_8bit": row("1", 0.0, 30.0, _OFF_16_NARROW,
        "main-loop time added if n or k of formats of 8 bits and fewer is off 16 bytes", cpu=0.02, other=8.1),
    "align_load": row("1", 0.0, 3.0, _GUIDE, "weight-load time added per halving of that alignment",
        ampere=0.06, ada=0.06, hopper=0.08, blackwell=0.06, cpu=0.02, other=0.06),
    "sparse_step": row("1", 0.1, 1.2, _SPARSE,
        "e_tc of 2:4 kernels over that of dense kernels, each relative to its datasheet rate",
        ampere=0.9, hopper=0.65, blackwell=1.05, cpu=0.5, other=0.85),
    "sparse_load": row("1", 0.1, 1.2, _COMPRESSED, "e_d of 2:4 kernels over that of dense kernels",
        blackwell=1.0, other=0.66),
    "sparse_time": row("s", 0.0, 1e-4, "uncalibrated: order of the launch of cuSPARSELt kernels",
        "further fixed time of a 2:4 kernel over a dense kernel", other=2e-6),
    "sparse_tau": row("s", 1e-9, 5e-6, _PLAN,
        "main-loop step (128 bytes of k) of a 2:4 kernel with one plan for all shapes: a block walks the whole k",
        blackwell=6.4e-7, other=3.6e-7),
    "quant_time": row("s", 0.0, 1e-4, _QUANTISED,
        "further fixed time of a weight-only quantised kernel over a dense kernel", other=5e-6),
    "quant_step": row("1", 0.05, 1.2, _QUANTISED,
        "e_tc of weight-only quantised kernels over that of dense kernels", other=0.73),
    "block_step": row("1", 0.1, 1.2, _ASSUMED,
        "e_tc of kernels that skip blocks of rows over that of dense kernels", other=0.85),
    "pack": row("1", 0.01, 10.0, _PACKING,
        "time to rearrange the weights before a GEMM on a CPU, over the time to read them", other=0.85),
    "pack_m": row("1", 1.0, 64.0, _PACKING, "rows from which a GEMM on a CPU rearranges its weights", other=4.0),
})

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

COLLECTIVE_CONSTANTS: Mapping[str, Constant] = MappingProxyType({
    "t0_s": joined("s", 1e-7, 1e-4, _NCCL, "start of a library's collective in a CUDA graph",
        pcie=4.0e-6, nvlink3=8.6e-6, nvlink4=4.5e-6, nvlink5=7.4e-6, other=5.5e-6),
    "hop_s": joined("s", 0.0, 1e-4, _NCCL, "one of its synchronising steps; without a fit, the latency of the link",
        pcie=1.4e-6, other=9e-7),
    "e_link": joined("1", 0.01, 1.0, f"{_NCCL}; pcie3 and pcie4: the L40S; pcie_host: {_HOST_MEMORY}",
        "share of the link's bandwidth in one direction of a large payload",
        pcie=0.57, pcie3=0.65, pcie4=0.65, pcie_host=0.5, nvlink3=0.75, nvlink4=0.78, nvlink5=0.74, other=0.77),
    "sharing": joined("1", 0.0, 3.0, f"{_NCCL}; three hosts with PCIe have 0, 0.33 and 1.95",
        "power of 2 / devices by which bandwidth drops, as devices share it", pcie=0.5, other=0.0),
    "pipe_s": joined("s", 1e-8, 1e-3, _NCCL, "times the transfer time, the square of the time to fill the pipeline",
        pcie=5.5e-6, nvlink3=3.2e-5, nvlink4=1.27e-5, nvlink5=2.1e-5, other=1.5e-5),
    "own_devices": joined("1", 0.0, 1e5, f"{_NCCL}: two over PCIe, all over NVLink; pcie_host: {_PEERS}",
        "devices up to which the engine has its own all-reduce; 0: it has none", pcie=2.0, pcie_host=0.0, other=8.0),
    "own_bytes": joined("B", 0.0, 1e12, _NCCL, "largest payload of the engine's all-reduce",
        pcie=6.7e7, nvlink3=8.39e6, other=1.68e7),
    "own_t0_s": joined("s", 1e-7, 1e-4, _NCCL, "start of the engine's all-reduce",
        pcie=5.5e-6, nvlink3=4.6e-6, nvlink4=3e-6, nvlink5=5.1e-6, other=3.5e-6),
    "own_hop_s": joined("s", 0.0, 1e-5, _NCCL, "further start time per device",
        pcie=0.0, nvlink3=1.25e-7, nvlink4=9.2e-8, nvlink5=1.06e-7, other=1.2e-7),
    "own_e": joined("1", 0.01, 1.0, _NCCL, "share of the link's bandwidth that its reads achieve",
        pcie=0.59, nvlink3=0.56, nvlink4=0.65, nvlink5=0.5, other=0.65),
    "own_step_s": joined("s", 1e-8, 1e-4, _NCCL, "its second synchronising step, if it needs two",
        pcie=6e-6, nvlink3=9e-6, nvlink4=5.8e-6, nvlink5=9.1e-6, other=6e-6),
})
"""Constants with defaults by kind of link (:attr:`simulator.hardware.link.Link.defaults`), instead of the
architecture."""

EXPERTS_CONSTANTS: Mapping[str, Constant] = MappingProxyType({
    "t0_s": row("s", 1e-6, 2e-4, _MOE, "fixed time of all kernels except the products: sorting of tokens, activation, "
        "sum", ampere=2.1e-5, ada=7.6e-6, hopper=1.9e-5, blackwell=3.2e-5, blackwell_sm100=1.5e-5, other=2e-5),
    "product_s": row("s", 1e-7, 1e-4, _H20, "fixed time of one grouped product", other=5.2e-6),
    "expert_s": row("s", 1e-11, 1e-6, _MOE, "further fixed time per expert of the device",
        ampere=5.4e-8, ada=1.6e-8, hopper=2.3e-8, blackwell=3.4e-8, blackwell_sm100=1.4e-9, other=2.6e-8),
    "e_tc": row("1", 0.05, 1.0, _MOE_E_TC, "share of the datasheet rate in the arithmetic of a tile", other=0.85),
    "b_sm": row("B/s", 1e10, 1e13, _MOE, "rate at which an SM loads the weights of a tile",
        ampere=3.2e10, ada=3.3e10, hopper=1.5e11, blackwell=7.8e10, blackwell_sm100=2.3e11, other=4.4e10),
    "least_rows": row("1", 8.0, 64.0, _MOE, "rows of the smallest tile in arithmetic: fewer take as long",
        ada=36, hopper=44, blackwell=16, ampere=16, blackwell_sm100=16, other=29),
    "tail": row("1", 0.01, 4.0, _MOE, "tiles that an SM computes alone at the end of a product", other=0.04),
    "e_d": row("1", 0.1, 1.0, _MOE, "share of the datasheet bandwidth that weights from DRAM achieve",
        ampere=0.99, ada=0.81, hopper=0.96, blackwell=0.83, blackwell_sm100=0.95, other=0.88),
    "e_io": row("1", 0.03, 3.0, _MOE, "share of that bandwidth of permuting, activating and summing activations",
        ampere=0.42, ada=0.64, hopper=0.33, blackwell=0.6, blackwell_sm100=0.37, other=0.45),
    "l2_gain": row("1", 1.0, 10.0, _MOE, "rate of weights in L2 over the rate from DRAM",
        ampere=8.1, ada=10, hopper=9, blackwell=4.7, blackwell_sm100=7.2, other=8.7),
    "l2_share": row("1", 0.1, 4.0, _MOE, "bytes of weights in use over L2 size at which half are in L2",
        ampere=0.36, ada=1, hopper=0.49, blackwell=0.96, blackwell_sm100=0.27, other=0.93),
    "narrow": row("1", 0.1, 256.0, _MOE, "columns added to the width of every expert",
        ampere=1.8, ada=1.4, hopper=22, blackwell=0.25, blackwell_sm100=64, other=12),
    "align": row("1", 0.01, 10.0, f"{_MOE}; geometric mean over stacks",
        "further time of an expert whose width is not a multiple of 16",
        ada=1.1, hopper=0.82, blackwell=0.04, blackwell_sm100=0.4, other=0.47),
})

DELTA_NET_CONSTANTS: Mapping[str, Constant] = MappingProxyType({
    "t0_s": row("s", 1e-6, 1e-4, _DELTA, "fixed time of convolution and recurrence of a decode step: two kernels in a "
        "CUDA graph", other=8e-6),
    "prompt_s": row("s", 1e-6, 2e-4, _DELTA, "fixed time of convolution and the five kernels of a prompt",
        other=2.4e-5),
    "chunk_s": row("s", 1e-8, 1e-4, _DELTA, "time of one step of the chain of chunks: a load from DRAM, and two "
        "products that depend on each other", other=1.5e-6),
    "e_tc": row("1", 0.02, 1.0, _DELTA, "share of the datasheet tensor rate of products of 64 rows: below the 0.5 of "
        "attention, whose tiles are larger", other=0.4),
    "e_d": row("1", 0.05, 1.0, _STEPS, "share of the datasheet bandwidth at which states and intermediate results "
        "move", other=0.57),
    "e_conv": row("1", 0.02, 1.0, _DELTA, "share of that bandwidth in the convolution, whose state of a channel has "
        "three positions, 6 bytes of a sector of 32", other=0.3),
})
# fmt: on

# fmt: off
CLASSES: tuple[str, ...] = (
    "norm", "final_norm", "rotary", "activation", "embedding", "copy", "select", "scatter", "quantize",
)
# fmt: on
"""Classes of elementwise operators, each with its own bandwidth and floor; the order is that of the arrays' rows."""


def _elementwise() -> dict[str, Constant]:
    floors_s = (2.1e-6, 2.6e-6, 2.4e-6, 3.1e-6, 3.9e-6, 2.2e-6, 3.8e-6, 3.9e-6)
    shares = (0.75, 0.75, 0.65, 0.85, 0.75, 0.70, 0.36, 0.75)
    rates = {}
    for name, floor_s, share in zip(CLASSES, floors_s, shares):
        rates[f"t0_{name}_s"] = row("s", 5e-7, 5e-5, _RTX, f"floor of a {name} kernel", other=floor_s)
        meaning = f"share of the DRAM bandwidth that a large {name} operator achieves"
        rates[f"e_{name}"] = row("1", 0.001, 1.0, _STUDY, meaning, other=share)
        meaning = f"rate of a {name} operator with data in L2 over its DRAM rate"
        rates[f"l2_{name}"] = row("1", 1.0, 6.0, _RTX, meaning, ada=2.5, other=1.5)
    return rates


# fmt: off
_QUANTIZE = {
    "t0_quantize_s": row("s", 5e-7, 5e-5, _SCALED, "floor of a kernel that converts activations",
        ada=2.35e-6, hopper=1.85e-6, blackwell=1.8e-6, blackwell_sm100=2.3e-6, other=2e-6),
    "e_quantize": row("1", 0.001, 1.0, _SCALED,
        "share of the DRAM bandwidth that the conversion of many activations achieves",
        ada=0.83, hopper=0.85, blackwell=0.86, blackwell_sm100=0.72, other=0.83),
    "l2_quantize": row("1", 1.0, 10.0, _SCALED, "rate of a conversion with data in L2 over its DRAM rate",
        ada=7.0, hopper=1.1, blackwell=3.3, blackwell_sm100=1.0, other=1.5),
}

ELEMENTWISE_CONSTANTS: Mapping[str, Constant] = MappingProxyType({
    **_elementwise(), **_QUANTIZE,
    "l2_share": row("1", 0.05, 4.0, _RTX,
        "bytes of an operator over L2 size at which half are in L2", other=0.8),
})

_CONSTANTS: dict[str, Mapping[str, Constant]] = {
    "gemm": GEMM_CONSTANTS,
    "attention_prefill": PREFILL_CONSTANTS,
    "attention_decode": DECODE_CONSTANTS,
    "mla_prefill": MLA_PREFILL_CONSTANTS,
    "mla_decode": MLA_DECODE_CONSTANTS,
    "elementwise": ELEMENTWISE_CONSTANTS,
    "runtime": RUNTIME_CONSTANTS,
    "collective": COLLECTIVE_CONSTANTS,
    "experts": EXPERTS_CONSTANTS,
    "delta_net": DELTA_NET_CONSTANTS,
}
# fmt: on
CONSTANTS: Mapping[str, Mapping[str, Constant]] = MappingProxyType(_CONSTANTS)
"""Constants by operator: those of each fitted section of a profile."""


def add_constants(operator: str, constants: Mapping[str, Constant]) -> None:
    """Add the constants of an operator whose cost model is defined elsewhere, before such profiles are read."""
    if operator in CONSTANTS:
        raise ValueError(f"the constants of {operator!r} are known already")
    _CONSTANTS[operator] = constants
