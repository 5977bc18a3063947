"""Parse the JSON of files that users give."""

from __future__ import annotations

import json
from typing import Any

from simulator.errors import InputError, one_line


def parse_json(content: str | bytes, label: str) -> Any:
    """Return parsed JSON; InputError for an object with a key twice, of which ``json.loads`` takes the last silently.

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

    return json.loads(content, object_pairs_hook=unique)


MOST_CONTAINERS = 300_000  # objects and lists in a file: each takes about a hundred bytes, also an empty one


def parse_bounded(content: bytes, label: str, most_bytes: int) -> Any:
    """Return the value in a JSON text in UTF-8, whose size and number of objects are checked first.

    NaN and infinity, which are not JSON but which Python writes, are read as floats. InputError, one line that starts
    with the label, for other content and for an object with a key twice.
    """
    if len(content) > most_bytes:
        raise InputError(f"{label}: is larger than {most_bytes / 1e6:g} MB; expected a smaller file")
    if (many := content.count(b"{") + content.count(b"[")) > MOST_CONTAINERS:
        raise InputError(f"{label}: expected at most {MOST_CONTAINERS:,} objects and lists, got {many:,}")
    try:
        return parse_json(content.decode("utf-8-sig"), label)
    except UnicodeDecodeError as error:
        raise InputError(f"{label}: is not UTF-8 text (byte {error.start}); expected JSON") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{label}:{error.lineno}:{error.colno}: is not JSON ({error.msg})") from None
    except RecursionError:
        raise InputError(f"{label}: is not read: too many levels of objects and lists") from None
    except ValueError as error:  # an integer of thousands of digits
        if isinstance(error, InputError):
            raise
        raise InputError(f"{label}: is not read ({one_line(str(error), 80)})") from None
