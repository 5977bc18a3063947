"""Residuals of the cost models: log factors on regular grids, linear in between, constant beyond their edges.

Attention and elementwise operators have one :class:`ResidualGrid` each, GEMMs a :class:`Residual`, a sum over named
coordinates of a shape and of its kernel (:func:`residual_of` reads it).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.arrays import Array
from simulator.cost.gemm_model import Core, CoreTime
from simulator.hardware.constants import AXES

EDGE = 1e-4
"""Steps before the last node at which a coordinate of a GEMM stops."""
M_TABLE = 32769
"""Sizes m with a tabled place among the measured ones; larger ones take the last."""


@dataclass(frozen=True)
class ResidualGrid:
    """Values at the nodes of a regular grid; their precision, float32 or float64, is that of its evaluation.

    >>> box = ResidualGrid((0.0, 0.0), (1.0, 2.0), np.array([[0.0, 1.0], [4.0, 5.0]]))
    >>> box((np.array([0.5, -9.0]), np.array([0.0, 9.0])))
    array([2., 1.])
    """

    start: tuple[float, ...]  # first node of each coordinate
    step: tuple[float, ...]  # from one to the next
    values: Array  # one axis a coordinate
    axes: tuple[Any, ...] = ()  # keys of its coordinates; by default their positions
    inset: float = 0.0  # steps before the last node at which a coordinate stops

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> ResidualGrid | None:
        """What an attention section holds ("start", "step", "values"), axes from the last to the first; None without
        these arrays."""
        if "values" not in arrays:
            return None
        start, step = (tuple(map(float, arrays[name][::-1])) for name in ("start", "step"))
        return cls(start, step, np.ascontiguousarray(arrays["values"].T, dtype=np.float64))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What :meth:`from_arrays` reads."""
        start, step = np.array(self.start[::-1]), np.array(self.step[::-1])
        return {"start": start, "step": step, "values": np.ascontiguousarray(self.values.T)}

    def __call__(self, coordinates: Any) -> Array:
        """Values at points: ``coordinates[axis]`` is an array for each of ``axes``."""
        return self._alone(coordinates)

    def places(self, coordinates: Any) -> tuple[NDArray[np.int32], Array]:
        """Cell of each point along each coordinate, and how far into it, in [0, 1]: arrays (coordinates, points)."""
        return self._alone.places(coordinates)

    @cached_property
    def _alone(self) -> LatticeSum:
        return LatticeSum((self,))

    @property
    def grid(self) -> list[tuple[Any, float, float, int, float]]:
        """Of each coordinate: key, first node, step, nodes, inset."""
        shape = self.values.shape
        axes = zip(self.axes or range(len(shape)), self.start, self.step, shape, strict=True)
        return [(*axis, self.inset) for axis in axes]

    @property
    def strides(self) -> list[int]:
        """Nodes, in the order of memory, from one to the next of each coordinate."""
        return [math.prod(self.values.shape[i + 1 :]) for i in range(self.values.ndim)]

    def corners(self) -> Array:
        """Values at the corners of the cell that begins at each node, (2^coordinates, nodes), the first coordinate's
        far side in the second half; meaningless beyond an edge, where no point lies."""
        offsets = [0]
        for stride in reversed(self.strides):
            offsets += [stride + o for o in offsets]
        padded = np.concatenate([np.ravel(self.values), np.zeros(max(offsets), dtype=self.values.dtype)])
        return np.stack([padded[o : o + self.values.size] for o in offsets])


@dataclass(frozen=True)
class LatticeSum:
    """Lattices over shared coordinates, arranged so that one NumPy call serves many: a few points cost little more than
    its overhead."""

    lattices: tuple[ResidualGrid, ...]

    @cached_property
    def _axes(self) -> dict[Any, int]:
        """The distinct coordinates (see :attr:`ResidualGrid.grid`), numbered."""
        distinct = dict.fromkeys(axis for residual_grid in self.lattices for axis in residual_grid.grid)
        return {axis: i for i, axis in enumerate(distinct)}

    @cached_property
    def _limits(self) -> tuple[Array, ...]:
        """First node, nodes per unit, last place and last cell of each, (coordinates, 1)."""
        _, start, step, nodes, inset = (np.array(column) for column in zip(*self._axes, strict=True))
        columns = (start, 1.0 / step, nodes - (1.0 + inset), np.maximum(nodes - 2.0, 0.0))
        return tuple(column.astype(self.lattices[0].values.dtype)[:, None] for column in columns)

    @cached_property
    def _groups(self) -> list[tuple[NDArray[np.intp], NDArray[np.int32], list[Array]]]:
        """By number of coordinates: rows of places that each lattice reads, (coordinates, lattices); strides of its
        nodes, (coordinates, lattices, 1); and its corners."""
        groups = []
        for count in sorted({residual_grid.values.ndim for residual_grid in self.lattices}):
            own = [residual_grid for residual_grid in self.lattices if residual_grid.values.ndim == count]
            rows = np.array([[self._axes[axis] for axis in residual_grid.grid] for residual_grid in own]).T
            strides = np.array([residual_grid.strides for residual_grid in own], dtype=np.int32).T[:, :, None]
            groups.append((rows, strides, [residual_grid.corners() for residual_grid in own]))
        return groups

    def places(self, coordinates: Any) -> tuple[NDArray[np.int32], Array]:
        """Cell of each point along each distinct coordinate, and how far into it; arrays (coordinates, points)."""
        start, inverse, last, last_cell = self._limits
        inside = np.empty((len(start), *self._shape(coordinates)), dtype=start.dtype)
        for (key, *_), i in self._axes.items():
            inside[i] = coordinates[key]
        inside = inside.reshape(len(start), -1)
        inside -= start
        inside *= inverse
        np.maximum(inside, 0.0, out=inside)
        np.minimum(inside, last, out=inside)
        cells = np.minimum(inside, last_cell).astype(np.int32)
        inside -= cells
        return cells, inside

    def __call__(self, coordinates: Any) -> Array:
        """Sum of the lattices at points."""
        cells, inside = self.places(coordinates)
        points = cells.shape[1]
        total = np.zeros(points, dtype=inside.dtype)
        for axes, strides, corners in self._groups:
            index = np.add.reduce(cells[axes] * strides, axis=0, dtype=np.int32)
            found = np.empty((len(corners), len(corners[0]), points), dtype=inside.dtype)
            for values, at, out in zip(corners, index, found, strict=True):
                values.take(at, axis=1, mode="clip", out=out)
            for rows in axes:  # one coordinate after the other, from the near side of its cell to the far side
                half = found.shape[1] // 2
                low, high = found[:, :half], found[:, half:]
                high -= low
                high *= inside[rows][:, None]
                low += high
                found = low
            total += np.add.reduce(found[:, 0], axis=0)
        return total.reshape(self._shape(coordinates))

    def _shape(self, coordinates: Any) -> tuple[int, ...]:
        shapes = {np.shape(coordinates[key]) for key, *_ in self._axes}
        return shapes.pop() if len(shapes) == 1 else np.broadcast_shapes(*shapes)


def prefill_place(q_len: Array, batch: Array, heads: Array, kv_heads: Array) -> tuple[Array, Array, Array]:
    """Coordinates of prefill rows: log2 of query heads a KV head, of sequences x heads, of query positions."""
    return np.log2(heads / kv_heads), np.log2(batch * heads), np.log2(q_len)


def decode_place(keys: Array, pairs: Array, group: Array) -> tuple[Array, Array, Array]:
    """Coordinates of decode rows: log2 of query heads a KV head, of work units (at most 128 query heads each), of
    cached positions."""
    return np.log2(group), np.log2(pairs * np.ceil(group / 128.0)), np.log2(keys)


@dataclass(frozen=True)
class Residual(LatticeSum):
    """The log factor of a GEMM's analytic time.

    The first lattice, over log2 of (m, n, k), is smooth and carries over between software stacks. The others are in
    coordinates of the kernel (waves, tiles, core time, alignment of m): they hold what one stack's kernel choice does,
    and are fitted for that stack only.
    """

    m_places: Array
    m_steps: Array | None = None

    def at(self, m: Array, n: Array, k: Array, parts: CoreTime, core: Core) -> Array:
        """Log factor of each shape, arrays (x,); ``parts`` is what ``core`` says of them."""
        return self(Coordinates(m, n, k, parts, core, self.m_places, self.m_steps))


class Coordinates(dict[str, Array]):
    """Coordinates of shapes by the names of :data:`AXES`, each worked out when first asked for."""

    def __init__(
        self, m: Array, n: Array, k: Array, parts: CoreTime, core: Core, m_places: Array, m_steps: Array | None = None
    ) -> None:
        super().__init__()
        self.m, self.n, self.k, self.parts = m, n, k, parts
        self.m_places, self.m_steps = m_places, m_steps
        self.sm = float(core.machine.sm_count)

    def __missing__(self, axis: str) -> Array:
        self[axis] = found = _MAKE[axis](self)
        return found

    def by_m(self, table: Array) -> Array:
        """Entry of each m in a table of :data:`M_TABLE`."""
        return np.asarray(table.take(np.minimum(self.m, M_TABLE - 1.0).astype(np.int32)))

    def waves(self, bm: float, bn: float) -> Array:
        """Tiles of a size over SMs."""
        out = np.ceil(self.m * (1.0 / bm))
        out *= np.ceil(self.n * (1.0 / bn))
        out /= self.sm
        return np.asarray(out)


def _idle(waves: Array) -> Array:
    whole = np.ceil(waves)
    return np.asarray((whole - waves) / whole)


def _steps(m: NDArray[np.signedinteger[Any]], dtype: Any) -> Array:
    out = ((m & 1) == 0).astype(dtype)
    out += (m & 7) == 0
    out += (m & 63) == 0
    return np.asarray(out)


_MAKE: Mapping[str, Callable[[Coordinates], Array]] = {
    "m": lambda c: np.log2(c.m),
    "n": lambda c: np.log2(c.n),
    "k": lambda c: np.log2(c.k),
    "nk": lambda c: c["n"] + c["k"],
    "mk": lambda c: c["m"] + c["k"],
    "mn": lambda c: c["m"] + c["n"],
    "aspect": lambda c: c["n"] - c["k"],
    "time": lambda c: np.log2(c.parts.total_us),
    "tiles": lambda c: np.log2(c.parts.tiles / c.sm),
    "blocks": lambda c: np.log2(c.parts.tiles * c.parts.split / c.sm),
    "tile": lambda c: c.parts.tile.astype(c.m.dtype),
    "m_step": lambda c: _steps(c.m.astype(np.int32), c.m.dtype) if c.m_steps is None else c.by_m(c.m_steps),
    "m_exact": lambda c: c.by_m(c.m_places),
    "tiles64": lambda c: np.log2(c.waves(64.0, 64.0)),
    "idle256": lambda c: _idle(c.waves(128.0, 256.0)),
    "last128": lambda c: (waves := c.waves(128.0, 128.0)) - np.ceil(waves) + 1.0,
    "idle": lambda c: _idle(c.parts.tiles * c.parts.split / c.sm),
}
assert tuple(_MAKE) == AXES  # a code in a file means its position


def m_places(measured: Array) -> Array:
    """Place of every m among measured ones, by whole m up to :data:`M_TABLE`: first those that are no multiple of 8 or
    below 16, then the multiples.

    Two rows of places, because kernels treat the two apart: 300 lies between unaligned neighbours, 304 between aligned
    ones, and each is interpolated on log2 m.
    """

    def stepped(m: Array) -> NDArray[np.bool_]:
        return np.asarray((m >= 16.0) & (np.fmod(m, 8.0) == 0.0))

    known = np.unique(np.rint(measured))
    plain, aligned = known[~stepped(known)], known[stepped(known)]
    if not len(plain) or not len(aligned):
        return _over_m(known, range(len(known)))
    low, high = (_over_m(row, range(len(row))) for row in (plain, aligned))
    return np.where(stepped(_WHOLE_M), high + len(plain), low)


_WHOLE_M = np.maximum(np.arange(M_TABLE, dtype=np.float64), 1.0)


def _over_m(known: Array, values: Any) -> Array:
    """Values at known m for every whole m up to :data:`M_TABLE`, linear in log2 m."""
    return np.asarray(np.interp(np.log2(_WHOLE_M), np.log2(known), values))


def between_measured(residual: Residual, measured: Array) -> Residual:
    """The same residual for predicting: unchanged at every measured m (the fit's), and led from one to the next in
    between.

    Tables hold m = 256 j, which fills its tiles, and 256 j + 1, which begins new ones, and little else above 256. A fit
    may keep the two apart, but what it learns of them says nothing of 392 against 391: there the values of the measured
    m below and above are mixed by log2 m, whatever m is a multiple of.
    """
    known = np.unique(np.rint(measured))
    if len(known) < 2:
        return residual
    dtype = residual.m_places.dtype
    place = residual.m_places.take(np.minimum(known, M_TABLE - 1.0).astype(np.int32)).astype(np.intp)
    lattices = []
    for residual_grid in residual.lattices:
        values = residual_grid.values
        if "m_exact" in residual_grid.axes and values.shape[axis := residual_grid.axes.index("m_exact")] == len(known):
            values = np.ascontiguousarray(values.take(place, axis=axis))
        lattices.append(replace(residual_grid, values=values))
    steps = _over_m(known, _steps(known.astype(np.int64), np.float64))
    return Residual(tuple(lattices), _over_m(known, range(len(known))).astype(dtype), steps.astype(dtype))


def residual_of(arrays: Mapping[str, NDArray[Any]], dtype: Any = np.float64) -> Residual | None:
    """The residual a GEMM section's arrays describe, None where it has none; evaluated in ``dtype``.

    As :mod:`simulator.hardware.arrays` lets them pass: ``terms`` (j, 3) are codes of the axes, -1 where a lattice has
    fewer; ``grids`` (j, 3, 3) start, spacing and nodes of each axis; ``values`` the nodes of all lattices in turn, the
    last axis fastest; ``measured_m`` the m the fit saw.
    """
    if "terms" not in arrays:
        return None
    rest, lattices = np.asarray(arrays["values"], dtype=dtype), []
    for code, grid in zip(np.asarray(arrays["terms"]), np.asarray(arrays["grids"]), strict=True):
        used = code >= 0
        start, step, nodes = grid[used].T.tolist()
        shape = tuple(map(int, nodes))
        part, rest = np.split(rest, [math.prod(shape)])
        axes = tuple(AXES[i] for i in code[used])
        lattices.append(ResidualGrid(tuple(start), tuple(step), part.reshape(shape), axes, EDGE))
    return Residual(tuple(lattices), m_places(np.asarray(arrays["measured_m"], dtype=np.float64)).astype(dtype))


def residual_arrays(residual: Residual, measured_m: Array) -> dict[str, NDArray[Any]]:
    """Arrays of a profile that describe a residual; the reverse of :func:`residual_of`. Values as float32: a millionth
    is ample."""
    codes = np.full((len(residual.lattices), 3), -1, dtype=np.int64)
    grids = np.ones((len(residual.lattices), 3, 3))
    for i, residual_grid in enumerate(residual.lattices):
        for j, (axis, start, step, nodes, _) in enumerate(residual_grid.grid):
            codes[i, j] = AXES.index(axis)
            grids[i, j] = start, step, nodes
    values = np.concatenate([np.ravel(residual_grid.values) for residual_grid in residual.lattices]).astype(np.float32)
    return {"terms": codes, "grids": grids, "values": values, "measured_m": np.unique(np.rint(measured_m))}
