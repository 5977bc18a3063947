"""Accept the page's own requests only; answer all others with 400, before Dash reads them.

Each callback's parameter is a ``TypedDict`` of the data that the page's script sends. Use :func:`reject_others` on the
server, with the input of each output.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TypedDict, get_args, get_origin, get_type_hints, is_typeddict

CALLBACKS = "/_dash-update-component"
"""Path at which Dash receives requests."""

MOST_VALUES = 200_000
"""Maximum number of values in a request; one with the files of a whole checkpoint has 30,000. Parsed values need up to
30 times the memory of their text."""


class Selection(TypedDict):
    """Query of the address, and whether the window is as narrow as a phone."""

    search: str
    narrow: bool


class File(TypedDict):
    """A file, or the header of a ``*.safetensors`` and the number of bytes after it."""

    name: str
    text: str
    room: int


class Dropped(TypedDict):
    """Dropped files, and the control that they were dropped on."""

    into: str
    files: list[File]


def fits(value: Any, kind: Any) -> bool:
    """Return whether a JSON value is of a type: a plain one, ``list[...]``, or a ``TypedDict`` (more keys are allowed).

    >>> [fits({"search": found, "narrow": True, "at": 3}, Selection) for found in ("?seq=1", 1, {})]
    [True, False, False]
    """
    if get_origin(kind) is list:
        return isinstance(value, list) and all(fits(item, get_args(kind)[0]) for item in value)
    if is_typeddict(kind):
        return isinstance(value, dict) and all(
            name in value and fits(value[name], inner) for name, inner in _fields(kind).items()
        )
    return type(value) is kind


@lru_cache(maxsize=8)
def _fields(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def reject_others(server: Any, questions: Mapping[str, tuple[str, Any]]) -> None:
    """Make a Flask server reject invalid requests with 400, and unknown parts of Dash with 404; ``questions`` maps each
    output to its input and the type of that input."""
    from dash.exceptions import DependencyException
    from flask import request

    def checked() -> Any:
        if request.path != CALLBACKS:
            return None
        valid = has_few_values(request.get_data()) and _is_question(_body(), questions)
        return None if valid else ("invalid request", 400)

    def _body() -> Any:
        try:
            return request.get_json(silent=True)
        except RecursionError:
            return None

    server.before_request(checked)
    server.register_error_handler(DependencyException, lambda _: ("not found", 404))


def has_few_values(body: bytes) -> bool:
    """Return whether a JSON text has at most about MOST_VALUES values, without parsing it; files in it are one string
    each, whatever they contain.

    >>> has_few_values(b'["[[[[]]]]"]'), has_few_values(b"[" * 1_000_000)
    (True, False)
    """
    if b"\0" in body:  # UTF-16, in which quotes cannot be found as below
        return False
    if _separators(body) <= MOST_VALUES:
        return True
    unescaped = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    if unescaped.count(b'"') > 4 * MOST_VALUES:  # a key and a text per value
        return False
    return _separators(b"".join(unescaped.split(b'"')[::2])) <= MOST_VALUES


def _separators(text: bytes) -> int:
    """Return the number of characters that can start a value."""
    return sum(map(text.count, (b",", b"[", b"{")))


def _is_question(body: Any, questions: Mapping[str, tuple[str, Any]]) -> bool:
    match body:
        case {
            "output": str(output),
            "outputs": {"id": str(target), "property": "data"},
            "inputs": [{"id": str(source), "property": "data", "value": value}],
            "changedPropIds": list(changed),
        }:
            known = output == f"{target}.data" and target in questions and "state" not in body
            expected, kind = questions.get(target, ("", None))
            return known and source == expected and fits(value, kind) and all(isinstance(name, str) for name in changed)
    return False
