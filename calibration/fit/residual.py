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
from scipy.sparse.linalg import splu

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


@lru_cache(maxsize=4)
def _spectrum(
    along: tuple[tuple[int, float, float], ...], size: float
) -> tuple[FloatArray, FloatArray]:
    """Return eigenvalues and eigenvectors of all penalties of a grid. Eigenvectors are products
    over coordinates, since the penalty is a sum over coordinates."""
    values, vectors = np.full(1, size), np.ones((1, 1))
    for one in along:
        more, basis = np.linalg.eigh(_penalty(*one))
        values = np.add.outer(values, np.maximum(more, 0.0)).ravel()
        vectors = np.kron(vectors, basis)
    return values, vectors


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
    def along(self) -> tuple[tuple[int, float, float], ...]:
        shape = self.grid.values.shape
        both = self.regularisation.first, self.regularisation.second
        return tuple(
            zip(shape, *(np.broadcast_to(w, len(shape)).tolist() for w in both), strict=True)
        )

    @property
    def spectrum(self) -> tuple[FloatArray, FloatArray]:
        return _spectrum(self.along, self.regularisation.size)

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
        identity, and the scale."""
        values, vectors = self.spectrum
        scale = 1.0 / np.sqrt(values)
        return self.matrix @ vectors * scale, scale


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
                normal = b.matrix.T @ sparse.diags(weights) @ b.matrix + b.penalty
                factors.append(splu(normal.tocsc(), permc_spec="MMD_AT_PLUS_A"))
            rest += b.matrix @ values[i]
            values[i] = factors[i].solve(b.matrix.T @ (weights * rest))
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
            b.spectrum[1] @ (scale * (w[rows].T @ dual))
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
