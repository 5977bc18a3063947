"""Parse texts of options: comma lists, ranges, numbers with units, pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from simulator.errors import InputError
from simulator.units import parse_count, parse_fraction

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
    out: list[int] = []
    for part in names(option, text):
        ends = [checked(option, end, parse_count) for end in part.split(":")]
        if len(ends) == 1:
            out += ends
            continue
        first, last, step = (*ends, 0)[:3]
        if (
            len(ends) > 3
            or not 1 <= first <= last
            or step < (len(ends) == 3)
            or (step and (last - first) // step > MOST)
        ):
            raise InputError(
                f"{option} {part!r}: expected FIRST:LAST, which doubles, or FIRST:LAST:STEP"
            )
        while first < last:
            out.append(first)
            first = first + step if step else 2 * first
        out.append(last)
    return list(dict.fromkeys(out))


def fractions(option: str, text: str) -> list[float]:
    """Parse a comma list of fractions and ranges; the step of a range is 0.1 unless it is
    stated."""
    out: list[float] = []
    for part in names(option, text):
        ends = [checked(option, end, parse_fraction) for end in part.split(":")]
        if len(ends) == 1:
            out += ends
            continue
        first, last, step = (*ends, 0.1)[:3]
        if len(ends) > 3 or not first <= last or not step > 0 or (last - first) / step > MOST:
            raise InputError(
                f"{option} {part!r}: expected FIRST:LAST or FIRST:LAST:STEP, such as 0.1:0.5:0.05"
            )
        out += [round(first + i * step, 9) for i in range(int((last - first) / step + 1e-9) + 1)]
    return list(dict.fromkeys(out))


def checked(option: str, text: str, parse: Callable[[str], T]) -> T:
    """Return a parsed text; errors name the option."""
    try:
        return parse(text)
    except InputError as error:
        raise InputError(f"{option} {text!r}: {error}") from None


def pair(option: str, text: str, expected: str) -> tuple[str, str]:
    name, equals, value = (part.strip() for part in text.partition("="))
    if not (name and equals and value):
        raise InputError(f"{option} {text!r}: expected {expected}")
    return name, value
