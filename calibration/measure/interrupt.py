"""Handle Ctrl-C between two samples."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """The user requested an end; raised between two samples, never inside a write."""


class Interrupt:
    """Turn the first Ctrl-C into a flag that is read between samples; a second Ctrl-C ends the program as usual.

    Only the main thread receives signals; in other threads only :meth:`set` sets the flag.
    """

    def __init__(self) -> None:
        self.requested = False
        self._old: Any = None

    def set(self, *_: Any) -> None:
        """Request an end."""
        self.requested = True

    def watched(self, sample: Callable[[int], float]) -> Callable[[int], float]:
        """Wrap a function so that it raises :class:`Interrupted` after an end was requested."""

        def watched(loops: int) -> float:
            if self.requested:
                raise Interrupted
            return sample(loops)

        return watched

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            signal.signal(signal.SIGINT, self._old)
            raise KeyboardInterrupt
        self.requested = True

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._old = signal.getsignal(signal.SIGINT)
            signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._old is not None:
            signal.signal(signal.SIGINT, self._old)
