"""Elementwise operators (norms, rotary, activation, copies, sorts): bytes over achieved bandwidth,
with a floor.

Activations that were just written are in L2 if they fit, so a small operator may run above the DRAM
bandwidth. A 2-norm joins the floor and the time of the bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.arrays import FloatArray, IndexArray
from simulator.codes import ROLES, Kind
from simulator.errors import unknown
from simulator.operators.base import (
    AIC,
    BOTTLENECKS,
    Calls,
    Constant,
    Device,
    ErrorSize,
    Estimate,
    FittedValues,
    Formats,
    Operator,
    ResidualGrid,
    Rows,
    row,
)

_STUDY = (
    "study of kernel tables (A100, H100): floors 1.6-3.8 us, 0.36-1.05 of the datasheet bandwidth; "
    "uncalibrated on this device"
)
_RTX = f"fit on rtx4090_other_ops.csv (RTX 4090); elsewhere: {_STUDY}"
_SCALED = (
    f"fits on the quantisation tables of {AIC}, scale_matrix of vLLM (static_scaled_fp8_quant) and"
    " TensorRT-LLM (L40S, H100, H200, RTX PRO 6000, B200); geometric mean over stacks, median"
    " error 4 to 15 %"
)

CLASSES: tuple[str, ...] = (
    "norm",
    "final_norm",
    "rotary",
    "activation",
    "embedding",
    "copy",
    "select",
    "scatter",
    "quantize",
)
"""Classes of elementwise operators, each with its own bandwidth and floor, in the order of rows of
the residual."""


def _elementwise() -> dict[str, Constant]:
    floors_s = (2.1e-6, 2.6e-6, 2.4e-6, 3.1e-6, 3.9e-6, 2.2e-6, 3.8e-6, 3.9e-6)
    shares = (0.75, 0.75, 0.65, 0.85, 0.75, 0.70, 0.36, 0.75)
    rates = {}
    for name, floor_s, share in zip(CLASSES, floors_s, shares):
        rates[f"t0_{name}_s"] = row(
            "s", 5e-7, 5e-5, _RTX, f"floor of a {name} kernel", other=floor_s
        )
        meaning = f"share of the DRAM bandwidth that a large {name} operator achieves"
        rates[f"e_{name}"] = row("1", 0.001, 1.0, _STUDY, meaning, other=share)
        meaning = f"rate of a {name} operator with data in L2 over its DRAM rate"
        rates[f"l2_{name}"] = row("1", 1.0, 6.0, _RTX, meaning, ada=2.5, other=1.5)
    return rates


ELEMENTWISE_CONSTANTS: Mapping[str, Constant] = MappingProxyType(
    {
        **_elementwise(),
        "t0_quantize_s": row(
            "s",
            5e-7,
            5e-5,
            _SCALED,
            "floor of a kernel that converts activations",
            ada=2.35e-6,
            hopper=1.85e-6,
            blackwell=1.8e-6,
            blackwell_sm100=2.3e-6,
            other=2e-6,
        ),
        "e_quantize": row(
            "1",
            0.001,
            1.0,
            _SCALED,
            "share of the DRAM bandwidth that the conversion of many activations achieves",
            ada=0.83,
            hopper=0.85,
            blackwell=0.86,
            blackwell_sm100=0.72,
            other=0.83,
        ),
        "l2_quantize": row(
            "1",
            1.0,
            10.0,
            _SCALED,
            "rate of a conversion with data in L2 over its DRAM rate",
            ada=7.0,
            hopper=1.1,
            blackwell=3.3,
            blackwell_sm100=1.0,
            other=1.5,
        ),
        "l2_share": row(
            "1",
            0.05,
            4.0,
            _RTX,
            "bytes of an operator over L2 size at which half are in L2",
            other=0.8,
        ),
    }
)

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
# a role without a class counts as a copy
_CODE = {role: CLASSES.index("copy") for role in ROLES} | {
    name: i for i, name in enumerate(CLASSES)
}
_CODE |= {role: CLASSES.index(name) for name, roles in _ROLES.items() for role in roles.split()}
_CODE_OF_ROLE = np.array([_CODE[role] for role in ROLES])

_PER_CLASS = [
    [pattern.format(name) for name in CLASSES] for pattern in ("t0_{}_s", "e_{}", "l2_{}")
]
"""Names of the constants that each class has."""

APART = 8.0
"""Octaves between two classes: far enough for uncorrelated errors."""

_LAUNCH, _MEMORY, _L2 = map(BOTTLENECKS.index, ("launch", "memory", "l2"))


@dataclass(frozen=True)
class Moves(Calls):
    operator = "elementwise"
    bytes_: FloatArray  # read and written
    code: IndexArray  # index into CLASSES
    l2_bytes: float
    bandwidth: float  # bytes/s
    architecture: str  # for the defaults of a fit
    added: Any = False  # whether pruning added the operator: runs at DRAM speed
    fitted: bool = True  # whether the constants come from measurements

    def estimate(self, c: Mapping[str, Any]) -> Estimate:
        """Return the cost. L2 holds 1 / (1 + ratio^4) of the bytes; the data do not distinguish
        powers from 3 to 6."""
        floor, share, gain = np.array([[c[name] for name in names] for names in _PER_CLASS])[
            :, self.code
        ]
        ratio = self.bytes_ / (c["l2_share"] * self.l2_bytes)
        ratio = ratio * ratio
        hit = (1.0 - np.asarray(self.added, dtype=np.float64)) / (1.0 + ratio * ratio)
        memory = self.bytes_ / (share * self.bandwidth) * (1.0 - hit + hit / gain)
        moved = memory * memory / (floor * floor + memory * memory)
        loadings = {
            "launch": 1.0 - moved,
            "memory": moved,
            "l2": moved * hit,
            "default": float(not self.fitted),
        }
        if np.count_nonzero(self.added):
            loadings["added"] = np.broadcast_to(self.added, moved.shape) * 1.0
        octaves = np.log2(np.maximum(self.bytes_, 1.0))
        return Estimate(
            operator="elementwise",
            kind=int(Kind.ELEMENTWISE),
            time=np.sqrt(floor * floor + memory * memory),
            floor=0.0,  # the data may be in L2
            roofline=self.bytes_ / self.bandwidth,
            bottleneck=np.where(memory < floor, _LAUNCH, np.where(hit > 0.5, _L2, _MEMORY)).astype(
                np.int8
            ),
            loadings=loadings,
            coordinates=np.array(
                [octaves.ravel(), APART * self.code.ravel(), np.zeros(moved.size)]
            ).T,
            position=(self.code, octaves),
        )


def class_residual(arrays: Mapping[str, NDArray[Any]]) -> ResidualGrid | None:
    """Return log(measured / analytical) over (class, log2 bytes), nodes an octave apart; None if a
    section has none."""
    if "values" not in arrays:
        return None
    values = np.asarray(arrays["values"], dtype=np.float64)
    # classes newer than the profile have no residual; one more row makes each class the near side
    # of a cell
    later = np.zeros((len(CLASSES) + 1 - len(values), values.shape[1]))
    return ResidualGrid((0.0, float(arrays["start"])), (1.0, 1.0), np.concatenate([values, later]))


def class_code(role: Any) -> IndexArray:
    """Return indices into :data:`CLASSES` from role codes, role names or class names."""
    given = np.asarray(role)
    if given.dtype.kind not in "US":
        return np.asarray(_CODE_OF_ROLE[given])
    names = given.ravel().tolist()
    for name in names:
        if name not in _CODE:
            raise unknown("operator", name, _CODE)
    return np.array([_CODE[name] for name in names], dtype=np.intp).reshape(given.shape)


@lru_cache(maxsize=128)
def _ready(hw: Device, dtype: str) -> tuple[FittedValues, dict[str, float], ResidualGrid | None]:
    section = hw.section("elementwise", dtype)
    return (
        section,
        {name: section[name] for name in ELEMENTWISE_CONSTANTS},
        class_residual(section.arrays),
    )


def elementwise(
    read_bytes: Any,
    write_bytes: Any,
    hw: Device,
    *,
    role: Any = "copy",
    added: Any = False,
    dtype: str = "bf16",
) -> Estimate:
    """Return the cost of elementwise operators from the bytes that one execution reads and writes.
    A time may lie below the roofline if the data are in L2. Operators that pruning ``added`` run at
    DRAM speed: gathers and scatters on an RTX 5090 move 33 to 50 MB at 1.2 to 1.7 TB/s
    (EIT-NLP/LLM-Pruning, DynamicPruningKernels). Their interval is wider, because implementations
    differ."""
    section, constants, residual = _ready(hw, dtype)
    given = [np.asarray(a) for a in (read_bytes, write_bytes, class_code(role), added)]
    # a broadcast takes longer than timing a few operators
    same = len({a.shape for a in given}) == 1
    read, written, code, added = given if same else np.broadcast_arrays(*given)
    moved, fitted = np.asarray(read + written, dtype=np.float64), section.status != "default"
    calls = Moves(
        moved, code, hw.l2_bytes, hw.bandwidth_bytes_per_s, hw.architecture, added, fitted
    )
    e = calls.estimate(constants)
    return e.with_residual(None if residual is None else residual(e.position), section)


class Elementwise(Operator):
    """Norms, activations, copies, sorts and so on; the role gives the class."""

    code, name, sizes = int(Kind.ELEMENTWISE), "elementwise", ()
    constants = MappingProxyType({"elementwise": ELEMENTWISE_CONSTANTS})
    titles = ("elementwise operators",)
    errors = MappingProxyType(
        {
            "elementwise": ErrorSize(
                0.08,
                0.08,
                factors={
                    "launch": 0.15,
                    "memory": 0.10,
                    "l2": 0.20,
                    "default": 0.28,
                    "added": 0.30,
                },
            )
        }
    )

    def bytes(self, w: Rows) -> Any:
        return w.read_bytes + w.write_bytes

    def estimates(self, w: Rows, hw: Device, formats: Formats) -> Iterator[tuple[Any, Estimate]]:
        moved = w.read_bytes, w.write_bytes
        yield (
            slice(None),
            elementwise(*moved, hw, role=w.role, added=w.overhead, dtype=formats.dtype),
        )

    def fixed(self, w: Rows, hw: Device, formats: Formats) -> Estimate:
        return elementwise(0.0, 0.0, hw, role=w.role, dtype=formats.dtype)
