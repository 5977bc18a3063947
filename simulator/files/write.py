"""Files written whole: a reader sees the old content or the new one, never half of it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from simulator.errors import InputError


def check_target(path: str | Path) -> Path:
    """A path that a file can be written to, as far as can be told without writing it; InputError when it is a folder
    or lies in none."""
    target = Path(path)
    if target.is_dir():
        raise InputError(f"{target}: is a folder; expected the name of a file")
    if not target.parent.is_dir():
        raise InputError(f"{target}: folder {target.parent} does not exist")
    return target


def write_whole(path: str | Path, content: bytes) -> None:
    """Write a file by way of a temporary one beside it, synced, then renamed over it.

    A link is followed, so what it points to is replaced. Devices and pipes (``/dev/stdout``) cannot be replaced and are
    written directly. Raises as :func:`check_target`, and OSError when the disk is full or the folder is not writable;
    the old file, if any, is untouched.
    """
    target = check_target(path)
    try:
        if target.exists() and not target.is_file():
            target.write_bytes(content)
        else:
            with replacing(target) as name:
                Path(name).write_bytes(content)
    except OSError as error:
        error.filename = str(target)  # a failed write or sync does not name its file
        raise


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[str]:
    """Name of an empty file beside another: synced and renamed over it in the end, removed where something fails."""
    target = target.resolve()
    if target.exists():
        mode = target.stat().st_mode & 0o777
    else:
        os.umask(umask := os.umask(0o022))  # it can only be read by setting it
        mode = 0o666 & ~umask
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    os.close(handle)
    try:
        yield name
        with open(name, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(name, mode)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Let one process at a time write several files that belong together into a folder; the others wait, but where
    folders cannot be locked (Windows, some network disks)."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
