"""The schema of a hardware profile: a tree of positioned nodes to a :class:`HardwareProfile`, or to everything that is wrong with it.

Every check says key, what came and what would be right. Checks go on after a problem, so that one run reports all of them. Saving is
in ``profile_save``, reading the arrays in ``profile_arrays``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from simulator.files.fields import Fields, join, shown
from simulator.files.yaml import Node, Problems, parse_yaml, read_text
from simulator.hardware.arrays import ARRAY_NAME, FILE_NAME, read_arrays
from simulator.hardware.checks import check_arrays
from simulator.hardware.names import plain_name, profiles_folder, shipped_names
from simulator.hardware.parts import Fitted, Interval, Link, Provenance, Rate, Section
from simulator.hardware.profile import ARCHITECTURES, OPERATORS, HardwareProfile, constants_of

SCHEMA_VERSION = 1

# key of the file -> attribute of the profile, SI unit, plausible range: wide, to catch a slip of the unit and nothing else
QUANTITIES: Mapping[str, tuple[str, str, float, float]] = MappingProxyType(
    {
        "boost_clock": ("boost_clock_hz", "Hz", 1e7, 1e11),
        "max_clock": ("max_clock_hz", "Hz", 1e7, 1e11),
        "memory": ("memory_bytes", "B", 1e6, 1e15),
        "bandwidth": ("bandwidth_bytes_per_s", "B/s", 1e8, 1e15),
        "l2_cache": ("l2_bytes", "B", 1e3, 1e12),
        "power": ("power_w", "W", 0.1, 1e5),
    }
)
DTYPES = ("fp32", "tf32", "fp16", "bf16", "fp8", "int8", "int4")  # those of simulator.workload, which is a layer above
ACCUMULATE = ("fp16", "bf16", "fp32", "fp64", "int32")
STATUSES = ("fitted", "fixed", "borrowed", "default")
SECTION_STATUSES = ("calibrated", "borrowed")
_TOP = ("schema_version", "name", "title", "vendor", "architecture", "sources", "datasheet")
_FACTS = ("sm_count", *(key for key in QUANTITIES if key != "max_clock"), "rates")
_PROVENANCE = ("source", "digest", "date", "software", "device", "protocol")

_SHORT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")


def read_profile(path: Path) -> tuple[HardwareProfile | None, Problems]:
    """A profile file to a profile (None if anything is wrong) and its problems."""
    problems = Problems(str(path))
    text = read_text(path, problems)
    if text is None:
        return None, problems
    return profile_from_text(text, path, problems, _read_checked), problems


def _read_checked(path: Path, sha256: str, prefix: str, names: tuple[str, ...]) -> Mapping[str, Any]:
    """A section's arrays, refused where its cost model could not use them."""
    arrays = read_arrays(path, sha256, prefix, names)
    check_arrays(prefix.split(".")[0], arrays)
    return arrays


def profile_from_text(
    text: str, path: Path, problems: Problems, arrays: Callable[..., Mapping[str, Any]]
) -> HardwareProfile | None:
    """A profile's text to a profile; ``arrays`` fetches a section's arrays (see :func:`simulator.hardware.arrays.read_arrays`)."""
    root = parse_yaml(text, problems)
    if root is None or len(problems):
        if root is None and not len(problems):
            problems.add(
                None, "file", f"is empty; expected a profile that starts with schema_version: {SCHEMA_VERSION}"
            )
        return None
    reader = _Reader(problems, path, arrays)
    profile = reader.profile(root)
    return None if len(problems) else profile


class _Reader(Fields):
    """Reads nodes into values; notes a problem and returns a stand-in where it cannot."""

    def __init__(self, problems: Problems, path: Path, arrays: Callable[..., Mapping[str, Any]]) -> None:
        super().__init__(problems)
        self.path = path
        self.arrays = arrays
        self.references: dict[str, str] = {}
        self.sources: dict[str, str] = {}
        self.notes: dict[str, str] = {}

    def fact(self, node: Node | None, key: str, required: Iterable[str] = ("value",)) -> dict[str, Node]:
        """A datasheet entry: its own keys, a source that is listed under ``sources``, perhaps a note."""
        if node is None:
            return {}
        if node.kind != "mapping":
            self.problems.add(node, key, f"expected {{value: ..., source: ...}}, got {shown(node)}")
            return {}
        entry = self.mapping(node, key, (*required, "source"), ("note",))
        short = self.text(entry.get("source"), join(key, "source"))
        if short and short not in self.references:
            close = difflib.get_close_matches(short, self.references, n=1, cutoff=0.3)
            hint = f"did you mean {close[0]}?" if close else "add it there with the title and address of a datasheet"
            self.problems.add(entry["source"], join(key, "source"), f"{short!r} is not listed under sources; {hint}")
        elif short:
            self.sources[key.removeprefix("datasheet.")] = self.references[short]
        if "note" in entry:
            self.notes[key.removeprefix("datasheet.")] = self.text(entry["note"], join(key, "note"))
        return entry

    # -- the profile ----------------------------------------------------------------------------------------------------------

    def profile(self, root: Node) -> HardwareProfile | None:
        if root.kind != "mapping":
            self.problems.add(
                root, "file", f"expected a mapping that starts with schema_version: {SCHEMA_VERSION}, got {shown(root)}"
            )
            return None
        entries = root.entries
        if "schema_version" in entries:  # first and alone: another version may have other keys
            node = entries["schema_version"][1]
            if node.kind != "scalar" or node.quoted or node.text != str(SCHEMA_VERSION):
                self.problems.add(
                    node,
                    "schema_version",
                    f"expected {SCHEMA_VERSION}, got {shown(node)}; this prunesim reads no other version",
                )
                return None
        top = self.mapping(root, "", _TOP, ("aliases", "calibrated"))
        name = self.text(
            top.get("name"), "name", pattern=_NAME, right="a name of lower-case letters, digits, _ - and ., at most 64"
        )
        self.read_references(top.get("sources"))
        facts = self.mapping(top["datasheet"], "datasheet", _FACTS, ("max_clock", "link")) if "datasheet" in top else {}
        values: dict[str, Any] = {}
        entry = self.fact(facts.get("sm_count"), "datasheet.sm_count")
        sms = self.number(entry.get("value"), "datasheet.sm_count.value", 1, 100_000, "132", whole=True)
        for key, (attribute, unit, low, high) in QUANTITIES.items():
            path = f"datasheet.{key}"
            values[attribute] = self.quantity(
                self.fact(facts.get(key), path).get("value"), f"{path}.value", unit, low, high
            )
        if "max_clock" not in facts:
            values["max_clock_hz"] = values["boost_clock_hz"]
        elif values["max_clock_hz"] < values["boost_clock_hz"]:
            self.problems.add(
                facts["max_clock"],
                "datasheet.max_clock",
                "is below boost_clock; expected the highest clock the driver allows",
            )
        rates = self.rates(facts.get("rates"))
        link = self.link(facts.get("link"))
        architecture = self.text(top.get("architecture"), "architecture", choices=ARCHITECTURES)
        aliases = self.aliases(top.get("aliases"), name)
        title, vendor = self.text(top.get("title"), "title"), self.text(top.get("vendor"), "vendor")
        sections = self.sections(top.get("calibrated"), rates)
        if len(self.problems):
            return None
        frozen: list[Mapping[str, Any]] = [
            MappingProxyType(d) for d in (self.sources, self.notes, self.references, rates)
        ]
        return HardwareProfile(
            name=name,
            title=title,
            vendor=vendor,
            architecture=architecture,
            aliases=aliases,
            rates=frozen[3],
            sm_count=int(sms),
            link=link,
            sources=frozen[0],
            notes=frozen[1],
            references=frozen[2],
            sections=MappingProxyType(sections),
            path=self.path,
            **values,
        )

    def read_references(self, node: Node | None) -> None:
        entries = self.any_mapping(node, "sources") if node is not None else None
        for short, (key_node, value) in (entries or {}).items():
            if not _SHORT.fullmatch(short):
                self.problems.add(
                    key_node,
                    "sources",
                    f"expected a short name of letters, digits, _ - and . as key, got {shown(key_node)}",
                )
            self.references[short] = self.text(value, join("sources", short))

    def aliases(self, node: Node | None, name: str) -> tuple[str, ...]:
        found: dict[str, str] = {}
        for i, item in enumerate(self.listed(node, "aliases")):
            alias = self.text(
                item,
                f"aliases.{i}",
                pattern=re.compile(r"[A-Za-z0-9][A-Za-z0-9 _.-]{0,63}"),
                right="letters, digits, blanks, _ - and .",
            )
            owner = shipped_names().get(plain_name(alias), name)
            if plain_name(alias) in (plain_name(name), *map(plain_name, found)):
                self.problems.add(item, f"aliases.{i}", f"{alias!r} is given twice, or is the name itself; remove it")
            elif owner != name and not self._is_shipped():
                self.problems.add(item, f"aliases.{i}", f"{alias!r} already means {owner}; use another")
            elif alias:
                found[alias] = alias
        return tuple(found)

    def _is_shipped(self) -> bool:
        """Among the shipped files, clashes are found by :func:`shipped_names`, which reads them all."""
        return self.path.parent.absolute() == profiles_folder().absolute()

    def rates(self, node: Node | None) -> dict[str, Rate]:
        entries = self.any_mapping(node, "datasheet.rates") if node is not None else None
        found: dict[str, Rate] = {}
        for dtype, (key_node, value) in (entries or {}).items():
            path = join("datasheet.rates", dtype)
            if dtype not in DTYPES:
                close = difflib.get_close_matches(dtype[:40].lower(), DTYPES, n=1, cutoff=0.5)
                hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(DTYPES)}"
                self.problems.add(key_node, path, f"unknown dtype; {hint}")
                continue
            entry = self.fact(value, path, ("value", "accumulate", "sparse_factor"))
            found[dtype] = Rate(
                self.quantity(entry.get("value"), f"{path}.value", "FLOP/s", 1e8, 1e18),
                self.text(entry.get("accumulate"), f"{path}.accumulate", choices=ACCUMULATE),
                self.number(entry.get("sparse_factor"), f"{path}.sparse_factor", 1, 4, "2"),
            )
        if entries is not None and not entries:
            self.problems.add(
                node, "datasheet.rates", f"expected the rate of at least one dtype of {', '.join(DTYPES)}"
            )
        return found

    def link(self, node: Node | None) -> Link | None:
        if node is None:
            return None
        entry = self.mapping(node, "datasheet.link", ("kind", "max_devices", "bandwidth", "latency"))
        bandwidth = self.fact(entry.get("bandwidth"), "datasheet.link.bandwidth")
        latency = self.fact(entry.get("latency"), "datasheet.link.latency")
        devices = self.number(entry.get("max_devices"), "datasheet.link.max_devices", 1, 100_000, "8", whole=True)
        return Link(
            self.text(entry.get("kind"), "datasheet.link.kind"),
            self.quantity(bandwidth.get("value"), "datasheet.link.bandwidth.value", "B/s", 1e6, 1e14),
            self.quantity(latency.get("value"), "datasheet.link.latency.value", "s", 1e-9, 1.0),
            int(devices) if devices == devices else 0,
        )

    # -- fitted sections ------------------------------------------------------------------------------------------------------

    def sections(self, node: Node | None, rates: Mapping[str, Rate]) -> dict[tuple[str, str], Section]:
        found: dict[tuple[str, str], Section] = {}
        if node is None:
            return found
        for operator, by_dtype in self.mapping(node, "calibrated", (), OPERATORS).items():
            path = f"calibrated.{operator}"
            for dtype, (key_node, value) in (self.any_mapping(by_dtype, path) or {}).items():
                known = ("*",) if operator == "runtime" else tuple(rates)
                if dtype not in known:
                    self.problems.add(
                        key_node,
                        join(path, dtype),
                        f"unknown dtype; expected one this device has a rate for: {', '.join(known)}",
                    )
                    continue
                found[operator, dtype] = self.section(value, operator, f"{path}.{dtype}")
        return found

    def section(self, node: Node, operator: str, path: str) -> Section:
        entry = self.mapping(node, path, ("provenance", "constants"), ("status", "arrays", "intervals", "accuracy"))
        status = (
            self.text(entry["status"], f"{path}.status", choices=SECTION_STATUSES)
            if "status" in entry
            else "calibrated"
        )
        arrays: Mapping[str, Any] = {}
        if "arrays" in entry:
            arrays = self.section_arrays(entry["arrays"], f"{path}.arrays", path.removeprefix("calibrated."))
        intervals = [
            self.interval(item, f"{path}.intervals.{i}")
            for i, item in enumerate(self.listed(entry.get("intervals"), f"{path}.intervals"))
        ]
        accuracy = {}
        if "accuracy" in entry:
            for name, (_, value) in (self.any_mapping(entry["accuracy"], f"{path}.accuracy") or {}).items():
                accuracy[name] = self.number(value, join(f"{path}.accuracy", name), -1e9, 1e9, "0.042")
        return Section(
            MappingProxyType(self.constants(entry.get("constants"), operator, f"{path}.constants")),
            MappingProxyType(dict(arrays)),
            tuple(intervals),
            MappingProxyType(accuracy),
            self.provenance(entry.get("provenance"), f"{path}.provenance"),
            status,
        )

    def constants(self, node: Node | None, operator: str, path: str) -> dict[str, Fitted]:
        if node is None:
            return {}
        registry = constants_of(operator)
        found = {}
        for name, value in self.mapping(node, path, (), registry).items():
            entry = self.mapping(value, f"{path}.{name}", ("value",), ("std_error", "status"))
            known = registry[name]
            number = self.number(entry.get("value"), f"{path}.{name}.value", known.low, known.high, "0.81")
            error = (
                self.number(entry["std_error"], f"{path}.{name}.std_error", 0, 1e30, "0.01")
                if "std_error" in entry
                else None
            )
            status = (
                self.text(entry["status"], f"{path}.{name}.status", choices=STATUSES) if "status" in entry else "fitted"
            )
            found[name] = Fitted(number, error, status)
        return found

    def interval(self, node: Node, path: str) -> Interval:
        entry = self.mapping(node, path, ("regime", "low", "high", "level", "rows"))
        low = self.number(entry.get("low"), f"{path}.low", 1e-6, 1.0, "0.93")
        high = self.number(entry.get("high"), f"{path}.high", 1.0, 1e6, "1.08")
        level = self.number(entry.get("level"), f"{path}.level", 0.01, 0.9999, "0.9")
        rows = self.number(entry.get("rows"), f"{path}.rows", 0, 1e12, "400", whole=True)
        return Interval(
            self.text(entry.get("regime"), f"{path}.regime"), low, high, level, int(rows) if rows == rows else 0
        )

    def provenance(self, node: Node | None, path: str) -> Provenance | None:
        if node is None:
            return None
        entry = self.mapping(node, path, (*_PROVENANCE, "rows"), ("borrowed_from",))
        texts = {name: self.text(entry.get(name), f"{path}.{name}") for name in _PROVENANCE}
        rows = self.number(entry.get("rows"), f"{path}.rows", 0, 1e12, "400", whole=True)
        origin = self.text(entry["borrowed_from"], f"{path}.borrowed_from") if "borrowed_from" in entry else ""
        return Provenance(**texts, rows=int(rows) if rows == rows else 0, borrowed_from=origin)

    def section_arrays(self, node: Node, path: str, prefix: str) -> Mapping[str, Any]:
        entry = self.mapping(node, path, ("file", "sha256", "names"))
        file = self.text(
            entry.get("file"),
            f"{path}.file",
            pattern=FILE_NAME,
            right="the name of an .npz file beside the profile, without folders",
        )
        digest = self.text(
            entry.get("sha256"),
            f"{path}.sha256",
            pattern=re.compile(r"[0-9a-f]{64}"),
            right="64 lower-case hexadecimal digits",
        )
        nodes = self.listed(entry.get("names"), f"{path}.names")
        names = [
            self.text(item, f"{path}.names.{i}", pattern=ARRAY_NAME, right="an array name of letters, digits and _")
            for i, item in enumerate(nodes)
        ]
        if not (file and digest and all(names)):
            return {}
        try:
            return self.arrays(self.path.parent / file, digest, prefix, tuple(names))
        except ValueError as error:
            self.problems.add(entry["file"], f"{path}.file", str(error))
            return {}
