"""The parts of a hardware profile, as frozen values; their annotations are the schema of its YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, Any

from numpy.typing import NDArray

from simulator.files.fields import Number

Rows = Annotated[int, Number(0, 1e12, "400", whole=True)]


@dataclass(frozen=True)
class Rate:
    """Arithmetic of one dtype: the dense datasheet rate at boost clock, the type sums are kept in, and the rate of 2:4
    sparse operands over dense ones (1.0 without sparse tensor cores)."""

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
    low: Annotated[float, Number(1e-6, 1.0, "0.93")]
    high: Annotated[float, Number(1.0, 1e6, "1.08")]
    level: Annotated[float, Number(0.01, 0.9999, "0.9")]
    rows: Rows


@dataclass(frozen=True)
class Provenance:
    """What a section was fitted on."""

    source: str
    digest: str
    date: str
    software: str
    device: str
    protocol: str
    rows: Rows
    borrowed_from: str = ""


@dataclass(frozen=True, eq=False)
class Section:
    """One fitted part of a profile; ``section["name"]`` is the value of a constant.

    ``arrays`` (for instance the residual lattice) are read-only, ``accuracy`` holds errors on shapes the fit did not
    see, ``status`` is "calibrated", "borrowed" or "default".
    """

    constants: Mapping[str, Fitted]
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=lambda: MappingProxyType({}))
    intervals: tuple[Interval, ...] = ()
    accuracy: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    provenance: Provenance | None = None
    status: str = "default"

    def __getitem__(self, name: str) -> float:
        return self.constants[name].value
