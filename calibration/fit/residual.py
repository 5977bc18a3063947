"""Fit of residuals: sums of multilinear lattices on log misfits, by robust ridge with first- and second-difference
penalties.

Use :func:`blocks` and :func:`solve` for the lattices of a GEMM residual, :func:`fit_lattice` for a lattice of its own
(attention, elementwise). Lattices are fitted in turn, each to what the others leave (block Gauss-Seidel on one convex
problem), or, on few rows, all at once in the problem's dual form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, sparse

from calibration.fit.core import Shapes
from calibration.fit.solver import HUBER
from simulator.arrays import FloatArray
from simulator.cost.base import Machine
from simulator.cost.residual_grid import EDGE, Coordinates, Residual, ResidualGrid, m_places

Axes = tuple[str, ...]

# fmt: off
_ODD = 1.833333333333333  # 11 / 6, in the last digit as the shipped profiles hold it
# start, spacing, nodes
_COARSE: dict[str, tuple[float, float, int]] = {
    "m": (0, 1.875, 9), "n": (5, _ODD, 7), "k": (5, _ODD, 7),
    "nk": (10, 2, 12), "mn": (5, 25 / 12, 13), "mk": (5, 25 / 12, 13), "aspect": (-11, 2, 12), "time": (1, 1, 16),
    "tiles": (-7, 1, 17), "blocks": (-5, 1, 15), "tile": (0, 1, 6), "m_step": (0, 1, 4), "idle": (0, 0.25, 5),
}
_FINE: dict[str, tuple[float, float, int]] = {
    **_COARSE,
    "m": (0, 1, 16), "n": (5, 1, 12), "k": (5, 1, 12), "nk": (10, 1, 23), "mn": (5, 1, 26), "mk": (5, 1, 26),
    "aspect": (-11, 1, 23), "time": (1, 0.5, 31), "tiles": (-7, 0.5, 33), "blocks": (-5, 0.5, 29),
    "tiles64": (-7, 0.5, 33), "idle256": (0, 0.125, 9), "last128": (0, 0.0625, 17), "idle": (0, 0.125, 9),
}
SMOOTH: dict[str, tuple[float, float, int]] = {"m": (0, 1, 16), "n": (5, 1, 13), "k": (5, 1, 13)}
"""Nodes of the smooth lattice: octaves."""

FINE_TERMS: dict[bool, tuple[Axes, ...]] = {
    False: (
        ("k", "tiles", "tile"), ("k", "idle256"), ("k", "tiles64"), ("time", "m", "blocks"), ("time", "m", "tile"),
        ("k", "time", "idle"), ("nk", "m_exact"), ("tiles", "tiles64"), ("k", "mn"), ("tiles", "nk", "m"),
        ("time", "tile", "blocks"),
    ),
    True: (
        ("m_exact", "tiles64"), ("time", "nk"), ("tiles", "m_exact"), ("time", "m", "blocks"), ("m_exact", "idle256"),
        ("time", "mk"), ("time", "aspect", "m_step"), ("m_exact", "last128"),
    ),
}
"""Axes of the stack's own lattices, for kernels that launch a block a tile (False) and persistent ones (True): chosen
greedily among 200 pairs and 280 triples by the error on unseen (n, k) pairs of the A100 and H100 trtllm tables, splits
10-12."""
FEW_TERMS: dict[bool, tuple[Axes, ...]] = {
    False: (
        ("k", "idle256"), ("time", "blocks", "tile"), ("nk", "tiles", "tile"), ("k", "tiles", "idle"),
        ("k", "time", "tile"), ("m", "k", "tile"), ("k", "tile", "idle"), ("time", "blocks", "idle"), ("k", "mn"),
    ),
    True: (
        ("time", "nk"), ("k", "tiles", "tile"), ("time", "tile"), ("nk", "m"), ("k", "idle256"),
        ("time", "m", "blocks"), ("k", "mn"), ("tiles", "nk"), ("k", "time", "idle"),
    ),
}
"""The same for few rows, chosen at 400 rows of splits 10-14 of the A100 and H100 tables."""
# fmt: on
PACKED_TERMS: tuple[Axes, ...] = (("m_exact",),)
"""The same for CPUs, which have no tiles and waves but a kernel of their own for some numbers of rows (folds over the
fit rows of a run in fp32 on two cores: 6.7 % with it, 8.2 % without, 7.4-7.9 % with n, k or both beside)."""
FEW_ROWS = 1500
"""Rows up to which the problem is solved row by row rather than node by node, where nodes are more."""


def terms_of(machine: Machine, own: bool) -> tuple[Axes, ...]:
    """Axes of a machine's own lattices: on many rows (``own``) or on few."""
    return PACKED_TERMS if machine.packs else (FINE_TERMS if own else FEW_TERMS)[machine.persistent]


@dataclass(frozen=True)
class Stiffness:
    """Weights of the penalties on first and second differences (one, or one a coordinate) and on size, of a lattice of
    log residuals; a row of data counts 1."""

    first: float | tuple[float, ...]
    second: float | tuple[float, ...]
    size: float


ALONE = Stiffness(0.02, 0.06, 0.01)
"""Of the smooth lattice, alone or on few rows."""
SUPPLE, OWN, FEW_OWN = Stiffness(0.05, 0.3, 0.01), Stiffness(0.03, 0.1, 0.3), Stiffness(0.1, 0.3, 0.1)
"""Of the smooth lattice beside finer ones, and of those, on many rows and on few."""
STIFF = Stiffness(0.3, 1.0, 0.1)
"""Of a correction to another profile's residual."""


@lru_cache(maxsize=256)
def _penalty(size: int, first: float, second: float) -> FloatArray:
    """Quadratic form of the penalties on differences along one coordinate, (nodes, nodes)."""
    differences = ((w, np.diff(np.eye(size), n=order, axis=0)) for order, w in ((1, first), (2, second)))
    return np.asarray(sum(w * (d.T @ d) for w, d in differences))


@lru_cache(maxsize=256)
def _spectrum(size: int, first: float, second: float) -> tuple[FloatArray, FloatArray]:
    """Its eigenvalues and eigenvectors."""
    values, vectors = np.linalg.eigh(_penalty(size, first, second))
    return np.maximum(values, 0.0), vectors


@dataclass(frozen=True)
class Block:
    """A lattice ready to fit: where rows lie in it (see :meth:`ResidualGrid.places`), and how stiff it is."""

    residual_grid: ResidualGrid
    regularisation: Stiffness
    cells: NDArray[np.int32]
    inside: NDArray[np.floating[Any]]

    @staticmethod
    def of(residual_grid: ResidualGrid, coordinates: Any, regularisation: Stiffness) -> Block:
        """Rows at coordinates."""
        return Block(residual_grid, regularisation, *residual_grid.places(coordinates))

    @property
    def along(self) -> list[tuple[int, float, float]]:
        """Nodes and weights of first and second differences of each coordinate."""
        shape = self.residual_grid.values.shape
        weights = (
            np.broadcast_to(w, len(shape)).tolist() for w in (self.regularisation.first, self.regularisation.second)
        )
        return list(zip(shape, *weights, strict=True))

    def take(self, rows: Any) -> Block:
        """The same of some rows."""
        return replace(self, cells=self.cells[:, rows], inside=self.inside[:, rows])

    @cached_property
    def matrix(self) -> sparse.csr_matrix:
        """Weights of the nodes at each row, (rows, nodes): the interpolation as a matrix."""
        rows = self.cells.shape[1]
        index: NDArray[np.int64] = np.zeros((rows, 1), dtype=np.int64)
        weight: FloatArray = np.ones((rows, 1))
        for cell, inside, size in zip(self.cells, self.inside, self.residual_grid.values.shape, strict=True):
            sides = np.stack([cell, np.minimum(cell + 1, size - 1)], axis=1)
            index = (index[:, :, None] * size + sides[:, None, :]).reshape(rows, -1)
            weight = (weight[:, :, None] * np.stack([1.0 - inside, inside], axis=1)[:, None, :]).reshape(rows, -1)
        pointer = np.arange(rows + 1) * index.shape[1]
        return sparse.csr_matrix((weight.ravel(), index.ravel(), pointer), shape=(rows, self.residual_grid.values.size))

    @cached_property
    def penalty(self) -> sparse.csr_matrix:
        """Quadratic form of all penalties, (nodes, nodes)."""
        shape = self.residual_grid.values.shape
        total = sparse.identity(self.residual_grid.values.size, format="csr") * self.regularisation.size
        for axis, along in enumerate(self.along):
            before, after = (sparse.identity(int(np.prod(part))) for part in (shape[:axis], shape[axis + 1 :]))
            total = total + sparse.kron(sparse.kron(before, sparse.csr_matrix(_penalty(*along))), after, format="csr")
        return total.tocsr()

    def whitened(self) -> tuple[FloatArray, FloatArray]:
        """The matrix in the eigenvectors of the penalty, scaled so that the penalty is the identity, (rows, nodes); and
        that scale.

        The penalty is a sum over coordinates, so its eigenvectors are products of those of each, and a row is a product
        of rows.
        """
        rows = self.cells.shape[1]
        total, out = np.full(1, self.regularisation.size), np.ones((rows, 1))
        for cell, inside, along in zip(self.cells, self.inside, self.along, strict=True):
            values, vectors = _spectrum(*along)
            next_ = np.minimum(cell + 1, along[0] - 1)
            side = vectors[cell] * (1.0 - inside)[:, None] + vectors[next_] * inside[:, None]
            total = (total[:, None] + values[None, :]).reshape(-1)
            out = (out[:, :, None] * side[:, None, :]).reshape(rows, -1)
        scale = 1.0 / np.sqrt(total)
        return out * scale, scale

    def nodes(self, coefficients: FloatArray) -> FloatArray:
        """Node values from coefficients of the eigenvectors."""
        grid = coefficients.reshape(self.residual_grid.values.shape)
        for axis, along in enumerate(self.along):
            grid = np.moveaxis(np.tensordot(_spectrum(*along)[1], grid, axes=(1, axis)), 0, axis)
        return grid.reshape(-1)


def blocks(
    data: Shapes, parts: CoreTime, core: Core, axes: Sequence[Axes], regularisation: Stiffness, own: Stiffness
) -> list[Block]:
    """The smooth lattice and those of other axes on their standard nodes, once for any number of fits to subsets of the
    rows."""
    places = m_places(data.m)
    known = Coordinates(data.m, data.n, data.k, parts, core, places)
    exact = (0.0, 1.0, max(int(np.ceil(places.max())) + 1, 2))
    out = []
    for term in (("m", "n", "k"), *axes):
        smooth = term == ("m", "n", "k")
        table = {**(SMOOTH if smooth else _FINE if len(term) < 3 else _COARSE), "m_exact": exact}
        start, step, shape = zip(*(table[axis] for axis in term), strict=True)
        residual_grid = ResidualGrid(tuple(map(float, start)), tuple(map(float, step)), np.zeros(shape), term, EDGE)
        out.append(Block.of(residual_grid, known, regularisation if smooth else own))
    return out


def solve(
    parts: Sequence[Block], target: FloatArray, rows: NDArray[np.intp] | None = None, rounds: int | None = None
) -> list[FloatArray]:
    """Node values of every lattice for a log target, of ``rows`` or all.

    ``rounds`` are solutions of a single lattice, the robust weights renewed between them from one on; by default 8
    sweeps over all lattices, weights renewed before the first (from the target itself), second and fourth.
    """
    if rows is not None:
        parts, target = [b.take(rows) for b in parts], target[rows]
    rest = np.array(target)
    if len(rest) <= min(FEW_ROWS, sum(b.residual_grid.values.size for b in parts)):
        few, every = FewRows.of(parts), np.arange(len(rest))
        return few.values(few.dual(rest, every, rounds or 4), every)
    values = [np.zeros(b.residual_grid.values.size) for b in parts]
    factors: list[Any] = []
    weights = np.ones(len(rest))
    renewed: Sequence[int] = (0, 1, 3) if rounds is None else range(1, rounds)
    for sweep in range(rounds or 8):
        if sweep in renewed:
            weights = 1.0 / np.sqrt(1.0 + (rest / HUBER) ** 2)
            factors = []
        for i, b in enumerate(parts):
            if len(factors) <= i:
                normal = (b.matrix.T @ sparse.diags(weights) @ b.matrix + b.penalty).toarray()
                factors.append(linalg.cho_factor(normal, overwrite_a=True, check_finite=False))
            rest += b.matrix @ values[i]
            values[i] = linalg.cho_solve(factors[i], b.matrix.T @ (weights * rest), check_finite=False)
            rest -= b.matrix @ values[i]
    return values


@dataclass(frozen=True)
class FewRows:
    """The same ridge problem solved for one number a row rather than one a node: exact, and faster while rows are fewer
    than nodes."""

    parts: tuple[Block, ...]
    common: FloatArray  # (rows, rows): what the penalties say rows have in common before any data
    whitened: tuple[tuple[FloatArray, FloatArray], ...]

    @staticmethod
    def of(parts: Sequence[Block]) -> FewRows:
        """Prepare a problem."""
        whitened = tuple(b.whitened() for b in parts)
        return FewRows(tuple(parts), np.asarray(sum(w @ w.T for w, _ in whitened)), whitened)

    def dual(self, target: FloatArray, rows: NDArray[np.intp], rounds: int = 4) -> FloatArray:
        """The number of each of these rows; the robust weights are renewed between ``rounds`` solutions."""
        common = self.common[np.ix_(rows, rows)]
        dual = wanted = target[rows]
        weights = np.ones(len(rows))
        for _ in range(rounds):
            factor = linalg.cho_factor(common + np.diag(1.0 / weights), overwrite_a=True, check_finite=False)
            dual = linalg.cho_solve(factor, wanted, check_finite=False)
            weights = 1.0 / np.sqrt(1.0 + ((wanted - common @ dual) / HUBER) ** 2)
        return np.asarray(dual)

    def values(self, dual: FloatArray, rows: NDArray[np.intp]) -> list[FloatArray]:
        """Node values of every lattice."""
        return [b.nodes(scale * (w[rows].T @ dual)) for b, (w, scale) in zip(self.parts, self.whitened, strict=True)]

    def at(self, dual: FloatArray, rows: NDArray[np.intp], others: NDArray[np.intp]) -> FloatArray:
        """Log factors the fit to ``rows`` gives ``others``."""
        return np.asarray(self.common[np.ix_(others, rows)] @ dual)


def evaluate(parts: Sequence[Block], values: Sequence[FloatArray], rows: NDArray[np.intp] | None = None) -> FloatArray:
    """Log factors of rows."""
    taken = parts if rows is None else [b.take(rows) for b in parts]
    return np.asarray(sum(b.matrix @ v for b, v in zip(taken, values, strict=True)))


def residual_from(parts: Sequence[Block], values: Sequence[FloatArray], measured_m: FloatArray) -> Residual:
    """The residual that node values describe."""
    lattices = (
        replace(b.residual_grid, values=v.reshape(b.residual_grid.values.shape))
        for b, v in zip(parts, values, strict=True)
    )
    return Residual(tuple(lattices), m_places(measured_m))


def fit_lattice(
    blank: ResidualGrid, coordinates: Any, target: FloatArray, regularisation: Stiffness, rounds: int
) -> ResidualGrid:
    """A lattice of its own fitted to log residuals at coordinates, on the nodes of ``blank``; ``rounds`` as in
    :func:`solve`."""
    values = solve([Block.of(blank, coordinates, regularisation)], target, rounds=rounds)[0]
    return replace(blank, values=values.reshape(blank.values.shape))
