"""Convert text with a unit to an SI number and back.

Decimal prefixes mean powers of ten, binary ones powers of two: ``"50 MB"`` is 50e6 bytes, ``"50
MiB"`` 52,428,800. Arithmetic is decimal and rounds once, so :func:`parse_quantity` reads the text
of :func:`format_quantity` back to the same float.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from decimal import Context, Decimal
from types import MappingProxyType
from typing import Any

from simulator.errors import InputError

_NUMBER = re.compile(r"[+-]?(?:\d{1,30}(?:\.\d{0,30})?|\.\d{1,30})(?:[eE][+-]?\d{1,3})?", re.ASCII)
_EXACT = Context(prec=120)

_LARGE = {"": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_SMALL = {"": 0, "m": -3, "u": -6, "n": -9, "p": -12}
_BINARY = {"Ki": 1, "Mi": 2, "Gi": 3, "Ti": 4, "Pi": 5}

# SI unit -> powers of ten by prefix, whether it has binary prefixes, meaning, example
_DIMENSIONS = {
    "B": (_LARGE, True, "an amount of bytes", "50 MiB"),
    "B/s": (_LARGE, True, "a bandwidth", "3.35 TB/s"),
    "FLOP/s": (_LARGE, False, "a compute rate", "989.4 TFLOP/s"),
    "Hz": (_LARGE, False, "a frequency", "1.755 GHz"),
    "W": ({**_LARGE, **_SMALL}, False, "a power", "700 W"),
    "s": (_SMALL, False, "a time", "3.0 us"),
}


def _sizes(unit: str) -> dict[str, Decimal]:
    powers, binary, _, _ = _DIMENSIONS[unit]
    sizes = {prefix + unit: Decimal(1).scaleb(power) for prefix, power in powers.items()}
    return sizes | {
        prefix + unit: Decimal(1024) ** power for prefix, power in _BINARY.items() if binary
    }


UNITS: Mapping[str, Mapping[str, Decimal]] = MappingProxyType(
    {unit: _sizes(unit) for unit in _DIMENSIONS}
)
"""SI unit -> accepted units of a text -> size in the SI unit."""

EXAMPLES: Mapping[str, str] = MappingProxyType(
    {unit: example for unit, (*_, example) in _DIMENSIONS.items()}
)
"""SI unit -> a valid text, for messages."""

_MEANING = {unit: meaning for unit, (_, _, meaning, _) in _DIMENSIONS.items()}
_ALL = {name: unit for unit, names in UNITS.items() for name in names}
_HINTS = {
    "b": "B for bytes (b would be bits)",
    "FLOPS": "FLOP/s",
    "FLOPs": "FLOP/s",
    "OPS": "FLOP/s",
    "OP/s": "FLOP/s",
}


def parse_quantity(text: str, unit: str) -> float:
    """Convert a text such as ``"25 ns"`` to an SI number; ``unit`` is the expected unit, a key of
    :data:`UNITS`."""
    body = text.strip(" ")
    match = _NUMBER.match(body)
    symbol = (
        body[match.end() :].strip(" ").replace("\u00b5", "u").replace("\u03bc", "u")
        if match
        else ""
    )
    if match and symbol in UNITS[unit]:
        value = float(_EXACT.multiply(Decimal(match.group()), UNITS[unit][symbol]))
        if math.isfinite(value):
            return value
        problem = "the number is too large"
    elif symbol:
        problem = _unit_problem(symbol, unit)
    else:
        problem = "the unit is missing" if match else "it does not start with a number"
    raise InputError(
        f'expected {_MEANING[unit]} such as "{EXAMPLES[unit]}", got {_shown(text)}: {problem}'
    )


def parse_fraction(text: str) -> float:
    """Convert a text such as ``0.25`` or ``25 %`` to a number."""
    return float(_parsed(text, {"%": Decimal("0.01")}, "a fraction such as 0.25 or 25%"))


def parse_number(text: str) -> float:
    return float(_parsed(text, {}, "a number such as 0.8"))


def parse_count(text: str) -> int:
    """Convert a text such as ``64``, ``32k`` or ``1M`` to a whole number; k is 1024, as in lengths
    of contexts."""
    what = "a whole number such as 64 or 32k"
    value = _parsed(text, {"k": Decimal(1024), "K": Decimal(1024), "M": Decimal(1024**2)}, what)
    if value != value.to_integral_value() or abs(value) > 10**15:
        raise InputError(f"expected {what}, got {_shown(text)}")
    return int(value)


def parse_parameters(text: str) -> float:
    """Convert a number of parameters such as ``49B`` or ``350M`` to a number; K, M, B and T are
    powers of 1000."""
    sizes = {
        letter: Decimal(1000) ** power
        for power, both in enumerate(("kK", "mM", "bB", "tT"), 1)
        for letter in both
    }
    return float(_parsed(text, sizes, "a number of parameters such as 49B or 350M"))


def parse_ratio(text: str) -> float:
    """Convert a text such as ``1.5`` or ``1.5x`` to a number."""
    return float(_parsed(text, {"x": Decimal(1)}, "a ratio such as 1.5x"))


def _parsed(text: str, sizes: Mapping[str, Decimal], what: str) -> Decimal:
    """Return a number, times the size of the letter after it."""
    body = text.strip()
    size = sizes.get(body[-1:])
    match = _NUMBER.fullmatch(body if size is None else body[:-1].rstrip())
    if match is None:
        raise InputError(f"expected {what}, got {_shown(text)}")
    return _EXACT.multiply(Decimal(match.group()), size or Decimal(1))


def parse_value(text: str) -> bool | int | float | str:
    """Convert a text to a truth value or a number; return other text as it is."""
    if text in ("true", "false"):
        return text == "true"
    match = _NUMBER.fullmatch(text)
    if match is None:
        return text
    return int(text) if set(text) <= set("+-0123456789") else float(text)


def _shown(text: str) -> str:
    return f'"{text[:40]}..."' if len(text) > 40 else f'"{text}"'


def _unit_problem(symbol: str, unit: str) -> str:
    if symbol in _ALL:
        return f"{symbol} is a unit of {_MEANING[_ALL[symbol]]}"
    unknown = f"unit {_shown(symbol)} is unknown"
    for wrong, right in _HINTS.items():
        if symbol.endswith(wrong) or (wrong == "b" and symbol.rstrip("/s").endswith("b")):
            return f"{unknown}; write {right}"
    lowered = {name.lower(): name for name in UNITS[unit]}
    close = difflib.get_close_matches(symbol[:20].lower(), lowered, n=1, cutoff=0.3)
    hint = f"did you mean {lowered[close[0]]}?" if close else f"use one of {', '.join(UNITS[unit])}"
    return f"{unknown}; {hint}"


def format_quantity(value: float, unit: str) -> str:
    """Return an SI number as exact text with a suitable prefix: :func:`parse_quantity` returns the
    same float."""
    if not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {value!r}")
    if unit == "B" and value.is_integer():
        # memories are whole MiB, whose decimal text is long
        for symbol, power in reversed(_BINARY.items()):
            whole, rest = divmod(int(value), 1024**power)
            if power > 1 and whole and not rest and abs(whole) < 1_000_000:
                return f"{whole} {symbol}{unit}"
    exact = Decimal(repr(float(value)))
    powers = sorted(_DIMENSIONS[unit][0].items(), key=lambda item: item[1])
    fitting = [item for item in powers if abs(exact) >= Decimal(1).scaleb(item[1])]
    prefix, power = (fitting[-1] if fitting else powers[0]) if exact else ("", 0)
    return f"{_plain(exact.scaleb(-power))} {prefix}{unit}"


def _plain(number: Decimal) -> str:
    """Return the shortest text of a decimal: no trailing zeros, and an exponent only if the plain
    form is long."""
    exponent = number.normalize().adjusted() if number else 0
    if -7 <= exponent <= 15:
        text = f"{number:f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{number.normalize():e}"


def seconds(value: float) -> str:
    return _prefixed(value, (("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9)))


def seconds_between(value: float, lower: float, upper: float, *, short: bool = False) -> str:
    """Return a time and its interval as text in one unit; ``short``: at most 16 characters, with
    ends rounded outwards."""
    text = seconds(value)
    unit_s = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}[text.split()[1]]
    digits = len(text.split()[0].partition(".")[2])
    low, high = lower / unit_s, upper / unit_s
    if short and digits:
        digits -= 1
        step = 10.0**digits
        low, high = math.floor(low * step) / step, math.ceil(high * step) / step
        text = f"{value / unit_s:.1f} {text.split()[1]}"
    return f"{text} ({low:.{digits}f}-{high:.{digits}f})"


def size(value: float) -> str:
    return _prefixed(
        value, (("TiB", 2.0**40), ("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10), ("B", 1.0))
    )


def parameters(value: float) -> str:
    return _prefixed(value, (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0)))


def rate(value: float, unit: str) -> str:
    return _prefixed(
        value,
        (("P" + unit, 1e15), ("T" + unit, 1e12), ("G" + unit, 1e9), ("M" + unit, 1e6), (unit, 1.0)),
    )


def ratio(value: float) -> str:
    return f"{value:.2f}" if value < 10 or not math.isfinite(value) else f"{value:.3g}"


def percent(value: float) -> str:
    """Return a fraction as text in percent, with at most one decimal."""
    return f"{100 * value:.1f}".removesuffix(".0") + " %"


def _prefixed(value: float, units: Sequence[tuple[str, float]]) -> str:
    if not math.isfinite(value):
        return str(value)
    name, scale = next(((n, s) for n, s in units if abs(value) >= 0.9995 * s), units[-1])
    scaled = value / scale
    digits = 0 if abs(scaled) >= 99.95 else 1 if abs(scaled) >= 9.995 else 2
    return f"{scaled:.{digits}f} {name}"


def finite(value: Any) -> Any:
    """Return a value for JSON: infinite numbers and NaN become null at any depth, NumPy values
    become plain ones."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {name: finite(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
