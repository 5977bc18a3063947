"""Declare the YAML of a hardware profile and of its stack files, and read them."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Generic, TypeVar

from simulator.codes import DTYPES, STACKS, labels
from simulator.files.fields import (
    Keyed,
    Keys,
    Map,
    MapOf,
    Number,
    Quantity,
    Quoted,
    Scalar,
    SourceName,
    String,
    Text,
    TreeReader,
    read,
    unknown_key,
)
from simulator.files.yaml import Node, Problems, parse_yaml
from simulator.hardware.profile import (
    ANY_DTYPE,
    ARCHITECTURES,
    LIMITS,
    ArraysEntry,
    EngineTimes,
    Fitted,
    HardwareProfile,
    Provenance,
    Section,
    Sections,
    StoredArrays,
)
from simulator.names import CONNECTIONS
from simulator.operators import CONSTANTS
from simulator.operators.base import Link, Rate

T = TypeVar("T")

SCHEMA_VERSION = 1

_CLOCK = Quantity("Hz", 1e7, 1e11)
QUANTITIES: Mapping[str, tuple[str, Quantity]] = MappingProxyType(
    {
        "boost_clock": ("boost_clock_hz", _CLOCK),
        "max_clock": ("max_clock_hz", _CLOCK),
        "memory": ("memory_bytes", Quantity("B", 1e6, 1e15)),
        "bandwidth": ("bandwidth_bytes_per_s", Quantity("B/s", 1e8, 1e15)),
        "l2_cache": ("l2_bytes", Quantity("B", 1e3, 1e12)),
        "power": ("power_w", Quantity("W", 0.1, 1e5)),
    }
)
"""Key of the file -> attribute of the profile, and unit with a range that is wide enough to catch
only wrong units."""

RATE = Quantity("FLOP/s", 1e8, 1e18)
"""Arithmetic rate of a number format."""

Fetch = Callable[[Path, str, str, tuple[str, ...]], Mapping[str, Any]]
"""Function that reads arrays from a file with a digest, by prefix and names; it raises
ValueError."""

NAME = Text(
    (), "[a-z0-9][a-z0-9_.-]{0,63}", "a name of lower-case letters, digits, _ - and ., at most 64"
)
_ALIAS = Text(
    (), "[A-Za-z0-9][A-Za-z0-9 _.-]{0,63}", "letters, digits, blanks, _ - and .", quote=True
)
_SHORT = re.compile("[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")

Version = Annotated[int, Number(SCHEMA_VERSION, SCHEMA_VERSION, str(SCHEMA_VERSION), whole=True)]


@dataclass(eq=False, repr=False)
class Fact(Generic[T]):
    value: T
    source: SourceName
    note: Quoted = ""


@dataclass(eq=False, repr=False)
class RateFact:
    """A rate of a datasheet, with the format of its sums and the gain of 2:4 sparsity."""

    value: Annotated[float, RATE]
    accumulate: Annotated[str, Text(("fp16", "bf16", "fp32", "fp64", "int32"))]
    sparse_factor: Annotated[float, Number(1, 4, "2")]
    source: SourceName
    note: Quoted = ""

    def loaded(self) -> Rate:
        return Rate(self.value, self.accumulate, self.sparse_factor)


Bandwidth = Fact[Annotated[float, Quantity("B/s", 1e6, 1e14)]]
Latency = Fact[Annotated[float, Quantity("s", 1e-9, 1.0)]]
Connection = Fact[Annotated[str, Text(tuple(name for name in CONNECTIONS if name != "bridge"))]]


@dataclass(kw_only=True, eq=False, repr=False)
class LinkFacts:
    kind: String
    connection: Connection | None = None
    max_devices: Annotated[int, Number(1, 100_000, "8", whole=True)]
    bandwidth: Bandwidth
    latency: Latency

    def loaded(self) -> Link:
        connection = self.connection.value if self.connection else ""
        speed = self.bandwidth.value, self.latency.value
        return Link(self.kind, *speed, self.max_devices, connection)


@dataclass(eq=False, repr=False)
class BridgeFacts:
    kind: String
    bandwidth: Bandwidth
    latency: Latency

    def loaded(self) -> Link:
        return Link(self.kind, self.bandwidth.value, self.latency.value, 2, "bridge")


@dataclass(kw_only=True, eq=False, repr=False)
class Datasheet:
    sm_count: Fact[Annotated[int, Number(1, 100_000, "132", whole=True)]]
    boost_clock: Fact[Annotated[float, _CLOCK]]
    max_clock: Fact[Annotated[float, _CLOCK]] | None = None
    memory: Fact[Annotated[float, QUANTITIES["memory"][1]]]
    bandwidth: Fact[Annotated[float, QUANTITIES["bandwidth"][1]]]
    l2_cache: Fact[Annotated[float, QUANTITIES["l2_cache"][1]]]
    power: Fact[Annotated[float, QUANTITIES["power"][1]]]
    rates: Annotated[Mapping[str, RateFact], Keys("dtype", DTYPES)]
    link: LinkFacts | None = None
    bridge: BridgeFacts | None = None

    def facts(self) -> Iterator[tuple[str, Any]]:
        """Yield each fact with its key, such as "rates.bf16"."""
        for group, of in (
            ("", self),
            ("rates.", self.rates),
            ("link.", self.link),
            ("bridge.", self.bridge),
        ):
            members = of if isinstance(of, Mapping) else vars(of) if of else {}
            yield from (
                (group + name, fact)
                for name, fact in members.items()
                if isinstance(fact, Fact | RateFact)
            )


class _Constants(MapOf):
    def wrong_key(self, key: str, path: Keyed, reader: TreeReader) -> str:
        return "" if key in CONSTANTS[path[1]] else unknown_key(key, CONSTANTS[path[1]])


class _Formats(MapOf):
    """Sections of an operator by number format, of which the device has a rate."""

    def wrong_key(self, key: str, path: Keyed, reader: TreeReader) -> str:
        known = ("*",) if path[1] in ANY_DTYPE else labels(reader.context["rates"])
        return (
            ""
            if key in known
            else f"unknown dtype; expected one this device has a rate for: {', '.join(known)}"
        )


@dataclass(kw_only=True, eq=False, repr=False)
class SectionEntry:
    status: Annotated[str, Text(("calibrated", "inherited"))] = ""
    stack: Annotated[str, Text(STACKS)] = ""
    provenance: Provenance
    constants: Annotated[Mapping[str, Fitted], _Constants(Fitted)]
    arrays: Annotated[Any, StoredArrays(ArraysEntry)] = None
    # None: 1
    section_scale: Annotated[float | None, Number(*LIMITS["section_scale"], "1.2")] = None
    accuracy: Map[Annotated[float, Number(*LIMITS["accuracy"], "0.042")]] = field(
        default_factory=dict
    )


Calibrated = Annotated[
    Mapping[str, Annotated[Mapping[str, SectionEntry], _Formats(SectionEntry)]],
    Keys("operator", CONSTANTS),
]


@dataclass(kw_only=True, eq=False, repr=False)
class ProfileFile:
    schema_version: Version
    name: Annotated[str, NAME]
    title: Quoted
    vendor: String
    architecture: Annotated[str, Text(ARCHITECTURES)]
    aliases: tuple[Annotated[str, _ALIAS], ...] | None = None
    stacks_of: Annotated[str, NAME] = ""
    own_stack: Annotated[str, Text(STACKS)] = ""
    verdict: Quoted = ""
    sources: Map[Quoted]
    datasheet: Datasheet
    calibrated: Calibrated = field(default_factory=dict)
    engines: Map[EngineTimes] = field(default_factory=dict)


@dataclass(eq=False, repr=False)
class StackFile:
    schema_version: Version
    hardware: String
    stack: String
    calibrated: Calibrated


def plain_name(name: str) -> str:
    """Return a name as it is compared: in lower case, with underscores instead of blanks and
    dashes."""
    return re.sub(r"[\s_-]+", "_", name.strip().lower())


def profile_from_text(
    text: str,
    path: Path,
    problems: Problems,
    fetch: Fetch,
    taken: Mapping[str, str] = MappingProxyType({}),
) -> HardwareProfile | None:
    """Return the profile of a YAML text, or None with problems. ``fetch`` reads the arrays of a
    section; ``taken`` maps plain names that other profiles have to these profiles."""
    root = _root(text, problems)
    if root is None:
        return None
    if "stack" in root.entries:
        name = root.at("hardware").text or "NAME"
        reason = f"expected a profile, got the sections of one stack; load {name}@STACK"
        problems.add(root.entries["stack"][0], "stack", reason)
        return None
    rates = tuple(dtype for dtype in root.at("datasheet", "rates").entries if dtype in DTYPES)
    top = read(ProfileFile, root, problems, rates=rates, folder=path.parent, fetch=fetch)
    _check_facts(root, taken, problems)
    return None if top is None or len(problems) else _profile(top, path)


def stack_from_text(
    text: str, path: Path, problems: Problems, fetch: Fetch, profile: HardwareProfile, stack: str
) -> Sections | None:
    """Return the sections of a stack file's text, or None with problems; ``profile`` has the rates
    of their formats."""
    root = _root(text, problems)
    if root is None:
        return None
    top = read(
        StackFile, root, problems, rates=tuple(profile.rates), folder=path.parent, fetch=fetch
    )
    for key, right in (("hardware", profile.name), ("stack", stack)):
        if key in root.entries and root.at(key).text != right:
            problems.add(root.at(key), key, f"unknown value {root.at(key)}; expected {right}")
    return None if top is None or len(problems) else _sections(top.calibrated, stack)


def _root(text: str, problems: Problems) -> Node | None:
    """Return the tree of a file of this schema version."""
    root = parse_yaml(text, problems)
    start = f"that starts with schema_version: {SCHEMA_VERSION}"
    if len(problems):
        return None
    if root is None:
        problems.add(None, "file", f"is empty; expected a profile {start}")
        return None
    if root.kind != "mapping":
        problems.add(root, "file", f"expected a mapping {start}, got {root}")
        return None
    version = root.at("schema_version")
    if "schema_version" in root.entries and (version.quoted or version.text != str(SCHEMA_VERSION)):
        # no further problems are reported: another version may have other keys
        reason = f"expected {SCHEMA_VERSION}, got {version}; this prunesim reads no other version"
        problems.add(version, "schema_version", reason)
        return None
    return root


def _check_facts(root: Node, taken: Mapping[str, str], problems: Problems) -> None:
    """Check the keys of sources, and rules about several keys."""
    for short, (node, _) in root.at("sources").entries.items():
        if not _SHORT.fullmatch(short):
            right = "a short name of letters, digits, _ - and . as key"
            problems.add(node, "sources", f"expected {right}, got {node}")
    rates = root.at("datasheet", "rates")
    if rates.kind == "mapping" and not rates.entries:
        problems.add(
            rates,
            "datasheet.rates",
            f"expected the rate of at least one dtype of {', '.join(DTYPES)}",
        )
    clocks = [root.at("datasheet", key, "value") for key in ("boost_clock", "max_clock")]
    boost, highest = (_value(_CLOCK, node) for node in clocks)
    if highest < boost:
        reason = "is below boost_clock; expected the highest clock the driver allows"
        problems.add(root.at("datasheet", "max_clock"), "datasheet.max_clock", reason)
    name = root.at("name").text
    own = {plain_name(name)}
    for i, node in enumerate(root.at("aliases").items):
        plain = plain_name(node.text)
        owner = taken.get(plain, name)
        if not plain:  # the problem of this name is recorded already
            continue
        if plain in own:
            problems.add(
                node,
                f"aliases.{i}",
                f"{node.text!r} is given twice, or is the name itself; remove it",
            )
        elif owner != name:
            problems.add(node, f"aliases.{i}", f"{node.text!r} already means {owner}; use another")
        own.add(plain)


def _value(scalar: Scalar, node: Node) -> float:
    """Return the number of a node, or NaN for a node that :func:`read` reports."""
    try:
        return float(scalar.value(node))
    except ValueError:
        return math.nan


# keys of a file and attributes of a profile that have the same name and value
SAME = ("name", "title", "vendor", "architecture", "stacks_of", "verdict")


def _profile(top: ProfileFile, path: Path) -> HardwareProfile:
    sheet, facts = top.datasheet, dict(top.datasheet.facts())
    values = {
        attribute: facts[key].value for key, (attribute, _) in QUANTITIES.items() if key in facts
    }
    values.setdefault("max_clock_hz", values["boost_clock_hz"])
    rates = {dtype: rate.loaded() for dtype, rate in sheet.rates.items()}
    profile = HardwareProfile(
        **{name: getattr(top, name) for name in SAME},
        aliases=top.aliases or (),
        rates=MappingProxyType(rates),
        sm_count=sheet.sm_count.value,
        **values,
        link=sheet.link.loaded() if sheet.link else None,
        bridge=sheet.bridge.loaded() if sheet.bridge else None,
        sources=MappingProxyType({key: top.sources[fact.source] for key, fact in facts.items()}),
        notes=MappingProxyType({key: fact.note for key, fact in facts.items() if fact.note}),
        references=top.sources,
        engines=top.engines,
        path=path,
    )
    if not (sections := _sections(top.calibrated)):
        return profile
    unnamed = not top.own_stack and any(not section.stack for section in sections.values())
    return replace(profile.calibrated(sections, top.own_stack), same_stack=unnamed)


def _sections(calibrated: Calibrated, stack: str = "") -> Sections:
    """Return sections by operator and number format, marked with the stack of their file."""
    found = {}
    for operator, by_dtype in calibrated.items():
        for dtype, entry in by_dtype.items():
            found[operator, dtype] = Section(
                entry.constants,
                entry.arrays or {},
                entry.section_scale or 1.0,
                entry.accuracy,
                entry.provenance,
                entry.status or "calibrated",
                stack or entry.stack,
            )
    return MappingProxyType(found)
