"""Write files atomically: a reader sees the old or the new content, never a part."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from simulator.errors import InputError


def check_target(path: str | Path) -> Path:
    """Return a path that a file can probably be written to; raise InputError for a folder or a
    missing folder."""
    target = Path(path)
    try:
        is_folder, in_folder = target.is_dir(), target.parent.is_dir()
    except OSError as error:  # such as a name that is too long
        raise InputError(
            f"{target}: cannot be written ({error.strerror}); expected the name of a file"
        ) from None
    if is_folder:
        raise InputError(f"{target}: is a folder; expected the name of a file")
    if not in_folder:
        raise InputError(f"{target}: folder {target.parent} does not exist")
    return target


def refuse_links(folder: Path, name: str = "*") -> None:
    """Raise InputError for a link in an output folder, through which a file elsewhere would be
    written."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.match(name) and path.is_symlink() and not path.is_dir():
            raise InputError(
                f"{path}: expected a file, got a link; remove it or choose another folder"
            )


def write_whole(path: str | Path, content: bytes) -> None:
    """Write a file through a temporary file, which is synced and renamed; devices and pipes are
    written directly."""
    target = check_target(path)
    try:
        if target.exists() and not target.is_file():
            _write_directly(target, content)
        else:
            _replace(target.resolve(), content)
    except OSError as error:
        error.filename = str(target)  # errors of write and sync lack the name
        raise


def _write_directly(target: Path, content: bytes) -> None:
    """Write into a device or a pipe."""

    def opened(path: str, flags: int) -> int:
        # without O_NONBLOCK, opening a pipe waits for a reader
        return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))

    try:
        with open(target, "wb", opener=opened) as file:
            os.set_blocking(file.fileno(), True)
            file.write(content)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise InputError(f"{target}: expected a pipe that a process reads") from None
        raise


def _replace(target: Path, content: bytes) -> None:
    """Replace a file, or create it, and remove temporary files of killed writers."""
    remove_left(target.parent, glob.escape(target.name))
    with _temporary(target) as file:  # the lock lasts until the file is closed
        try:
            if target.exists():
                os.chmod(file.name, target.stat().st_mode & 0o777)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, target)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def _temporary(target: Path) -> BinaryIO:
    """Create an empty file in the target's folder and lock it, so others do not remove it."""
    while True:
        file = open(target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp"), "xb")  # noqa: SIM115 - returned
        if not _lock(file.fileno(), wait=True) or os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # another process removed it before it was locked


def remove_left(folder: Path, names: str) -> None:
    """Remove the temporary files, of targets whose names match a pattern, that no process
    writes."""
    for path in folder.glob(f".{names}.*.tmp"):
        with contextlib.suppress(OSError), open(path, "rb+") as file:
            if _lock(file.fileno()):
                path.unlink(missing_ok=True)


def _lock(handle: int, wait: bool = False) -> bool:
    """Lock an open file or folder until it is closed; False if it is locked, or without locks
    (Windows, some disks)."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (ImportError, OSError):
        return False
    return True


@contextlib.contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Let one process at a time write related files into a folder; no effect without file locks."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            _lock(handle, wait=True)
        yield
