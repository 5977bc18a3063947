"""Elementwise operators (norms, rotary, activation, copies, sorts): bytes over achieved bandwidth,
with a floor.

Activations that were just written are in L2 if they fit, so a small operator may run above the DRAM
bandwidth. A 2-norm joins the floor and the time of the bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from simulator.arrays import Array, FloatArray, IndexArray
from simulator.codes import ROLES, Kind
from simulator.columns import encode
from simulator.operators.base import (
    BOTTLENECKS,
    Calls,
    Device,
    Estimate,
    FittedValues,
    Formats,
    Operator,
    ResidualGrid,
    Rows,
    RowValues,
    read_constants,
)

CLASSES = (
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

_CONSTANTS, _ERRORS = read_constants("elementwise")
ELEMENTWISE_CONSTANTS = _CONSTANTS["elementwise"]

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
_CLASS_OF = {role: name for name, roles in _ROLES.items() for role in roles.split()}
# a role without a class counts as a copy
_CODE_OF_ROLE = np.array([CLASSES.index(_CLASS_OF.get(role, "copy")) for role in ROLES])

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

    def estimate(self, c: RowValues) -> Estimate:
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


def class_residual(arrays: Mapping[str, Array]) -> ResidualGrid | None:
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
    """Return indices into :data:`CLASSES` from codes or names of roles."""
    given = np.asarray(role)
    codes = given if given.dtype.kind != "U" else encode("role", given, {"role": ROLES})
    return np.asarray(_CODE_OF_ROLE[codes])


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
    role: Any = "residual",
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
    moved = np.asarray(read + written, dtype=np.float64)
    fitted = section.status != "default"
    calls = Moves(
        moved, code, hw.l2_bytes, hw.bandwidth_bytes_per_s, hw.architecture, added, fitted
    )
    return calls.estimate(constants).on_grid(residual, section)


class Elementwise(Operator):
    """Norms, activations, copies, sorts and so on; the role gives the class."""

    code = int(Kind.ELEMENTWISE)
    name = "elementwise"
    sizes = ()
    constants = _CONSTANTS
    titles = ("elementwise operators",)
    errors = _ERRORS

    def estimates(self, w: Rows, hw: Device, formats: Formats) -> Iterator[tuple[Any, Estimate]]:
        known = np.flatnonzero(w.k > 0)
        if len(known):
            yield known, _known(np.asarray(w.k[known]) * 1e-9)
        at: Any = np.flatnonzero(w.k == 0) if len(known) else slice(None)
        moved = (w.read_bytes[at] + w.write_bytes[at], 0.0)
        yield (
            at,
            elementwise(*moved, hw, role=w.role[at], added=w.overhead[at], dtype=formats.dtype),
        )

    def fixed(self, w: Rows, hw: Device, formats: Formats) -> Estimate:
        return elementwise(0.0, 0.0, hw, role=w.role, dtype=formats.dtype)


def _known(seconds: FloatArray) -> Estimate:
    """Return the cost of kernels whose time is known, s; their time has no error."""
    return Estimate(
        operator="elementwise",
        kind=int(Kind.ELEMENTWISE),
        time=seconds,
        floor=0.0,
        roofline=seconds,
        bottleneck=np.full(seconds.shape, _MEMORY, dtype=np.int8),
        loadings={"memory": np.zeros(seconds.shape)},
        coordinates=np.zeros((seconds.size, 3)),
        active=np.zeros(seconds.shape),
    )
