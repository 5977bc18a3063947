"""Finished points of a quality measurement on disk: a stopped one goes on where it was, a second one stops at once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calibration.records.store import decode_line, encode_line, open_locked
from simulator.errors import InputError
from simulator.files.read import read_bounded

MOST_LOSS = 1e6
"""Larger mean losses are none: nats of a token are below 20."""


class Results:
    """Finished points by method and fraction, on disk as soon as they are added; a line that was cut is measured again.

    A point has "method", "fraction", "realised" (what was really removed) and "losses" (the mean of each window). The
    file has JSON lines with checksums; the first says what was measured and must equal the ``header``. Refused
    (InputError) when another process writes to it, or it holds something else.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.points: dict[tuple[str, float], dict[str, Any]] = {}
        self._file = os.fdopen(open_locked(path), "r+b")
        try:
            raw = read_bounded(path)
            whole = [line for text in raw.split(b"\n") if text and (line := decode_line(text)) is not None]
            if whole and whole[0] != header:
                changed = ", ".join(k for k in header if whole[0].get(k) != header[k])
                raise self._other(f"points measured with another {changed}")
            for line in whole[1:]:
                if not _is_point(line):
                    raise self._other("a line that is no measured point")
                self.points[line["method"], line["fraction"]] = line
            self._file.seek(0, os.SEEK_END)
            if not whole:
                self._file.truncate(0)
                self._file.seek(0)
                self._put(header)
            elif not raw.endswith(b"\n"):
                self._file.write(b"\n")  # so that what is appended starts on a line of its own
        except BaseException:
            self._file.close()
            raise

    def add(self, method: str, fraction: float, realised: float, losses: Sequence[float]) -> None:
        """Keep a point."""
        line = {"method": method, "fraction": fraction, "realised": realised, "losses": list(losses)}
        self._put(line)
        self.points[method, fraction] = line

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()  # and with it the lock

    def _other(self, what: str) -> InputError:
        return InputError(f"{self.path}: holds {what}; remove it, or name another output file")

    def _put(self, line: Mapping[str, Any]) -> None:
        self._file.write(encode_line(line))
        self._file.flush()
        os.fsync(self._file.fileno())


def _is_point(line: Mapping[str, Any]) -> bool:
    """Whether a line is what :meth:`Results.add` writes."""
    losses, shares = line.get("losses"), (line.get("fraction"), line.get("realised"))
    return (
        isinstance(line.get("method"), str)
        and all(isinstance(n, (int, float)) and 0.0 <= n <= 1.0 for n in shares)
        and isinstance(losses, list)
        and bool(losses)
        and all(isinstance(x, (int, float)) and -MOST_LOSS <= x <= MOST_LOSS for x in losses)
    )
