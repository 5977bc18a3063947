"""Read the records that a command line names: files, run folders and shipped measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from simulator.cli.options import arg
from simulator.errors import InputError

if TYPE_CHECKING:
    from calibration.records.timing_table import Records
    from simulator.hardware.profile import HardwareProfile

RecordsArgument = Annotated[list[str], arg("RECORDS...", "Files, run folders or names of shipped measurements.")]


def load_rows(
    paths: Sequence[str],
    hw: HardwareProfile | None = None,
    *,
    column_map: Mapping[str, str] | None = None,
    device: str = "",
    screened: bool = True,
) -> tuple[Records, tuple[str, ...]]:
    """Return the records of files, run folders and shipped measurements, with notes on the refused rows of each file.
    Other arguments are those of :func:`calibration.records.importers.import_table`."""
    from calibration.measurements import list_measurements, load_measurements
    from calibration.records.importers import import_table
    from calibration.records.timing_table import Records

    parts, notes = [], []
    for name in paths:
        path = Path(name)
        if path.is_dir():
            path = path / "records.jsonl"
        if not path.exists() and name in list_measurements():
            parts.append(load_measurements(name))
            continue
        if not path.exists() and not path.suffix:
            known = ", ".join(list_measurements())
            missing = "no file, folder or shipped measurement has this name"
            raise InputError(f"records {name!r}: {missing}; shipped measurements: {known}")
        found = import_table(path, hw=hw, column_map=column_map, device=device, screened=screened)
        parts.append(found.records)
        if found.refusals:
            counts = f"{len(found.records):,} rows kept, {found.refusals.total:,} refused"
            notes.append(f"{path}: {counts}: {'; '.join(found.refusals.lines())}")
        notes += [f"{path}: {line}" for line in found.notes]
    return Records.concat(parts), tuple(notes)
