"""Describe what was fitted on a device: sections of constants and arrays, their provenance, and local updates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Annotated, Any

from numpy.typing import NDArray

from simulator.display import Displayed, as_plain, by_column
from simulator.errors import unknown
from simulator.files.fields import BAD, Keyed, Number, Quoted, Text, TreeReader
from simulator.files.yaml import Node
from simulator.operators import CONSTANTS
from simulator.operators.attention import DECODE_KERNELS

ANY_DTYPE: tuple[str, ...] = ("runtime", "collective")
"""Operators whose section is the same for all number formats; its dtype is "*"."""

SCALE_RANGE = (0.01, 10.0)  # limits of a section scale
ACCURACY_RANGE = (-1e9, 1e9)  # limits of an error on held-out shapes
MOST_STD_ERROR = 1e30  # largest standard error of a constant


class _InRange(Number):
    """The value of a constant of an operator, which the path names."""

    def read(self, node: Node, path: Keyed, reader: TreeReader) -> Any:
        found, known = super().read(node, path, reader), CONSTANTS[path[1]][path[-2]]
        if found is BAD or known.low <= found <= known.high:
            return found
        return reader.wrong(node, path, f"expected a number from {known.low:g} to {known.high:g}, got {node}")


@dataclass(frozen=True)
class Fitted:
    """Value of a constant; its status is "fitted", "fixed", "inherited" or "default"."""

    value: Annotated[float, _InRange(-1e300, 1e300, "0.81")]
    std_error: Annotated[float | None, Number(0, MOST_STD_ERROR, "0.01")] = None
    status: Annotated[str, Text(("fitted", "fixed", "inherited", "default"))] = "fitted"


@dataclass(frozen=True)
class Provenance:
    """Data that a section was fitted on."""

    source: Quoted
    digest: Quoted
    date: Quoted
    software: Quoted
    device: Quoted
    protocol: Quoted
    rows: Annotated[int, Number(0, 1e12, "400", whole=True)]
    inherited_from: Quoted = ""


@dataclass(frozen=True, eq=False, repr=False)
class Section(Displayed):
    """Fitted values of one operator and number format; ``section["name"]`` is the value of a constant."""

    constants: Mapping[str, Fitted]
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict, repr=False)  # read-only, such as a residual grid
    # factor on correlated and independent errors at which 90 % of the held-out rows of its own table are covered
    section_scale: float = 1.0
    accuracy: Mapping[str, float] = field(default_factory=dict)  # errors on held-out shapes
    provenance: Provenance | None = None
    status: str = "default"  # or "calibrated" or "inherited"
    stack: str = ""  # software stack of its file; "" for the user's own calibration

    def __getitem__(self, name: str) -> float:
        return self.constants[name].value

    def _title(self) -> str:
        return f"{len(self.constants)} constants, {self.status}{f' for {self.stack}' if self.stack else ''}"

    def _columns(self) -> Mapping[str, Any]:
        """Return one row per constant."""
        return by_column([{"name": name, **as_plain(constant)} for name, constant in self.constants.items()])


@dataclass(frozen=True, eq=False)
class LocalUpdate:
    """Rows measured on the user's machine that update the predictions of a whole profile."""

    provenance: Provenance
    factors: tuple[str, ...]  # names of the error factors, the columns of ``systematic``
    # log_ratio, correlated (standard deviation), independent (variance) and kind have the shape (rows,), systematic
    # has (rows, factors), coordinates has (rows, 3)
    arrays: Mapping[str, NDArray[Any]] = field(repr=False)


SectionKey = tuple[str, str]
"""Operator and number format."""

Sections = Mapping[SectionKey, Section]


def section_row(name: str, operator: str, dtype: str, section: Section) -> dict[str, Any]:
    """Return a section as plain values, with its origin in a few words."""
    about, origin = section.provenance, ""
    if about:
        other = about.inherited_from.removeprefix(f"{name} {section.stack}")
        origin = f"as {other}" if other else about.software
    return {
        "operator": operator,
        "dtype": dtype,
        "stack": section.stack,
        "status": section.status,
        "constants": section.constants,
        "accuracy": section.accuracy,
        "section_scale": section.section_scale,
        "rows": about.rows if about else 0,
        "origin": origin,
    }


@lru_cache(maxsize=64)
def default_section(operator: str, kind: str) -> Section:
    if operator not in CONSTANTS:
        raise unknown("operator", operator, CONSTANTS)
    values = {name: constant.default(kind) for name, constant in CONSTANTS[operator].items()}
    return Section(MappingProxyType({name: Fitted(value, None, "default") for name, value in values.items()}))


@lru_cache(maxsize=64)
def unfitted_section(operator: str, kind: str, stack: str) -> Section:
    """Return the section of defaults, with the known constants of the kernel of an engine's stack."""
    section = default_section(operator, kind)
    known = DECODE_KERNELS.get((kind, stack), {}) if operator == "attention_decode" else {}
    constants = {name: Fitted(value, None, "default") for name, value in known.items()}
    return replace(section, constants=MappingProxyType({**section.constants, **constants}))


@lru_cache(maxsize=64)
def inherited(section: Section, origin: str) -> Section:
    provenance = section.provenance
    if provenance is not None:
        provenance = replace(provenance, inherited_from=provenance.inherited_from or origin)
    return replace(section, status="inherited", provenance=provenance)
