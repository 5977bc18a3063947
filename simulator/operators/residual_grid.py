"""Residuals of the cost models: log(measured / analytical) on a regular grid over the coordinates, linear between its
nodes, constant beyond its edges. On a CPU, GEMMs add one by the number of rows: a library has a kernel of its own for
some numbers of rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.arrays import Array


@dataclass(frozen=True)
class ResidualGrid:
    """Values at the nodes of a regular grid. Their precision, float32 or float64, is that of the evaluation."""

    start: tuple[float, ...]  # first node of each coordinate
    step: tuple[float, ...]  # from one to the next
    values: Array  # one axis per coordinate
    inset: float = 0.0  # steps before the last node at which a coordinate stops

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> ResidualGrid | None:
        """Return the grid that a section stores ("start", "step", "values"; axes from the last to the first); None
        without these arrays."""
        if "values" not in arrays:
            return None
        start, step = (tuple(map(float, arrays[name][::-1])) for name in ("start", "step"))
        return cls(start, step, np.ascontiguousarray(arrays["values"].T, dtype=np.float64))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return what :meth:`from_arrays` reads."""
        start, step = np.array(self.start[::-1]), np.array(self.step[::-1])
        return {"start": start, "step": step, "values": np.ascontiguousarray(self.values.T)}

    @cached_property
    def _ends(self) -> tuple[Array, Array, Array, Array]:
        """First node, nodes per unit, last position and last cell, (coordinates, 1) each."""
        nodes = np.array(self.values.shape, dtype=np.float64)
        last, last_cell = nodes - (1.0 + self.inset), np.maximum(nodes - 2.0, 0.0)
        columns = np.array(self.start), 1.0 / np.array(self.step), last, last_cell
        start, per_unit, last, last_cell = (c.astype(self.values.dtype)[:, None] for c in columns)
        return start, per_unit, last, last_cell

    @cached_property
    def _corners(self) -> tuple[Array, NDArray[np.int32]]:
        """Values at the corners of the cell that begins at each node, (2^coordinates, nodes), the far side of the first
        coordinate in the second half (meaningless beyond an edge, where no point lies); strides of the nodes."""
        strides = [math.prod(self.values.shape[i + 1 :]) for i in range(self.values.ndim)]
        offsets = [0]
        for stride in reversed(strides):
            offsets += [stride + offset for offset in offsets]
        padded = np.concatenate([np.ravel(self.values), np.zeros(max(offsets), dtype=self.values.dtype)])
        corners = np.stack([padded[offset : offset + self.values.size] for offset in offsets])
        return corners, np.array(strides, dtype=np.int32)[:, None]

    def cells(self, coordinates: Any) -> tuple[NDArray[np.int32], Array]:
        """Return the cell of each point along each coordinate, and the position in it, in [0, 1]: arrays (coordinates,
        points)."""
        start, per_unit, last, last_cell = self._ends
        inside = np.empty((len(start), *np.broadcast(*coordinates).shape), dtype=start.dtype)
        for i, coordinate in enumerate(coordinates):
            inside[i] = coordinate
        inside = inside.reshape(len(start), -1)
        inside -= start
        inside *= per_unit
        np.maximum(inside, 0.0, out=inside)
        np.minimum(inside, last, out=inside)
        cells = np.minimum(inside, last_cell).astype(np.int32)
        inside -= cells
        return cells, inside

    def __call__(self, coordinates: Any) -> Array:
        """Return the values at points: ``coordinates`` has an array per axis."""
        cells, inside = self.cells(coordinates)
        corners, strides = self._corners
        found = corners.take(np.add.reduce(cells * strides, axis=0, dtype=np.int32), axis=1, mode="clip")
        for position in inside:  # one coordinate after the other, from the near side of its cell to the far side
            half = len(found) // 2
            low, high = found[:half], found[half:]
            high -= low
            high *= position
            low += high
            found = low
        return np.asarray(found[0].reshape(np.broadcast(*coordinates).shape))


@dataclass(frozen=True)
class RowResidual:
    """Log factors by the number of rows m, linear in log2 m between the measured m."""

    m: Array  # measured numbers of rows, ascending
    values: Array

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> RowResidual | None:
        """Return what a section stores ("row_m", "row_values"); None without these arrays."""
        if "row_m" not in arrays:
            return None
        return cls(np.asarray(arrays["row_m"], dtype=np.float64), np.asarray(arrays["row_values"], dtype=np.float64))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return what :meth:`from_arrays` reads."""
        return {"row_m": self.m, "row_values": self.values}

    def __call__(self, m: Array) -> Array:
        """Return the log factor at each m."""
        return np.asarray(np.interp(np.log2(m), np.log2(self.m), self.values)).astype(m.dtype)
