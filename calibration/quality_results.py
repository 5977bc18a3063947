"""Finished points of a quality measurement on disk, so that one that was stopped goes on where it was."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calibration.jsonl import decode_line, encode_line
from simulator.errors import InputError
from simulator.readfile import read_bounded
from simulator.wholefile import write_whole

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
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.points: dict[tuple[str, float], dict[str, Any]] = {}
        lines = [decode_line(line) for line in read_bounded(path).split(b"\n") if line] if path.exists() else []
        whole = [line for line in lines if line is not None]
        if whole and whole[0] != header:
            changed = ", ".join(k for k in header if whole[0].get(k) != header[k])
            raise InputError(f"{path}: holds points measured with another {changed}; remove it, or name another output file")
        for line in whole[1:]:
            if not _is_point(line):
                raise InputError(f"{path}: holds a line that is no measured point; remove it, or name another output file")
            self.points[line["method"], line["fraction"]] = line
        # whole lines only, so that what is appended starts on a line of its own
        write_whole(path, b"".join(encode_line(line) for line in [header, *self.points.values()]))

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
        with self.path.open("ab") as file:
            file.write(encode_line(line))
            file.flush()
            os.fsync(file.fileno())
        self.points[method, fraction] = line


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
