"""Read records and times from a command line: files, run folders, shipped measurements; "2min" to seconds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from simulator.cli.options import arg
from simulator.errors import InputError

if TYPE_CHECKING:
    from calibration.records.timing_table import Records
    from simulator.hardware.profile import HardwareProfile

RecordsArgument = Annotated[list[str], arg("RECORDS...", "Files, run folders or names of shipped measurements.")]

_SECONDS = {"s": 1.0, "sec": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0}


def load_rows(
    paths: Sequence[str],
    hw: HardwareProfile | None = None,
    *,
    column_map: Mapping[str, str] | None = None,
    dtype: str | None = None,
    device: str = "",
    screened: bool = True,
) -> tuple[Records, tuple[str, ...]]:
    """Return the records of files, run folders and shipped measurements, one after the other, with notes.

    Other arguments than ``paths`` are those of :func:`calibration.records.importers.import_table`; ``dtype`` keeps one
    number format, by default all. The notes state the refused rows of each file by reason.
    """
    from calibration.measurements import list_measurements, load_measurements
    from calibration.records.importers import import_table
    from calibration.records.timing_table import Records

    parts, notes = [], []
    for name in paths:
        path = Path(name)
        if path.is_dir():
            path = path / "records.jsonl"
        if not path.exists() and name in list_measurements():
            shipped = load_measurements(name)
            parts.append(shipped.of_dtype(dtype) if dtype else shipped)
            continue
        if not path.exists() and not path.suffix:
            known = ", ".join(list_measurements())
            missing = "no file, folder or shipped measurement has this name"
            raise InputError(f"records {name!r}: {missing}; shipped measurements: {known}")
        found = import_table(path, hw=hw, dtype=dtype or "all", column_map=column_map, device=device, screened=screened)
        parts.append(found.records)
        if found.refusals:
            counts = f"{len(found.records):,} rows kept, {found.refusals.total:,} refused"
            notes.append(f"{path}: {counts}: {'; '.join(found.refusals.lines())}")
        notes += [f"{path}: {line}" for line in found.notes]
    return Records.concat(parts), tuple(notes)


def seconds(option: str, text: str) -> float:
    """Return the seconds of a time such as "2min", "90s" or "0.5h"; a number without unit is in seconds.

    >>> seconds("--budget", "2min"), seconds("--budget", "90"), seconds("--budget", "1.5 h")
    (120.0, 90.0, 5400.0)
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]*)\s*", text.lower())
    if match is None or (match[2] or "s") not in _SECONDS:
        raise InputError(f"{option}: expected a time such as 2min, 90s or 1h, got {text!r}")
    value = float(match[1]) * _SECONDS[match[2] or "s"]
    if value <= 0.0:
        raise InputError(f"{option}: expected a time above zero, such as 2min, got {text!r}")
    return value
