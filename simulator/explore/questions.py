"""What the browser may ask: anything else is answered with 400, before Dash looks at it.

Each callback's parameter is a ``TypedDict`` of what the page's script puts into its question. Use :func:`refuse_others`
on the server with what each output may be asked with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict, get_args, get_origin, get_type_hints, is_typeddict

CALLBACKS = "/_dash-update-component"
"""Where Dash takes the questions."""


class Selection(TypedDict):
    """The query of the address, and whether the window is a phone's."""

    search: str
    narrow: bool


class File(TypedDict):
    """A file, or of a ``*.safetensors`` its header and how many bytes follow."""

    name: str
    text: str
    room: int


class Dropped(TypedDict):
    """What was dropped, and on which control."""

    into: str
    files: list[File]


def fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value is of a type: a plain one, ``list[...]``, or a ``TypedDict``, which may have more keys.

    >>> [fits({"search": found, "narrow": True, "at": 3}, Selection) for found in ("?seq=1", 1, {})]
    [True, False, False]
    """
    if get_origin(kind) is list:
        return isinstance(value, list) and all(fits(item, get_args(kind)[0]) for item in value)
    if is_typeddict(kind):
        return isinstance(value, dict) and all(
            name in value and fits(value[name], inner) for name, inner in get_type_hints(kind).items()
        )
    return type(value) is kind


def refuse_others(server: Any, questions: Mapping[str, tuple[str, Any]]) -> None:
    """Have a Flask server refuse, with 400, what is no question: output -> the input it follows and the type of that.
    Parts of Dash that nobody has are 404."""
    from dash.exceptions import DependencyException
    from flask import request

    def checked() -> Any:
        return None if request.path != CALLBACKS or _is_question(_body(), questions) else ("not a question", 400)

    def _body() -> Any:
        try:
            return request.get_json(silent=True)
        except RecursionError:
            return None

    server.before_request(checked)
    server.register_error_handler(DependencyException, lambda _: ("not found", 404))


def _is_question(body: Any, questions: Mapping[str, tuple[str, Any]]) -> bool:
    match body:
        case {
            "output": str(output),
            "outputs": {"id": str(target), "property": "data"},
            "inputs": [{"id": str(source), "property": "data", "value": value}],
            "changedPropIds": list(changed),
        }:
            known = output == f"{target}.data" and target in questions and "state" not in body
            asked, kind = questions.get(target, ("", None))
            return known and source == asked and fits(value, kind) and all(isinstance(name, str) for name in changed)
    return False
