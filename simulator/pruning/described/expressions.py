"""Read and compute the expressions of a method file: :class:`Expression` and :class:`Condition`.

Python's parser reads the text. Only the operations of this module are accepted, and no code is run.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np

from simulator.arrays import Array
from simulator.errors import InputError, one_line
from simulator.files.fields import did_you_mean

MOST_CHARACTERS = 200
MOST_DEPTH = 40  # operations inside one another
MOST_EXPONENT = 64.0

# the sparsity, sizes of the model or of a layer, and sizes of the request and the pass; "visible":
# keys that a query sees at most; "kept": tokens or positions of a prompt that stay; "devices":
# devices that share each layer
NAMES: tuple[str, ...] = (
    *("s", "hidden", "inner", "vocab", "heads", "kv_heads", "head_dim", "experts", "top_k"),
    *("layers", "layer", "bytes", "weight_bytes", "attention_share", "mlp_share"),
    *("batch", "seq", "tokens", "keys", "visible", "kept", "devices"),
)

# a number, a name, or an operation and its arguments
Tree = float | str | tuple[Any, ...]

_ROUNDING = 1e-9  # ceil(0.7 * 10) is 7, although 1 - 0.3 in floating point is above 0.7


def _up(x: Array) -> Array:
    return np.ceil(x - _ROUNDING * np.abs(x))


def _down(x: Array) -> Array:
    return np.floor(x + _ROUNDING * np.abs(x))


def _nearest(x: Array) -> Array:
    return _down(x + 0.5)


_OPERATORS: Mapping[type[ast.AST], Callable[..., Any]] = {
    **{ast.UAdd: np.positive, ast.USub: np.negative, ast.Add: np.add, ast.Sub: np.subtract},
    **{ast.Mult: np.multiply, ast.Div: np.divide, ast.Pow: np.power},
    **{ast.Lt: np.less, ast.LtE: np.less_equal, ast.Gt: np.greater, ast.GtE: np.greater_equal},
    ast.Eq: np.equal,
}
_PAIRS: Mapping[str, Callable[..., Any]] = {"min": np.minimum, "max": np.maximum}
_CALLS: Mapping[str, Callable[..., Any]] = {
    **{"ceil": _up, "floor": _down, "round": _nearest, "sqrt": np.sqrt, "log": np.log},
    **_PAIRS,
}
_KNOWN = (
    "numbers, names, + - * / **, ceil(x), floor(x), round(x), sqrt(x), log(x), min(x, y) or"
    " max(x, y)"
)
# names and numbers, which no letter follows (Python's parser warns of 1if), and signs
_SIGNS = re.compile(
    r"(?:(?:[A-Za-z_]\w*|\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)(?![\w.])|[.,()+*/<>= -])*", re.ASCII
)


@dataclass(frozen=True)
class Expression:
    """A formula of the sparsity and of sizes. Expressions with equal texts are equal."""

    text: str
    tree: Tree = field(compare=False, repr=False)

    @classmethod
    def parse(cls, text: str) -> Expression:
        """Return the expression of a text; InputError with the part that is not understood."""
        text, node = _parsed(text)
        return cls(text, _tree(text, node))

    def __str__(self) -> str:
        return self.text

    @property
    def names(self) -> frozenset[str]:
        return frozenset(_names(self.tree))

    @property
    def constant(self) -> float | None:
        """Value of an expression without names; None for others."""
        return self.tree if isinstance(self.tree, float) else None

    def value(self, sizes: Mapping[str, Any]) -> Any:
        """Return a number, or an array if a size is one; InputError unless it is finite."""
        found = _value(self.text, self.tree, sizes)
        return found if np.ndim(found) else float(found)


class Condition(Expression):
    """Comparisons joined by ``and``, such as ``tokens > 1``; the value is 1 where all are true."""

    @classmethod
    def parse(cls, text: str) -> Condition:
        text, node = _parsed(text)
        joined = isinstance(node, ast.BoolOp) and isinstance(node.op, ast.And)
        tree: Tree = 1.0
        for one in node.values if joined else [node]:  # type: ignore[attr-defined]
            match one:
                case ast.Compare(left=left, ops=[op], comparators=[right]) if (
                    type(op) in _OPERATORS
                ):
                    compared = _OPERATORS[type(op)], _tree(text, left), _tree(text, right)
                    tree = (np.multiply, tree, compared)
                case _:
                    raise _wrong(text, "comparisons such as tokens > 1 and seq < 4096", text)
        return cls(text, tree)


def _wrong(text: str, expected: str, got: str) -> InputError:
    return InputError(f"expression {one_line(text, 80)!r}: expected {expected}, got {got}")


def _parsed(text: str) -> tuple[str, ast.expr]:
    """Return a text without surplus blanks, and its syntax tree."""
    if len(text) > MOST_CHARACTERS:
        raise _wrong(text, f"at most {MOST_CHARACTERS} characters", str(len(text)))
    text = " ".join(text.split())
    try:
        if _SIGNS.fullmatch(text):
            return text, ast.parse(text, mode="eval").body
    except (SyntaxError, MemoryError, RecursionError):
        pass
    raise _wrong(text, "a formula such as 1 - s, in quotes if it contains commas", text)


def _tree(text: str, node: ast.AST, depth: int = 0) -> Tree:
    """Return the accepted operations of a syntax tree; operations on numbers are computed."""
    if depth > MOST_DEPTH:
        raise _wrong(text, f"at most {MOST_DEPTH} operations inside one another", "more")
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return float(_value(text, (np.positive, float(number)), {}))
        case ast.Name(id=name):
            if name in NAMES:
                return name
            hint = did_you_mean(name, NAMES) or f"known names: {', '.join(NAMES)}"
            raise InputError(f"expression {one_line(text, 80)!r}: {name} is unknown; {hint}")
        case ast.UnaryOp(op=op, operand=one):
            function, parts = _OPERATORS.get(type(op)), [one]
        case ast.BinOp(left=left, op=op, right=right):
            function, parts = _OPERATORS.get(type(op)), [left, right]
        case ast.Call(func=ast.Name(id=name), args=parts, keywords=[]):
            function = _CALLS.get(name)
            if not (len(parts) > 1 if name in _PAIRS else len(parts) == 1):
                function = None
        case _:
            function = None
    if function is None:
        raise _wrong(text, _KNOWN, ast.unparse(node))
    tree = (function, *(_tree(text, part, depth + 1) for part in parts))
    numbers = all(isinstance(part, float) for part in tree[1:])
    return float(_value(text, tree, {})) if numbers else tree


def _names(tree: Tree) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, tuple):
        for part in tree[1:]:
            yield from _names(part)


def _value(text: str, tree: Tree, sizes: Mapping[str, Any]) -> Any:
    if isinstance(tree, float):
        return np.float64(tree)
    if isinstance(tree, str):
        if tree not in sizes:
            raise _wrong(text, f"some of {', '.join(sizes) or 'no names'} here", tree)
        return np.asarray(sizes[tree], dtype=np.float64)
    function, *parts = tree
    values = [_value(text, part, sizes) for part in parts]
    with np.errstate(all="ignore"):
        found = function(*values) if len(values) == 1 else reduce(function, values)
    large = function is np.power and np.abs(values[1]) > MOST_EXPONENT
    if bad := np.flatnonzero(large | ~np.isfinite(found)).tolist():
        numbers = (f"{value.flat[bad[0]]:g}" for value in np.broadcast_arrays(*values))
        got = f"{function.__name__}({', '.join(numbers)})"
        raise _wrong(text, f"a finite number, and exponents up to {MOST_EXPONENT:g}", got)
    return found
