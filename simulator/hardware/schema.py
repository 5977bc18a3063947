"""The schema of a hardware profile and of its stack files: YAML to a :class:`HardwareProfile` or its sections, or to
everything that is wrong with them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from simulator.errors import InputError
from simulator.files.fields import Checked, Keys, Kind, Many, Number, Quantity, Table, Text, did_you_mean, record, shown
from simulator.files.yaml import Node, Problems, parse_yaml
from simulator.hardware import formats
from simulator.hardware import profile as parts
from simulator.hardware.arrays import ARRAY_NAME, FILE_NAME
from simulator.hardware.constants import CONSTANTS
from simulator.hardware.profile import ANY_DTYPE, ARCHITECTURES, Anchor, HardwareProfile, Section
from simulator.workload import DTYPES, STACKS

SCHEMA_VERSION = 1

# fmt: off
QUANTITIES: Mapping[str, tuple[str, Quantity]] = MappingProxyType({
    "boost_clock": ("boost_clock_hz", Quantity("Hz", 1e7, 1e11)),
    "max_clock": ("max_clock_hz", Quantity("Hz", 1e7, 1e11)),
    "memory": ("memory_bytes", Quantity("B", 1e6, 1e15)),
    "bandwidth": ("bandwidth_bytes_per_s", Quantity("B/s", 1e8, 1e15)),
    "l2_cache": ("l2_bytes", Quantity("B", 1e3, 1e12)),
    "power": ("power_w", Quantity("W", 0.1, 1e5)),
})
# fmt: on
"""Key of the file -> attribute of the profile, unit and plausible range: wide, to catch a slip of the unit only."""

Fetch = Callable[[Path, str, str, tuple[str, ...]], Mapping[str, Any]]
"""Gets arrays from a file with a digest by their prefix and names, or raises ValueError."""

Sections = Mapping[tuple[str, str], Section]

NAME = Text((), "[a-z0-9][a-z0-9_.-]{0,63}", "a name of lower-case letters, digits, _ - and ., at most 64")
_ALIAS = Text((), "[A-Za-z0-9][A-Za-z0-9 _.-]{0,63}", "letters, digits, blanks, _ - and .")
_SHORT = re.compile("[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_SUMS = Text(("fp16", "bf16", "fp32", "fp64", "int32"))
_RATE = {"value": Quantity("FLOP/s", 1e8, 1e18), "accumulate": _SUMS, "sparse_factor": Number(1, 4, "2")}
_FILE = Text((), FILE_NAME.pattern, "the name of an .npz file beside the profile, without folders")
_SHA256 = Text((), "[0-9a-f]{64}", "64 lower-case hexadecimal digits")
_NAMES = Many(Text((), ARRAY_NAME.pattern, "an array name of letters, digits and _"))
_ARRAYS = Keys({"file": _FILE, "sha256": _SHA256, "names": _NAMES})
_COLUMN = Text((), "[a-z0-9_]+( [a-z0-9_]+){0,5}", "words of lower-case letters, digits and _")
_VERSION = Number(SCHEMA_VERSION, SCHEMA_VERSION, str(SCHEMA_VERSION))
_OF_0_1: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {"gemm": {"quant_load": 1.0, "c_l2": 4.0}, "elementwise": {"spread": 100.0}}
)
"""Highest value of constants that version 0.1 wrote by other rules: they are read, and what nothing uses is dropped.
Its ``intervals`` of a section are too: the error model is in their place."""
_FITTED = {"std_error": Number(0, 1e30, "0.01"), "status": Text(("fitted", "fixed", "borrowed", "default"))}


def plain_name(name: str) -> str:
    """A name as it is compared: lower case, with blanks and dashes as underscores.

    >>> plain_name("RTX 4090")
    'rtx_4090'
    """
    return re.sub(r"[\s_-]+", "_", name.strip().lower())


def profile_from_text(
    text: str, path: Path, problems: Problems, fetch: Fetch, taken: Mapping[str, str] = MappingProxyType({})
) -> HardwareProfile | None:
    """A profile's text to a profile; ``fetch`` gets a section's arrays, ``taken`` says who has a plain name."""
    root = _root(text, problems)
    if root is None:
        return None
    if root.kind == "mapping" and "stack" in root.entries:
        name = _at(root, "hardware").text or "NAME"
        problems.add(root.entries["stack"][0], "stack", f"this is what was fitted for one stack; ask for {name}@STACK")
        return None
    top = _kinds(root, path, fetch).read(root, "", problems)
    _check_across(root, top, taken, problems)
    return None if len(problems) else _profile(top, path)


def stack_from_text(
    text: str, path: Path, problems: Problems, fetch: Fetch, profile: HardwareProfile, stack: str
) -> Sections | None:
    """A stack file's text to its sections, for a profile that has the rates of their number formats."""
    root = _root(text, problems)
    if root is None:
        return None
    top: dict[str, Kind] = {
        "schema_version": _VERSION,
        "hardware": Text((profile.name,)),
        "stack": Text((stack,)),
        "calibrated": _calibrated(tuple(profile.rates), path, fetch),
    }
    read = Keys(top).read(root, "", problems)
    return None if len(problems) else _sections(read, stack)


def _root(text: str, problems: Problems) -> Node | None:
    """The tree of a file of this version of the schema."""
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
        # said alone: another version may have other keys
        reason = f"expected {SCHEMA_VERSION}, got {shown(version)}; this prunesim reads no other version"
        problems.add(version, "schema_version", reason)
        return None
    return root


def _at(node: Node, *keys: str) -> Node:
    """The node at some keys, an empty one where there is none."""
    for key in keys:
        node = node.entries[key][1] if key in node.entries else Node("scalar", 1, 1)
    return node


def _kinds(root: Node, path: Path, fetch: Fetch) -> Keys:
    """What a file must hold: facts from the sources it lists, fits for the dtypes it has rates of."""
    references = tuple(_at(root, "sources").entries)
    rates = tuple(dtype for dtype in _at(root, "datasheet", "rates").entries if dtype in DTYPES)

    def listed(short: str) -> str:
        if short in references:
            return short
        hint = did_you_mean(short, references, 0.3) or "add it there with the title and address of a datasheet"
        raise ValueError(f"{short!r} is not listed under sources; {hint}")

    def fact(value: Kind, **more: Kind) -> Keys:
        kinds = {"value": value, **more, "source": Checked(Text(), listed)}
        return Keys(kinds, {"note": Text()}, expected="{value: ..., source: ...}")

    quantities = {key: fact(quantity) for key, (_, quantity) in QUANTITIES.items()}
    max_clock = quantities.pop("max_clock")
    link: dict[str, Kind] = {
        "kind": Text(),
        "max_devices": Number(1, 100_000, "8", whole=True),
        "bandwidth": fact(Quantity("B/s", 1e6, 1e14)),
        "latency": fact(Quantity("s", 1e-9, 1.0)),
    }
    facts: dict[str, Kind] = {
        "sm_count": fact(Number(1, 100_000, "132", whole=True)),
        **quantities,
        "rates": Table(fact(**_RATE), _wrong_dtype),
    }
    top: dict[str, Kind] = {
        "schema_version": _VERSION,
        "name": NAME,
        "title": Text(),
        "vendor": Text(),
        "architecture": Text(ARCHITECTURES),
        "sources": Table(Text()),
        "datasheet": Keys(facts, {"max_clock": max_clock, "link": Keys(link)}),
    }
    optional: dict[str, Kind] = {
        "aliases": Many(_ALIAS),
        "stacks_of": NAME,
        "calibrated": _calibrated(rates, path, fetch),
        "anchor": _anchor(path, fetch),
    }
    return Keys(top, optional)


def _calibrated(rates: tuple[str, ...], path: Path, fetch: Fetch) -> Keys:
    """Sections by operator and number format, for a device with some rates."""
    labels = formats.labels(rates)
    optional: dict[str, Kind] = {
        "status": Text(("calibrated", "borrowed")),
        "stack": Text(STACKS),
        "arrays": _Arrays(path, fetch),
        "spread": Number(0.01, 10.0, "1.2"),
        "accuracy": Table(Number(-1e9, 1e9, "0.042")),
        "intervals": _Dropped(),
    }

    def fitted(operator: str) -> Table:
        known = ("*",) if operator in ANY_DTYPE else labels
        reason = f"unknown dtype; expected one this device has a rate for: {', '.join(known)}"
        required = {"provenance": record(parts.Provenance), "constants": _constants(operator)}
        section = Keys(required, optional, _section)
        return Table(section, lambda dtype: "" if dtype in known else reason)

    return Keys({}, {operator: fitted(operator) for operator in CONSTANTS})


def _section(*, intervals: None = None, status: str = "calibrated", **read: Any) -> Section:
    return Section(status=status, **read)


def _anchor(path: Path, fetch: Fetch) -> Keys:
    required: dict[str, Kind] = {
        "provenance": record(parts.Provenance),
        "columns": Many(_COLUMN),
        "arrays": _Arrays(path, fetch),
    }
    return Keys(required, make=_anchor_of)


def _anchor_of(columns: tuple[str, ...], arrays: Mapping[str, Any], **others: Any) -> Anchor:
    shared = arrays.get("shared")
    if shared is not None and shared.shape[1] != len(columns):
        raise InputError(f"columns: expected one name a column of the array shared, {shared.shape[1]}")
    return Anchor(columns=columns, arrays=arrays, **others)


def _wrong_dtype(dtype: str) -> str:
    if dtype in DTYPES:
        return ""
    return "unknown dtype; " + (did_you_mean(dtype[:40].lower(), DTYPES) or f"known are {', '.join(DTYPES)}")


@lru_cache
def _constants(operator: str) -> Keys:
    ranges = {name: (c.low, c.high) for name, c in CONSTANTS[operator].items()}
    ranges |= {name: (ranges.get(name, (0.0,))[0], high) for name, high in _OF_0_1.get(operator, {}).items()}
    kinds = {n: Keys({"value": Number(low, high, "0.81")}, _FITTED, parts.Fitted) for n, (low, high) in ranges.items()}
    return Keys({}, kinds, lambda **read: MappingProxyType({n: v for n, v in read.items() if n in CONSTANTS[operator]}))


class _Dropped:
    """Whatever stands at a key that an older version wrote."""

    def read(self, node: Node, key: str, problems: Problems) -> None:
        return None


@dataclass(frozen=True)
class _Arrays:
    """Arrays of the section whose key this is, fetched from the file that is named."""

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
    """What keys must hold together."""
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
        dtype: parts.Rate(rate["value"], rate["accumulate"], rate["sparse_factor"])
        for dtype, rate in facts["rates"].items()
    }
    entries |= {f"rates.{dtype}": entry for dtype, entry in facts["rates"].items()}
    if link:
        entries |= {f"link.{key}": link[key] for key in ("bandwidth", "latency")}
        link = parts.Link(link["kind"], link["bandwidth"]["value"], link["latency"]["value"], link["max_devices"])
    profile = HardwareProfile(
        **{key: top[key] for key in ("name", "title", "vendor", "architecture")},
        **values,
        aliases=top.get("aliases", ()),
        rates=MappingProxyType(rates),
        sm_count=facts["sm_count"]["value"],
        link=link,
        sources=MappingProxyType({key: references[entry["source"]] for key, entry in entries.items()}),
        notes=MappingProxyType({key: entry["note"] for key, entry in entries.items() if "note" in entry}),
        references=references,
        stacks_of=top.get("stacks_of", ""),
        anchor=top.get("anchor"),
        path=path,
    )
    sections = _sections(top)
    own = any(not section.stack for section in sections.values())
    return replace(profile.calibrated(sections), same_stack=own) if sections else profile


def _sections(top: Mapping[str, Any], stack: str = "") -> Sections:
    """Sections by operator and number format, marked with the stack of their file, if it is one's."""
    found = {}
    for operator, by_dtype in top.get("calibrated", {}).items():
        found.update({(operator, dtype): replace(s, stack=stack or s.stack) for dtype, s in by_dtype.items()})
    return MappingProxyType(found)
