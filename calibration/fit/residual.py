"""Fit of the residual: a sum of multilinear lattices on log residuals, by robust ridge with first- and second-difference penalties.

Use :func:`fit_lattices`. Lattices are fitted in turn, each to what the others leave (block Gauss-Seidel on one convex problem); the
normal equations of each are
factored once per set of weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, sparse

from calibration.fit.core import HUBER, Shapes
from simulator.kernels.gemm_core import Core, CoreTime, Machine
from simulator.kernels.lattice import Coordinates, Residual, Term, m_places

F = NDArray[np.float64]

# start, spacing, nodes
_COARSE: dict[str, tuple[float, float, int]] = {
    "m": (0, 1.875, 9),
    "n": (5, 11 / 6, 7),
    "k": (5, 11 / 6, 7),
    "nk": (10, 2, 12),
    "mn": (5, 25 / 12, 13),
    "mk": (5, 25 / 12, 13),
    "aspect": (-11, 2, 12),
    "time": (1, 1, 16),
    "tiles": (-7, 1, 17),
    "blocks": (-5, 1, 15),
    "tile": (0, 1, 6),
    "m_step": (0, 1, 4),
    "idle": (0, 0.25, 5),
}
_FINE: dict[str, tuple[float, float, int]] = {
    **_COARSE,
    "m": (0, 1, 16),
    "n": (5, 1, 12),
    "k": (5, 1, 12),
    "time": (1, 0.5, 31),
    "nk": (10, 1, 23),
    "mk": (5, 1, 26),
    "mn": (5, 1, 26),
    "aspect": (-11, 1, 23),
    "tiles": (-7, 0.5, 33),
    "blocks": (-5, 0.5, 29),
    "tiles64": (-7, 0.5, 33),
    "idle256": (0, 0.125, 9),
    "last128": (0, 0.0625, 17),
    "idle": (0, 0.125, 9),
}
SMOOTH: dict[str, tuple[float, float, int]] = {"m": (0, 1, 16), "n": (5, 1, 13), "k": (5, 1, 13)}
"""Nodes of the smooth lattice: octaves."""

FINE_TERMS: dict[bool, tuple[tuple[str, ...], ...]] = {
    False: (
        ("k", "tiles", "tile"),
        ("k", "idle256"),
        ("k", "tiles64"),
        ("time", "m", "blocks"),
        ("time", "m", "tile"),
        ("k", "time", "idle"),
        ("nk", "m_exact"),
        ("tiles", "tiles64"),
        ("k", "mn"),
        ("tiles", "nk", "m"),
        ("time", "tile", "blocks"),
    ),
    True: (
        ("m_exact", "tiles64"),
        ("time", "nk"),
        ("tiles", "m_exact"),
        ("time", "m", "blocks"),
        ("m_exact", "idle256"),
        ("time", "mk"),
        ("time", "aspect", "m_step"),
        ("m_exact", "last128"),
    ),
}
"""Axes of the stack's own lattices, for kernels that launch a block a tile (False) and persistent ones (True): chosen greedily among
200 pairs and 280
triples by the error on unseen (n, k) pairs of the A100 and H100 trtllm tables, splits 10-12."""


FEW_TERMS: dict[bool, tuple[tuple[str, ...], ...]] = {
    False: (
        ("k", "idle256"),
        ("time", "blocks", "tile"),
        ("nk", "tiles", "tile"),
        ("k", "tiles", "idle"),
        ("k", "time", "tile"),
        ("m", "k", "tile"),
        ("k", "tile", "idle"),
        ("time", "blocks", "idle"),
        ("k", "mn"),
    ),
    True: (
        ("time", "nk"),
        ("k", "tiles", "tile"),
        ("time", "tile"),
        ("nk", "m"),
        ("k", "idle256"),
        ("time", "m", "blocks"),
        ("k", "mn"),
        ("tiles", "nk"),
        ("k", "time", "idle"),
    ),
}
"""The same for few rows, chosen at 400 rows of splits 10-14 of the A100 and H100 tables."""
PACKED_TERMS: tuple[tuple[str, ...], ...] = (("m_exact",),)
"""The same for CPUs, which have no tiles and waves but a kernel of their own for some numbers of rows (folds over the fit rows of a run in
fp32 on two cores: 6.7 % with it, 8.2 % without, 7.4-7.9 % with n, k or both beside)."""


def terms_of(machine: Machine, own: bool) -> tuple[tuple[str, ...], ...]:
    """Axes of a machine's own lattices: on many rows (``own``) or on few."""
    return PACKED_TERMS if machine.packs else (FINE_TERMS if own else FEW_TERMS)[machine.persistent]


@dataclass(frozen=True)
class Stiffness:
    """Weights of the penalties on first and second differences and on size, of a lattice of log residuals; a row of data counts 1."""

    first: float
    second: float
    size: float


SUPPLE, OWN = Stiffness(0.05, 0.3, 0.01), Stiffness(0.03, 0.1, 0.3)
"""Of the smooth lattice and of the stack's own ones, on many rows."""
FEW, FEW_OWN = Stiffness(0.02, 0.06, 0.01), Stiffness(0.1, 0.3, 0.1)
"""The same on few rows."""
STIFF = Stiffness(0.3, 1.0, 0.1)
"""Of a correction to another profile's residual."""


def empty_term(axes: tuple[str, ...], places: int) -> Term:
    """A lattice of zeros on the standard nodes of its axes; ``places`` of measured m."""
    table = SMOOTH if axes == ("m", "n", "k") else _FINE if len(axes) < 3 else _COARSE
    grid = [(0.0, 1.0, max(places, 2)) if axis == "m_exact" else table[axis] for axis in axes]
    shape = tuple(g[2] for g in grid)
    return Term(
        axes, tuple(float(g[0]) for g in grid), tuple(1.0 / g[1] for g in grid), shape, np.zeros(int(np.prod(shape)))
    )


def design(term: Term, known: Coordinates) -> sparse.csr_matrix:
    """Weights of a lattice's nodes at each row, (rows, nodes): the interpolation of :func:`simulator.kernels.lattice.interpolate` as a matrix."""
    rows = len(known.m)
    index: NDArray[np.int64] = np.zeros((rows, 1), dtype=np.int64)
    weight: F = np.ones((rows, 1))
    for axis, start, inverse, size in zip(term.axes, term.start, term.inverse, term.shape, strict=True):
        cell, fraction = known.cell(axis, start, inverse, size)
        index = (index[:, :, None] * size + np.stack([cell, cell + 1], axis=1)[:, None, :]).reshape(rows, -1)
        weight = (weight[:, :, None] * np.stack([1.0 - fraction, fraction], axis=1)[:, None, :]).reshape(rows, -1)
    pointer = np.arange(rows + 1) * index.shape[1]
    return sparse.csr_matrix((weight.reshape(-1), index.reshape(-1), pointer), shape=(rows, len(term.values)))


def penalty(term: Term, stiffness: Stiffness) -> sparse.csr_matrix:
    """Quadratic form of a lattice's penalties, (nodes, nodes)."""
    total = sparse.identity(len(term.values), format="csr") * stiffness.size
    for axis, size in enumerate(term.shape):
        for order, weight in ((1, stiffness.first), (2, stiffness.second)):
            if size <= order:
                continue
            stencil = {1: (-1.0, 1.0), 2: (1.0, -2.0, 1.0)}[order]
            matrix = sparse.identity(1, format="csr")
            for other, length in enumerate(term.shape):
                part = (
                    sparse.diags(stencil, range(order + 1), shape=(size - order, size), dtype=np.float64)
                    if other == axis
                    else sparse.identity(length)
                )
                matrix = sparse.kron(matrix, part, format="csr")
            total = total + weight * (matrix.T @ matrix)
    return total.tocsr()


FEW_ROWS = 1500
"""Rows up to which the problem is solved row by row rather than node by node."""


@dataclass(frozen=True)
class Block:
    """A lattice ready to fit: its design at all rows and how stiff it is."""

    term: Term
    matrix: sparse.csr_matrix
    stiffness: Stiffness
    cells: tuple[
        tuple[NDArray[np.int32], NDArray[np.floating[Any]]], ...
    ]  # per axis: cell of each row, and how far into it


def blocks(
    data: Shapes,
    parts: CoreTime,
    core: Core,
    axes: Sequence[tuple[str, ...]],
    measured_m: F,
    stiffness: Stiffness,
    own: Stiffness = OWN,
) -> list[Block]:
    """Designs of the smooth lattice and of others, once for any number of fits to subsets of the rows."""
    places = m_places(measured_m)
    known = Coordinates(data.m, data.n, data.k, parts, core, places)
    out = []
    for a in (("m", "n", "k"), *axes):
        term = empty_term(a, int(np.ceil(places.max())) + 1)
        cells = tuple(known.cell(*axis) for axis in zip(term.axes, term.start, term.inverse, term.shape, strict=True))
        out.append(Block(term, design(term, known), stiffness if a == ("m", "n", "k") else own, cells))
    return out


def solve(parts: Sequence[Block], target: F, rows: NDArray[np.intp] | None = None, sweeps: int = 8) -> list[F]:
    """Node values of every lattice for a log target.

    Parameters
    ----------
    parts : sequence of Block
    target : array (rows,)
    rows : index array, optional
        Rows to fit to; all by default.
    sweeps : int
        Rounds over the lattices; robust weights are renewed before rounds 1, 2 and 4.

    Returns
    -------
    list of arrays
    """
    matrices = [b.matrix if rows is None else b.matrix[rows] for b in parts]
    rest = np.array(target if rows is None else target[rows])
    if len(rest) <= FEW_ROWS:
        few, every = FewRows.of(parts, rows), np.arange(len(rest))
        return few.values(few.dual(rest, every), every)
    values = [np.zeros(m.shape[1]) for m in matrices]
    penalties = [penalty(b.term, b.stiffness) for b in parts]
    factors: list[Any] = []
    weights = np.ones(len(rest))
    for sweep in range(sweeps if len(parts) > 1 else 5):
        if sweep in (0, 1, 3):
            weights = 1.0 / np.sqrt(1.0 + (rest / HUBER) ** 2)
            factors = []
        for i, matrix in enumerate(matrices):
            if len(factors) <= i:
                normal = (matrix.T @ sparse.diags(weights) @ matrix + penalties[i]).toarray()
                factors.append(linalg.cho_factor(normal, overwrite_a=True, check_finite=False))
            rest += matrix @ values[i]
            values[i] = linalg.cho_solve(factors[i], matrix.T @ (weights * rest), check_finite=False)
            rest -= matrix @ values[i]
    return values


@lru_cache(maxsize=256)
def _spectrum(size: int, first: float, second: float) -> tuple[F, F]:
    """Eigenvalues and eigenvectors of one axis's share of a penalty."""
    total = np.zeros((size, size))
    for order, weight in ((1, first), (2, second)):
        if size > order:
            matrix = np.diff(np.eye(size), n=order, axis=0)
            total += weight * (matrix.T @ matrix)
    values, vectors = np.linalg.eigh(total)
    return np.maximum(values, 0.0), vectors


def _whitened(block: Block, rows: NDArray[np.intp] | None) -> tuple[F, F]:
    """A lattice's design in the eigenvectors of its penalty, scaled so that the penalty is the identity, (rows, nodes); and that scale.

    The penalty is a sum over axes, so its eigenvectors are products of those of the axes, and a row of the design is a product of rows.
    """
    term, stiff = block.term, block.stiffness
    total: F = np.full(1, stiff.size)
    out: F | None = None
    for (cell, fraction), size in zip(block.cells, term.shape, strict=True):
        values, vectors = _spectrum(size, stiff.first, stiff.second)
        c, f = (cell, fraction) if rows is None else (cell[rows], fraction[rows])
        side = vectors[c] * (1.0 - f)[:, None] + vectors[c + 1] * f[:, None]
        total = (total[:, None] + values[None, :]).reshape(-1)
        out = side if out is None else (out[:, :, None] * side[:, None, :]).reshape(len(c), -1)
    assert out is not None
    scale = 1.0 / np.sqrt(total)
    return out * scale, scale


def _unwhiten(block: Block, coefficients: F) -> F:
    """Node values from coefficients of the eigenvectors."""
    grid = coefficients.reshape(block.term.shape)
    for axis, size in enumerate(block.term.shape):
        vectors = _spectrum(size, block.stiffness.first, block.stiffness.second)[1]
        grid = np.moveaxis(np.tensordot(vectors, grid, axes=(1, axis)), 0, axis)
    return grid.reshape(-1)


@dataclass(frozen=True)
class FewRows:
    """The same ridge problem solved for one number a row rather than one a node: exact, and faster while rows are fewer than nodes."""

    parts: tuple[Block, ...]
    common: F  # (rows, rows): what the penalties say rows have in common before any data
    whitened: tuple[tuple[F, F], ...]

    @staticmethod
    def of(parts: Sequence[Block], rows: NDArray[np.intp] | None = None) -> FewRows:
        """Prepare some rows of a problem."""
        whitened = tuple(_whitened(b, rows) for b in parts)
        return FewRows(tuple(parts), np.asarray(sum(w @ w.T for w, _ in whitened)), whitened)

    def dual(self, target: F, rows: NDArray[np.intp], rounds: int = 4) -> F:
        """The number of each of these rows; ``rounds`` is how often the robust weights are renewed."""
        common = self.common[np.ix_(rows, rows)]
        wanted = target[rows]
        weights = np.ones(len(rows))
        dual = wanted
        for _ in range(rounds):
            system = common + np.diag(1.0 / weights)
            dual = linalg.cho_solve(
                linalg.cho_factor(system, overwrite_a=True, check_finite=False), wanted, check_finite=False
            )
            weights = 1.0 / np.sqrt(1.0 + ((wanted - common @ dual) / HUBER) ** 2)
        return np.asarray(dual)

    def values(self, dual: F, rows: NDArray[np.intp]) -> list[F]:
        """Node values of every lattice."""
        return [
            _unwhiten(b, scale * (w[rows].T @ dual)) for b, (w, scale) in zip(self.parts, self.whitened, strict=True)
        ]

    def at(self, dual: F, rows: NDArray[np.intp], others: NDArray[np.intp]) -> F:
        """Log factors the fit to ``rows`` gives ``others``."""
        return np.asarray(self.common[np.ix_(others, rows)] @ dual)


def evaluate(parts: Sequence[Block], values: Sequence[F], rows: NDArray[np.intp] | None = None) -> F:
    """Log factors of rows."""
    return np.asarray(
        sum((b.matrix if rows is None else b.matrix[rows]) @ v for b, v in zip(parts, values, strict=True))
    )


def residual_from(parts: Sequence[Block], values: Sequence[F], measured_m: F) -> Residual:
    """The residual that node values describe."""
    return Residual(tuple(replace(b.term, values=v) for b, v in zip(parts, values, strict=True)), m_places(measured_m))


def add_residuals(a: Residual, b: Residual) -> Residual:
    """The sum of a residual and a smooth one on the same nodes (a prior and what local data add)."""
    first = replace(a.terms[0], values=a.terms[0].values + b.terms[0].values)
    return Residual((first, *a.terms[1:]), a.m_places)
