"""Tables of records as Parquet files. Constant columns become metadata, and integers take the smallest type that holds
them: 36,000 GEMMs take 150 kB."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from calibration.records.timing_table import LATER, Flag, Records, Source
from simulator.arrays import Array
from simulator.errors import InputError
from simulator.files.parquet import load_pyarrow, read_parquet
from simulator.files.read import read_bounded

SCHEMA_VERSION = 1
_KEY = b"prunesim.records"


def write_records(records: Records, *, extra: Mapping[str, Any] | None = None, single: bool = False) -> bytes:
    """Return a table as the bytes of a Parquet file; ``extra`` is JSON-ready metadata, ``single`` stores times as
    float32, whose rounding of 6e-8 is far below the noise of any clock."""
    pa, pq = load_pyarrow()
    constant: dict[str, Any] = {}
    arrays: dict[str, Any] = {}
    for name in records.SCHEMA:
        values = getattr(records, name)
        if name == "line" or (name in LATER and not values.any()):
            continue
        if len(values) and name != "seconds" and (np.all(values == values[0]) or np.all(values != values)):
            constant[name] = None if values[0] != values[0] else values[0].item()
        else:
            narrow = np.float32 if single and name == "seconds" else _narrow(values)
            arrays[name] = pa.array(values.astype(narrow))
    sources = [s.as_dict() for s in records.sources]
    head = {"schema": SCHEMA_VERSION, "constant": constant, "sources": sources, "extra": dict(extra or {})}
    table = pa.table(arrays).replace_schema_metadata({_KEY: json.dumps(head).encode()})
    floats = [name for name in arrays if pa.types.is_floating(arrays[name].type)]
    how: dict[str, Any] = {"row_group_size": 1 << 20, "compression": "zstd", "compression_level": 19}
    how |= {"write_statistics": False, "use_byte_stream_split": floats or False}
    buffer = io.BytesIO()
    pq.write_table(table, buffer, use_dictionary=[name for name in arrays if name not in floats], **how)
    return buffer.getvalue()


def read_records(path: str | Path | bytes, label: str = "table") -> Records:
    """Read a table of :func:`write_records` from a path, or from bytes that ``label`` names."""
    label = label if isinstance(path, bytes) else str(path)
    table = read_parquet(path if isinstance(path, bytes) else read_bounded(path), label)
    head = _head(table.schema.metadata, label)
    try:
        columns = {name: table.column(name).to_numpy() for name in table.column_names}
        columns |= {name: np.nan if value is None else value for name, value in head["constant"].items()}
        found = Records.from_columns([Source.from_dict(s) for s in head["sources"]], size=table.num_rows, **columns)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, load_pyarrow()[0].ArrowException) as error:
        raise InputError(f"{label}: damaged table of records: {(str(error).splitlines() or ['?'])[0]}") from error
    # version 0.3 wrote both flags as 16, but only GPUs have a power limit, and only CPUs count waiting
    of_cpu = np.array(["threads" in source.stack for source in found.sources], dtype=bool)[found.source]
    old = of_cpu & (found.flags & Flag.POWER_CAPPED != 0)
    return found.replace(flags=np.where(old, found.flags & ~int(Flag.POWER_CAPPED) | Flag.WAITED, found.flags))


def is_records(content: bytes) -> bool:
    pa, pq = load_pyarrow()
    try:
        return _KEY in (pq.read_schema(io.BytesIO(content)).metadata or {})
    except (pa.ArrowException, OSError, ValueError):
        return False


def _narrow(values: Array) -> type:
    if values.dtype.kind not in "iu":
        return values.dtype.type
    low, high = (int(values.min()), int(values.max())) if len(values) else (0, 0)
    kinds = (np.uint8, np.int8, np.uint16, np.int16, np.int32, np.int64)
    return next(kind for kind in kinds if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max)


def _head(metadata: Mapping[bytes, bytes] | None, label: str) -> dict[str, Any]:
    if not metadata or _KEY not in metadata:
        raise InputError(f"{label}: not a table of records by prunesim")
    damaged = f"{label}: damaged table of records: its metadata"
    try:
        head: Any = json.loads(metadata[_KEY])
    except (ValueError, RecursionError) as error:
        raise InputError(f"{damaged} cannot be read") from error
    if not isinstance(head, dict):
        raise InputError(f"{damaged} are not a mapping")
    if head.get("schema") != SCHEMA_VERSION:
        schema = head.get("schema")
        raise InputError(f"{label}: records: expected schema {SCHEMA_VERSION}, got {schema!r:.40}")
    return head
