"""The reader of YAML files: dataclasses from their annotations, and all errors of a text at
once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import pytest
from tables import tables_of

from simulator.errors import InputError
from simulator.files import fields
from simulator.files.fields import Flag, Map, Number, Quantity, String, Text
from simulator.files.yaml import Problems, parse_yaml

pytestmark = pytest.mark.quick


@dataclass(frozen=True)
class Wheel:
    spokes: Annotated[int, Number(1, 100, "36", whole=True)]
    mass: Annotated[float, Number(0, 1, "0.25")]


@dataclass(frozen=True)
class Bicycle:
    name: String
    gear: Annotated[str, Text(("fixed", "hub"))]
    wheels: tuple[Wheel, ...]
    latency_s: Annotated[float, Quantity("s", 1e-6, 1.0)] = 1.0
    shares: Map[Annotated[float, Number(0, 1, "0.25")]] = field(default_factory=dict)
    bell: Flag = False
    note: String = ""

    def __post_init__(self) -> None:
        if self.bell and self.gear == "fixed":
            raise InputError("a fixed gear has no bell")


GOOD = "name: A\ngear: hub\nwheels: [{spokes: 36, mass: 0.5}]\n"


def read(text: str) -> tuple[Bicycle | None, list[str]]:
    problems = Problems("f")
    root = parse_yaml(text, problems)
    return (None if root is None else fields.read(Bicycle, root, problems)), problems.lines


def test_a_dataclass_is_read_by_its_annotations() -> None:
    assert read(GOOD) == (Bicycle("A", "hub", (Wheel(36, 0.5),)), [])
    bicycle, _ = read(GOOD + "latency_s: 3 us\nshares: {a: 1}\nbell: true\nnote: x\n")
    assert bicycle == Bicycle("A", "hub", (Wheel(36, 0.5),), 3e-6, {"a": 1.0}, True, "x")


@pytest.mark.parametrize(("old", "new", "lines"), tables_of("files/mistakes.yaml")["fields"])
def test_what_is_wrong_is_said_with_its_place(old: str, new: str, lines: list[str]) -> None:
    assert read(GOOD.replace(old, new)) == (None, lines)
