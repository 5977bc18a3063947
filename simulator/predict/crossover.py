"""Find the fastest family in each cell of a map, and whether it is certain, from the columns of a table."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Winners:
    """Fastest prediction of every cell, by rising cell."""

    row: NDArray[np.intp]  # of the table
    gains: NDArray[np.bool_]  # whether it is faster than the dense model
    sure: NDArray[np.bool_]  # whether its interval is above 1 and above the intervals of other families in the cell


def fastest(cell: ArrayLike, family: ArrayLike, speedup: ArrayLike, lower: ArrayLike, upper: ArrayLike) -> Winners:
    """Find the fastest family of each cell; one entry per prediction, ``cell`` an integer.

    >>> speedup, lower, upper = [1.5, 1.2, 0.9, 0.8], [1.4, 1.1, 0.8, 0.7], [1.6, 1.3, 1.1, 0.9]
    >>> w = fastest([0, 0, 1, 1], ["depth", "width"] * 2, speedup, lower, upper)
    >>> w.row.tolist(), w.gains.tolist(), w.sure.tolist()
    ([0, 2], [True, False], [True, False])
    """
    where, names, value = np.asarray(cell), np.asarray(family), np.asarray(speedup, dtype=float)
    low, high = np.asarray(lower, dtype=float), np.asarray(upper, dtype=float)
    order = np.lexsort((-np.arange(len(where)), value, where))  # of equal speedups the first
    row = order[np.append(where[order][1:] != where[order][:-1], True)] if len(order) else order
    _, place = np.unique(where, return_inverse=True)
    competitor = np.ones(len(row))
    others = names != names[row][place]
    np.maximum.at(competitor, place[others], high[others])
    return Winners(row, value[row] > 1.0, low[row] > competitor)
