"""Units: what is read, what is refused and how, and that writing and reading are inverse."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.errors import InputError
from simulator.units import EXAMPLES, UNITS, format_quantity, parse_quantity

pytestmark = pytest.mark.quick

UNIT = st.sampled_from(sorted(UNITS))


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        ("3.35 TB/s", "B/s", 3.35e12), ("2039 GB/s", "B/s", 2.039e12), ("1e3 GB/s", "B/s", 1e12),
        ("50 MiB", "B", 50 * 2**20), ("50 MB", "B", 50e6), ("80GiB", "B", 80 * 2**30),
        ("989.4 TFLOP/s", "FLOP/s", 989.4e12), ("1.755 GHz", "Hz", 1.755e9), ("1410 MHz", "Hz", 1.41e9),
        ("700 W", "W", 700.0), (" 7  W ", "W", 7.0), ("-1 s", "s", -1.0), ("25 ns", "s", 25e-9),
        ("3.0 us", "s", 3e-6), ("3.0 \u00b5s", "s", 3e-6),
    ],
)  # fmt: skip
def test_read(text: str, unit: str, value: float) -> None:
    assert parse_quantity(text, unit) == value  # exactly: one rounding, in decimal


@pytest.mark.parametrize(
    ("text", "unit", "says"),
    [
        ("3.35", "B/s", "the unit is missing"),
        ("TB/s", "B/s", "does not start with a number"),
        ("", "B/s", "does not start with a number"),
        ("nan TB/s", "B/s", "does not start with a number"),
        ("inf W", "W", "does not start with a number"),
        ("3.35 GHz", "B/s", "GHz is a unit of a frequency"),
        ("80 GB", "B/s", "GB is a unit of an amount of bytes"),
        ("3.35 Tb/s", "B/s", "bits"),
        ("3.35 tb/s", "B/s", "bits"),
        ("989 TFLOPS", "FLOP/s", "write FLOP/s"),
        ("989 TOPS", "FLOP/s", "write FLOP/s"),
        ("3 parsec", "s", "unknown"),
        ("1.755 ghz", "Hz", "did you mean GHz?"),
        ("1,5 GHz", "Hz", "unknown"),
        ("0x10 W", "W", "unknown"),
        ("1e999 W", "W", "too large"),
        ("1" * 400 + " W", "W", "unknown"),
        ("\t3 W", "W", "does not start with a number"),
        ("3 W\n", "W", "unknown"),
    ],
)
def test_refused(text: str, unit: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_quantity(text, unit)
    assert says in str(caught.value)
    assert EXAMPLES[unit] in str(caught.value)  # every refusal shows what would be right


@given(UNIT, st.floats(allow_nan=False, allow_infinity=False))
def test_round_trip(unit: str, value: float) -> None:
    assert parse_quantity(format_quantity(value, unit), unit) == value


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (3.35e12, "B/s", "3.35 TB/s"), (1e9, "Hz", "1 GHz"), (999.0, "W", "999 W"), (0.0, "s", "0 s"),
        (1e-15, "s", "0.001 ps"), (85899345920.0, "B", "80 GiB"), (80e9, "B", "80 GB"), (100.0, "B", "100 B"),
        (143771 * 2.0**20, "B", "143771 MiB"), (-2048.0, "B", "-2.048 kB"),
    ],
)  # fmt: skip
def test_written(value: float, unit: str, text: str) -> None:
    assert format_quantity(value, unit) == text
