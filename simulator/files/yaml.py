"""YAML text to a tree that remembers where everything stood, with nothing guessed.

PyYAML turns scalars into Python values by rules that surprise (``010`` becomes 8, ``1:30`` becomes 90, ``yes`` becomes True, ``3.35e12``
stays text, the second of two equal keys wins silently). Here a scalar stays the text that was written; the schema that reads the tree
decides what it must be. Anchors, aliases, tags, several documents and duplicate keys are refused, and depth and size are bounded, so a
file from the internet can neither run code nor grow in memory.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simulator.errors import InputError, one_line

MAX_BYTES = 1_000_000
MAX_DEPTH = 20


@dataclass(frozen=True)
class Node:
    """A scalar, list or mapping of a YAML file.

    Attributes
    ----------
    kind : str
        "scalar", "list" or "mapping".
    line, column : int
        Where it starts, counted from 1.
    text : str
        What a scalar says.
    quoted : bool
        Whether the scalar was in quotes, so that ``"132"`` and ``132`` can be told apart.
    items : tuple of Node
        Members of a list.
    entries : mapping of str to (Node, Node)
        Members of a mapping: the node of the key, that of the value.
    """

    kind: str
    line: int
    column: int
    text: str = ""
    quoted: bool = False
    items: tuple[Node, ...] = ()
    entries: dict[str, tuple[Node, Node]] = field(default_factory=dict)

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
        """Note one problem at a node (None: at the start of the file)."""
        self._found.append((node.line if node else 1, node.column if node else 1, key, " ".join(reason.split())))

    def __len__(self) -> int:
        return len(self._found)

    @property
    def lines(self) -> list[str]:
        """One line a problem, in the order of the file."""
        found = sorted(self._found, key=lambda p: p[:2])
        return [one_line(f"{self.file}:{line}:{column}: {key}: {reason}") for line, column, key, reason in found]

    def error(self) -> InputError:
        """The first problem, and how many more there are."""
        first, *rest = self.lines
        return InputError(first + (f" (and {len(rest)} more: prunesim hardware check {self.file})" if rest else ""))


def read_text(path: Path, problems: Problems, limit: int = MAX_BYTES) -> str | None:
    """Text of a file, or None and a problem: missing, no file, too large, empty, not UTF-8."""
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            problems.add(None, "file", "is a folder; expected a YAML file")
            return None
        if not stat.S_ISREG(status.st_mode):
            problems.add(None, "file", "is no regular file; expected a YAML file")
            return None
        with open(path, "rb") as file:
            raw = file.read(limit + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        problems.add(None, "file", f"cannot be read ({reason}); expected a YAML file")
        return None
    if len(raw) > limit:
        problems.add(
            None,
            "file",
            f"is larger than {limit / 1e6:g} MB; a profile has a few kB, arrays belong in the .npz beside it",
        )
        return None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        problems.add(
            Node("scalar", line, column), "file", f"byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8"
        )
        return None


def parse_yaml(text: str, problems: Problems) -> Node | None:
    """A YAML text to its tree; None and a problem where there is no single document without anchors, aliases and tags."""
    import yaml  # late: 25 ms that a run without a profile need not pay

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    before = len(problems)
    try:
        return _build(yaml.parse(text, Loader=loader), yaml, problems)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Node("scalar", mark.line + 1, mark.column + 1) if mark else None
        said = str(error.problem or error.context or "cannot be read")
        line = text.split("\n")[mark.line] if mark and mark.line <= text.count("\n") else ""
        tab = "\t" in line[: mark.column + 1] if mark else False
        hint = "indent with spaces, not tabs" if tab else "check quotes, colons and indentation"
        problems.add(place, "yaml", f"{said}; {hint}")
    except yaml.YAMLError as error:
        problems.add(None, "yaml", f"{str(error).splitlines()[0]}; expected plain YAML text")
    except _Refused:
        assert len(problems) > before
    return None


class _Refused(Exception):
    """Parsing stops: the problem is noted."""


@dataclass
class _Open:
    """A list or mapping whose end has not been seen."""

    node: Node
    path: str
    items: list[Node] = field(default_factory=list)
    key: Node | None = None


def _build(events: Iterable[Any], yaml: Any, problems: Problems) -> Node | None:
    root: Node | None = None
    documents = 0
    stack: list[_Open] = []
    for event in events:
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                _refuse(problems, event, "file", "holds more than one YAML document; expected one")
            continue
        if isinstance(event, (yaml.SequenceEndEvent, yaml.MappingEndEvent)):
            done = stack.pop()
            node = (
                done.node
                if done.node.kind == "mapping"
                else Node("list", done.node.line, done.node.column, items=tuple(done.items))
            )
        elif isinstance(event, yaml.NodeEvent):
            path = _path(stack)
            if event.anchor is not None:
                _refuse(
                    problems,
                    event,
                    path,
                    "anchors (&) and aliases (*) are not allowed; write the value out, or quote it if it is text",
                )
            if getattr(event, "tag", None) is not None:
                _refuse(problems, event, path, f"tags are not allowed, got {str(event.tag)[:60]}; write plain values")
            line, column = event.start_mark.line + 1, event.start_mark.column + 1
            if not isinstance(event, yaml.ScalarEvent):
                if len(stack) >= MAX_DEPTH:
                    _refuse(problems, event, path, f"is nested deeper than {MAX_DEPTH} levels")
                if stack and stack[-1].node.kind == "mapping" and stack[-1].key is None:
                    _refuse(problems, event, path, "a key must be plain text, got a list or mapping")
                kind = "list" if isinstance(event, yaml.SequenceStartEvent) else "mapping"
                stack.append(_Open(Node(kind, line, column), path))
                continue
            node = Node("scalar", line, column, text=event.value, quoted=bool(event.style))
        else:
            continue
        if not stack:
            root = node
        else:
            _put(stack[-1], node, problems)
    return root


def _put(parent: _Open, node: Node, problems: Problems) -> None:
    if parent.node.kind == "list":
        parent.items.append(node)
    elif parent.key is None:
        parent.key = node
    else:
        key, entries = parent.key, parent.node.entries
        if key.text in entries:
            first = entries[key.text][0]
            problems.add(key, _join(parent.path, key.text), f"is given twice, first on line {first.line}; keep one")
        else:
            entries[key.text] = (key, node)
        parent.key = None


def _path(stack: list[_Open]) -> str:
    if not stack:
        return "file"
    last = stack[-1]
    if last.node.kind == "list":
        return _join(last.path, str(len(last.items)))
    return _join(last.path, last.key.text) if last.key is not None else last.path


def _join(path: str, key: str) -> str:
    short = key if len(key) <= 40 else key[:40] + "..."
    short = short if short.strip() and short.isprintable() else repr(short)
    return short if path == "file" else f"{path}.{short}"


def _refuse(problems: Problems, event: Any, key: str, reason: str) -> None:
    problems.add(Node("scalar", event.start_mark.line + 1, event.start_mark.column + 1), key, reason)
    raise _Refused
