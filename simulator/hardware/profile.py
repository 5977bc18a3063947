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

from simulator.arguments import COUNT, Range, number
from simulator.display import Displayed, as_plain, by_column
from simulator.errors import InputError, unknown
from simulator.files.fields import Number
from simulator.hardware.constants import CONSTANTS
from simulator.hardware.formats import labels
from simulator.units import rate, size
from simulator.workload import STACKS

ARCHITECTURES: tuple[str, ...] = (
    *("volta", "turing", "ampere", "ada", "hopper", "blackwell", "blackwell_sm100", "cdna3", "cpu"),
)
ANY_DTYPE: tuple[str, ...] = ("runtime", "collective")
"""Those that hold for every number format: their sections have the dtype "*"."""

OTHER_STACK, ENGINE_STACK, SAME_STACK = 1.25, 1.0, 0.5
"""Factors on the prior of what stacks and labs differ by: for a section fitted on another stack than the user's, judged
on stacks and labs left out; on the stack of the engine asked for, in another version; and on the user's own, whose
kernels still run among others."""

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

    @property
    def family(self) -> str:
        """ "nvlink" or "pcie" (what is neither counts as the slower one)."""
        return "nvlink" if "nvlink" in self.kind.lower() else "pcie"


@dataclass(frozen=True)
class Fitted:
    """A constant's value and how it came about: "fitted", "fixed", "borrowed" or "default"."""

    value: float
    std_error: float | None = None
    status: str = "fitted"


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


@dataclass(frozen=True, eq=False, repr=False)
class Section(Displayed):
    """One fitted part of a profile; ``section["name"]`` is the value of a constant."""

    constants: Mapping[str, Fitted]
    # read-only; for instance the residual lattice
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict, repr=False)
    spread: float = 1.0  # factor on a shape's own and local errors that holds 90 % of unseen rows of its own table
    accuracy: Mapping[str, float] = field(default_factory=dict)  # errors on shapes the fit did not see
    provenance: Provenance | None = None
    status: str = "default"  # or "calibrated" or "borrowed"
    stack: str = ""  # of the file it came from; "" for a calibration of one's own

    def __getitem__(self, name: str) -> float:
        return self.constants[name].value

    def _title(self) -> str:
        return f"{len(self.constants)} constants, {self.status}{f' for {self.stack}' if self.stack else ''}"

    def _columns(self) -> Mapping[str, Any]:
        """A row a constant."""
        return by_column([{"name": name, **as_plain(constant)} for name, constant in self.constants.items()])


@dataclass(frozen=True, eq=False)
class Anchor:
    """Local rows that move the whole profile, by their log errors and what those depend on."""

    provenance: Provenance
    columns: tuple[str, ...]  # of ``shared``, by name: a later version may know more
    # shared (n, columns), own, local, log_ratio and kind (n,), place (n, 3)
    arrays: Mapping[str, NDArray[Any]] = field(repr=False)


_POSITIVE = Range(1e-30, 1e30, "a finite number above 0")
_FACTS: Mapping[str, Range] = MappingProxyType(
    dict.fromkeys(
        ("boost_clock_hz", "max_clock_hz", "memory_bytes", "bandwidth_bytes_per_s", "l2_bytes", "power_w"), _POSITIVE
    )
    | {"sm_count": COUNT}
)


@dataclass(frozen=True, eq=False, repr=False)
class HardwareProfile(Displayed):
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
    stacks: Mapping[str, Mapping[tuple[str, str], Section]] = field(
        default_factory=dict
    )  # the preferred by default first
    stack: str = ""  # preferred: its sections come first; "" where there is none, or for a calibration of one's own
    pinned: bool = False  # the preferred stack was asked for by name: it stays whatever the engine
    engine_stack: str = ""  # whose kernels the engine runs, in :meth:`serving`
    stacks_of: str = ""  # profile of a sibling whose stacks this one borrows
    same_stack: bool = False  # whether the user's stack is the preferred one
    anchor: Anchor | None = None
    path: Path | None = None

    def __post_init__(self) -> None:
        for name, right in _FACTS.items():
            number(name, getattr(self, name), right)
        for dtype, facts in self.rates.items():
            number(f"rates[{dtype!r}]", facts.flop_per_s, _POSITIVE)

    @property
    def label(self) -> str:
        """The name, with "@stack" where one was asked for (:func:`simulator.load_hardware` takes it), and whether local
        rows move it."""
        name = f"{self.name}@{self.stack}" if self.pinned else self.name
        return f"{name} (anchored)" if self.anchor is not None else name

    def _title(self) -> str:
        rates = (f"{name} {rate(r.flop_per_s, 'FLOP/s')}" for name, r in self.rates.items() if name in ("fp16", "bf16"))
        memory = f"{size(self.memory_bytes)} at {rate(self.bandwidth_bytes_per_s, 'B/s')}"
        stacks = ", ".join(stack or "itself" for stack in self.stacks) or "no stack"
        return f"{self.label}: {self.title}, {self.architecture}, {memory}, {', '.join(rates)}; fitted for {stacks}"

    def to_dict(self) -> dict[str, Any]:
        """Facts, SI, their sources, and each fitted section without its arrays."""
        fitted = {key: None for stack in self.stacks.values() for key, s in stack.items() if s.status == "calibrated"}
        facts = (
            *("name", "title", "vendor", "architecture", "aliases", "peak_flop_per_s", "sm_count", "boost_clock_hz"),
            *("max_clock_hz", "memory_bytes", "bandwidth_bytes_per_s", "l2_bytes", "power_w", "link", "calibrated"),
            *("stack", "stacks", "stacks_of", "anchor", "sources", "sections"),  # in the order shown
        )
        derived = {
            "peak_flop_per_s": {dtype: r.flop_per_s for dtype, r in self.rates.items()},
            "calibrated": [f"{operator} {dtype}".replace(" *", "") for operator, dtype in fitted],
            "stacks": [stack for stack in self.stacks if stack],
            "anchor": None if self.anchor is None else self.anchor.provenance,
            "sections": [_section_row(self.name, *key, section) for key, section in self.sections.items()],
        }
        return {name: as_plain(derived[name] if name in derived else getattr(self, name)) for name in facts}

    def _columns(self) -> Mapping[str, Any]:
        """Facts, one column each; of mappings one a key."""
        out: dict[str, Any] = {}
        for name, value in self.to_dict().items():
            if isinstance(value, dict):
                out |= {f"{name}.{key}": [v] for key, v in value.items()}
            else:
                out[name] = [value]
        return {name: column for name, column in out.items() if name.partition(".")[0] not in ("sources", "sections")}

    def on(self, stack: str) -> HardwareProfile:
        """The same device, its sections those of a stack before those of others, whatever engine runs on it. The same
        stack gives the same object; InputError, which names those that there are, for one that it does not have.

        >>> from simulator.hardware.library import load_hardware
        >>> load_hardware("h100").on("trtllm").section("gemm", "bf16").status
        'calibrated'
        """
        return self if self.pinned and stack == self.stack else _on(self, stack)

    def serving(self, stacks: tuple[str, ...]) -> HardwareProfile:
        """The same device as an engine runs it: sections of the first of some stacks that it has. A stack asked for by
        name, or a calibration of one's own, stays.

        >>> from simulator.hardware.library import load_hardware
        >>> load_hardware("h100").serving(("torch", "trtllm")).stack
        'trtllm'
        """
        return _serving(self, stacks) if stacks and not self.engine_stack else self

    def calibrated(self, sections: Mapping[tuple[str, str], Section]) -> HardwareProfile:
        """The same device with sections of a calibration of one's own."""
        sections = MappingProxyType(dict(sections))
        return replace(self, sections=sections, stacks=MappingProxyType({"": sections}), stack="", same_stack=True)

    def spread(self, section: Section) -> tuple[float, float]:
        """Factors on the prior of log errors of a section's times: on those that all share, and on each one's own."""
        fitted = section.status == "calibrated" and section.stack == self.stack
        if fitted and self.same_stack and self.anchor is None:
            return SAME_STACK, section.spread
        engines = fitted and section.stack == self.engine_stack != ""
        return ENGINE_STACK if engines else OTHER_STACK, max(section.spread, 1.0)

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
        """Datasheet rate of a ``dtype`` at boost clock, FLOP/s, with ``sparse`` that of 2:4 operands; times
        ``clock_headroom`` it is a hard ceiling. InputError as for :meth:`rate`."""
        rate = self.rate(dtype)
        return rate.flop_per_s * (rate.sparse_factor if sparse else 1.0)

    def ridge_point(self, dtype: str) -> float:
        """Arithmetic intensity, FLOP/byte, above which a datasheet roofline of a ``dtype`` is compute-bound."""
        return self.peak_flop_per_s(dtype) / self.bandwidth_bytes_per_s

    def section(self, operator: str, dtype: str) -> Section:
        """Fitted values of one ``operator`` in a ``dtype``: the calibrated ones, else those of bf16 / fp16 for one
        another, else the architecture's defaults.

        The section has every constant of the operator; one that was not fitted has its default and status "default".
        """
        kind = self.link.family if operator == "collective" and self.link else self.architecture
        default = _default_section(operator, kind)
        found = self.sections.get((operator, "*" if operator in ANY_DTYPE else dtype))
        twin = _TWINS.get(dtype, "")
        if found is None and (operator, twin) in self.sections and self.rates.get(dtype) == self.rates.get(twin):
            found = _borrowed(self.sections[operator, twin], f"{self.name} {operator} {twin}")
        if found is None:
            return default
        if found.constants.keys() >= default.constants.keys():
            return found
        return replace(found, constants=MappingProxyType({**default.constants, **found.constants}))


def _section_row(name: str, operator: str, dtype: str, section: Section) -> dict[str, Any]:
    """A section as plain values, with where it came from in a few words."""
    about, origin = section.provenance, ""
    if about:
        lender = about.borrowed_from.removeprefix(f"{name} {section.stack}")
        origin = f"as {lender}" if lender else about.software
    held = {key: getattr(section, key) for key in ("stack", "status", "constants", "accuracy", "spread")}
    rows = about.rows if about else 0
    return {"operator": operator, "dtype": dtype, **held, "rows": rows, "origin": origin}


def unfitted(operator: str, section: Section, architecture: str) -> tuple[str, ...]:
    """Columns of the error model that a section has because nothing was fitted: "default", beside it "generic" where
    nothing of its architecture ever was.

    >>> from simulator.hardware.library import load_hardware
    >>> [unfitted("gemm", load_hardware(n).section("gemm", "fp16"), n) for n in ("h100", "t4")]
    [(), ('default', 'generic')]
    """
    if section.status != "default":
        return ()
    known = any(architecture in constant.defaults for constant in CONSTANTS[operator].values())
    return ("default",) if known else ("default", "generic")


@lru_cache(maxsize=64)
def _default_section(operator: str, kind: str) -> Section:
    if operator not in CONSTANTS:
        raise unknown("operator", operator, CONSTANTS)
    values = {name: constant.default(kind) for name, constant in CONSTANTS[operator].items()}
    return Section(MappingProxyType({name: Fitted(value, None, "default") for name, value in values.items()}))


@lru_cache(maxsize=64)
def _borrowed(section: Section, origin: str) -> Section:
    provenance = section.provenance
    if provenance is not None:
        provenance = replace(provenance, borrowed_from=provenance.borrowed_from or origin)
    return replace(section, status="borrowed", provenance=provenance)


def preferring(
    profile: HardwareProfile, stacks: Mapping[str, Mapping[tuple[str, str], Section]], *first: str
) -> HardwareProfile:
    """A profile with stacks: the sections of the first of some (none: a calibration of one's own, then in the order of
    :data:`STACKS`), then what the others have beside it, borrowed in that order."""
    stacks = {name: stacks[name] for name in ("", *STACKS) if stacks.get(name)}
    if not stacks:
        return profile
    stack, *others = dict.fromkeys((*(name for name in first if name in stacks), *stacks))
    sections = dict(stacks[stack])
    for name in others:
        origin = f"{profile.name} {name or 'own calibration'}"
        sections |= {key: _borrowed(section, origin) for key, section in stacks[name].items() if key not in sections}
    return replace(profile, sections=MappingProxyType(sections), stacks=MappingProxyType(stacks), stack=stack)


def lent(profile: HardwareProfile, lender: HardwareProfile) -> HardwareProfile:
    """A profile with the stacks of a sibling beside its own: for number formats it has, what it was not fitted for;
    collectives only over a link of the same kind."""
    linked = profile.link and lender.link and profile.link.kind == lender.link.kind
    known = (*labels(profile.rates), "runtime", *(["collective"] if linked else []))
    stacks = {name: dict(own) for name, own in profile.stacks.items()}
    for name, sections in lender.stacks.items():
        keys = [key for key in sections if (key[0] if key[0] in ANY_DTYPE else key[1]) in known]
        borrowed = {key: _borrowed(sections[key], f"{lender.name} {name}") for key in keys}
        stacks[name] = {**borrowed, **stacks.get(name, {})}
    return preferring(profile, stacks)


@lru_cache(maxsize=64)
def _on(profile: HardwareProfile, stack: str) -> HardwareProfile:
    if stack not in profile.stacks:
        if not any(profile.stacks):
            raise InputError(f"{profile.name} was fitted for no stack; ask for it without {stack!r}")
        raise unknown(f"{profile.name}: stack", stack, filter(None, profile.stacks))
    return replace(preferring(profile, profile.stacks, stack), pinned=True)


@lru_cache(maxsize=64)
def _serving(profile: HardwareProfile, stacks: tuple[str, ...]) -> HardwareProfile:
    if not (profile.pinned or profile.anchor or "" in profile.stacks):
        profile = preferring(profile, profile.stacks, *stacks)
    return replace(profile, engine_stack=stacks[0])
