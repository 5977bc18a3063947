"""Residual of attention times: a multilinear lattice over three logarithmic coordinates. Arrays in, arrays out.

The lattice holds log(measured / core) at its nodes, which lie at equal steps of log2 on each axis; outside it the nearest edge holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

F = NDArray[np.float64]


@dataclass(frozen=True)
class Lattice:
    """Nodes at ``start + i * step`` on each of three axes; ``values`` of shape (n0, n1, n2)."""

    start: tuple[float, float, float]
    step: tuple[float, float, float]
    values: F

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Lattice | None:
        """The lattice kept in a section's arrays ("start", "step", "values"), or None where there is none."""
        if "values" not in arrays:
            return None
        start, step = (tuple(float(x) for x in arrays[name]) for name in ("start", "step"))
        return cls(
            (start[0], start[1], start[2]),
            (step[0], step[1], step[2]),
            np.ascontiguousarray(arrays["values"], dtype=np.float64),
        )

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What :meth:`from_arrays` reads."""
        return {"start": np.array(self.start), "step": np.array(self.step), "values": self.values}

    def corners(self, coordinates: tuple[F, F, F]) -> tuple[NDArray[np.intp], tuple[F, F, F]]:
        """Flat index of the lowest corner of each point's cell, and the point's place in it, in [0, 1] on each axis."""
        flat: Any = 0
        places = []
        for x, start, step, size in zip(coordinates, self.start, self.step, self.values.shape, strict=True):
            place = np.minimum(np.maximum((x - start) / step, 0.0), size - 1.0)
            low = np.minimum(place.astype(np.intp), max(size - 2, 0))
            flat = flat * size + low
            places.append(place - low)
        return flat, (places[0], places[1], places[2])

    def offsets(self) -> tuple[int, int, int]:
        """Steps in the flat values from a corner to the next one on each axis; 0 on an axis with a single node."""
        n0, n1, n2 = self.values.shape
        return (n1 * n2 if n0 > 1 else 0), (n2 if n1 > 1 else 0), (1 if n2 > 1 else 0)

    def __call__(self, coordinates: tuple[F, F, F]) -> F:
        """Interpolated values.

        >>> box = Lattice((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), np.arange(8.0).reshape(2, 2, 2))
        >>> float(box((np.array(0.5), np.array(0.0), np.array(1.0))))
        3.0
        """
        flat, (u, v, w) = self.corners(coordinates)
        d0, d1, d2 = self.offsets()
        nodes = self.values.ravel()

        def edge(base: NDArray[np.intp]) -> F:
            low = nodes[base]
            return low + w * (nodes[base + d2] - low)

        def face(base: NDArray[np.intp]) -> F:
            low = edge(base)
            return low + v * (edge(base + d1) - low)

        low = face(flat)
        return np.asarray(low + u * (face(flat + d0) - low))


def prefill_place(q_len: F, batch: F, heads: F, kv_heads: F) -> tuple[F, F, F]:
    """Coordinates of prefill rows: log2 of query positions, of sequences x heads, of query heads a KV head."""
    return np.log2(q_len), np.log2(batch * heads), np.log2(heads / kv_heads)


def decode_place(keys: F, pairs: F, group: F) -> tuple[F, F, F]:
    """Coordinates of decode rows: log2 of cached positions, of work units (at most 128 query heads each), of query heads a KV head."""
    return np.log2(keys), np.log2(pairs * np.ceil(group / 128.0)), np.log2(group)
