"""Conditions on the rows of a table, such as ``speedup > 1.3 and batch == 1``: read once, evaluated on columns, never run as code.

Use :func:`parse_filter`. Names of columns, numbers, texts, true and false; comparisons, also chained; ``in`` and ``not in`` a list;
``and``, ``or``, ``not``; ``+ - * /``. Nothing else is accepted.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError, unknown

MOST_CHARACTERS = 2000

Column = Callable[[str], NDArray[Any]]

_COMPARE: Mapping[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_ARITHMETIC: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_CONSTANTS = {"true": True, "false": False}


@dataclass(frozen=True)
class Filter:
    """A condition on columns.

    Attributes
    ----------
    text : str
        As it was written.
    names : frozenset of str
        Columns it looks at.
    """

    text: str
    names: frozenset[str]
    tree: ast.expr

    def mask(self, column: Column, size: int) -> NDArray[np.bool_]:
        """Rows for which it holds; ``column`` gives a column of ``size`` values by name."""
        with np.errstate(all="ignore"):
            value = np.asarray(_value(self.tree, column))
        return np.array(np.broadcast_to(value, (size,)), dtype=bool)


def parse_filter(text: str, columns: Mapping[str, type]) -> Filter:
    """A condition, checked.

    Parameters
    ----------
    text : str
    columns : mapping of str to {str, float, int, bool}
        Columns there are, and what they hold.

    Returns
    -------
    Filter

    Raises
    ------
    InputError
        Where it cannot be read, names no column, compares texts with numbers, or is no condition.

    Examples
    --------
    >>> f = parse_filter("speedup > 1.3 and batch == 1", {"speedup": float, "batch": int})
    >>> table = {"speedup": np.array([1.2, 1.5, 1.6]), "batch": np.array([1, 1, 8])}
    >>> f.mask(table.__getitem__, 3).tolist()
    [False, True, False]
    """
    if len(text) > MOST_CHARACTERS:
        raise InputError(f"--where: expected at most {MOST_CHARACTERS} characters, got {len(text)}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        names: set[str] = set()
        kind = _kind(tree, text, columns, names)
    except (SyntaxError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "msg", None) or str(error) or type(error).__name__
        raise InputError(
            f"--where {text!r}: cannot be read ({reason}); expected something like speedup > 1.3 and batch == 1"
        ) from None
    if kind is not bool:
        raise InputError(f"--where {text!r}: expected a condition such as speedup > 1.3, got a {_shown(kind)}")
    return Filter(text, frozenset(names), tree)


def _shown(kind: type) -> str:
    return {str: "text", bool: "condition"}.get(kind, "number")


def _kind(node: ast.expr, text: str, columns: Mapping[str, type], names: set[str]) -> type:
    """What an expression gives: ``str``, ``float`` or ``bool``; refuses what is not on the list."""

    def need(part: ast.expr, wanted: type) -> None:
        found = _kind(part, text, columns, names)
        if found is not wanted:
            raise InputError(f"--where {text!r}: {ast.unparse(part)} is a {_shown(found)}, expected a {_shown(wanted)}")

    if isinstance(node, ast.Name):
        if node.id in _CONSTANTS:
            return bool
        if node.id not in columns:
            raise unknown("--where: column", node.id, columns)
        names.add(node.id)
        kind = columns[node.id]
        return float if kind is int else kind
    if isinstance(node, ast.Constant) and type(node.value) in (str, int, float, bool):
        if type(node.value) is int:
            float(node.value)  # refuses what no column can hold
        return {str: str, bool: bool}.get(type(node.value), float)
    if isinstance(node, ast.BoolOp):
        for value in node.values:
            need(value, bool)
        return bool
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        wanted = bool if isinstance(node.op, ast.Not) else float
        need(node.operand, wanted)
        return wanted
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        need(node.left, float)
        need(node.right, float)
        return float
    if isinstance(node, ast.Compare):
        left = _kind(node.left, text, columns, names)
        for op, right in zip(node.ops, node.comparators):
            if isinstance(op, (ast.In, ast.NotIn)) and isinstance(right, (ast.List, ast.Tuple, ast.Set)) and right.elts:
                for member in right.elts:
                    need(member, left)
            elif type(op) in _COMPARE and not (left in (str, bool) and not isinstance(op, (ast.Eq, ast.NotEq))):
                need(right, left)
            else:
                raise InputError(f"--where {text!r}: cannot compare so in {ast.unparse(node)}")
        return bool
    allowed = "columns, values, comparisons, and, or, not, in, + - * /"
    raise InputError(f"--where {text!r}: {ast.unparse(node)[:60]} is not allowed; expected {allowed}")


def _value(node: ast.expr, column: Column) -> Any:
    if isinstance(node, ast.Name):
        return _CONSTANTS[node.id] if node.id in _CONSTANTS else column(node.id)
    if isinstance(node, ast.Constant):
        return float(node.value) if type(node.value) is int else node.value
    if isinstance(node, ast.BoolOp):
        join = np.logical_and if isinstance(node.op, ast.And) else np.logical_or
        out = _value(node.values[0], column)
        for value in node.values[1:]:
            out = join(out, _value(value, column))
        return out
    if isinstance(node, ast.UnaryOp):
        inner = _value(node.operand, column)
        return np.logical_not(inner) if isinstance(node.op, ast.Not) else -inner
    if isinstance(node, ast.BinOp):
        return _ARITHMETIC[type(node.op)](
            np.asarray(_value(node.left, column), dtype=np.float64), _value(node.right, column)
        )
    assert isinstance(node, ast.Compare)
    left, out = _value(node.left, column), None
    for op, comparator in zip(node.ops, node.comparators):
        if isinstance(op, (ast.In, ast.NotIn)):
            assert isinstance(comparator, (ast.List, ast.Tuple, ast.Set))
            found = _any(left == _value(member, column) for member in comparator.elts)
            step = np.logical_not(found) if isinstance(op, ast.NotIn) else found
            right: Any = None
        else:
            right = _value(comparator, column)
            step = _COMPARE[type(op)](left, right)
        out = step if out is None else np.logical_and(out, step)
        left = right
    return out


def _any(parts: Iterable[Any]) -> Any:
    out: Any = None
    for part in parts:
        out = part if out is None else np.logical_or(out, part)
    return out
