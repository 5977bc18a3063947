"""Expressions of a method file: their values, and one line for all that they refuse."""

from __future__ import annotations

import math
import operator
import pickle
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tables import tables_of

from simulator.errors import InputError
from simulator.pruning.described.expressions import NAMES, Condition, Expression

pytestmark = pytest.mark.quick

SIZES = {name: 1.0 + i for i, name in enumerate(NAMES)} | {"s": 0.5}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1 - s", 0.5),
        ("-s ** 2", -0.25),
        ("2 ** -1 ** 2", 0.5),
        ("12 / 4 / 3 - 1e-3 + .5", 1.499),
        ("min(3, s, 2) + max(1, 2)", 2.5),
        ("sqrt(16) * log(1)", 0.0),
        ("round(2.5) + round(-2.5) + floor(2.9) + ceil(2.1)", 6.0),
        # 0.7 * 10 is above 7 in floating point, and 0.29 * 100 below 29
        ("ceil((1 - 0.3) * 10) + floor(0.29 * 100)", 36.0),
    ],
)
def test_values_follow_the_rules_of_arithmetic(text: str, value: float) -> None:
    assert Expression.parse(text).value({"s": 0.5}) == pytest.approx(value, abs=1e-12)


def test_sizes_can_be_arrays() -> None:
    falling = Expression.parse("min(s * layer / (layers - 1), 0.3)")
    assert falling.names == {"s", "layer", "layers"}
    values = falling.value({"s": 0.4, "layer": np.arange(3), "layers": 3})
    np.testing.assert_allclose(values, [0.0, 0.2, 0.3])
    few = Condition.parse("tokens > 1 and seq <= 4096")
    assert few.value({"tokens": np.array([1, 2]), "seq": 64}).tolist() == [0.0, 1.0]
    assert few.value({"tokens": 2, "seq": 4097}) == 0.0


def test_equal_texts_are_equal_expressions_also_in_another_process() -> None:
    one, same = Expression.parse("1 -  s"), Expression.parse("1 - s")
    assert one == same == pickle.loads(pickle.dumps(one))
    assert len({one, same, Expression.parse("1 - s * 1")}) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *tables_of("pruning/mistakes.yaml")["expressions"],
        ("s" * 1_000_000, "at most 200 characters, got 1000000"),
    ],
)
def test_other_texts_are_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Expression.parse(text)


def test_values_that_are_not_finite_name_the_expression_and_the_number() -> None:
    with pytest.raises(InputError, match=r"'1 / \(layer - 2\)': .*got divide\(1, 0\)"):
        Expression.parse("1 / (layer - 2)").value({"layer": np.arange(4)})
    with pytest.raises(InputError, match=r"'2 \*\* seq': .*exponents up to 64.*power\(2, 128\)"):
        Expression.parse("2 ** seq").value({"seq": 128})
    with pytest.raises(InputError, match="'tokens': expected some of s here, got tokens"):
        Expression.parse("tokens").value({"s": 0.5})


@pytest.mark.parametrize("text", ["tokens", "1 < seq < 9", "s > 1 or s < 0", "s != 1", "not s > 1"])
def test_conditions_are_comparisons_joined_by_and(text: str) -> None:
    with pytest.raises(InputError, match="expected"):
        Condition.parse(text)


def check_line(error: InputError) -> None:
    assert str(error).isprintable()
    assert len(str(error)) < 1000


WORDS = st.sampled_from(
    [
        *(*NAMES, *"+-*/(),.<>= ", "**", "//", "min(", "max(", "ceil(", "sqrt(", "log(", "round("),
        *("0", "1", "2.5", "1e-3", "64", "1e308", " and ", " if ", " else ", "lambda", "[", "é"),
    ]
)


@given(st.one_of(st.lists(WORDS, max_size=30).map("".join), st.text(max_size=60)))
@example("s" + "*s" * 99)
def test_every_text_has_a_value_or_one_line(text: str) -> None:
    for kind in (Expression, Condition):
        try:
            assert math.isfinite(kind.parse(text).value(SIZES))
        except InputError as error:
            check_line(error)


OPERATIONS: dict[str, Callable[..., float]] = {
    "({} + {})": operator.add,
    "({} - {})": operator.sub,
    "({} * {})": operator.mul,
    "({} / {})": operator.truediv,
    "({} ** {})": lambda a, b: math.pow(a, b) if abs(b) <= 64 else math.nan,
    "min({}, {})": min,
    "max({}, {})": max,
    "sqrt({})": math.sqrt,
    "log({})": math.log,
    "(-{})": operator.neg,
}
Formula = tuple[str, float]  # a text and its value; NaN: none


def formula(operation: str, first: Formula, second: Formula) -> Formula:
    parts = [first, second][: operation.count("{}")]
    try:
        value = OPERATIONS[operation](*(value for _, value in parts))
    except (ArithmeticError, ValueError):
        value = math.nan
    missing = not math.isfinite(value) or any(math.isnan(value) for _, value in parts)
    return operation.format(*(text for text, _ in parts)), math.nan if missing else value


LEAVES = st.sampled_from([*SIZES.items(), ("0", 0.0), ("1.5", 1.5), ("1e300", 1e300)])
FORMULAS = st.recursive(
    LEAVES, lambda inner: st.builds(formula, st.sampled_from(list(OPERATIONS)), inner, inner)
)


@given(FORMULAS.filter(lambda one: len(one[0]) <= 200))
def test_every_formula_has_the_value_of_its_parts_or_one_line(one: Formula) -> None:
    text, value = one
    try:
        assert Expression.parse(text).value(SIZES) == pytest.approx(value, rel=1e-12)
    except InputError as error:
        check_line(error)
        assert math.isnan(value)
