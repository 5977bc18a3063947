"""Parse YAML text to a tree of nodes with their places, without guessing types.

PyYAML converts scalars by surprising rules: ``010`` becomes 8, ``1:30`` becomes 90, ``yes`` becomes
True. Here a scalar stays text, and :mod:`simulator.files.fields` converts it. Anchors, tags,
several documents and duplicate keys are rejected; depth and size are limited, so a file can neither
run code nor fill the memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from simulator.errors import InputError, one_line
from simulator.files.read import read_bounded

MAX_BYTES = 1_000_000
MAX_DEPTH = 20


# files have thousands of nodes; a frozen dataclass takes three times as long
class Node(NamedTuple):
    """A part of a YAML file, and its place, counted from 1."""

    kind: str  # "scalar", "list" or "mapping"
    line: int = 1
    column: int = 1
    text: str = ""
    quoted: bool = False  # distinguishes "132" from 132
    items: tuple[Node, ...] = ()
    # node of each key and node of its value
    entries: Mapping[str, tuple[Node, Node]] = MappingProxyType({})

    def __str__(self) -> str:
        if self.kind != "scalar":
            return f"a {self.kind}"
        text = self.text if len(self.text) <= 40 else self.text[:40] + "..."
        return (
            (repr(text) if self.quoted or text.split() != [text] else text)
            if text or self.quoted
            else "nothing"
        )

    def at(self, *keys: str) -> Node:
        node = self
        for key in keys:
            node = node.entries[key][1] if key in node.entries else Node("scalar")
        return node


class Problems:
    def __init__(self, file: str) -> None:
        self.file = file
        self._found: list[tuple[int, int, str, str]] = []

    def add(self, node: Node | None, key: str, reason: str) -> None:
        line, column = (node.line, node.column) if node else (1, 1)
        self._found.append((line, column, key or "file", " ".join(reason.split())))

    def __len__(self) -> int:
        return len(self._found)

    @property
    def lines(self) -> list[str]:
        """One line per problem, ``file:line:column: key: reason``, in the order of the file."""
        found = sorted(self._found, key=lambda p: p[:2])
        return [
            one_line(f"{self.file}:{line}:{column}: {key}: {reason}")
            for line, column, key, reason in found
        ]

    def error(self, command: str = "hardware") -> InputError:
        """Return the first problem, with the number of further problems, which ``prunesim COMMAND
        check`` lists."""
        return first_of(self.lines, f": prunesim {command} check {self.file}")


def first_of(lines: Sequence[str], way: str = "") -> InputError:
    """Return the first problem, with the number of further problems; ``way`` states how to list
    them."""
    first, *rest = lines
    return InputError(first + (f" (and {len(rest)} more{way})" if rest else ""))


def path_of(keys: Iterable[Any]) -> str:
    """Return keys and positions as the path of a node; long keys are shortened, unprintable keys
    quoted."""
    short = (key if len(key) <= 40 else key[:40] + "..." for key in map(str, keys))
    return ".".join(key if key.strip() and key.isprintable() else repr(key) for key in short)


def read_text(path: Path, problems: Problems) -> str | None:
    """Return the text of a file, or None with a problem if the file cannot be read or is not
    UTF-8."""
    raw = b""
    try:
        raw = read_bounded(path, MAX_BYTES, "")
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        place = Node("scalar", before.count(b"\n") + 1, error.start - before.rfind(b"\n"))
        problems.add(
            place, "file", f"byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8"
        )
    except InputError as error:
        problems.add(None, "file", str(error))
    return None


def aliases_of(path: Path) -> list[str]:
    """Return the names in the line "aliases: [...]" of a shipped file, as parsing every file takes
    too long."""
    line = re.search(r"^aliases: *\[(.*)\] *$", path.read_text(encoding="utf-8"), re.MULTILINE)
    names = (name.strip().strip("\"'") for name in line.group(1).split(",")) if line else ()
    return [name for name in names if name]


def parse_yaml(text: str, problems: Problems) -> Node | None:
    """Return the tree of a YAML text; None if it is empty, and None with a problem if it is
    rejected."""
    import yaml  # here, as the import takes 25 ms

    parser = _Parser(
        yaml, yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)), problems
    )
    root = None
    try:
        for event in parser.events:
            if isinstance(event, yaml.NodeEvent):
                root = parser.node(event, ())
            elif root is not None and isinstance(event, yaml.DocumentStartEvent):
                raise _Refused(
                    event.start_mark, (), "holds more than one YAML document; expected one"
                )
        return root
    except _Refused as refused:
        mark, path, reason = refused.args
        problems.add(_place(mark), path_of(path), reason)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "".join(text.split("\n")[mark.line : mark.line + 1]) if mark else ""
        tab = mark and "\t" in line[: mark.column + 1]
        hint = "indent with spaces, not tabs" if tab else "check quotes, colons and indentation"
        reason = error.problem or error.context or "cannot be read"
        problems.add(_place(mark) if mark else None, "yaml", f"{reason}; {hint}")
    except yaml.YAMLError as error:
        problems.add(None, "yaml", f"{str(error).splitlines()[0]}; expected plain YAML text")
    return None


def _place(mark: Any) -> Node:
    return Node("scalar", mark.line + 1, mark.column + 1)


class _Refused(Exception):
    """A reason to stop parsing: mark, path and reason."""


class _Parser(NamedTuple):
    yaml: Any
    events: Iterator[Any]
    problems: Problems

    def node(self, event: Any, path: tuple[Any, ...], is_key: bool = False) -> Node:
        mark = event.start_mark
        line, column = mark.line + 1, mark.column + 1
        if event.anchor is not None:
            hint = "write the value out, or quote it if it is text"
            raise _Refused(mark, path, f"anchors (&) and aliases (*) are not allowed; {hint}")
        if event.tag is not None:
            raise _Refused(
                mark, path, f"tags are not allowed, got {str(event.tag)[:60]}; write plain values"
            )
        if isinstance(event, self.yaml.ScalarEvent):
            return Node("scalar", line, column, event.value, bool(event.style))
        if len(path) >= MAX_DEPTH:
            raise _Refused(mark, path, f"is nested deeper than {MAX_DEPTH} levels")
        if is_key:
            raise _Refused(mark, path, "a key must be plain text, got a list or mapping")
        if isinstance(event, self.yaml.SequenceStartEvent):
            items: list[Node] = []
            while not isinstance(inner := next(self.events), self.yaml.SequenceEndEvent):
                items.append(self.node(inner, (*path, len(items))))
            return Node("list", line, column, items=tuple(items))
        entries: dict[str, tuple[Node, Node]] = {}
        while not isinstance(inner := next(self.events), self.yaml.MappingEndEvent):
            key = self.node(inner, path, is_key=True)
            at = (*path, key.text)
            value = self.node(next(self.events), at)
            first = entries.setdefault(key.text, (key, value))[0]
            if first is not key:
                self.problems.add(
                    key, path_of(at), f"is given twice, first on line {first.line}; keep one"
                )
        return Node("mapping", line, column, entries=entries)
