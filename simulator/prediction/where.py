"""Parse conditions on the rows of a table, such as ``speedup > 1.3 and batch == 1``, and evaluate them on columns.

Use :func:`parse_filter`. It accepts names of columns, numbers, texts, true and false; comparisons, also chained; ``in``
and ``not in`` a list; ``and``, ``or``, ``not``; ``+ - * /``. Conditions are never run as code.
"""

from __future__ import annotations

import ast
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError, unknown

MOST_CHARACTERS = 2000

ColumnByName = Callable[[str], NDArray[Any]]
Expression = Callable[[ColumnByName], Any]
Filter = Callable[[ColumnByName, int], NDArray[np.bool_]]
"""Function from columns by name and the number of rows to the rows for which a condition holds."""

# fmt: off
_OPERATORS: Mapping[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.Eq: operator.eq, ast.NotEq: operator.ne,
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.And: np.logical_and, ast.Or: np.logical_or,
}
# fmt: on
_CONSTANTS = {"true": True, "false": False}
_SHOWN = {str: "text", bool: "condition", float: "number"}


def parse_filter(text: str, columns: Mapping[str, type]) -> Filter:
    """Parse and check a condition; ``columns`` maps names to the types ``str``, ``float``, ``int`` or ``bool``.

    Raises InputError for invalid syntax, unknown columns, comparisons of text with numbers, and other expressions.

    >>> f = parse_filter("speedup > 1.3 and batch == 1", {"speedup": float, "batch": int})
    >>> table = {"speedup": np.array([1.2, 1.5, 1.6]), "batch": np.array([1, 1, 8])}
    >>> f(table.__getitem__, 3).tolist()
    [False, True, False]
    """
    if len(text) > MOST_CHARACTERS:
        raise InputError(f"--where: expected at most {MOST_CHARACTERS} characters, got {len(text)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # such as "1and", deprecated in Python 3.10: rejected
            parsed = ast.parse(text.strip(), mode="eval")
        kind, value = _Reader(text, columns).read(parsed.body)
    except InputError:
        raise
    except (SyntaxError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        reason = getattr(error, "msg", None) or str(error) or type(error).__name__
        example = "expected a condition such as speedup > 1.3 and batch == 1"
        raise InputError(f"--where {text!r}: cannot be read ({reason}); {example}") from None
    if kind is not bool:
        raise InputError(f"--where {text!r}: expected a condition such as speedup > 1.3, got a {_SHOWN[kind]}")

    def mask(column: ColumnByName, size: int) -> NDArray[np.bool_]:
        with np.errstate(all="ignore"):
            return np.array(np.broadcast_to(np.asarray(value(column)), (size,)), dtype=bool)

    return mask


@dataclass(frozen=True)
class _Reader:
    """Translate expressions to their type (``str``, ``float`` or ``bool``) and a function that evaluates them."""

    text: str
    columns: Mapping[str, type]

    def read(self, node: ast.expr) -> tuple[type, Expression]:
        if isinstance(node, ast.Name):
            return self.name(node.id)
        if isinstance(node, ast.Constant) and type(node.value) in (str, int, float, bool):
            # float() rejects whole numbers that no column can hold
            constant = float(node.value) if type(node.value) is int else node.value
            return type(constant), lambda _: constant
        if isinstance(node, ast.BoolOp):
            join, parts = _OPERATORS[type(node.op)], self.all(node.values, bool)
            return bool, lambda column: reduce(join, [part(column) for part in parts])
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
            kind, change = (bool, np.logical_not) if isinstance(node.op, ast.Not) else (float, operator.neg)
            (inner,) = self.all([node.operand], kind)
            return kind, lambda column: change(inner(column))
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            combine, (left, right) = _OPERATORS[type(node.op)], self.all([node.left, node.right], float)
            return float, lambda column: combine(np.asarray(left(column), dtype=np.float64), right(column))
        if isinstance(node, ast.Compare):
            return bool, self.comparison(node)
        allowed = "columns, values, comparisons, and, or, not, in, + - * /"
        raise self.refusal(f"{ast.unparse(node)[:60]} is not allowed; expected {allowed}")

    def name(self, name: str) -> tuple[type, Expression]:
        if name in _CONSTANTS:
            return bool, lambda _: _CONSTANTS[name]
        if name not in self.columns:
            raise unknown("--where: column", name, self.columns)
        kind = self.columns[name]
        return (float if kind is int else kind), lambda column: column(name)

    def all(self, nodes: Sequence[ast.expr], wanted: type) -> list[Expression]:
        """Return values of one type."""
        found = []
        for node in nodes:
            kind, value = self.read(node)
            if kind is not wanted:
                raise self.refusal(f"{ast.unparse(node)} is a {_SHOWN[kind]}, expected a {_SHOWN[wanted]}")
            found.append(value)
        return found

    def comparison(self, node: ast.Compare) -> Expression:
        """Return one comparison or a chain, each with the previous value."""
        kind, left = self.read(node.left)
        steps: list[Expression] = []
        for op, right in zip(node.ops, node.comparators):
            if isinstance(op, (ast.In, ast.NotIn)) and isinstance(right, (ast.List, ast.Tuple, ast.Set)) and right.elts:
                steps.append(partial(_member, left, self.all(right.elts, kind), isinstance(op, ast.NotIn)))
            elif type(op) in _OPERATORS and (kind is float or isinstance(op, (ast.Eq, ast.NotEq))):
                (value,) = self.all([right], kind)
                steps.append(partial(_pair, _OPERATORS[type(op)], left, value))
                left = value
            else:
                raise self.refusal(f"unsupported comparison in {ast.unparse(node)}")
        return lambda column: reduce(np.logical_and, [step(column) for step in steps])

    def refusal(self, why: str) -> InputError:
        return InputError(f"--where {self.text!r}: {why}")


def _pair(compare: Callable[[Any, Any], Any], left: Expression, right: Expression, column: ColumnByName) -> Any:
    return compare(left(column), right(column))


def _member(left: Expression, members: Sequence[Expression], negated: bool, column: ColumnByName) -> Any:
    found = reduce(np.logical_or, [left(column) == member(column) for member in members])
    return np.logical_not(found) if negated else found
