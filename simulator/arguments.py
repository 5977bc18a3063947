"""Check arguments of the Python interface; an error is one line: argument, expected value, given value."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from simulator.arrays import FloatArray
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
        """Return which numbers are in the range; NaN never is."""
        inside = (values >= self.low) & (values <= self.high)
        return inside & (np.rint(values) == values) if self.whole else inside


MOST = 2.0**53
"""Largest whole number up to which float64 is exact."""

COUNT = Range(1.0, MOST, "whole numbers from 1 up", whole=True)
SIZE = Range(0.0, MOST, "whole numbers from 0 up", whole=True)
SHARE = Range(0.0, 1.0, "numbers from 0 to 1")
AMOUNT = Range(0.0, 1e30, "finite numbers from 0 up")
SECONDS = Range(1e-12, 1e9, "a positive time in seconds, at most 1e9")
LEVEL = Range(1e-12, 1.0 - 1e-12, "a number between 0 and 1, such as 0.9")


def array(name: str, value: Any, right: Range) -> FloatArray:
    """Return numbers as float64 with their shape; truth values, text and complex numbers are rejected."""
    given = plain(value)
    if given.dtype.kind not in "iuf":
        raise _wrong(name, right, value)
    found = given.astype(np.float64, copy=False)
    if found.size:
        low, high = found.min(), found.max()
        fractions = right.whole and given.dtype.kind == "f" and not (np.rint(found) == found).all()
        if fractions or not (right.low <= low and high <= right.high):  # NaN is in no range
            raise _wrong(name, right, given[~right.holds(found)].flat[0].item())
    return found


def truths(name: str, value: Any) -> NDArray[np.bool_]:
    """Return truth values with their shape."""
    if (given := plain(value)).dtype != np.bool_:
        raise InputError(f"{name}: expected true or false, got {shown(value)}")
    return given


def plain(value: Any) -> NDArray[Any]:
    """Return a value as an array; for lists of unequal lengths, an array of None."""
    try:
        return np.asarray(value)
    except ValueError:
        return np.asarray(None)


def together(**arrays: NDArray[Any]) -> list[NDArray[Any]]:
    """Broadcast arrays to one shape."""
    if len({a.shape for a in arrays.values()}) == 1:
        return list(arrays.values())
    try:
        return list(np.broadcast_arrays(*arrays.values()))
    except ValueError:
        shapes = {name: str(a.shape) for name, a in arrays.items() if a.ndim}
        expected = f"{', '.join(shapes)}: expected shapes that broadcast"
        raise InputError(f"{expected}, got {', '.join(shapes.values())}") from None


def number(name: str, value: Any, right: Range) -> float:
    """Return one number."""
    if isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            if right.holds(found := float(value)):
                return found
    raise _wrong(name, right, value)


def whole(value: Any) -> int | None:
    """Return a whole number as an int; None for other values, also truth values."""
    try:
        return None if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        return None


def flag(name: str, value: Any) -> bool:
    """Return a truth value."""
    if not isinstance(value, bool | np.bool_):
        raise InputError(f"{name}: expected true or false, got {shown(value)}")
    return bool(value)


def text(name: str, value: Any) -> str:
    """Return a name."""
    if not isinstance(value, str):
        raise InputError(f"{name}: expected a name, got {shown(value)}")
    return value


def instance(name: str, value: Any, kind: type[T], made_by: str) -> T:
    """Return a value of a class of this project, which the function ``made_by`` makes."""
    if not isinstance(value, kind):
        raise InputError(f"{name}: expected a {kind.__name__} (see {made_by}), got {type(value).__name__}")
    return value


OneOrMore: TypeAlias = T | Sequence[T]
"""One value, or several."""


def listed(name: str, values: Any) -> list[Any]:
    """Return a list of one value or several; a text is one value."""
    if values is None or isinstance(values, bytes | Mapping):
        raise InputError(f"{name}: expected a value or a list, got {shown(values)}")
    if not isinstance(values, str):
        with contextlib.suppress(TypeError):
            return list(values)
    return [values]


def shown(value: Any) -> str:
    """Return a value as messages quote it; of lists in lists in lists, as files may have them, only the type."""
    try:
        return one_line(repr(value), 60)
    except RecursionError:
        return f"a {type(value).__name__}"


def _wrong(name: str, right: Range, value: Any) -> InputError:
    return InputError(f"{name}: expected {right.expected}, got {shown(value)}")
