"""Read, check and write CSV; rows keep their line in the file for messages."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from simulator.errors import InputError, one_line
from simulator.units import finite

T = TypeVar("T")

_NUMBER = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?", re.I)

MOST_BYTES = 50_000_000  # about 800,000 measured rows, which take half a gigabyte as cells
MOST_COLUMNS = 1000
MOST_CELLS = 12_000_000


@dataclass(frozen=True)
class CsvTable:
    """Rows with as many cells as the header; a cell is a printable line without surrounding
    blanks."""

    label: str  # name of the file in messages
    header: tuple[str, ...]
    rows: list[list[str]]
    lines: list[int]  # line of the file on which each row ends

    def column(self, name: str) -> list[str]:
        at = self.header.index(name)
        return [row[at] for row in self.rows]

    def each(self, read: Callable[[dict[str, str]], T]) -> list[T]:
        """Return the result of a function for every row; errors of the function get the place of
        the row."""
        out = []
        for place, cells in self.records():
            try:
                out.append(read(cells))
            except InputError as error:
                raise InputError(f"{place}: {error}") from None
        return out

    def records(self) -> Iterator[tuple[str, dict[str, str]]]:
        for line, row in zip(self.lines, self.rows):
            yield f"{self.label}:{line}", dict(zip(self.header, row))


def read_csv(content: bytes | str, label: str, required: Sequence[str] = ()) -> CsvTable:
    """Return the rows of a CSV (UTF-8) with a header that has the ``required`` columns; blank lines
    are skipped."""
    if len(content) > MOST_BYTES:
        large = f"expected at most {MOST_BYTES / 1e6:g} MB of CSV, got more"
        raise InputError(f"{label}: {large}; split it or write Parquet")
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
    except UnicodeDecodeError as error:
        raise InputError(f"{label}: is not CSV: not UTF-8 text (byte {error.start})") from None
    header: tuple[str, ...] = ()
    rows: list[list[str]] = []
    lines: list[int] = []
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for cells in reader:
            if not any(cell and not cell.isspace() for cell in cells):
                continue
            place = f"{label}:{reader.line_num}"
            row = [_cell(cell) for cell in cells]
            if not header:
                _check_header(row, place, required)
                header = tuple(row)
                continue
            if len(row) != len(header):
                raise InputError(
                    f"{place}: expected {len(header)} cells, as the header has, got {len(row)}"
                )
            # lists of one to four cells take equal memory
            if len(rows) * max(len(row), 4) > MOST_CELLS:
                raise InputError(
                    f"{place}: expected at most {MOST_CELLS:.3g} cells; split it or write Parquet"
                )
            rows.append(row)
            lines.append(reader.line_num)
    except csv.Error as error:
        raise InputError(f"{label}:{max(reader.line_num, 1)}: is not CSV: {error}") from None
    if not header:
        expected = f" with the columns {', '.join(required)}" if required else ""
        raise InputError(f"{label}: is empty; expected a header{expected}, and rows")
    if not rows:
        raise InputError(f"{label}: has a header but no rows")
    return CsvTable(label, header, rows, lines)


def _check_header(names: list[str], place: str, required: Sequence[str]) -> None:
    if len(names) > MOST_COLUMNS:
        raise InputError(f"{place}: has {len(names)} columns; expected at most {MOST_COLUMNS}")
    for name in required:
        if name not in names:
            raise InputError(f"{place}: column {name} is missing; expected {', '.join(required)}")
    if twice := next((name for name in names if name and names.count(name) > 1), None):
        raise InputError(f"{place}: column {twice!r} appears twice")


def _cell(cell: str) -> str:
    cell = cell.strip()
    return cell if cell.isprintable() and len(cell) <= 4000 else one_line(cell)


def csv_text(rows: Sequence[Mapping[str, Any]], columns: Iterable[str] = ()) -> str:
    """Return a CSV table of the columns (default: of the first row); numbers that are not finite
    are empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = tuple(columns or rows[0])
    writer.writerow(names)
    for row in rows:
        writer.writerow([_written(row[name]) for name in names])
    return out.getvalue()


def _written(value: Any) -> Any:
    """Return a value as its cell; a spreadsheet would compute texts that begin as a formula, which
    get a quote."""
    if isinstance(value, str):
        formula = value[1:] and value[0] in "=+-@\t\r" and not _NUMBER.fullmatch(value)
        return f"'{value}" if formula else value
    return "" if finite(value) is None else repr(value) if isinstance(value, float) else value
