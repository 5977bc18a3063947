"""The start of the program: signals are answered in one line from the first moment on, before anything large is
imported and after everything is done.
"""

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
    """Import a module that has ``run``, let it run the command line, and end with the status that it returns."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # started with that stream closed
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - as long as the program
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character is no reason to fail
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
    if status == INTERRUPTED:  # of a Ctrl-C inside compiled text, Python would make a death by signal
        atexit._run_exitfuncs()
        os._exit(status)
    sys.exit(status)


def _leave(*_: object) -> NoReturn:
    """End at once: during imports, where an exception could be swallowed or lost, there is nothing to tidy up."""
    os.write(2, b"prunesim: interrupted\n")
    os._exit(INTERRUPTED)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, but inside an import, whose own callbacks would swallow it, only when that is done."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            again = threading.Timer(0.02, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def _terminate(number: int, _frame: FrameType | None) -> NoReturn:
    """End by way of an exception, so that workers end and what is half done is tidied up; a second signal kills."""
    signal.signal(number, signal.SIG_DFL)
    os.write(2, b"prunesim: terminated\n")
    raise SystemExit(TERMINATED)
