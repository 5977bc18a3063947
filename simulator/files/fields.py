"""One reader for every YAML file of this project: what a node must be, said as data.

A *kind* reads a node: :class:`Text`, :class:`Number`, :class:`Quantity`, :class:`Truth`, :class:`Many` (a list),
:class:`Table` (a mapping with free keys), :class:`Keys` (one with known keys) and :class:`Checked` (a scalar and a
rule of its own). :func:`record` makes the kind of a frozen dataclass from its annotations.

What is wrong is noted with its place, what came and what would be right, and reading goes on, so that one run reports
everything. A scalar that could not be read is None; lists and mappings hold what could be read.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Annotated, Any, Protocol, get_args, get_origin, get_type_hints

from simulator.errors import InputError
from simulator.files.yaml import Node, Problems, join
from simulator.units import EXAMPLES, format_quantity, parse_quantity

_NUMBER = re.compile(r"[+-]?(?:0|[1-9]\d{0,20})(?:\.\d{0,40})?(?:[eE][+-]?\d{1,3})?", re.ASCII)
_TRUTHS = ("true", "false", "yes", "no", "on", "off")


class Kind(Protocol):
    """What a node must be; the key is for messages."""

    def read(self, node: Node, key: str, problems: Problems) -> Any: ...


class Scalar:
    """A kind whose ``value`` is that of a node, or raises ValueError with the reason against it."""

    def value(self, node: Node) -> Any:
        raise NotImplementedError

    def read(self, node: Node, key: str, problems: Problems) -> Any:
        try:
            return self.value(node)
        except ValueError as error:
            problems.add(node, key, str(error))
            return None


@dataclass(frozen=True)
class Text(Scalar):
    """1 to 2000 printable characters; one of some choices, or all of a pattern, which ``right`` says in words."""

    choices: tuple[str, ...] = ()
    pattern: str = ""
    right: str = ""

    def value(self, node: Node) -> str:
        text = node.text.strip()
        if node.kind != "scalar" or (not node.quoted and _means_another(node.text)):
            hint = "; put it in quotes" if node.kind == "scalar" and node.text else ""
            raise ValueError(f"expected text, got {shown(node)}{hint}")
        if not text or not text.isprintable() or len(text) > 2000:
            raise ValueError(f"expected 1 to 2000 printable characters, got {shown(node)}")
        if self.choices and text not in self.choices:
            hint = f"{did_you_mean(text.lower(), self.choices)} Known: {', '.join(self.choices)}"
            raise ValueError(f"unknown value {shown(node)}; {hint.strip()}")
        if self.pattern and not re.fullmatch(self.pattern, text):
            raise ValueError(f"expected {self.right}, got {shown(node)}")
        return text


@dataclass(frozen=True)
class Number(Scalar):
    """A plain finite number in [low, high]; an int where it must be whole."""

    low: float
    high: float
    example: str
    whole: bool = False

    def value(self, node: Node) -> float:
        expected = "expected a whole number" if self.whole else "expected a number"
        if reason := self._problem(node):
            raise ValueError(f"{expected}, got {shown(node)}: {reason}")
        value = float(node.text)
        if not self.low <= value <= self.high:
            raise ValueError(f"{expected} from {self.low:g} to {self.high:g}, got {shown(node)}")
        return int(value) if self.whole else value

    def _problem(self, node: Node) -> str:
        plain = node.kind == "scalar" and not node.quoted and _NUMBER.fullmatch(node.text)
        if plain and not (self.whole and not float(node.text).is_integer()):
            return ""
        if node.kind == "scalar" and node.quoted:
            return "remove the quotes"
        if re.fullmatch(r"[+-]?0\d+", node.text):
            return "a leading zero reads as octal in YAML 1.1; remove it"
        if re.fullmatch(r"[+-]?\d+(:[0-5]?\d)+", node.text):
            return "a colon reads as base 60 in YAML 1.1; write a plain number"
        if node.text.lower() in _TRUTHS:
            return f"that is a truth value; write {self.example}"
        return f"write {self.example}"


@dataclass(frozen=True)
class Quantity(Scalar):
    """A text with a unit such as "3.35 TB/s", to SI."""

    unit: str
    low: float
    high: float

    def value(self, node: Node) -> float:
        if node.kind != "scalar":
            raise ValueError(f'expected a quantity with a unit such as "{EXAMPLES[self.unit]}", got a {node.kind}')
        value = parse_quantity(node.text, self.unit)
        if not self.low <= value <= self.high:
            low, high = (format_quantity(end, self.unit) for end in (self.low, self.high))
            raise ValueError(f"expected {low} to {high}, got {shown(node)}")
        return value


class Truth(Scalar):
    """``true`` or ``false``, no other spelling."""

    def value(self, node: Node) -> bool:
        if node.kind != "scalar" or node.quoted or node.text not in ("true", "false"):
            raise ValueError(f"expected true or false, got {node}")
        return node.text == "true"


@dataclass(frozen=True)
class Checked(Scalar):
    """A scalar and a rule: the value it gives is kept, what it raises (ValueError) is the reason against it."""

    kind: Scalar
    rule: Callable[[Any], Any]

    def value(self, node: Node) -> Any:
        return self.rule(self.kind.value(node))


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


@lru_cache(maxsize=256)
def record(cls: type) -> Keys:
    """The kind of a dataclass, from its annotations; ``str`` and ``bool`` need no kind. A field without a default must
    be there; the dataclass is made only where nothing in it was wrong::

        rows: Annotated[int, Number(0, 1e12, "400", whole=True)] = 0
    """
    hints = {name: _kind_of(hint) for name, hint in get_type_hints(cls, include_extras=True).items()}
    must = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
    optional = [f.name for f in dataclasses.fields(cls) if f.name not in must]
    return Keys({name: hints[name] for name in must}, {name: hints[name] for name in optional}, cls)


def _kind_of(hint: Any) -> Kind:
    if get_origin(hint) is Annotated:
        kind: Kind = get_args(hint)[1]
        return kind
    plain: dict[Any, Kind] = {str: Text(), bool: Truth()}
    return plain[hint]


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
