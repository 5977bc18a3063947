"""Columns of results: texts as codes, :class:`Labels`, next to arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.arrays import Array


@dataclass(frozen=True)
class Labels:
    """A column of texts: codes, which are indices into the texts."""

    codes: NDArray[np.int32]
    texts: tuple[str, ...]

    def __getitem__(self, index: Any) -> Labels:
        return Labels(self.codes[index], self.texts)

    def __len__(self) -> int:
        return len(self.codes)

    def tolist(self) -> list[str]:
        """Return the texts, one per row, as a list."""
        return [self.texts[code] for code in self.codes.tolist()]

    @property
    def values(self) -> NDArray[np.object_]:
        """Texts, one per row."""
        return np.array(self.texts, dtype=object)[self.codes]


Columns = Mapping[str, Any]
"""Columns of results: float64, int64 and bool arrays, and :class:`Labels`; NaN for None."""


def plain(column: Array | Labels) -> Array:
    """Return a column as an array; texts as objects."""
    return column.values if isinstance(column, Labels) else column


def joined(held: Sequence[Array | Labels]) -> Labels:
    """Concatenate text columns."""
    labels = [column for column in held if isinstance(column, Labels)]
    first = np.cumsum([0, *(len(column.texts) for column in labels)])
    codes = np.concatenate([column.codes + at for column, at in zip(labels, first.tolist())])
    return Labels(codes.astype(np.int32), tuple(text for column in labels for text in column.texts))
