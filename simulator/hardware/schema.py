"""The schema of a hardware profile: its YAML to a :class:`HardwareProfile`, or to everything that is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from simulator.files.fields import Checked, Keys, Kind, Many, Number, Quantity, Table, Text, did_you_mean, record, shown
from simulator.files.yaml import Node, Problems, parse_yaml, read_text
from simulator.hardware.arrays import ARRAY_NAME, FILE_NAME, read_arrays
from simulator.hardware.checks import check_arrays
from simulator.hardware.names import plain_name, profiles_folder, shipped_names
from simulator.hardware.parts import Fitted, Interval, Link, Provenance, Rate, Section
from simulator.hardware.profile import ARCHITECTURES, OPERATORS, HardwareProfile, constants_of
from simulator.workload import DTYPES

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
"""Gets a section's arrays, as :func:`simulator.hardware.arrays.read_arrays` does."""

_NAME = Text((), "[a-z0-9][a-z0-9_.-]{0,63}", "a name of lower-case letters, digits, _ - and ., at most 64")
_ALIAS = Text((), "[A-Za-z0-9][A-Za-z0-9 _.-]{0,63}", "letters, digits, blanks, _ - and .")
_SHORT = re.compile("[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_RATE: Mapping[str, Kind] = MappingProxyType(
    {
        "value": Quantity("FLOP/s", 1e8, 1e18),
        "accumulate": Text(("fp16", "bf16", "fp32", "fp64", "int32")),
        "sparse_factor": Number(1, 4, "2"),
    }
)
_ARRAYS = Keys(
    {
        "file": Text((), FILE_NAME.pattern, "the name of an .npz file beside the profile, without folders"),
        "sha256": Text((), "[0-9a-f]{64}", "64 lower-case hexadecimal digits"),
        "names": Many(Text((), ARRAY_NAME.pattern, "an array name of letters, digits and _")),
    }
)


def read_profile(path: Path) -> tuple[HardwareProfile | None, Problems]:
    """A profile file to a profile (None if anything is wrong) and its problems."""
    problems = Problems(str(path))
    text = read_text(path, problems)
    return None if text is None else profile_from_text(text, path, problems, _read_checked), problems


def _read_checked(path: Path, sha256: str, prefix: str, names: tuple[str, ...]) -> Mapping[str, Any]:
    arrays = read_arrays(path, sha256, prefix, names)
    check_arrays(prefix.split(".")[0], arrays)
    return arrays


def profile_from_text(text: str, path: Path, problems: Problems, fetch: Fetch) -> HardwareProfile | None:
    """A profile's text to a profile; ``fetch`` gets a section's arrays."""
    root = parse_yaml(text, problems)
    start = f"that starts with schema_version: {SCHEMA_VERSION}"
    if len(problems):
        return None
    if root is None:
        problems.add(None, "file", f"is empty; expected a profile {start}")
    elif root.kind != "mapping":
        problems.add(root, "file", f"expected a mapping {start}, got {shown(root)}")
    elif "schema_version" in root.entries and not _is_version(root.entries["schema_version"][1]):
        node = root.entries["schema_version"][1]  # said alone: another version may have other keys
        reason = f"expected {SCHEMA_VERSION}, got {shown(node)}; this prunesim reads no other version"
        problems.add(node, "schema_version", reason)
    else:
        top = _kinds(root, path, fetch).read(root, "", problems)
        _check_across(root, top, path, problems)
        return None if len(problems) else _profile(top, path)
    return None


def _is_version(node: Node) -> bool:
    return node.kind == "scalar" and not node.quoted and node.text == str(SCHEMA_VERSION)


# -- what each key must hold ------------------------------------------------------------------------------------------


def _kinds(root: Node, path: Path, fetch: Fetch) -> Keys:
    """What a file must hold: facts from the sources it lists, fits for the dtypes it has rates of."""
    references = _keys_at(root, "sources")
    rates = tuple(dtype for dtype in _keys_at(root, "datasheet", "rates") if dtype in DTYPES)

    def listed(short: str) -> str:
        if short in references:
            return short
        hint = did_you_mean(short, references, 0.3) or "add it there with the title and address of a datasheet"
        raise ValueError(f"{short!r} is not listed under sources; {hint}")

    def fact(kinds: Mapping[str, Kind]) -> Keys:
        source = {"source": Checked(Text(), listed)}
        return Keys({**kinds, **source}, {"note": Text()}, expected="{value: ..., source: ...}")

    def fitted(operator: str) -> Table:
        known = ("*",) if operator == "runtime" else rates
        reason = f"unknown dtype; expected one this device has a rate for: {', '.join(known)}"
        required: dict[str, Kind] = {"provenance": record(Provenance), "constants": _constants(operator)}
        optional: dict[str, Kind] = {
            "status": Text(("calibrated", "borrowed")),
            "arrays": _Arrays(path, fetch),
            "intervals": Many(record(Interval)),
            "accuracy": Table(Number(-1e9, 1e9, "0.042")),
        }
        return Table(Keys(required, optional, _section), lambda dtype: "" if dtype in known else reason)

    quantities = {key: fact({"value": quantity}) for key, (_, quantity) in QUANTITIES.items()}
    max_clock = quantities.pop("max_clock")
    link: dict[str, Kind] = {
        "kind": Text(),
        "max_devices": Number(1, 100_000, "8", whole=True),
        "bandwidth": fact({"value": Quantity("B/s", 1e6, 1e14)}),
        "latency": fact({"value": Quantity("s", 1e-9, 1.0)}),
    }
    facts: dict[str, Kind] = {
        "sm_count": fact({"value": Number(1, 100_000, "132", whole=True)}),
        **quantities,
        "rates": Table(fact(_RATE), _wrong_dtype),
    }
    top: dict[str, Kind] = {
        "schema_version": Number(SCHEMA_VERSION, SCHEMA_VERSION, str(SCHEMA_VERSION)),
        "name": _NAME,
        "title": Text(),
        "vendor": Text(),
        "architecture": Text(ARCHITECTURES),
        "sources": Table(Text()),
        "datasheet": Keys(facts, {"max_clock": max_clock, "link": Keys(link)}),
    }
    calibrated = Keys({}, {operator: fitted(operator) for operator in OPERATORS})
    return Keys(top, {"aliases": Many(_ALIAS), "calibrated": calibrated})


def _keys_at(node: Node, *path: str) -> tuple[str, ...]:
    for key in path:
        if key not in node.entries:
            return ()
        node = node.entries[key][1]
    return tuple(node.entries)


def _wrong_dtype(dtype: str) -> str:
    if dtype in DTYPES:
        return ""
    return "unknown dtype; " + (did_you_mean(dtype[:40].lower(), DTYPES) or f"known are {', '.join(DTYPES)}")


@lru_cache
def _constants(operator: str) -> Keys:
    optional: dict[str, Kind] = {
        "std_error": Number(0, 1e30, "0.01"),
        "status": Text(("fitted", "fixed", "borrowed", "default")),
    }
    values = {name: Number(c.low, c.high, "0.81") for name, c in constants_of(operator).items()}
    return Keys({}, {name: Keys({"value": value}, optional, Fitted) for name, value in values.items()})


def _section(**parts: Any) -> Section:
    return Section(**{"status": "calibrated", **parts})


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
            problems.add(node.entries["file"][1], f"{key}.file", str(error))
            return None


# -- what keys must hold together -------------------------------------------------------------------------------------


def _check_across(root: Node, top: Mapping[str, Any], path: Path, problems: Problems) -> None:
    for short, (key_node, _) in root.entries["sources"][1].entries.items() if "sources" in top else ():
        if not _SHORT.fullmatch(short):
            right = "a short name of letters, digits, _ - and . as key"
            problems.add(key_node, "sources", f"expected {right}, got {shown(key_node)}")
    facts = top.get("datasheet", {})
    boost, highest = (facts.get(key, {}).get("value") for key in ("boost_clock", "max_clock"))
    if boost and highest and highest < boost:
        node = root.entries["datasheet"][1].entries["max_clock"][1]
        reason = "is below boost_clock; expected the highest clock the driver allows"
        problems.add(node, "datasheet.max_clock", reason)
    if "rates" in facts:
        node = root.entries["datasheet"][1].entries["rates"][1]
        if node.kind == "mapping" and not node.entries:
            problems.add(node, "datasheet.rates", f"expected the rate of at least one dtype of {', '.join(DTYPES)}")
    name = top.get("name") or ""
    own = {plain_name(name)}
    for i, alias in enumerate(top.get("aliases", ())):
        if alias is None:
            continue
        node, key, plain = root.entries["aliases"][1].items[i], f"aliases.{i}", plain_name(alias)
        owner = shipped_names().get(plain, name)
        # among the shipped files, clashes are found by shipped_names, which reads them all
        shipped = path.parent.absolute() == profiles_folder().absolute()
        if plain in own:
            problems.add(node, key, f"{alias!r} is given twice, or is the name itself; remove it")
        elif owner != name and not shipped:
            problems.add(node, key, f"{alias!r} already means {owner}; use another")
        else:
            own.add(plain)


def _profile(top: Mapping[str, Any], path: Path) -> HardwareProfile:
    facts, references = top["datasheet"], top["sources"]
    rates, link = facts["rates"], facts.get("link")
    entries = {key: facts[key] for key in ("sm_count", *QUANTITIES) if key in facts}
    values = {QUANTITIES[key][0]: entry["value"] for key, entry in entries.items() if key in QUANTITIES}
    values.setdefault("max_clock_hz", values["boost_clock_hz"])
    entries |= {f"rates.{dtype}": entry for dtype, entry in rates.items()}
    if link:
        entries |= {f"link.{key}": link[key] for key in ("bandwidth", "latency")}
    sections = {
        (operator, dtype): section
        for operator, by_dtype in top.get("calibrated", {}).items()
        for dtype, section in by_dtype.items()
    }
    return HardwareProfile(
        **{key: top[key] for key in ("name", "title", "vendor", "architecture")},
        **values,
        aliases=top.get("aliases", ()),
        rates=MappingProxyType({d: Rate(r["value"], r["accumulate"], r["sparse_factor"]) for d, r in rates.items()}),
        sm_count=facts["sm_count"]["value"],
        link=link and Link(link["kind"], link["bandwidth"]["value"], link["latency"]["value"], link["max_devices"]),
        sources=MappingProxyType({key: references[entry["source"]] for key, entry in entries.items()}),
        notes=MappingProxyType({key: entry["note"] for key, entry in entries.items() if "note" in entry}),
        references=references,
        sections=MappingProxyType(sections),
        path=path,
    )
