"""Start the program: signals end it with one line from the first moment, also during imports and at the end."""

from __future__ import annotations

import atexit
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

INTERRUPTED, TERMINATED = 130, 143

_LINES = {INTERRUPTED: b"prunesim: interrupted\n", TERMINATED: b"prunesim: terminated\n"}


def start(program: str) -> None:
    """Import a module with a function ``run``, run the command line, and exit with the returned status."""
    atexit.register(_ignore_signals)  # the first one that is registered runs last
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the stream was closed at the start
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - as long as the program
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # unprintable characters must not fail
    try:
        answered = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else ignored, as under nohup
        if answered:
            signal.signal(signal.SIGINT, _leave)
        signal.signal(signal.SIGTERM, _leave)
        run = importlib.import_module(program).run
        if answered:
            signal.signal(signal.SIGINT, _after_import(_interrupt))
        signal.signal(signal.SIGTERM, _after_import(_terminate))
        status = run(sys.argv[1:])
        if answered:
            signal.signal(signal.SIGINT, _leave)
        signal.signal(signal.SIGTERM, _leave)
    except KeyboardInterrupt:
        _leave(signal.SIGINT)
    if status == INTERRUPTED:  # after Ctrl-C, Python can end by signal instead
        atexit._run_exitfuncs()
        os._exit(status)
    sys.exit(status)


def _ignore_signals() -> None:
    """Let a program that is done end with its status: Python restores the default actions before it ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _leave(number: int, _frame: FrameType | None = None) -> NoReturn:
    """Exit immediately: an exception during imports could be lost, and there is nothing to clean up."""
    status = 128 + number
    os.write(2, _LINES[status])
    os._exit(status)


def _interrupt(_: int) -> NoReturn:
    raise KeyboardInterrupt


def _terminate(number: int) -> NoReturn:
    """Raise SystemExit, so workers end and partial files are removed; a second signal kills the process."""
    signal.signal(number, signal.SIG_DFL)
    os.write(2, _LINES[TERMINATED])
    raise SystemExit(TERMINATED)


def _after_import(end: Callable[[int], NoReturn]) -> Callable[[int, FrameType | None], None]:
    """Return a signal handler that calls ``end``.

    Callbacks of an import would swallow its exception: during an import, the signal is sent again until the import is
    done, for about a second.
    """
    tries = iter(range(50))

    def handle(number: int, frame: FrameType | None) -> None:
        if not _importing(frame) or next(tries, None) is None:
            end(number)
        again = threading.Timer(0.02, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()

    return handle


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
