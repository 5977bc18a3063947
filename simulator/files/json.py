"""Parse the JSON of files that users give: :func:`parse_json`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from simulator.errors import InputError, one_line


def parse_json(content: str | bytes, label: str, parse_constant: Callable[[str], float] | None = None) -> Any:
    """Return parsed JSON in which no object has a key twice; ``json.loads`` takes the last of two silently.

    Raises InputError, one line that starts with the label, for such a key; other errors are those of ``json.loads``.

    >>> parse_json('{"a": 1, "b": {"c": 2}}', "x.json")
    {'a': 1, 'b': {'c': 2}}
    >>> parse_json('{"a": 1, "b": {"c": 2, "c": 3}}', "x.json")
    Traceback (most recent call last):
    simulator.errors.InputError: x.json: key 'c': expected once in an object, got twice or more; keep one
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                place = f"{label}: key {one_line(repr(name), 80)}"
                raise InputError(f"{place}: expected once in an object, got twice or more; keep one")
            found[name] = value
        return found

    return json.loads(content, object_pairs_hook=unique, parse_constant=parse_constant)
