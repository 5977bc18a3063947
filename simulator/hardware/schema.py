"""Read the YAML of a hardware profile, and of its stack files, by a schema.

The results are a :class:`HardwareProfile` or its sections, or a list of all problems.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from simulator.errors import InputError
from simulator.files.fields import (
    CheckedField,
    FieldType,
    ListField,
    MapField,
    NumberField,
    ObjectField,
    QuantityField,
    TextField,
    did_you_mean,
    field_of,
    shown,
)
from simulator.files.yaml import Node, Problems, parse_yaml
from simulator.hardware import formats
from simulator.hardware.arrays import ARRAY_NAME, FILE_NAME
from simulator.hardware.constants import CONSTANTS
from simulator.hardware.formats import Rate
from simulator.hardware.link import CONNECTIONS, Link
from simulator.hardware.profile import ARCHITECTURES, HardwareProfile
from simulator.hardware.sections import (
    ACCURACY_RANGE,
    ANY_DTYPE,
    MOST_STD_ERROR,
    SCALE_RANGE,
    Fitted,
    LocalUpdate,
    Provenance,
    Section,
    Sections,
)
from simulator.workload import DTYPES, STACKS

SCHEMA_VERSION = 1

QUANTITIES: Mapping[str, tuple[str, QuantityField]] = MappingProxyType(
    {
        "boost_clock": ("boost_clock_hz", QuantityField("Hz", 1e7, 1e11)),
        "max_clock": ("max_clock_hz", QuantityField("Hz", 1e7, 1e11)),
        "memory": ("memory_bytes", QuantityField("B", 1e6, 1e15)),
        "bandwidth": ("bandwidth_bytes_per_s", QuantityField("B/s", 1e8, 1e15)),
        "l2_cache": ("l2_bytes", QuantityField("B", 1e3, 1e12)),
        "power": ("power_w", QuantityField("W", 0.1, 1e5)),
    }
)
"""Key of the file -> attribute of the profile, and unit with a range that is wide enough to catch only wrong units."""

RATE = QuantityField("FLOP/s", 1e8, 1e18)
"""Arithmetic rate of a number format, with a range as wide."""

Fetch = Callable[[Path, str, str, tuple[str, ...]], Mapping[str, Any]]
"""Function that reads arrays from a file with a digest, by prefix and names; it raises ValueError."""

NAME = TextField((), "[a-z0-9][a-z0-9_.-]{0,63}", "a name of lower-case letters, digits, _ - and ., at most 64")
_ALIAS = TextField((), "[A-Za-z0-9][A-Za-z0-9 _.-]{0,63}", "letters, digits, blanks, _ - and .")
_SHORT = re.compile("[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_SUMS = TextField(("fp16", "bf16", "fp32", "fp64", "int32"))
_FILE = TextField((), FILE_NAME.pattern, "the name of an .npz file next to the profile, without folders")
_SHA256 = TextField((), "[0-9a-f]{64}", "64 lower-case hexadecimal digits")
_NAMES = ListField(TextField((), ARRAY_NAME.pattern, "an array name of letters, digits and _"))
_ARRAYS = ObjectField({"file": _FILE, "sha256": _SHA256, "names": _NAMES})
_FACTOR = TextField((), "[a-z0-9_]+( [a-z0-9_]+){0,5}", "words of lower-case letters, digits and _")
_VERSION = NumberField(SCHEMA_VERSION, SCHEMA_VERSION, str(SCHEMA_VERSION))
_CONSTANT = {
    "std_error": NumberField(0, MOST_STD_ERROR, "0.01"),
    "status": TextField(("fitted", "fixed", "inherited", "default")),
}


def plain_name(name: str) -> str:
    """Return a name as it is compared: in lower case, with underscores instead of blanks and dashes.

    >>> plain_name("RTX 4090")
    'rtx_4090'
    """
    return re.sub(r"[\s_-]+", "_", name.strip().lower())


def profile_from_text(
    text: str, path: Path, problems: Problems, fetch: Fetch, taken: Mapping[str, str] = MappingProxyType({})
) -> HardwareProfile | None:
    """Return the profile of a YAML text, or None with problems.

    ``fetch`` reads the arrays of a section; ``taken`` maps plain names that other profiles have to these profiles.
    """
    root = _root(text, problems)
    if root is None:
        return None
    if "stack" in root.entries:
        name = _at(root, "hardware").text or "NAME"
        reason = f"expected a profile, got the sections of one stack; load {name}@STACK"
        problems.add(root.entries["stack"][0], "stack", reason)
        return None
    top = _profile_field(root, path, fetch).read(root, "", problems)
    _check_across(root, top, taken, problems)
    return None if len(problems) else _profile(top, path)


def stack_from_text(
    text: str, path: Path, problems: Problems, fetch: Fetch, profile: HardwareProfile, stack: str
) -> Sections | None:
    """Return the sections of a stack file's text, or None with problems; ``profile`` has the rates of their formats."""
    root = _root(text, problems)
    if root is None:
        return None
    top: dict[str, FieldType] = {
        "schema_version": _VERSION,
        "hardware": TextField((profile.name,)),
        "stack": TextField((stack,)),
        "calibrated": _calibrated(tuple(profile.rates), path, fetch),
    }
    read = ObjectField(top).read(root, "", problems)
    return None if len(problems) else _sections(read, stack)


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
        problems.add(root, "file", f"expected a mapping {start}, got {shown(root)}")
        return None
    version = _at(root, "schema_version")
    if "schema_version" in root.entries and (version.quoted or version.text != str(SCHEMA_VERSION)):
        # the only problem reported: another version may have other keys
        reason = f"expected {SCHEMA_VERSION}, got {shown(version)}; this prunesim reads no other version"
        problems.add(version, "schema_version", reason)
        return None
    return root


def _at(node: Node, *keys: str) -> Node:
    """Return the node at a path of keys, or an empty node."""
    for key in keys:
        node = node.entries[key][1] if key in node.entries else Node("scalar", 1, 1)
    return node


def _profile_field(root: Node, path: Path, fetch: Fetch) -> ObjectField:
    """Return the schema of a profile: facts name sources of the file, fits have number formats with a rate."""
    references = tuple(_at(root, "sources").entries)
    rates = tuple(dtype for dtype in _at(root, "datasheet", "rates").entries if dtype in DTYPES)

    def listed(short: str) -> str:
        if short in references:
            return short
        hint = did_you_mean(short, references, 0.3) or "add it there with the title and address of a datasheet"
        raise ValueError(f"{short!r} is not listed under sources; {hint}")

    def fact(value: FieldType, **more: FieldType) -> ObjectField:
        required = {"value": value, **more, "source": CheckedField(TextField(), listed)}
        return ObjectField(required, {"note": TextField()}, expected="{value: ..., source: ...}")

    quantities = {key: fact(quantity) for key, (_, quantity) in QUANTITIES.items()}
    max_clock = quantities.pop("max_clock")
    rate = fact(RATE, accumulate=_SUMS, sparse_factor=NumberField(1, 4, "2"))
    speed: dict[str, FieldType] = {
        "bandwidth": fact(QuantityField("B/s", 1e6, 1e14)),
        "latency": fact(QuantityField("s", 1e-9, 1.0)),
    }
    link: dict[str, FieldType] = {"kind": TextField(), "max_devices": NumberField(1, 100_000, "8", whole=True), **speed}
    bridge: dict[str, FieldType] = {"kind": TextField(), **speed}
    connection = fact(TextField(tuple(name for name in CONNECTIONS if name != "bridge")))
    facts: dict[str, FieldType] = {
        "sm_count": fact(NumberField(1, 100_000, "132", whole=True)),
        **quantities,
        "rates": MapField(rate, _wrong_dtype),
    }
    required: dict[str, FieldType] = {
        "schema_version": _VERSION,
        "name": NAME,
        "title": TextField(),
        "vendor": TextField(),
        "architecture": TextField(ARCHITECTURES),
        "sources": MapField(TextField()),
        "datasheet": ObjectField(
            facts,
            {
                "max_clock": max_clock,
                "link": ObjectField(link, {"connection": connection}),
                "bridge": ObjectField(bridge),
            },
        ),
    }
    optional: dict[str, FieldType] = {
        "aliases": ListField(_ALIAS),
        "stacks_of": NAME,
        "own_stack": TextField(STACKS),
        "calibrated": _calibrated(rates, path, fetch),
        "local_update": _local_update(path, fetch),
        "anchor": _Retired(),
    }
    return ObjectField(required, optional)


def _calibrated(rates: tuple[str, ...], path: Path, fetch: Fetch) -> ObjectField:
    """Return the schema of sections by operator and number format, for a device with ``rates``."""
    labels = formats.labels(rates)
    optional: dict[str, FieldType] = {
        "status": TextField(("calibrated", "inherited")),
        "stack": TextField(STACKS),
        "arrays": _Arrays(path, fetch),
        "section_scale": NumberField(*SCALE_RANGE, "1.2"),
        "accuracy": MapField(NumberField(*ACCURACY_RANGE, "0.042")),
        "spread": _Retired(),
    }

    def fitted(operator: str) -> MapField:
        known = ("*",) if operator in ANY_DTYPE else labels
        reason = f"unknown dtype; expected one this device has a rate for: {', '.join(known)}"
        required = {"provenance": field_of(Provenance), "constants": _constants(operator)}
        return MapField(ObjectField(required, optional, _section), lambda dtype: "" if dtype in known else reason)

    return ObjectField({}, {operator: fitted(operator) for operator in CONSTANTS})


def _section(*, status: str = "calibrated", **read: Any) -> Section:
    return Section(status=status, **read)


def _local_update(path: Path, fetch: Fetch) -> ObjectField:
    required: dict[str, FieldType] = {
        "provenance": field_of(Provenance),
        "factors": ListField(_FACTOR),
        "arrays": _Arrays(path, fetch),
    }
    return ObjectField(required, make=_checked_update)


def _checked_update(provenance: Provenance, factors: tuple[str, ...], arrays: Mapping[str, Any]) -> LocalUpdate:
    systematic = arrays.get("systematic")
    if systematic is not None and systematic.shape[1] != len(factors):
        expected = f"expected {systematic.shape[1]} names, one per column of the array systematic"
        raise InputError(f"factors: {expected}, got {len(factors)}")
    return LocalUpdate(provenance, factors, arrays)


def _wrong_dtype(dtype: str) -> str:
    if dtype in DTYPES:
        return ""
    return "unknown dtype; " + (did_you_mean(dtype[:40].lower(), DTYPES) or f"known are {', '.join(DTYPES)}")


@lru_cache
def _constants(operator: str) -> ObjectField:
    fields = {
        name: ObjectField({"value": NumberField(constant.low, constant.high, "0.81")}, _CONSTANT, Fitted)
        for name, constant in CONSTANTS[operator].items()
    }
    return ObjectField({}, fields, lambda **read: MappingProxyType(read))


class _Retired:
    """A key of an older version, whose values this version does not use."""

    def read(self, node: Node, key: str, problems: Problems) -> None:
        reason = "is a key of an older version; make the file again with prunesim calibrate or prunesim fit"
        problems.add(node, key, reason)


@dataclass(frozen=True)
class _Arrays:
    """Arrays of the section at this key, fetched from the file that the section names."""

    path: Path
    fetch: Fetch

    def read(self, node: Node, key: str, problems: Problems) -> Mapping[str, Any] | None:
        entry = _ARRAYS.read(node, key, problems)
        names = entry.get("names", ())
        if not entry.get("file") or not entry.get("sha256") or None in names:
            return None
        section = key.removeprefix("calibrated.").removesuffix(".arrays")
        try:
            return self.fetch(self.path.parent / entry["file"], entry["sha256"], section, names)
        except ValueError as error:
            problems.add(_at(node, "file"), f"{key}.file", str(error))
            return None


def _check_across(root: Node, top: Mapping[str, Any], taken: Mapping[str, str], problems: Problems) -> None:
    """Check what several keys must satisfy together."""
    for short, (key_node, _) in _at(root, "sources").entries.items():
        if not _SHORT.fullmatch(short):
            right = "a short name of letters, digits, _ - and . as key"
            problems.add(key_node, "sources", f"expected {right}, got {shown(key_node)}")
    facts = top.get("datasheet", {})
    boost, highest = (facts.get(key, {}).get("value") for key in ("boost_clock", "max_clock"))
    if boost and highest and highest < boost:
        reason = "is below boost_clock; expected the highest clock the driver allows"
        problems.add(_at(root, "datasheet", "max_clock"), "datasheet.max_clock", reason)
    rates = _at(root, "datasheet", "rates")
    if rates.kind == "mapping" and not rates.entries:
        problems.add(rates, "datasheet.rates", f"expected the rate of at least one dtype of {', '.join(DTYPES)}")
    name = top.get("name") or ""
    own = {plain_name(name)}
    for i, alias in enumerate(top.get("aliases", ())):
        if alias is None:
            continue
        plain = plain_name(alias)
        owner = taken.get(plain, name)
        if plain not in own and owner == name:
            own.add(plain)
            continue
        reason = f"already means {owner}; use another"
        if plain in own:
            reason = "is given twice, or is the name itself; remove it"
        problems.add(_at(root, "aliases").items[i], f"aliases.{i}", f"{alias!r} {reason}")


def _profile(top: Mapping[str, Any], path: Path) -> HardwareProfile:
    facts, references, link = top["datasheet"], top["sources"], top["datasheet"].get("link")
    entries = {key: facts[key] for key in ("sm_count", *QUANTITIES) if key in facts}
    values = {QUANTITIES[key][0]: entry["value"] for key, entry in entries.items() if key in QUANTITIES}
    values.setdefault("max_clock_hz", values["boost_clock_hz"])
    rates = {
        dtype: Rate(rate["value"], rate["accumulate"], rate["sparse_factor"]) for dtype, rate in facts["rates"].items()
    }
    entries |= {f"rates.{dtype}": entry for dtype, entry in facts["rates"].items()}
    bridge = facts.get("bridge")
    for name, given in (("link", link), ("bridge", bridge)):
        entries |= {
            f"{name}.{key}": given[key] for key in ("bandwidth", "latency", "connection") if given and key in given
        }
    if bridge:
        bridge = Link(bridge["kind"], bridge["bandwidth"]["value"], bridge["latency"]["value"], 2, "bridge")
    if link:
        connection = link["connection"]["value"] if "connection" in link else ""
        speed = link["bandwidth"]["value"], link["latency"]["value"]
        link = Link(link["kind"], *speed, link["max_devices"], connection)
    profile = HardwareProfile(
        name=top["name"],
        title=top["title"],
        vendor=top["vendor"],
        architecture=top["architecture"],
        aliases=top.get("aliases", ()),
        rates=MappingProxyType(rates),
        sm_count=facts["sm_count"]["value"],
        **values,
        link=link,
        bridge=bridge,
        sources=MappingProxyType({key: references[entry["source"]] for key, entry in entries.items()}),
        notes=MappingProxyType({key: entry["note"] for key, entry in entries.items() if "note" in entry}),
        references=references,
        stacks_of=top.get("stacks_of", ""),
        local_update=top.get("local_update"),
        path=path,
    )
    sections = _sections(top)
    own_stack = top.get("own_stack", "")
    own = not own_stack and any(not section.stack for section in sections.values())
    return replace(profile.calibrated(sections, own_stack), same_stack=own) if sections else profile


def _sections(top: Mapping[str, Any], stack: str = "") -> Sections:
    """Return sections by operator and number format, marked with the stack of their file."""
    found = {}
    for operator, by_dtype in top.get("calibrated", {}).items():
        found.update({(operator, dtype): replace(s, stack=stack or s.stack) for dtype, s in by_dtype.items()})
    return MappingProxyType(found)
