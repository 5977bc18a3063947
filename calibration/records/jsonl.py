"""JSON lines that know whether they are whole: each ends with a CRC-32 of what is before it."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from typing import Any

_CRC = re.compile(rb',"crc":"([0-9a-f]{8})"\}$')


def encode_line(line: Mapping[str, Any]) -> bytes:
    """A mapping as one line with its checksum.

    Raises
    ------
    ValueError
        When it is no JSON (not a number, an array) or names ``crc`` itself.

    Examples
    --------
    >>> encode_line({"a": 1})
    b'{"a":1,"crc":"561bacaf"}\\n'
    """
    if "crc" in line or not line:
        raise ValueError("a record needs at least one field, and none of the name 'crc'")
    body = json.dumps(dict(line), separators=(",", ":"), allow_nan=False).encode()
    return body[:-1] + b',"crc":"%08x"}\n' % zlib.crc32(body)


def decode_line(line: bytes) -> dict[str, Any] | None:
    """The inverse of :func:`encode_line`; None when the line is cut or damaged.

    >>> decode_line(b'{"a":1,"crc":"561bacaf"}'), decode_line(b'{"a":2,"crc":"561bacaf"}')
    ({'a': 1}, None)
    """
    found = _CRC.search(line)
    if found is None:
        return None
    body = line[: found.start()] + b"}"
    if zlib.crc32(body) != int(found.group(1), 16):
        return None
    try:
        out = json.loads(body, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return out if isinstance(out, dict) else None


def _refuse(text: str) -> float:
    raise ValueError(f"{text} is not JSON")
