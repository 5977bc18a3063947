"""Read files with a size limit: larger files, devices and endless streams are rejected before they fill the memory."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from simulator.errors import InputError

MOST_TABLE_BYTES = 256_000_000  # shipped tables have up to 250 kB


def read_bounded(path: str | Path, most_bytes: int = MOST_TABLE_BYTES) -> bytes:
    """Return all bytes of a file or pipe; InputError for a missing or larger file, a folder or a device."""
    try:
        return content_of(path, most_bytes)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def content_of(path: str | Path, most_bytes: int) -> bytes:
    """Return all bytes of a file or pipe; the InputError does not name the file."""
    raw = b""
    try:
        status = os.stat(path)
        kind = stat.S_IFMT(status.st_mode)
        if kind in (stat.S_IFREG, stat.S_IFIFO) and status.st_size <= most_bytes:
            # without O_NONBLOCK, opening a pipe waits for its writer
            with open(path, "rb", opener=lambda at, flags: os.open(at, flags | getattr(os, "O_NONBLOCK", 0))) as file:
                os.set_blocking(file.fileno(), True)
                raw = file.read(most_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise InputError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if kind == stat.S_IFDIR:
        raise InputError("cannot be read: is a folder, expected a file")
    if kind not in (stat.S_IFREG, stat.S_IFIFO):  # a pipe ends; /dev/zero does not
        raise InputError("cannot be read: is not a regular file")
    if kind == stat.S_IFIFO and not raw:
        raise InputError("cannot be read: the pipe is empty")
    if max(status.st_size, len(raw)) > most_bytes:
        raise InputError(f"is larger than {most_bytes / 1e6:g} MB; expected a smaller file")
    return raw
