"""Published tables to records: which rows are taken, which are refused, and why.

:func:`import_table` recognises four kinds of file. *aiconfigurator*: the Parquet tables of the package aiconfigurator-core. *measured*:
CSV files with the columns ``gpu, dtype, op, ..., latency_us, source, note``. *csv*: any other CSV with a header; ``column_map`` says what
its columns are called. *records*: tables and stores this program wrote. Every refused row is counted under its reason; a file without one
usable row is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.records.formats import (
    Draft,
    draft_of_records,
    is_measured,
    read_aiconfigurator,
    read_csv,
    read_measured,
)
from calibration.records.parquet import is_records, read_records
from calibration.records.recorded import content_records, untimed
from calibration.records.records import Records
from calibration.records.screening import DeviceFacts, Refusals, Screen, join_repeats, rotated_copies, too_fast, work
from calibration.records.store import MARK, parse
from simulator.errors import InputError, unknown
from simulator.files.read import read_bounded

Array = NDArray[Any]

FORMATS = ("auto", "aiconfigurator", "measured", "csv", "records")
FEW_ROWS = 20  # below this a table can only just re-anchor a profile
_REQUIRED: Mapping[str, tuple[str, ...]] = {
    "gemm": ("m", "n", "k"),
    "gemm_2to4": ("m", "n", "k"),
    "low_rank": ("m", "n", "k", "rank"),
    "gather_gemm": ("m", "n", "k", "rows"),
    "attention_prefill": ("batch", "q_len", "kv_len", "heads", "kv_heads", "head_dim"),
    "attention_decode": ("batch", "q_len", "kv_len", "heads", "kv_heads", "head_dim"),
    "attention_block_sparse": ("batch", "q_len", "kv_len", "heads", "kv_heads", "head_dim", "block"),
    "elementwise": ("m", "n"),
    "copy": ("n",),
}
_COUNTS = (
    "m",
    "n",
    "k",
    "rank",
    "rows",
    "batch",
    "q_len",
    "kv_len",
    "heads",
    "kv_heads",
    "head_dim",
    "window",
    "block",
    "copies",
)


@dataclass(frozen=True)
class ImportResult:
    """What became of a file.

    Attributes
    ----------
    records : Records
        The usable rows.
    refusals : Refusals
        The others, counted by reason.
    notes : tuple of str
        What else is worth knowing: rows joined, shapes that disagree, checks left out.
    """

    records: Records
    refusals: Refusals = field(default_factory=Refusals)
    notes: tuple[str, ...] = ()


def import_table(
    path: str | Path,
    *,
    format: str = "auto",
    hw: DeviceFacts | None = None,
    dtype: str | None = None,
    column_map: Mapping[str, str] | None = None,
    device: str = "",
) -> ImportResult:
    """Read a published table.

    Parameters
    ----------
    path : str or Path
        A ``.parquet``, ``.csv`` or ``.jsonl`` file.
    format : str
        One of :data:`FORMATS`; ``auto`` looks at the columns.
    hw : HardwareProfile, optional
        Device of the table: rows faster than its datasheet allows are refused, and rotated copies follow from its L2.
    dtype : str, optional
        Number format to keep, as :meth:`Records.labels` names them, or ``all``. A table with several is refused without it.
    column_map : mapping of str to str, optional
        For ``csv``: this program's column name to the file's (``{"m": "M", "latency_us": "time"}``). The time's name carries its unit.
    device : str
        For ``csv``: what was measured on, where the file does not say.

    Returns
    -------
    ImportResult

    Raises
    ------
    InputError
        When the file cannot be read, lacks a column, mixes number formats unasked, or has no usable row.
    """
    path = Path(path)
    return import_content(
        read_bounded(path), path, format=format, hw=hw, dtype=dtype, column_map=column_map, device=device
    )


def import_content(
    content: bytes,
    path: Path,
    *,
    format: str = "auto",
    hw: DeviceFacts | None = None,
    dtype: str | None = None,
    column_map: Mapping[str, str] | None = None,
    device: str = "",
) -> ImportResult:
    """:func:`import_table` for a file's content; ``path`` is its name."""
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    with np.errstate(invalid="ignore", over="ignore"):  # what becomes NaN or infinite is refused by row
        draft = _read(content, path, format, column_map, device)
    return finish(draft, label=str(path), hw=hw, dtype=dtype)


def _read(content: bytes, path: Path, format: str, column_map: Mapping[str, str] | None, device: str) -> Draft:
    """The reader that fits a file."""
    if content.startswith(MARK) and format in ("auto", "records"):
        stored = parse(content, str(path))
        if stored is None:
            raise InputError(f"{path}: holds no records")
        lost = ("the last line was cut short and dropped",) if stored.dropped else ()
        left = tuple(f"{count} operators without a time: {reason}" for reason, count in untimed(stored.rows).items())
        return draft_of_records(content_records(stored), lost + left)
    if content[:4] == b"PAR1" and format in ("auto", "records") and is_records(content):
        return draft_of_records(read_records(content, str(path)))
    if content[:4] == b"PAR1" and format in ("auto", "aiconfigurator"):
        return read_aiconfigurator(content, path)
    if path.suffix.lower() == ".parquet" or format in ("aiconfigurator", "records"):
        raise InputError(
            f"{path}: is no file of the format {'aiconfigurator or records' if format == 'auto' else format}"
        )
    if format == "measured" or (format == "auto" and column_map is None and is_measured(content)):
        return read_measured(content, path)
    return read_csv(content, path, column_map or {}, device)


def finish(draft: Draft, *, label: str, hw: DeviceFacts | None, dtype: str | None) -> ImportResult:
    """Check a draft's rows and make records of those that pass.

    Parameters
    ----------
    draft : Draft
    label : str
        Name of the file, for messages.
    hw, dtype
        See :func:`import_table`.
    """
    screen, columns = draft.screen, {name: np.asarray(column) for name, column in draft.columns.items()}
    _check_numbers(screen, columns)
    kept = {name: column[screen.kept] for name, column in columns.items()}
    size = int(screen.kept.sum())
    integers = {name: kept[name].astype(np.float64).astype(np.int64) for name in _COUNTS if name in kept}
    records = Records.from_columns(draft.sources, size=size, **{**kept, **integers})
    if hw is not None and draft.rotated:  # how many copies were rotated follows from the size of the weights
        _, weights, _ = work(records)
        copies = rotated_copies(np.maximum(weights, 1.0), hw.l2_bytes)
        records = records.replace(copies=np.where(records.is_operator("gemm"), copies, records.copies))
    notes = list(draft.notes)
    labels = records.labels()
    present = {str(name): int((labels == name).sum()) for name in np.unique(labels)}
    if dtype is None and len(present) > 1:
        counts = ", ".join(f"{name} {count}" for name, count in present.items())
        raise InputError(f"{label}: mixes number formats ({counts} rows); choose one of them by dtype, or 'all'")
    if dtype not in (None, "all"):
        for name in present:
            if name != dtype:
                screen.refuse_kept(records.labels() == name, f"dtype {name}, not {dtype}")
                records = records.select(records.labels() != name)
    if hw is None:
        notes.append("no hardware given: times were not checked against a roofline")
    elif len(records):
        compute, memory = too_fast(records, hw)
        screen.refuse_kept(compute, "faster than the arithmetic peak at the highest clock")
        screen.refuse_kept(memory[~compute], "faster than memory and L2 bandwidth allow")
        records = records.select(~(compute | memory))
    if not len(records):
        reasons = "; ".join(screen.refusals().lines()) or "the file has no rows"
        raise InputError(f"{label}: no usable row: {reasons}")
    records, joined, conflicts = join_repeats(records)
    if joined:
        notes.append(
            f"{joined} rows repeat a shape: the median was taken; {conflicts} shapes disagree by over 10 %, flagged CONFLICT"
        )
    if len(records) < FEW_ROWS:
        notes.append(
            f"only {len(records)} usable rows: too few to fit a profile, and less than the {FEW_ROWS} that re-anchor one"
        )
    return ImportResult(records.tidy(), screen.refusals(), tuple(notes))


def _check_numbers(screen: Screen, columns: dict[str, Array]) -> None:
    """Refuse rows whose time or shape cannot be one; ``columns`` hold float64 or names."""
    operator = np.broadcast_to(columns.get("operator", np.array("gemm")), screen.kept.shape)
    with np.errstate(invalid="ignore"):
        seconds = columns["seconds"]
        screen.refuse(np.isnan(seconds), "time is missing or not a number")
        screen.refuse(np.isinf(seconds), "time is infinite")
        screen.refuse(seconds == 0, "time is zero")
        screen.refuse(seconds < 0, "time is negative")
        for name in _COUNTS:
            if name not in columns:
                continue
            needed = np.isin(operator, [op for op, names in _REQUIRED.items() if name in names])
            value = columns[name]
            screen.refuse(np.isnan(value) & needed, f"{name} is missing or not a number")
            value = columns[name] = np.where(
                np.isnan(value), 0.0, value
            )  # a shape field that this operator does not have
            screen.refuse((value != np.floor(value)) | np.isinf(value), f"{name} is not a whole number")
            screen.refuse(needed & (value < 1), f"{name} is below 1")
            screen.refuse((value < 0) | (value > (2**31 - 1 if name == "copies" else 2**40)), f"{name} is out of range")
        for name in ("read_bytes", "write_bytes"):
            if name in columns:
                screen.refuse(~((columns[name] >= 0) & (columns[name] < 2.0**60)), f"{name} is out of range")
        for name, most in (
            ("sample_count", 2**31 - 1),
            ("flags", 2**15),
        ):  # what is not known of a row does not spoil it
            if name in columns:
                columns[name] = np.nan_to_num(np.clip(columns[name].astype(np.float64), 0, most), nan=0.0)
        if "spread" in columns:
            columns["spread"] = np.where(columns["spread"] >= 0, columns["spread"], np.nan)
        if "density" in columns:
            screen.refuse(~((columns["density"] > 0) & (columns["density"] <= 1)), "density is not in (0, 1]")
    if {"heads", "kv_heads", "q_len", "kv_len"} <= columns.keys():
        attention = np.char.startswith(operator.astype(str), "attention") & screen.kept
        heads, groups = (np.where(attention, columns[name], 1.0) for name in ("heads", "kv_heads"))
        screen.refuse(heads % groups != 0, "heads is no multiple of kv_heads")
        screen.refuse(attention & (columns["q_len"] > columns["kv_len"]), "q_len exceeds kv_len")
