"""Output for people and machines: tables that fit their width, JSON, CSV, notes, and a progress bar for what takes
long.

A table is offered as several layouts from the most detailed down; the first that fits the width is printed, so no cell
is ever wrapped. What is not a terminal counts as 120 columns wide.
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
from typing import Any, TypeVar

import typer

from simulator.errors import InputError, one_line
from simulator.units import finite as finite
from simulator.units import percent as percent
from simulator.units import rate as rate
from simulator.units import ratio as ratio
from simulator.units import seconds as seconds
from simulator.units import seconds_between as seconds_between
from simulator.units import size as size

T = TypeVar("T")

PIPED_WIDTH = 120
"""Columns of a table that goes to a pipe or a file."""

PROGRESS_AFTER_S = 2.0
"""A progress bar shows up only when a command has run for so long."""

# fmt: off
BOTTLENECKS_SHORT: Mapping[str, str] = {
    "compute": "comp", "memory": "mem", "l2": "L2", "latency": "lat", "launch": "lnch", "host": "host", "link": "link",
}
# fmt: on
"""Names of bottlenecks for narrow tables."""


@dataclass(frozen=True)
class Column:
    """A column of a table: a title (lines separated by newlines), cells of text, aligned right unless told otherwise;
    style by cell.
    """

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


def columns(rows: Sequence[T], *described: tuple[str, Callable[[T], object]]) -> list[Column]:
    """Columns of a table with a row for each of ``rows``: titles, and how to write a row; "<" before a title aligns
    left.

    >>> print(table_text(columns([1, 20], ("<name", "item {}".format), ("n", str))))
    name      n
    -----------
    item 1    1
    item 20  20
    """
    return [
        Column(title.removeprefix("<"), [str(text(row)) for row in rows], not title.startswith("<"))
        for title, text in described
    ]


def narrowed(columns: Sequence[Column], least: int) -> list[Column]:
    """As many of the columns as fit the width, from the left, but no fewer than the least."""
    kept = list(columns)
    while len(kept) > least and table_width(kept) > width():
        kept.pop()
    return kept


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
    for c in columns:
        table.add_column(Text(c.title), justify="right" if c.right else "left", no_wrap=True, vertical="bottom")
    for i in range(len(columns[0].cells)):
        table.add_row(*(Text(c.cells[i], style=c.styles[i] if c.styles else "") for c in columns))
    out = io.StringIO()
    # the layout was chosen to fit: rich gets all the room it asks for, so it never wraps or cuts
    colors = "standard" if color else None
    console = Console(file=out, width=2000, height=100, force_terminal=color, color_system=colors, legacy_windows=False)  # type: ignore[arg-type]
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
    """Whether to colour: never with NO_COLOR set, else with FORCE_COLOR, else on a terminal whose TERM is not dumb."""
    asked = os.environ.get
    terminal = sys.stdout.isatty() and asked("TERM") != "dumb"
    return not asked("NO_COLOR") and bool(asked("FORCE_COLOR") or terminal)


def note(text: str) -> None:
    """One line for the user, to standard error."""
    print("note:", one_line(" ".join(text.split())), file=sys.stderr)


def interval(found: Any) -> str:
    """A speedup with its interval."""
    return f"{ratio(found.speedup)} ({ratio(found.speedup_lower)}-{ratio(found.speedup_upper)})"


def show_json(value: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
    """Print a record, or a list with one record a line, as JSON: numbers in full, null for what is no number.

    >>> show_json([{"a": 0.1, "b": {"c": float("nan")}}, {"a": 2}])
    [
    {"a": 0.1, "b": {"c": null}},
    {"a": 2}
    ]
    """
    rows = [value] if isinstance(value, Mapping) else value
    text = ",\n".join(json.dumps(finite(row), allow_nan=False, ensure_ascii=False) for row in rows)
    print(text if isinstance(value, Mapping) else f"[\n{text}\n]" if rows else "[]", flush=True)


def checked(file: str, problems: Sequence[str], as_json: bool) -> None:
    """Print what is wrong with a file, a line each; exits with 2 where anything is."""
    if as_json:
        show_json({"file": file, "problems": problems})
    elif not problems:
        print(f"{file}: no problem found")
    else:
        for problem in problems:
            typer.echo(f"prunesim: {problem}", err=True)
    if problems:
        raise typer.Exit(2)


@dataclass(frozen=True)
class Output:
    """Where the rows of a command go: --json, --csv or a table, and --figure beside them; checked before any work."""

    json: bool
    csv: str | None = None
    figures: Sequence[str | None] = ()

    def __post_init__(self) -> None:
        if self.json and self.csv:
            raise InputError("--json and --csv: expected one of them")
        for path in filter(None, self.figures):
            from simulator.figures.save import check_figure

            check_figure(path)
        if self.csv and self.csv != "-":
            from simulator.files.write import check_target

            check_target(self.csv)

    def write(self, rows: Sequence[Mapping[str, Any]], for_csv: Sequence[Mapping[str, Any]] | None = None) -> bool:
        """Write rows (others as CSV, where given); whether a table is wanted instead."""
        if self.json:
            show_json(rows)
        elif self.csv:
            from simulator.files.csv import csv_text

            text = csv_text(rows if for_csv is None else for_csv)
            if self.csv == "-":
                print(text, end="")
            else:
                from simulator.files.write import write_whole

                write_whole(self.csv, text.encode())
        return not (self.json or self.csv)


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A function to call with steps done and steps in all; draws a bar on a terminal once a command has run for two
    seconds.
    """
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
