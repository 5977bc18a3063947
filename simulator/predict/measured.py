"""Measured speedups as a table from CSV, to stand where predictions would: what ``prunesim pareto --measured`` reads.

Columns: ``family``, ``sparsity``, ``speedup`` (dense time over pruned time). Optional, and matched where they are
there: ``model``, ``hardware``, ``phase``, ``batch``, ``seq``, ``method``; ``speedup_lower`` and ``speedup_upper`` are
the interval of the measurement. A table that ``prunesim speedup --csv`` wrote has this form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simulator.errors import InputError, unknown
from simulator.files.csv import read_csv
from simulator.files.read import read_bounded
from simulator.pruning import FAMILIES

REQUIRED: tuple[str, ...] = ("family", "sparsity", "speedup")
MATCHED: tuple[str, ...] = ("model", "hardware", "phase", "batch", "seq", "method", "family")
"""Columns that must equal those of a point, where the table has them and they are not empty."""

SAME_SPARSITY = 5e-4
"""Fractions this close are the same: tables print three digits."""


@dataclass(frozen=True)
class Measured:
    """One measured speedup with the conditions that its row states."""

    conditions: Mapping[str, str]
    sparsity: float
    speedup: float
    lower: float
    upper: float

    def fits(self, sparsity: float, conditions: Mapping[str, Any]) -> bool:
        """Whether it was measured under these conditions."""
        return abs(self.sparsity - sparsity) <= SAME_SPARSITY and all(
            str(conditions[name]).lower() == value.lower()
            for name, value in self.conditions.items()
            if name in conditions
        )


def read_measured(path: str | Path) -> tuple[Measured, ...]:
    """The rows of a CSV file, see the module; InputError in one line, ``file:line: column: what is wrong``."""
    out = []
    for place, cells in read_csv(read_bounded(path), str(path), REQUIRED).records():
        try:
            out.append(_measured(cells))
        except InputError as error:
            raise InputError(f"{place}: {error}") from None
    return tuple(out)


def _measured(cells: Mapping[str, str]) -> Measured:
    if cells["family"] not in FAMILIES:
        raise InputError(f"family: {unknown('family', cells['family'], FAMILIES)}")
    sparsity, speedup = _number(cells, "sparsity"), _number(cells, "speedup")
    if not 0.0 <= sparsity < 1.0:
        raise InputError(f"sparsity: expected a fraction in [0, 1), got {cells['sparsity']}")
    lower, upper = (_number(cells, c) if cells.get(c) else speedup for c in ("speedup_lower", "speedup_upper"))
    if not 0.0 < lower <= speedup <= upper:
        raise InputError(
            f"speedup: expected 0 < speedup_lower <= speedup <= speedup_upper, got {lower:g}, {speedup:g}, {upper:g}"
        )
    return Measured({name: cells[name] for name in MATCHED if cells.get(name)}, sparsity, speedup, lower, upper)


def _number(cells: Mapping[str, str], column: str) -> float:
    try:
        value = float(cells[column])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{column}: expected a number, got {cells[column]!r}")
    return value
