"""Output for people and machines: tables that fit their width, JSON, CSV, notes, and a progress bar for what takes long.

A table is offered as several layouts from the most detailed down; the first that fits the width is printed, so no cell is ever
wrapped. What is not a terminal counts as 120 columns wide.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from simulator.errors import one_line
from simulator.predict.words import csv_text as csv_text
from simulator.units import finite as finite
from simulator.units import percent as percent
from simulator.units import rate as rate
from simulator.units import ratio as ratio
from simulator.units import seconds as seconds
from simulator.units import size as size

PIPED_WIDTH = 120
"""Columns of a table that goes to a pipe or a file."""

PROGRESS_AFTER_S = 2.0
"""A progress bar shows up only when a command has run for so long."""

LIMITS_SHORT: Mapping[str, str] = {
    "compute": "comp",
    "memory": "mem",
    "l2": "L2",
    "latency": "lat",
    "launch": "lnch",
    "host": "host",
    "link": "link",
}
"""Names of limits for narrow tables."""


@dataclass(frozen=True)
class Column:
    """A column of a table: a title (lines separated by newlines), cells of text, aligned right unless told otherwise; style by cell."""

    title: str
    cells: Sequence[str]
    right: bool = True
    styles: Sequence[str] = ()

    @property
    def width(self) -> int:
        """Characters of the widest line."""
        return max(len(line) for text in (self.title, *self.cells) for line in text.split("\n"))


def width() -> int:
    """Columns there are on standard output."""
    return shutil.get_terminal_size((100, 24)).columns if sys.stdout.isatty() else PIPED_WIDTH


def table_width(columns: Sequence[Column]) -> int:
    """Columns a table takes.

    >>> table_width([Column("a", ["123"]), Column("b", ["1"])])
    6
    """
    return sum(c.width for c in columns) + 2 * (len(columns) - 1)


def first_fitting(layouts: Iterator[list[Column]], available: int) -> list[Column]:
    """The first layout that fits, or the last one."""
    columns: list[Column] = []
    for columns in layouts:
        if table_width(columns) <= available:
            break
    return columns


def table_text(columns: Sequence[Column], title: str = "", *, color: bool = False) -> str:
    """A table as text with a ruled header; no line is wrapped, trailing blanks are cut.

    >>> print(table_text([Column("name", ["a", "bc"], right=False), Column("n", ["1", "20"])]))
    name   n
    --------
    a      1
    bc    20
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=_rule(box), show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(
            Text(column.title), justify="right" if column.right else "left", no_wrap=True, vertical="bottom"
        )
    for i in range(len(columns[0].cells)):
        table.add_row(*(Text(c.cells[i], style=c.styles[i] if c.styles else "") for c in columns))
    out = io.StringIO()
    # the layout was chosen to fit: rich gets all the room it asks for, so it never wraps or cuts
    console = Console(
        file=out,
        width=2000,
        height=100,
        force_terminal=color,
        color_system="standard" if color else None,
        legacy_windows=False,
    )
    if title:
        console.print(Text(title, style="bold"), soft_wrap=True)
    console.print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _rule(box: Any) -> Any:
    """Only a line under the header, in characters every terminal has."""
    return box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)


def show(columns: Sequence[Column], title: str = "") -> None:
    """Print a table to standard output, in colour on a terminal that wants it."""
    print(table_text(columns, textwrap.fill(title, width()), color=colored()))


def colored() -> bool:
    """Whether to colour: a terminal, and neither NO_COLOR set nor TERM dumb."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def note(text: str) -> None:
    """One line for the person at the terminal, to standard error."""
    print("note:", one_line(" ".join(text.split())), file=sys.stderr)


# -- machines ---------------------------------------------------------------------------------------------------------------------


def json_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    """A JSON list, one record a line, numbers in full.

    >>> print(json_lines([{"a": 0.1, "b": None}, {"a": 2}]))
    [
    {"a": 0.1, "b": null},
    {"a": 2}
    ]
    """
    lines = ",\n".join(
        json.dumps({k: finite(v) for k, v in row.items()}, allow_nan=False, ensure_ascii=False) for row in rows
    )
    return f"[\n{lines}\n]" if rows else "[]"


# -- people -----------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A function to call with steps done and steps in all; draws a bar on a terminal once a command has run for two seconds."""
    start = time.monotonic()
    shown = False
    usable = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def report(done: int, total: int) -> None:
        nonlocal shown
        elapsed = time.monotonic() - start
        if not usable or elapsed < PROGRESS_AFTER_S:
            return
        shown = True
        filled = round(30 * done / max(total, 1))
        left = elapsed / max(done, 1) * (total - done)
        sys.stderr.write(f"\r{what} [{'#' * filled}{'.' * (30 - filled)}] {done}/{total}, {left:.0f} s left \x1b[K")
        sys.stderr.flush()

    try:
        yield report
    finally:
        if shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
