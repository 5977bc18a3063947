"""Elementwise operators (norms, rotary, activation, copies, sorts): bytes over achieved bandwidth, with a floor.

Use :func:`elementwise_time` with the bytes an operator reads and writes. Activations just written are still in L2 while
they fit, so a small operator may run above the DRAM bandwidth; a large one streams. Floor and bytes join by a 2-norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.arguments import AMOUNT, Range, array, instance, plain, text, together, truths
from simulator.arrays import FloatArray
from simulator.cost.residual_grid import ResidualGrid
from simulator.errors import unknown
from simulator.hardware.constants import CLASSES, ELEMENTWISE_CONSTANTS
from simulator.hardware.profile import SAME_STACK, HardwareProfile
from simulator.uncertainty.error_model import (
    BOTTLENECKS,
    OperatorTimes,
    Posterior,
    Spread,
    Uncertainty,
    posterior_of,
    with_intervals,
)
from simulator.workload import DTYPES, ROLES, Kind

_ROLES = {
    "embedding": "embedding gather",
    "norm": "attention_norm mlp_norm qk_norm post_norm",
    "final_norm": "final_norm",
    "rotary": "rotary",
    "activation": "activation product softcap quantize",
    "select": "sampling select sort",
    "scatter": "scatter",
}
# a class by itself, and what is no elementwise operator as a copy
_CODE = {role: CLASSES.index("copy") for role in ROLES} | {name: i for i, name in enumerate(CLASSES)}
_CODE |= {role: CLASSES.index(name) for name, roles in _ROLES.items() for role in roles.split()}
_CODE_OF_ROLE = np.array([_CODE[role] for role in ROLES])
_ROLE = Range(0.0, len(ROLES) - 1.0, "names of operators, or their codes", whole=True)

LOCAL, OWN = 0.08, 0.08
"""Log standard deviations of errors that neighbouring sizes of a class share, and of one size's own."""
APART = 8.0
"""Octaves between two classes, so that their local errors are their own."""

_LAUNCH, _MEMORY, _L2 = BOTTLENECKS.index("launch"), BOTTLENECKS.index("memory"), BOTTLENECKS.index("l2")


def class_residual(arrays: Mapping[str, NDArray[Any]]) -> ResidualGrid | None:
    """log(measured / core) over (class, log2 bytes), nodes an octave apart, that a section's arrays hold, or None."""
    if "values" not in arrays:
        return None
    values = np.asarray(arrays["values"], dtype=np.float64)
    # classes that came after the profile have no residual; one row more, so that each class is the near side of a cell
    later = np.zeros((len(CLASSES) + 1 - len(values), values.shape[1]))
    return ResidualGrid((0.0, float(arrays["start"])), (1.0, 1.0), np.concatenate([values, later]))


def class_place(bytes_: FloatArray, code: NDArray[np.intp]) -> tuple[NDArray[np.intp], FloatArray]:
    """Coordinates of operators in their lattice."""
    return code, np.log2(np.maximum(bytes_, 1.0))


@dataclass(frozen=True)
class _Ready:
    """What a profile says, as arrays by class."""

    constants: Mapping[str, float]
    residual: ResidualGrid | None
    spread: Spread  # factors on the prior of its errors
    unknown: float  # 1 where nothing was fitted
    posterior: Posterior | None


@lru_cache(maxsize=128)
def _ready(hw: HardwareProfile, dtype: str) -> _Ready:
    section = hw.section("elementwise", dtype)
    constants = {name: section[name] for name in ELEMENTWISE_CONSTANTS}
    unknown = float(section.status == "default")
    return _Ready(constants, class_residual(section.arrays), hw.error_scales(section), unknown, posterior_of(hw))


def elementwise_core(
    bytes_: FloatArray,
    code: NDArray[np.intp],
    l2_bytes: float,
    bandwidth: float,
    c: Mapping[str, float],
    streams: Any = False,
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Time of elementwise operators without residual, s, from constants by name; its floor and memory part; and the
    share that L2 holds (by a fixed power: the data do not tell 3 from 6), none of those that ``streams`` marks."""
    patterns = ("t0_{}_s", "e_{}", "l2_{}")
    floor, share, gain = (np.array([c[p.format(name)] for name in CLASSES])[code] for p in patterns)
    ratio = bytes_ / (c["l2_share"] * l2_bytes)
    ratio = ratio * ratio
    hit = (1.0 - np.asarray(streams, dtype=np.float64)) / (1.0 + ratio * ratio)
    memory = bytes_ / (share * bandwidth) * (1.0 - hit + hit / gain)
    return np.sqrt(floor * floor + memory * memory), floor, memory, hit


def class_code(role: Any) -> NDArray[np.intp]:
    """Index into :data:`CLASSES` from role codes (indices into ``workload.ROLES``), role names or class names."""
    given = plain(role)
    if given.dtype.kind not in "US":
        return np.asarray(_CODE_OF_ROLE[array("role", role, _ROLE).astype(np.intp)])
    names = given.ravel().tolist()
    for name in names:
        if name not in _CODE:
            raise unknown("operator", name, _CODE)
    return np.array([_CODE[name] for name in names], dtype=np.intp).reshape(given.shape)


def elementwise_time(
    read_bytes: Any,
    write_bytes: Any,
    hw: HardwareProfile,
    *,
    role: Any = "copy",
    added: Any = False,
    dtype: str = "bf16",
    level: float = 0.9,
) -> OperatorTimes:
    """Time of elementwise operators from the bytes one execution reads and writes.

    ``role`` is of :func:`class_code`, ``dtype`` that of the profile's section. The roofline is bytes over datasheet
    bandwidth; a time may lie below it where the data are still in L2. What pruning ``added`` runs at DRAM speed
    whatever L2 holds, as gathers and scatters by index were measured on an RTX 5090 (1.2 to 1.7 TB/s of 33 to 50 MB;
    EIT-NLP/LLM-Pruning, DynamicPruningKernels), and depends on whose code it is: its interval is wider.
    """
    if text("dtype", dtype) not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    r = _ready(instance("hw", hw, HardwareProfile, "load_hardware"), dtype)
    read, written = array("read_bytes", read_bytes, AMOUNT), array("write_bytes", write_bytes, AMOUNT)
    read, written, code, added = together(
        read_bytes=read, write_bytes=written, role=class_code(role), added=truths("added", added)
    )
    total = read + written
    seconds, floor, memory, hit = elementwise_core(
        total, code, hw.l2_bytes, hw.bandwidth_bytes_per_s, r.constants, added
    )
    if r.residual is not None:
        seconds = seconds * np.exp(r.residual(class_place(total, code)))
    bound = np.where(memory < floor, _LAUNCH, np.where(hit > 0.5, _L2, _MEMORY)).astype(np.int8)
    uncertainty = uncertainty_of(floor, memory, hit, total, code, r.spread, r.unknown, added)
    ends = with_intervals(seconds, 0.0, uncertainty, level, r.posterior)
    return OperatorTimes(*ends, total / hw.bandwidth_bytes_per_s, bound, uncertainty=uncertainty)


def uncertainty_of(
    floor: FloatArray,
    memory: FloatArray,
    hit: FloatArray,
    bytes_: FloatArray,
    code: NDArray[np.intp],
    spread: Spread = (SAME_STACK, 1.0),
    unknown: float = 0.0,
    added: Any = False,
) -> Uncertainty:
    """What times of :func:`elementwise_core` are unsure of: their floor, memory, and the part of it that L2 serves;
    all of it, where nothing was fitted (``unknown``)."""
    bound = memory * memory / (floor * floor + memory * memory)
    shares = {"launch": 1.0 - bound, "memory": bound, "l2": bound * hit, "default": unknown}
    if np.any(added):
        shares["added"] = np.broadcast_to(added, bound.shape) * 1.0
    octaves = np.stack([np.log2(np.maximum(bytes_, 1.0)).ravel(), APART * code.ravel(), np.zeros(bound.size)], axis=1)
    sure: Any = {"local": LOCAL, "own": OWN**2}
    return Uncertainty.of("elementwise", shares, spread=spread, **sure, place=octaves, kind=int(Kind.ELEMENTWISE))
