"""A device as data: datasheet facts with their sources, and beside them what was fitted on it.

Use :func:`load_hardware` to get a profile by name, alias or path, :func:`list_hardware` for the shipped names, :func:`check_hardware` for
everything that is wrong with a file, :func:`save_hardware` to write one. Facts and fitted values never mix: the first are attributes, the
second come from :meth:`HardwareProfile.section`, which says whether they were calibrated, borrowed or are defaults of the architecture.
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
from simulator.units import format_quantity

ARCHITECTURES: tuple[str, ...] = ("ampere", "ada", "hopper", "blackwell", "cpu")
OPERATORS: tuple[str, ...] = ("gemm", "attention_prefill", "attention_decode", "elementwise", "runtime")
"""Parts of a profile that are fitted; "runtime" holds for every dtype and has dtype "*"."""


@dataclass(frozen=True, eq=False)
class HardwareProfile:
    """A device; quantities in SI.

    Attributes
    ----------
    sources : mapping of str to str
        Datasheet key ("sm_count", "rates.bf16", "link.latency") -> where the value comes from.
    notes : mapping of str to str
        Datasheet key -> a remark, where a value needs one.
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
        """Datasheet rate of a dtype.

        Raises
        ------
        InputError
            When the device has no such arithmetic; names what it has.
        """
        try:
            return self.rates[dtype]
        except KeyError:
            raise InputError(f"{self.name} has no {dtype} arithmetic; it has {', '.join(self.rates)}") from None

    def peak_flop_per_s(self, dtype: str, sparse: bool = False) -> float:
        """Datasheet rate at boost clock, FLOP/s; with ``sparse`` that of 2:4 operands. Times ``clock_headroom`` it is a hard ceiling."""
        rate = self.rate(dtype)
        return rate.flop_per_s * (rate.sparse_factor if sparse else 1.0)

    def ridge_point(self, dtype: str) -> float:
        """Arithmetic intensity, FLOP/byte, above which a datasheet roofline is compute-bound."""
        return self.peak_flop_per_s(dtype) / self.bandwidth_bytes_per_s

    def section(self, operator: str, dtype: str) -> Section:
        """Fitted values of an operator: the calibrated ones, else those of bf16 / fp16 for one another, else the architecture's defaults.

        Parameters
        ----------
        operator : str
            One of :data:`OPERATORS`.
        dtype : str
            A dtype of the device; ignored for "runtime".

        Returns
        -------
        Section
            With every constant of the operator; one that was not fitted has its default and status "default".

        Raises
        ------
        InputError
            For an operator that does not exist.
        """
        if operator not in OPERATORS:
            raise unknown("operator", operator, OPERATORS)
        key = (operator, "*" if operator == "runtime" else dtype)
        twin = {"bf16": "fp16", "fp16": "bf16"}.get(dtype)
        found = self.sections.get(key)
        if (
            found is None
            and twin is not None
            and (operator, twin) in self.sections
            and self.rates.get(dtype) == self.rates.get(twin)
        ):
            found = _borrowed(self.sections[(operator, twin)], f"{self.name} {operator} {twin}")
        default = _default_section(operator, self.architecture)
        if found is None:
            return default
        if found.constants.keys() >= default.constants.keys():
            return found
        return replace(found, constants=MappingProxyType({**default.constants, **found.constants}))

    def describe(self) -> list[tuple[str, str, str]]:
        """Facts as rows of (key, value for people, source); prints nothing."""
        rows: list[tuple[str, str]] = [
            ("sm_count", str(self.sm_count)),
            ("boost_clock", format_quantity(self.boost_clock_hz, "Hz")),
            ("max_clock", format_quantity(self.max_clock_hz, "Hz")),
            ("memory", format_quantity(self.memory_bytes, "B")),
            ("bandwidth", format_quantity(self.bandwidth_bytes_per_s, "B/s")),
            ("l2_cache", format_quantity(self.l2_bytes, "B")),
            ("power", format_quantity(self.power_w, "W")),
        ]
        for dtype, rate in self.rates.items():
            sparse = f", 2:4 sparse x{rate.sparse_factor:g}" if rate.sparse_factor != 1 else ""
            rows.append(
                (
                    f"rates.{dtype}",
                    f"{format_quantity(rate.flop_per_s, 'FLOP/s')}, {rate.accumulate} accumulate{sparse}",
                )
            )
        if self.link:
            rows.append(
                (
                    "link.bandwidth",
                    f"{self.link.kind}, {format_quantity(self.link.bandwidth_bytes_per_s, 'B/s')} each direction",
                )
            )
            rows.append(("link.latency", format_quantity(self.link.latency_s, "s")))
        return [(key, value, self.sources.get(key, "")) for key, value in rows]


def constants_of(operator: str) -> Mapping[str, Constant]:
    """Registry of the constants of an operator's cost model."""
    if operator not in CONSTANTS:
        raise unknown("operator", operator, OPERATORS)
    return CONSTANTS[operator]


@lru_cache(maxsize=64)
def _default_section(operator: str, architecture: str) -> Section:
    values = {
        name: Fitted(constant.default(architecture), None, "default")
        for name, constant in constants_of(operator).items()
    }
    return Section(MappingProxyType(values))


@lru_cache(maxsize=64)
def _borrowed(section: Section, origin: str) -> Section:
    provenance = section.provenance
    if provenance is not None:
        provenance = replace(provenance, borrowed_from=provenance.borrowed_from or origin)
    return replace(section, status="borrowed", provenance=provenance)
