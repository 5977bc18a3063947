"""Read files, JSON and Parquet with limits: larger files, devices and endless streams do not fill
the memory."""

from __future__ import annotations

import io
import json
import os
import stat
from pathlib import Path
from typing import Any

from simulator.errors import InputError, needs_extra, one_line

MOST_TABLE_BYTES = 256_000_000  # shipped tables have up to 250 kB
# objects and lists in JSON: each takes about a hundred bytes, also an empty one
MOST_CONTAINERS = 300_000
MOST_PARQUET_CELLS = 20_000_000  # 160 MB as float64, a thousand times the shipped tables
TEXTS = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
_MOST = f"{MOST_TABLE_BYTES / 1e6:g} MB"


def read_bounded(
    path: str | Path, most_bytes: int = MOST_TABLE_BYTES, place: str | None = None
) -> bytes:
    """Return all bytes of a file or pipe. InputError, which starts with ``place`` (default: the
    path), for a missing or larger file, a folder or a device."""
    place, raw = f"{path}: " if place is None else place, b""
    try:
        status = os.stat(path)
        kind = stat.S_IFMT(status.st_mode)
        if kind in (stat.S_IFREG, stat.S_IFIFO) and status.st_size <= most_bytes:
            # without O_NONBLOCK, opening a pipe waits for its writer
            with open(
                path,
                "rb",
                opener=lambda at, flags: os.open(at, flags | getattr(os, "O_NONBLOCK", 0)),
            ) as file:
                os.set_blocking(file.fileno(), True)
                # read() reserves the memory that it may need; the size of a pipe is unknown
                most = status.st_size if kind == stat.S_IFREG else most_bytes
                raw = file.read(most + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise InputError(
            f"{place}cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None
    if kind == stat.S_IFDIR:
        raise InputError(f"{place}cannot be read: is a folder, expected a file")
    if kind not in (stat.S_IFREG, stat.S_IFIFO):  # a pipe ends; /dev/zero does not
        raise InputError(f"{place}cannot be read: is not a regular file")
    if kind == stat.S_IFIFO and not raw:
        raise InputError(f"{place}cannot be read: the pipe is empty")
    if max(status.st_size, len(raw)) > most_bytes:
        raise InputError(f"{place}is larger than {most_bytes / 1e6:g} MB; expected a smaller file")
    return raw


def stamp(path: str | Path) -> tuple[int, int]:
    """Return the time and size of a file; -1 for a file that cannot be read."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return -1, -1
    return status.st_mtime_ns, status.st_size


def parse_json(content: str | bytes, label: str) -> Any:
    """Return parsed JSON. JSONDecodeError for other text; InputError for too many levels or digits,
    and for an object with equal keys, of which ``json.loads`` takes the last."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                key = one_line(repr(name), 80)
                raise InputError(
                    f"{label}: key {key}: expected once in an object, got twice or more; keep one"
                )
            found[name] = value
        return found

    try:
        return json.loads(content, object_pairs_hook=unique)
    except RecursionError:
        raise InputError(f"{label}: is not read: too many levels of objects and lists") from None
    except ValueError as error:
        if isinstance(error, json.JSONDecodeError | InputError):
            raise
        # thousands of digits
        raise InputError(f"{label}: is not read ({one_line(str(error), 80)})") from None


def parse_bounded(content: bytes, label: str, most_bytes: int) -> Any:
    """Return the value of a JSON text in UTF-8, also with NaN and infinity; limits are checked
    first."""
    if len(content) > most_bytes:
        raise InputError(
            f"{label}: is larger than {most_bytes / 1e6:g} MB; expected a smaller file"
        )
    if (many := content.count(b"{") + content.count(b"[")) > MOST_CONTAINERS:
        raise InputError(
            f"{label}: expected at most {MOST_CONTAINERS:,} objects and lists, got {many:,}"
        )
    try:
        return parse_json(content.decode("utf-8-sig"), label)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{label}: is not UTF-8 text (byte {error.start}); expected JSON"
        ) from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"{label}:{error.lineno}:{error.colno}: is not JSON ({error.msg})"
        ) from None


def load_pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise needs_extra("a Parquet table", "tables", "pyarrow") from None
    return pyarrow, pyarrow.parquet


def read_parquet(content: bytes, label: str) -> Any:
    pa, pq = load_pyarrow()
    try:
        flat = _accepted(pq.ParquetFile(io.BytesIO(content)), label, pa)
        texts = [field.name for field in flat if str(field.type) in TEXTS]
        file = pq.ParquetFile(io.BytesIO(content), read_dictionary=texts)
        # tables are small
        table = file.read(columns=[field.name for field in flat], use_threads=False)
        for at, column in enumerate(table.columns):
            if pa.types.is_dictionary(column.type):
                table = table.set_column(at, table.field(at).name, _decoded(column, label, pa))
        return table
    except InputError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(
            f"{label}: cannot be read as Parquet: {one_line(str(error), 200)}"
        ) from None


def _accepted(file: Any, label: str, pa: Any) -> list[Any]:
    """Return the fields to read; InputError if they need much memory: a file stores repeated values
    only once."""
    about = file.metadata
    cells = about.num_rows * max(about.num_columns, 1)
    size = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
    if cells > MOST_PARQUET_CELLS or size > MOST_TABLE_BYTES:
        limit = f"expected at most {MOST_PARQUET_CELLS:.3g} values and {_MOST}"
        raise InputError(f"{label}: {limit}, got {cells:.3g} values; split it")
    names = list(file.schema_arrow.names)
    if len(set(names)) < len(names):
        raise InputError(
            f"{label}: column {next(n for n in names if names.count(n) > 1)!r} appears twice"
        )
    flat = [field for field in file.schema_arrow if not pa.types.is_nested(field.type)]
    for field in flat:
        fixed = field.type.byte_width if pa.types.is_fixed_size_binary(field.type) else 0
        if fixed * about.num_rows > MOST_TABLE_BYTES:
            raise InputError(
                f"{label}: column {field.name!r:.60}: expected at most {_MOST}, got more;"
                " shorten it"
            )
    return flat


def _decoded(column: Any, label: str, pa: Any) -> Any:
    """Return a column of texts without its dictionary of equal texts; the decoded size is checked
    first."""
    import pyarrow.compute as compute

    longest = [
        compute.max(compute.binary_length(chunk.dictionary)).as_py() or 0 for chunk in column.chunks
    ]
    size = sum(len(chunk) * most for chunk, most in zip(column.chunks, longest))
    if size > MOST_TABLE_BYTES:
        raise InputError(
            f"{label}: expected texts of at most {_MOST}, got up to {size / 1e6:.3g} MB; shorten"
            " them"
        )
    return pa.chunked_array(
        [chunk.dictionary_decode() for chunk in column.chunks], column.type.value_type
    )


def parquet_columns(table: Any, label: str) -> dict[str, Any]:
    """Return the columns of a pyarrow table as NumPy arrays; missing numbers are NaN."""
    try:
        return {name: table.column(name).to_numpy() for name in table.column_names}
    except (load_pyarrow()[0].ArrowException, TypeError, ValueError) as error:
        raise InputError(
            f"{label}: has a column of a type that cannot be read: {one_line(str(error), 200)}"
        ) from None
