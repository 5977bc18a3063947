"""Parse the JSON of files that users give."""

from __future__ import annotations

import json
from typing import Any

from simulator.errors import InputError, one_line

MOST_CONTAINERS = 300_000  # objects and lists in a file: each takes about a hundred bytes, also an empty one


def parse_json(content: str | bytes, label: str) -> Any:
    """Return parsed JSON; InputError for an object that has a key twice, where ``json.loads`` takes the last value."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                key = one_line(repr(name), 80)
                raise InputError(f"{label}: key {key}: expected once in an object, got twice or more; keep one")
            found[name] = value
        return found

    return json.loads(content, object_pairs_hook=unique)


def parse_bounded(content: bytes, label: str, most_bytes: int) -> Any:
    """Return the value of a JSON text in UTF-8, which may have NaN and infinity; limits are checked first."""
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
