"""Define the constants of attention, of its decode kernels, and of latent attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from simulator.hardware.constant import AIC, Constant, row

# fmt: off
# sources of defaults
_CONTEXT = (f"fits on the context tables of {AIC}: A100, L40S TRT-LLM, H100 sglang (FlashAttention-3); bf16, "
    "head_dim 128")
_RIDGE = ("; tables of one GPU determine only the sum of the two times. Hopper: products at the datasheet rate leave "
    "2.3e10 exponentials/s of the 2.9e10 of 16 special functions per clock, with equal errors on H100 and H200, and "
    "7 % on the H20 (InferSim), whose SMs compute a quarter of the H100's products")
_GENERATION = (f"fits on the generation tables of {AIC} (sglang: FlashAttention on A100 and H100, FlashInfer on L40S; "
    "bf16)")
_TILES = ("0: from 1 to 16 query heads per KV head, tables of seven GPUs have one bandwidth; fits compare other values "
    "where the products of 16 rows take a quarter of the time of reading or more (H20)")
_MMA = f"0.43 to 0.54, fits of kernels with mma.sync on the context and MLA tables of {AIC} (A100, L40S, RTX PRO 6000)"
_MLA = (f"fits on the MLA tables of {AIC} (TensorRT-LLM on A100, L40S, H100, RTX PRO 6000 and B200, decode on Hopper "
    "SGLang's; bf16)")

# unit, range, source, meaning, default by architecture

PREFILL_CONSTANTS: Mapping[str, Constant] = MappingProxyType({
    "t0_s": row("s", 1e-6, 4e-5, _CONTEXT, "fixed time of the kernel and of further launches of its library",
        ampere=9.25e-6, ada=7.3e-6, hopper=1.1e-5, other=9e-6),
    "e_tc": row("1", 0.1, 1.1, _CONTEXT + _RIDGE, "share of the datasheet tensor rate that the two products achieve",
        ampere=0.505, ada=0.426, hopper=1.0, other=0.5),
    "exp_per_s": row("1/s", 1e9, 1e13, _CONTEXT + _RIDGE, "exponentials/s of an SM, in addition to its products",
        ampere=3.7e10, ada=3.7e10, hopper=2.3e10, other=3.7e10),
    "tile_s": row("s", 1e-10, 2e-5, _CONTEXT, "start and end of one query tile on an SM", ampere=9.6e-7, other=1e-9),
    "sequence_s": row("s", 1e-11, 1e-6, _CONTEXT, "scheduling one sequence of the batch", hopper=2.5e-8, other=1e-10),
    "kappa": row("1", 0.05, 6.0, _CONTEXT, "time of the longest tile alone, in units of its share of a full SM",
        ampere=1.56, ada=1.18, hopper=0.88, other=1.2),
    "e_io": row("1", 0.05, 1.0, _CONTEXT,
        "share of the datasheet bandwidth at which queries, keys, values and outputs move",
        ampere=0.305, ada=0.38, hopper=0.48, other=0.35),
    "l2_gain": row("1", 1.0, 10.0, _CONTEXT, "rate of these operands from L2 over the rate from DRAM",
        ampere=1.09, ada=3.35, hopper=1.98, other=1.3),
    "l2_share": row("1", 0.1, 4.0, _CONTEXT, "bytes over L2 size at which half are in L2",
        ampere=0.64, ada=1.07, hopper=0.53, other=0.7),
    "packs": row("1", 0.0, 1.0, "FlashAttention-3 packs so; its tables fit better with it (core 6.5 against 6.7 %)",
        "1: a tile combines the query heads of a KV head if that fills it better; 0: never",
        hopper=1.0, other=0.0),
    "pads": row("1", 0.0, 1.0, "tiles of tensor cores are padded, loops of a CPU are not",
        "1: a tile of few queries takes the time of a full tile; 0: the time of its queries", cpu=0.0, other=1.0),
    "sparse_block": row("1", 0.0, 256.0,
        "uncalibrated: a block of 16 keys fills a quarter of a 64-key step of the tensor cores",
        "edge of skipped blocks at which the remaining blocks cost twice their dense share", other=16.0),
})

DECODE_CONSTANTS: Mapping[str, Constant] = MappingProxyType({
    "t0_s": row("s", 1e-6, 4e-5, _GENERATION, "fixed time of the kernel and of further launches of its library",
        ampere=1.05e-5, ada=4.1e-6, hopper=6.65e-6, other=8e-6),
    "unit_s": row("s", 1e-9, 2e-5, _GENERATION, "start and end of a work unit on an SM",
        ampere=1.5e-6, ada=6.5e-7, hopper=2.3e-6, other=2e-6),
    "wide_s": row("s", 1e-10, 2e-5, _GENERATION,
        "further fixed time if a KV head serves more than 64 query heads (a larger tile)",
        ampere=4e-7, hopper=1.7e-6, other=5e-7),
    "sequence_s": row("s", 1e-11, 1e-6, _GENERATION, "scheduling one sequence of the batch",
        ampere=1.2e-8, ada=2.6e-9, hopper=1.1e-8, other=5e-9),
    "unit_bytes_per_s": row("B/s", 1e9, 1e12, _GENERATION, "rate at which one work unit reads its cache",
        ampere=1.4e10, ada=4e10, hopper=7.2e10, other=4e10),
    "e_d": row("1", 0.2, 1.0, _GENERATION, "share of the datasheet bandwidth that a long cache achieves",
        ampere=0.95, ada=0.83, hopper=0.93, other=0.85),
    "split_s": row("s", 1e-9, 2e-5, _GENERATION, "a second kernel that merges the parts of split caches",
        ampere=1e-8, ada=2.2e-6, hopper=1.65e-6, other=1.5e-6),
    "merge_s": row("s", 1e-9, 2e-5, _GENERATION, "further time of that kernel for 16 times the splits",
        ampere=4.6e-6, ada=1.1e-6, hopper=1.9e-6, other=2e-6),
    "l2_gain": row("1", 1.0, 10.0, _GENERATION, "rate of a cache in L2 over the rate from DRAM",
        ampere=1.0, ada=7.0, hopper=3.0, other=2.0),
    "l2_share": row("1", 0.1, 4.0, _GENERATION,
        "cache bytes over L2 size at which half are in L2", ada=1.01, other=0.71),
    "rows": row("1", 1.0, 128.0, "96 and 128 rows start no second unit in the A100 and H100 tables",
        "largest number of query rows of one KV head per unit", other=128.0),
    "units_per_sm": row("1", 0.25, 8.0, _GENERATION, "units per SM for which the splits are chosen",
        ada=2.0, other=1.0),
    "split_keys": row("1", 16.0, 4096.0, "64 to 256 fit the tables alike", "keys per split, at least", other=128.0),
    "regroup": row("1", 0.0, 4.0, "fp32 attention measured by prunesim on two cores of a Xeon",
        "further time of a cache whose KV heads serve several query heads, as a CPU packs it", cpu=1.0, other=0.0),
    "e_tc": row("1", 0.05, 1.1, _MMA, "share of the datasheet rate that the products of padded rows achieve",
        other=0.5),
    "tile_rows": row("1", 0.0, 128.0, _TILES,
        "rows that the query heads of a KV head are padded to a multiple of; 0: reading the cache hides all products",
        other=0.0),
})

DECODE_KERNELS: Mapping[tuple[str, str], Mapping[str, float]] = MappingProxyType({
    ("hopper", ""): {"tile_rows": 16.0, "e_tc": 0.5, "units_per_sm": 2.0},
    ("hopper", "sglang"): {"tile_rows": 128.0, "e_tc": 0.85},
    ("hopper", "vllm"): {"tile_rows": 64.0, "e_tc": 0.54},
})
"""Constants of decode kernels that differ from the defaults, by architecture and the stack that an engine runs ("": no
engine); they apply where that kernel was not fitted.

"": FlashInfer, which computes with mma.sync on tiles of 16 rows (include/flashinfer/utils.cuh: FA2DetermineCtaTileQ)
and has two units per SM, as in its fit on the L40S. SGLang's default is FlashAttention-3: tiles of 128 rows
(hopper/tile_size.h) at the rate of its prompts, 0.75 (H100) to 0.95 (H20) of the datasheet's. vLLM's fork of it has 64
rows (use_one_mma_wg) at 0.63 of that rate: the ratio of both for fp8 caches in the tables of H100 and H200, which SMs
bound and not memory. On an H20, SGLang's issue 5630 and pull request 6151 report FlashAttention-3 at 0.36 to 0.45 of
FlashInfer's rate."""

_LATENT_ON = ("ampere", "ada", "hopper", "blackwell", "blackwell_sm100", "*")


def _latent(registry: Mapping[str, Constant], **fitted: tuple[float, ...]) -> dict[str, Constant]:
    """Return constants of attention, some with other defaults for latent attention."""
    own = {name: dict(zip(_LATENT_ON, values, strict=True)) for name, values in fitted.items()}
    return {**registry, **{n: replace(registry[n], defaults=MappingProxyType(d), source=_MLA) for n, d in own.items()}}


_PROMPT = _latent(PREFILL_CONSTANTS,
    t0_s=(8.4e-6, 5.5e-6, 9.9e-6, 8.4e-6, 6.8e-6, 8e-6), e_tc=(0.54, 0.49, 1.0, 0.58, 0.78, 0.55),
    exp_per_s=(5.1e10, 6.1e10, 2.2e10, 5.3e10, 8.3e10, 5.5e10), kappa=(1.36, 0.63, 1.73, 0.9, 2.9, 1.3),
    tile_s=(2.3e-6, 2.1e-6, 2.4e-6, 2.6e-6, 2.2e-6, 2.3e-6), sequence_s=(7e-8, 2.7e-8, 5.7e-8, 3.6e-8, 6e-8, 5e-8),
    e_io=(0.84, 0.64, 0.9, 0.89, 0.9, 0.8), l2_gain=(1.7, 7.4, 1.0, 2.6, 1.0, 1.5))
_DECODE = _latent(DECODE_CONSTANTS,
    t0_s=(7.2e-6, 3e-6, 8.3e-6, 5.6e-6, 1e-5, 7e-6), unit_s=(1e-9, 1.6e-6, 2.3e-6, 1e-9, 1e-9, 1e-9),
    wide_s=(1e-10,) * 6, sequence_s=(5e-8, 3e-8, 2.4e-8, 1.9e-8, 3.4e-8, 3e-8),
    unit_bytes_per_s=(9.6e9, 1.5e10, 5.2e10, 1.28e10, 1e12, 1.3e10), e_d=(0.55, 0.86, 0.95, 0.9, 0.72, 0.8),
    split_s=(1.5e-6, 1.5e-6, 2.2e-6, 1.5e-6, 1e-9, 1.5e-6), merge_s=(2e-6, 2e-6, 4.1e-6, 2e-6, 5.5e-6, 2e-6),
    l2_gain=(1.8, 2.8, 1.2, 2.2, 2.6, 1.8), rows=(64.0, 64.0, 64.0, 64.0, 128.0, 64.0),
    units_per_sm=(1.0, 1.0, 1.0, 1.0, 2.0, 1.0), split_keys=(1e6, 1e6, 128.0, 1e6, 128.0, 1e6), tile_rows=(1.0,) * 6)
MLA_PREFILL_CONSTANTS: Mapping[str, Constant] = MappingProxyType({
    **_PROMPT, "e_tc": replace(_PROMPT["e_tc"], high=2.2),
})
MLA_DECODE_CONSTANTS: Mapping[str, Constant] = MappingProxyType({
    **_DECODE, "split_keys": replace(_DECODE["split_keys"], high=1e6), "e_d": replace(_DECODE["e_d"], low=0.02),
    "e_tc": row("1", 0.05, 2.2, _MLA + "; hopper: FlashMLA, 660 TFLOP/s on an H800 (README of deepseek-ai/FlashMLA): "
        "tables of H100 and H200 do not determine it",
        "share of the datasheet rate of the activations' format that the two products achieve; above 1 if they run in "
        "the format of a narrower cache, or if the time of work units includes them",
        ampere=0.54, ada=0.53, hopper=0.7, blackwell=0.56, blackwell_sm100=2.2, other=0.55),
})
# fmt: on
