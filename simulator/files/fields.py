"""Read every YAML file of this project by one reader: a schema is data.

A field type reads one node of the tree. :class:`TextField`, :class:`NumberField`, :class:`QuantityField` and
:class:`BoolField` read scalars, :class:`CheckedField` a scalar with a further rule. :class:`ListField` reads a list,
:class:`MapField` a mapping with free keys, :class:`ObjectField` a mapping with known keys. :func:`field_of` derives the
field type of a frozen dataclass from its annotations.

Each problem is noted with its place, and reading continues, so one run reports all problems. A scalar with a problem is
None; lists and mappings hold the values without problems.
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


class FieldType(Protocol):
    """A reader of one node; ``key`` is the path of the node in messages."""

    def read(self, node: Node, key: str, problems: Problems) -> Any: ...


class ScalarField:
    """A field type of scalars; ``value`` raises ValueError with the reason."""

    def value(self, node: Node) -> Any:
        raise NotImplementedError

    def read(self, node: Node, key: str, problems: Problems) -> Any:
        try:
            return self.value(node)
        except ValueError as error:
            problems.add(node, key, str(error))
            return None


@dataclass(frozen=True)
class TextField(ScalarField):
    """Text of 1 to 2000 printable characters: one of ``choices``, or text that matches ``pattern``.

    ``right`` describes the pattern in words.
    """

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
class NumberField(ScalarField):
    """A finite number without a unit, from ``low`` to ``high``; an int if ``whole``."""

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
            return "YAML 1.1 reads a leading zero as octal; remove it"
        if re.fullmatch(r"[+-]?\d+(:[0-5]?\d)+", node.text):
            return "YAML 1.1 reads a colon as base 60; write a plain number"
        if node.text.lower() in _TRUTHS:
            return f"YAML reads it as a truth value; write {self.example}"
        return f"write {self.example}"


@dataclass(frozen=True)
class QuantityField(ScalarField):
    """Text with a unit, such as "3.35 TB/s", as a number in SI units."""

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


class BoolField(ScalarField):
    """``true`` or ``false``; no other spelling is accepted."""

    def value(self, node: Node) -> bool:
        if node.kind != "scalar" or node.quoted or node.text not in ("true", "false"):
            raise ValueError(f"expected true or false, got {node}")
        return node.text == "true"


@dataclass(frozen=True)
class CheckedField(ScalarField):
    """A scalar with a further rule: a function that returns the value to keep, or raises ValueError with the reason."""

    scalar: ScalarField
    rule: Callable[[Any], Any]

    def value(self, node: Node) -> Any:
        return self.rule(self.scalar.value(node))


@dataclass(frozen=True)
class ListField:
    """A list whose items have one field type, as a tuple."""

    item: FieldType

    def read(self, node: Node, key: str, problems: Problems) -> tuple[Any, ...]:
        if node.kind != "list":
            problems.add(node, key, f"expected a list, got {shown(node)}")
        return tuple(self.item.read(item, join(key, str(i)), problems) for i, item in enumerate(node.items))


@dataclass(frozen=True)
class MapField:
    """A mapping with free keys whose values have one field type.

    ``wrong_key`` returns the reason against a key, or "".
    """

    member: FieldType
    wrong_key: Callable[[str], str] | None = None

    def read(self, node: Node, key: str, problems: Problems) -> Mapping[str, Any]:
        if node.kind != "mapping":
            problems.add(node, key, f"expected a mapping of key: value, got {shown(node)}")
        found = {}
        for name, (key_node, value) in node.entries.items():
            if reason := self.wrong_key(name) if self.wrong_key else "":
                problems.add(key_node, join(key, name), reason)
            else:
                found[name] = self.member.read(value, join(key, name), problems)
        return MappingProxyType(found)


@dataclass(frozen=True)
class ObjectField:
    """A mapping with known keys: returns what ``make`` builds from the values, or the values by key without ``make``.

    ``make`` is called only if no value has a problem; else the result is None.
    """

    required: Mapping[str, FieldType]
    optional: Mapping[str, FieldType] = field(default_factory=dict)
    make: Callable[..., Any] | None = None
    expected: str = "a mapping of key: value"

    def read(self, node: Node, key: str, problems: Problems) -> Any:
        before = len(problems)
        nodes = self.members(node, key, problems)
        fields = {**self.required, **self.optional}
        values = {name: fields[name].read(nodes[name], join(key, name), problems) for name in fields if name in nodes}
        if self.make is None:
            return MappingProxyType({name: values[name] for name in nodes})  # in the order of the file
        try:
            return self.make(**values) if len(problems) == before else None
        except InputError as error:
            problems.add(node, key, str(error))
            return None

    def members(self, node: Node, key: str, problems: Problems) -> dict[str, Node]:
        """Return the nodes by key; note missing keys, and unknown keys with the closest known key."""
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
def field_of(cls: type) -> ObjectField:
    """Return the field type of a dataclass, from its annotations; ``str`` and ``bool`` need no field type.

    A field without a default is required. The dataclass is made only if none of its values has a problem::

        rows: Annotated[int, NumberField(0, 1e12, "400", whole=True)] = 0
    """
    hints = {name: _annotated(hint) for name, hint in get_type_hints(cls, include_extras=True).items()}
    required = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
    optional = [f.name for f in dataclasses.fields(cls) if f.name not in required]
    return ObjectField({name: hints[name] for name in required}, {name: hints[name] for name in optional}, cls)


def _annotated(hint: Any) -> FieldType:
    if get_origin(hint) is Annotated:
        found: FieldType = get_args(hint)[1]
        return found
    plain: dict[Any, FieldType] = {str: TextField(), bool: BoolField()}
    return plain[hint]


def shown(node: Node) -> str:
    """Return a node as a message quotes it."""
    return "nothing" if node.kind == "scalar" and not node.text and not node.quoted else str(node)


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """Return a hint at the closest known name, or "" if no name is close."""
    close = difflib.get_close_matches(name[:40], known, n=1, cutoff=cutoff)
    return f"did you mean {close[0]}?" if close else ""


def _means_another(text: str) -> bool:
    """Return whether YAML reads a bare text as a truth value, null or a number."""
    return text.lower() in (*_TRUTHS, "null", "~", "") or _NUMBER.fullmatch(text) is not None
