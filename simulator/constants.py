"""The named constants of the cost models: unit, range, meaning, architecture defaults and where those come from.

A constant that is not listed here does not exist: the profile loader refuses unknown names, the fit reads its bounds from here, and
a device that was never measured gets the default of its architecture, marked "default".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Constant:
    """One constant of a cost model.

    Attributes
    ----------
    unit : str
        SI unit, "1" for a ratio.
    low, high : float
        Range a fit may search and a profile may hold.
    meaning : str
        One line.
    defaults : mapping of str to float
        Value by architecture ("ampere", "ada", "hopper", "blackwell", "cpu"); "*" for any other.
    source : str
        Where the defaults come from.
    """

    unit: str
    low: float
    high: float
    meaning: str
    defaults: Mapping[str, float]
    source: str

    def default(self, architecture: str) -> float:
        """Default for an architecture."""
        return self.defaults.get(architecture, self.defaults["*"])
