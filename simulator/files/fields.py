"""One reader for every YAML file of this project: what a node must be, said as data.

A *kind* reads a node: :class:`Text`, :class:`Number`, :class:`Quantity`, :class:`Truth`, :class:`Many` (a list),
:class:`Table` (a mapping with free keys), :class:`Keys` (one with known keys) and :class:`Checked` (one of these and a
rule of its own). :func:`record` makes the kind of a frozen dataclass from its annotations::

    @dataclass(frozen=True)
    class Interval:
        regime: str
        low: Annotated[float, Number(1e-6, 1.0, "0.93")]
        rows: Annotated[int, Number(0, 1e12, "400", whole=True)] = 0

    record(Interval).read(node, "intervals.0", problems)

``str``, ``bool``, ``Literal``, other dataclasses, ``tuple[X, ...]``, ``Mapping[str, X]`` and ``X | None`` need no kind.
A field without a default must be there. What is wrong is noted with its place, what came and what would be right, and
reading goes on, so that one run reports everything. A scalar that could not be read is None; a dataclass is made only
where nothing in it was wrong; lists and mappings hold what could be read.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType, UnionType
from typing import Annotated, Any, Literal, Protocol, Union, get_args, get_origin, get_type_hints

from simulator.errors import InputError
from simulator.files.yaml import Node, Problems, join
from simulator.units import EXAMPLES, format_quantity, parse_quantity

_NUMBER = re.compile(r"[+-]?(?:0|[1-9]\d{0,20})(?:\.\d{0,40})?(?:[eE][+-]?\d{1,3})?", re.ASCII)
_TRUTHS = ("true", "false", "yes", "no", "on", "off")


class Kind(Protocol):
    """What a node must be."""

    def read(self, node: Node, key: str, problems: Problems) -> Any:
        """The value of a node, whose key is for messages."""


@dataclass(frozen=True)
class Text:
    """1 to 2000 printable characters; one of some choices, or all of a pattern, which ``right`` says in words."""

    choices: tuple[str, ...] = ()
    pattern: str = ""
    right: str = ""

    def read(self, node: Node, key: str, problems: Problems) -> str | None:
        value = node.text.strip()
        if node.kind != "scalar" or (not node.quoted and _means_another(node.text)):
            hint = "; put it in quotes" if node.kind == "scalar" and node.text else ""
            problems.add(node, key, f"expected text, got {shown(node)}{hint}")
        elif not value or not value.isprintable() or len(value) > 2000:
            problems.add(node, key, f"expected 1 to 2000 printable characters, got {shown(node)}")
        elif self.choices and value not in self.choices:
            hint = did_you_mean(value[:40].lower(), self.choices)
            hint = f"{hint} " if hint else ""
            problems.add(node, key, f"unknown value {shown(node)}; {hint}Known: {', '.join(self.choices)}")
        elif self.pattern and not re.fullmatch(self.pattern, value):
            problems.add(node, key, f"expected {self.right}, got {shown(node)}")
        else:
            return value
        return None


@dataclass(frozen=True)
class Number:
    """A plain finite number in [low, high]; an int where it must be whole."""

    low: float
    high: float
    example: str
    whole: bool = False

    def read(self, node: Node, key: str, problems: Problems) -> float | None:
        kind = "a whole number" if self.whole else "a number"
        if reason := self._problem(node):
            problems.add(node, key, f"expected {kind}, got {shown(node)}: {reason}")
            return None
        value = float(node.text)
        if not self.low <= value <= self.high:
            problems.add(node, key, f"expected {kind} from {self.low:g} to {self.high:g}, got {shown(node)}")
            return None
        return int(value) if self.whole else value

    def _problem(self, node: Node) -> str:
        if node.kind == "scalar" and node.quoted:
            return "remove the quotes"
        if re.fullmatch(r"[+-]?0\d+", node.text):
            return "a leading zero reads as octal in YAML 1.1; remove it"
        if re.fullmatch(r"[+-]?\d+(:[0-5]?\d)+", node.text):
            return "a colon reads as base 60 in YAML 1.1; write a plain number"
        if node.text.lower() in _TRUTHS:
            return f"that is a truth value; write {self.example}"
        if not _NUMBER.fullmatch(node.text) or (self.whole and not float(node.text).is_integer()):
            return f"write {self.example}"
        return ""


@dataclass(frozen=True)
class Quantity:
    """A text with a unit such as "3.35 TB/s", to SI."""

    unit: str
    low: float
    high: float

    def read(self, node: Node, key: str, problems: Problems) -> float | None:
        if node.kind != "scalar":
            right = f'a quantity with a unit such as "{EXAMPLES[self.unit]}"'
            problems.add(node, key, f"expected {right}, got a {node.kind}")
            return None
        try:
            value = parse_quantity(node.text, self.unit)
        except InputError as error:
            problems.add(node, key, str(error))
            return None
        if not self.low <= value <= self.high:
            span = f"{format_quantity(self.low, self.unit)} to {format_quantity(self.high, self.unit)}"
            problems.add(node, key, f"expected {span}, got {shown(node)}")
            return None
        return value


@dataclass(frozen=True)
class Truth:
    """``true`` or ``false``, no other spelling."""

    def read(self, node: Node, key: str, problems: Problems) -> bool | None:
        if node.kind != "scalar" or node.quoted or node.text not in ("true", "false"):
            problems.add(node, key, f"expected true or false, got {node}")
            return None
        return node.text == "true"


@dataclass(frozen=True)
class Many:
    """A list of one kind, as a tuple."""

    kind: Kind

    def read(self, node: Node, key: str, problems: Problems) -> tuple[Any, ...]:
        if node.kind != "list":
            problems.add(node, key, f"expected a list, got {shown(node)}")
        return tuple(self.kind.read(item, join(key, str(i)), problems) for i, item in enumerate(node.items))


@dataclass(frozen=True)
class Table:
    """A mapping of one kind; ``wrong_key`` gives the reason against a key, "" where there is none."""

    kind: Kind
    wrong_key: Callable[[str], str] | None = None

    def read(self, node: Node, key: str, problems: Problems) -> Mapping[str, Any]:
        if node.kind != "mapping":
            problems.add(node, key, f"expected a mapping of key: value, got {shown(node)}")
        found = {}
        for name, (key_node, value) in node.entries.items():
            if reason := self.wrong_key(name) if self.wrong_key else "":
                problems.add(key_node, join(key, name), reason)
            else:
                found[name] = self.kind.read(value, join(key, name), problems)
        return MappingProxyType(found)


@dataclass(frozen=True)
class Keys:
    """A mapping with known keys, as a mapping of what could be read, or what ``make`` makes of it where all could."""

    required: Mapping[str, Kind]
    optional: Mapping[str, Kind] = field(default_factory=dict)
    make: Callable[..., Any] | None = None
    expected: str = "a mapping of key: value"

    def read(self, node: Node, key: str, problems: Problems) -> Any:
        before = len(problems)
        nodes = self.members(node, key, problems)
        kinds = {**self.required, **self.optional}
        values = {name: kinds[name].read(nodes[name], join(key, name), problems) for name in kinds if name in nodes}
        if self.make is None:
            return MappingProxyType({name: values[name] for name in nodes})  # in the order of the file
        try:
            return self.make(**values) if len(problems) == before else None
        except InputError as error:
            problems.add(node, key, str(error))
            return None

    def members(self, node: Node, key: str, problems: Problems) -> dict[str, Node]:
        """Nodes by key; notes unknown keys with the closest known one, and missing ones."""
        if node.kind != "mapping":
            problems.add(node, key, f"expected {self.expected}, got {shown(node)}")
            return {}
        known = (*self.required, *self.optional)
        for name, (key_node, _) in node.entries.items():
            if name not in known:
                hint = did_you_mean(name, known) or f"expected some of {', '.join(known)}"
                problems.add(key_node, join(key, name), f"unknown key; {hint}")
        for name in self.required:
            if name not in node.entries:
                problems.add(node, join(key, name), "is missing")
        return {name: value for name, (_, value) in node.entries.items() if name in known}


@dataclass(frozen=True)
class Checked:
    """A kind and a rule: the value it gives is kept, what it raises (ValueError) is the reason against it."""

    kind: Kind
    rule: Callable[[Any], Any]

    def read(self, node: Node, key: str, problems: Problems) -> Any:
        value = self.kind.read(node, key, problems)
        try:
            return None if value is None else self.rule(value)
        except ValueError as error:
            problems.add(node, key, str(error))
            return None


@lru_cache(maxsize=256)
def record(cls: type) -> Keys:
    """The kind of a dataclass, from its annotations; see the module."""
    hints = get_type_hints(cls, include_extras=True)
    required: dict[str, Kind] = {}
    optional: dict[str, Kind] = {}
    for each in dataclasses.fields(cls):
        must = each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
        (required if must else optional)[each.name] = _kind_of(hints[each.name])
    return Keys(required, optional, cls)


def _kind_of(hint: Any) -> Kind:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        kind: Kind = next(found for found in args[1:] if hasattr(found, "read"))
        return kind
    if origin in (Union, UnionType):
        return _kind_of(next(arg for arg in args if arg is not type(None)))
    if origin is Literal:
        return Text(args)
    if origin is tuple:
        return Many(_kind_of(args[0]))
    if origin is not None:
        return Table(_kind_of(args[1]))
    if hint in (str, bool):
        return Text() if hint is str else Truth()
    return record(hint)


def shown(node: Node) -> str:
    """A node as a message quotes it."""
    return "nothing" if node.kind == "scalar" and not node.text and not node.quoted else str(node)


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """A hint at the closest known name; "" where none is close."""
    close = difflib.get_close_matches(name[:40], known, n=1, cutoff=cutoff)
    return f"did you mean {close[0]}?" if close else ""


def _means_another(text: str) -> bool:
    """Whether YAML would read a bare text as a truth value, nothing or a number."""
    return text.lower() in (*_TRUTHS, "null", "~", "") or _NUMBER.fullmatch(text) is not None
