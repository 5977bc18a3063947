"""Rows of libraries, whatever their format: :class:`Entry`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from simulator.models.block import Block

MOST_BYTES = 20_000_000
"""Largest library that is read: 96 layers with 64 variants take 3 MB as JSON."""


@dataclass(frozen=True)
class Entry:
    """A row of a library: a variant of a layer with its values, and its place in the file."""

    place: str
    layer: int
    block: Block
    values: Mapping[str, float]
