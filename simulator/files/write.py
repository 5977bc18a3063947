"""Files written whole: a reader sees the old content or the new one, never half of it."""

from __future__ import annotations

import contextlib
import glob
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from simulator.errors import InputError

_SUFFIX = ".tmp"


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
    """Name of an empty file beside another: synced and renamed over it in the end, removed where something fails. What
    writers of the same file left there when they were killed is removed too."""
    target = target.resolve()
    if target.exists():
        mode = target.stat().st_mode & 0o777
    else:
        os.umask(umask := os.umask(0o022))  # it can only be read by setting it
        mode = 0o666 & ~umask
    remove_left(target.parent, glob.escape(target.name))
    handle, name = _temporary(target)
    try:
        yield name
        with open(name, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(name, mode)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)


def _temporary(target: Path) -> tuple[int, str]:
    """An empty file beside another, locked while it is written: whose lock is free is no longer written by anyone."""
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=_SUFFIX, dir=target.parent)
        if not _lock(handle, wait=True) or os.fstat(handle).st_nlink:
            return handle, name
        os.close(handle)  # taken for one that was left, and removed, before it was locked


def remove_left(folder: Path, names: str) -> None:
    """Remove the temporary files beside some files (a pattern) that no process writes any more."""
    for path in folder.glob(f".{names}.*{_SUFFIX}"):
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDWR)
            try:
                if _lock(handle):
                    path.unlink(missing_ok=True)
            finally:
                os.close(handle)


def _lock(handle: int, wait: bool = False) -> bool:
    """Lock an open file or folder until it is closed, however its process ends; False where another has it, or where
    there are no locks (Windows, some network disks)."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (ImportError, OSError):
        return False
    return True


@contextlib.contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Let one process at a time write several files that belong together into a folder; the others wait, but where
    folders cannot be locked (Windows, some network disks)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        yield
        return
    try:
        _lock(handle, wait=True)
        yield
    finally:
        os.close(handle)
