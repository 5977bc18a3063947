"""Define one constant of a cost model: unit, range, meaning, defaults, and their source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

AIC = "aiconfigurator-core 0.12.0"
"""Package whose tables most defaults were fitted on."""


@dataclass(frozen=True)
class Constant:
    """One constant of a cost model; fits and profiles have values from ``low`` to ``high``."""

    unit: str  # SI, "1" for a ratio
    low: float
    high: float
    meaning: str
    defaults: Mapping[str, float]  # by architecture; "*": all others
    source: str

    def default(self, architecture: str) -> float:
        return self.defaults.get(architecture, self.defaults["*"])


def row(unit: str, low: float, high: float, source: str, meaning: str, *, other: float, **defaults: float) -> Constant:
    """Return a constant with defaults by architecture; ``other``: of all others."""
    return Constant(unit, low, high, meaning, MappingProxyType({**defaults, "*": other}), source)


def joined(unit: str, low: float, high: float, source: str, meaning: str, **defaults: float) -> Constant:
    """Return a constant with defaults by kind of link, where that of PCIe holds for each of its kinds."""
    kinds = dict.fromkeys(("pcie3", "pcie4", "pcie_host"), defaults["pcie"])
    return row(unit, low, high, source, meaning, **{**kinds, **defaults})
