"""Read Parquet files; their sizes are checked before they take memory. Only these files need pyarrow."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError, needs_extra, one_line
from simulator.files.read import MOST_TABLE_BYTES

MOST_CELLS = 20_000_000  # 160 MB as float64, a thousand times the shipped tables
TEXTS = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
_MOST = f"{MOST_TABLE_BYTES / 1e6:g} MB"


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
        table = file.read(columns=[field.name for field in flat], use_threads=False)  # tables are small
        for at, column in enumerate(table.columns):
            if pa.types.is_dictionary(column.type):
                table = table.set_column(at, table.field(at).name, _decoded(column, label, pa))
        return table
    except InputError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{label}: cannot be read as Parquet: {one_line(str(error), 200)}") from None


def _accepted(file: Any, label: str, pa: Any) -> list[Any]:
    """Return the fields to read; a repeated value takes few bytes in the file and many in memory."""
    about = file.metadata
    cells = about.num_rows * max(about.num_columns, 1)
    size = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
    if cells > MOST_CELLS or size > MOST_TABLE_BYTES:
        limit = f"expected at most {MOST_CELLS:.3g} values and {_MOST}"
        raise InputError(f"{label}: {limit}, got {cells:.3g} values; split it")
    names = list(file.schema_arrow.names)
    if len(set(names)) < len(names):
        raise InputError(f"{label}: column {next(n for n in names if names.count(n) > 1)!r} appears twice")
    flat = [field for field in file.schema_arrow if not pa.types.is_nested(field.type)]
    for field in flat:
        fixed = field.type.byte_width if pa.types.is_fixed_size_binary(field.type) else 0
        if fixed * about.num_rows > MOST_TABLE_BYTES:
            raise InputError(f"{label}: column {field.name!r:.60}: expected at most {_MOST}, got more; shorten it")
    return flat


def _decoded(column: Any, label: str, pa: Any) -> Any:
    """Return a column of texts as a plain column; a file stores equal texts once, so their size is checked first."""
    import pyarrow.compute as compute

    longest = [compute.max(compute.binary_length(chunk.dictionary)).as_py() or 0 for chunk in column.chunks]
    size = sum(len(chunk) * most for chunk, most in zip(column.chunks, longest))
    if size > MOST_TABLE_BYTES:
        raise InputError(f"{label}: expected texts of at most {_MOST}, got up to {size / 1e6:.3g} MB; shorten them")
    return pa.chunked_array([chunk.dictionary_decode() for chunk in column.chunks], column.type.value_type)


def parquet_columns(table: Any, label: str, wanted: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
    """Return columns of a pyarrow table (default: all) as NumPy arrays; missing numbers are NaN."""
    names = [name for name in table.column_names if wanted is None or name in wanted]
    try:
        return {name: np.asarray(table.column(name).to_numpy()) for name in names}
    except (load_pyarrow()[0].ArrowException, TypeError, ValueError) as error:
        raise InputError(f"{label}: has a column of a type that cannot be read: {one_line(str(error), 200)}") from None
