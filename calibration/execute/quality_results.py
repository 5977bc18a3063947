"""Finished points of a quality measurement on disk, so that one that was stopped goes on where it was, and a second one stops at once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from calibration.records.store import decode_line, encode_line, open_locked
from simulator.errors import InputError
from simulator.files.read import read_bounded

MOST_LOSS = 1e6
"""Larger mean losses are none: nats of a token are below 20."""


class Results:
    """Finished points, each on disk as soon as it is added; a line that was cut is measured again.

    Parameters
    ----------
    path : Path
        JSON lines with checksums; the first says what was measured.
    header : mapping
        Settings that must equal those of an earlier run.

    Raises
    ------
    InputError
        When another process writes to the file, or it holds something else.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.points: dict[tuple[str, float], dict[str, Any]] = {}
        self._file = os.fdopen(open_locked(path), "r+b")
        try:
            raw = read_bounded(path)
            lines = [decode_line(line) for line in raw.split(b"\n") if line]
            whole = [line for line in lines if line is not None]
            if whole and whole[0] != header:
                changed = ", ".join(k for k in header if whole[0].get(k) != header[k])
                raise InputError(
                    f"{path}: holds points measured with another {changed}; remove it, or name another output file"
                )
            for line in whole[1:]:
                if not _is_point(line):
                    raise InputError(
                        f"{path}: holds a line that is no measured point; remove it, or name another output file"
                    )
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

    def has(self, method: str, fraction: float) -> bool:
        """Whether a point is finished."""
        return (method, fraction) in self.points

    def losses(self, method: str, fraction: float) -> list[float]:
        """Mean loss of each window."""
        return list(self.points[method, fraction]["losses"])

    def realised(self, method: str, fraction: float) -> float:
        """Fraction really removed."""
        return float(self.points[method, fraction]["realised"])

    def add(self, method: str, fraction: float, realised: float, losses: Sequence[float]) -> None:
        """Keep a point."""
        line = {"method": method, "fraction": fraction, "realised": realised, "losses": list(losses)}
        self._put(line)
        self.points[method, fraction] = line

    def __enter__(self) -> Results:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()  # and with it the lock

    def _put(self, line: Mapping[str, Any]) -> None:
        self._file.write(encode_line(line))
        self._file.flush()
        os.fsync(self._file.fileno())


def _is_point(line: Mapping[str, Any]) -> bool:
    """Whether a line is what :meth:`Results.add` writes."""
    losses = line.get("losses")
    numbers = (line.get("fraction"), line.get("realised"))
    return (
        isinstance(line.get("method"), str)
        and all(isinstance(n, (int, float)) and 0.0 <= n <= 1.0 for n in numbers)
        and isinstance(losses, list)
        and bool(losses)
        and all(isinstance(x, (int, float)) and -MOST_LOSS <= x <= MOST_LOSS for x in losses)
    )
