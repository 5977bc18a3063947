"""Parquet files as they come, looked at before they take memory. pyarrow is optional, only these files need it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError, needs_extra
from simulator.files.read import MOST_TABLE_BYTES

MOST_CELLS = 20_000_000  # values of a table that is read: 160 MB as float64, a thousand times what ships
_MOST = f"{MOST_TABLE_BYTES / 1e6:g} MB"


def load_pyarrow() -> tuple[Any, Any]:
    """``pyarrow`` and ``pyarrow.parquet``, or an error that says how to get them."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise needs_extra("a Parquet table", "tables", "pyarrow") from None
    return pyarrow, pyarrow.parquet


def read_parquet(content: bytes, label: str) -> Any:
    """The plain columns of a Parquet file as a pyarrow table; those of lists and structures are left out. InputError,
    one line that starts with the label: no Parquet, damaged, a column twice, or larger in memory than accepted."""
    pa, pq = load_pyarrow()
    try:
        file = pq.ParquetFile(io.BytesIO(content))
        flat = _accepted(file, label, pa)
        texts = [field.name for field in flat if pa.types.is_string(field.type) or pa.types.is_binary(field.type)]
        file = pq.ParquetFile(io.BytesIO(content), read_dictionary=texts)
        # tables are small: starting threads would take longer
        table = file.read(columns=[field.name for field in flat], use_threads=False)
        for at, column in enumerate(table.columns):
            if pa.types.is_dictionary(column.type):
                table = table.set_column(at, table.field(at).name, _decoded(column, label, pa))
        return table
    except InputError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{label}: cannot be read as Parquet: {_first(error)}") from error


def _accepted(file: Any, label: str, pa: Any) -> list[Any]:
    """Fields that are read; a run of one value takes a few bytes in the file and all of them in memory."""
    about = file.metadata
    cells = about.num_rows * max(about.num_columns, 1)
    size = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
    if cells > MOST_CELLS or size > MOST_TABLE_BYTES:
        raise InputError(f"{label}: holds {cells:.3g} values, more than {MOST_CELLS:.3g} or {_MOST}; split it")
    names = list(file.schema_arrow.names)
    if len(set(names)) < len(names):
        raise InputError(f"{label}: column {next(n for n in names if names.count(n) > 1)!r} appears twice")
    flat = [field for field in file.schema_arrow if not pa.types.is_nested(field.type)]
    for field in flat:
        fixed = field.type.byte_width if pa.types.is_fixed_size_binary(field.type) else 0
        if fixed * about.num_rows > MOST_TABLE_BYTES:
            raise InputError(f"{label}: column {field.name!r:.60} holds more than {_MOST}; shorten it")
    return flat


def _decoded(column: Any, label: str, pa: Any) -> Any:
    """A column of texts kept once each as a plain one, if that fits: a long text that repeats a million times takes no
    room in a file."""
    import pyarrow.compute as compute

    size = 0
    for chunk in column.chunks:
        texts = chunk.dictionary
        if pa.types.is_string(texts.type) or pa.types.is_binary(texts.type) or pa.types.is_large_string(texts.type):
            size += len(chunk) * (compute.max(compute.binary_length(texts)).as_py() or 0)
        elif len(texts):
            size += len(chunk) * (texts.nbytes // len(texts) + 1)
    if size > MOST_TABLE_BYTES:
        taken = f"may take {size / 1e6:.3g} MB in memory, more than {_MOST}"
        raise InputError(f"{label}: has texts that {taken}; shorten them")
    return pa.chunked_array([chunk.dictionary_decode() for chunk in column.chunks], column.type.value_type)


def parquet_columns(table: Any, label: str, wanted: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
    """Columns of a pyarrow table (``wanted``, where they are there) as NumPy arrays: numbers as they are, missing ones
    NaN, everything else as objects; InputError where a type has no NumPy counterpart."""
    names = [name for name in table.column_names if wanted is None or name in wanted]
    try:
        return {name: np.asarray(table.column(name).to_numpy()) for name in names}
    except (load_pyarrow()[0].ArrowException, TypeError, ValueError) as error:
        raise InputError(f"{label}: has a column of a type that cannot be read: {_first(error)}") from None


def _first(error: BaseException) -> str:
    return (str(error).splitlines() or ["damaged"])[0]
