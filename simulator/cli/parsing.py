"""Parse texts of options: comma lists, ranges, numbers with units, NAME=VALUE pairs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from simulator.errors import InputError
from simulator.units import parse_count, parse_fraction, parse_value

T = TypeVar("T")

MOST = 10_000  # most values of a range


def names(option: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise InputError(f"{option} {text!r}: expected names separated by single commas")
    return parts


def integers(option: str, text: str) -> list[int]:
    """Parse a comma list of whole numbers and ranges; a range doubles, or has a step: ``1:64``,
    ``1:64:8``."""
    expected = "FIRST:LAST, which doubles, or FIRST:LAST:STEP"
    return _with_ranges(option, text, parse_count, _whole, expected)


def fractions(option: str, text: str) -> list[float]:
    """Parse a comma list of fractions and ranges; the step of a range is 0.1 unless it is
    stated."""
    expected = "FIRST:LAST or FIRST:LAST:STEP, such as 0.1:0.5:0.05"
    return _with_ranges(option, text, parse_fraction, _steps, expected)


def _with_ranges(
    option: str,
    text: str,
    parse: Callable[[str], T],
    values: Callable[..., list[T]],
    expected: str,
) -> list[T]:
    """Parse a comma list of numbers and ranges; ``values`` returns those of a range, none for a
    range that is not valid."""
    out: list[T] = []
    for part in names(option, text):
        first, *others = (checked(option, end, parse) for end in part.split(":"))
        found = values(first, *others) if 0 < len(others) < 3 else []
        if others and not found:
            raise InputError(f"{option} {part!r}: expected {expected}")
        out += found or [first]
    return list(dict.fromkeys(out))


def _whole(first: int, last: int, step: int | None = None) -> list[int]:
    if not 1 <= first <= last or step == 0 or (step and (last - first) // step > MOST):
        return []
    if step:
        return [*range(first, last, step), last]
    doubled = (first << i for i in range(last.bit_length()))
    return [*itertools.takewhile(lambda value: value < last, doubled), last]


def _steps(first: float, last: float, step: float = 0.1) -> list[float]:
    if not first <= last or not step > 0 or (last - first) / step > MOST:
        return []
    return [round(first + i * step, 9) for i in range(int((last - first) / step + 1e-9) + 1)]


def checked(option: str, text: str, parse: Callable[[str], T]) -> T:
    """Return a parsed text; errors name the option."""
    try:
        return parse(text)
    except InputError as error:
        raise InputError(f"{option} {text!r}: {error}") from None


def settings(option: str, texts: Sequence[str] | None) -> dict[str, Any]:
    """Parse NAME=VALUE pairs; a value is a whole number, a number, true or false, a comma list of
    these, or a word."""
    out: dict[str, Any] = {}
    for text in texts or ():
        name, value = pair(option, text)
        name = name.replace("-", "_")
        if name in out:
            raise InputError(f"{option} {text!r}: {name} is given twice")
        out[name] = (
            [parse_value(part) for part in names(option, value)]
            if "," in value
            else parse_value(value)
        )
    return out


def pair(option: str, text: str, expected: str = "NAME=VALUE") -> tuple[str, str]:
    name, equals, value = (part.strip() for part in text.partition("="))
    if not (name and equals and value):
        raise InputError(f"{option} {text!r}: expected {expected}")
    return name, value
