"""Elementwise operators (norms, rotary, activation, copies, sorts): bytes over achieved bandwidth, with a floor.

Activations that were just written are still in L2 while they fit, so a small operator may run above the DRAM bandwidth;
a large one streams. Floor and bytes join by a 2-norm. Use :func:`elementwise`.

Symbols
-------
t0 : floor of a kernel of a class, s
e : share of the DRAM bandwidth that a large operator reaches
l2 : rate of data in L2, in units of their DRAM rate
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.arguments import AMOUNT, Range, array, instance, plain, text, together, truths
from simulator.arrays import FloatArray, IndexArray
from simulator.cost.base import Calls, Estimate, bottleneck
from simulator.cost.residual_grid import ResidualGrid
from simulator.errors import unknown
from simulator.hardware.constants import CLASSES, ELEMENTWISE_CONSTANTS
from simulator.hardware.profile import HardwareProfile
from simulator.hardware.sections import Section
from simulator.workload import DTYPES, ROLES, Kind

_ROLES = {
    "embedding": "embedding gather",
    "norm": "attention_norm mlp_norm qk_norm post_norm gated_norm",
    "final_norm": "final_norm",
    "rotary": "rotary",
    "activation": "activation product softcap output_gate",
    "select": "sampling select sort",
    "scatter": "scatter",
    "quantize": "quantize quantize_heads quantize_inner",
}
# every class by its own name; a role of no class counts as a copy
_CODE = {role: CLASSES.index("copy") for role in ROLES} | {name: i for i, name in enumerate(CLASSES)}
_CODE |= {role: CLASSES.index(name) for name, roles in _ROLES.items() for role in roles.split()}
_CODE_OF_ROLE = np.array([_CODE[role] for role in ROLES])
_ROLE = Range(0.0, len(ROLES) - 1.0, "names of operators, or their codes", whole=True)

APART = 8.0
"""Octaves between two classes, so that their errors are uncorrelated."""

_LAUNCH, _MEMORY, _L2 = map(bottleneck, ("launch", "memory", "l2"))


@dataclass(frozen=True)
class Moves(Calls):
    """Elementwise operators: bytes read and written, index into :data:`CLASSES`, and the device's facts."""

    bytes_: FloatArray
    code: IndexArray
    l2_bytes: float
    bandwidth: float  # bytes/s
    architecture: str
    added: Any = False  # added by pruning: runs at DRAM speed
    fitted: bool = True  # whether the constants come from measurements

    @property
    def operator(self) -> str:
        return "elementwise"

    def estimate(self, c: Mapping[str, Any]) -> Estimate:
        """Return the cost; L2 holds a share of the bytes by a fixed power (the data do not distinguish 3 from 6)."""
        floor, share, gain = (
            np.array([c[pattern.format(name)] for name in CLASSES])[self.code]
            for pattern in ("t0_{}_s", "e_{}", "l2_{}")
        )
        ratio = self.bytes_ / (c["l2_share"] * self.l2_bytes)
        ratio = ratio * ratio
        hit = (1.0 - np.asarray(self.added, dtype=np.float64)) / (1.0 + ratio * ratio)
        memory = self.bytes_ / (share * self.bandwidth) * (1.0 - hit + hit / gain)
        moved = memory * memory / (floor * floor + memory * memory)
        loadings = {"launch": 1.0 - moved, "memory": moved, "l2": moved * hit, "default": float(not self.fitted)}
        if np.any(self.added):
            loadings["added"] = np.broadcast_to(self.added, moved.shape) * 1.0
        octaves = np.log2(np.maximum(self.bytes_, 1.0))
        return Estimate(
            operator="elementwise",
            kind=int(Kind.ELEMENTWISE),
            time=np.sqrt(floor * floor + memory * memory),
            floor=0.0,  # the data may lie in L2
            roofline=self.bytes_ / self.bandwidth,
            bottleneck=np.where(memory < floor, _LAUNCH, np.where(hit > 0.5, _L2, _MEMORY)).astype(np.int8),
            loadings=loadings,
            coordinates=np.stack([octaves.ravel(), APART * self.code.ravel(), np.zeros(moved.size)], axis=1),
            position=(self.code, octaves),
        )


def class_residual(arrays: Mapping[str, NDArray[Any]]) -> ResidualGrid | None:
    """Return log(measured / analytical) over (class, log2 bytes), nodes an octave apart; None if a section has none."""
    if "values" not in arrays:
        return None
    values = np.asarray(arrays["values"], dtype=np.float64)
    # classes newer than the profile have no residual; one more row, so that each class is the near side of a cell
    later = np.zeros((len(CLASSES) + 1 - len(values), values.shape[1]))
    return ResidualGrid((0.0, float(arrays["start"])), (1.0, 1.0), np.concatenate([values, later]))


def class_code(role: Any) -> IndexArray:
    """Return indices into :data:`CLASSES` from role codes (indices into ``workload.ROLES``), role names or class
    names."""
    given = plain(role)
    if given.dtype.kind not in "US":
        return np.asarray(_CODE_OF_ROLE[array("role", role, _ROLE).astype(np.intp)])
    names = given.ravel().tolist()
    for name in names:
        if name not in _CODE:
            raise unknown("operator", name, _CODE)
    return np.array([_CODE[name] for name in names], dtype=np.intp).reshape(given.shape)


@lru_cache(maxsize=128)
def _ready(hw: HardwareProfile, dtype: str) -> tuple[Section, dict[str, float], ResidualGrid | None]:
    section = hw.section("elementwise", dtype)
    return section, {name: section[name] for name in ELEMENTWISE_CONSTANTS}, class_residual(section.arrays)


def elementwise(
    read_bytes: Any,
    write_bytes: Any,
    hw: HardwareProfile,
    *,
    role: Any = "copy",
    added: Any = False,
    dtype: str = "bf16",
) -> Estimate:
    """Return the cost of elementwise operators from the bytes one execution reads and writes.

    ``role`` is that of :func:`class_code`, ``dtype`` that of the profile's section. The roofline is bytes over
    datasheet bandwidth; a time may lie below it where the data are still in L2. Operators that pruning ``added`` run at
    DRAM speed whatever L2 holds, as gathers and scatters by index were measured on an RTX 5090 (1.2 to 1.7 TB/s of 33
    to 50 MB; EIT-NLP/LLM-Pruning, DynamicPruningKernels). They depend on the implementation, so their interval is
    wider.
    """
    if text("dtype", dtype) not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    section, constants, residual = _ready(instance("hw", hw, HardwareProfile, "load_hardware"), dtype)
    read, written, code, added = together(
        read_bytes=array("read_bytes", read_bytes, AMOUNT),
        write_bytes=array("write_bytes", write_bytes, AMOUNT),
        role=class_code(role),
        added=truths("added", added),
    )
    fitted = section.status != "default"
    calls = Moves(read + written, code, hw.l2_bytes, hw.bandwidth_bytes_per_s, hw.architecture, added, fitted)
    e = calls.estimate(constants)
    return e.with_residual(None if residual is None else residual(e.position), section)
