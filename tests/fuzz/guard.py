"""What the fuzz tests hold every input to: answered within seconds, in one printable line, and nothing touched outside.

Use :func:`refusal` for one input and :class:`Guard` around many. The guard listens to the interpreter's audit events:
files opened for writing, made, moved or removed outside one folder, files read outside the places a run may read,
programs started, sockets opened.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from simulator.errors import InputError

LIMIT_S, WAIT_S = 5.0, 60.0
"""Most that an input may take: processor time, which a busy machine does not stretch, and time on the wall."""

MOST_CHARACTERS = 4000
"""Longest message: lists of known names and of columns are long, what came in is cut."""

ROOT = Path(__file__).resolve().parents[2]
_PROGRAMS = (ROOT, Path(sys.prefix), Path(sys.base_prefix), Path(os.__file__).parent)
_CHANGES = {
    **dict.fromkeys(("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod"), (0,)),
    **{"os.rename": (0, 1), "os.symlink": (1,), "os.link": (1,)},
}
"""Events that change something, and which of their arguments is its place."""
_NEVER = (
    *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "socket.bind"),
    "pickle.find_class",
)


class Hang(BaseException):
    """An input took longer than it may; no reader may catch it."""


@contextmanager
def in_time() -> Iterator[None]:
    """A :class:`Hang` where what is done takes longer than it may, within a :class:`Guard`."""
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    signal.setitimer(signal.ITIMER_REAL, WAIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def refusal(read: Callable[[], Any], file: str = "") -> tuple[str, Any]:
    """("" and what was read) or (the refusal, which names ``file``, and None); any other exception goes on up."""
    try:
        with in_time():
            return "", read()
    except InputError as error:
        message = str(error)
    check_line(message, file)
    return message, None


def check_line(message: str, file: str = "") -> None:
    """One line, printable, not endless, with the file's name in it."""
    assert message.strip(), "an empty message"
    assert message.isprintable(), repr(message[:300])
    assert len(message) <= MOST_CHARACTERS, message[:300]
    assert file in message, (file, message[:300])


class Guard:
    """Sets the watchdog and listens; :meth:`check` fails for whatever was touched outside ``folder``."""

    def __init__(self, folder: Path, may_read: tuple[Path, ...] = ()) -> None:
        self.folder = os.path.realpath(folder)
        allowed = [os.path.realpath(path) for path in (*_PROGRAMS, *may_read)]
        self.readable = (self.folder, *allowed, "/dev/null", "/proc", "/sys", "/usr/share/zoneinfo")
        self.found: list[str] = []
        self._old: Any = None
        self._bytecode = sys.dont_write_bytecode

    def __enter__(self) -> Guard:
        self._old = {number: signal.signal(number, _hang) for number in (signal.SIGALRM, signal.SIGPROF)}
        sys.dont_write_bytecode = True  # a module that is imported late writes nothing either
        _install()
        _LISTENING.append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        _LISTENING.remove(self)
        sys.dont_write_bytecode = self._bytecode
        for number, handler in self._old.items():
            signal.signal(number, handler)
        if kind is None:
            self.check()

    def check(self) -> None:
        """Fail if anything outside was touched."""
        assert not self.found, self.found[:5]

    def hear(self, event: str, args: tuple[Any, ...]) -> None:
        """Note an event that should not be."""
        if event in _NEVER:
            self.found.append(f"{event} {args!r:.200}")
        elif event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
            flags = args[2] if isinstance(args[2], int) else 0
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
            if not self._inside(args[0], (self.folder, "/dev/null") if writes else self.readable):
                self.found.append(f"{'write' if writes else 'read'} {args[0]!r:.200}")
        for at in _CHANGES.get(event, ()):
            if isinstance(args[at], (str, bytes, os.PathLike)) and not self._inside(args[at], (self.folder,)):
                self.found.append(f"{event} {args[at]!r:.200}")

    @staticmethod
    def _inside(path: Any, folders: tuple[str, ...]) -> bool:
        try:
            real = os.path.realpath(os.fsdecode(path))
        except (ValueError, OSError):  # no path at all: the system refuses it too
            return True
        return any(real == f or real.startswith(f.rstrip("/") + "/") for f in folders)


_LISTENING: list[Guard] = []


@functools.cache
def _install() -> None:
    """Audit hooks cannot be removed: one, which is silent while nobody listens."""
    sys.addaudithook(_audit)


def _audit(event: str, args: tuple[Any, ...]) -> None:
    for guard in _LISTENING:
        guard.hear(event, args)


def _hang(number: int, frame: FrameType | None) -> None:
    raise Hang(f"an input took longer than {LIMIT_S:g} s of processor time, or {WAIT_S:g} s")
