"""Fit residuals: multilinear grids on log residuals, by robust ridge with first- and
second-difference penalties. Many rows: grids are fitted in turn, each to the residuals of the
others (block Gauss-Seidel on one convex problem). Few rows: all grids are fitted at once in the
dual form of the problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, sparse

from calibration.fit.solver import HUBER
from simulator.arrays import FloatArray, IndexArray
from simulator.operators.base import ResidualGrid
from simulator.operators.gemm import EDGE

# start, step and number of nodes of the residual of GEMMs along log2 m, n, k, in octaves
SMOOTH: tuple[tuple[float, float, int], ...] = ((0, 1, 16), (5, 1, 13), (5, 1, 13))
# rows up to which the problem is solved by row instead of by node, if there are more nodes
FEW_ROWS = 1500


@dataclass(frozen=True)
class Regularisation:
    """Weights of the penalties of a grid of log residuals; a row of data has the weight 1."""

    first: float | tuple[float, ...]  # first differences; one weight, or one per coordinate
    second: float | tuple[float, ...]  # second differences
    size: float  # the values themselves


ALONE = Regularisation(0.02, 0.06, 0.01)  # residual of GEMMs
BY_ROWS = Regularisation(0.1, 0.3, 0.1)  # a CPU's residual by the number of rows
CORRECTION = Regularisation(0.3, 1.0, 0.1)  # correction to another profile's residual


@lru_cache(maxsize=256)
def _penalty(size: int, first: float, second: float) -> FloatArray:
    differences = (
        (w, np.diff(np.eye(size), n=order, axis=0)) for order, w in ((1, first), (2, second))
    )
    return np.asarray(sum(w * (d.T @ d) for w, d in differences))


@lru_cache(maxsize=256)
def _spectrum(size: int, first: float, second: float) -> tuple[FloatArray, FloatArray]:
    values, vectors = np.linalg.eigh(_penalty(size, first, second))
    return np.maximum(values, 0.0), vectors


@dataclass(frozen=True)
class ResidualBlock:
    grid: ResidualGrid
    regularisation: Regularisation
    cells: NDArray[np.int32]
    inside: NDArray[np.floating[Any]]

    @staticmethod
    def of(grid: ResidualGrid, coordinates: Any, regularisation: Regularisation) -> ResidualBlock:
        return ResidualBlock(grid, regularisation, *grid.cells(coordinates))

    @property
    def along(self) -> list[tuple[int, float, float]]:
        shape = self.grid.values.shape
        both = self.regularisation.first, self.regularisation.second
        return list(
            zip(shape, *(np.broadcast_to(w, len(shape)).tolist() for w in both), strict=True)
        )

    def take(self, rows: Any) -> ResidualBlock:
        return replace(self, cells=self.cells[:, rows], inside=self.inside[:, rows])

    @cached_property
    def matrix(self) -> sparse.csr_matrix:
        """Weights of the nodes at each row, (rows, nodes): the interpolation as a matrix."""
        rows = self.cells.shape[1]
        index: NDArray[np.int64] = np.zeros((rows, 1), dtype=np.int64)
        weight: FloatArray = np.ones((rows, 1))
        for cell, inside, size in zip(self.cells, self.inside, self.grid.values.shape, strict=True):
            sides = np.stack([cell, np.minimum(cell + 1, size - 1)], axis=1)
            index = (index[:, :, None] * size + sides[:, None, :]).reshape(rows, -1)
            weight = (
                weight[:, :, None] * np.stack([1.0 - inside, inside], axis=1)[:, None, :]
            ).reshape(rows, -1)
        pointer = np.arange(rows + 1) * index.shape[1]
        return sparse.csr_matrix(
            (weight.ravel(), index.ravel(), pointer), shape=(rows, self.grid.values.size)
        )

    @cached_property
    def penalty(self) -> sparse.csr_matrix:
        """Quadratic form of all penalties, (nodes, nodes)."""
        shape = self.grid.values.shape
        total = sparse.identity(self.grid.values.size, format="csr") * self.regularisation.size
        for axis, along in enumerate(self.along):
            before, after = (
                sparse.identity(int(np.prod(part))) for part in (shape[:axis], shape[axis + 1 :])
            )
            total = total + sparse.kron(
                sparse.kron(before, sparse.csr_matrix(_penalty(*along))), after, format="csr"
            )
        return total.tocsr()

    def whitened(self) -> tuple[FloatArray, FloatArray]:
        """Return the matrix in the eigenvectors of the penalty, scaled so that the penalty is the
        identity, and the scale. Eigenvectors are products over coordinates, since the penalty is a
        sum over coordinates."""
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

    @cached_property
    def order(self) -> IndexArray:
        """Nodes in an order that keeps neighbours near each other: the longest coordinate changes
        last."""
        shape = self.grid.values.shape
        axes = np.argsort([-size for size in shape], kind="stable")
        return np.asarray(
            np.arange(self.grid.values.size).reshape(shape).transpose(axes).reshape(-1)
        )

    def factor(self, normal: sparse.csr_matrix) -> FloatArray:
        """Return the Cholesky factor of normal equations, as bands: nodes are coupled up to two
        steps away."""
        place = np.argsort(self.order)
        found = normal.tocoo()
        row, column = place[found.row], place[found.col]
        below = row >= column
        row, column = row[below], column[below]
        bands = np.zeros((int((row - column).max()) + 1, normal.shape[0]))
        bands[row - column, column] = found.data[below]
        return np.asarray(
            linalg.cholesky_banded(bands, overwrite_ab=True, lower=True, check_finite=False)
        )

    def solved(self, factor: FloatArray, target: FloatArray) -> FloatArray:
        values = np.empty(len(target))
        values[self.order] = linalg.cho_solve_banded(
            (factor, True), target[self.order], check_finite=False
        )
        return values

    def nodes(self, coefficients: FloatArray) -> FloatArray:
        grid = coefficients.reshape(self.grid.values.shape)
        for axis, along in enumerate(self.along):
            grid = np.moveaxis(np.tensordot(_spectrum(*along)[1], grid, axes=(1, axis)), 0, axis)
        return grid.reshape(-1)


def gemm_blocks(
    position: Any, by_rows: bool, regularisation: Regularisation = ALONE
) -> list[ResidualBlock]:
    """Return the blank residual of GEMMs at log2 m, n, k: a grid, and on a CPU a value per measured
    m."""
    start, step, shape = zip(*SMOOTH, strict=True)
    grid = ResidualGrid(tuple(map(float, start)), tuple(map(float, step)), np.zeros(shape), EDGE)
    out = [ResidualBlock.of(grid, position, regularisation)]
    if by_rows:
        known = np.unique(position[0])
        line = ResidualGrid((0.0,), (1.0,), np.zeros(max(len(known), 2)))
        out.append(
            ResidualBlock.of(
                line, [np.searchsorted(known, position[0]).astype(np.float64)], BY_ROWS
            )
        )
    return out


def solve(
    parts: Sequence[ResidualBlock],
    target: FloatArray,
    rows: IndexArray | None = None,
    rounds: int | None = None,
) -> list[FloatArray]:
    """Return node values of every grid, fitted to a log target of ``rows`` or all, in ``rounds``
    sweeps with robust weights renewed between them; by default in 8, with weights renewed before
    the first, second and fourth."""
    if rows is not None:
        parts, target = [b.take(rows) for b in parts], target[rows]
    rest = np.array(target)
    if len(rest) <= min(FEW_ROWS, sum(b.grid.values.size for b in parts)):
        few, every = FewRows.of(parts), np.arange(len(rest))
        return few.values(few.dual(rest, every, rounds or 4), every)
    values = [np.zeros(b.grid.values.size) for b in parts]
    factors: list[Any] = []
    weights = np.ones(len(rest))
    renewed: Sequence[int] = (0, 1, 3) if rounds is None else range(1, rounds)
    for sweep in range(rounds or 8):
        if sweep in renewed:
            weights = 1.0 / np.sqrt(1.0 + (rest / HUBER) ** 2)
            factors = []
        for i, b in enumerate(parts):
            if len(factors) <= i:
                factors.append(b.factor(b.matrix.T @ sparse.diags(weights) @ b.matrix + b.penalty))
            rest += b.matrix @ values[i]
            values[i] = b.solved(factors[i], b.matrix.T @ (weights * rest))
            rest -= b.matrix @ values[i]
    return values


@dataclass(frozen=True)
class FewRows:
    """The ridge problem with one unknown per row instead of per node: exact, and faster with fewer
    rows than nodes."""

    parts: tuple[ResidualBlock, ...]
    common: FloatArray  # (rows, rows): prior covariance of the rows by the penalties
    whitened: tuple[tuple[FloatArray, FloatArray], ...]

    @staticmethod
    def of(parts: Sequence[ResidualBlock]) -> FewRows:
        whitened = tuple(b.whitened() for b in parts)
        return FewRows(tuple(parts), np.asarray(sum(w @ w.T for w, _ in whitened)), whitened)

    def dual(self, target: FloatArray, rows: IndexArray, rounds: int = 4) -> FloatArray:
        common = self.common[np.ix_(rows, rows)]
        dual = values = target[rows]
        weights = np.ones(len(rows))
        for _ in range(rounds):
            factor = linalg.cho_factor(
                common + np.diag(1.0 / weights), overwrite_a=True, check_finite=False
            )
            dual = linalg.cho_solve(factor, values, check_finite=False)
            weights = 1.0 / np.sqrt(1.0 + ((values - common @ dual) / HUBER) ** 2)
        return np.asarray(dual)

    def values(self, dual: FloatArray, rows: IndexArray) -> list[FloatArray]:
        return [
            b.nodes(scale * (w[rows].T @ dual))
            for b, (w, scale) in zip(self.parts, self.whitened, strict=True)
        ]

    def at(self, dual: FloatArray, rows: IndexArray, others: IndexArray) -> FloatArray:
        return np.asarray(self.common[np.ix_(others, rows)] @ dual)


def evaluate(parts: Sequence[ResidualBlock], values: Sequence[FloatArray]) -> FloatArray:
    return np.asarray(sum(b.matrix @ v for b, v in zip(parts, values, strict=True)))


def fit_grid(
    blank: ResidualGrid,
    position: Any,
    target: FloatArray,
    regularisation: Regularisation,
    rounds: int,
) -> ResidualGrid:
    values = solve([ResidualBlock.of(blank, position, regularisation)], target, rounds=rounds)[0]
    return replace(blank, values=values.reshape(blank.values.shape))
