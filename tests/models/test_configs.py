"""Keys of configurations: what each row of configs.yaml means, and the message for a wrong one."""

from __future__ import annotations

from typing import Any

import pytest
from shaped import Sizes, value_of
from tables import tables_of

from simulator.errors import InputError
from simulator.models.library import from_hf_config
from simulator.models.lower import lower
from simulator.models.model import Model

pytestmark = pytest.mark.quick

TABLE = tables_of("models/configs.yaml")


def content_of(row: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = TABLE["bases"][row["of"]] | row["keys"]
    return content


def stated(model: Model, path: str) -> Any:
    """The value of a field as the table states it."""
    value = value_of(model, path)
    if path == "sizes":
        return [one._asdict() for one in value]
    return list(value) if isinstance(value, tuple) else value


def filled(path: str, value: Any) -> Any:
    if path != "sizes":
        return value
    return [Sizes(**{**one, "linear": tuple(one.get("linear", ()))})._asdict() for one in value]


@pytest.mark.parametrize("row", TABLE["read"])
def test_keys_mean_what_the_table_states(row: dict[str, Any]) -> None:
    model = from_hf_config(content_of(row))
    expected = {path: filled(path, value) for path, value in row["fields"].items()}
    assert {path: stated(model, path) for path in expected} == expected
    assert lower(model, phase="prefill", batch=1, seq=8).parameters == model.parameters


@pytest.mark.parametrize("row", TABLE["refused"])
def test_a_wrong_key_is_named_in_one_line(row: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"^own.json: .*{row['reason']}") as error:
        from_hf_config(content_of(row), "own.json")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300
