"""Read and write YAML by dataclasses, whose annotations declare the check, unit and message of each
value::

    rows: Annotated[int, Number(0, 1e12, "400", whole=True)] = 0

:func:`read` finds all problems of a tree at once. The subclasses of :class:`Scalar` convert the
text of a node. :func:`lines_of` writes the dataclass again.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass
from functools import lru_cache
from types import MappingProxyType, NoneType
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from simulator.errors import InputError
from simulator.files.yaml import Node, Problems, path_of
from simulator.units import EXAMPLES, format_quantity, parse_quantity

T = TypeVar("T")
Keyed = tuple[Any, ...]
"""Keys and positions from the root of a tree to a node."""

BAD = object()
"""Value of a node with a problem."""

_NUMBER = re.compile(r"[+-]?(?:0|[1-9]\d{0,20})(?:\.\d{0,40})?(?:[eE][+-]?\d{1,3})?", re.ASCII)
_TRUTHS = ("true", "false", "yes", "no", "on", "off")
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_]*(?:[.-][A-Za-z0-9_]+)*")


class Scalar:
    """A type of scalars: ``value`` converts a node or raises ValueError with the reason, ``text``
    writes the value."""

    def value(self, node: Node) -> Any:
        raise NotImplementedError

    def text(self, value: Any) -> str:
        return str(value)

    def read(self, node: Node, path: Keyed, reader: TreeReader) -> Any:
        try:
            return self.value(node)
        except ValueError as error:
            return reader.wrong(node, path, str(error))


@dataclass(frozen=True)
class Text(Scalar):
    """Text of 1 to 2000 printable characters: one of ``choices``, or of a ``pattern``, which
    ``right`` describes."""

    choices: tuple[str, ...] = ()
    pattern: str = ""
    right: str = ""
    quote: bool = False  # whether it is always written in quotes

    def value(self, node: Node) -> str:
        text = node.text.strip()
        # YAML reads these texts without quotes as a truth value, null or a number
        other = node.text.lower() in (*_TRUTHS, "null", "~", "") or _NUMBER.fullmatch(node.text)
        if node.kind != "scalar" or (other and not node.quoted):
            hint = "; put it in quotes" if node.kind == "scalar" and node.text else ""
            raise ValueError(f"expected text, got {node}{hint}")
        if not text or not text.isprintable() or len(text) > 2000:
            raise ValueError(f"expected 1 to 2000 printable characters, got {node}")
        if self.choices and text not in self.choices:
            hint = f"{did_you_mean(text.lower(), self.choices)} Known: {', '.join(self.choices)}"
            raise ValueError(f"unknown value {node}; {hint.strip()}")
        if self.pattern and not re.fullmatch(self.pattern, text):
            raise ValueError(f"expected {self.right}, got {node}")
        return text

    def text(self, value: str) -> str:
        return quoted(value) if self.quote else plain_text(value)


class ListedSource(Text):
    def read(self, node: Node, path: Keyed, reader: TreeReader) -> Any:
        short = super().read(node, path, reader)
        if short is not BAD and short not in reader.sources:
            hint = (
                did_you_mean(short, reader.sources, 0.3)
                or "add it there with a title and an address"
            )
            return reader.wrong(node, path, f"{short!r} is not listed under sources; {hint}")
        return short


@dataclass(frozen=True)
class Number(Scalar):
    """A finite number without a unit, from ``low`` to ``high``; an int if ``whole``."""

    low: float
    high: float
    example: str
    whole: bool = False

    def value(self, node: Node) -> float:
        expected = "expected a whole number" if self.whole else "expected a number"
        if reason := self._problem(node):
            raise ValueError(f"{expected}, got {node}: {reason}")
        value = float(node.text)
        if not self.low <= value <= self.high:
            raise ValueError(f"{expected} from {self.low:g} to {self.high:g}, got {node}")
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

    def text(self, value: float) -> str:
        """Return the shortest text that reads back to the same number; whole numbers have no
        point."""
        whole = isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15)
        return str(int(value)) if whole else repr(float(value))


@dataclass(frozen=True)
class Quantity(Scalar):
    unit: str
    low: float
    high: float

    def value(self, node: Node) -> float:
        if node.kind != "scalar":
            raise ValueError(
                f'expected a quantity with a unit such as "{EXAMPLES[self.unit]}", got a'
                f" {node.kind}"
            )
        value = parse_quantity(node.text, self.unit)
        if not self.low <= value <= self.high:
            low, high = (format_quantity(end, self.unit) for end in (self.low, self.high))
            raise ValueError(f"expected {low} to {high}, got {node}")
        return value

    def text(self, value: float) -> str:
        return format_quantity(value, self.unit)


class Truth(Scalar):
    """``true`` or ``false``; no other spelling is accepted."""

    def value(self, node: Node) -> bool:
        if node.kind != "scalar" or node.quoted or node.text not in ("true", "false"):
            raise ValueError(f"expected true or false, got {node}")
        return node.text == "true"

    def text(self, value: bool) -> str:
        return str(value).lower()


@dataclass(frozen=True)
class Checked(Scalar):
    """A scalar with a further rule, which returns the value to keep or raises ValueError."""

    scalar: Scalar
    rule: Callable[[Any], Any]

    def value(self, node: Node) -> Any:
        return self.rule(self.scalar.value(node))


@dataclass(frozen=True, eq=False)
class Keys:
    """Annotation of a mapping with given keys, of a ``kind`` that messages name."""

    kind: str
    names: Iterable[str]


@dataclass(frozen=True)
class Inline:
    """Annotation of a dataclass some of whose members are keys of the mapping that contains it."""

    keys: tuple[str, ...]


String = Annotated[str, Text()]
Quoted = Annotated[str, Text(quote=True)]
Strings = tuple[String, ...]
SourceName = Annotated[str, ListedSource()]
Flag = Annotated[bool, Truth()]
Map = Mapping[str, T]


def read(cls: type[T], root: Node, problems: Problems, **context: Any) -> T | None:
    """Return the dataclass of a tree, or None with all problems; ``context``: values for readers of
    some kinds."""
    found = TreeReader(problems, tuple(root.at("sources").entries), context).read(cls, root, ())
    return None if len(problems) else found


def lines_of(value: Any) -> Iterator[str]:
    """Yield the lines of YAML of a dataclass; empty texts and empty defaults are omitted."""
    yield from kind_of(type(value)).lines(value, "")  # type: ignore[arg-type] # mypy takes no class as hashable


@dataclass(frozen=True)
class TreeReader:
    problems: Problems
    sources: tuple[str, ...]
    context: Mapping[str, Any]

    def read(self, hint: Any, node: Node, path: Keyed) -> Any:
        return kind_of(hint).read(node, path, self)

    def wrong(self, node: Node, path: Keyed, reason: str) -> Any:
        self.problems.add(node, path_of(path), reason)
        return BAD


@lru_cache(maxsize=256)
def kind_of(hint: Any) -> Any:
    """Return the reader and writer of a type: its annotation, or a list, a mapping or an object of
    kinds."""
    keys = None
    if get_origin(hint) is Annotated:
        hint, *about = get_args(hint)
        keys = about[0]
        if not isinstance(keys, Keys):
            return keys
    if NoneType in get_args(hint):
        return kind_of(next(each for each in get_args(hint) if each is not NoneType))
    if get_origin(hint) is tuple:
        return ListOf(kind_of(get_args(hint)[0]))
    return (
        Object(hint)
        if dataclasses.is_dataclass(get_origin(hint) or hint)
        else MapOf(get_args(hint)[1], keys)
    )


@dataclass(frozen=True)
class ListOf:
    item: Any
    some: bool = False  # whether an empty list is refused

    def read(self, node: Node, path: Keyed, reader: TreeReader) -> Any:
        if node.kind != "list":
            return reader.wrong(node, path, f"expected a list, got {node}")
        if self.some and not node.items:
            return reader.wrong(node, path, "expected at least one item, got none")
        items = tuple(self.item.read(item, (*path, i), reader) for i, item in enumerate(node.items))
        return BAD if BAD in items else items

    def text(self, value: Any) -> str:
        text = self.item.flow if isinstance(self.item, Object) else self.item.text
        return f"[{', '.join(map(text, value))}]"


class MapOf:
    def __init__(self, item: Any, keys: Keys | None = None) -> None:
        self.item, self.keys = kind_of(item), keys

    def read(self, node: Node, path: Keyed, reader: TreeReader) -> Any:
        if node.kind != "mapping":
            return reader.wrong(node, path, f"expected a mapping of key: value, got {node}")
        found = {}
        for key, (at, value) in node.entries.items():
            if reason := self.wrong_key(key, path, reader):
                found[key] = reader.wrong(at, (*path, key), reason)
            else:
                found[key] = self.item.read(value, (*path, key), reader)
        return BAD if BAD in found.values() else MappingProxyType(found)

    def wrong_key(self, key: str, path: Keyed, reader: TreeReader) -> str:
        if self.keys is None or key in self.keys.names:
            return ""
        hint = (
            f"{did_you_mean(key.lower(), self.keys.names)} Known:"
            f" {', '.join(self.keys.names) or 'none'}"
        )
        return f"unknown {self.keys.kind}; {hint.strip()}"

    def text(self, value: Any) -> str:
        return "" if value else "{}"

    def lines(self, value: Any, indent: str) -> Iterator[str]:
        for key, one in value.items():
            yield from _entry(plain_text(key), one, self.item, indent)


class Object:
    def __init__(self, hint: Any) -> None:
        self.cls = get_origin(hint) or hint
        # attribute, kind and default by the key in a file
        self.members: dict[str, tuple[str, Any, Any]] = {}
        hints = get_type_hints(self.cls, include_extras=True)
        self.inline: dict[str, tuple[Any, tuple[str, ...]]] = {}  # class and keys by member
        for one in dataclasses.fields(self.cls):
            kind = hints[one.name]
            if isinstance(
                about := kind_of(kind) if get_origin(kind) is Annotated else None, Inline
            ):
                inner = Object(get_args(kind)[0])
                self.members |= {key: inner.members[key] for key in about.keys}
                self.inline[one.name] = inner.cls, about.keys
                continue
            for parameter, argument in zip(getattr(self.cls, "__parameters__", ()), get_args(hint)):
                kind = argument if kind in (parameter, parameter | None) else kind
            default = one.default_factory() if one.default_factory is not MISSING else one.default
            self.members[one.metadata.get("key", one.name)] = one.name, kind_of(kind), default
        self.required = [key for key, (_, _, default) in self.members.items() if default is MISSING]

    def read(self, node: Node, path: Keyed, reader: TreeReader) -> Any:
        if node.kind != "mapping":
            shape = f"{{{', '.join(f'{name}: ...' for name in self.required)}}}"
            shape = shape if "source" in self.required else "a mapping of key: value"
            return reader.wrong(node, path, f"expected {shape}, got {node}")
        found = {}
        for key, (at, value) in node.entries.items():
            if member := self.members.get(key):
                found[member[0]] = member[1].read(value, (*path, key), reader)
            else:
                found[key] = reader.wrong(at, (*path, key), unknown_key(key, self.members))
        for key in self.required:
            if key not in node.entries:
                found[key] = reader.wrong(node, (*path, key), "is missing")
        if BAD in found.values():
            return BAD
        made = object.__new__(self.cls)  # without __init__: a file has hundreds of objects
        made.__dict__.update(
            {name: found.get(name, default) for name, _, default in self.members.values()}
        )
        try:
            for name, (cls, keys) in self.inline.items():
                made.__dict__[name] = cls(**{key: made.__dict__.pop(key) for key in keys})
            if hasattr(made, "__post_init__"):
                made.__post_init__()
        except InputError as error:
            return reader.wrong(node, path, str(error))
        return made

    def text(self, value: Any) -> str:
        """Return an object with a member ``value`` as one line, "" for others."""
        return self.flow(value) if "value" in self.members else ""

    def flow(self, value: Any) -> str:
        parts = (
            f"{key}: {kind.text(part)}"
            for key, (name, kind, default) in self.members.items()
            if (part := getattr(value, name)) not in (None, "") and (part or part != default)
        )
        return f"{{{', '.join(parts)}}}"

    def lines(self, value: Any, indent: str) -> Iterator[str]:
        for key, (name, kind, default) in self.members.items():
            part = getattr(value, name)
            if part is not None and part != "" and (part or part != default):
                yield from _entry(key, part, kind, indent)


def _entry(key: str, value: Any, kind: Any, indent: str) -> Iterator[str]:
    if text := kind.text(value):
        yield f"{indent}{key}: {text}"
    else:
        yield f"{indent}{key}:"
        yield from kind.lines(value, indent + "  ")


def quoted(value: str) -> str:
    """Return double-quoted YAML: JSON's escapes are a subset of YAML's."""
    return json.dumps(value, ensure_ascii=False)


def plain_text(value: str) -> str:
    """Return YAML of a text, in quotes where YAML would read another value."""
    return (
        value
        if _PLAIN.fullmatch(value) and value.lower() not in (*_TRUTHS, "null", "y", "n")
        else quoted(value)
    )


def unknown_key(name: str, known: Iterable[str]) -> str:
    hint = did_you_mean(name, known) or f"expected some of {', '.join(known)}"
    return f"unknown key; {hint}"


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """Return a hint at the closest known name, or "" if no name is close."""
    close = difflib.get_close_matches(name[:40], known, n=1, cutoff=cutoff)
    return f"did you mean {close[0]}?" if close else ""
