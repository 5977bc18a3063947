"""Fields of a YAML tree to checked values: text, numbers, quantities with a unit, lists and mappings.

Use :class:`Fields` to read any YAML file of this project: it notes what is wrong with a field, and what would be right, and goes on.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable

from simulator.files.yaml import Node, Problems
from simulator.units import EXAMPLES, format_quantity, parse_quantity

_NUMBER = re.compile(r"[+-]?(?:0|[1-9]\d{0,20})(?:\.\d{0,40})?(?:[eE][+-]?\d{1,3})?", re.ASCII)
_NOT_TEXT = ("true", "false", "yes", "no", "on", "off", "null", "~", "")


class Fields:
    """Reads nodes into values; notes a problem and returns a stand-in ("" or nan) where it cannot."""

    def __init__(self, problems: Problems) -> None:
        self.problems = problems

    def mapping(self, node: Node, key: str, required: Iterable[str], optional: Iterable[str] = ()) -> dict[str, Node]:
        """Members of a mapping; notes unknown keys with the closest known one, and missing keys."""
        required, known = tuple(required), (*required, *optional)
        entries = self.any_mapping(node, key)
        if entries is None:
            return {}
        for name, (key_node, _) in entries.items():
            if name not in known:
                close = difflib.get_close_matches(name[:40], known, n=1, cutoff=0.5)
                hint = f"did you mean {close[0]}?" if close else f"expected some of {', '.join(known)}"
                self.problems.add(key_node, join(key, name), f"unknown key; {hint}")
        for name in required:
            if name not in entries:
                self.problems.add(node, join(key, name), "is missing")
        return {name: value for name, (_, value) in entries.items() if name in known}

    def any_mapping(self, node: Node, key: str) -> dict[str, tuple[Node, Node]] | None:
        if node.kind != "mapping":
            self.problems.add(node, key or "file", f"expected a mapping of key: value, got {shown(node)}")
            return None
        return node.entries

    def text(
        self,
        node: Node | None,
        key: str,
        choices: tuple[str, ...] = (),
        pattern: re.Pattern[str] | None = None,
        right: str = "",
    ) -> str:
        if node is None:
            return ""
        if node.kind != "scalar" or (
            not node.quoted and (node.text.lower() in _NOT_TEXT or _NUMBER.fullmatch(node.text))
        ):
            self.problems.add(
                node,
                key,
                f"expected text, got {shown(node)}"
                + ("; put it in quotes" if node.kind == "scalar" and node.text else ""),
            )
            return ""
        value = node.text.strip()
        if not value or not value.isprintable() or len(value) > 2000:
            self.problems.add(node, key, f"expected 1 to 2000 printable characters, got {shown(node)}")
            return ""
        if choices and value not in choices:
            close = difflib.get_close_matches(value[:40].lower(), choices, n=1, cutoff=0.5)
            self.problems.add(
                node,
                key,
                f"unknown value {shown(node)}; "
                + (f"did you mean {close[0]}? " if close else "")
                + f"Known: {', '.join(choices)}",
            )
            return ""
        if pattern is not None and not pattern.fullmatch(value):
            self.problems.add(node, key, f"expected {right}, got {shown(node)}")
            return ""
        return value

    def number(self, node: Node | None, key: str, low: float, high: float, example: str, whole: bool = False) -> float:
        """A plain finite number in [low, high]; ``nan`` where it is none."""
        if node is None:
            return math.nan
        kind = "a whole number" if whole else "a number"
        reason = ""
        if node.kind != "scalar" or node.quoted:
            reason = "remove the quotes" if node.quoted else f"write {example}"
        elif re.fullmatch(r"[+-]?0\d+", node.text):
            reason = "a leading zero reads as octal in YAML 1.1; remove it"
        elif re.fullmatch(r"[+-]?\d+(:[0-5]?\d)+", node.text):
            reason = "a colon reads as base 60 in YAML 1.1; write a plain number"
        elif node.text.lower() in ("true", "false", "yes", "no", "on", "off"):
            reason = f"that is a truth value; write {example}"
        elif not _NUMBER.fullmatch(node.text) or (whole and not float(node.text).is_integer()):
            reason = f"write {example}"
        if reason:
            self.problems.add(node, key, f"expected {kind}, got {shown(node)}: {reason}")
            return math.nan
        value = float(node.text)
        if not low <= value <= high:
            self.problems.add(node, key, f"expected {kind} from {low:g} to {high:g}, got {shown(node)}")
            return math.nan
        return value

    def quantity(self, node: Node | None, key: str, unit: str, low: float, high: float) -> float:
        """A text with a unit, in SI; ``nan`` where it is none."""
        if node is None:
            return math.nan
        if node.kind != "scalar":
            self.problems.add(
                node, key, f'expected a quantity with a unit such as "{EXAMPLES[unit]}", got a {node.kind}'
            )
            return math.nan
        try:
            value = parse_quantity(node.text, unit)
        except ValueError as error:
            self.problems.add(node, key, str(error))
            return math.nan
        if not low <= value <= high:
            span = f"{format_quantity(low, unit)} to {format_quantity(high, unit)}"
            self.problems.add(node, key, f"expected {span}, got {shown(node)}")
            return math.nan
        return value

    def listed(self, node: Node | None, key: str) -> tuple[Node, ...]:
        if node is None:
            return ()
        if node.kind != "list":
            self.problems.add(node, key, f"expected a list, got {shown(node)}")
            return ()
        return node.items


def join(path: str, key: str) -> str:
    short = key if len(key) <= 40 else key[:40] + "..."
    short = short if short.strip() and short.isprintable() else repr(short)
    return f"{path}.{short}" if path else short


def shown(node: Node) -> str:
    return "nothing" if node.kind == "scalar" and not node.text and not node.quoted else str(node)
