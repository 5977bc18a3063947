"""The reader of YAML files: dataclasses from their annotations, and all errors of a text at
once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import pytest

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


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        ("name: A\n", "", ["f:1:1: name: is missing"]),
        ("hub", "hup", ["f:2:7: gear: unknown value hup; did you mean hub? Known: fixed, hub"]),
        ("spokes: 36, ", "", ["f:3:10: wheels.0.spokes: is missing"]),
        ("0.5", "2", ["f:3:29: wheels.0.mass: expected a number from 0 to 1, got 2"]),
        (GOOD, GOOD + "bell: yes", ["f:4:7: bell: expected true or false, got yes"]),
        (
            GOOD,
            GOOD + "shares: {a: x, b: 3}",
            [
                "f:4:13: shares.a: expected a number, got x: write 0.25",
                "f:4:19: shares.b: expected a number from 0 to 1, got 3",
            ],
        ),
        (GOOD, GOOD + "latency_s: 3 s", ["f:4:12: latency_s: expected 1 us to 1 s, got '3 s'"]),
        (GOOD, GOOD + "bel: true", ["f:4:1: bel: unknown key; did you mean bell?"]),
        (
            GOOD,
            GOOD.replace("hub", "fixed") + "bell: true",
            ["f:1:1: file: a fixed gear has no bell"],
        ),
        (GOOD, "[1]", ["f:1:1: file: expected a mapping of key: value, got a list"]),
    ],
)
def test_what_is_wrong_is_said_with_its_place(old: str, new: str, lines: list[str]) -> None:
    assert read(GOOD.replace(old, new)) == (None, lines)
