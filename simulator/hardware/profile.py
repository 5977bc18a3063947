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

from simulator.errors import InputError, unknown
from simulator.hardware.constants import CONSTANTS, Constant
from simulator.hardware.parts import Fitted, Link, Rate, Section

ARCHITECTURES: tuple[str, ...] = ("ampere", "ada", "hopper", "blackwell", "cpu")
OPERATORS: tuple[str, ...] = tuple(CONSTANTS)
"""Parts of a profile that are fitted; "runtime" holds for every dtype and has dtype "*"."""

_TWINS = {"bf16": "fp16", "fp16": "bf16"}


@dataclass(frozen=True, eq=False)
class HardwareProfile:
    """A device; quantities in SI.

    Attributes
    ----------
    sources, notes : mapping of str to str
        Datasheet key ("sm_count", "rates.bf16", "link.latency") -> where the value comes from, and a remark where it
        needs one.
    references : mapping of str to str
        Short names the file uses for its sources.
    sections : mapping of (operator, dtype) to Section
        Fitted parts; ask :meth:`section`, which also borrows and falls back.

    Examples
    --------
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
    sources: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    references: Mapping[str, str] = field(default_factory=dict)
    sections: Mapping[tuple[str, str], Section] = field(default_factory=dict)
    path: Path | None = None

    @property
    def clock_headroom(self) -> float:
        """Highest clock over boost clock, at least 1: how far a device may exceed its datasheet rate."""
        return self.max_clock_hz / self.boost_clock_hz

    def rate(self, dtype: str) -> Rate:
        """Datasheet rate of a dtype; InputError, which names what the device has, where it has no such arithmetic."""
        try:
            return self.rates[dtype]
        except KeyError:
            raise InputError(f"{self.name} has no {dtype} arithmetic; it has {', '.join(self.rates)}") from None

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


def constants_of(operator: str) -> Mapping[str, Constant]:
    """Registry of the constants of an operator's cost model."""
    if operator not in CONSTANTS:
        raise unknown("operator", operator, OPERATORS)
    return CONSTANTS[operator]


@lru_cache(maxsize=64)
def _default_section(operator: str, architecture: str) -> Section:
    constants = constants_of(operator)
    return Section(
        MappingProxyType({name: Fitted(c.default(architecture), None, "default") for name, c in constants.items()})
    )


@lru_cache(maxsize=64)
def _borrowed(section: Section, origin: str) -> Section:
    provenance = section.provenance
    if provenance is not None:
        provenance = replace(provenance, borrowed_from=provenance.borrowed_from or origin)
    return replace(section, status="borrowed", provenance=provenance)
