"""Whether the arrays of a profile's section are what its cost model reads: names, shapes and values.

A profile may come from anywhere. What passes :func:`check_arrays` cannot fail in a cost model, nor make a time that is
zero, infinite or no number; what does not is refused when the profile is read, with one line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.hardware.constants import AXES, CLASSES, EXACT_BITS, EXACT_NAMES, FIRST_CLASSES

Arrays = Mapping[str, NDArray[Any]]

MOST_LOG = 5.0
"""Largest log factor between a model and a measurement that is taken at face value: a factor of 148."""

_MOST_PLACE = 1e6  # coordinates are logarithms, indices and shares: none is near
_LEAST_STEP = 1e-3


def check_arrays(operator: str, arrays: Arrays) -> None:
    """Refuse (ValueError, one line) arrays that the cost model of an operator could not use; names it does not know are
    left alone.

    >>> check_arrays("elementwise", {"start": np.array(14.0), "values": np.zeros((7, 4))})
    >>> check_arrays("elementwise", {"values": np.zeros((7, 4))})
    Traceback (most recent call last):
    ValueError: array start is missing beside values
    """
    if operator == "gemm":
        if "exact_m" in arrays:
            check_exact(arrays)
            _bound(arrays, "exact_log_half", 0.0, MOST_LOG)
            _bound(arrays, "exact_s", 1e-12, 1e9)
        if "terms" in arrays:
            _check_lattices(arrays)
    elif "values" in arrays and operator != "runtime":
        _check_values(operator, arrays)


def check_exact(arrays: Arrays) -> None:
    """Refuse exact shapes that could not be looked up: an array missing, other lengths, dimensions or times that are
    none."""
    if missing := [name for name in EXACT_NAMES if name not in arrays]:
        raise ValueError(f"exact shapes: array {missing[0]} is missing")
    *shape, seconds, log_half = (np.asarray(arrays[name], dtype=np.float64) for name in EXACT_NAMES)
    if seconds.ndim != 1 or any(a.shape != seconds.shape for a in (*shape, log_half)):
        found = [np.shape(arrays[name]) for name in EXACT_NAMES]
        raise ValueError(f"exact shapes: expected arrays of one length, got {found}")
    if not all(((a >= 1) & (a < 2.0**bits) & (a == np.floor(a))).all() for a, bits in zip(shape, EXACT_BITS)):
        raise ValueError("exact shapes: m, n and k must be whole numbers from 1 to 2^22, 2^21 and 2^21")
    if not ((seconds > 0) & np.isfinite(seconds) & (log_half >= 0) & np.isfinite(log_half)).all():
        raise ValueError("exact shapes: times must be above zero, half-widths at least zero")


def _check_lattices(arrays: Arrays) -> None:
    """Lattices of a GEMM residual, in turn: codes of their axes, then start, step and nodes of each, then values."""
    _need(arrays, "terms", "grids", "values", "measured_m")
    terms, values = arrays["terms"], arrays["values"]
    grids = np.asarray(arrays["grids"], dtype=np.float64)
    _shape("terms", terms, terms.ndim == 2 and 1 <= terms.shape[1] <= 3 and len(terms) >= 1, "(lattices, up to 3)")
    _shape("grids", grids, grids.shape == (*terms.shape, 3), f"{(*terms.shape, 3)}")
    used = terms >= 0
    if terms.dtype.kind not in "iu" or terms.min() < -1 or terms.max() >= len(AXES) or not used.any(axis=1).all():
        raise ValueError(f"array terms: expected whole numbers from -1 to {len(AXES) - 1}, at least one axis a lattice")
    start, step, nodes = grids[used].T
    if not ((np.abs(start) <= _MOST_PLACE) & (step >= _LEAST_STEP) & (step <= _MOST_PLACE)).all():
        expected = f"starts within {_MOST_PLACE:g} and steps from {_LEAST_STEP:g} to {_MOST_PLACE:g}"
        raise ValueError(f"array grids: expected {expected}")
    _shape("values", values, values.ndim == 1, "(nodes,)")
    if not ((nodes >= 2) & (nodes <= values.size) & (nodes == np.floor(nodes))).all():
        expected = "whole numbers of nodes, at least 2 on each axis and no more than there are values"
        raise ValueError(f"array grids: expected {expected}")
    if float(np.where(used, grids[..., 2], 1.0).prod(axis=1).sum()) != values.size:
        raise ValueError("array values: expected as many values as the grids have nodes")
    _bound(arrays, "values", -MOST_LOG, MOST_LOG)
    measured = arrays["measured_m"]
    _shape("measured_m", measured, measured.ndim == 1 and measured.size >= 1, "(sizes,)")
    _bound(arrays, "measured_m", 1.0, 2.0**31)


def _check_values(operator: str, arrays: Arrays) -> None:
    """The lattice of attention, over three coordinates, or that of each class of elementwise operators, over one."""
    values = arrays["values"]
    if operator == "elementwise":
        _need(arrays, "values", "start")
        good = values.ndim == 2 and FIRST_CLASSES <= values.shape[0] <= len(CLASSES) and values.shape[1] >= 1
        _shape("values", values, good, f"({len(CLASSES)}, nodes)")
        _shape("start", arrays["start"], arrays["start"].shape == (), "a single number")
    else:
        _need(arrays, "values", "start", "step")
        _shape("values", values, values.ndim == 3 and values.size > 0, "(a, b, c), at least one each")
        for name in ("start", "step"):
            _shape(name, arrays[name], arrays[name].shape == (3,), "(3,)")
    _bound(arrays, "values", -MOST_LOG, MOST_LOG)
    _bound(arrays, "start", -_MOST_PLACE, _MOST_PLACE)
    if operator != "elementwise":
        _bound(arrays, "step", _LEAST_STEP, _MOST_PLACE)


def _need(arrays: Arrays, first: str, *others: str) -> None:
    for name in others:
        if name not in arrays:
            raise ValueError(f"array {name} is missing beside {first}")


def _shape(name: str, array: NDArray[Any], good: bool, expected: str) -> None:
    if not good:
        raise ValueError(f"array {name}: expected the shape {expected}, got {np.shape(array)}")


def _bound(arrays: Arrays, name: str, low: float, high: float) -> None:
    array = np.asarray(arrays[name], dtype=np.float64)
    if array.size and not (low <= array.min() and array.max() <= high):
        found = f"{array.min():g} to {array.max():g}"
        raise ValueError(f"array {name}: expected values from {low:g} to {high:g}, got {found}")
