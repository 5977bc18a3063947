"""What a cost model is: constants, parts, coordinates and a floor. One file per operator implements it.

A cost model predicts the time of one operator on one device. It has four parts:

constants
    Named numbers with unit and range (:mod:`simulator.hardware.constants`). A fit estimates them; a profile stores
    them.
parts
    Times with a physical cause (launch, compute, memory, ...). The analytical time joins them, by a sum or a norm. The
    loading of a cause is the derivative of the log of the time by the log of its part: what an error of the part does
    to the time.
coordinates
    log2 of the sizes of an operator. The residual (:mod:`simulator.cost.residual_grid`) is a function of them, and
    errors of operators with similar coordinates are correlated.
floor
    The time that physics allows: FLOP over the peak rate at the highest clock, bytes over the memory bandwidth.

A cost model is a subclass of :class:`Calls`, equal-length arrays of sizes with the datasheet facts they need, and its
method :meth:`Calls.estimate`, which turns constants into an :class:`Estimate`. Everything else follows from the
estimate and is written once: prediction intervals and their error factors (:mod:`simulator.uncertainty`), fits,
held-out errors and their validation (:mod:`calibration.fit.section`), and local updates. docs/adding.md adds an
operator as an example.

Symbols
-------
n : number of operators
t : analytical time times the residual's factor
l : loading of an error factor, share of t
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from simulator.arrays import Array, BoolArray, FloatArray
from simulator.errors import InputError
from simulator.hardware.formats import formats_of
from simulator.workload import DTYPE_BYTES, DTYPES

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile
    from simulator.hardware.sections import Section

BOTTLENECKS: tuple[str, ...] = ("compute", "memory", "l2", "latency", "launch", "host", "link")
"""What can take most of an operator's time; arrays hold the index."""

ELEMENT_BYTES: Mapping[str, float] = MappingProxyType(dict(zip(DTYPES, DTYPE_BYTES.tolist(), strict=True)))
"""Bytes of one element by number format."""


def bottleneck(name: str) -> int:
    """Return the code of a bottleneck."""
    return BOTTLENECKS.index(name)


def largest_part(parts: Mapping[str, Any], shape: tuple[int, ...]) -> NDArray[np.int8]:
    """Return the code of the bottleneck with the largest part, per operator; ``parts`` maps bottlenecks to times."""
    times = np.empty((len(parts), *shape))
    for i, part in enumerate(parts.values()):
        times[i] = part
    codes = np.array([bottleneck(name) for name in parts], dtype=np.int8)
    return np.asarray(codes[times.argmax(axis=0)])


def element_bytes(dtype: str, what: str = "dtype") -> float:
    """Return the bytes of one element; InputError for an unknown number format."""
    if dtype not in ELEMENT_BYTES:
        raise InputError(f"{what} {dtype!r} is unknown; expected one of {', '.join(ELEMENT_BYTES)}")
    return ELEMENT_BYTES[dtype]


@dataclass(frozen=True)
class Machine:
    """Datasheet facts of one arithmetic on one device, SI."""

    peak_flop_per_s: float
    bandwidth_bytes_per_s: float
    l2_bytes: float
    sm_count: int
    headroom: float  # highest clock over boost clock
    element_bytes: float  # of an activation
    weight_bytes: float  # of a stored weight, indices included; of attention, of the KV cache
    persistent: bool  # thread blocks stay on their SM and take tile after tile
    packs: bool = False  # a CPU: no tiles and waves, weights rearranged from `pack_m` rows on, nothing overlaps
    least_rows: float = 1.0  # rows of the smallest tile that is used
    ragged: bool = False  # skipped tiles end at once: SMs continue one by one, not in waves
    serial: bool = False  # a 2:4 kernel with one plan for all shapes: a block walks the whole k of its tile

    @classmethod
    def of(cls, hw: HardwareProfile, label: str = "bf16") -> Machine:
        """Return the facts of a profile for a number format of its sections; InputError for arithmetic that the device
        lacks."""
        dtype, weight = formats_of(label, hw.rates)
        return cls(
            peak_flop_per_s=hw.rate(dtype).flop_per_s,
            bandwidth_bytes_per_s=float(hw.bandwidth_bytes_per_s),
            l2_bytes=float(hw.l2_bytes),
            sm_count=int(hw.sm_count),
            headroom=max(1.0, float(hw.clock_headroom)),
            element_bytes=ELEMENT_BYTES[dtype],
            weight_bytes=ELEMENT_BYTES[weight],
            persistent=hw.architecture in ("hopper", "blackwell_sm100"),
            packs=hw.architecture == "cpu",
        )


def from_l2(footprint_bytes: FloatArray, machine: Machine, c: Mapping[str, float]) -> FloatArray:
    """Return the time of moving bytes of which L2 holds 1 / (1 + (bytes / (l2_share L2))^8), over that from DRAM.

    The power is fixed: the error of L40S decode is 16.3, 14.0, 13.2 % with powers 4, 8, 16.
    """
    ratio = footprint_bytes / (c["l2_share"] * machine.l2_bytes)
    for _ in range(3):  # to the eighth power
        ratio = ratio * ratio
    return np.asarray(1.0 - (1.0 - 1.0 / c["l2_gain"]) / (1.0 + ratio))


@dataclass(frozen=True)
class MeasuredOperators:
    """Operators whose very shape was measured: their time replaces the prediction."""

    rows: BoolArray  # (n,) which of them
    seconds: FloatArray  # of those rows
    log_half: FloatArray  # log half-width of the 90 % interval of those times


@dataclass(frozen=True)
class Estimate:
    """The cost of n operators, arrays of one shape; times are in units of ``unit_s`` seconds."""

    operator: str  # prefix of its error factors
    kind: int  # code of `simulator.workload.Kind`: errors are correlated within one kind
    time: Array  # analytical time times the residual's factor
    floor: Any  # the least time that physics allows
    roofline: Array  # max(FLOP / datasheet peak, bytes / datasheet bandwidth)
    bottleneck: NDArray[Any]  # int8: index into BOTTLENECKS
    loadings: Mapping[str, Any]  # error factor of the operator -> loading
    coordinates: Array  # (n, 3) log2 of sizes, octaves: the closer, the more alike are errors
    position: tuple[Any, ...] = ()  # the same sizes as axes of the residual grid
    section: Section | None = None  # the fitted part of the profile that was used
    noise: Mapping[str, Any] = field(default_factory=dict)  # further shares of the time that add independent error
    outside: Any = None  # octaves outside the sizes that the fit saw
    unlike: Any = None  # share of the time in a kernel that may differ entirely from the fitted one
    active: Any = None  # 0 where nothing runs, so that nothing is uncertain
    measured: MeasuredOperators | None = None
    unit_s: float = 1.0
    details: Mapping[str, Array] = field(default_factory=dict)  # what the model chose, seconds and counts

    def with_residual(self, log_factor: Any, section: Section) -> Estimate:
        """Return the estimate with the residual of a profile's section: None where the section has none."""
        time = self.time if log_factor is None else self.time * np.exp(log_factor)
        return replace(self, time=time, section=section)


S = TypeVar("S", bound="Sizes")


@dataclass(frozen=True)
class Sizes:
    """Sizes of n operators; fields that are arrays have a value per operator, the others hold for all."""

    def take(self: S, rows: Any) -> S:
        """Return some of the operators, by mask or index."""
        taken: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Sizes):
                taken[f.name] = value.take(rows)
            elif isinstance(value, np.ndarray) and value.ndim:
                taken[f.name] = value[rows]
        return replace(self, **taken)


@dataclass(frozen=True)
class Calls(Sizes, ABC):
    """A cost model: n operators of one kind on one device, and what they cost."""

    @property
    @abstractmethod
    def operator(self) -> str:
        """Section of a profile that stores the constants."""

    @abstractmethod
    def estimate(self, c: Mapping[str, Any]) -> Estimate:
        """Return the cost by the analytical model, without residual, from constants by name."""

    def seconds(self, c: Mapping[str, Any]) -> FloatArray:
        """Return the analytical time alone, s; a fit asks for it many times."""
        e = self.estimate(c)
        return np.asarray(e.time * e.unit_s)


def octaves_outside(coordinates: Array, low: Array, high: Array) -> Array:
    """Return the octaves (n,) by which coordinates (n, 3) lie outside a measured range, added up over the axes."""
    return np.asarray((np.maximum(low - coordinates, 0.0) + np.maximum(coordinates - high, 0.0)).sum(axis=1))


def octaves_outside_fit(coordinates: Array, section: Section | None) -> Any:
    """Return the octaves outside the sizes that a section was fitted on; None where the section does not store them."""
    if section is None or "measured" not in section.arrays:
        return None
    low, high = np.asarray(section.arrays["measured"], dtype=coordinates.dtype)
    return octaves_outside(coordinates, low, high)
