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
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise InputError(f"{path}: cannot be read: is a folder, expected a file")
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISFIFO(status.st_mode)):  # a pipe ends; /dev/zero does not
            raise InputError(f"{path}: cannot be read: is not a regular file")
        with open(path, "rb", opener=_open) as file:
            os.set_blocking(file.fileno(), True)
            raw = file.read(most_bytes + 1) if status.st_size <= most_bytes else b""
    except InputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read: {reason}") from None
    if not raw and stat.S_ISFIFO(status.st_mode):
        raise InputError(f"{path}: cannot be read: the pipe is empty")
    if status.st_size > most_bytes or len(raw) > most_bytes:
        raise InputError(f"{path}: is larger than {most_bytes / 1e6:g} MB; expected a smaller file")
    return raw


def _open(path: str, flags: int) -> int:
    """Open a file without waiting for the writer of a named pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
