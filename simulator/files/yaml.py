"""YAML text to a tree that remembers where everything stood, with nothing guessed.

PyYAML turns scalars into Python values by rules that surprise (``010`` becomes 8, ``1:30`` becomes 90, ``yes`` becomes
True, ``3.35e12`` stays text, the second of two equal keys wins silently). Here a scalar stays the text that was
written; ``files.fields`` decides what it must be. Anchors, aliases, tags, several documents and duplicate keys are
refused, depth and size are bounded: a file from the internet can neither run code nor grow in memory.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from simulator.errors import InputError, one_line

MAX_BYTES = 1_000_000
MAX_DEPTH = 20


class Node(NamedTuple):  # a file has thousands: a tuple is made in a third of the time of a frozen dataclass
    """A part of a YAML file, and where it starts, counted from 1."""

    kind: str  # "scalar", "list" or "mapping"
    line: int
    column: int
    text: str = ""
    quoted: bool = False  # tells "132" and 132 apart
    items: tuple[Node, ...] = ()
    entries: Mapping[str, tuple[Node, Node]] = MappingProxyType({})  # the node of each key, and of its value

    def __str__(self) -> str:
        if self.kind != "scalar":
            return f"a {self.kind}"
        shown = self.text if len(self.text) <= 40 else self.text[:40] + "..."
        return repr(shown) if self.quoted or shown.split() != [shown] else shown


class Problems:
    """What is wrong with a file, each with its place; ``lines`` are ``file:line:column: key: reason``."""

    def __init__(self, file: str) -> None:
        self.file = file
        self._found: list[tuple[int, int, str, str]] = []

    def add(self, node: Node | None, key: str, reason: str) -> None:
        """Note one problem at a node (None: at the start of the file); the key of the root is ""."""
        line, column = (node.line, node.column) if node else (1, 1)
        self._found.append((line, column, key or "file", " ".join(reason.split())))

    def __len__(self) -> int:
        return len(self._found)

    @property
    def lines(self) -> list[str]:
        """One line a problem, in the order of the file."""
        found = sorted(self._found, key=lambda p: p[:2])
        return [one_line(f"{self.file}:{line}:{column}: {key}: {reason}") for line, column, key, reason in found]

    def error(self, command: str = "hardware") -> InputError:
        """The first problem, and how many more there are, which ``prunesim COMMAND check`` tells."""
        first, *rest = self.lines
        return InputError(first + (f" (and {len(rest)} more: prunesim {command} check {self.file})" if rest else ""))


def join(path: str, key: str) -> str:
    """The path of a member, for messages: a strange key shortened and quoted."""
    short = key if len(key) <= 40 else key[:40] + "..."
    short = short if short.strip() and short.isprintable() else repr(short)
    return f"{path}.{short}" if path else short


def read_text(path: Path, problems: Problems) -> str | None:
    """Text of a file, or None and a problem: missing, no file, too large, empty, not UTF-8."""
    place, raw = None, b""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            with open(path, "rb") as file:
                raw = file.read(MAX_BYTES + 1)
            if len(raw) <= MAX_BYTES:
                return raw.decode("utf-8-sig")
            large = f"is larger than {MAX_BYTES / 1e6:g} MB"
            reason = f"{large}; a profile or an engine has a few kB; a profile's arrays belong in the .npz beside it"
        else:
            reason = f"is {'a folder' if stat.S_ISDIR(mode) else 'no regular file'}; expected a YAML file"
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        place = Node("scalar", before.count(b"\n") + 1, error.start - before.rfind(b"\n"))
        reason = f"byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8"
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = f"cannot be read ({getattr(error, 'strerror', None) or error}); expected a YAML file"
    problems.add(place, "file", reason)
    return None


def parse_yaml(text: str, problems: Problems) -> Node | None:
    """A YAML text to its tree; None where it is empty, and None and a problem where it is refused."""
    import yaml  # late: 25 ms that a run without a profile need not pay

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return _Parser(yaml, yaml.parse(text, Loader=loader), problems).root()
    except _Refused as refused:
        mark, key, reason = refused.args
        problems.add(_place(mark), key, reason)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = str(error.problem or error.context or "cannot be read")
        line = text.split("\n")[mark.line] if mark and mark.line <= text.count("\n") else ""
        tab = "\t" in line[: mark.column + 1] if mark else False
        hint = "indent with spaces, not tabs" if tab else "check quotes, colons and indentation"
        problems.add(_place(mark) if mark else None, "yaml", f"{said}; {hint}")
    except yaml.YAMLError as error:
        problems.add(None, "yaml", f"{str(error).splitlines()[0]}; expected plain YAML text")
    return None


def _place(mark: Any) -> Node:
    return Node("scalar", mark.line + 1, mark.column + 1)


class _Refused(Exception):
    """Parsing stops: mark, key and reason."""


class _Parser:
    """Events of PyYAML to nodes."""

    def __init__(self, yaml: Any, events: Iterator[Any], problems: Problems) -> None:
        self.yaml, self.events, self.problems = yaml, events, problems

    def root(self) -> Node | None:
        root = None
        for event in self.events:
            if isinstance(event, self.yaml.NodeEvent):
                root = self.node(event, "", 0)
            elif root is not None and isinstance(event, self.yaml.DocumentStartEvent):
                raise _Refused(event.start_mark, "", "holds more than one YAML document; expected one")
        return root

    def node(self, event: Any, path: str, depth: int, is_key: bool = False) -> Node:
        line, column = event.start_mark.line + 1, event.start_mark.column + 1
        if event.anchor is not None:
            hint = "write the value out, or quote it if it is text"
            raise _Refused(event.start_mark, path, f"anchors (&) and aliases (*) are not allowed; {hint}")
        if event.tag is not None:
            raise _Refused(
                event.start_mark, path, f"tags are not allowed, got {str(event.tag)[:60]}; write plain values"
            )
        if isinstance(event, self.yaml.ScalarEvent):
            return Node("scalar", line, column, text=event.value, quoted=bool(event.style))
        if depth >= MAX_DEPTH:
            raise _Refused(event.start_mark, path, f"is nested deeper than {MAX_DEPTH} levels")
        if is_key:
            raise _Refused(event.start_mark, path, "a key must be plain text, got a list or mapping")
        if isinstance(event, self.yaml.SequenceStartEvent):
            items: list[Node] = []
            while not isinstance(inner := next(self.events), self.yaml.SequenceEndEvent):
                items.append(self.node(inner, join(path, str(len(items))), depth + 1))
            return Node("list", line, column, items=tuple(items))
        entries: dict[str, tuple[Node, Node]] = {}
        while not isinstance(inner := next(self.events), self.yaml.MappingEndEvent):
            key = self.node(inner, path, depth + 1, is_key=True)
            at = join(path, key.text)
            value = self.node(next(self.events), at, depth + 1)
            first = entries.setdefault(key.text, (key, value))[0]
            if first is not key:
                self.problems.add(key, at, f"is given twice, first on line {first.line}; keep one")
        return Node("mapping", line, column, entries=entries)
