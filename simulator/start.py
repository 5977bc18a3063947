"""Start the program: signals end it with one line from the first moment, also during imports and at the end."""

from __future__ import annotations

import atexit
import importlib
import os
import signal
import sys
import threading
from types import FrameType
from typing import NoReturn

INTERRUPTED, TERMINATED = 130, 143


def start(program: str) -> None:
    """Import a module with a function ``run``, run the command line, and exit with the returned status."""
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
        run = importlib.import_module(program).run
        if answered:
            signal.signal(signal.SIGINT, _interrupt)
        signal.signal(signal.SIGTERM, _terminate)
        status = run(sys.argv[1:])
        if answered:
            signal.signal(signal.SIGINT, _leave)
    except KeyboardInterrupt:
        _leave()
    if status == INTERRUPTED:  # after Ctrl-C, Python can end by signal instead
        atexit._run_exitfuncs()
        os._exit(status)
    sys.exit(status)


def _leave(*_: object) -> NoReturn:
    """Exit immediately: an exception during imports could be lost, and there is nothing to clean up."""
    os.write(2, b"prunesim: interrupted\n")
    os._exit(INTERRUPTED)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt; during an import, whose callbacks would swallow it, try again later."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            again = threading.Timer(0.02, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def _terminate(number: int, _frame: FrameType | None) -> NoReturn:
    """Raise SystemExit, so workers end and partial files are removed; a second signal kills the process."""
    signal.signal(number, signal.SIG_DFL)
    os.write(2, b"prunesim: terminated\n")
    raise SystemExit(TERMINATED)
