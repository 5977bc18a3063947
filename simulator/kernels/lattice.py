"""The fitted residual of the GEMM model: a sum of multilinear lattices, each over a few coordinates of a shape, as a log factor of the
analytic time.

The first lattice, over log2 of (m, n, k), is smooth and carries over between software stacks. The others are in coordinates of the
kernel (waves, tiles, core
time, alignment of m): they hold what one stack's kernel choice does and are kept for that stack only (:func:`smooth_arrays`).
Use :func:`residual_of` to read a profile's arrays, ``Residual.at`` to evaluate; a fit builds its design from :func:`coordinates`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.hardware.constants import AXES
from simulator.kernels.gemm_core import Core, CoreTime

F = NDArray[np.floating[Any]]


EDGE = 1.0001
"""How far before the last node a coordinate stops, so that it belongs to the last cell."""
M_TABLE = 32769
"""Sizes m with a tabled place among the measured ones; larger ones take the last."""


@dataclass(frozen=True)
class Term:
    """One lattice: axes, first node and nodes per unit of each, sizes, and values with the last axis fastest."""

    axes: tuple[str, ...]
    start: tuple[float, ...]
    inverse: tuple[float, ...]
    shape: tuple[int, ...]
    values: F

    @cached_property
    def corners(self) -> F:
        """Values of the corners of the cell that begins at each node, (2^axes, nodes), the first axis's far side in the second half."""
        strides = [int(np.prod(self.shape[i + 1 :])) for i in range(len(self.shape))]
        offsets = [0]
        for stride in reversed(strides):
            offsets += [stride + o for o in offsets]
        padded = np.concatenate([np.ravel(self.values), np.zeros(max(offsets), dtype=self.values.dtype)])
        return np.stack([padded[o : o + self.values.size] for o in offsets])


@dataclass(frozen=True)
class Residual:
    """The lattices of a profile."""

    terms: tuple[Term, ...]
    m_places: F
    m_steps: F | None = None

    def at(self, m: F, n: F, k: F, parts: CoreTime, core: Core) -> F:
        """Log factor of each shape; beyond a lattice that of its edge.

        Parameters
        ----------
        m, n, k : float arrays (x,)
        parts : CoreTime
            Of these shapes.
        core : Core

        Returns
        -------
        array (x,)
        """
        return self._layout.at(Coordinates(m, n, k, parts, core, self.m_places, self.m_steps))

    @cached_property
    def _layout(self) -> _Layout:
        return _layout(self.terms)


class Coordinates:
    """Coordinates of shapes, each worked out once, when first asked for."""

    def __init__(self, m: F, n: F, k: F, parts: CoreTime, core: Core, m_places: F, m_steps: F | None = None) -> None:
        self.m, self.n, self.k, self.parts, self.core, self.m_places, self.m_steps = (
            m,
            n,
            k,
            parts,
            core,
            m_places,
            m_steps,
        )
        self.sm = float(core.machine.sm_count)
        self._known: dict[str, F] = {}
        self._cells: dict[tuple[str, float, float, int], tuple[NDArray[np.int32], F]] = {}

    def __getitem__(self, axis: str) -> F:
        found = self._known.get(axis)
        if found is None:
            found = self._known[axis] = _MAKE[axis](self)
        return found

    def cell(self, axis: str, start: float, inverse: float, size: int) -> tuple[NDArray[np.int32], F]:
        """Cell of each shape along an axis, and how far into it."""
        key = (axis, start, inverse, size)
        found = self._cells.get(key)
        if found is None:
            u = self[axis] - start
            u *= inverse
            np.maximum(u, 0.0, out=u)
            np.minimum(u, size - EDGE, out=u)
            cell = u.astype(np.int32)
            u -= cell
            found = self._cells[key] = cell, u
        return found


def _waves(c: Coordinates, bm: float, bn: float) -> F:
    out = np.ceil(c.m * (1.0 / bm))
    out *= np.ceil(c.n * (1.0 / bn))
    out /= c.sm
    return np.asarray(out)


def _idle(waves: F) -> F:
    whole = np.ceil(waves)
    return np.asarray((whole - waves) / whole)


def _m_step(c: Coordinates) -> F:
    if c.m_steps is not None:
        return np.asarray(c.m_steps.take(np.minimum(c.m, M_TABLE - 1.0).astype(np.int32)))
    whole = c.m.astype(np.int32)
    low = whole & 63
    out = ((whole & 1) == 0).astype(c.m.dtype)
    out += (low & 7) == 0
    out += low == 0
    return np.asarray(out)


def _last128(c: Coordinates) -> F:
    waves = _waves(c, 128.0, 128.0)
    return np.asarray(waves - np.ceil(waves) + 1.0)


_MAKE: Mapping[str, Callable[[Coordinates], F]] = MappingProxyType(
    {
        "m": lambda c: np.log2(c.m),
        "n": lambda c: np.log2(c.n),
        "k": lambda c: np.log2(c.k),
        "nk": lambda c: c["n"] + c["k"],
        "mk": lambda c: c["m"] + c["k"],
        "mn": lambda c: c["m"] + c["n"],
        "aspect": lambda c: c["n"] - c["k"],
        "time": lambda c: c.parts.log2_us,
        "tiles": lambda c: np.log2(c.parts.tiles / c.sm),
        "blocks": lambda c: np.log2(c.parts.tiles * c.parts.split / c.sm),
        "tile": lambda c: c.parts.tile.astype(c.m.dtype),
        "m_step": _m_step,
        "m_exact": lambda c: c.m_places.take(np.minimum(c.m, M_TABLE - 1.0).astype(np.int32)),
        "tiles64": lambda c: np.log2(_waves(c, 64.0, 64.0)),
        "idle256": lambda c: _idle(_waves(c, 128.0, 256.0)),
        "last128": _last128,
        "idle": lambda c: _idle(c.parts.tiles * c.parts.split / c.sm),
    }
)
assert tuple(_MAKE) == AXES  # a code in a file means its position


@dataclass(frozen=True)
class _Group:
    """Lattices of one number of axes: rows of the cells each reads, strides of its nodes, and the corners of its cells."""

    rows: tuple[NDArray[np.intp], ...]  # per axis, one a lattice
    strides: tuple[NDArray[np.int32], ...]
    corners: tuple[F, ...]


@dataclass(frozen=True)
class _Layout:
    """All lattices, arranged so that one NumPy call serves many: a few shapes cost little more than one call's overhead."""

    axes: tuple[str, ...]
    start: F
    inverse: F
    last: F
    groups: tuple[_Group, ...]

    def at(self, known: Coordinates) -> F:
        """Sum of the lattices at shapes."""
        dtype = known.m.dtype
        inside = np.empty((len(self.axes), len(known.m)), dtype=dtype)
        for row, axis in zip(inside, self.axes, strict=True):
            row[:] = known[axis]
        inside -= self.start.astype(dtype, copy=False)
        inside *= self.inverse.astype(dtype, copy=False)
        np.maximum(inside, 0.0, out=inside)
        np.minimum(inside, self.last.astype(dtype, copy=False), out=inside)
        cells = inside.astype(np.int32)
        inside -= cells
        total = np.zeros(len(known.m), dtype=dtype)
        for group in self.groups:
            base = cells[group.rows[0]]
            base *= group.strides[0]
            for rows, stride in zip(group.rows[1:], group.strides[1:], strict=True):
                more = cells[rows]
                more *= stride
                base += more
            found = np.empty((len(base), len(group.corners[0]), len(known.m)), dtype=dtype)
            for corners, index, out in zip(group.corners, base, found, strict=True):
                corners.take(index, axis=1, mode="clip", out=out)
            for rows in group.rows:
                half = found.shape[1] // 2
                low, high = found[:, :half], found[:, half:]
                high -= low
                high *= inside[rows][:, None]
                low += high
                found = low
            total += np.add.reduce(found[:, 0], axis=0)
        return total


def _layout(terms: tuple[Term, ...]) -> _Layout:
    keys: dict[tuple[str, float, float, int], int] = {}
    for term in terms:
        for key in zip(term.axes, term.start, term.inverse, term.shape, strict=True):
            keys.setdefault(key, len(keys))
    groups = []
    for count in sorted({len(t.axes) for t in terms}):
        own = [t for t in terms if len(t.axes) == count]
        rows = tuple(
            np.array([keys[t.axes[i], t.start[i], t.inverse[i], t.shape[i]] for t in own]) for i in range(count)
        )
        strides = tuple(np.array([[int(np.prod(t.shape[i + 1 :]))] for t in own], dtype=np.int32) for i in range(count))
        groups.append(_Group(rows, strides, tuple(t.corners for t in own)))
    dtype = terms[0].values.dtype

    def column(values: list[float]) -> F:
        return np.array(values, dtype=dtype)[:, None]

    return _Layout(
        tuple(key[0] for key in keys),
        column([key[1] for key in keys]),
        column([key[2] for key in keys]),
        column([key[3] - EDGE for key in keys]),
        tuple(groups),
    )


def m_places(measured: F) -> F:
    """Place of every m among measured ones, by whole m up to :data:`M_TABLE`: first those that are no multiple of 8 or below 16, then
    the multiples.

    Two rows of places, because kernels treat the two apart: 300 lies between unaligned neighbours, 304 between aligned ones, and each
    is interpolated on
    log2 m.

    >>> p = m_places(np.array([1.0, 2.0, 17.0, 33.0, 16.0, 32.0]))
    >>> p[[1, 2, 33, 16, 32]].tolist(), bool(4 < p[24] < 5)
    ([0.0, 1.0, 3.0, 4.0, 5.0], True)
    """
    known = np.unique(np.rint(measured))
    whole = np.arange(M_TABLE, dtype=np.float64)
    whole[0] = 1.0

    def stepped(m: F) -> NDArray[np.bool_]:
        return np.asarray((m >= 16.0) & (np.fmod(m, 8.0) == 0.0))

    plain, aligned = known[~stepped(known)], known[stepped(known)]
    logs = np.log2(whole)
    low = np.interp(logs, np.log2(plain), np.arange(len(plain))) if len(plain) else np.zeros(M_TABLE)
    high = np.interp(logs, np.log2(aligned), np.arange(len(aligned))) + len(plain) if len(aligned) else low
    return np.where(stepped(whole), high, low) if len(plain) else high


def between_measured(residual: Residual, measured: F) -> Residual:
    """The same residual for predicting: unchanged at every measured m, and led from one to the next in between.

    Tables hold m = 256 j, which fills its tiles, and 256 j + 1, which begins new ones, and little else above 256. A fit may keep the two
    apart, but what it learns of them says nothing of 392 against 391: there the values of the measured m below and above are mixed by
    log2 m, whatever m is a multiple of.

    Parameters
    ----------
    residual : Residual
        With the places of :func:`m_places`.
    measured : array
        The m the fit saw.
    """
    known = np.unique(np.rint(measured))
    if len(known) < 2:
        return residual
    dtype = residual.m_places.dtype
    place = residual.m_places.take(np.minimum(known, M_TABLE - 1.0).astype(np.int32)).astype(np.intp)
    whole = np.log2(np.maximum(np.arange(M_TABLE, dtype=np.float64), 1.0))
    terms = []
    for term in residual.terms:
        values = term.values.reshape(term.shape)
        for i, axis in enumerate(term.axes):
            if axis == "m_exact" and term.shape[i] == len(known):
                values = values.take(place, axis=i)
        terms.append(replace(term, values=np.ascontiguousarray(values)))
    low = known.astype(np.int64) & 63
    step = (known % 2 == 0).astype(np.float64) + ((low & 7) == 0) + (low == 0)
    places = np.interp(whole, np.log2(known), np.arange(len(known)))
    return Residual(tuple(terms), places.astype(dtype), np.interp(whole, np.log2(known), step).astype(dtype))


def residual_of(arrays: Mapping[str, NDArray[Any]], dtype: Any = np.float64) -> Residual | None:
    """The residual a profile's arrays describe, None where it has none.

    Parameters
    ----------
    arrays : mapping
        ``terms`` (j, 3): axis codes, -1 where a lattice has fewer; ``grids`` (j, 3, 3): start, spacing and nodes of each axis;
        ``values``: nodes of all
        lattices in turn; ``measured_m``: the m the fit saw.
    dtype : dtype
        Precision to evaluate in.

    Raises
    ------
    ValueError
        When the arrays do not fit together.
    """
    if "terms" not in arrays:
        return None
    codes, grids, values = (
        np.asarray(arrays["terms"]),
        np.asarray(arrays["grids"]),
        np.asarray(arrays["values"], dtype=dtype),
    )
    if codes.ndim != 2 or grids.shape != (*codes.shape, 3) or codes.max() >= len(AXES):
        raise ValueError(f"residual: terms {codes.shape} and grids {grids.shape} do not fit together")
    terms, at = [], 0
    for code, grid in zip(codes, grids, strict=True):
        used = code >= 0
        shape = tuple(int(v) for v in grid[used, 2])
        size = int(np.prod(shape))
        part = values[at : at + size]
        if len(part) < size or min(shape, default=0) < 2:
            raise ValueError(
                f"residual: {len(values)} values for lattices that need more than {at + size - 1}, or an axis with one node"
            )
        terms.append(
            Term(
                tuple(AXES[i] for i in code[used]),
                tuple(map(float, grid[used, 0])),
                tuple(float(1.0 / v) for v in grid[used, 1]),
                shape,
                part,
            )
        )
        at += size
    return Residual(tuple(terms), m_places(np.asarray(arrays["measured_m"], dtype=np.float64)).astype(dtype))


def residual_arrays(residual: Residual, measured_m: F) -> dict[str, NDArray[Any]]:
    """Arrays of a profile that describe a residual; the reverse of :func:`residual_of`. Values as float32: a millionth is ample."""
    codes = np.full((len(residual.terms), 3), -1, dtype=np.int64)
    grids = np.ones((len(residual.terms), 3, 3))
    for i, term in enumerate(residual.terms):
        for j, axis in enumerate(term.axes):
            codes[i, j] = AXES.index(axis)
            grids[i, j] = term.start[j], 1.0 / term.inverse[j], term.shape[j]
    values = np.concatenate([np.ravel(t.values) for t in residual.terms]).astype(np.float32)
    return {"terms": codes, "grids": grids, "values": values, "measured_m": np.unique(np.rint(measured_m))}


def smooth_arrays(arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The first, smooth lattice alone: what a profile takes to another software stack or device."""
    if "terms" not in arrays:
        return {}
    size = int(np.prod(arrays["grids"][0][arrays["terms"][0] >= 0, 2]))
    return {**arrays, "terms": arrays["terms"][:1], "grids": arrays["grids"][:1], "values": arrays["values"][:size]}
