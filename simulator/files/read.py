"""Read files, and JSON, with limits: larger files, devices and endless streams do not fill the memory."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from simulator.errors import InputError, one_line

MOST_TABLE_BYTES = 256_000_000  # shipped tables have up to 250 kB
MOST_CONTAINERS = 300_000  # objects and lists in JSON: each takes about a hundred bytes, also an empty one


def read_bounded(path: str | Path, most_bytes: int = MOST_TABLE_BYTES, place: str | None = None) -> bytes:
    """Return all bytes of a file or pipe; errors, for a missing or larger file, a folder or a device, start with
    ``place``, by default the path."""
    place, raw = f"{path}: " if place is None else place, b""
    try:
        status = os.stat(path)
        kind = stat.S_IFMT(status.st_mode)
        if kind in (stat.S_IFREG, stat.S_IFIFO) and status.st_size <= most_bytes:
            # without O_NONBLOCK, opening a pipe waits for its writer
            with open(path, "rb", opener=lambda at, flags: os.open(at, flags | getattr(os, "O_NONBLOCK", 0))) as file:
                os.set_blocking(file.fileno(), True)
                raw = file.read(most_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise InputError(f"{place}cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if kind == stat.S_IFDIR:
        raise InputError(f"{place}cannot be read: is a folder, expected a file")
    if kind not in (stat.S_IFREG, stat.S_IFIFO):  # a pipe ends; /dev/zero does not
        raise InputError(f"{place}cannot be read: is not a regular file")
    if kind == stat.S_IFIFO and not raw:
        raise InputError(f"{place}cannot be read: the pipe is empty")
    if max(status.st_size, len(raw)) > most_bytes:
        raise InputError(f"{place}is larger than {most_bytes / 1e6:g} MB; expected a smaller file")
    return raw


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
