"""A device as data: datasheet facts with their sources, and beside them what was fitted on it.

``hardware.library`` reads and writes profiles. Facts and fitted values never mix: the first are attributes, the second
come from :meth:`HardwareProfile.section`, which says whether they are calibrated, borrowed or the architecture's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

from numpy.typing import NDArray

from simulator.errors import InputError, unknown
from simulator.files.fields import Number
from simulator.hardware.constants import CONSTANTS

ARCHITECTURES: tuple[str, ...] = ("ampere", "ada", "hopper", "blackwell", "cpu")
OPERATORS: tuple[str, ...] = tuple(CONSTANTS)
"""Parts of a profile that are fitted; "runtime" holds for every dtype and has dtype "*"."""

_TWINS = {"bf16": "fp16", "fp16": "bf16"}
Rows = Annotated[int, Number(0, 1e12, "400", whole=True)]


@dataclass(frozen=True)
class Rate:
    """Arithmetic of one dtype."""

    flop_per_s: float  # dense, datasheet, at boost clock
    accumulate: str  # the type sums are kept in
    sparse_factor: float = 1.0  # rate of 2:4 sparse operands over dense ones


@dataclass(frozen=True)
class Link:
    """Connection to other devices."""

    kind: str
    bandwidth_bytes_per_s: float  # in one direction
    latency_s: float  # of one message step
    max_devices: int


@dataclass(frozen=True)
class Fitted:
    """A constant's value and how it came about: "fitted", "fixed", "borrowed" or "default"."""

    value: float
    std_error: float | None = None
    status: str = "fitted"


@dataclass(frozen=True)
class Interval:
    """Multipliers of a prediction that hold the measured time at ``level``, from ``rows`` unseen shapes of a regime."""

    regime: str
    low: Annotated[float, Number(1e-6, 1.0, "0.93")]
    high: Annotated[float, Number(1.0, 1e6, "1.08")]
    level: Annotated[float, Number(0.01, 0.9999, "0.9")]
    rows: Rows


@dataclass(frozen=True)
class Provenance:
    """What a section was fitted on."""

    source: str
    digest: str
    date: str
    software: str
    device: str
    protocol: str
    rows: Rows
    borrowed_from: str = ""


@dataclass(frozen=True, eq=False)
class Section:
    """One fitted part of a profile; ``section["name"]`` is the value of a constant."""

    constants: Mapping[str, Fitted]
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)  # read-only; for instance the residual lattice
    intervals: tuple[Interval, ...] = ()
    accuracy: Mapping[str, float] = field(default_factory=dict)  # errors on shapes the fit did not see
    provenance: Provenance | None = None
    status: str = "default"  # or "calibrated" or "borrowed"

    def __getitem__(self, name: str) -> float:
        return self.constants[name].value


@dataclass(frozen=True, eq=False)
class HardwareProfile:
    """A device; quantities in SI.

    >>> from simulator.hardware.library import load_hardware
    >>> hw = load_hardware("h100")
    >>> hw.sm_count, hw.rate("bf16").accumulate, round(hw.ridge_point("bf16"))
    (132, 'fp32', 295)
    """

    name: str
    title: str
    vendor: str
    architecture: str
    aliases: tuple[str, ...]
    rates: Mapping[str, Rate]
    sm_count: int
    boost_clock_hz: float
    max_clock_hz: float
    memory_bytes: float
    bandwidth_bytes_per_s: float
    l2_bytes: float
    power_w: float
    link: Link | None = None
    # datasheet key ("sm_count", "rates.bf16", "link.latency") -> where the value comes from, and a remark if needed
    sources: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    references: Mapping[str, str] = field(default_factory=dict)  # short names the file uses for its sources
    # (operator, dtype) -> what was fitted; ask section(), which also borrows and falls back
    sections: Mapping[tuple[str, str], Section] = field(default_factory=dict)
    path: Path | None = None

    @property
    def clock_headroom(self) -> float:
        """Highest clock over boost clock, at least 1: how far a device may exceed its datasheet rate."""
        return self.max_clock_hz / self.boost_clock_hz

    def rate(self, dtype: str) -> Rate:
        """Datasheet rate of a dtype; InputError, which names what the device has, where it has no such arithmetic."""
        if dtype not in self.rates:
            raise InputError(f"{self.name} has no {dtype} arithmetic; it has {', '.join(self.rates)}")
        return self.rates[dtype]

    def peak_flop_per_s(self, dtype: str, sparse: bool = False) -> float:
        """Datasheet rate at boost clock, FLOP/s, with ``sparse`` that of 2:4 operands; times ``clock_headroom`` it is a
        hard ceiling."""
        rate = self.rate(dtype)
        return rate.flop_per_s * (rate.sparse_factor if sparse else 1.0)

    def ridge_point(self, dtype: str) -> float:
        """Arithmetic intensity, FLOP/byte, above which a datasheet roofline is compute-bound."""
        return self.peak_flop_per_s(dtype) / self.bandwidth_bytes_per_s

    def section(self, operator: str, dtype: str) -> Section:
        """Fitted values of one of :data:`OPERATORS`: the calibrated ones, else those of bf16 / fp16 for one another,
        else the architecture's defaults.

        The section has every constant of the operator; one that was not fitted has its default and status "default".
        """
        default = _default_section(operator, self.architecture)
        found = self.sections.get((operator, "*" if operator == "runtime" else dtype))
        twin = _TWINS.get(dtype, "")
        if found is None and (operator, twin) in self.sections and self.rates.get(dtype) == self.rates.get(twin):
            found = _borrowed(self.sections[operator, twin], f"{self.name} {operator} {twin}")
        if found is None:
            return default
        if found.constants.keys() >= default.constants.keys():
            return found
        return replace(found, constants=MappingProxyType({**default.constants, **found.constants}))


@lru_cache(maxsize=64)
def _default_section(operator: str, architecture: str) -> Section:
    if operator not in CONSTANTS:
        raise unknown("operator", operator, OPERATORS)
    values = {name: constant.default(architecture) for name, constant in CONSTANTS[operator].items()}
    return Section(MappingProxyType({name: Fitted(value, None, "default") for name, value in values.items()}))


@lru_cache(maxsize=64)
def _borrowed(section: Section, origin: str) -> Section:
    provenance = section.provenance
    if provenance is not None:
        provenance = replace(provenance, borrowed_from=provenance.borrowed_from or origin)
    return replace(section, status="borrowed", provenance=provenance)
