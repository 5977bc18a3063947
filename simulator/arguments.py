"""Check arguments of the Python interface; an error is one line: argument, expected value, given
value."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeAlias, TypeVar

from simulator.errors import InputError, one_line

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, with their description in messages."""

    low: float
    high: float
    expected: str
    whole: bool = False

    def holds(self, values: Any) -> Any:
        """Return which numbers are in the range; NaN is in no range."""
        return (values >= self.low) & (values <= self.high)


MOST = 2.0**53
"""Largest whole number up to which float64 is exact."""

COUNT = Range(1.0, MOST, "whole numbers from 1 up", whole=True)
SIZE = Range(0.0, MOST, "whole numbers from 0 up", whole=True)
SHARE = Range(0.0, 1.0, "numbers from 0 to 1")
AMOUNT = Range(0.0, 1e30, "finite numbers from 0 up")
SECONDS = Range(1e-12, 1e9, "a positive time in seconds, at most 1e9")
LEVEL = Range(1e-12, 1.0 - 1e-12, "a number between 0 and 1, such as 0.9")


def number(name: str, value: Any, right: Range) -> float:
    if isinstance(value, Real) and not isinstance(value, bool):  # NumPy's numbers are registered
        with contextlib.suppress(OverflowError):
            if right.holds(found := float(value)) and not (right.whole and not found.is_integer()):
                return found
    raise wrong(name, right, value)


def whole(value: Any) -> int | None:
    """Return a whole number as an int; None for other values, including truth values."""
    try:
        return None if _is_truth(value) else operator.index(value)
    except TypeError:
        return None


def _is_truth(value: Any) -> bool:
    """Return whether a value is a truth value of Python or NumPy; importing NumPy here would take
    0.1 s."""
    return isinstance(value, bool) or (
        type(value).__module__ == "numpy" and str(getattr(value, "dtype", "")) == "bool"
    )


def is_size(value: Any) -> bool:
    """Return whether a value states the size that remains, not the fraction that is removed."""
    real = isinstance(value, Real)
    return real and bool(1 < value < 2**31 and value % 1 == 0)


def flag(name: str, value: Any) -> bool:
    if not _is_truth(value):
        raise InputError(f"{name}: expected true or false, got {shown(value)}")
    return bool(value)


def text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(f"{name}: expected a name, got {shown(value)}")
    return value


def instance(name: str, value: Any, kind: type[T], made_by: str) -> T:
    """Return a value of a class of this project, which the function ``made_by`` makes."""
    if not isinstance(value, kind):
        raise InputError(
            f"{name}: expected a {kind.__name__} (see {made_by}), got {type(value).__name__}"
        )
    return value


OneOrMore: TypeAlias = T | Sequence[T]


def listed(name: str, values: Any) -> list[Any]:
    """Return a list of one value or several; a text is one value."""
    if values is None or isinstance(values, bytes | Mapping):
        raise InputError(f"{name}: expected a value or a list, got {shown(values)}")
    if not isinstance(values, str):
        with contextlib.suppress(TypeError):
            return list(values)
    return [values]


def shown(value: Any) -> str:
    """Return a value as messages quote it; for lists nested too deeply, only the type."""
    try:
        return one_line(repr(value), 60)
    except RecursionError:
        return f"a {type(value).__name__}"


def wrong(name: str, right: Range, value: Any) -> InputError:
    return InputError(f"{name}: expected {right.expected}, got {shown(value)}")
