"""The parts a hardware profile is made of, as frozen values; :mod:`simulator.hardware` puts them together and hands them out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray


@dataclass(frozen=True)
class Rate:
    """Arithmetic of one dtype.

    Attributes
    ----------
    flop_per_s : float
        Dense datasheet rate at boost clock.
    accumulate : str
        Type sums are kept in.
    sparse_factor : float
        Rate of 2:4 sparse operands over dense ones; 1.0 without sparse tensor cores.
    """

    flop_per_s: float
    accumulate: str
    sparse_factor: float = 1.0


@dataclass(frozen=True)
class Link:
    """Connection to other devices: ``bandwidth_bytes_per_s`` in one direction, ``latency_s`` of one message step."""

    kind: str
    bandwidth_bytes_per_s: float
    latency_s: float
    max_devices: int


@dataclass(frozen=True)
class Fitted:
    """A constant's value and how it came about: "fitted", "fixed", "borrowed" or "default"."""

    value: float
    std_error: float | None = None
    status: str = "fitted"


@dataclass(frozen=True)
class Interval:
    """Multipliers of a prediction that hold the measured time at ``level``, from ``rows`` unseen shapes of a regime."""

    regime: str
    low: float
    high: float
    level: float
    rows: int


@dataclass(frozen=True)
class Provenance:
    """What a section was fitted on."""

    source: str
    digest: str
    date: str
    software: str
    device: str
    protocol: str
    rows: int
    borrowed_from: str = ""


@dataclass(frozen=True, eq=False)
class Section:
    """One fitted part of a profile; ``section["name"]`` is the value of a constant.

    Attributes
    ----------
    constants : mapping of str to Fitted
    arrays : mapping of str to array
        For instance the residual lattice; read-only.
    intervals : tuple of Interval
    accuracy : mapping of str to float
        Errors on shapes the fit did not see.
    provenance : Provenance or None
    status : str
        "calibrated", "borrowed" or "default".
    """

    constants: Mapping[str, Fitted]
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    intervals: tuple[Interval, ...] = ()
    accuracy: Mapping[str, float] = field(default_factory=dict)
    provenance: Provenance | None = None
    status: str = "default"

    def __getitem__(self, name: str) -> float:
        return self.constants[name].value
