"""Ctrl-C taken between two samples."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """The user asked for an end; raised between two samples, never inside a write."""


class Interrupt:
    """Turns the first Ctrl-C into a flag that is looked at between samples; a second one ends the program as usual.

    Only the main thread can receive signals; elsewhere the flag is set by :meth:`set` alone.
    """

    def __init__(self) -> None:
        self.asked = False
        self._old: Any = None

    def set(self, *_: Any) -> None:
        """Ask for an end."""
        self.asked = True

    def watched(self, sample: Callable[[int], float]) -> Callable[[int], float]:
        """The same function, which raises :class:`Interrupted` once an end was asked for."""

        def watched(loops: int) -> float:
            if self.asked:
                raise Interrupted
            return sample(loops)

        return watched

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            signal.signal(signal.SIGINT, self._old)
            raise KeyboardInterrupt
        self.asked = True

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._old = signal.getsignal(signal.SIGINT)
            signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._old is not None:
            signal.signal(signal.SIGINT, self._old)
