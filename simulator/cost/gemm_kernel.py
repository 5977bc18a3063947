"""What a profile says about GEMMs of one number format, weight format and kernel: constants, residual, penalties.

Use :func:`gemm_kernel`. A kernel that skips work, reads narrower weights or has 2:4 weights is the dense kernel with
changed constants; a GPU without a fit has those of its architecture (:func:`clocked`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType

from simulator.cost.base import ELEMENT_BYTES, Machine, element_bytes
from simulator.cost.gemm_model import WGMMA_ROWS, ReadyModel, ready_model, weight_only_constants
from simulator.cost.gemm_shapes import PRECISION
from simulator.cost.measured_shapes import MeasuredShapes, measured_shapes
from simulator.cost.residual_grid import ResidualGrid, RowResidual
from simulator.errors import InputError
from simulator.hardware.constants import GEMM_CONSTANTS as CONSTANTS
from simulator.hardware.formats import LABELS, label_of
from simulator.hardware.profile import HardwareProfile
from simulator.hardware.sections import Section, unfitted
from simulator.workload import Kernel

CLOCKED: Mapping[str, float] = MappingProxyType(
    {"ampere": 0.78e12, "ada": 1.03e12, "hopper": 1.41e12, "blackwell": 0.78e12, "blackwell_sm100": 2.25e12}
)
"""FLOP per joule (16-bit datasheet rate over power limit) of the GPUs that the defaults of ``e_tc`` come from: A100,
L40S, H100, RTX PRO 6000, B200 (SXM). A GPU with fewer keeps a higher clock: see :func:`clocked`."""
UNLIMITED = 0.9
"""Share of the datasheet rate where power limits no clock: an H20 reaches 0.93 in fp8 (InferSim), and less in the
16-bit steps of SGLang, which are 6 % longer than with 0.81 and 16 % longer than with 1; the RTX 4090 reaches 1.02."""

EDGE = 1e-4
"""Steps before the last node at which a coordinate of the residual stops."""

GROUPS = {Kernel.GROUPS_N: 20.0, Kernel.GROUPS_K: 52.0}
"""Features per group at which skipping groups costs as much as computing them: a main loop takes 1 + (features /
group)^1.5 of its time. From kernels of the taxonomy's authors at 4096^3 on an RTX 5090, where groups of 128 outputs are
7 % slower than whole tokens, groups of 32 inputs three times as slow (EIT-NLP/LLM-Pruning, DynamicPruningKernels)."""
GROUPS_STEP = 0.9
"""e_tc of those kernels over that of dense ones (same source)."""

SPARSE24_PARTS: Mapping[str, str] = {
    "sparse_step": "compute",
    "sparse_load": "memory",
    "sparse_time": "launch",
    "sparse_tau": "serial",
}
"""Constants that 2:4 kernels alone have -> the part of the time that each changes."""


@dataclass(frozen=True)
class GemmKernel:
    """What a profile says about GEMMs of one number format, weight format and kernel, as numbers."""

    model: ReadyModel
    section: Section | None
    residual: ResidualGrid | None
    row_residual: RowResidual | None
    shapes: MeasuredShapes | None  # measured with cold weights, used instead of the model
    align_step: float
    align_load: float
    load_scale: float
    pad_m: float
    group: float  # features, of GROUPS; 0 where no groups are skipped
    unfitted: tuple[str, ...]  # error factors of what no fit has seen
    dense: GemmKernel | None = None  # of weights alone in fewer bits: the kernel without them, which computes the same
    assumed: tuple[str, ...] = ()  # parts of a 2:4 kernel's time of which no table of its architecture tells


@lru_cache(maxsize=128)
def gemm_kernel(
    hw: HardwareProfile, dtype: str, weight_dtype: str | None, kernel: Kernel, searched: bool = True
) -> GemmKernel:
    """Return the kernel of a profile; InputError for a number format that the device lacks or that is unknown.

    ``searched`` is that of :class:`~simulator.cost.gemm_shapes.Options`.
    """
    rate, weight = hw.rate(dtype), weight_dtype or dtype
    element, weight_bytes, peak = ELEMENT_BYTES[dtype], element_bytes(weight, "weight dtype"), rate.flop_per_s
    label = label_of(dtype, weight)
    own = label == dtype or (("gemm", label) in hw.sections and dtype in LABELS.get(label, ()))
    section = hw.section("gemm", label if own else dtype)
    c = {name: float(section[name]) for name in CONSTANTS}
    if section.status == "default":
        c["e_tc"] = clocked(c["e_tc"] * (1.0 if element >= 2.0 else c["narrow_step"]), hw)
    load_scale, pad_m, serial = 1.0, 1.0, False
    assumed: tuple[str, ...] = ()
    factors = [*unfitted("gemm", section, hw.architecture)]
    weight_only = ELEMENT_BYTES[weight] < element
    compressed = kernel == Kernel.SPARSE24 and not weight_only
    if kernel == Kernel.SPARSE24:
        if rate.sparse_factor <= 1.0:
            raise InputError(f"{hw.name} has no 2:4 sparse tensor cores for {dtype}")
        known, assumed = sparse24_constants(section, hw.architecture)
        c |= known
        peak *= rate.sparse_factor
        c["e_tc"] *= c["sparse_step"]
        # half the values and two bits of index for each; of the two operands L2 feeds, one is the compressed weight
        weight_bytes = 0.5 * weight_bytes + 0.125
        if compressed:
            pad_m, serial = 8.0, not searched
            c["t0"] += c["sparse_time"]
            load_scale /= c["sparse_load"]
        else:  # as the dense kernel of the format (Sparse-Marlin): a step waits for the bytes of its weights
            assumed = tuple(part for part in assumed if part == "compute")
            c["tau"] *= weight_bytes / ELEMENT_BYTES[weight]
        c["b_l2"] *= 2.0 * ELEMENT_BYTES[weight] / (ELEMENT_BYTES[weight] + weight_bytes)
        factors.append("sparse24")
    elif kernel == Kernel.BLOCK_SPARSE or kernel in GROUPS:
        c["e_tc"] *= GROUPS_STEP if kernel in GROUPS else c["block_step"]
        factors.append("blocks")
    elif kernel == Kernel.SPMV:
        factors.append("spmv")
    if weight_only and not own:
        c |= weight_only_constants(c, ELEMENT_BYTES[weight] / element)
        factors.append("quantised")
    hopper_default = section.status == "default" and hw.architecture == "hopper"
    machine = replace(
        Machine.of(hw, dtype),
        peak_flop_per_s=peak,
        weight_bytes=weight_bytes,
        least_rows=WGMMA_ROWS if hopper_default and not weight_only else 1.0,
        ragged=kernel in GROUPS,
        serial=serial,
    )
    residual = ResidualGrid.from_arrays(section.arrays)
    if residual is not None:
        residual = replace(residual, values=residual.values.astype(PRECISION), inset=EDGE)
    # measured shapes of another format or device say nothing exact here: a fallback section has none
    plain = kernel == Kernel.DENSE and own and section.status == "calibrated"
    return GemmKernel(
        model=ready_model(machine, c, PRECISION),
        section=section,
        residual=residual,
        row_residual=RowResidual.from_arrays(section.arrays),
        shapes=measured_shapes(section.arrays) if plain else None,
        align_step=c["align_step" if element >= 2.0 else "align_step_8bit"],
        align_load=c["align_load"],
        load_scale=load_scale,
        pad_m=pad_m,
        group=GROUPS.get(kernel, 0.0),
        unfitted=tuple(factors),
        dense=gemm_kernel(hw, dtype, None, kernel) if weight_only and kernel == Kernel.DENSE else None,
        assumed=assumed,
    )


def clocked(e_tc: float, hw: HardwareProfile) -> float:
    """Return the default share of the datasheet rate on a device that may need less power for it, or more.

    Under a power limit the clock falls as the square root of the power per FLOP: the L40S and the RTX 4090 (0.62 and
    1.02 of rates that need 1.03 and 0.37 TFLOP/J) differ by a power of 0.48. Without a limit kernels reach
    :data:`UNLIMITED` of the rate.
    """
    rates = [hw.rates[name].flop_per_s for name in ("bf16", "fp16") if name in hw.rates]
    if hw.architecture not in CLOCKED or not rates:
        return e_tc
    return min(e_tc * math.sqrt(CLOCKED[hw.architecture] * hw.power_w / rates[0]), max(e_tc, UNLIMITED))


def sparse24_constants(section: Section, architecture: str) -> tuple[dict[str, float], tuple[str, ...]]:
    """Return the constants of 2:4 kernels, and the parts of the time of which no table of the architecture tells.

    A constant that no fit moved is the default of the device's own architecture, which may differ from that of an
    inherited section.
    """
    values, assumed = {}, []
    for name, part in SPARSE24_PARTS.items():
        constant, own = CONSTANTS[name], section.constants[name]
        values[name] = constant.default(architecture) if own.status == "default" else own.value
        if own.status == "default" and architecture not in constant.defaults:
            assumed.append(part)
    return values, tuple(assumed)


def with_section(hw: HardwareProfile, dtype: str, section: Section) -> HardwareProfile:
    """Return a profile with another GEMM section of a number format."""
    return replace(hw, sections={**hw.sections, ("gemm", dtype): section})
