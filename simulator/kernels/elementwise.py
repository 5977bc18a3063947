"""Elementwise operators (norms, rotary, activation, copies, sorts): bytes over achieved bandwidth, with a floor.

Use :func:`elementwise_time` with the bytes an operator reads and writes. Activations just written are still in L2 while they fit, so a
small operator may run above the DRAM bandwidth; a large one streams. Form: t = pn(floor, bytes / rate), pn the 2-norm (DESIGN section 10).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simulator.errors import unknown
from simulator.hardware.constants import CLASSES, ELEMENTWISE_CONSTANTS
from simulator.hardware.memo import PerObject
from simulator.kernels.lattice import Lattice
from simulator.kernels.optime import BOUNDS, OpTime

if TYPE_CHECKING:
    from simulator.hardware.parts import Section
    from simulator.hardware.profile import HardwareProfile

F = NDArray[np.float64]


ROLE_CLASS: Mapping[str, str] = MappingProxyType(
    {
        # in the order of workload.ROLES (a test holds the two together); what is no elementwise operator counts as a copy
        "q": "copy",
        "k": "copy",
        "v": "copy",
        "qkv": "copy",
        "o": "copy",
        "gate": "copy",
        "up": "copy",
        "gate_up": "copy",
        "down": "copy",
        "lm_head": "copy",
        "router": "copy",
        "residual_projection": "copy",
        "attention": "copy",
        "embedding": "embedding",
        "attention_norm": "norm",
        "mlp_norm": "norm",
        "qk_norm": "norm",
        "post_norm": "norm",
        "final_norm": "final_norm",
        "rotary": "rotary",
        "activation": "activation",
        "residual": "copy",
        "cache_write": "copy",
        "softcap": "activation",
        "sampling": "select",
        "gather": "embedding",
        "scatter": "scatter",
        "mask": "copy",
        "select": "select",
        "sort": "select",
        "quantize": "activation",
        "all_reduce": "copy",
        "send": "copy",
        "all_gather": "copy",
    }
)
"""Class of each operator role."""

_CLASS_OF_ROLE = np.array([CLASSES.index(name) for name in ROLE_CLASS.values()])
_NAME_CODE = {name: CLASSES.index(value) for name, value in ROLE_CLASS.items()} | {
    name: i for i, name in enumerate(CLASSES)
}


RESIDENCY_POWER = 4.0
"""Steepness of the residency h = 1 / (1 + (bytes / (l2_share L2))^4); fixed, the data do not tell 3 from 6."""

_LAUNCH, _MEMORY, _L2 = BOUNDS.index("launch"), BOUNDS.index("memory"), BOUNDS.index("l2")


def class_lattice(arrays: Mapping[str, NDArray[Any]]) -> Lattice | None:
    """log(measured / core) over (class, log2 bytes), nodes an octave apart, that a section's arrays hold, or None."""
    if "values" not in arrays:
        return None
    values = np.asarray(arrays["values"], dtype=np.float64)
    # classes that came after the profile have no residual; one row more, so that each class is the near side of a cell
    later = np.zeros((len(CLASSES) + 1 - len(values), values.shape[1]))
    return Lattice((0.0, float(arrays["start"])), (1.0, 1.0), np.concatenate([values, later]))


def class_place(bytes_: F, code: NDArray[np.intp]) -> tuple[NDArray[np.intp], F]:
    """Coordinates of operators in their lattice."""
    return code, np.log2(np.maximum(bytes_, 1.0))


@dataclass(frozen=True)
class _Ready:
    """Constants of one device as arrays by class."""

    t0: F
    rate: F  # DRAM rate by class, bytes/s
    l2: F
    half_bytes: float
    bandwidth: float
    low: F
    high: F
    residual: Lattice | None = None


_MEMO: PerObject[_Ready] = PerObject()


def elementwise_core(bytes_: F, code: NDArray[np.intp], l2_bytes: float, bandwidth: float, c: Mapping[str, float]) -> F:
    """Time of elementwise operators, s, from constants by name; the fit uses this, :func:`elementwise_time` its cached twin."""
    return _core(bytes_, code, _arrays(c, l2_bytes, bandwidth))[0]


def _arrays(c: Mapping[str, float], l2_bytes: float, bandwidth: float) -> _Ready:
    def column(pattern: str) -> F:
        return np.array([c[pattern.format(name)] for name in CLASSES], dtype=np.float64)

    ones = np.ones(len(CLASSES))
    return _Ready(
        column("t0_{}_s"), column("e_{}") * bandwidth, column("l2_{}"), c["l2_share"] * l2_bytes, bandwidth, ones, ones
    )


def _core(bytes_: F, code: NDArray[np.intp], r: _Ready) -> tuple[F, F, F]:
    """Time, memory part and residency."""
    ratio = bytes_ / r.half_bytes
    ratio *= ratio
    hit = 1.0 / (1.0 + ratio * ratio)
    memory = bytes_ / r.rate[code] * (1.0 - hit + hit / r.l2[code])
    floor = r.t0[code]
    return np.sqrt(floor * floor + memory * memory), memory, hit


def class_code(role: Any) -> NDArray[np.intp]:
    """Index into :data:`CLASSES` from role codes (indices into ``workload.ROLES``), role names or class names.

    >>> [CLASSES[i] for i in class_code(["mlp_norm", "gather", "rotary"])]
    ['norm', 'embedding', 'rotary']
    """
    if isinstance(role, str):
        if role not in _NAME_CODE:
            raise unknown("operator", role, _NAME_CODE)
        return np.asarray(_NAME_CODE[role])
    given = np.asarray(role)
    if given.dtype.kind in "US":
        return np.array([class_code(str(name)) for name in given.ravel()], dtype=np.intp).reshape(given.shape)
    return np.asarray(_CLASS_OF_ROLE[given])


def _ready(hw: HardwareProfile, dtype: str) -> _Ready:
    section: Section = hw.section("elementwise", dtype)
    values = {name: section[name] for name in ELEMENTWISE_CONSTANTS}
    base = _arrays(values, hw.l2_bytes, hw.bandwidth_bytes_per_s)
    low = np.full(len(CLASSES), 1.0 / values["spread"])
    high = np.full(len(CLASSES), values["spread"])
    for interval in section.intervals:
        if interval.regime in CLASSES:
            i = CLASSES.index(interval.regime)
            low[i], high[i] = interval.low, interval.high
    return _Ready(
        base.t0, base.rate, base.l2, base.half_bytes, base.bandwidth, low, high, class_lattice(section.arrays)
    )


def elementwise_time(
    read_bytes: Any, write_bytes: Any, hw: HardwareProfile, *, role: Any = "copy", dtype: str = "bf16"
) -> OpTime:
    """Time of elementwise operators.

    Parameters
    ----------
    read_bytes, write_bytes : array_like, bytes
        What one execution reads and writes.
    hw : HardwareProfile
    role : int array, str or array of str
        Codes into ``workload.ROLES``, role names, or names of :data:`CLASSES`.
    dtype : str
        Number format whose section of the profile is used.

    Returns
    -------
    OpTime
        The roofline is bytes over datasheet bandwidth; a time may lie below it where the data are still in L2.
    """
    r = _MEMO.get(hw, dtype, lambda: _ready(hw, dtype))
    total = np.asarray(np.asarray(read_bytes, dtype=np.float64) + np.asarray(write_bytes, dtype=np.float64))
    code = class_code(role)
    if total.shape != code.shape:
        total, code = np.broadcast_arrays(total, code)
    seconds, memory, hit = _core(total, code, r)
    if r.residual is not None:
        seconds = seconds * np.exp(r.residual(class_place(total, code)))
    bound = np.where(memory < r.t0[code], _LAUNCH, np.where(hit > 0.5, _L2, _MEMORY)).astype(np.int8)
    roofline = total / r.bandwidth
    return OpTime(seconds, seconds * r.low[code], seconds * r.high[code], roofline, bound)
