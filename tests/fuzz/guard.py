"""Every input is answered within seconds, in one printable line, and nothing outside one folder is
touched."""

from __future__ import annotations

import functools
import hashlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy.testing  # noqa: F401 (some versions start lscpu when they are imported, before the guard listens)

LIMIT_S = 10.0
"""Processor time that one input may take: a busy machine does not stretch it."""
ROOT = Path(__file__).resolve().parents[2]
READABLE = (
    "/dev/null",
    "/proc",
    "/sys",
    "/usr/share/zoneinfo",
    sys.prefix,
    sys.base_prefix,
    Path(os.__file__).parent,
)
CHANGES = {
    **dict.fromkeys(("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod"), (0,)),
    **{"os.rename": (0, 1), "os.symlink": (1,), "os.link": (1,)},
}
"""Audit events that change files, and which of their arguments are paths."""
NEVER = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "socket.connect",
    "socket.bind",
)
LISTENING: list[Callable[[str, tuple[Any, ...]], None]] = []


class Hang(BaseException):
    """An input took too long; no reader catches it."""


def _hang(*_: Any) -> None:
    raise Hang(f"an input took more than {LIMIT_S:g} s of processor time")


def check_line(message: str, file: str = "") -> None:
    """Assert that a message is one line, printable, of bounded length, with the name of the file in
    it."""
    assert message.strip() and message.isprintable(), repr(message[:300])  # noqa: PT018
    assert len(message) <= 4000, message[:300]
    assert file in message, (file, message[:300])


@contextmanager
def in_time() -> Iterator[None]:
    """Raise :class:`Hang` when the block takes too much processor time."""
    old = signal.signal(signal.SIGPROF, _hang)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, old)


@contextmanager
def guarded(folder: Path, may_read: tuple[Path, ...] = ()) -> Iterator[None]:
    """Fail if the block writes, makes or removes anything outside a folder, or reads a foreign
    file."""
    inside, found = os.path.realpath(folder), list[str]()
    readable = (inside, *(os.path.realpath(path) for path in (*READABLE, ROOT, *may_read)))

    def hear(event: str, args: tuple[Any, ...]) -> None:
        paths = [(args[at], (inside,)) for at in CHANGES.get(event, ())]
        if event == "open":
            writes = isinstance(args[2], int) and args[2] & (
                os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
            )
            paths = [(args[0], (inside, "/dev/null") if writes else readable)]
        if event in NEVER or any(not _inside(path, folders) for path, folders in paths):
            found.append(f"{event} {args!r:.200}")

    _install()
    LISTENING.append(hear)
    old, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        LISTENING.remove(hear)
        sys.dont_write_bytecode = old
    assert not found, found[:5]


def _inside(path: Any, folders: tuple[str, ...]) -> bool:
    try:
        real = os.path.realpath(os.fsdecode(path))
    # a number of an open file, or a path that the system refuses
    except (TypeError, ValueError, OSError):
        return True
    return any(real == f or real.startswith(f"{f}/") for f in folders)


@functools.cache
def _install() -> None:
    """Audit hooks cannot be removed: there is one, which is silent while nobody listens."""
    sys.addaudithook(lambda event, args: [hear(event, args) for hear in LISTENING] and None)


def profile_with(raw: bytes, file: str = "a.npz") -> str:
    """Return a profile that names these bytes as the arrays of its elementwise operators."""
    text = (ROOT / "tests/bad_profiles/good.yaml").read_text(encoding="utf-8")
    section = (
        text[text.index("      provenance:") : text.index("      constants:")]
        + "      constants: {}\n"
    )
    section += (
        f'      arrays: {{file: {file}, sha256: "{hashlib.sha256(raw).hexdigest()}", names: [start,'
        " values]}\n"
    )
    return text[: text.index("calibrated:")] + f"calibrated:\n  elementwise:\n    bf16:\n{section}"
