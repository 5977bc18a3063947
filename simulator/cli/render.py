"""Print conclusions, tables that fit the width, JSON, CSV, notes, and a progress bar of long
commands.

A table has several layouts, the most detailed first; the first that fits the width is printed, so
no cell is wrapped. Pipes and files have 120 columns.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import Any, TypeAlias, TypeVar

import typer

from simulator.display import few, one_percentage
from simulator.errors import one_line
from simulator.units import finite as finite
from simulator.units import percent as percent
from simulator.units import rate as rate
from simulator.units import ratio as ratio
from simulator.units import seconds as seconds
from simulator.units import seconds_between as seconds_between
from simulator.units import size as size

T = TypeVar("T")

# codes of styles on a terminal
ANSI: Mapping[str, int] = {"bold": 1, "red": 31, "green": 32, "yellow": 33}
PIPED_WIDTH = 120  # columns of a table that goes to a pipe or a file
PROGRESS_AFTER_S = 2.0  # run time after which a progress bar appears, s
PROGRESS_EVERY_S = 30.0  # time between progress lines outside a terminal, s
MOST_NOTES = 3  # notes that a run prints without --verbose

# names of bottlenecks for narrow tables
BOTTLENECKS_SHORT: Mapping[str, str] = {
    "compute": "comp",
    "memory": "mem",
    "l2": "L2",
    "latency": "lat",
    "launch": "lnch",
    "host": "host",
    "link": "link",
}


@dataclass(frozen=True)
class Column:
    title: str
    cells: Sequence[str]
    right: bool = True
    styles: Sequence[str] = ()

    @property
    def width(self) -> int:
        return max(len(line) for text in (self.title, *self.cells) for line in text.split("\n"))


def width() -> int:
    return shutil.get_terminal_size((100, 24)).columns if sys.stdout.isatty() else PIPED_WIDTH


def table_width(columns: Sequence[Column]) -> int:
    return sum(c.width for c in columns) + 2 * (len(columns) - 1)


# title, after "<" with cells to the left; attribute, key or function of a row; text of its value
Described: TypeAlias = (
    tuple[str, str | Callable[[T], object]] | tuple[str, str, Callable[[Any], object]]
)


def columns(rows: Sequence[T], *described: Described[T]) -> list[Column]:
    return [_column(rows, *parts) for parts in described]


def _column(
    rows: Sequence[T],
    title: str,
    part: str | Callable[[T], object],
    text: Callable[[Any], object] = str,
) -> Column:
    getter: Any = itemgetter if rows and isinstance(rows[0], Mapping) else attrgetter
    value = part if callable(part) else getter(part)
    cells = [str(text(value(row))) for row in rows]
    return Column(title.removeprefix("<"), cells, not title.startswith("<"))


def narrowed(columns: Sequence[Column], least: int) -> list[Column]:
    """Return as many columns as fit the width, from the left, but at least ``least``."""
    kept = list(columns)
    while len(kept) > least and table_width(kept) > width():
        kept.pop()
    return kept


def show_in_parts(names: Sequence[Column], others: Sequence[Column], title: str = "") -> None:
    """Print tables that begin with the columns ``names``, each with as many others as fit."""
    left = list(others)
    while left:
        shown = narrowed([*names, *left], len(names) + 1)
        print()
        show(shown, title)
        left = left[len(shown) - len(names) :]


def first_fitting(layouts: Iterator[list[Column]]) -> list[Column]:
    columns: list[Column] = []
    for columns in layouts:
        if table_width(columns) <= width():
            break
    return columns


def table_text(columns: Sequence[Column], title: str = "", *, color: bool = False) -> str:
    """Return a table as text with a line under the header, without trailing blanks."""
    height = max(c.title.count("\n") for c in columns) + 1
    titles = [c.title.split("\n") for c in columns]
    titles = [[""] * (height - len(lines)) + lines for lines in titles]
    bold = ["bold" if color else ""] * len(columns)
    out = [_painted(line, bold[0]) for line in title.split("\n") if title]
    out += [_line(columns, [lines[i] for lines in titles], bold) for i in range(height)]
    out.append("-" * table_width(columns))
    for i in range(len(columns[0].cells)):
        styles = [c.styles[i] if color and c.styles else "" for c in columns]
        out.append(_line(columns, [c.cells[i] for c in columns], styles))
    return "\n".join(out)


def _line(columns: Sequence[Column], texts: Sequence[str], styles: Sequence[str]) -> str:
    cells = []
    for column, text, style in zip(columns, texts, styles):
        blanks = " " * (column.width - len(text))
        cells.append(
            blanks + _painted(text, style) if column.right else _painted(text, style) + blanks
        )
    return "  ".join(cells).rstrip()


def _painted(text: str, style: str) -> str:
    """Return a text in a style of :data:`ANSI`, for terminals that support it."""
    return f"\x1b[{ANSI[style]}m{text}\x1b[0m" if style and text else text


def show(columns: Sequence[Column], title: str = "") -> None:
    """Print a table to standard output, in colour if the terminal supports it."""
    print(table_text(columns, textwrap.fill(title, width()), color=colored()))


def colored() -> bool:
    """Return whether to colour: not with NO_COLOR, else with FORCE_COLOR or on a terminal whose
    TERM is not dumb."""
    variable = os.environ.get
    terminal = sys.stdout.isatty() and variable("TERM") != "dumb"
    return not variable("NO_COLOR") and bool(variable("FORCE_COLOR") or terminal)


def conclude(*paragraphs: str) -> None:
    """Print the conclusion of a run, one to three sentences, then an empty line; the tables come
    after it."""
    for text in filter(None, paragraphs):
        say(text)
    print()


def say(text: str, indent: str = "") -> None:
    """Print a sentence with lines that fit the width; later lines are indented."""
    print(
        textwrap.fill(
            text,
            width(),
            subsequent_indent=indent,
            break_on_hyphens=False,
            break_long_words=False,
        )
    )


def between(blocks: Iterable[T]) -> Iterator[T]:
    """Yield blocks of output, with an empty line between two."""
    for i, block in enumerate(blocks):
        if i:
            print()
        yield block


def notes(lines: Iterable[str], verbose: bool = False) -> None:
    """Print notes to standard error, the most important first: with ``verbose`` all, else
    :data:`MOST_NOTES`. Notes that state the same of several subjects ("A: text", "B: text") become
    one. A run calls this once."""
    found = same_together(one_percentage(lines))
    shown = found if verbose else found[:MOST_NOTES]
    more = f" ({len(found) - len(shown)} more with --verbose)" if len(found) > len(shown) else ""
    for i, line in enumerate(shown, start=1):
        print("note:", one_line(line) + (more if i == len(shown) else ""), file=sys.stderr)


def same_together(lines: Iterable[str]) -> list[str]:
    """Return notes with each text once, after all its subjects."""
    subjects: dict[str, list[str]] = {}
    for line in lines:
        subject, colon, text = " ".join(line.split()).partition(": ")
        subjects.setdefault(text if colon else subject, []).append(subject if colon else "")
    return [
        f"{few(_places(some))}: {text}" if any(some) else text for text, some in subjects.items()
    ]


def _places(subjects: Iterable[str]) -> list[str]:
    """Return subjects such as "h100_sxm, batch 1" with each device once."""
    found: dict[str, list[str]] = {}
    for subject in subjects:
        device, _, request = subject.partition(", ")
        found.setdefault(device, []).append(request)
    return [
        ", ".join(filter(None, (device, " and ".join(dict.fromkeys(some)))))
        for device, some in found.items()
    ]


def status(text: str) -> None:
    print("status:", one_line(" ".join(text.split())), file=sys.stderr)


def interval(found: Any) -> str:
    return f"{ratio(found.speedup)} ({ratio(found.speedup_lower)}-{ratio(found.speedup_upper)})"


def show_json(value: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
    """Print a record, or a list with one record per line, as JSON: exact numbers, null for NaN and
    infinity."""
    rows = [value] if isinstance(value, Mapping) else value
    text = ",\n".join(json.dumps(finite(row), allow_nan=False, ensure_ascii=False) for row in rows)
    print(text if isinstance(value, Mapping) else f"[\n{text}\n]" if rows else "[]", flush=True)


def checked(
    file: str, problems: Sequence[str], as_json: bool, warnings: Sequence[str] = ()
) -> None:
    """Print the problems of a file, one per line; exit with 2 if there are any. Warnings are
    notes."""
    if as_json:
        show_json({"file": file, "problems": problems, "warnings": warnings})
    elif not problems:
        print(f"{file}: no problem found")
        notes(warnings, verbose=True)
    else:
        for problem in problems:
            typer.echo(f"prunesim: {problem}", err=True)
    if problems:
        raise typer.Exit(2)


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function of steps (or seconds) done and their number. On a terminal, it draws a bar
    after some seconds; into a file, it prints a line every :data:`PROGRESS_EVERY_S`."""
    start = printed = time.monotonic()
    shown = False
    usable = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def report(done: int, total: int) -> None:
        nonlocal shown, printed
        now = time.monotonic()
        elapsed = now - start
        left = max(elapsed / max(done, 1) * (total - done), 0.0)
        if not usable:
            if now - printed >= PROGRESS_EVERY_S:
                printed = now
                status(f"{what}: {done} of {max(done, total)}, {left:.0f} s left")
            return
        if elapsed < PROGRESS_AFTER_S:
            return
        shown = True
        filled = min(round(30 * done / max(total, 1)), 30)
        sys.stderr.write(
            f"\r{what} [{'#' * filled}{'.' * (30 - filled)}] {done}/{total}, {left:.0f} s left"
            " \x1b[K"
        )
        sys.stderr.flush()

    try:
        yield report
    finally:
        if shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
