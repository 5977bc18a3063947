"""Types of arrays, and checks of arguments that are arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.arguments import Range, shown, wrong
from simulator.errors import InputError

Array = NDArray[Any]
"""An array of any type: numbers in float32 or float64, codes, names."""

FloatArray = NDArray[np.float64]
"""Numbers in SI units, unless a name states another unit."""

IndexArray = NDArray[np.intp]
"""Indices into the rows of another array."""

CodeArray = NDArray[np.int8]
"""One code of an enumeration per row."""

BoolArray = NDArray[np.bool_]
"""One truth value per row."""


def array(name: str, value: Any, right: Range) -> FloatArray:
    """Return numbers as float64 with their shape; truth values, text and complex numbers are
    rejected."""
    given = plain(value)
    if given.dtype.kind not in "iuf":
        raise wrong(name, right, value)
    found = given.astype(np.float64, copy=False)
    if found.size:
        low, high = found.min(), found.max()
        fractions = right.whole and given.dtype.kind == "f" and not (np.rint(found) == found).all()
        if fractions or not (right.low <= low and high <= right.high):  # NaN is in no range
            bad = ~right.holds(found) | (right.whole & (np.rint(found) != found))
            raise wrong(name, right, given[bad].flat[0].item())
    return found


def truths(name: str, value: Any) -> BoolArray:
    """Return truth values with their shape."""
    if (given := plain(value)).dtype != np.bool_:
        raise InputError(f"{name}: expected true or false, got {shown(value)}")
    return given


def plain(value: Any) -> Array:
    """Return a value as an array; for lists of unequal lengths, an array of None."""
    try:
        return np.asarray(value)
    except ValueError:
        return np.asarray(None)


def together(**arrays: Array) -> list[Array]:
    """Return arrays broadcast to one shape."""
    if len({a.shape for a in arrays.values()}) == 1:
        return list(arrays.values())
    try:
        return list(np.broadcast_arrays(*arrays.values()))
    except ValueError:
        shapes = {name: str(a.shape) for name, a in arrays.items() if a.ndim}
        expected = f"{', '.join(shapes)}: expected shapes that broadcast"
        raise InputError(f"{expected}, got {', '.join(shapes.values())}") from None
