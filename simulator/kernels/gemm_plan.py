"""What a profile says about GEMMs of one number format and kernel, worked out once, and the price of odd alignment."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError
from simulator.hardware.constants import GEMM_CONSTANTS as CONSTANTS
from simulator.hardware.memo import PerObject
from simulator.kernels.exact import Exact, exact_of
from simulator.kernels.gemm_core import PACKING_ARCHITECTURES, PERSISTENT_ARCHITECTURES, Core, Machine, machine_core
from simulator.kernels.intervals import Bands, bands_of
from simulator.kernels.lattice import Residual, between_measured, residual_of
from simulator.kernels.optime import BOUNDS

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile

F = NDArray[np.floating[Any]]

ELEMENT_BYTES: Mapping[str, float] = {
    "fp32": 4.0,
    "tf32": 4.0,
    "fp16": 2.0,
    "bf16": 2.0,
    "fp8": 1.0,
    "int8": 1.0,
    "int4": 0.5,
}
DENSE, SPARSE24, UNSTRUCTURED, BLOCK_SPARSE = range(4)
PRECISION = np.float32
"""Arithmetic of predictions; the fit's is float64. Results are float64 either way, 1e-6 apart at most."""


@dataclass(frozen=True)
class Plan:
    """What a profile says about GEMMs of one dtype, weight format and kernel, as numbers."""

    core: Core
    residual: Residual | None
    bands: Bands
    flop_rate: float  # datasheet, of the kernel's path
    pad_m: float
    align_step: float
    align_load: float
    load_scale: float
    widen: float  # extra log half-width of what no fit has seen
    kinds: NDArray[
        np.int8
    ]  # per tile of the menu: code in BOUNDS of what its main-loop step waits for, arithmetic or latency
    exact: Exact | None  # shapes measured with cold weights, used in place of the model


_PLANS: PerObject[Plan] = PerObject()


def gemm_plan(hw: HardwareProfile, dtype: str, weight_dtype: str | None, kernel: int) -> Plan:
    """The plan of a profile, made on first use and kept with it.

    Raises
    ------
    InputError
        For a dtype the device lacks or a weight format that is none.
    """
    return _PLANS.get(hw, (dtype, weight_dtype, kernel), lambda: _plan(hw, dtype, weight_dtype, kernel))


def _plan(hw: HardwareProfile, dtype: str, weight_dtype: str | None, kernel: int) -> Plan:
    rate = hw.rate(dtype)
    weight = weight_dtype or dtype
    if weight not in ELEMENT_BYTES:
        raise InputError(f"weight dtype {weight!r} is unknown; expected one of {', '.join(ELEMENT_BYTES)}")
    section = hw.section("gemm", dtype)
    c = {name: float(section[name]) for name in CONSTANTS}
    if section.status == "default" and ELEMENT_BYTES[dtype] == 1.0:
        c["e_tc"], c["t0"] = c["e_tc_8bit"], c["t0_8bit"]
    element, weight_bytes, peak = ELEMENT_BYTES[dtype], ELEMENT_BYTES[weight], rate.flop_per_s
    load_scale, pad_m, widen = 1.0, 1.0, 0.0
    if kernel == SPARSE24:
        if rate.sparse_factor <= 1.0:
            raise InputError(f"{hw.name} has no 2:4 sparse tensor cores for {dtype}")
        peak *= rate.sparse_factor
        c["e_tc"] *= c["sparse_step"]
        c["t0"] += c["sparse_time"]
        load_scale /= c["sparse_load"]
        dense_bytes, weight_bytes = (
            weight_bytes,
            0.5 * weight_bytes + 0.125,
        )  # half the values, two bits of index for each
        c["b_l2"] *= (
            2.0 * dense_bytes / (dense_bytes + weight_bytes)
        )  # of the two operands L2 feeds, one is the compressed weight
        pad_m, widen = 8.0, math.log(1.15)
    elif kernel == BLOCK_SPARSE:
        c["e_tc"] *= c["block_step"]
        widen = math.log(1.15)
    if ELEMENT_BYTES[weight] < element:
        c["t0"] += c["quant_time"]
        c["e_tc"] *= c["quant_step"]
        load_scale /= c["quant_load"]
        widen += math.log(1.4)  # nine in ten of the A100 rows of such kernels lie within a factor of 1.6
    machine = Machine(
        peak,
        float(hw.bandwidth_bytes_per_s),
        float(hw.l2_bytes),
        int(hw.sm_count),
        max(1.0, float(hw.clock_headroom)),
        element,
        weight_bytes,
        hw.architecture in PERSISTENT_ARCHITECTURES,
        hw.architecture in PACKING_ARCHITECTURES,
    )
    core = machine_core(machine, c, PRECISION)
    residual = residual_of(section.arrays, PRECISION)
    return Plan(
        core,
        None if residual is None else between_measured(residual, section.arrays["measured_m"]),
        bands_of(section),
        peak,
        pad_m,
        c["align_step"],
        c["align_load"],
        load_scale,
        widen,
        np.where(core.step_us > 1.5 * core.flop_us, BOUNDS.index("latency"), BOUNDS.index("compute"))
        .astype(np.int8)
        .reshape(-1),
        # a section borrowed from another format or device has none: what was measured there says nothing exact here
        exact_of(section.arrays) if kernel == DENSE and weight == dtype and section.status == "calibrated" else None,
    )


def alignment_halvings(n: F, k: F, element_bytes: float) -> F:
    """Times the alignment of a row of n or k elements falls short of 16 bytes by a factor of two; 0 when it does not.

    >>> alignment_halvings(np.array([8816.0, 8810.0, 8809.0]), np.array([4096.0, 4096.0, 4096.0]), 2.0)
    array([0., 2., 3.])
    """
    full = int(16 / element_bytes)
    low = n.astype(np.int32) | k.astype(np.int32)
    out = np.zeros(n.shape, dtype=n.dtype)
    size = full
    while size > 1:
        out += (low & (size - 1)) != 0
        size >>= 1
    return out


def aligned(n: F, k: F, plan: Plan) -> tuple[F | float, F | float]:
    """Factors of the main-loop step and of the weights' load for the alignment of n and k; plain numbers when all are aligned."""
    full = int(16 / plan.core.machine.element_bytes)
    if not np.bitwise_or.reduce(n.astype(np.int32) | k.astype(np.int32)) & (full - 1):
        return 1.0, plan.load_scale
    halvings = alignment_halvings(n, k, plan.core.machine.element_bytes)
    return 1.0 + plan.align_step * halvings, plan.load_scale * (1.0 + plan.align_load * halvings)
