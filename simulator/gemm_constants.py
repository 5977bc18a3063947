"""The named constants of the GEMM model: unit, range, meaning, default by architecture and where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from simulator.constants import Constant

_TABLES = "fit to the bf16 GEMM tables of aiconfigurator-core 0.12.0 (a100_sxm, h100_sxm, l40s, rtx_pro_6000_server)"
_GUIDE = (
    "uncalibrated: shape of the effect from NVIDIA, Matrix Multiplication Background User's Guide, section on alignment; "
    "size assumed, no table has unaligned shapes"
)
_SPARSE = "ratios of 2:4 to dense times quoted in PyTorch, CUTLASS, torchao and SliceGPT (arXiv 2401.15024, table 12)"
_PACKING = (
    "the effect: Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication, ACM TOMS 34(3), 2008; the size: fp32 GEMMs "
    "measured by prunesim on two cores of a Xeon"
)


def _constant(unit: str, low: float, high: float, meaning: str, source: str, **defaults: float) -> Constant:
    values = {("*" if name == "other" else name): value for name, value in defaults.items()}
    return Constant(unit, low, high, meaning, MappingProxyType(values), source)


CONSTANTS: Mapping[str, Constant] = MappingProxyType(
    {
        "t0": _constant(
            "s",
            1e-7,
            5e-5,
            "fixed time of a kernel inside a CUDA graph",
            _TABLES,
            ampere=3.0e-6,
            ada=1.95e-6,
            hopper=2.7e-6,
            blackwell=1.95e-6,
            cpu=5e-6,
            other=2.7e-6,
        ),
        "e_tc": _constant(
            "1",
            0.05,
            1.3,
            "share of the datasheet rate the main loop reaches",
            _TABLES,
            ampere=1.0,
            ada=0.64,
            hopper=0.81,
            blackwell=0.64,
            cpu=0.8,
            other=0.8,
        ),
        "tau": _constant(
            "s",
            1e-9,
            5e-6,
            "shortest main-loop step (128 bytes of k)",
            _TABLES,
            ampere=3.0e-7,
            ada=2.23e-7,
            hopper=8.6e-8,
            blackwell=2.0e-7,
            cpu=1e-8,
            other=2e-7,
        ),
        "b_e": _constant(
            "B/s",
            1e8,
            1e13,
            "rate one SM stores its finished tile at",
            _TABLES,
            ampere=3.0e10,
            ada=3.0e10,
            hopper=3.0e10,
            blackwell=3.0e10,
            cpu=1e10,
            other=3.0e10,
        ),
        "b_l2": _constant(
            "B/s",
            1e10,
            1e15,
            "rate L2 feeds operands to all SMs at",
            _TABLES,
            ampere=5.6e12,
            ada=7.1e12,
            hopper=5.0e13,
            blackwell=1.0e13,
            cpu=1e12,
            other=7e12,
        ),
        "e_d": _constant(
            "1",
            0.1,
            1.1,
            "share of the datasheet bandwidth DRAM reaches",
            _TABLES,
            ampere=0.76,
            ada=0.78,
            hopper=0.81,
            blackwell=0.8,
            cpu=0.7,
            other=0.78,
        ),
        "b_hit": _constant(
            "B/s",
            1e10,
            1e15,
            "rate of operands that are in L2",
            _TABLES,
            ampere=2.0e12,
            ada=3.0e12,
            hopper=6.0e12,
            blackwell=5.0e12,
            cpu=2e11,
            other=4e12,
        ),
        "c_l2": _constant(
            "1",
            0.05,
            4.0,
            "share of L2 where half a footprint stays resident",
            _TABLES,
            ampere=1.5,
            ada=1.05,
            hopper=0.75,
            blackwell=1.0,
            cpu=0.8,
            other=1.0,
        ),
        "l2_power": _constant("1", 0.5, 16.0, "sharpness of that transition", _TABLES, ampere=4.0, other=16.0),
        "t_s": _constant(
            "s",
            0.0,
            1e-4,
            "fixed time of adding up the parts of a split-K",
            _TABLES,
            ampere=2.5e-6,
            ada=2.6e-6,
            hopper=2.9e-6,
            blackwell=2.6e-6,
            cpu=2e-6,
            other=2.6e-6,
        ),
        "b_s": _constant(
            "B/s",
            1e9,
            1e15,
            "rate those parts are written and read at",
            _TABLES,
            ampere=2.0e12,
            ada=2.0e12,
            hopper=3.0e12,
            blackwell=2.0e12,
            cpu=1e11,
            other=2e12,
        ),
        "b_convert": _constant(
            "B/s",
            1e9,
            1e15,
            "rate 16-bit activations are converted at before a product of 8-bit formats",
            _TABLES + ", fp8 rows",
            ampere=1.5e12,
            ada=8e11,
            hopper=2e12,
            blackwell=1.5e12,
            cpu=1e11,
            other=1.5e12,
        ),
        "t0_8bit": _constant(
            "s",
            1e-7,
            1e-4,
            "t0 of 8-bit formats without a fit of their own: the conversion is a launch too",
            "uncalibrated: assumed",
            other=1.2e-5,
        ),
        "e_tc_8bit": _constant(
            "1",
            0.05,
            1.3,
            "e_tc of 8-bit formats without a fit of their own",
            "uncalibrated: assumed",
            ampere=0.9,
            ada=0.6,
            hopper=0.75,
            blackwell=0.6,
            cpu=0.5,
            other=0.7,
        ),
        "align_step": _constant(
            "1",
            0.0,
            3.0,
            "main-loop time added per halving of the alignment of n or k below 16 bytes",
            _GUIDE,
            ampere=0.15,
            ada=0.15,
            hopper=0.3,
            blackwell=0.15,
            cpu=0.02,
            other=0.15,
        ),
        "align_load": _constant(
            "1",
            0.0,
            3.0,
            "weight-load time added per halving of that alignment",
            _GUIDE,
            ampere=0.06,
            ada=0.06,
            hopper=0.08,
            blackwell=0.06,
            cpu=0.02,
            other=0.06,
        ),
        "sparse_step": _constant(
            "1",
            0.1,
            1.2,
            "e_tc of 2:4 kernels over that of dense ones, both of their own datasheet rate",
            _SPARSE,
            ampere=0.87,
            ada=0.9,
            hopper=0.65,
            blackwell=0.65,
            cpu=0.5,
            other=0.7,
        ),
        "sparse_load": _constant(
            "1",
            0.1,
            1.2,
            "e_d of 2:4 kernels over that of dense ones",
            "uncalibrated: no 16-bit ratio at small m is published; set so that compressed weights alone gain nothing",
            other=0.56,
        ),
        "sparse_time": _constant(
            "s",
            0.0,
            1e-4,
            "fixed time a 2:4 kernel takes above a dense one",
            "uncalibrated: order of the launch of cuSPARSELt kernels",
            other=2e-6,
        ),
        "quant_time": _constant(
            "s",
            0.0,
            1e-4,
            "fixed time a weight-only quantised kernel takes above a dense one",
            "uncalibrated: assumed; the A100 profile holds a fit to its int8_wo and int4_wo rows",
            other=6e-6,
        ),
        "quant_step": _constant(
            "1",
            0.05,
            1.2,
            "e_tc of weight-only quantised kernels over that of dense ones",
            "uncalibrated: assumed; the A100 profile holds a fit to its int8_wo and int4_wo rows",
            other=0.7,
        ),
        "quant_load": _constant(
            "1",
            0.05,
            1.2,
            "e_d of weight-only quantised kernels over that of dense ones",
            "uncalibrated: assumed; the A100 profile holds a fit to its int8_wo and int4_wo rows",
            other=0.85,
        ),
        "block_step": _constant(
            "1", 0.1, 1.2, "e_tc of kernels that skip blocks of rows, over that of dense ones", "uncalibrated: assumed", other=0.85
        ),
        "pack": _constant(
            "1", 0.01, 10.0, "time of rearranging the weights before a product on a CPU, over that of reading them", _PACKING, other=0.85
        ),
        "pack_m": _constant("1", 1.0, 64.0, "rows from which a CPU's product rearranges its weights", _PACKING, other=4.0),
    }
)
"""GEMM constants by name. A fit searches within ``low`` and ``high``."""
