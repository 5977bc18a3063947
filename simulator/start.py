"""Start the program: an interrupt and SIGTERM end it with one line and a status of its own."""

from __future__ import annotations

import atexit
import importlib
import os
import signal
import sys
from types import FrameType
from typing import Any, NoReturn

INTERRUPTED, TERMINATED = 130, 143


def start(program: str) -> None:
    """Import a module with a function ``run``, run the command line, and exit with the returned
    status."""
    atexit.register(_ignore_signals)  # the first one that is registered runs last
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the stream was closed at the start
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - as long as the program
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # unprintable characters must not fail
    signal.signal(signal.SIGTERM, _terminate)
    sys.unraisablehook = _end_if_signalled
    try:
        status = importlib.import_module(program).run(sys.argv[1:])
    except KeyboardInterrupt:
        os.write(2, b"prunesim: interrupted\n")
        status = INTERRUPTED
    if status == INTERRUPTED:  # after an interrupt inside exec(), Python ends by signal instead
        atexit._run_exitfuncs()
        os._exit(status)
    sys.exit(status)


def _terminate(number: int, _: FrameType | None) -> NoReturn:
    """Raise SystemExit, so workers end and partial files are removed; a second signal kills the
    process."""
    signal.signal(number, signal.SIG_DFL)
    os.write(2, b"prunesim: terminated\n")
    raise SystemExit(TERMINATED)


def _end_if_signalled(found: Any) -> None:
    """End the program after a signal whose exception Python ignores: in a destructor, or between
    two imports."""
    if isinstance(found.exc_value, SystemExit):
        os._exit(TERMINATED)
    if isinstance(found.exc_value, KeyboardInterrupt):
        os.write(2, b"prunesim: interrupted\n")
        os._exit(INTERRUPTED)
    sys.__unraisablehook__(found)


def _ignore_signals() -> None:
    """Let a program that is done end with its status: Python restores the default actions before it
    ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
