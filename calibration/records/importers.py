"""Import published tables as records; refuse invalid rows and count them by reason."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from calibration.records.readers import MEASURED, Draft, draft_of_records, read_aiconfigurator, read_csv, read_measured
from calibration.records.screening import Refusals, Screen, compute_bound, join_repeats, rotated_copies, too_fast, work
from calibration.records.store import MARK, content_records, parse, untimed
from calibration.records.timing_table import COUNTS, NEEDED, Records, is_records, read_records
from simulator.arrays import Array
from simulator.errors import InputError
from simulator.files import csv
from simulator.files.parquet import parquet_columns, read_parquet
from simulator.files.read import read_bounded
from simulator.hardware.profile import HardwareProfile
from simulator.operators.experts import POWER

FEW_ROWS = 20  # fewer rows than this are hardly enough to re-anchor a profile


@dataclass(frozen=True)
class ImportResult:
    records: Records
    refusals: Refusals = field(default_factory=Refusals)
    notes: tuple[str, ...] = ()


def import_table(
    path: str | Path,
    *,
    content: bytes | None = None,
    hw: HardwareProfile | None = None,
    dtype: str = "all",
    column_map: Mapping[str, str] | None = None,
    device: str = "",
    screened: bool = True,
) -> ImportResult:
    """Read a table of aiconfigurator-core (Parquet), a CSV file, or a table or store of this program; ``content`` is
    that of a file in an archive.

    Rows faster than the datasheet of ``hw`` allows are refused, if ``screened``. ``dtype`` is the number format to
    keep. For a CSV, ``column_map`` maps names here to names in the file (``{"m": "M", "latency_us": "time"}``), and
    ``device`` is the measured device. InputError without a usable row.
    """
    raw = read_bounded(path) if content is None else content
    with np.errstate(invalid="ignore", over="ignore"):  # rows with NaN or infinity are refused later
        draft = _read(raw, Path(path), column_map, device)
    return finish(draft, label=str(path), hw=hw, dtype=dtype, screened=screened)


def _read(content: bytes, path: Path, column_map: Mapping[str, str] | None, device: str) -> Draft:
    digest = hashlib.sha256(content).hexdigest()
    if content.startswith(MARK):
        stored = parse(content, str(path))
        if stored is None:
            raise InputError(f"{path}: holds no records")
        lost = ("the last line was incomplete and was dropped",) if stored.dropped else ()
        left = tuple(f"{count} operators without a time: {reason}" for reason, count in untimed(stored.rows).items())
        return draft_of_records(content_records(stored), lost + left)
    if content[:4] == b"PAR1" and is_records(content):
        return draft_of_records(read_records(content, str(path)))
    if content[:4] == b"PAR1":
        return read_aiconfigurator(parquet_columns(read_parquet(content, str(path)), str(path)), path, digest)
    if path.suffix.lower() == ".parquet":
        raise InputError(f"{path}: not a Parquet file")
    cells = csv.read_csv(content, str(path))
    table = {name: np.array(cells.column(name), dtype=object) for name in cells.header if name}
    if column_map is None and set(MEASURED) <= table.keys():
        draft = read_measured(table, path, digest)
    else:
        draft = read_csv(table, path, digest, column_map or {}, device)
    return replace(draft, columns={**draft.columns, "line": np.array(cells.lines)})


def finish(
    draft: Draft, *, label: str, hw: HardwareProfile | None, dtype: str = "all", screened: bool = True
) -> ImportResult:
    """Return the valid rows of a draft as records; ``label`` names the file."""
    screen, columns = draft.screen, {name: np.asarray(values) for name, values in draft.columns.items()}
    _check_numbers(screen, columns)
    kept = {name: values[screen.kept] for name, values in columns.items()}
    kept |= {name: kept[name].astype(np.float64).astype(np.int64) for name in (*COUNTS, "copies") if name in kept}
    sources = [replace(source, file=label) for source in draft.sources]
    records = Records.from_columns(sources, size=int(screen.kept.sum()), **kept)
    if hw is not None and draft.rotated:  # the size of the weights gives the number of copies
        copies = rotated_copies(np.maximum(work(records)[1], 1.0), hw.l2_bytes)
        several = records.is_operator("gemm") & (records.copies > 1)
        records = records.replace(copies=np.where(several, copies, records.copies))
    notes = list(draft.notes)
    for other in np.unique(records.labels()).tolist() if dtype != "all" else ():
        if other != dtype:
            screen.refuse_kept(records.labels() == other, f"dtype {other}, not {dtype}")
            records = records.select(records.labels() != other)
    if draft.still:
        if hw is None:
            why = "its operands were not random numbers, which saves power and raises clocks"
            raise InputError(f"{label}: {why}; name the hardware, to exclude compute-bound rows")
        unreliable = compute_bound(records, hw)
        screen.refuse_kept(unreliable, "compute-bound, on operands that were not random numbers")
        records = records.select(~unreliable)
    if hw is None:
        notes.append("no hardware given; times were not checked against a roofline")
    elif screened:
        compute, memory = too_fast(records, hw)
        screen.refuse_kept(compute, "faster than the arithmetic peak at the highest clock")
        screen.refuse_kept(memory[~compute], "faster than memory, L2 or link allow")
        records = records.select(~(compute | memory))
    if not len(records):
        reasons = "; ".join(screen.refusals().lines()) or "the file has no rows"
        raise InputError(f"{label}: no usable row: {reasons}")
    records, joined, conflicts = join_repeats(records)
    if joined:
        flagged = f"{conflicts} shapes differ by over 10 %, flagged CONFLICT"
        notes.append(f"{joined} rows repeat a shape, replaced by their median; {flagged}")
    if len(records) < FEW_ROWS:
        advice = f"{FEW_ROWS} or more recommended to re-anchor a profile"
        notes.append(f"only {len(records)} usable rows: too few for a fit; {advice}")
    return ImportResult(records.tidy(), screen.refusals(), tuple(notes))


def _check_numbers(screen: Screen, columns: dict[str, Array]) -> None:
    """Refuse rows with an invalid time or shape; correct columns (float64, or names) where that is possible."""
    operator = np.broadcast_to(columns.get("operator", np.array("gemm")), screen.kept.shape)
    with np.errstate(invalid="ignore"):
        seconds = columns["seconds"]
        screen.refuse(np.isnan(seconds), "time is missing or not a number")
        screen.refuse(np.isinf(seconds), "time is infinite")
        screen.refuse(seconds == 0, "time is zero")
        screen.refuse(seconds < 0, "time is negative")
        for name in (*COUNTS, "copies"):
            if name not in columns:
                continue
            needed = np.isin(operator, [kind for kind, names in NEEDED.items() if name in names])
            screen.refuse(np.isnan(columns[name]) & needed, f"{name} is missing or not a number")
            # NaN in other rows: the operator does not have this dimension
            values = columns[name] = np.where(np.isnan(columns[name]), 0.0, columns[name])
            screen.refuse((values != np.floor(values)) | np.isinf(values), f"{name} is not a whole number")
            screen.refuse(needed & (values < 1), f"{name} is below 1")
            most = 2**31 - 1 if name == "copies" else 2**40
            screen.refuse((values < 0) | (values > most), f"{name} is out of range")
        for name in ("read_bytes", "write_bytes"):
            if name in columns:
                screen.refuse(~((columns[name] >= 0) & (columns[name] < 2.0**60)), f"{name} is out of range")
        for name, most in (("sample_count", 2**31 - 1), ("flags", 2**15)):
            if name in columns:  # rows with unknown values are kept
                columns[name] = np.nan_to_num(np.clip(columns[name].astype(np.float64), 0, most), nan=0.0)
        if "spread" in columns:
            columns["spread"] = np.where(columns["spread"] >= 0, columns["spread"], np.nan)
        if "active" in columns:
            held = np.broadcast_to(columns.get("experts", np.array(0.0)), seconds.shape)
            wrong = ~((columns["active"] > 0) & (columns["active"] <= held) & (columns["skew"] >= POWER.low))
            screen.refuse(wrong & (operator == "experts"), "active experts are not among the device's experts")
        if "density" in columns:
            screen.refuse(~((columns["density"] > 0) & (columns["density"] <= 1)), "density is not in (0, 1]")
    if {"heads", "kv_heads", "q_len", "kv_len"} <= columns.keys():
        attention = np.char.startswith(operator.astype(str), "attention") & screen.kept
        heads, groups = (np.where(attention, columns[name], 1.0) for name in ("heads", "kv_heads"))
        screen.refuse(heads % groups != 0, "heads is not a multiple of kv_heads")
        screen.refuse(attention & (columns["q_len"] > columns["kv_len"]), "q_len exceeds kv_len")
