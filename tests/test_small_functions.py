"""Small functions by example: texts of numbers and names, quantities with units, checked arguments,
counts of work."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator import arguments, codes, display, errors, units
from simulator.arrays import array, together
from simulator.errors import InputError
from simulator.hardware.profile import named_link
from simulator.operators.base import Link
from simulator.operators.gemm import spmv_bytes
from simulator.units import EXAMPLES, UNITS, format_quantity, parse_quantity

pytestmark = pytest.mark.quick

INF, NAN = float("inf"), float("nan")
CASES: list[tuple[Any, Any]] = [
    ([units.parse_fraction(text) for text in ("0.25", "12.5%")], [0.25, 0.125]),
    ([units.parse_count(text) for text in ("64", "32k", "1.5k")], [64, 32768, 1536]),
    ([units.parse_parameters(text) for text in ("49B", "350M")], [49e9, 350e6]),
    (units.parse_ratio("1.5x"), 1.5),
    ([units.parse_value(text) for text in ("16", "0.5", "true", "mlp")], [16, 0.5, True, "mlp"]),
    ([units.seconds(value) for value in (0.0123456, 3e-6, 41.2)], ["12.3 ms", "3.00 us", "41.2 s"]),
    (units.seconds_between(0.0123456, 0.0101, 0.0142), "12.3 ms (10.1-14.2)"),
    (units.seconds_between(0.0123456, 0.0101, 0.0142, short=True), "12.3 ms (10-15)"),
    (units.seconds_between(0.0073, 0.00629, 0.00891, short=True), "7.3 ms (6.2-9.0)"),
    (
        [units.size(value) for value in (80 * 2**30, 50 * 2**20, 16.06e9)],
        ["80.0 GiB", "50.0 MiB", "15.0 GiB"],
    ),
    ([units.parameters(value) for value in (8030261248, 84.96e6)], ["8.03 B", "85.0 M"]),
    ([units.rate(3.35e12, "B/s"), units.rate(989.4e12, "FLOP/s")], ["3.35 TB/s", "989 TFLOP/s"]),
    ([units.ratio(value) for value in (1.234, 12.34, INF)], ["1.23", "12.3", "inf"]),
    ([units.percent(value) for value in (0.25, 0.1234)], ["25 %", "12.3 %"]),
    (units.finite((NAN, 1.5, {"x": (INF,)})), [None, 1.5, {"x": [None]}]),
    (
        display.as_plain({"file": PurePosixPath("a"), "share": (NAN, 1)}),
        {"file": "a", "share": [None, 1]},
    ),
    (display.by_column([{"a": 1}, {"a": 2, "b": 3}]), {"a": [1, 2], "b": [None, 3]}),
    ([display.with_and(names) for names in (["a"], ["a", "b", "c"])], ["a", "a, b and c"]),
    ([display.few("abcabc", 2), display.few("ab")], ["a, b and 1 more", "a, b"]),
    (display.markdown_text("<b> a|b *c*"), "&#60;b&#62; a&#124;b &#42;c&#42;"),
    (
        [errors.one_line("a\tb\u202e"), errors.one_line("x" * 100, 20)],
        ["a b\\u202e", "xxxxxxxx ... xxxxxxx"],
    ),
    ([arguments.whole(value) for value in (np.int64(3), 2.5, "8", True)], [3, None, None, None]),
    ([arguments.listed("engine", "vllm"), arguments.listed("batch", (1, 8))], [["vllm"], [1, 8]]),
    (
        [codes.label_of("bf16", "int4"), codes.label_of("fp8", "fp8_block")],
        ["int4_wo", "fp8_block"],
    ),
    (codes.formats_of("int4_wo", ["fp32", "fp16"]), ("fp16", "int4")),
    (spmv_bytes(np.array([1.0, 0.5]), 2.0).round(3).tolist(), [2.5, 1.25]),
    (
        named_link("pcie-host", Link("pcie4", 32e9, 1.6e-6, 8), None, "ada", "l40s").text,
        "pcie4 through host memory (no peer access)",
    ),
]


@pytest.mark.parametrize(("returned", "right"), CASES)
def test_what_is_returned(returned: Any, right: Any) -> None:
    assert returned == right


def test_arguments_are_refused_in_one_line() -> None:
    assert array("m", [1, 2048], arguments.COUNT).tolist() == [1.0, 2048.0]
    with pytest.raises(InputError, match=r"^m: expected whole numbers from 1 up, got 2\.5$"):
        array("m", 2.5, arguments.COUNT)
    with pytest.raises(
        InputError, match=r"^m, n: expected shapes that broadcast, got \(2,\), \(3,\)$"
    ):
        together(m=np.zeros(2), n=np.zeros(3))
    with pytest.raises(
        InputError, match=r"^level: expected a number between 0 and 1, such as 0\.9, got nan$"
    ):
        arguments.number("level", NAN, arguments.LEVEL)


UNIT = st.sampled_from(sorted(UNITS))


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        ("3.35 TB/s", "B/s", 3.35e12),
        ("1e3 GB/s", "B/s", 1e12),
        ("50 MiB", "B", 50 * 2**20),
        ("50 MB", "B", 50e6),
        ("80GiB", "B", 80 * 2**30),
        ("989.4 TFLOP/s", "FLOP/s", 989.4e12),
        ("1.755 GHz", "Hz", 1.755e9),
        (" 7  W ", "W", 7.0),
        ("-1 s", "s", -1.0),
        ("3.0 us", "s", 3e-6),
        ("3.0 \u00b5s", "s", 3e-6),
    ],
)
def test_quantities_are_read(text: str, unit: str, value: float) -> None:
    assert parse_quantity(text, unit) == value  # exactly: one rounding, in decimal


@pytest.mark.parametrize(
    ("text", "unit", "says"),
    [
        ("3.35", "B/s", "the unit is missing"),
        ("", "B/s", "does not start with a number"),
        ("nan TB/s", "B/s", "does not start with a number"),
        ("3.35 GHz", "B/s", "GHz is a unit of a frequency"),
        ("3.35 Tb/s", "B/s", "bits"),
        ("989 TFLOPS", "FLOP/s", "write FLOP/s"),
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
def test_wrong_quantities_are_refused(text: str, unit: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_quantity(text, unit)
    assert says in str(caught.value)
    assert EXAMPLES[unit] in str(caught.value)  # every refusal shows what would be right


@given(UNIT, st.floats(allow_nan=False, allow_infinity=False))
def test_quantities_written_are_read_again(unit: str, value: float) -> None:
    assert parse_quantity(format_quantity(value, unit), unit) == value


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (3.35e12, "B/s", "3.35 TB/s"),
        (1e9, "Hz", "1 GHz"),
        (0.0, "s", "0 s"),
        (1e-15, "s", "0.001 ps"),
        (85899345920.0, "B", "80 GiB"),
        (100.0, "B", "100 B"),
        (143771 * 2.0**20, "B", "143771 MiB"),
        (-2048.0, "B", "-2.048 kB"),
    ],
)
def test_quantities_are_written(value: float, unit: str, text: str) -> None:
    assert format_quantity(value, unit) == text


def test_close_names_begin_alike() -> None:
    devices = ["a10", "h20", "h200", "l4", "l40s", "4090", "l20"]
    for name, close in (("l400s", "l40s"), ("l2", "l20"), ("40s", "l40s")):
        hint = str(errors.unknown("GPU", name, devices)).partition("did you mean ")[2]
        assert hint.startswith(close), hint
        assert ("4090" in hint.partition("?")[0]) == (name == "40s")


def test_notes_that_differ_only_in_percentages_are_one() -> None:
    notes = ["GEMMs (47 % of the time): default", "b at 5 %", "GEMMs (9.5 % of the time): default"]
    assert display.one_percentage(notes) == ["GEMMs (9.5 to 47 % of the time): default", "b at 5 %"]
